"""A mask embedding of the draft's own, and a target with more rows, against an extended table that holds the same."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.decoding import generate
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.sharding import SPECS, mesh_scope, put
from specjax.weights import flat_params, with_params
from tests.decoding.tiny import FULL, OWN_MASK, TARGET, random_draft, random_prompts, random_target

ROWS = 104


@pytest.fixture(scope="module")
def target() -> Decoder:
    """A target that mostly says one of four tokens, so that a random draft is right often enough to be measured."""
    target = random_target(0)
    params = flat_params(target)
    few = jnp.where(jnp.arange(TARGET.vocab_size) < 4, 4.0, 1.0)
    return with_params(target, params | {"lm_head.kernel": params["lm_head.kernel"] * few})


def extended(target: Decoder, mask_row: np.ndarray) -> Decoder:
    """`target` with 104 rows, the 100th of which is `mask_row`; a tie with token 0 keeps it from saying new tokens."""
    longer = random_target(0, dataclasses.replace(TARGET, vocab_size=ROWS))
    params = {path: np.asarray(value) for path, value in flat_params(target).items()}
    table = np.ones((ROWS, TARGET.hidden_size), np.float32)
    table[: TARGET.vocab_size] = params["embed_tokens.weight"]
    table[OWN_MASK.mask_token_id] = mask_row
    head = params["lm_head.kernel"]
    params["embed_tokens.weight"] = table
    params["lm_head.kernel"] = np.concatenate([head, np.repeat(head[:, :1], ROWS - head.shape[1], 1)], 1)
    with mesh_scope():
        placed = {path: put(params[path], old.sharding.spec) for path, old in flat_params(longer).items()}
        return with_params(longer, placed)


def with_row(config: DFlashConfig, row: np.ndarray) -> DFlashDraft:
    draft = random_draft(0, config)
    with mesh_scope():
        return with_params(draft, flat_params(draft) | {"mask_embedding": put(row, SPECS.mask_embedding_d)})


def test_a_mask_embedding_past_the_table_drafts_like_a_row_of_a_longer_one(target: Decoder) -> None:
    prompts = random_prompts(0, 3)
    plain = generate(target, prompts, max_new_tokens=48)
    row, other = np.random.default_rng(3).standard_normal((2, TARGET.hidden_size)).astype(np.float32)
    own = generate(target, prompts, with_row(OWN_MASK, row), max_new_tokens=48)
    assert own.tokens == plain.tokens
    in_table = dataclasses.replace(FULL, vocab_size=ROWS, mask_token_id=OWN_MASK.mask_token_id)
    expected = generate(extended(target, row), prompts, random_draft(0, in_table), max_new_tokens=48)
    assert own.tokens == expected.tokens
    assert own.rounds == expected.rounds
    assert max(map(max, own.rounds)) >= 3
    assert own.rounds != generate(target, prompts, with_row(OWN_MASK, other), max_new_tokens=48).rounds


@pytest.mark.parametrize("config", [FULL, OWN_MASK], ids=["target's mask", "own mask"])
def test_a_draft_of_the_shorter_vocabulary_drafts_for_the_extended_target(
    config: DFlashConfig, target: Decoder
) -> None:
    """The rows that it knows are the same, and embedding and head are the target's."""
    prompts = random_prompts(0, 3)
    draft = random_draft(0, config)
    before = generate(target, prompts, draft, max_new_tokens=48)
    after = generate(extended(target, np.ones(TARGET.hidden_size)), prompts, draft, max_new_tokens=48)
    assert (after.tokens, after.rounds) == (before.tokens, before.rounds)
