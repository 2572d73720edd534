"""Decoded answers, cut into what the draft proposed and what the target chose itself.

tokens   t0 | d1 d2 t3 | t4 | d5 d6 d7 t8 | ...
rounds          3         1        4
draft          d1 d2           d5 d6 d7
target   t0        t3    t4            t8        (t0: the prefill's, which belongs to no round)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from specjax.cli import Models

Source = Literal["target", "draft"]
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a part of a character's bytes decodes to


@dataclass(frozen=True)
class Segment:
    """Tokens that one of the two models chose in one round, counted from 1; round 0 is the prefill."""

    source: Source
    round: int
    tokens: list[int]


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


def segments(tokens: Sequence[int], rounds: Sequence[int]) -> list[Segment]:
    """`tokens` of an answer by who chose them; none is empty.

    rounds: matched drafts + 1 of each round before any cut: the last round may hold more than there are tokens.

    Raises:
        ValueError: the rounds do not add up to the tokens.
    """
    least = 2 + sum(rounds[:-1]) if rounds else 1
    if not least <= len(tokens) <= 1 + sum(rounds):
        raise ValueError(f"{len(tokens)} tokens are not those of the prefill and of rounds {list(rounds)}")
    found = [Segment("target", 0, list(tokens[:1]))]
    at = 1
    for index, advanced in enumerate(rounds, 1):
        own = at + advanced - 1
        found.append(Segment("draft", index, list(tokens[at:own])))
        found.append(Segment("target", index, list(tokens[own : own + 1])))
        at = own + 1
    return [segment for segment in found if segment.tokens]


def texts(decode: Callable[[list[int]], str], parts: Sequence[Sequence[int]]) -> list[str]:
    """The text that each of consecutive `parts` of a token sequence adds; together they are the whole's.

    A character whose bytes lie in two parts belongs to the part that completes it.
    """
    tokens: list[int] = []
    shown, found = "", []
    for index, part in enumerate(parts):
        tokens += part
        text = decode(tokens)
        if index < len(parts) - 1:
            text = text.rstrip(INCOMPLETE)
        found.append(text[len(shown) :])
        shown = text
    return found


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
