"""Which model chose which token of an answer, and what text each part of it adds."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specjax.reporting.samples import _pieces
from specjax.rounds import INCOMPLETE, Segment, segments, texts

ROUNDS = st.lists(st.integers(1, 8), max_size=6)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters=INCOMPLETE), max_size=12)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(tokens, rounds); the last round is cut anywhere after its first token."""
    rounds = draw(ROUNDS)
    cut = draw(st.integers(0, rounds[-1] - 1)) if rounds else 0
    return list(range(100, 101 + sum(rounds) - cut)), rounds


@given(answers())
def test_tokens_are_told_apart_as_by_a_plain_loop(answer: tuple[list[int], list[int]]) -> None:
    tokens, rounds = answer
    expected = [("target", 0)]
    for index, advanced in enumerate(rounds, 1):
        for _ in range(advanced - 1):
            expected.append(("draft", index))
        expected.append(("target", index))
    found = segments(tokens, rounds)
    assert [(s.source, s.round) for s in found for _ in s.tokens] == expected[: len(tokens)]
    assert [token for s in found for token in s.tokens] == tokens
    assert all(s.tokens for s in found)


def test_the_end_may_cut_the_last_round() -> None:
    assert segments([7, 1, 2, 3, 8, 4], [4, 6]) == [
        Segment("target", 0, [7]),
        Segment("draft", 1, [1, 2, 3]),
        Segment("target", 1, [8]),
        Segment("draft", 2, [4]),
    ]


@pytest.mark.parametrize(
    ("tokens", "rounds"), [([], []), ([1, 2], []), ([1], [2]), ([1, 2, 3], [2, 3]), ([1, 2, 3, 4], [1, 1])]
)
def test_rounds_that_are_not_the_tokens_are_refused(tokens: list[int], rounds: list[int]) -> None:
    with pytest.raises(ValueError, match="are not those of the prefill"):
        segments(tokens, rounds)


@given(TEXT, st.sets(st.integers(1, 40)))
def test_parts_add_up_to_the_text_and_split_no_character(text: str, cuts: set[int]) -> None:
    data = text.encode()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    parts = [list(data[a:b]) for a, b in pairwise(bounds)]
    found = texts(lambda tokens: bytes(tokens).decode(errors="replace"), parts)
    assert len(found) == len(parts)
    assert "".join(found) == text
    ends = {len(text[:i].encode()): i for i in range(len(text) + 1)}
    complete = [max(at for end, at in ends.items() if end <= bound) for bound in bounds]
    assert found == [text[a:b] for a, b in pairwise(complete)]


def test_a_piece_says_what_its_round_accepted() -> None:
    pieces = _pieces(lambda tokens: "".join(map(chr, tokens)), [ord(c) for c in "abcdefg"], [2, 1, 6])
    assert [(piece.source, piece.text, piece.title) for piece in pieces] == [
        ("target", "a", "prefill: the target's first token"),
        ("draft", "b", "round 1: 1 accepted draft"),
        ("target", "c", "round 1: the target's own token"),
        ("target", "d", "round 2: the target's own token"),
        ("draft", "efg", "round 3: 5 accepted drafts, 3 of them before the answer's end"),
    ]
