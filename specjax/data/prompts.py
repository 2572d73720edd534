"""Prompts for decoding: from records of conversations, token ids or plain text to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import jinja2

from specjax.data.chat_template import RESERVED_KWARGS
from specjax.data.conversations import (
    RECORD_KEYS,
    Conversation,
    Message,
    PretokenizedExample,
    Record,
    find_files,
    parse_record,
)
from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_prompts(
    patterns: Iterable[str | PathLike[str]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    limit: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The prompts of JSONL files, at most `limit`, as token ids.

    A record is a conversation (the prompt is all of it, without an answer at its end), pre-tokenised `input_ids` with
    `loss_mask` (what precedes the first supervised token), or `{"prompt": text}` (one user turn; beside a
    conversation, as some data sets have it, `prompt` is left alone).

    Raises:
        InputError: names file and line of what is not such a record, of an empty prompt, and of a token id outside
            `vocab_size`; no prompts at all.
    """
    prompts: list[list[int]] = []
    for path in find_files(patterns):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(prompts) >= limit:
                    return prompts
                if line.strip():
                    origin = f"file {path}, line {number}"
                    prompts.append(_prompt(line, origin, tokenizer, chat_template_kwargs or {}, vocab_size))
    if not prompts:
        raise InputError(f"{', '.join(map(str, patterns))}: no prompts; give at least one record")
    return prompts


def chat_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase | None,
    origin: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Messages rendered by the chat template up to where the assistant begins, as token ids."""
    tokenizer = check_chat(tokenizer, chat_template_kwargs, origin)
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=False,
            **dict(chat_template_kwargs or {}),
        )
    # What a template raises by itself, and what its expressions raise on fields it did not expect.
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{origin}: the chat template refuses the conversation: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_chat(
    tokenizer: PreTrainedTokenizerBase | None, chat_template_kwargs: Mapping[str, Any] | None, origin: str
) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises InputError where it renders no chat, or where a setting is the renderer's own."""
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(f"{origin}: is text, but the target has no tokenizer with a chat template; give input_ids")
    reserved = sorted(RESERVED_KWARGS & dict(chat_template_kwargs or {}).keys())
    if reserved:
        raise InputError(f"chat template kwargs: {', '.join(reserved)} cannot be set; remove it")
    return tokenizer


def prompt_record(fields: object, origin: str, vocab_size: int | None = None) -> Record:
    """As `parse_record`, and `{"prompt": text}` as a conversation of one user turn.

    Beside a conversation, as some data sets have it, `prompt` is left alone.
    """
    if isinstance(fields, dict) and "prompt" in fields and not any(key in fields for key in RECORD_KEYS):
        if not isinstance(fields["prompt"], str):
            raise InputError(f"{origin}: field prompt is {fields['prompt']!r}; give a string")
        return Conversation(({"role": "user", "content": fields["prompt"]},), (), origin)
    return parse_record(fields, origin, vocab_size)


def prompt_of_tokens(example: PretokenizedExample, origin: str) -> list[int]:
    """What precedes the first supervised token. Raises InputError where that is nothing."""
    supervised = example.loss_mask.nonzero()[0]
    length = int(supervised[0]) if len(supervised) else len(example.input_ids)
    if not length:
        raise InputError(f"{origin}: no token precedes the first supervised one; give a prompt of at least one token")
    ids: list[int] = example.input_ids[:length].tolist()
    return ids


def _prompt(
    line: bytes,
    origin: str,
    tokenizer: PreTrainedTokenizerBase | None,
    chat_template_kwargs: Mapping[str, Any],
    vocab_size: int | None,
) -> list[int]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{origin}: is not JSON ({error})") from error
    record = prompt_record(fields, origin, vocab_size)
    if isinstance(record, Conversation):
        messages = list(record.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise InputError(f"{origin}: nothing precedes the assistant's turn; give the message that it answers")
        return chat_prompt(messages, tokenizer, origin, chat_template_kwargs, record.tools)
    return prompt_of_tokens(record, origin)
