"""Decoded answers of a run's draft, in pieces that tell what was accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specjax.rounds import Segment, Source, segments, texts

if TYPE_CHECKING:
    from specjax.cli import Models


@dataclass(frozen=True)
class Piece:
    """A segment as text. title: a sentence about it."""

    source: Source
    title: str
    text: str


@dataclass(frozen=True)
class Sample:
    """An answer. origin: where its prompt is from. rounds: matched drafts + 1 of each, before any cut."""

    origin: str
    prompt: str
    pieces: list[Piece]
    rounds: list[int]
    tokens: int

    @property
    def acceptance_length(self) -> float | None:
        """Tokens a round; None where the prefill's token was the whole answer."""
        return sum(self.rounds) / len(self.rounds) if self.rounds else None


def decode_samples(models: Models, prompts: Mapping[str, Sequence[int]], max_new_tokens: int) -> list[Sample]:
    """Answers to `prompts`, token ids by origin, decoded together with the models' draft.

    Raises:
        InputError: as `specjax.decoding.generate`.
    """
    from specjax.decoding import generate

    generation = generate(
        models.target, list(prompts.values()), models.draft, max_new_tokens, stop_token_ids=models.stop_token_ids
    )

    def text(tokens: Sequence[int]) -> str:
        if models.tokenizer is None:
            return "".join(f"{token} " for token in tokens)
        return str(models.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    return [
        Sample(origin, text(prompt), _pieces(text, tokens, rounds), rounds, len(tokens))
        for (origin, prompt), tokens, rounds in zip(prompts.items(), generation.tokens, generation.rounds, strict=True)
    ]


def _pieces(decode: Callable[[list[int]], str], tokens: list[int], rounds: list[int]) -> list[Piece]:
    parts = segments(tokens, rounds)
    return [
        Piece(part.source, _title(part, rounds), text)
        for part, text in zip(parts, texts(decode, [part.tokens for part in parts]), strict=True)
    ]


def _title(part: Segment, rounds: Sequence[int]) -> str:
    if part.round == 0:
        return "prefill: the target's first token"
    if part.source == "target":
        return f"round {part.round}: the target's own token"
    accepted = rounds[part.round - 1] - 1
    cut = "" if len(part.tokens) == accepted else f", {len(part.tokens)} of them before the answer's end"
    return f"round {part.round}: {accepted} accepted draft{'s' if accepted > 1 else ''}{cut}"
