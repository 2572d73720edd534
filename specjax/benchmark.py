"""Measures training, its memory, recipes, decoding or loading, or says what decoding takes at least:
`specjax.benchmark train|memory|recipes|decode|load|roofline`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from specjax.benchmark_decode import add_decode_arguments, run_decode, write_decode_folder
from specjax.benchmark_roofline import add_roofline_arguments, run_roofline
from specjax.errors import InputError, exit_on_input_error
from specjax.metadata import run_metadata
from specjax.print_table import print_table
from specjax.pytorch import require_torch


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specjax.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    decode = commands.add_parser("decode", help="acceptance and speed of a draft against autoregressive decoding")
    add_decode_arguments(decode)
    load = commands.add_parser("load", help="time and memory of loading a model folder, against reading its files")
    load.add_argument("--target", help="model folder (default: random weights of a 1.5 GB shape)")
    load.add_argument("--runs", type=int, default=3)
    load.add_argument("--json", type=Path, help="also write the report here")
    _add_train(commands)
    _add_memory(commands)
    roofline = commands.add_parser("roofline", help="the least that rounds take on a device; nothing runs")
    add_roofline_arguments(roofline)
    recipes = commands.add_parser("recipes", help="acceptance of drafts trained by variants of a run config")
    recipes.add_argument("spec", help="YAML file of variants, such as configs/recipes/quickstart.yaml")
    recipes.add_argument("--out", required=True, type=Path, help="folder of the runs and of the table; continued")
    recipes.set_defaults(json=None)
    args = _parse(parser, argv)
    if any(size < 2 for size in getattr(args, "vocab_size", ())):
        raise InputError(f"--vocab-size is {min(args.vocab_size)}; give at least 2")
    for name, least in (("runs", 1), ("limit", 1), ("steps", 1), ("warmup", 0)):
        if getattr(args, name, None) is not None and getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least {least}")
    if args.json is not None and args.json.is_dir():
        raise InputError(f"--json {args.json} is a folder; give a file")
    run = {"train": _train, "memory": _memory, "recipes": _recipes, "load": _load}
    run |= {"decode": run_decode, "roofline": run_roofline}
    report = run[args.command](args)
    command = shlex.join(["python", "-m", "specjax.benchmark", *(sys.argv[1:] if argv is None else argv)])
    content = {args.command: report, "metadata": run_metadata() | {"command": command}}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.command == "decode" and args.out is not None:
        write_decode_folder(args.out, content)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with overrides before or after options, which argparse does not take of subcommands.

    An option of several values takes overrides that follow it for values.
    """
    args, others = parser.parse_known_args(argv)
    if others and ("overrides" not in args or any(other.startswith("-") for other in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        args.overrides += others
    return args


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="time and memory of a run config's train step, on synthetic rows")
    train.add_argument("config", help="YAML run config; the data files that it names are not read")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    train.add_argument("--steps", type=int, default=20, help="timed steps")
    train.add_argument("--warmup", type=int, default=3, help="untimed steps before them")
    train.add_argument(
        "--random-target", action="store_true", help="random weights of the shape in the target's config.json"
    )
    train.add_argument(
        "--captured", action="store_true", help="random states in place of the target's, as if data.taps were set"
    )
    train.add_argument(
        "--compare", choices=["torch"], help="also time PyTorch's step, both on captured states (loss.objective ce)"
    )
    train.add_argument("--json", type=Path, help="also write the report here")


def _add_memory(commands: Any) -> None:
    memory = commands.add_parser("memory", help="memory of a run config's train step by the compiler; nothing runs")
    memory.add_argument("config", help="YAML run config; the weights and data files that it names are not read")
    memory.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    memory.add_argument(
        "--vary", action="append", nargs="+", default=[], metavar=("section.key", "V"), help="a row for each value"
    )
    memory.add_argument("--vocab-size", type=int, nargs="+", default=[], help="a row for each vocabulary of the target")
    memory.add_argument("--topology", help="compile for a TPU slice that need not be here, such as v5e:4x4")
    memory.add_argument("--json", type=Path, help="also write the report here")


def _memory(args: argparse.Namespace) -> dict[str, Any]:
    from specjax.config import load_config

    variants: list[tuple[str, list[str], int | None]] = [("as configured", [], None)]
    for name, *values in args.vary:
        if not values:
            raise InputError(f"--vary {name}: give values after it")
        variants += [(f"{name}={value}", [f"{name}={value}"], None) for value in values]
    variants += [(f"vocabulary of {size}", [], size) for size in args.vocab_size]
    configs = [load_config(args.config, [*args.overrides, *changes]) for _, changes, _ in variants]
    from specjax.training.benchmark import Settings, check_measurable
    from specjax.training.memory import MIB, step_memory, topology_devices

    for config in configs:
        check_measurable(config, Settings())
    devices = None if args.topology is None else topology_devices(args.topology)
    report, rows = {}, []
    with Console(stderr=True).status("compiling") as status:
        for (name, _, vocab_size), config in zip(variants, configs, strict=True):
            status.update(f"compiling: {name}")
            report[name] = step_memory(config, vocab_size=vocab_size, devices=devices)
            found = [f"{size / MIB:,.1f}" for size in report[name].values()]
            rows.append((name, *(found or ("", "", "does not fit"))))
    print_table("memory of a train step, MiB a device", ["arguments", "temporaries", "peak"], rows)
    return report


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from specjax.config import load_config

    config = load_config(args.config, args.overrides)
    from specjax.training.benchmark import Settings, benchmark_training, check_measurable
    from specjax.training.benchmark_tables import tables

    if args.compare:
        require_torch("--compare torch")
    settings = Settings(args.steps, args.warmup, args.random_target, args.captured, args.compare == "torch")
    try:
        check_measurable(config, settings)
    except InputError as error:
        raise InputError(f"{args.config}: {error}") from None
    with Console(stderr=True).status("training") as status:
        report = benchmark_training(config, settings, status.update)
    for title, columns, rows in tables(report):
        print_table(title, columns, rows)
    return report


def _load(args: argparse.Namespace) -> dict[str, Any]:
    from specjax.weights.load_benchmark import measure_load, write_random_model

    if args.target is not None:
        report = measure_load(args.target, repeats=args.runs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = measure_load(write_random_model(folder), repeats=args.runs)
    extra = report["peak_extra_in_largest_tensors"]
    print_table(
        "loading",
        ["value"],
        [
            ("files", f"{report['files_bytes'] / 1e9:.2f} GB, {report['dtype']}"),
            ("reading the files", f"{report['read_seconds']:.2f} s (cold {report['read_cold_seconds']:.2f} s)"),
            ("loading the model", f"{report['load_seconds']:.2f} s (cold {report['load_cold_seconds']:.2f} s)"),
            ("ratio", f"{report['ratio']:.2f} (cold {report['ratio_cold']:.2f})"),
            ("peak extra anonymous memory", "not known here" if extra is None else f"{extra:.2f} largest tensors"),
        ],
    )
    return report


def _recipes(args: argparse.Namespace) -> dict[str, Any]:
    from specjax.recipe_table import comparison, markdown
    from specjax.recipes import CommandError, carry_out, load_spec, planned_runs

    spec = load_spec(args.spec)
    runs = planned_runs(spec, args.spec, args.out)
    try:
        failed = carry_out(spec, runs, args.out, lambda text: print(text, flush=True))
    except CommandError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None
    report = comparison(spec, runs, failed)
    table = markdown(report)
    print(f"\n{table}")
    text = json.dumps(report | {"metadata": run_metadata()}, indent=2) + "\n"
    for name, content in (("recipes.json", text), ("recipes.md", table)):
        (args.out / name).write_text(content, encoding="utf-8")
        print(f"wrote {args.out / name}")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed; see above. The same command tries them again")
    return report


if __name__ == "__main__":
    main()
