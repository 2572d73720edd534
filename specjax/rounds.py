"""A decoded answer, cut into what the draft proposed and what the target chose itself.

tokens   t0 | d1 d2 t3 | t4 | d5 d6 d7 t8 | ...
rounds          3         1        4
draft          d1 d2           d5 d6 d7
target   t0        t3    t4            t8        (t0: the prefill's, which belongs to no round)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Source = Literal["target", "draft"]
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a part of a character's bytes decodes to


@dataclass(frozen=True)
class Segment:
    """Tokens that one of the two models chose in one round, counted from 1; round 0 is the prefill."""

    source: Source
    round: int
    tokens: list[int]


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
