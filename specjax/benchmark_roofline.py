"""`python -m specjax.benchmark roofline`: the acceptance length at which a draft begins to pay on a device."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

from specjax.devices import PEAKS, Peak
from specjax.errors import InputError
from specjax.print_table import print_table


def add_roofline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", help="YAML run config of a draft; the weights and data files that it names are not read"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    parser.add_argument("--device", help=f"one of {', '.join(PEAKS)}; for another give --tflops and --gb-s")
    parser.add_argument("--tflops", type=float, help="dense bf16 peak of the device, instead of --device")
    parser.add_argument("--gb-s", type=float, help="GB/s from the device's memory, instead of --device")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="N", help="rows decoded together")
    parser.add_argument(
        "--context", type=int, nargs="+", default=[2048], metavar="N", help="tokens of a row in the cache"
    )
    parser.add_argument(
        "--draft-tokens", type=int, nargs="+", metavar="N", help="drafts verified a round (default: block size - 1)"
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        nargs="+",
        default=[],
        metavar="L",
        help="also the speedup at this acceptance length",
    )
    parser.add_argument("--json", type=Path, help="also write the report here")


def run_roofline(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a row for every way of drafting at every size; returns peaks and rows."""
    from specjax.config import load_config

    peak = _peak(args)
    for option, values, least in (
        ("--batch-size", args.batch_size, 1),
        ("--context", args.context, 0),
        ("--acceptance", args.acceptance, 1),
    ):
        for value in values:
            if not least <= value < math.inf:
                raise InputError(f"{option} is {value:g}; give a number from {least} on")
    config = load_config(args.config, args.overrides)
    if config.kind == "causal_lm":
        raise InputError(f"{args.config}: kind is {config.kind}; give the config of a draft (dflash, lora)")
    from specjax.decoding.roofline import Workload, autoregressive, seconds, speculative
    from specjax.training.benchmark import with_mask_token
    from specjax.training.tasks import draft_config_of, lora_draft_config_of
    from specjax.weights import read_target_config

    target = read_target_config(config.target.path)
    config = with_mask_token(config, target.vocab_size)
    draft = lora_draft_config_of(config) if config.kind == "lora" else draft_config_of(config)
    for count in args.draft_tokens or ():
        if not 1 <= count < draft.block_size:
            raise InputError(
                f"--draft-tokens is {count}; draft.block_size is {draft.block_size}: give 1 to {draft.block_size - 1}"
            )
    report: list[dict[str, Any]] = []
    for sizes in itertools.product(args.batch_size, args.context, args.draft_tokens or [draft.block_size - 1]):
        work = Workload(*sizes)
        step = seconds(autoregressive(target, work), peak)
        for way, passes in speculative(target, draft, work).items():
            taken = seconds(passes, peak)
            row = {"batch_size": work.rows, "context": work.context, "draft_tokens": work.draft_tokens, "way": way}
            row |= {"autoregressive_step_s": step, "round_s": taken, "break_even_acceptance_length": taken / step}
            speedups = {
                f"{length:g}": length * step / taken if length <= work.draft_tokens + 1 else None
                for length in args.acceptance
            }
            report.append(row | {"speedup": speedups})
    columns = ["context", "drafts", "way", "AR step, ms", "round, ms", "pays above acceptance length"]
    print_table(
        f"least times at {peak.tflops:g} TFLOP/s and {peak.gb_s:g} GB/s, by the roofline model: nothing was measured; "
        "never and -: more than a round can yield",
        [*columns, *(f"speedup at {length}" for length in report[0]["speedup"])],
        [_shown(row) for row in report],
        "batch size",
    )
    return {"tflops": peak.tflops, "gb_s": peak.gb_s, "rows": report}


def _peak(args: argparse.Namespace) -> Peak:
    given = args.tflops, args.gb_s
    if args.device is not None:
        if given != (None, None):
            raise InputError("--device says both peaks; leave --tflops and --gb-s out, or --device")
        if args.device not in PEAKS:
            raise InputError(
                f"--device {args.device} is not known; give --tflops and --gb-s, or one of {', '.join(PEAKS)}"
            )
        return PEAKS[args.device]
    if None in given:
        raise InputError("which device? Give --device, or both --tflops and --gb-s")
    if not all(0 < value < math.inf for value in given):
        raise InputError(f"--tflops is {args.tflops:g} and --gb-s is {args.gb_s:g}; both must be finite and above 0")
    return Peak(*given)


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    length = row["break_even_acceptance_length"]
    return (
        str(row["batch_size"]),
        str(row["context"]),
        str(row["draft_tokens"]),
        row["way"],
        f"{1e3 * row['autoregressive_step_s']:.3g}",
        f"{1e3 * row['round_s']:.3g}",
        f"{length:.2f}" if length <= row["draft_tokens"] + 1 else f"never ({length:.2f})",
        *("-" if speedup is None else f"{speedup:.2f}x" for speedup in row["speedup"].values()),
    )
