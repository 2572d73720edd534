"""`python -m specjax.benchmark decode`: a draft against autoregressive decoding, over a grid of settings."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from specjax.cli import (
    Models,
    add_draw_arguments,
    add_model_arguments,
    check_seed,
    decoding_mesh,
    dtype_name,
    load_models,
    number_or_auto,
    read_draft_config,
)
from specjax.errors import InputError
from specjax.print_table import print_table
from specjax.pytorch import require_torch

if TYPE_CHECKING:
    from specjax.decoding.benchmark_settings import Settings

Report = dict[str, Any]


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, draft_required=True)
    parser.add_argument("--data", required=True, nargs="+", help="prompt sets (gsm8k, gsm8k=FILE), files, hf://...")
    parser.add_argument("--limit", type=int, help="use the first N examples of each set only")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="N", help="prompts decoded together")
    parser.add_argument(
        "--draft-tokens",
        nargs="+",
        default=[],
        metavar="N",
        help="drafts verified a round (default: all), or auto: what pays, as measured",
    )
    parser.add_argument(
        "--tree-nodes",
        nargs="+",
        default=[],
        metavar="N",
        help="also verify trees of so many drafts, or auto: what pays of chains and trees",
    )
    parser.add_argument(
        "--rule",
        nargs="+",
        default=["match"],
        metavar="RULE",
        help="how drafts are kept, at a temperature: match (the default), rejection, block",
    )
    parser.add_argument(
        "--draft-choice",
        nargs="+",
        default=["argmax"],
        metavar="CHOICE",
        help="drafts are the likeliest (argmax, the default) or, at a temperature, drawn (sample)",
    )
    parser.add_argument(
        "--one-pass", action="store_true", help="also draft in the target's own pass: a LoRA draft with masked anchors"
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0], metavar="T", help="0 is greedy")
    add_draw_arguments(parser)
    parser.add_argument("--runs", type=int, default=5, help="timed repetitions, all ways of decoding interleaved")
    parser.add_argument(
        "--compare", choices=["hf"], help="also time transformers' generate and a PyTorch DFlash loop (needs PyTorch)"
    )
    parser.add_argument("--json", type=Path, help="also write the report here")
    parser.add_argument(
        "--out", type=Path, help="folder for benchmark.json, benchmark.md and, with matplotlib, plots of them"
    )


def run_decode(args: argparse.Namespace) -> dict[str, Report]:
    """Measures and prints; the report by data set, or by combination of settings and data set."""
    from specjax.benchmark_prompts import named_entries, read_data_sets
    from specjax.decoding.benchmark import benchmark_decoding
    from specjax.decoding.benchmark_tables import tables

    entries = named_entries(args.data)
    settings = _checked(args)
    with decoding_mesh(args), Console(stderr=True).status("loading") as status:
        models = load_models(args)
        assert models.draft is not None
        status.update("reading prompts")
        data_sets = read_data_sets(
            entries,
            models,
            chat_template_kwargs=args.chat_template_kwargs,
            max_new_tokens=args.max_new_tokens,
            limit=args.limit,
        )
        settings = replace(settings, stop_token_ids=models.stop_token_ids)
        reports = benchmark_decoding(models.target, models.draft, data_sets, settings, status.update)
        if args.compare:
            status.update("decoding with PyTorch")
            for name, compared in _compare(args, models, data_sets, settings).items():
                reports[name]["hf"] = compared
    for title, columns, rows in tables(reports):
        print_table(f"{args.draft}: {title}", columns[1:], rows, columns[0])
    return reports


def _checked(args: argparse.Namespace) -> Settings:
    """The settings, as far as they are known before anything is loaded.

    Raises:
        InputError: a value out of range, a draft that proposes fewer tokens, or what --compare cannot do.
    """
    from specjax.decoding.benchmark_settings import AUTO, Settings, check_settings
    from specjax.decoding.torch_comparison import check_comparable
    from specjax.weights import read_target_config

    settings = Settings(
        max_new_tokens=args.max_new_tokens,
        batch_sizes=tuple(args.batch_size),
        draft_tokens=tuple(map(number_or_auto, args.draft_tokens)),
        tree_nodes=tuple(number_or_auto(nodes, "--tree-nodes") for nodes in args.tree_nodes),
        rules=tuple(args.rule),
        draft_choices=tuple(args.draft_choice),
        one_pass=args.one_pass,
        temperatures=tuple(args.temperature),
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        runs=args.runs,
    )
    check_seed(args)
    if args.out is not None and args.out.is_file():
        raise InputError(f"--out {args.out} is a file; give a folder")
    if args.compare:
        require_torch("--compare hf")
        for option, given, wanted in (
            ("--batch-size", settings.batch_sizes, (1,)),
            ("--temperature", settings.temperatures, (0.0,)),
            ("--rule", settings.rules, ("match",)),
            ("--draft-choice", settings.draft_choices, ("argmax",)),
        ):
            if given != wanted:
                shown = " ".join(map(str, given))
                raise InputError(f"--compare hf decodes prompt by prompt, greedily: {option} is {shown}; leave it out")
        if len(settings.draft_tokens) > 1 or AUTO in settings.draft_tokens or settings.tree_nodes or settings.one_pass:
            raise InputError(
                "--compare hf compares one number of draft tokens; give --draft-tokens once, without auto, and leave "
                "--tree-nodes and --one-pass out"
            )
    target = read_target_config(args.target)
    config = read_draft_config(args.draft, target)
    check_settings(settings, config, target.vocab_size)
    if args.compare:
        check_comparable(config, dtype_name(args))
    return settings


def _compare(
    args: argparse.Namespace, models: Models, data_sets: dict[str, list[list[int]]], settings: Settings
) -> dict[str, Report]:
    from specjax.decoding.benchmark_settings import AUTO
    from specjax.decoding.torch_comparison import Task, compare_with_torch
    from specjax.models.dflash import DFlashDraft
    from specjax.weights import model_folder

    assert isinstance(models.draft, DFlashDraft)
    (way,) = settings.ways(models.draft.config.block_size, temperature=0.0)
    assert way.draft_tokens != AUTO
    task = Task(settings.max_new_tokens, settings.stop_token_ids, way.draft_tokens, settings.runs)
    return compare_with_torch(model_folder(args.target), models.target, models.draft, data_sets, task)


def write_decode_folder(folder: Path, content: dict[str, Any]) -> None:
    """Writes benchmark.json (content: the reports under "decode", and "metadata"), benchmark.md, and plots of them."""
    from specjax.decoding.benchmark_plots import write_plots
    from specjax.decoding.benchmark_tables import markdown, tables

    folder.mkdir(parents=True, exist_ok=True)
    metadata, reports = content["metadata"], content["decode"]
    versions = ", ".join(f"{name} {version}" for name, version in metadata["packages"].items())
    device = metadata["devices"]
    made = (
        f"    {metadata['command']}\n\nspecjax {metadata['specjax']}, revision {metadata['git_revision']}, Python "
        f"{metadata['python']}, {versions}; {device['count']} x {device['kind']} ({device['backend']}), "
        f"{metadata['platform']}.\n"
    )
    texts = {
        "benchmark.json": json.dumps(content, indent=2) + "\n",
        "benchmark.md": f"{made}\n{markdown(tables(reports))}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    try:
        plots = [path.name for path in write_plots(reports, folder)]
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'specjax[plots]')")
        plots = []
    print(f"wrote {', '.join([*texts, *plots])} in {folder}")
