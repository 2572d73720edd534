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
    sampling_settings,
)
from specjax.errors import InputError, exit_on_input_error


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specjax.generate", description=__doc__)
    add_model_arguments(parser, draft_required=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a user message; may be given several times; - reads stdin")
    source.add_argument("--data", nargs="+", help="JSONL prompts: prompt, messages or input_ids")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together")
    parser.add_argument("--draft-tokens", type=int, help="drafts verified a round (default: block size - 1)")
    parser.add_argument("--tree-nodes", type=int, help="verify a tree of so many drafts a round (default: a chain)")
    add_sampling_arguments(parser)
    parser.add_argument("--jsonl", action="store_true", help="one JSON object a prompt: text, tokens, rounds")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; give at least 1")
    sampling = sampling_settings(args)
    with decoding_mesh(args):
        models = load_models(args)
        prompts = _prompts(args, models)
        for i, answer in enumerate(_answers(args, models, prompts, sampling)):
            if args.jsonl:
                print(json.dumps(answer, ensure_ascii=False), flush=True)
            else:
                _show(i, answer, len(prompts))


def _prompts(args: argparse.Namespace, models: Models) -> list[list[int]]:
    from specjax.data.prompts import chat_prompt, read_prompts

    if args.data:
        return read_prompts(
            args.data,
            models.tokenizer,
            chat_template_kwargs=args.chat_template_kwargs,
            vocab_size=models.target.config.vocab_size,
        )
    texts = [sys.stdin.read() if text == "-" else text for text in args.prompt]
    return [
        chat_prompt([{"role": "user", "content": text}], models.tokenizer, f"--prompt {i}", args.chat_template_kwargs)
        for i, text in enumerate(texts, 1)
    ]


def _answers(
    args: argparse.Namespace, models: Models, prompts: list[list[int]], sampling: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    from specjax.decoding import generate

    for first in range(0, len(prompts), args.batch_size):
        batch = prompts[first : first + args.batch_size]
        try:
            generation = generate(
                models.target,
                batch,
                models.draft,
                max_new_tokens=args.max_new_tokens,
                stop_token_ids=models.stop_token_ids,
                draft_tokens=args.draft_tokens,
                tree_nodes=args.tree_nodes,
                seed=args.seed + first,
                **sampling,
            )
        except InputError as error:  # which counts the prompts of its own batch
            raise InputError(f"counted from prompt {first}: {error}" if first else str(error)) from error
        for prompt, tokens, rounds in zip(batch, generation.tokens, generation.rounds, strict=True):
            answer: dict[str, Any] = {"prompt_tokens": len(prompt), "tokens": tokens, "rounds": rounds}
            if models.tokenizer is not None:
                answer["text"] = models.tokenizer.decode(tokens, skip_special_tokens=True)
            if rounds:
                answer["acceptance_length"] = sum(rounds) / len(rounds)
            yield answer


def _show(index: int, answer: dict[str, Any], count: int) -> None:
    if count > 1:
        print(f"[{index + 1}/{count}]")
    print(answer.get("text", " ".join(map(str, answer["tokens"]))))
    if answer["rounds"]:
        rounds = answer["rounds"]
        print(
            f"({len(answer['tokens'])} tokens in {len(rounds)} rounds, acceptance length "
            f"{answer['acceptance_length']:.2f})",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
