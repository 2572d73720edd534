"""A run folder as one HTML page that needs nothing else: `python -m specjax.report RUN [--samples N]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from specjax.cli import Models, add_device_arguments, decoding_mesh, load_models
from specjax.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from specjax.reporting.run_folder import Run
    from specjax.reporting.samples import Sample

PAGE_FILE = "report.html"


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specjax.report", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a training run")
    parser.add_argument("--out", type=Path, help=f"the page (default: {PAGE_FILE} in the run folder)")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="decode N prompts, and show which drafts were accepted"
    )
    parser.add_argument(
        "--data", nargs="+", help="files of the samples' prompts (target 'embedded': held-out ones of the quickstart)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of a sample")
    add_device_arguments(parser)
    args = parser.parse_args(argv)
    if args.data is not None and args.samples is None:
        raise InputError("--data names the prompts of samples; say how many with --samples N, or leave it out")
    for name in ("samples", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    out = args.out or args.run / PAGE_FILE
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give a file")

    from specjax.reporting.page import render
    from specjax.reporting.run_folder import read_run

    run = read_run(args.run)
    samples = None if args.samples is None else _samples(args, run)
    page = render(run, samples, datetime.now(UTC))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from error
    print(f"wrote {out}")


def _samples(args: argparse.Namespace, run: Run) -> list[Sample]:
    """Answers of the run's target with its draft (the latest checkpoint's) to `args.samples` prompts."""
    config = run.config
    if config.kind == "causal_lm":
        raise InputError(f"--samples shows accepted drafts, but {run.folder} is of kind {config.kind}; leave it out")
    if run.saved_step is None:
        raise InputError(f"--samples needs a draft, but {run.folder} has saved no checkpoint yet; leave it out")
    if args.data is None and config.target.path != "embedded":
        raise InputError(f"--samples for target {config.target.path} needs prompts; name them with --data FILE.jsonl")

    from specjax.reporting.samples import decode_samples

    models_of_run = argparse.Namespace(
        target=config.target.path,
        draft=str(run.folder),
        dtype=args.dtype,
        tensor=args.tensor,
        chat_template_kwargs=config.data.chat_template_kwargs,
    )
    with decoding_mesh(models_of_run):
        models = load_models(models_of_run)
        return decode_samples(models, _prompts(args, run, models), args.max_new_tokens)


def _prompts(args: argparse.Namespace, run: Run, models: Models) -> dict[str, list[int]]:
    """Token ids of the samples' prompts by where they are from."""
    if args.data is None:
        from specjax.quickstart import DOMAINS, embedded_prompts, prompt_counts

        counts = prompt_counts(max(args.samples, len(DOMAINS)))
        heldout = embedded_prompts(models.tokenizer, "heldout", counts)
        named = {f"{domain}, {i}": ids for domain, prompts in heldout.items() for i, ids in enumerate(prompts, 1)}
        return dict(list(named.items())[: args.samples])

    from specjax.data.prompts import read_prompts

    prompts = read_prompts(
        args.data,
        models.tokenizer,
        chat_template_kwargs=run.config.data.chat_template_kwargs,
        limit=args.samples,
        vocab_size=models.target.config.vocab_size,
    )
    return {f"prompt {i}": ids for i, ids in enumerate(prompts, 1)}


if __name__ == "__main__":
    main()
