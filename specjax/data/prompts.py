"""Prompts for decoding: from records of conversations, token ids or plain text to token ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any

import jinja2

from specjax.data.arrow import COLUMNS
from specjax.data.chat_template import RESERVED_KWARGS
from specjax.data.conversations import (
    RECORD_KEYS,
    Conversation,
    Message,
    PretokenizedExample,
    Record,
    parse_record,
)
from specjax.data.sources import open_source
from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_COLUMNS = ("prompt", *COLUMNS)


@dataclass(frozen=True)
class Turns:
    """What is asked, one answer after another: `turns[i]` are the messages between answers i - 1 and i."""

    turns: tuple[tuple[Message, ...], ...]
    tools: tuple[dict[str, Any], ...] = ()
    origin: str = ""

    def messages(self, answers: Sequence[str]) -> list[Message]:
        """The first turns with their answers, and the turn after them, which is answered next."""
        messages: list[Message] = []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [*turn, {"role": "assistant", "content": answer}]
        return [*messages, *self.turns[len(answers)]]


Question = Turns | PretokenizedExample


def read_prompts(
    patterns: Iterable[str | PathLike[str]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    limit: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The prompts of sources (see `data.sources`), at most `limit`, as token ids.

    A record is a conversation (the prompt is all of it, without an answer at its end), pre-tokenised `input_ids` with
    `loss_mask` (what precedes the first supervised token), or `{"prompt": text}` (one user turn; beside a
    conversation, as some data sets have it, `prompt` is left alone).

    Raises:
        InputError: names file and line of what is not such a record, of an empty prompt, and of a token id outside
            `vocab_size`; a source without records.
    """
    sources = [open_source(pattern, PROMPT_COLUMNS) for pattern in patterns]
    records = (source.fields(i) for source in sources for i in range(len(source)))
    questions = (question_of_record(*record, vocab_size) for record in islice(records, limit))
    return [question_prompt(question, (), tokenizer, chat_template_kwargs) for question in questions]


def question_of_record(fields: object, origin: str, vocab_size: int | None = None) -> Question:
    """What a record of a prompt asks, as a single turn: answers within a conversation stay."""
    record = prompt_record(fields, origin, vocab_size)
    if not isinstance(record, Conversation):
        return record
    messages = list(record.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise InputError(f"{origin}: nothing precedes the assistant's turn; give the message that it answers")
    return Turns((tuple(messages),), record.tools, origin)


def question_prompt(
    question: Question,
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the turn after `answers`, which are one text for each turn before it."""
    if isinstance(question, PretokenizedExample):
        return prompt_of_tokens(question, question.origin)
    return chat_prompt(question.messages(answers), tokenizer, question.origin, chat_template_kwargs, question.tools)


def answer_text(answer: Sequence[int], stop_token_ids: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """New tokens as the text that a server's client would send back: without special tokens and the stop token."""
    ids = list(answer[:-1] if answer and answer[-1] in stop_token_ids else answer)
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def chat_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase | None,
    origin: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Messages rendered by the chat template up to where the assistant begins, as token ids.

    Raises InputError, opened by `origin`, for an empty message of the user and for what the template refuses.
    """
    tokenizer = check_chat(tokenizer, chat_template_kwargs, origin)
    if any(message["role"] == "user" and not message.get("content", "").strip() for message in messages):
        raise InputError(f"{origin}: the user's message is empty; give its text, or drop the record")
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


def check_context(prompt: Sequence[int], max_new_tokens: int, context: int, place: str) -> None:
    """Raises InputError, opened by `place`, unless prompt and new tokens fit into the target's context."""
    if len(prompt) + max_new_tokens > context:
        raise InputError(
            f"{place}: {len(prompt)} tokens and {max_new_tokens} new ones exceed the target's context of {context}"
        )


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
