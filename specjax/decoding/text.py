"""Answers as text: strings that end them, which may begin and end inside tokens, and text as its tokens come."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specjax.data.prompts import answer_text
from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what tokenizers make of a character whose last bytes are still to come


@dataclass(frozen=True)
class StopStrings:
    """An answer ends with the first token whose text completes one of `strings`."""

    strings: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def build(cls, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> StopStrings | None:
        """None where there are no strings. Raises InputError for an empty one, and without a tokenizer."""
        if isinstance(strings, str):
            raise InputError(f"stop_strings is {strings!r}; give a list of strings")
        if not strings:
            return None
        for string in strings:
            if not isinstance(string, str) or not string:
                raise InputError(f"stop_strings holds {string!r}; give strings of at least one character")
        if tokenizer is None:
            raise InputError("stop_strings are text, but there is no tokenizer; give one, or use stop_token_ids")
        for string in strings:
            if string in tokenizer.all_special_tokens:
                raise InputError(
                    f"stop_strings holds {string!r}, a special token, which no text has; use stop_token_ids"
                )
        return cls(tuple(strings), tokenizer)

    def end(self, tokens: Sequence[int], checked: int = 0) -> int | None:
        """How many of `tokens` there are up to the end; None without one. The first `checked` have none."""
        if not self._in(tokens):
            return None
        return next(n for n in range(checked + 1, len(tokens) + 1) if self._in(tokens[:n]))

    def cut(self, text: str) -> str:
        """Text up to the first of the strings, which is left out."""
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]

    def begun(self, text: str) -> int:
        """Where in `text` the earliest of the strings begins that may be completed by what follows; else its end."""
        starts = [len(text)]
        for string in self.strings:
            tails = range(max(0, len(text) - len(string) + 1), len(text))
            starts.append(next((i for i in tails if string.startswith(text[i:])), len(text)))
        return min(starts)

    def _in(self, tokens: Sequence[int]) -> bool:
        text = answer_text(tokens, (), self.tokenizer)
        return any(string in text for string in self.strings)


class TextStream:
    """The text of a growing answer, a piece at a time; the pieces joined are `final_text` of the whole answer.

    Held back are a character of which bytes are missing, and what may be the beginning of a stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int], strings: StopStrings | None
    ) -> None:
        self._tokenizer, self._stop_token_ids, self._strings = tokenizer, stop_token_ids, strings
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """What `tokens`, which follow those added before, make certain; all of it where they are the last."""
        self._tokens += tokens
        text = final_text(self._tokens, self._stop_token_ids, self._tokenizer, self._strings)
        if not last:
            text = text.rstrip(UNFINISHED)
            text = text if self._strings is None else text[: self._strings.begun(text)]
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece


def final_text(
    tokens: Sequence[int],
    stop_token_ids: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
    strings: StopStrings | None,
) -> str:
    """Text without special tokens and the stop token, up to a stop string."""
    text = answer_text(tokens, stop_token_ids, tokenizer)
    return text if strings is None else strings.cut(text)
