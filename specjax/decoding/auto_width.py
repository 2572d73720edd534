"""How many drafts to verify a round, chosen while decoding from measured times and the running acceptance."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specjax.decoding.drafting import PLAIN, Drafting
from specjax.decoding.tree import MOST_TREE_NODES

DRAFT_ROUNDS = 16  # between two choices
PLAIN_ROUNDS = 32
PROBE_ROUNDS = 2
REPEATS = 3  # of a measurement
BUDGET = 0.015  # share of the time that looking for better ways may cost
LEAST_GAIN = 1.03  # of drafting: measured times err by some percent, and plain rounds err on the safe side
MEMORY = 0.93  # weight of a round's acceptance against the next one's
STALE = 0.995  # the same where a round had no such drafts: so wider blocks are tried again, but seldom
PRIOR = 2.0  # rows and rounds that a position's own acceptance counts against all positions' together
TREE_SIZES = 2, 4, 8  # nodes of the trees that are tried, in chains
TREE_DEPTHS = 2  # the widest chains get trees

Seconds = dict[Drafting, float]  # of a round; `PLAIN`: without drafts


class Measured(NamedTuple):
    """Seconds of a round, and the rounds [b, r] that were measured: matched drafts + 1."""

    seconds: float
    rounds: npt.NDArray[np.integer]


class Step(NamedTuple):
    drafting: Drafting
    rounds: int


class AutoWidth:
    """Pass one object to every call that may learn from the others: it keeps what it measured.

    What yields the most tokens a second is taken, (1 + sum_k S_k) / T for k = 1..n, with T the measured seconds of a
    round and S_k the probability that k of its n drafts match, from the conditional acceptance of every position in
    recent rounds; where that is hardly more than without drafts, nothing is drafted. Other ways are tried again
    from time to time, for at most `BUDGET` of the time.

    trees: choose among trees of drafts, too. A tree's acceptance is learned from its own rounds, and is no less than
    the chain's, which it holds. So is that of chains drafted in one pass, whose draft knows a token less.
    """

    def __init__(self, trees: bool = False) -> None:
        self.trees = trees
        self.seconds: dict[Hashable, Seconds] = {}
        self.saved = 0.0  # of the budget, in rounds without drafts; over all calls, for one may be too short to try
        self._acceptance: dict[Drafting, _Acceptance] = {}  # by kind
        self._rounds = 0  # with drafts
        self._last: dict[Drafting, int] = {}  # of these, the last use

    def options(
        self, block_size: int, vocab_size: int, draft_choice: str = "argmax", one_pass: bool = False
    ) -> tuple[Drafting, ...]:
        """What is chosen from: no drafts; the whole block, and blocks of 2, 4, 8, ... slots, in two passes a round and,
        where the draft can (`one_pass`), in one; and trees of these."""
        most = block_size - 1
        widths = [*(2**k - 1 for k in range(1, 31) if 2**k - 1 < most), most]
        passes = (False, True) if one_pass else (False,)
        chains = (Drafting(width, draft_choice=draft_choice, one_pass=one) for one in passes for width in widths)
        limit = min(MOST_TREE_NODES, vocab_size)
        trees = (
            Drafting(width, tree_nodes=size * width)
            for width in widths[-TREE_DEPTHS:]
            for size in TREE_SIZES
            if self.trees and size * width <= limit
        )
        return (PLAIN, *chains, *trees)

    def times(
        self, options: tuple[Drafting, ...], setting: Hashable, measure: Callable[[Drafting], Measured]
    ) -> Seconds:
        """Seconds of a round of every option, measured once a `setting`: all else that a round's costs depend on.

        Medians of `measure`, called for all in turn, so that a drift of the machine meets all alike; and the rounds
        that were run tell what acceptance to begin with.
        """
        key = options, setting
        if key not in self.seconds:
            runs = [{option: measure(option) for option in options} for _ in range(REPEATS)]
            for option, measured in runs[0].items():
                self.saw(option, measured.rounds)
            self.seconds[key] = {o: statistics.median(run[o].seconds for run in runs) for o in options}
        return self.seconds[key]

    def start(self, seconds: Seconds) -> Choice:
        """The choices of one call."""
        return Choice(self, seconds)

    def saw(self, drafting: Drafting, rounds_br: npt.NDArray[np.integer]) -> None:
        """Takes in rounds [b, r]: matched drafts + 1, 0 where a row was done."""
        if drafting == PLAIN:
            return
        kind = _kind(drafting)
        if kind in self._acceptance:
            self._acceptance[kind].fade(self._rounds - self._last[kind])
        self._rounds += rounds_br.shape[1]
        self._last[kind] = self._rounds
        for column in rounds_br.T:
            if (matched := column[column > 0] - 1).size:
                self._acceptance.setdefault(kind, _Acceptance()).saw(drafting.draft_tokens, matched)

    def expected_tokens(self, drafting: Drafting) -> float | None:
        """Tokens of a round; None before any like it was seen."""
        kinds = {_kind(drafting)} | ({PLAIN} if drafting.tree_nodes else set())
        kinds &= self._acceptance.keys()
        return max((self._acceptance[kind].expected(drafting.draft_tokens) for kind in kinds), default=None)

    def last_used(self, drafting: Drafting) -> int:
        return self._last.get(_kind(drafting), 0)


class Choice:
    """The next step of one call, again and again."""

    def __init__(self, auto: AutoWidth, seconds: Seconds):
        self._auto, self._plain = auto, seconds[PLAIN]
        self._cost = {drafting: each / self._plain for drafting, each in seconds.items()}  # in rounds without drafts
        self._saving = False
        self._step = Step(PLAIN, 0)  # what is left of what was decided last

    def next(self, at_most: int) -> Step:
        """How to draft in the next rounds, and how many of these: `at_most`, or fewer."""
        if not self._step.rounds:
            self._step = self._decided()
        drafting, left = self._step
        taken = min(at_most, left)
        self._step = Step(drafting, left - taken)
        if self._saving:
            self._auto.saved += BUDGET * taken * self._cost[drafting]
        return Step(drafting, taken)

    def _decided(self) -> Step:
        drafted = [drafting for drafting in self._cost if drafting != PLAIN]
        expected = {drafting: self._auto.expected_tokens(drafting) for drafting in drafted}
        rates = {d: 1.0 if tokens is None else tokens / self._cost[d] for d, tokens in expected.items()} | {PLAIN: 1.0}
        chains = [drafting for drafting in drafted if not drafting.tree_nodes]
        chain = max(chains, key=lambda d: (rates[d], d.draft_tokens))
        best = max((chain, *drafted), key=lambda d: rates[d])
        leader = best if rates[best] >= LEAST_GAIN else PLAIN
        tried = self._to_try(leader, best, rates)
        if tried is not None:
            # A round yields a token, and what is expected where that has lately been seen.
            tokens = expected[tried] if leader != PLAIN else None
            risk = PROBE_ROUNDS * max(self._cost[tried] - (tokens or 1) / rates[leader], 0.0)
            risk += self._to_begin(tried, leader) + self._to_begin(leader, tried)
            if self._auto.saved >= risk:
                self._auto.saved -= risk
                self._saving = False
                return Step(tried, PROBE_ROUNDS)
        self._saving = tried is not None
        return Step(leader, PLAIN_ROUNDS if leader == PLAIN else DRAFT_ROUNDS)

    def _to_begin(self, drafting: Drafting, before: Drafting) -> float:
        """What rounds of `drafting` cost beside themselves: those in one pass begin with a draft pass, unless rounds of
        their kind went `before`. It is part of a round in two passes, which so bounds its cost."""
        if not drafting.one_pass or before.one_pass:
            return 0.0
        return self._cost[replace(drafting, one_pass=False)]

    def _to_try(self, leader: Drafting, best: Drafting, rates: dict[Drafting, float]) -> Drafting | None:
        """What may be better than the leader, for all that is known."""
        others = [best]
        if leader != PLAIN:
            others = [d for d in self._cost if d != PLAIN and _kind(d) != _kind(leader)]
        able = [drafting for drafting in others if (drafting.draft_tokens + 1) / self._cost[drafting] > rates[leader]]
        return min(able, key=lambda d: (self._auto.last_used(d), self._cost[d]), default=None)


class _Acceptance:
    """Conditional acceptance of every position in recent rounds."""

    def __init__(self) -> None:
        self._tried, self._kept = np.zeros(0), np.zeros(0)

    def saw(self, draft_tokens: int, matched: npt.NDArray[np.integer]) -> None:
        """Takes in a round of some rows: drafts that matched in each."""
        new = np.zeros(max(draft_tokens - len(self._tried), 0))
        self._tried, self._kept = np.append(self._tried, new), np.append(self._kept, new)
        position = np.arange(draft_tokens)
        for mean, hits in ((self._tried, matched[:, None] >= position), (self._kept, matched[:, None] > position)):
            mean[:draft_tokens] = MEMORY * mean[:draft_tokens] + (1 - MEMORY) * hits.sum(0)
            mean[draft_tokens:] *= STALE

    def fade(self, rounds: int) -> None:
        """That many rounds were decoded in other ways."""
        self._tried *= STALE**rounds
        self._kept *= STALE**rounds

    def expected(self, draft_tokens: int) -> float:
        """Tokens of a round."""
        tried, kept = (np.append(x, np.zeros(max(draft_tokens - len(x), 0))) for x in (self._tried, self._kept))
        prior = PRIOR * (1 - MEMORY)
        accepted = (kept + prior * kept.sum() / tried.sum()) / (tried + prior)
        return 1 + float(np.cumprod(accepted[:draft_tokens]).sum())


def _kind(drafting: Drafting) -> Drafting:
    """What shares one acceptance: chains of all widths (`PLAIN`), those drafted in one pass, or trees of one shape."""
    return drafting if drafting.tree_nodes else Drafting(0, one_pass=drafting.one_pass)
