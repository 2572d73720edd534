"""Decoding with trees of drafts gives the target's own tokens, and its rounds are those of the trees."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from specjax.decoding import DFlashDrafter, generate
from specjax.decoding.batch import Batch
from specjax.decoding.drafting import Drafting
from specjax.decoding.loop import decode_round
from specjax.models.sharding import SPECS, mesh_scope, put
from tests.decoding.oracle import Mixture, oracle, preferences, proposals, simulate
from tests.decoding.test_sampling import HOT
from tests.decoding.test_speculation import limits_and_stops
from tests.decoding.tiny import SLIDING, TARGET, Cases, assert_same_tokens, random_draft, random_prompts, random_target

# batch, block size, depth of the tree, nodes
SHAPES = [(1, 2, None, 10), (3, 4, None, 3), (3, 8, 5, 20), (8, 8, None, 40)]


@pytest.mark.parametrize(("batch", "block", "draft_tokens", "nodes"), SHAPES)
def test_a_tree_changes_no_token_and_every_round_counts(
    case: Cases, batch: int, block: int, draft_tokens: int | None, nodes: int
) -> None:
    width = draft_tokens or block - 1
    lengths: set[int] = set()
    rounds_of_trees = rounds_of_chains = 0
    for seed in range(3):
        target, prompts, answers = case(seed, batch)
        rng = np.random.default_rng([seed, batch, block])
        limits, stops = limits_and_stops(rng, answers) if seed else ([56] * batch, [[]] * batch)
        table = preferences(prompts, answers, seed, TARGET.vocab_size)
        with mesh_scope():
            result = generate(target, prompts, oracle(table, block), limits, stops, draft_tokens, tree_nodes=nodes)
        per_row = list(zip(prompts, answers, table, limits, stops, strict=True))
        expected = [simulate(len(p), a, row, width, n, stop, nodes) for p, a, row, n, stop in per_row]
        assert_same_tokens(target, prompts, result.tokens, [tokens for tokens, _ in expected])
        for tokens, rounds, (same, expected_rounds) in zip(result.tokens, result.rounds, expected, strict=True):
            assert rounds == expected_rounds or tokens != same
            lengths.update(rounds)
        rounds_of_trees += sum(len(rounds) for _, rounds in expected)
        for p, a, row, n, stop in per_row:
            rounds_of_chains += len(simulate(len(p), a, row.argmax(-1), width, n, stop)[1])
    assert lengths == set(range(1, width + 2))
    assert rounds_of_trees < rounds_of_chains or nodes == width


def test_trees_draw_what_autoregressive_decoding_draws() -> None:
    target, prompts, seeds = random_target(3), random_prompts(3, 4), [7, 7, 2**32 - 1, 0]
    alone = generate(target, prompts, max_new_tokens=56, seed=seeds, **HOT).tokens
    table = preferences(prompts, alone, 0, TARGET.vocab_size)
    with mesh_scope():
        found = generate(target, prompts, oracle(table, 8), 40, seed=seeds, tree_nodes=20, **HOT)
    per_row = zip(prompts, alone, table, strict=True)
    expected = [simulate(len(p), a, row, 7, 40, [], 20) for p, a, row in per_row]
    assert list(zip(found.tokens, found.rounds, strict=True)) == expected
    assert {1, 2, 3, 4} <= {n for rounds in found.rounds for n in rounds}


def test_a_tree_keeps_no_less_than_the_chain_of_the_same_state(case: Cases) -> None:
    """Round by round from the chain's states, with a draft that is right often enough to reach deep."""
    target, prompts, answers = case(0, 3)
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size)
    step = jax.jit(decode_round, static_argnames="drafting")
    gains = []
    with mesh_scope():
        known = put(np.random.default_rng(1).random(table.shape) < 0.5, SPECS.act_bt)
        drafter = Mixture(DFlashDrafter(random_draft(0, SLIDING)), oracle(table, 8), known)
        batch = Batch.build(target, prompts, [40] * 3, [[]] * 3, drafter.block_size)
        state = batch.prefill(target, drafter)
        while not state.done.all():
            tree = step(target, drafter, state, batch.limits, drafting=Drafting(5, 40))
            now = int(state.round)
            state = step(target, drafter, state, batch.limits, drafting=Drafting(5))
            gains += (np.asarray(tree.rounds) - np.asarray(state.rounds))[:, now].tolist()
    assert min(gains) == 0
    assert sum(gains) >= 10
