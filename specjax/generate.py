"""Answers prompts with a target, speculatively where a draft is given: `python -m specjax.generate ...`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from specjax.cli import (
    Models,
    add_model_arguments,
    add_sampling_arguments,
    decoding_mesh,
    load_models,
    number_or_auto,
    read_draft_config,
    sampling_settings,
)
from specjax.errors import InputError, exit_on_input_error

Answer = dict[str, Any]
BATCH_SIZE = 8


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; give at least 1")
    if args.stream and args.jsonl:
        raise InputError("--stream prints text as it comes; leave --jsonl out, or --stream")
    if args.stream and args.batch_size is not None:
        raise InputError("--stream decodes one prompt after the other; leave --batch-size out, or --stream")
    chats = None if args.chat is None else [_chat(text, f"--chat {i}") for i, text in enumerate(args.chat, 1)]
    settings = sampling_settings(args) | _draft_settings(args)
    with decoding_mesh(args):
        models = load_models(args)
        settings |= _target_settings(args, models)
        prompts = _prompts(args, models, chats)
        if args.stream:
            _stream(args, models, prompts, settings)
            return
        for answer in _answers(args, models, prompts, settings):
            if args.jsonl:
                print(json.dumps(answer, ensure_ascii=False), flush=True)
            else:
                _show(answer, len(prompts), args.samples)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m specjax.generate", description=__doc__)
    add_model_arguments(parser, draft_required=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a user message; may be given several times; - reads stdin")
    source.add_argument(
        "--chat", action="append", metavar="JSON", help='a conversation, [{"role": ..., "content": ...}]; - reads stdin'
    )
    source.add_argument("--data", nargs="+", help="files or hub sets of prompts: prompt, messages or input_ids")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--suppress-tokens", type=int, nargs="+", default=[], metavar="ID", help="may not come")
    parser.add_argument("--batch-size", type=int, help=f"prompts decoded together (default: {BATCH_SIZE})")
    parser.add_argument(
        "--draft-tokens", help="drafts verified a round (default: block size - 1), or auto: what pays, as measured"
    )
    parser.add_argument(
        "--tree-nodes",
        help="verify a tree of so many drafts a round (default: a chain), or auto, with --draft-tokens auto: what pays",
    )
    add_sampling_arguments(parser)
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers a prompt, at a temperature")
    parser.add_argument("--rule", choices=("match", "rejection", "block"), default="match", help="how drafts are kept")
    parser.add_argument(
        "--draft-choice", choices=("argmax", "sample"), default="argmax", help="drafts are the likeliest or drawn"
    )
    parser.add_argument(
        "--one-pass", action="store_true", help="draft in the target's own pass: a LoRA draft with masked anchors"
    )
    parser.add_argument("--jsonl", action="store_true", help="one JSON object an answer: text, tokens, rounds")
    parser.add_argument("--stream", action="store_true", help="one prompt after the other, text as it comes")
    return parser


def _chat(text: str, origin: str) -> list[dict[str, Any]]:
    from specjax.data.conversations import Conversation, parse_record

    if text == "-":
        text, origin = sys.stdin.read(), f"{origin}, on stdin"
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: {text[:60]!r} is not JSON: {error}") from error
    record = parse_record({"messages": messages}, origin)
    assert isinstance(record, Conversation)
    return list(record.messages)


def _draft_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `generate` takes of --draft-tokens, --tree-nodes, --samples, --rule, --draft-choice and --one-pass.

    Raises:
        InputError: what this target and draft cannot do; no weights are loaded to see it.
    """
    from specjax.decoding import AutoWidth
    from specjax.decoding.inputs import check_draft_tokens, check_one_pass, check_rule, check_sampling, check_tree
    from specjax.weights import read_target_config

    given = None if args.draft_tokens is None else number_or_auto(args.draft_tokens)
    nodes = None if args.tree_nodes is None else number_or_auto(args.tree_nodes, "--tree-nodes")
    if nodes == "auto" and given != "auto":
        raise InputError("--tree-nodes auto chooses the depth of trees, too: give --draft-tokens auto with it")
    draft_tokens = AutoWidth(trees=nodes == "auto") if given == "auto" else given
    tree_nodes = None if nodes == "auto" else nodes
    how = {"rule": args.rule, "draft_choice": args.draft_choice}
    check_sampling(args.temperature, args.top_k, args.top_p, **how, samples=args.samples)
    target = read_target_config(args.target)
    draft = None if args.draft is None else read_draft_config(args.draft, target)
    width = check_draft_tokens(draft, draft_tokens)
    check_tree(target.vocab_size, width, tree_nodes, **how)
    check_rule(width, **how)
    check_one_pass(draft, width, tree_nodes, args.one_pass)
    how |= {"one_pass": args.one_pass}
    return how | {"samples": args.samples, "draft_tokens": draft_tokens, "tree_nodes": tree_nodes}


def _target_settings(args: argparse.Namespace, models: Models) -> dict[str, Any]:
    """What `generate` takes and the target decides: what ends an answer, and what may come."""
    import numpy as np

    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "stop_token_ids": models.stop_token_ids,
        "stop_strings": args.stop,
        "tokenizer": models.tokenizer,
    }
    if args.suppress_tokens:
        vocab_size = models.target.config.vocab_size
        for token in args.suppress_tokens:
            if not 0 <= token < vocab_size:
                raise InputError(f"--suppress-tokens: {token} is outside the target's vocabulary of {vocab_size}")
        settings["logit_mask"] = ~np.isin(np.arange(vocab_size), args.suppress_tokens)
    return settings


def _prompts(args: argparse.Namespace, models: Models, chats: list[list[dict[str, Any]]] | None) -> list[list[int]]:
    from specjax.data.prompts import chat_prompt, read_prompts

    if args.data:
        return read_prompts(
            args.data,
            models.tokenizer,
            chat_template_kwargs=args.chat_template_kwargs,
            vocab_size=models.target.config.vocab_size,
        )
    if chats is None:
        texts = [sys.stdin.read() if text == "-" else text for text in args.prompt]
        chats = [[{"role": "user", "content": text}] for text in texts]
    kind = "--prompt" if args.chat is None else "--chat"
    return [
        chat_prompt(messages, models.tokenizer, f"{kind} {i}", args.chat_template_kwargs)
        for i, messages in enumerate(chats, 1)
    ]


def _answers(
    args: argparse.Namespace, models: Models, prompts: list[list[int]], settings: dict[str, Any]
) -> Iterator[Answer]:
    from specjax.decoding import generate
    from specjax.decoding.text import StopStrings, final_text

    strings = StopStrings.build(args.stop, models.tokenizer)
    size = args.batch_size or BATCH_SIZE
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        try:
            generation = generate(models.target, batch, models.draft, seed=args.seed + first * args.samples, **settings)
        except InputError as error:  # which counts the prompts of its own batch
            raise InputError(f"counted from prompt {first}: {error}" if first else str(error)) from error
        for row, (tokens, rounds) in enumerate(zip(generation.tokens, generation.rounds, strict=True)):
            index, sample = divmod(row, args.samples)
            answer: Answer = {"prompt": first + index, "sample": sample, "prompt_tokens": len(batch[index])}
            answer |= {"tokens": tokens, "rounds": rounds}
            if models.tokenizer is not None:
                answer["text"] = final_text(tokens, models.stop_token_ids, models.tokenizer, strings)
            if rounds:
                widths = generation.draft_tokens[row]
                answer |= {"draft_tokens": widths, "tree_nodes": generation.tree_nodes[row]}
                answer["one_pass"] = generation.one_pass[row]
                answer |= _acceptance(rounds, widths)
            yield answer


def _acceptance(rounds: Sequence[int], widths: Sequence[int]) -> dict[str, float]:
    """Over the rounds that had drafts; nothing where none had."""
    drafted = [(advance, width) for advance, width in zip(rounds, widths, strict=True) if width]
    if not drafted:
        return {}
    kept = sum(advance - 1 for advance, _ in drafted)
    return {
        "acceptance_length": 1 + kept / len(drafted),
        "acceptance_rate": kept / sum(width for _, width in drafted),
    }


def _stream(args: argparse.Namespace, models: Models, prompts: list[list[int]], settings: dict[str, Any]) -> None:
    from specjax.decoding import Stream
    from specjax.decoding.text import StopStrings, TextStream

    if args.samples > 1:
        raise InputError(f"--stream prints one answer at a time; --samples is {args.samples}, leave it out")
    if models.tokenizer is None:
        raise InputError("--stream prints text, but the target has no tokenizer; leave --stream out")
    strings = StopStrings.build(args.stop, models.tokenizer)
    for i, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"[{i + 1}/{len(prompts)}]")
        text = TextStream(models.tokenizer, models.stop_token_ids, strings)
        stream = Stream(models.target, [prompt], models.draft, seed=args.seed + i, **settings)
        for (tokens,) in stream:
            print(text.add(tokens), end="", flush=True)
        print(text.add([], last=True), flush=True)
        result = stream.result()
        rounds = result.rounds[0]
        _note({"tokens": result.tokens[0], "rounds": rounds} | _acceptance(rounds, result.draft_tokens[0]))


def _show(answer: Answer, prompts: int, samples: int) -> None:
    if prompts > 1 or samples > 1:
        sample = f", sample {answer['sample'] + 1}" if samples > 1 else ""
        print(f"[{answer['prompt'] + 1}/{prompts}{sample}]")
    print(answer.get("text", " ".join(map(str, answer["tokens"]))))
    _note(answer)


def _note(answer: Answer) -> None:
    """Statistics of an answer that was drafted, on stderr."""
    if answer["rounds"]:
        length = f", acceptance length {answer['acceptance_length']:.2f}" if "acceptance_length" in answer else ""
        print(f"({len(answer['tokens'])} tokens in {len(answer['rounds'])} rounds{length})", file=sys.stderr)


if __name__ == "__main__":
    main()
