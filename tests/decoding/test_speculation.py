"""Speculative decoding is autoregressive decoding, token for token, whatever is proposed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from specjax.decoding import DFlashDrafter, generate
from specjax.models.sharding import SPECS, mesh_scope, put
from tests.decoding.oracle import Mixture, oracle, preferences, proposals, simulate
from tests.decoding.tiny import (
    DRAFTS,
    OTHER_TARGETS,
    SLIDING,
    TARGET,
    Cases,
    assert_same_tokens,
    next_logits,
    random_draft,
    random_prompts,
    random_target,
)

ERROR_RATES = (0.0, 0.1, 0.25, 0.5, 1.0)
# batch, block size, drafts verified a round
SHAPES = [(1, 2, None), (1, 8, None), (3, 4, None), (3, 8, 5), (8, 4, 2), (8, 8, None)]


def limits_and_stops(rng: np.random.Generator, answers: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Limits from 1 to 56; stops that never come, come first, or come somewhere in the answer."""
    limits = rng.choice([1, 2, 3, 20, 55, 56], len(answers)).tolist()
    stops = []
    for answer in answers:
        absent = [t for t in range(TARGET.vocab_size) if t not in answer]
        kinds: list[list[int]] = [
            [],
            [answer[0]],
            rng.choice(answer[1:56], 2).tolist(),
            [absent[0], answer[30]],
            absent[:4],
        ]
        stops.append(kinds[rng.choice(len(kinds), p=[0.3, 0.1, 0.2, 0.2, 0.2])])
    return limits, stops


def cut(answer: list[int], limit: int, stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(answer) if token in stops), limit)
    return answer[: min(limit, end + 1)]


@pytest.mark.parametrize(("batch", "block", "draft_tokens"), SHAPES)
def test_an_oracle_with_errors_changes_no_token_and_every_round_counts(
    case: Cases, batch: int, block: int, draft_tokens: int | None
) -> None:
    width = draft_tokens or block - 1
    acceptance_lengths: set[int] = set()
    stopped_inside = 0
    for seed in range(3):
        target, prompts, answers = case(seed, batch)
        rng = np.random.default_rng([seed, batch, block])
        for rate in ERROR_RATES:
            limits, stops = limits_and_stops(rng, answers) if seed else ([56] * batch, [[]] * batch)
            table = proposals(prompts, answers, rate, seed, TARGET.vocab_size)
            with mesh_scope():
                result = generate(target, prompts, oracle(table, block), limits, stops, draft_tokens)
            expected = [
                simulate(len(p), a, row, width, limit, stop)
                for p, a, row, limit, stop in zip(prompts, answers, table, limits, stops, strict=True)
            ]
            assert_same_tokens(target, prompts, result.tokens, [tokens for tokens, _ in expected])
            for tokens, rounds, (same, expected_rounds) in zip(result.tokens, result.rounds, expected, strict=True):
                assert rounds == expected_rounds or tokens != same
                acceptance_lengths.update(rounds)
                stopped_inside += len(tokens) < 55 and sum(rounds) > len(tokens) - 1
    assert acceptance_lengths == set(range(1, width + 2))
    assert stopped_inside >= batch


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_autoregressive_answers_end_at_limits_and_stops(case: Cases, batch: int) -> None:
    for seed in range(3):
        target, prompts, answers = case(seed, batch)
        limits, stops = limits_and_stops(np.random.default_rng(seed), answers)
        result = generate(target, prompts, None, limits, stops)
        assert result.tokens == [cut(*row) for row in zip(answers, limits, stops, strict=True)]
        assert result.rounds == [[]] * batch


def test_answers_vary(case: Cases) -> None:
    """Else a proposal at a wrong position could be right."""
    _, _, answers = case(1, 8)
    assert min(len(set(answer)) for answer in answers) >= 4
    assert len({tuple(answer[-8:]) for answer in answers}) == 8


@pytest.mark.parametrize("new_tokens", [1, 2, 64])
def test_max_new_tokens_is_exact(case: Cases, new_tokens: int) -> None:
    target, prompts, answers = case(1, 8)
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size)
    with mesh_scope():
        result = generate(target, prompts, oracle(table, 8), new_tokens)
    assert result.tokens == [answer[:new_tokens] for answer in answers]
    assert [len(rounds) for rounds in result.rounds] == [-(-(new_tokens - 1) // 8)] * 8


def test_blocks_may_reach_past_full_buckets_and_the_context() -> None:
    """Prompt and answer fill their buckets and the target's context; rounds still count drafts past the end."""
    wide = random_target(2)
    narrow = random_target(2, dataclasses.replace(TARGET, max_position_embeddings=128))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, TARGET.vocab_size, n).tolist() for n in (64, 64, 64)]
    answers = generate(wide, prompts, max_new_tokens=80).tokens
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size)
    for row in range(3):  # an error makes the last round start 2, 3 or 4 tokens before the end
        table[row, 64 + 61 - row] = (table[row, 64 + 61 - row] + 1) % TARGET.vocab_size
    with mesh_scope():
        result = generate(narrow, prompts, oracle(table, 8), 64)
    expected = [simulate(64, a, row, 7, 64, []) for a, row in zip(answers, table, strict=True)]
    assert_same_tokens(narrow, prompts, result.tokens, [tokens for tokens, _ in expected])
    assert result.rounds == [rounds for _, rounds in expected]
    assert [sum(rounds) for rounds in result.rounds] == [63 + 6 - row for row in range(3)]


@pytest.mark.parametrize("kind", DRAFTS)
def test_random_drafts_change_no_token(case: Cases, kind: str) -> None:
    config = DRAFTS[kind]
    for seed in range(2):
        target, prompts, answers = case(seed, 3)
        draft = random_draft(seed, config)
        rng = np.random.default_rng(seed)
        limits, stops = limits_and_stops(rng, answers)
        result = generate(target, prompts, draft, limits, stops)
        assert_same_tokens(
            target, prompts, result.tokens, [cut(*row) for row in zip(answers, limits, stops, strict=True)]
        )
        for tokens, rounds in zip(result.tokens, result.rounds, strict=True):
            assert len(rounds) <= len(tokens) - 1 <= sum(rounds)
            assert all(1 <= r <= config.block_size for r in rounds)


@pytest.mark.parametrize("kind", OTHER_TARGETS)
def test_random_drafts_that_are_often_right_change_no_token_of_other_targets(kind: str) -> None:
    """The expected tokens are the target's choices without a cache."""
    target, prompts = random_target(0, OTHER_TARGETS[kind]), random_prompts(0, 3)
    answers = generate(target, prompts, max_new_tokens=64).tokens
    choices = [
        [int(next_logits(target, [*prompt, *answer[:i]]).argmax()) for i in range(64)]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert_same_tokens(target, prompts, answers, choices)
    rng = np.random.default_rng(0)
    limits, stops = limits_and_stops(rng, answers)
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size)
    draft = random_draft(0, dataclasses.replace(SLIDING, block_size=6))
    with mesh_scope():
        known = put(rng.random(table.shape) < 0.6, SPECS.act_bt)
        drafter = Mixture(DFlashDrafter(draft), oracle(table, 6), known)
        results = [generate(target, prompts, drafter, limits, stops)]
        ranked = oracle(preferences(prompts, answers, 0, TARGET.vocab_size), 6)
        drafter = dataclasses.replace(drafter, oracle=ranked, known=known | True)
        results.append(generate(target, prompts, drafter, limits, stops, tree_nodes=24))
    for result in results:
        expected = [cut(*row) for row in zip(answers, limits, stops, strict=True)]
        assert_same_tokens(target, prompts, result.tokens, expected)
        assert {1, 2, 3, 6} <= {r for rounds in result.rounds for r in rounds}


def test_a_call_without_prompts_answers_nothing(case: Cases) -> None:
    target, _, _ = case(0, 1)
    for prompts in ([], np.zeros((0, 3), np.int32)):
        result = generate(target, prompts, max_new_tokens=3)
        assert (result.tokens, result.rounds) == ([], [])


def test_numpy_arguments_are_taken(case: Cases) -> None:
    target, prompts, answers = case(0, 3)
    arrays = [np.array(p, dtype) for p, dtype in zip(prompts, (np.int32, np.int64, np.uint8), strict=True)]
    assert generate(target, arrays, max_new_tokens=np.int64(9)).tokens == [a[:9] for a in answers]
    assert generate(target, arrays, max_new_tokens=np.array([1, 5, 9])).tokens == [
        a[:n] for a, n in zip(answers, (1, 5, 9), strict=True)
    ]
    stop = np.array([answers[0][4], answers[1][2]])
    expected = [cut(a, 30, stop.tolist()) for a in answers]
    assert generate(target, arrays, max_new_tokens=30, stop_token_ids=stop).tokens == expected
    assert generate(target, arrays, max_new_tokens=30, stop_token_ids=[tuple(stop)] * 3).tokens == expected
    square = np.array(random_prompts(0, 3)[2])[None].repeat(3, 0)
    assert len(generate(target, square, max_new_tokens=4).tokens) == 3
