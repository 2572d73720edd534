"""Ends of answers that are strings: they may begin and end inside tokens."""

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

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def end(self, tokens: Sequence[int], checked: int = 0) -> int | None:
        """How many of `tokens` there are up to the end; None without one. The first `checked` have none."""
        if not self._in(tokens):
            return None
        return next(n for n in range(checked + 1, len(tokens) + 1) if self._in(tokens[:n]))

    def cut(self, text: str) -> str:
        """Text up to the first of the strings, which is left out."""
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]

    def _in(self, tokens: Sequence[int]) -> bool:
        text = self.text(tokens)
        return any(string in text for string in self.strings)
