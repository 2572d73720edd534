"""The LoRA draft in the decoder: what it proposes, and that the answer stays the target's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specjax.decoding import generate
from specjax.decoding.batch import Batch
from specjax.decoding.drafter import LoRADrafter, Rows
from specjax.decoding.drafting import PLAIN, Drafting
from specjax.decoding.loop import decode, prefill
from specjax.errors import InputError
from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.kv_cache import KVCache
from specjax.models.lora import LoRAConfig, merge
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import SPECS, mesh_scope, put
from tests.decoding.oracle import Mixture, oracle, proposals
from tests.decoding.tiny import (
    OTHER_TARGETS,
    TARGET,
    Cases,
    _filled,
    all_logits,
    assert_same_tokens,
    random_prompts,
    random_target,
)

CONFIG = LoRADraftConfig(LoRAConfig(r=2, alpha=2.0), block_size=4, mask_token_id=95)
ADAPTED = dataclasses.replace(CONFIG, adapt_context=True)


def random_lora_draft(seed: int, config: LoRADraftConfig = CONFIG, base: DecoderConfig = TARGET) -> LoRADraft:
    return _filled(lambda: LoRADraft(config, base, rngs=nnx.Rngs(0)), seed)


@jax.jit
def filled_cache(target: Decoder, tokens_bt: jax.Array) -> KVCache:
    config, (b, t) = target.config, tokens_bt.shape
    empty = KVCache.create(config.num_hidden_layers, b, config.num_key_value_heads, t, config.head_dim, target.dtype)
    cache = target(tokens_bt, cache=empty).cache
    assert cache is not None
    return cache


@jax.jit
def draft_logits(draft: LoRADraft, state: KVCache | None, target: Decoder, rows: Rows) -> jax.Array:
    return LoRADrafter(draft).draft_logits(state, target, rows, draft.config.block_size - 1)


def rows_at(known: jax.Array, length: jax.Array, cache: KVCache) -> Rows:
    return Rows(known, length, jnp.zeros_like(length, bool), cache)


@jax.jit
def merged_logits(target: Decoder, merged: Decoder, tokens_bt: jax.Array, blocks_bt: jax.Array, at: int) -> jax.Array:
    """Logits of blocks after `at` tokens: a model with the adapters in its kernels, over the target's own keys."""
    b, size = blocks_bt.shape
    cache = filled_cache(target, tokens_bt)
    positions = at + jax.reshard(jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (b, size)), SPECS.act_bt)
    everything = jax.reshard(jnp.ones((b, size, size), bool), SPECS.act_btd)
    return merged.logits(merged(blocks_bt, positions, cache=cache, tree_btt=everything).hidden)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_block_is_the_merged_models_over_the_targets_keys(kind: str) -> None:
    base = TARGET if kind == "full" else OTHER_TARGETS["sliding"]
    tokens = np.random.default_rng(0).integers(0, TARGET.vocab_size, (2, 24), dtype=np.int32)
    at, size = 17, CONFIG.block_size
    blocks = np.full((2, size), CONFIG.mask_token_id, np.int32)
    blocks[:, 0] = tokens[:, at]
    with mesh_scope():
        target, draft = random_target(0, base), random_lora_draft(0, base=base)
        merged, rows = merge(target, draft.adapters), put(tokens, SPECS.act_bt)
        expected = merged_logits(target, merged, rows, put(blocks, SPECS.act_bt), at)
        cache = filled_cache(target, rows)
        length = put(np.full(2, at, np.int32), SPECS.act_b)
        known = put(tokens[:, at], SPECS.act_b)
        logits = draft_logits(draft, None, target, rows_at(known, length, cache))
    np.testing.assert_allclose(logits, np.asarray(expected)[:, 1:], atol=2e-4)
    assert np.abs(all_logits(target, tokens)[:, at] - np.asarray(logits)[:, 0]).max() > 0.1


def test_an_adapted_context_is_the_merged_models_own() -> None:
    """Its cache after a prefill in chunks, rounds of chains and trees and rounds without drafts; and its blocks."""
    size = CONFIG.block_size
    chain, tree = Drafting(size - 1, rule="block", draft_choice="sample"), Drafting(size - 1, tree_nodes=6)
    with mesh_scope():
        target, draft = random_target(0), random_lora_draft(0, ADAPTED)
        merged, drafter = merge(target, draft.adapters), LoRADrafter(draft)
        batch = Batch.build(target, random_prompts(0, 2), [64] * 2, [[]] * 2, size).with_sampling(
            3.0, None, None, [0, 1]
        )
        shapes = {"capacity": batch.capacity, "max_rounds": batch.max_rounds, "chunk": 16}
        state = prefill(target, drafter, batch.prompts, batch.prompt_length, batch.limits, batch.sampling, **shapes)
        for i, drafting in enumerate((chain, tree, PLAIN, chain)):
            until = put(np.int32(4 * i + 4), jax.P())
            state = decode(target, drafter, state, batch.limits, batch.sampling, until, drafting=drafting)
            cache = filled_cache(merged, state.tokens)
            for row, length in enumerate(state.length.tolist()):
                for own, expected in zip(jax.tree.leaves(state.drafter), jax.tree.leaves(cache), strict=True):
                    np.testing.assert_allclose(own[row, :, :length], expected[row, :, :length], rtol=5e-5, atol=2e-4)
        assert max(map(max, state.rounds.tolist())) > 1
        for row, length in enumerate(state.length.tolist()):
            tokens, at = state.tokens[row : row + 1], put(np.array([length], np.int32), SPECS.act_b)
            blocks = np.full((1, size), CONFIG.mask_token_id, np.int32)
            blocks[0, 0] = tokens[0, length]
            expected = merged_logits(merged, merged, tokens, put(blocks, SPECS.act_bt), length)
            own_cache, known = filled_cache(merged, tokens), put(blocks[:, 0], SPECS.act_b)
            unused = jax.tree.map(jnp.zeros_like, own_cache)
            logits = draft_logits(draft, own_cache, target, rows_at(known, at, unused))
            np.testing.assert_allclose(logits, expected[:, 1:], atol=2e-4)


HOW: list[dict[str, Any]] = [{}, {"draft_tokens": 2}, {"tree_nodes": 6}, {"temperature": 0.8, "top_p": 0.9}]


@pytest.mark.parametrize(("config", "how"), [*((CONFIG, how) for how in HOW), (ADAPTED, {}), (ADAPTED, HOW[2])])
def test_answers_are_the_targets(case: Cases, config: LoRADraftConfig, how: dict[str, Any]) -> None:
    """A random draft whose proposals are often replaced by right ones."""
    target, prompts, _ = case(0, 3)
    draft = random_lora_draft(0, config)
    drawn = {name: value for name, value in how.items() if name in ("temperature", "top_p")}
    plain = generate(target, prompts, None, 40, **drawn)
    table = proposals(prompts, plain.tokens, 0.2, 0, TARGET.vocab_size)
    with mesh_scope():
        known = put(np.random.default_rng(0).random(table.shape) < 0.6, SPECS.act_bt)
        drafter = Mixture(LoRADrafter(draft), oracle(table, 4), known)
        for each in (draft, drafter):
            found = generate(target, prompts, each, 40, **how)
            assert_same_tokens(target, prompts, found.tokens, plain.tokens)
    assert len({r for row in found.rounds for r in row}) > 2


def test_a_draft_of_another_target_is_refused() -> None:
    other = random_target(0, OTHER_TARGETS["one key/value head"])
    with pytest.raises(InputError, match=r"k_proj.b has shape \[2, 16\], of the target it would have \[2, 8\]"):
        generate(other, random_prompts(0, 1), random_lora_draft(0), 4)
