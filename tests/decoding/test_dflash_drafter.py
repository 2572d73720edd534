"""The DFlash drafter proposes in the loop what training's forward proposes on the finished sequence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.decoding import DFlashDrafter
from specjax.decoding.batch import Batch
from specjax.decoding.drafter import Rows
from specjax.decoding.drafting import Drafting
from specjax.decoding.loop import DecodeState, decode_round
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.sharding import SPECS, mesh_scope, put
from tests.decoding.oracle import Mixture, oracle, preferences, proposals
from tests.decoding.tiny import DRAFTS, TARGET, Cases, is_tie, random_draft

LIMITS = (50, 9, 1)


class Rounds(NamedTuple):
    """anchors, proposals: per row, of every round it took part in. tokens: per row, prompt and answer."""

    anchors: list[list[int]]
    proposals: list[list[np.ndarray]]
    tokens: np.ndarray
    rounds: np.ndarray


@jax.jit
def propose(target: Decoder, drafter: DFlashDrafter, state: DecodeState) -> jax.Array:
    last = jax.vmap(lambda row, i: row[i])(state.tokens, state.length)
    rows = Rows(last, state.length, state.done, state.cache)
    logits = drafter.draft_logits(state.drafter, target, rows, drafter.block_size - 1)
    return jnp.argmax(logits, axis=-1)


def row_buffers(state: DecodeState, row: int) -> list[np.ndarray]:
    return [np.asarray(x)[row] for x in jax.tree.leaves((state.tokens, state.cache, state.drafter))]


def decode_by_hand(
    target: Decoder, drafter: Mixture, prompts: list[list[int]], draft_tokens: int, tree_nodes: int
) -> Rounds:
    """The loop's rounds one by one; a finished row's buffers must never change."""
    step = jax.jit(decode_round, static_argnames="drafting")
    batch = Batch.build(target, prompts, LIMITS, [[]] * len(prompts), drafter.block_size)
    state = batch.prefill(target, drafter)
    result = Rounds([[] for _ in prompts], [[] for _ in prompts], np.zeros(0), np.zeros(0))
    finished: dict[int, list[np.ndarray]] = {}
    while True:
        for row in np.flatnonzero(state.done):
            before = finished.setdefault(int(row), row_buffers(state, row))
            for x, y in zip(before, row_buffers(state, row), strict=True):
                np.testing.assert_array_equal(x, y)
        if len(finished) == len(prompts):
            return result._replace(tokens=np.asarray(state.tokens), rounds=np.asarray(state.rounds))
        proposed = np.asarray(propose(target, drafter.inner, state))
        for row in np.flatnonzero(~np.asarray(state.done)):
            result.anchors[row].append(int(state.length[row]))
            result.proposals[row].append(proposed[row])
        state = step(target, drafter, state, batch.limits, drafting=Drafting(draft_tokens, tree_nodes))


@jax.jit
def training_logits(target: Decoder, draft: DFlashDraft, tokens_bt: jax.Array, anchors_bN: jax.Array) -> jax.Array:
    """Logits [b, N, B - 1, v] of one block at every anchor of finished sequences, as training computes them."""
    config = draft.config
    rows, tokens = tokens_bt.shape
    taps = target(tokens_bt, tap_ids=config.target_layer_ids).taps
    positions = jax.reshard(jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens)), SPECS.act_bt)
    context_kv = draft.context_kv(draft.context(taps), positions)
    known = jax.vmap(lambda row, at: row[at])(tokens_bt, anchors_bN)[..., None]
    masks = jnp.full((*anchors_bN.shape, config.block_size - 1), config.mask_token_id, jnp.int32)
    blocks = jnp.concatenate([known, jax.reshard(masks, SPECS.act_bNB)], axis=-1)
    hidden = draft(target.embed(blocks), context_kv, jnp.zeros_like(anchors_bN), anchors_bN)[:, :, 1:]
    logits = target.logits(hidden.reshape(rows, -1, config.hidden_size))
    return logits.reshape(*hidden.shape[:3], -1)


@pytest.mark.parametrize(
    ("kind", "draft_tokens", "tree_nodes"), [("full", 3, 0), ("sliding", 5, 0), ("full", 3, 9), ("sliding", 5, 20)]
)
def test_proposals_are_those_of_the_training_forward(
    case: Cases, kind: str, draft_tokens: int, tree_nodes: int
) -> None:
    """Over rounds of many acceptance lengths: an oracle replaces some of the proposals that are verified."""
    config = DRAFTS[kind]
    target, prompts, answers = case(0, 3)
    draft = random_draft(0, config)
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size)
    if tree_nodes:  # whose accepted paths shall not be chains
        table = preferences(prompts, answers, 0, TARGET.vocab_size)
    with mesh_scope():
        known = put(np.random.default_rng(1).random(table.shape[:2]) < (1 if tree_nodes else 0.7), SPECS.act_bt)
        drafter = Mixture(DFlashDrafter(draft), oracle(table, config.block_size), known)
        result = decode_by_hand(target, drafter, prompts, draft_tokens, tree_nodes)
        for row, (prompt, answer, limit) in enumerate(zip(prompts, answers, LIMITS, strict=True)):
            assert result.tokens[row, : len(prompt) + limit].tolist() == prompt + answer[:limit]
        assert len(set(result.rounds[result.rounds > 0])) >= 4  # accepted and rejected in many ways
        anchors = np.zeros((3, max(map(len, result.anchors))), np.int32)
        for row, positions in enumerate(result.anchors):
            anchors[row, : len(positions)] = positions
        logits = np.asarray(
            training_logits(target, draft, put(result.tokens, SPECS.act_bt), put(anchors, SPECS.act_bN))
        )
    compared = ties = 0
    for row, proposed in enumerate(result.proposals):
        for block, tokens in enumerate(proposed):
            for token, expected in zip(tokens, logits[row, block], strict=True):
                compared += 1
                if token != expected.argmax():
                    assert is_tie(expected)
                    ties += 1
    assert compared >= 60
    assert ties <= 2
