"""How many drafts are verified, chosen while decoding: on a simulated machine, and in the real decoder."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest

from specjax.decoding import AutoWidth, DFlashDrafter, Stream, generate
from specjax.decoding.auto_width import BUDGET, Choice, Measured, Step
from specjax.decoding.drafting import PLAIN, Drafting
from specjax.models.sharding import SPECS, mesh_scope, put
from tests.decoding.oracle import Mixture, oracle, proposals
from tests.decoding.tiny import FULL, SLIDING, TARGET, Cases, random_draft

CHAINS = {width: Drafting(width) for width in (1, 3, 7)}


def drafter_for(case: Cases) -> Mixture:
    """A real draft, most of whose proposals are replaced by right ones."""
    _, prompts, answers = case(0, 3)
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size)
    known = np.random.default_rng(0).random(table.shape) < 0.7
    return Mixture(DFlashDrafter(random_draft(0, SLIDING)), oracle(table, 8), put(known, SPECS.act_bt))


def test_a_width_may_change_and_drafts_recover_after_plain_rounds(case: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of every width and of a tree in turn: the tokens are the same, and drafts after plain rounds are as good as
    any."""
    target, prompts, answers = case(0, 3)
    wide, tree = CHAINS[7], Drafting(7, tree_nodes=14)
    forced = [Step(PLAIN, 16), Step(wide, 2), Step(PLAIN, 3), Step(tree, 2), Step(CHAINS[3], 2), Step(CHAINS[1], 4)]
    steps = itertools.chain(forced, itertools.repeat(Step(wide, 8)))
    monkeypatch.setattr(Stream, "_measure", lambda self, drafting: Measured(1.0, np.ones((3, 1), np.int64)))
    monkeypatch.setattr(Choice, "_decided", lambda self: next(steps))
    with mesh_scope():
        found = generate(target, prompts, drafter_for(case), 56, draft_tokens=AutoWidth(trees=True))
    assert found.tokens == [answer[:56] for answer in answers]
    draftings = [step.drafting for step in forced for _ in range(step.rounds)] + [wide] * 56
    assert not any(itertools.chain(*found.one_pass))
    for row, nodes, rounds in zip(found.draft_tokens, found.tree_nodes, found.rounds, strict=True):
        assert row == [drafting.draft_tokens for drafting in draftings[: len(row)]]
        assert nodes == [drafting.tree_nodes for drafting in draftings[: len(row)]]
        assert all(1 <= advance <= width + 1 for advance, width in zip(rounds, row, strict=True))
        assert sum(rounds[:-1]) < 55 <= sum(rounds)
    assert max(found.rounds[0][16:18]) > 1


class Clock:
    """A machine and prompts of known costs and acceptance, to decode `tokens` tokens with what `Choice` says.

    acceptance: of every position by the nodes of the tree, 0: of chains, and of chains of one pass. seconds: as the
    machine was measured. ahead: seconds of the draft pass with which rounds in one pass begin.
    """

    def __init__(
        self,
        seconds: dict[Drafting, float],
        acceptance: list[float] | dict[int | str, list[float]],
        at_most: int = 99,
        ahead: float = 0.0,
    ):
        self.at_most, self.rng, self.auto = at_most, np.random.default_rng(0), AutoWidth()
        self.seconds, self.acceptance = seconds, acceptance if isinstance(acceptance, dict) else {0: acceptance}
        self.used: list[Drafting] = []
        self.ahead, self.begun = ahead, 0

    def rounds(self, drafting: Drafting, count: int) -> np.ndarray:
        passed = (
            self.rng.random((count, drafting.draft_tokens))
            < self.acceptance["one pass" if drafting.one_pass else drafting.tree_nodes][: drafting.draft_tokens]
        )
        return 1 + np.cumprod(passed, axis=1).sum(axis=1, dtype=np.int64)

    def measure(self) -> None:
        """As a decoder measures that is given this `AutoWidth`."""
        options = tuple(self.seconds)
        self.auto.times(options, None, lambda each: Measured(self.seconds[each], self.rounds(each, 4)[None]))

    def decode(self, tokens: int) -> float:
        """Seconds of a call."""
        choice, spent, made = self.auto.start(self.seconds), 0.0, 0
        while made < tokens:
            drafting, most = choice.next(self.at_most)
            advanced = self.rounds(drafting, most)
            advanced = advanced[: 1 + np.searchsorted(advanced.cumsum(), tokens - made)]
            made += advanced.sum()
            spent += self.seconds[drafting] * len(advanced)
            if drafting.one_pass and not (self.used and self.used[-1].one_pass):
                spent += self.ahead
                self.begun += 1
            self.used += [drafting] * len(advanced)
            self.auto.saw(drafting, advanced[None])
        return spent

    def share(self, drafting: Drafting, last: int) -> float:
        """Of the last rounds."""
        return statistics.mean(used == drafting for used in self.used[-last:])


COSTS = {PLAIN: 1.0, CHAINS[1]: 1.35, CHAINS[3]: 1.5, CHAINS[7]: 1.75}


@pytest.mark.parametrize("at_most", [99, 1], ids=["slices", "a round a step"])
def test_hopeless_drafts_cost_little(at_most: int) -> None:
    clock = Clock(COSTS, [0.02] * 7, at_most=at_most)
    clock.measure()
    assert clock.decode(200) < 1.05 * 200
    assert sum(clock.decode(200) for _ in range(20)) < 1.05 * 200 * 20


@pytest.mark.parametrize(
    ("acceptance", "best"), [([0.95] * 7, 7), ([0.9, 0.8, 0.7, 0, 0, 0, 0], 3), ([0.8, *[0] * 6], 1)]
)
def test_the_best_width_is_found(acceptance: list[float], best: int) -> None:
    clock = Clock(COSTS, acceptance)
    clock.measure()
    spent = sum(clock.decode(200) for _ in range(10))
    tokens = 1 + np.cumprod(acceptance)[:best].sum()
    assert spent < 1.1 * 2000 * COSTS[CHAINS[best]] / tokens
    assert clock.share(CHAINS[best], len(clock.used) - 200) > 0.7


def test_drafting_comes_back_when_it_pays_again() -> None:
    clock = Clock(COSTS, [0.0] * 7)
    clock.decode(400)
    assert clock.share(PLAIN, 200) > 0.9
    clock.acceptance = {0: [0.95] * 7}
    clock.decode(1500)
    assert clock.share(CHAINS[7], 50) > 0.9


def test_drafting_comes_back_in_calls_that_are_short() -> None:
    """No call alone is long enough to save what a try may cost."""
    clock = Clock({PLAIN: 1.0, CHAINS[1]: 1.6, CHAINS[3]: 1.8, CHAINS[7]: 2.0}, [0.0] * 7)
    clock.decode(400)
    clock.acceptance = {0: [0.95] * 7}
    for _ in range(20):
        clock.decode(64)
    assert clock.share(CHAINS[7], 50) > 0.9


SMALL, LARGE = Drafting(7, tree_nodes=14), Drafting(7, tree_nodes=56)
BY_TREE = {0: [0.6] * 7, 14: [0.8] * 7, 56: [0.9] * 7}  # tokens a round: 2.5, 4.2, 5.7


@pytest.mark.parametrize(
    ("small", "large", "best"),
    [(1.8, 1.9, LARGE), (1.9, 4.0, SMALL), (5.0, 9.0, CHAINS[3])],
    ids=["large", "small", "none"],
)
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "another text was measured"])
def test_trees_are_taken_where_they_pay(small: float, large: float, best: Drafting, measured: bool) -> None:
    clock = Clock(COSTS | {SMALL: small, LARGE: large}, BY_TREE)
    if measured:
        clock.measure()
    else:
        clock.acceptance = dict.fromkeys(BY_TREE, [0.3] * 7)
        clock.measure()
        clock.acceptance = BY_TREE
    clock.decode(2000)
    spent = sum(clock.decode(200) for _ in range(20))
    tokens = 1 + np.cumprod(BY_TREE[best.tree_nodes])[: best.draft_tokens].sum()
    assert spent < 1.1 * 4000 * clock.seconds[best] / tokens
    assert clock.share(best, 300) > 0.7


def test_a_tree_is_as_good_as_its_chain_whatever_it_was_before() -> None:
    auto = AutoWidth(trees=True)
    auto.saw(SMALL, np.array([[1, 1, 1]]))
    assert auto.expected_tokens(SMALL) == 1
    auto.saw(CHAINS[7], np.array([[8, 8, 8]]))
    assert auto.expected_tokens(SMALL) == auto.expected_tokens(CHAINS[7]) == pytest.approx(8)
    assert auto.expected_tokens(CHAINS[3]) == pytest.approx(4)


def test_hopeless_trees_cost_little() -> None:
    clock = Clock(COSTS | {SMALL: 2.5, LARGE: 6.0}, dict.fromkeys(BY_TREE, [0.02] * 7))
    clock.measure()
    assert sum(clock.decode(200) for _ in range(20)) < 1.05 * 200 * 20


def test_a_tree_gives_way_to_the_chain_when_it_gains_nothing_more() -> None:
    clock = Clock(COSTS | {SMALL: 2.2}, BY_TREE)
    clock.measure()
    clock.decode(1000)
    assert clock.share(SMALL, 100) > 0.7
    clock.acceptance = dict.fromkeys(BY_TREE, [0.95] * 7)
    clock.decode(4000)
    assert clock.share(CHAINS[7], 100) > 0.7


ONE_PASS = {width: Drafting(width, one_pass=True) for width in CHAINS}


@pytest.mark.parametrize(
    ("cost", "accepted", "best"),
    [(1.1, 0.8, ONE_PASS[7]), (1.7, 0.8, CHAINS[7]), (1.1, 0.3, CHAINS[7]), (1.7, 0.95, ONE_PASS[7])],
    ids=["cheaper", "not cheap enough", "worse drafts", "better drafts"],
)
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "another text was measured"])
def test_one_pass_is_taken_where_it_pays(cost: float, accepted: float, best: Drafting, measured: bool) -> None:
    """Two passes accept 0.85 of every position, and cost 1.75."""
    seconds = COSTS | {drafting: cost * (1 - 0.02 * (7 - width)) for width, drafting in ONE_PASS.items()}
    truth: dict[int | str, list[float]] = {0: [0.85] * 7, "one pass": [accepted] * 7}
    clock = Clock(seconds, truth if measured else {0: [0.3] * 7, "one pass": [0.3] * 7})
    clock.measure()
    clock.acceptance = truth
    clock.decode(2000)
    spent = sum(clock.decode(200) for _ in range(20))
    tokens = 1 + np.cumprod(truth["one pass" if best.one_pass else 0]).sum()
    assert spent < 1.15 * 4000 * seconds[best] / tokens
    assert clock.share(best, 300) > 0.7


@pytest.mark.parametrize("hopeless", [True, False], ids=["one pass", "two passes"])
def test_looking_for_better_ways_costs_what_it_may(hopeless: bool) -> None:
    """The draft pass with which rounds in one pass begin is counted, both ways."""
    accepted: dict[int | str, list[float]] = {0: [0.0] * 7, "one pass": [0.0] * 7}
    accepted[0 if hopeless else "one pass"] = [0.85] * 7
    leader, other = (CHAINS[7], ONE_PASS[7]) if hopeless else (ONE_PASS[7], CHAINS[7])
    clock = Clock({PLAIN: 1.0, CHAINS[7]: 1.75, ONE_PASS[7]: 1.4}, accepted, ahead=1.5)
    clock.measure()
    clock.decode(500)
    clock.used, clock.begun = [], 0
    spent = clock.decode(20_000)
    tries = [drafting for drafting in clock.used if drafting == other]
    assert len(tries) > 20
    assert len(tries) + clock.used.count(leader) == len(clock.used)
    rate = (1 + np.cumprod([0.85] * 7).sum()) / clock.seconds[leader]
    lost = len(tries) * (clock.seconds[other] - 1 / rate) + clock.begun * clock.ahead
    assert lost < 1.1 * BUDGET * spent


def test_acceptance_in_one_pass_is_learned_apart() -> None:
    auto = AutoWidth()
    auto.saw(CHAINS[7], np.array([[8, 8, 8]]))
    assert auto.expected_tokens(ONE_PASS[7]) is None
    auto.saw(ONE_PASS[3], np.array([[1, 1, 1]]))
    assert auto.expected_tokens(ONE_PASS[7]) == 1
    assert auto.expected_tokens(CHAINS[7]) == auto.expected_tokens(LARGE) == pytest.approx(8)


def test_what_is_chosen_from() -> None:
    def widths(block_size: int) -> list[int]:
        return [option.draft_tokens for option in AutoWidth().options(block_size, 1000)]

    assert (widths(16), widths(10), widths(2)) == ([0, 1, 3, 7, 15], [0, 1, 3, 7, 9], [0, 1])
    plain, *chains = AutoWidth().options(8, 1000, "sample")
    assert plain == PLAIN
    assert {option.draft_choice for option in chains} == {"sample"}
    two_and_one = [Drafting(width, draft_choice="sample", one_pass=one) for one in (False, True) for width in (1, 3, 7)]
    assert AutoWidth().options(8, 1000, "sample", one_pass=True) == (PLAIN, *two_and_one)
    options = AutoWidth(trees=True).options(8, 30)  # a tree of more nodes than there are tokens cannot be built
    assert [(o.draft_tokens, o.tree_nodes) for o in options if o.tree_nodes] == [
        (3, 6),
        (3, 12),
        (3, 24),
        (7, 14),
        (7, 28),
    ]


def test_times_are_measured_once_a_shape(case: Cases) -> None:
    target, prompts, answers = case(0, 3)
    width = AutoWidth()
    for _ in range(2):
        found = generate(target, prompts, random_draft(0, FULL), 40, draft_tokens=width)
        assert found.tokens == [answer[:40] for answer in answers]
    generate(target, prompts, random_draft(1, FULL), 40, draft_tokens=width)
    (seconds,) = width.seconds.values()
    assert list(seconds) == [PLAIN, CHAINS[1], CHAINS[3]]
    assert min(seconds.values()) > 0
    for options in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"logit_mask": [True] * TARGET.vocab_size}):
        generate(target, prompts, random_draft(0, FULL), 4, draft_tokens=width, **options)
    assert len(width.seconds) == 4


def test_what_is_measured_tells_the_acceptance_to_begin_with(case: Cases) -> None:
    """A draft that is always right, and the first rounds of the prompts: every draft is expected to match."""
    target, prompts, answers = case(0, 3)
    width = AutoWidth(trees=True)
    with mesh_scope():
        drafter = oracle(proposals(prompts, answers, 0.0, 0, TARGET.vocab_size), 8)
        found = generate(target, prompts, drafter, 1, draft_tokens=width)
    assert found.rounds == [[], [], []]
    (seconds,) = width.seconds.values()
    for drafting in seconds:
        if drafting.draft_tokens:
            assert width.expected_tokens(drafting) == pytest.approx(1 + drafting.draft_tokens)
