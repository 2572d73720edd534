"""How many drafts to verify a round, chosen while decoding from measured times and the running acceptance."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

FIRST_ROUNDS = 4  # of a call, before the acceptance of its own prompts is looked at
DRAFT_ROUNDS = 8  # between two choices
PLAIN_ROUNDS = 16
PROBE_ROUNDS = 2
BUDGET = 0.015  # share of the time without drafts that looking for better times may cost
MEMORY = 0.93  # weight of a round's acceptance against the next one's
STALE = 0.995  # the same at positions past a round's drafts: so wider blocks are tried again, but seldom
PRIOR = 2.0  # rows and rounds that a position's own acceptance counts against all positions' together

Seconds = dict[int, float]  # of a round by its drafts; 0: without drafts
Measure = Callable[[int], float]


class Step(NamedTuple):
    draft_tokens: int
    rounds: int


class AutoWidth:
    """Pass one object to every call that may learn from the others: it keeps what it measured.

    The width n with the most tokens a second is taken, (1 + sum_k S_k) / T(n) for k = 1..n, with T(n) the measured
    seconds of a round and S_k the probability that k drafts match, from the conditional acceptance of every position in
    recent rounds. Where no width beats decoding without drafts, that is done, and from time to time a few rounds are
    drafted again, for at most `BUDGET` of the time.
    """

    def __init__(self) -> None:
        self.seconds: dict[Hashable, Seconds] = {}
        self.saved = 0.0  # of the budget, in rounds without drafts; over all calls, for one may be too short to try
        self._tried = np.zeros(0)
        self._kept = np.zeros(0)

    @staticmethod
    def widths(block_size: int) -> tuple[int, ...]:
        """What is chosen from: no drafts, the whole block, and blocks of 2, 4, 8, ... slots."""
        most = block_size - 1
        return (0, *(2**k - 1 for k in range(1, 31) if 2**k - 1 < most), most)

    def times(self, key: Hashable, block_size: int, measure: Callable[[tuple[int, ...]], Seconds]) -> Seconds:
        """Seconds of a round for every width, measured once a `key`: all that a round's costs depend on."""
        if key not in self.seconds:
            self.seconds[key] = measure(self.widths(block_size))
        return self.seconds[key]

    def start(self, seconds: Seconds) -> Choice:
        """The choices of one call."""
        most = max(seconds)
        if len(self._tried) < most:
            grown = np.zeros((2, most))
            grown[:, : len(self._tried)] = self._tried, self._kept
            self._tried, self._kept = grown
        return Choice(self, seconds)

    def saw(self, draft_tokens: int, rounds_br: np.ndarray) -> None:
        """Takes in rounds [b, r]: matched drafts + 1, 0 where a row was done."""
        for column in rounds_br.T:
            matched = column[column > 0][:, None] - 1
            if draft_tokens and matched.size:
                position = np.arange(draft_tokens)
                for mean, hits in ((self._tried, matched >= position), (self._kept, matched > position)):
                    mean[:draft_tokens] = MEMORY * mean[:draft_tokens] + (1 - MEMORY) * hits.sum(0)
                    mean[draft_tokens:] *= STALE

    def expected_tokens(self, draft_tokens: int) -> float | None:
        """Tokens of a round of so many drafts; None before any was seen."""
        tried, kept = self._tried.sum(), self._kept.sum()
        if not tried:
            return None
        prior = PRIOR * (1 - MEMORY)
        accepted = (self._kept + prior * kept / tried) / (self._tried + prior)
        return 1 + float(np.cumprod(accepted[:draft_tokens]).sum())


class Choice:
    """The next step of one call, again and again."""

    def __init__(self, auto: AutoWidth, seconds: Seconds):
        self._auto, self._seconds = auto, seconds
        self._first = True
        self._step = Step(0, 0)  # what is left of what was decided last

    def next(self, at_most: int) -> Step:
        """Drafts of the next rounds, and how many of these: `at_most`, or fewer."""
        if not self._step.rounds:
            self._step = self._decided()
        width, left = self._step
        taken = min(at_most, left)
        self._step = Step(width, left - taken)
        if not width:
            self._auto.saved += BUDGET * taken
        return Step(width, taken)

    def _decided(self) -> Step:
        plain, widths = self._seconds[0], [n for n in self._seconds if n]
        expected = {n: self._auto.expected_tokens(n) for n in widths}
        rates = {n: 1.0 if tokens is None else tokens / self._seconds[n] * plain for n, tokens in expected.items()}
        best = max(widths, key=lambda n: (rates[n], n))
        first, self._first = self._first, False
        if rates[best] >= 1:
            return Step(best, FIRST_ROUNDS if first else DRAFT_ROUNDS)
        risk = PROBE_ROUNDS * max(self._seconds[best] / plain - 1, 0.0)
        if self._auto.saved >= risk:
            self._auto.saved -= risk
            return Step(best, PROBE_ROUNDS)
        return Step(0, PLAIN_ROUNDS)


def median_seconds(widths: Sequence[int], run: Measure, repeats: int = 3) -> Seconds:
    """Median of `run(width)`, taken in turn, so that a drift of the machine meets all alike."""
    seconds = [{width: run(width) for width in widths} for _ in range(repeats)]
    return {width: statistics.median(each[width] for each in seconds) for width in widths}
