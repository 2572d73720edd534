"""The whole way on the embedded target: answers, training, export, decoding: `python -m specjax.quickstart [CONFIG]`.

The target answers training prompts, a draft is trained on the answers, exported to the folder that servers load,
loaded again from there, and measured against autoregressive decoding on held-out prompts. A second call continues
where the first one stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specjax.config import RunConfig, load_config
from specjax.errors import InputError, exit_on_input_error
from specjax.metadata import run_metadata
from specjax.print_table import print_table

if TYPE_CHECKING:
    from specjax.data.embedded.splitting import Conversation
    from specjax.decoding.benchmark import Report
    from specjax.models.decoder import Decoder

DEFAULT_CONFIG = "configs/quickstart.yaml"
MAX_PROMPT_TOKENS = 128
TAPS = "taps"  # in output_dir, unless data.taps names another folder
ANSWER_BATCH = 128
# Most functions end earlier, and a batch waits for its longest answer; the others mostly repeat themselves.
TRAINING_ANSWER_TOKENS = {"code": 64}
VALIDATION_PROMPTS = 32
WORD_PROBLEM_SEEDS = {"train": 0, "heldout": 1}
DOMAINS = ("code", "word problems")
# Of the training prompts: a draft gains more from problems, whose answers are far more regular. Validation and
# held-out prompts are mixed alike.
CODE_SHARE = 1 / 3
SUMMARY_FIELDS = (
    "acceptance_length",
    "acceptance_rate",
    "speedup_decode",
    "speedup_end_to_end",
    "ar_tokens_per_s",
    "speculative_tokens_per_s",
    "identical",
    "repeated_4gram_fraction",
    "prompts",
    "tokens",
)

Prompts = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Sizes:
    """train_prompts, heldout_prompts: over both domains. runs: timed repetitions."""

    train_prompts: int
    heldout_prompts: int
    max_new_tokens: int
    runs: int


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specjax.quickstart", description=__doc__)
    parser.add_argument("config", nargs="?", default=DEFAULT_CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--train-prompts", type=int, default=1920, help="a third of them code")
    parser.add_argument("--heldout-prompts", type=int, default=60, help="a third of them code")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=2, help="timed repetitions")
    parser.add_argument("--data-only", action="store_true", help="write the data to compare recipes on, and stop")
    args = parser.parse_intermixed_args(argv)
    if "=" in args.config:
        args.config, args.overrides = DEFAULT_CONFIG, [args.config, *args.overrides]
    sizes = Sizes(args.train_prompts, args.heldout_prompts, args.max_new_tokens, args.runs)
    for name, value in vars(sizes).items():
        least = len(DOMAINS) if name.endswith("_prompts") else 1
        if value < least:
            raise InputError(f"--{name.replace('_', '-')} is {value}; give at least {least}")
    started = time.perf_counter()
    config = load_config(args.config, args.overrides)
    check(config)
    if args.data_only:
        write_data(config, sizes)
        return
    reports = run(config, sizes)
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")
    if not reports["all"]["identical"]:
        raise SystemExit("the outputs with and without the draft differ: this must not happen; please report it")


def check(config: RunConfig) -> None:
    """Raises InputError for what would otherwise fail after minutes: a config of another kind, no means to plot."""
    if config.kind == "causal_lm":
        raise InputError(f"kind is {config.kind}; the quickstart trains a draft: give dflash or lora")
    for name in ("train", "validation"):
        files = getattr(config.data, name)
        if len(files) != 1:
            raise InputError(f"data.{name} names {len(files)} files; the quickstart writes one: name one")
    if config.training.steps is None:
        raise InputError("training.epochs is set; the quickstart counts updates: set training.steps")
    if not config.logging.tensorboard:
        raise InputError("logging.tensorboard is false; the quickstart plots the losses written there: leave it true")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the quickstart's plots need matplotlib; install the extra: pip install 'specjax[plots]'")


def run(config: RunConfig, sizes: Sizes) -> dict[str, Report]:
    """Runs every stage and returns the held-out reports, by domain and of "all"."""
    from specjax import weights
    from specjax.decoding import generate
    from specjax.models.precision import matmul_precision
    from specjax.training.capture import capture
    from specjax.training.run import train
    from specjax.weights.orbax_checkpoint import latest_step

    folder = Path(config.output_dir)
    with matmul_precision("float32"):
        target, stops, heldout = prepare(config, sizes)
        if config.kind == "dflash":  # adapters need keys of the target's, which are not captured
            taps = capture(config, config.data.taps or folder / TAPS, print)
            config = config.model_copy(update={"data": config.data.model_copy(update={"taps": str(taps)})})
        train(config, generate=generate, resume=True)
        if latest_step(folder) != config.training.steps:
            raise InputError(f"training stopped at step {latest_step(folder)}; continue with the same command")
        exported = folder / "draft"
        draft = weights.load_run_draft(folder, "best")
        weights.save_draft(draft, exported, fingerprint=weights.read_fingerprint(folder))
        print(f"exported the draft to {exported}")
        reports = evaluate(target, exported, stops, heldout, sizes)
    write_summary(folder, reports)
    plot(folder, reports)
    return reports


def prepare(config: RunConfig, sizes: Sizes) -> tuple[Decoder, tuple[int, ...], Prompts]:
    """Sees to the answers to train on; returns the target, its stop tokens and the held-out prompts."""
    from specjax import weights
    from specjax.training.tasks import draft_config_of, lora_draft_config_of
    from specjax.weights.tokenizer import load_tokenizer, stop_token_ids

    # A draft that does not fit is refused before answers are written.
    (lora_draft_config_of if config.kind == "lora" else draft_config_of)(config)
    target = weights.load_target(config.target.path, dtype="float32")
    tokenizer = load_tokenizer(config.target.path)
    stops = stop_token_ids(config.target.path)
    measured, validation = prompt_counts(sizes.heldout_prompts), prompt_counts(VALIDATION_PROMPTS)
    prompts = embedded_prompts(
        tokenizer, "heldout", {domain: count + validation[domain] for domain, count in measured.items()}
    )
    heldout = {domain: prompts[domain][:count] for domain, count in measured.items()}
    beyond = {domain: prompts[domain][count:] for domain, count in measured.items()}
    answer_files(config, sizes, target, tokenizer, stops, beyond)
    return target, stops, heldout


def write_data(config: RunConfig, sizes: Sizes) -> None:
    """Writes what recipes are compared on, beside the answers to train on: `original.jsonl`, the corpus' own answers
    to the same prompts, and `heldout/`, the held-out prompts of each domain."""
    from specjax.data.dialogues import answer_record
    from specjax.data.recipe_file import write_whole
    from specjax.models.precision import matmul_precision
    from specjax.weights.tokenizer import load_tokenizer

    with matmul_precision("float32"):
        heldout = prepare(config, sizes)[2]
    tokenizer = load_tokenizer(config.target.path)
    training = embedded_conversations(tokenizer, "train", prompt_counts(sizes.train_prompts))
    files: dict[str, list[Any]] = {"original": [pair[0] for pairs in training.values() for pair in pairs]}
    for domain, prompts in heldout.items():
        files[f"heldout/{domain.replace(' ', '_')}"] = [answer_record(prompt, ()) for prompt in prompts]
    for name, records in files.items():
        path = Path(config.data.weighted_sources[0][0]).parent / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
        print(f"wrote {path}")


def prompt_counts(prompts: int) -> dict[str, int]:
    """How many of at least two prompts each domain has."""
    code = round(prompts * CODE_SHARE)
    return dict(zip(DOMAINS, (code, prompts - code), strict=True))


def embedded_prompts(tokenizer: Any, split: Any, counts: dict[str, int]) -> Prompts:
    """The prompts of `embedded_conversations`, as token ids."""
    pairs = embedded_conversations(tokenizer, split, counts)
    return {domain: [prompt for _, prompt in found] for domain, found in pairs.items()}


def embedded_conversations(
    tokenizer: Any, split: Any, counts: dict[str, int]
) -> dict[str, list[tuple[Conversation, list[int]]]]:
    """`counts[domain]` conversations of each domain from a split of the embedded corpus, each with its prompt's ids.

    Raises:
        InputError: the corpus holds fewer.
    """
    from specjax.data.embedded import stdlib_conversations, word_problems
    from specjax.data.prompts import chat_prompt

    stdlib = list(stdlib_conversations(split))
    random.Random(0).shuffle(stdlib)
    code, problems = DOMAINS
    sources = {code: stdlib, problems: word_problems(counts[problems], WORD_PROBLEM_SEEDS[split], split)}
    found = {}
    for domain, conversations in sources.items():
        pairs = ((c, chat_prompt(c["messages"][:1], tokenizer, domain)) for c in conversations)
        found[domain] = list(islice((p for p in pairs if len(p[1]) <= MAX_PROMPT_TOKENS), counts[domain]))
        if len(found[domain]) < counts[domain]:
            raise InputError(
                f"{counts[domain]} {split} prompts of domain {domain} are needed, and there are "
                f"{len(found[domain])}; ask for fewer --train-prompts or --heldout-prompts"
            )
    return found


def answer_files(
    config: RunConfig, sizes: Sizes, target: Decoder, tokenizer: Any, stops: tuple[int, ...], validation: Prompts
) -> None:
    """Writes the target's answers to training and validation prompts, unless an earlier call already did.

    Validation prompts are held-out ones of both domains, beyond those that the draft is measured on.
    """
    from specjax import weights
    from specjax.data.recipe_file import check_recipe, write_recipe

    train_file, validation_file = Path(config.data.weighted_sources[0][0]), Path(config.data.validation[0])
    recipe = train_file.with_name("recipe.json")
    wanted = {
        "target": weights.target_digest(config.target.path),
        "train_prompts": prompt_counts(sizes.train_prompts),
        "heldout_prompts": prompt_counts(sizes.heldout_prompts),  # the validation prompts are those that follow
        "max_new_tokens": sizes.max_new_tokens,
    }
    if recipe.exists():
        remedy = f"delete {recipe.parent} and {config.output_dir}"
        check_recipe(recipe, wanted, otherwise="holds answers of other settings", remedy=remedy)
        return
    for path in (train_file, validation_file):
        if path.exists():
            raise InputError(f"{path}: is there, but {recipe} is not; move it, or name another file to be written")
        path.parent.mkdir(parents=True, exist_ok=True)
    training = embedded_prompts(tokenizer, "train", prompt_counts(sizes.train_prompts))
    parts = {path: path.with_name(f"{path.name}.partial") for path in (validation_file, train_file)}
    for path, prompts in ((validation_file, validation), (train_file, training)):
        write_answers(parts[path], target, prompts, stops, sizes.max_new_tokens)
    for path, part in parts.items():
        os.replace(part, path)
    write_recipe(recipe, wanted)


def write_answers(path: Path, target: Decoder, prompts: Prompts, stops: tuple[int, ...], max_new_tokens: int) -> None:
    """Pre-tokenised records of prompts and the target's greedy answers; batches of one domain and similar lengths.

    Answers are cut at `max_new_tokens`, and at the TRAINING_ANSWER_TOKENS of their domain.
    """
    from rich.progress import track

    from specjax.data.dialogues import answer_record
    from specjax.decoding.by_length import generate_by_length

    with path.open("w", encoding="utf-8") as file:
        for domain, rows in prompts.items():
            answers = generate_by_length(
                target,
                rows,
                batch_size=max(1, min(ANSWER_BATCH, len(rows))),
                max_new_tokens=min(max_new_tokens, TRAINING_ANSWER_TOKENS.get(domain, max_new_tokens)),
                stop_token_ids=stops,
            )
            for i, answer in track(answers, total=len(rows), description=f"answers for {path.stem}: {domain}"):
                file.write(json.dumps(answer_record(rows[i], answer)) + "\n")


def evaluate(
    target: Decoder, exported: Path, stops: tuple[int, ...], heldout: Prompts, sizes: Sizes
) -> dict[str, Report]:
    """Loads the exported draft and measures it on held-out prompts, batch size 1."""
    from specjax import weights
    from specjax.decoding.benchmark import benchmark_decoding
    from specjax.decoding.benchmark_settings import Settings
    from specjax.decoding.benchmark_tables import table

    draft = weights.load_draft(exported, dtype="float32", base=target.config)
    settings = Settings(sizes.max_new_tokens, stops, runs=sizes.runs)
    reports = benchmark_decoding(target, draft, heldout, settings)
    print_table("held-out prompts, with the exported draft", reports, table(reports))
    return reports


def write_summary(folder: Path, reports: dict[str, Report]) -> None:
    summary = {name: reports["all"][name] for name in SUMMARY_FIELDS}
    data_sets = {name: {k: v for k, v in report.items() if k != "outputs"} for name, report in reports.items()}
    summary |= {"data_sets": data_sets, "metadata": run_metadata()}
    path = folder / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def plot(folder: Path, reports: dict[str, Report]) -> None:
    """Writes loss.png and acceptance_by_position.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from specjax.reporting.scalars import read_scalars

    curves = read_scalars(folder / "tensorboard")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("train/loss", "training"), ("eval/loss", "validation")):
        if name in curves:
            points = curves[name]
            axes.plot([p.step for p in points], [p.value for p in points], marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Training the draft")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, report in reports.items():
        shares = report["acceptance_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=name)
    axes.set(
        xlabel="draft position", ylabel="share of rounds that accept it", title="Acceptance by position", ylim=(0, 1)
    )
    axes.legend()
    figure.savefig(folder / "acceptance_by_position.png", dpi=150)
    plt.close("all")
    print(f"wrote {folder / 'loss.png'} and {folder / 'acceptance_by_position.png'}")


if __name__ == "__main__":
    main()
