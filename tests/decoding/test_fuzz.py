"""Random calls of the decoder, over a few combinations of what is compiled and a case's seed for all the rest.

pytest tests/decoding/test_fuzz.py --fuzz-cases 1000        more of them
pytest tests/decoding/test_fuzz.py -k tree --fuzz-case 37   one again
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from specjax.decoding import DFlashDrafter, generate
from specjax.decoding import batch as batches
from specjax.decoding.drafter import Drafter, LoRADrafter
from specjax.decoding.generate import Generation
from specjax.decoding.loop import decode, prefill
from specjax.models.decoder import Decoder
from specjax.models.sharding import SPECS, mesh_scope, put
from tests.decoding.choices import Settings, choose, continued, kept, may_choose, noise
from tests.decoding.oracle import Mixture, oracle, preferences, proposals, simulate
from tests.decoding.test_lora_drafter import CONFIG as LORA_DRAFT
from tests.decoding.test_lora_drafter import random_lora_draft
from tests.decoding.test_speculation import cut
from tests.decoding.tiny import DRAFTS, OTHER_TARGETS, TARGET, TIE_MARGIN, all_logits, random_draft, random_target

PROMPT, NEW = batches.PROMPT_BUCKET, batches.NEW_TOKENS_BUCKET  # the most of one bucket
VOCAB = TARGET.vocab_size
ONE_PASS = "one pass"
CASES_A_PROMPT = 3  # with other limits, stops and drafts: their answers, which drafts are made of, are decoded once


@dataclass(frozen=True)
class Combination:
    """What is a shape or static, and so a program of its own. block 1: no draft. draft: of DRAFTS, or a LoRA draft that
    drafts in the pass that verifies."""

    target: str
    prompts: int
    block: int
    draft_tokens: int
    drawn: bool = False
    rule: str = "match"
    draft_choice: str = "argmax"
    tree_nodes: int | None = None
    masked: bool = False
    samples: int = 1
    draft: str = "sliding"
    chunk: int = PROMPT

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def ranked(self) -> bool:
        """Whether the drafter's distribution counts, and not the likeliest token alone."""
        return self.tree_nodes is not None or self.draft_choice == "sample"

    @property
    def countable(self) -> bool:
        """Whether a drafter whose proposals are known has known rounds; a mask changes proposals."""
        return self.rule == "match" and self.draft_choice == "argmax" and not self.masked and self.block > 1


COMBINATIONS = {
    "greedy": Combination("qwen3", 4, 8, 7),
    "greedy-narrow": Combination("sliding", 4, 8, 5, draft="full"),
    "greedy-masked": Combination("one key/value head", 1, 4, 3, masked=True, draft="full"),
    "greedy-tree": Combination("sliding", 4, 6, 5, tree_nodes=24),
    "plain": Combination("qwen2", 4, 1, 0, drawn=True, masked=True),
    "match": Combination("sliding", 8, 8, 7, drawn=True, draft=ONE_PASS),
    "match-sample": Combination("sliding", 4, 4, 3, drawn=True, masked=True, draft_choice="sample", chunk=16),
    "match-tree": Combination("qwen2", 2, 8, 4, drawn=True, tree_nodes=12, samples=2, draft="full"),
    "rejection": Combination("qwen2", 4, 4, 3, drawn=True, rule="rejection"),
    "rejection-sample": Combination(
        "one key/value head",
        2,
        8,
        5,
        drawn=True,
        rule="rejection",
        draft_choice="sample",
        samples=2,
        masked=True,
        draft=ONE_PASS,
    ),
    "block": Combination("one key/value head", 4, 4, 3, drawn=True, rule="block", draft="full", masked=True),
    "block-sample": Combination("qwen3", 4, 8, 7, drawn=True, rule="block", draft_choice="sample", chunk=32),
}


@dataclass(frozen=True)
class Call:
    """Arguments of `generate`: one entry a prompt, seeds [prompts, samples]."""

    prompts: list[list[int]]
    limits: list[int]
    stops: list[list[int]]
    seeds: np.ndarray
    masks: np.ndarray | None
    temperature: float
    top_k: int | None
    top_p: float | None

    def settings(self) -> list[Settings]:
        """Of every row."""
        masks = [None] * len(self.prompts) if self.masks is None else self.masks
        law = self.temperature, self.top_k, self.top_p
        return [
            Settings(int(seed), *law, mask) for seeds, mask in zip(self.seeds, masks, strict=True) for seed in seeds
        ]

    def each(self, values: Sequence) -> list:
        """`values` of the prompts for every row."""
        return [value for value in values for _ in range(self.seeds.shape[1])]


def random_call(rng: np.random.Generator, combination: Combination) -> Call:
    """Without stops, with the greatest limits, and with a first prompt that fills its bucket."""
    count = combination.prompts
    lengths = rng.choice([1, 2, 15, 16, 17, 33, PROMPT - 1, *rng.integers(1, PROMPT, 8)], count)
    masks = None
    if combination.masked:
        masks = rng.random((count, VOCAB)) < rng.choice([0.05, 0.3, 0.9, 1.0], (count, 1))
        masks[np.arange(count), rng.integers(0, VOCAB, count)] = True
    drawn = combination.drawn
    lengths[0] = PROMPT
    return Call(
        prompts=[rng.integers(0, VOCAB, n).tolist() for n in lengths],
        limits=[NEW] * count,
        stops=[[] for _ in range(count)],
        seeds=rng.integers(0, rng.choice([3, 2**32]), (count, combination.samples)),
        masks=masks,
        temperature=float(rng.choice([0.2, 0.6, 1.0, 1.7])) if drawn else 0.0,
        top_k=int(rng.choice([1, 2, 5, 20, 50, VOCAB, 1000])) if drawn else None,
        top_p=float(rng.choice([0.05, 0.5, 0.9, 0.95, 0.999])) if drawn else None,
    )


def with_ends(rng: np.random.Generator, call: Call, answers: list[list[int]]) -> Call:
    """The call with random limits and stops, some of which are in the answers of the prompts' first samples."""
    limits = rng.choice([1, 2, 3, *rng.integers(4, NEW, 6), NEW - 1, NEW], len(call.prompts)).tolist()
    stops = [rng.integers(0, VOCAB, n).tolist() for n in rng.choice([0, 0, 1, 2, 4], len(call.prompts))]
    for stop, answer in zip(stops, answers[:: call.seeds.shape[1]], strict=True):
        if rng.random() < 0.4:
            stop[:1] = [answer[rng.choice([0, 1, 2, 20, 40])]]
    if rng.random() < 0.8:  # prompt 0 fills its bucket: so do its answers, and drafts go past the end
        limits[0], stops[0] = NEW, []
    if max(limits) <= NEW * 3 // 4:  # which is a bucket of its own where prompts run in small chunks
        limits[-1] = NEW
    return replace(call, limits=limits, stops=stops)


@functools.cache
def models(combination: Combination) -> tuple[Decoder, Drafter | None]:
    config = TARGET if combination.target == "qwen3" else OTHER_TARGETS[combination.target]
    target = random_target(0, config)
    if combination.block == 1:
        return target, None
    if combination.draft == ONE_PASS:
        masked = replace(LORA_DRAFT, block_size=combination.block, masked_anchor=0.5)
        return target, LoRADrafter(random_lora_draft(0, masked, config))
    return target, DFlashDrafter(random_draft(0, replace(DRAFTS[combination.draft], block_size=combination.block)))


class Runner:
    """Calls of one combination, which compile nothing after the first."""

    def __init__(self, combination: Combination) -> None:
        self.combination = combination
        self.target, self.draft = models(combination)
        self.programs: tuple[int, int] | None = None

    def __call__(self, call: Call, table: np.ndarray, known: np.ndarray) -> Generation:
        """`table`, `known`: of every row, see `Mixture`."""
        c, drafter = self.combination, None
        if self.draft is not None:
            drafter = Mixture(self.draft, oracle(table, c.block), put(known, SPECS.act_bt))
        result = generate(
            self.target,
            call.prompts,
            drafter,
            call.limits,
            call.stops,
            c.draft_tokens or None,
            call.temperature,
            call.top_k,
            call.top_p,
            call.seeds.ravel().tolist(),
            rule=c.rule,
            draft_choice=c.draft_choice,
            tree_nodes=c.tree_nodes,
            samples=c.samples,
            logit_mask=call.masks,
            one_pass=c.draft == ONE_PASS,
        )
        programs = prefill._cache_size(), decode._cache_size()
        assert self.programs in (None, programs), "compiled again"
        self.programs = programs
        return result

    def table(self, call: Call, answers: list[list[int]], error_rate: float, seed: int) -> np.ndarray:
        arguments = call.each(call.prompts), answers
        if self.combination.ranked:
            return preferences(*arguments, seed, VOCAB)
        return proposals(*arguments, error_rate, seed, VOCAB)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def prompts(self, seed: int) -> tuple[Call, list[list[int]]]:
        """A call to the end of its bucket, and its answers: under `match` they are the target's, else likely ones.

        Where rounds are counted they go on past the bucket, as drafts do.
        """
        c = self.combination
        rng = np.random.default_rng([list(COMBINATIONS.values()).index(c), seed])
        call = random_call(rng, c)
        empty = self.table(call, [[]] * c.rows, 0.0, 0)
        answers = self(call, empty, np.zeros(empty.shape[:2], bool)).tokens
        if c.countable:
            rows = [p + answer for p, answer in zip(call.each(call.prompts), answers, strict=True)]
            further = continued(self.target, rows, call.settings(), c.draft_tokens)
            answers = [answer + more for answer, more in zip(answers, further, strict=True)]
        return call, answers


def check_ends(combination: Combination, call: Call, result: Generation) -> None:
    """Limits, stops and rounds."""
    assert len(result.tokens) == combination.rows
    per_row = zip(result.tokens, result.rounds, result.draft_tokens, strict=True)
    for (tokens, rounds, widths), limit, stops in zip(
        per_row, call.each(call.limits), call.each(call.stops), strict=True
    ):
        assert tokens == cut(tokens, limit, stops), "goes on after its end"
        assert len(tokens) == limit or tokens[-1] in stops, "ends too early"
        assert widths == [combination.draft_tokens] * len(rounds)
        assert all(1 <= n <= combination.draft_tokens + 1 for n in rounds)
        if combination.block > 1:
            assert sum(rounds) >= len(tokens) - 1 > sum(rounds[:-1]) - (not rounds), "a round too few or too many"


def check_tokens(combination: Combination, target: Decoder, call: Call, result: Generation) -> None:
    """Every token against the target's logits after those before it, without a cache."""
    prompts, settings = call.each(call.prompts), call.settings()
    logits = all_logits(target, [[*p, *tokens] for p, tokens in zip(prompts, result.tokens, strict=True)])
    draws, ties = noise(settings), 0
    for i, (prompt, tokens) in enumerate(zip(prompts, result.tokens, strict=True)):
        first, end = len(prompt), len(prompt) + len(tokens)
        laws, drawn = logits[i, first - 1 : end - 1], draws[i, first:end]
        assert np.isfinite(laws).all()
        slack = TIE_MARGIN * np.ptp(laws, axis=-1)
        assert kept(laws, settings[i], slack)[np.arange(len(tokens)), tokens].all(), f"row {i}: an excluded token"
        if combination.rule == "match":
            wrong = np.flatnonzero(choose(laws, drawn, settings[i]) != tokens)
            for at in wrong:
                possible = may_choose(laws[at], drawn[at], settings[i])
                assert tokens[at] in possible, f"row {i}: token {at} is {tokens[at]}, not one of {possible}"
            ties += len(wrong)
    assert ties <= 1


def check_rounds(runner: Runner, call: Call, result: Generation, answers: list[list[int]], table: np.ndarray) -> None:
    """Rounds of a drafter that proposes `table`, against decoding in plain Python."""
    combination, rows = runner.combination, zip(call.each(call.prompts), answers, table, strict=True)
    per_row = zip(rows, call.each(call.limits), call.each(call.stops), strict=True)
    for i, ((prompt, answer, row), limit, stops) in enumerate(per_row):
        expected = simulate(
            len(prompt), answer, row, combination.draft_tokens, limit, stops, combination.tree_nodes or 0
        )
        assert (result.tokens[i], result.rounds[i]) == expected or result.tokens[i] != expected[0], f"row {i}"


def check_company(
    rng: np.random.Generator, runner: Runner, call: Call, result: Generation, table: np.ndarray, known: np.ndarray
) -> None:
    """Prompts in another order, half of them among strangers, give the same."""
    count, samples = call.seeds.shape
    order = rng.permutation(count)
    strangers = rng.permutation(count) < count // 2
    other = random_call(rng, runner.combination)

    def mixed(mine: Sequence, theirs: Sequence) -> list:
        return [theirs[at] if strangers[at] else mine[at] for at in order]

    again = replace(
        call,
        prompts=mixed(call.prompts, other.prompts),
        limits=mixed(call.limits, other.limits),
        stops=mixed(call.stops, other.stops),
        seeds=np.array(mixed(call.seeds, other.seeds)),
        masks=None if call.masks is None or other.masks is None else np.array(mixed(call.masks, other.masks)),
    )
    rows = (order[:, None] * samples + np.arange(samples)).ravel()
    found = runner(again, table[rows], known[rows])
    for here, row in enumerate(rows.tolist()):
        if not strangers[row // samples]:
            assert found.tokens[here] == result.tokens[row], f"row {row} depends on its batch"
            assert found.rounds[here] == result.rounds[row], f"row {row}: rounds depend on the batch"


def run_case(runner: Runner, seed: int) -> set[int]:
    """Returns the lengths of the rounds."""
    combination, rng = runner.combination, np.random.default_rng(seed)
    call, answers = runner.prompts(seed // CASES_A_PROMPT)
    call = with_ends(rng, call, answers)
    table = runner.table(call, answers, float(rng.choice([0.0, 0.0, 0.1, 0.4])), seed)
    if not combination.ranked:  # an error near the end of a full bucket: the next round reaches far past it
        at = 0, PROMPT + NEW - int(rng.integers(2, 5))
        table[at] = (table[at] + 1) % VOCAB
    share = float(rng.choice([0.5, 0.8, 1.0, 1.0]))
    known = rng.random(table.shape[:2]) < share
    result = runner(call, table, known)
    check_ends(combination, call, result)
    check_tokens(combination, runner.target, call, result)
    if combination.countable and share == 1:
        check_rounds(runner, call, result, answers, table)
    if combination.rule != "match":
        check_company(rng, runner, call, result, table, known)
    return {n for rounds in result.rounds for n in rounds}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_random_calls(name: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    combination, only = COMBINATIONS[name], pytestconfig.getoption("--fuzz-case")
    monkeypatch.setattr(batches, "PREFILL_CHUNK", combination.chunk)
    count = -(-pytestconfig.getoption("--fuzz-cases") // len(COMBINATIONS))
    lengths: set[int] = set()
    with mesh_scope():
        runner = Runner(combination)
        for seed in range(count) if only is None else [only]:
            try:
                lengths |= run_case(runner, seed)
            except Exception as error:
                error.add_note(f"combination {name}, case {seed}; again: -k '[{name}]' --fuzz-case {seed}")
                raise
    if combination.block > 1 and count >= 10 and only is None:
        assert {1, 2, 3, combination.draft_tokens + 1} <= lengths, "too few drafts are kept, or too many"
