"""Training answers written by the target itself: `python -m specjax.regenerate --target T --data FILES --out FOLDER`.

Every turn of every prompt or conversation is answered by the target, which sees its own earlier answers: greedily, or
drawn at a --temperature; with a draft faster, and the same. FOLDER/*.jsonl is what the trainer reads. A second call
with the same arguments goes on where the first one stopped; several processes share the work.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from specjax.cli import (
    add_model_arguments,
    add_sampling_arguments,
    add_share_arguments,
    check_share,
    decoding_mesh,
    dtype_name,
    load_models,
    read_draft_config,
    sampling_settings,
)
from specjax.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from specjax.data.answer_folder import AnswerFolder, Recipe, ShardReport
    from specjax.data.conversations import JsonlRecords
    from specjax.data.dialogues import AnswerRules, Dialogue

SHARD_PROMPTS = 512
POSITIVE = ("max_new_tokens", "batch_size", "shard_prompts", "limit")

# (prompts of token ids, their seeds) -> (index of a prompt, its new tokens), in any order.
Answerer = Callable[[Sequence[list[int]], Sequence[int]], Iterable[tuple[int, list[int]]]]


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)

    from specjax.data.answer_folder import AnswerFolder

    records, recipe = _plan(args)
    folder = AnswerFolder(args.out, recipe)
    mine = [shard for shard in folder.missing() if shard % args.num_processes == args.process_id]
    report = _answer(args, folder, records, mine)
    counts = report.counts
    print(
        f"{args.out}: {recipe.prompts:,} prompts: {counts.done:,} done, {counts.unfinished:,} unfinished, "
        f"{counts.failed:,} failed, {recipe.prompts - counts.prompts:,} skipped"
    )
    if report.failures:
        first = report.failures[0]
        print(f"first failure: file {first.file}, line {first.line}: {first.reason}", file=sys.stderr)
    total = folder.write_counts()
    if total is not None:
        print(
            f"complete: {total.done:,} done, {total.unfinished:,} unfinished, {total.failed:,} failed; "
            f"{total.records:,} records with {total.supervised_tokens:,} supervised tokens"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m specjax.regenerate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, draft_required=False)
    parser.add_argument("--data", required=True, nargs="+", help="JSONL files or globs: prompt, messages or input_ids")
    parser.add_argument("--out", required=True, type=Path, help="folder of the answers")
    parser.add_argument("--limit", type=int, help="use the first N prompts only")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of an answer")
    parser.add_argument("--unfinished", choices=("keep", "drop"), default="keep", help="answers that hit this limit")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts decoded together")
    parser.add_argument("--draft-tokens", type=int, help="drafts verified a round (default: block size - 1)")
    parser.add_argument(
        "--shard-prompts", type=int, default=SHARD_PROMPTS, help="prompts a file, within which similar lengths meet"
    )
    add_sampling_arguments(parser)
    add_share_arguments(parser)
    args = parser.parse_args(argv)
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; give at least 1")
    check_share(args)
    sampling_settings(args)
    return args


def _plan(args: argparse.Namespace) -> tuple[JsonlRecords, Recipe]:
    """The records and the recipe, once every record was read: a bad line must not show after hours."""
    from specjax import weights
    from specjax.data.answer_folder import Recipe
    from specjax.data.conversations import Conversation, JsonlRecords
    from specjax.data.prompts import check_chat, prompt_record
    from specjax.decoding.inputs import check_draft_tokens
    from specjax.weights.tokenizer import load_tokenizer, stop_token_ids

    config = weights.read_target_config(args.target)
    check_draft_tokens(None if args.draft is None else read_draft_config(args.draft, config), args.draft_tokens)
    tokenizer = load_tokenizer(args.target)
    stops = stop_token_ids(args.target)
    if args.unfinished == "drop" and not stops:
        raise InputError(f"{args.target}: names no eos_token_id, so --unfinished drop leaves nothing; use keep")
    records = JsonlRecords(args.data, vocab_size=config.vocab_size, parse=prompt_record)
    if args.max_new_tokens >= config.max_position_embeddings:
        raise InputError(
            f"--max-new-tokens is {args.max_new_tokens}, which leaves no prompt room in the target's context of "
            f"{config.max_position_embeddings}; give less, such as {config.max_position_embeddings // 2}"
        )
    prompts = len(records) if args.limit is None else min(args.limit, len(records))
    for i in range(prompts):
        record = records[i]
        if isinstance(record, Conversation):
            check_chat(tokenizer, args.chat_template_kwargs, record.origin)
    template = tokenizer.get_chat_template() if tokenizer is not None and tokenizer.chat_template else None
    recipe = Recipe(
        target=weights.target_digest(args.target),
        dtype=dtype_name(args),
        chat_template=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        chat_template_kwargs=args.chat_template_kwargs,
        stop_token_ids=stops,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        unfinished=args.unfinished,
        prompts=prompts,
        shard_prompts=args.shard_prompts,
        data_files=tuple(map(str, records.paths)),
        data_bytes=tuple(path.stat().st_size for path in records.paths),
        data_sha256=tuple(map(_sha256, records.paths)),
    )
    return records, recipe


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _answer(
    args: argparse.Namespace, folder: AnswerFolder, records: JsonlRecords, shards: Sequence[int]
) -> ShardReport:
    """Writes these shards and returns what became of their prompts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from specjax.data.answer_folder import ShardReport
    from specjax.data.dialogues import AnswerRules
    from specjax.decoding.by_length import generate_by_length

    total = ShardReport()
    if not shards:
        return total
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with decoding_mesh(args):
        models = load_models(args)
        target = models.target.config
        rules = AnswerRules(
            tokenizer=models.tokenizer,
            chat_template_kwargs=args.chat_template_kwargs,
            stop_token_ids=models.stop_token_ids,
            max_new_tokens=args.max_new_tokens,
            context=target.max_position_embeddings,
            vocab_size=target.vocab_size,
            unfinished=args.unfinished,
        )

        def answer(prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
            return generate_by_length(
                models.target,
                prompts,
                models.draft,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                stop_token_ids=models.stop_token_ids,
                draft_tokens=args.draft_tokens,
                seeds=seeds,
                **sampling_settings(args),
            )

        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("answering", total=sum(len(folder.shards[shard]) for shard in shards))
            for shard in shards:
                ended = partial(progress.advance, task)
                report = write_shard(folder, shard, records, rules, answer, args.seed, ended)
                total.counts += report.counts
                total.failures += report.failures
    return total


def write_shard(
    folder: AnswerFolder,
    shard: int,
    records: JsonlRecords,
    rules: AnswerRules,
    answer: Answerer,
    seed: int,
    ended: Callable[[], object] = lambda: None,
) -> ShardReport:
    """Answers the prompts of one shard, writes them to `folder` and returns the report; calls `ended` for each."""
    from specjax.data.answer_folder import ShardReport
    from specjax.data.dialogues import Dialogue

    prompts = folder.shards[shard]
    dialogues = [Dialogue(records[i], rules, (seed, i)) for i in prompts]
    for _ in converse(dialogues, answer):
        ended()
    report = ShardReport()
    for i, dialogue in zip(prompts, dialogues, strict=True):
        report.add(dialogue, records.place(i))
    folder.write(shard, dialogues, report)
    return report


def converse(dialogues: Sequence[Dialogue], answer: Answerer) -> Iterator[Dialogue]:
    """Answers one turn of every dialogue after another, and yields each when it has ended."""
    open_dialogues = list(dialogues)
    while open_dialogues:
        asked, prompts = [], []
        for dialogue in open_dialogues:
            prompt = dialogue.next_prompt()
            if prompt is None:
                yield dialogue
            else:
                asked.append(dialogue)
                prompts.append(prompt)
        for i, tokens in answer(prompts, [dialogue.turn_seed for dialogue in asked]):
            asked[i].take(tokens)
            if asked[i].outcome is not None:
                yield asked[i]
        open_dialogues = [dialogue for dialogue in asked if dialogue.outcome is None]


if __name__ == "__main__":
    main()
