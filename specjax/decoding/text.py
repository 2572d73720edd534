"""Answers as text: strings that end them, which may begin and end inside tokens, and text as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StopStrings:
    """An answer ends with the first token whose text completes one of `strings`.

    Raises:
        InputError: an empty string, or no tokenizer to make text of tokens.
    """

    strings: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def build(cls, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> StopStrings | None:
        """None where there are no strings."""
        if isinstance(strings, str):
            raise InputError(f"stop_strings is {strings!r}; give a list of strings")
        if not strings:
            return None
        for string in strings:
            if not isinstance(string, str) or not string:
                raise InputError(f"stop_strings holds {string!r}; give strings of at least one character")
        if tokenizer is None:
            raise InputError("stop_strings are text, but there is no tokenizer; give one, or use stop_token_ids")
        return cls(tuple(strings), tokenizer)

    def end(self, tokens: Sequence[int], checked: int = 0) -> int | None:
        """How many of `tokens` there are up to the end; None without one. The first `checked` have none."""
        if not self._in(tokens):
            return None
        return next(n for n in range(checked + 1, len(tokens) + 1) if self._in(tokens[:n]))

    def cut(self, text: str) -> str:
        """Text up to the first of the strings, which is left out."""
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]

    def _in(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(string in text for string in self.strings)


UNFINISHED = "\ufffd"  # what tokenizers make of a character whose last bytes are still to come


class TextStream:
    """The text of a growing answer, a piece at a time; the pieces joined are the text of the whole answer.

    Held back are a character of which bytes are missing, and what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: StopStrings | None) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """What `tokens`, which follow those added before, make certain; all of it where they are the last."""
        self._tokens += tokens
        text = text_until_stop(self._tokenizer, self._tokens, self._strings)
        end = len(text)
        if not last:
            end = len(text.rstrip(UNFINISHED))
            for string in self._strings.strings if self._strings else ():
                end = min(end, next(i for i in range(len(text) + 1) if string.startswith(text[i:])))
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def text_until_stop(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], strings: StopStrings | None) -> str:
    """Text without special tokens, up to a stop string."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return text if strings is None else strings.cut(text)
