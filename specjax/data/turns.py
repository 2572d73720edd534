"""Which assistant turns of a conversation are learnt, and whether with their reasoning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from specjax.data.conversations import Message
from specjax.errors import InputError

# Fields in which data sets and chat templates hold reasoning beside the answer.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# At the start of an answer: think blocks, the first without its opening tag where the template wrote that into the
# prompt. The newlines after them belong to them, as in Qwen3's template.
_THINK_BLOCKS = re.compile(
    r"\s*(?:<think>.*?|(?:(?!<think>).)*?)</think>(?:\s*<think>.*?</think>)*\n*",
    re.DOTALL,
)


@dataclass(frozen=True)
class TurnRules:
    """supervise: all assistant turns, or the last one of a conversation. reasoning: kept as the chat template renders
    it, or removed before."""

    supervise: Literal["all", "last"] = "all"
    reasoning: Literal["keep", "hide"] = "keep"


ALL_AS_WRITTEN = TurnRules()


def supervised_turns(messages: Sequence[Message], rules: TurnRules) -> list[int]:
    """Positions of the assistant messages that are learnt, in order."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return turns if rules.supervise == "all" else turns[-1:]


def without_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """`messages` whose assistant turns have neither reasoning fields nor think blocks at their start.

    Raises InputError for reasoning that is cut off: what remains is no answer.
    """
    return tuple(
        _answer_only(message, i) if message["role"] == "assistant" else message for i, message in enumerate(messages)
    )


def _answer_only(message: Message, position: int) -> Message:
    answer = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    content = answer.get("content", "")
    blocks = _THINK_BLOCKS.match(content) if "</think>" in content else None
    if blocks is None and content.lstrip().startswith("<think>"):
        raise InputError(
            f"assistant message {position}: <think> without </think>, so no answer is left without the reasoning; drop "
            "the record, or keep reasoning"
        )
    return answer if blocks is None else answer | {"content": content[blocks.end() :]}
