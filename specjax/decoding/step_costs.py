"""What the networks' passes cost inside compiled loops: the part of decoding that no loop around them can save."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from specjax.decoding.batch import Batch
from specjax.decoding.drafter import Drafter
from specjax.decoding.flat import Flat
from specjax.decoding.loop import PLAIN, DecodeState, Drafting
from specjax.decoding.sampling import Sampling, choose
from specjax.decoding.target_pass import Verified, verify_tree
from specjax.decoding.tree import DraftTree, draft_tree
from specjax.decoding.verify import propose
from specjax.models.decoder import Decoder, DecoderOutput
from specjax.models.kv_cache import KVCache

STEP_REPEATS = 16

Step = Callable[[Decoder, Drafter | None, DecodeState, Sampling | None, Drafting], DecodeState]


def ar_seconds(target: Decoder, batch: Batch) -> float:
    """Seconds of an autoregressive step: the target's pass over one token of every row, and its choices."""
    state = batch.prefill(Flat.of(target), Flat.of(None))  # as `generate` runs it, which compiles it once
    return _seconds(_verify, target, None, state, batch.sampling, PLAIN)[0]


def round_seconds(target: Decoder, drafter: Drafter, batch: Batch, drafting: Drafting) -> tuple[float, float]:
    """Seconds (draft, verify) of a round: the target's pass over its drafts + 1 tokens, and what a draft adds to it.

    The pass over a tree is `verify_tree`, with its writes of what it keeps; building the tree counts as drafting.

    A draft is measured in turn with verify passes, as in decoding: alone in a loop, a small draft's weights would stay
    in the processor's caches, from where the target's weights drive them in every round.
    """
    state = batch.prefill(Flat.of(target), Flat.of(drafter))
    verify, state = _seconds(_verify, target, drafter, state, batch.sampling, drafting)
    both, _ = _seconds(_draft_and_verify, target, drafter, state, batch.sampling, drafting)
    return both - verify, verify


def _seconds(
    step: Step,
    target: Decoder,
    drafter: Drafter | None,
    state: DecodeState,
    sampling: Sampling | None,
    drafting: Drafting,
) -> tuple[float, DecodeState]:
    """Seconds of one `step` of STEP_REPEATS in one compiled loop, the first step's included; and the state after."""
    state = jax.block_until_ready(state)
    started = time.perf_counter()
    state = jax.block_until_ready(_repeat(target, drafter, state, sampling, step=step, drafting=drafting))
    return (time.perf_counter() - started) / STEP_REPEATS, state


@partial(jax.jit, static_argnames=("step", "drafting"), donate_argnames=("state",))
def _repeat(
    target: Decoder,
    drafter: Drafter | None,
    state: DecodeState,
    sampling: Sampling | None,
    *,
    step: Step,
    drafting: Drafting,
) -> DecodeState:
    def body(_: jax.Array, state: DecodeState) -> DecodeState:
        return step(target, drafter, state, sampling, drafting)

    return jax.lax.fori_loop(0, STEP_REPEATS, body, state)


def _verify(
    target: Decoder, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, drafting: Drafting
) -> DecodeState:
    """The target's pass, with its choices fed back so that nothing is skipped."""
    if drafting.tree_nodes:
        return _run_tree(target, state, _some_tree(state, drafting), sampling, ())[0]
    return _run(target, state, state.tokens[:, : drafting.draft_tokens + 1], sampling, ())[0]


def _draft_and_verify(
    target: Decoder, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, drafting: Drafting
) -> DecodeState:
    """A round without its bookkeeping: nothing is committed, and a chain is not matched."""
    assert drafter is not None
    known = state.tokens[:, 0]
    logits = drafter.draft_logits(state.drafter, target, known, state.length, drafting.draft_tokens)
    if drafting.tree_nodes:
        tree = draft_tree(known, logits, drafting.tree_nodes)
        state, verified = _run_tree(target, state, tree, sampling, drafter.tap_ids)
        taps, positions, slots = verified.taps, verified.positions, verified.slots
    else:
        drafts = propose(logits, state.length, sampling, rule="match", draft_choice="argmax")
        block = jnp.concatenate([known[:, None], drafts], axis=1)
        state, output, positions = _run(target, state, block, sampling, drafter.tap_ids)
        taps, slots = output.taps, positions
    return dataclasses.replace(state, drafter=drafter.observe(state.drafter, taps, positions, slots))


def _run(
    target: Decoder, state: DecodeState, block: jax.Array, sampling: Sampling | None, tap_ids: tuple[int, ...]
) -> tuple[DecodeState, DecoderOutput, jax.Array]:
    positions = state.length[:, None] + jnp.arange(block.shape[1], dtype=jnp.int32)
    output = target(block, positions, cache=state.cache, tap_ids=tap_ids)
    choices = choose(target.logits(output.hidden), positions + 1, sampling)
    assert output.cache is not None
    return _fed_back(state, output.cache, choices), output, positions


def _run_tree(
    target: Decoder, state: DecodeState, tree: DraftTree, sampling: Sampling | None, tap_ids: tuple[int, ...]
) -> tuple[DecodeState, Verified]:
    never_done = jnp.zeros_like(state.done)
    verified = verify_tree(target, tap_ids, tree, state.length, never_done, state.cache, sampling)
    return _fed_back(state, verified.cache, verified.tokens), verified


def _fed_back(state: DecodeState, cache: KVCache, choices: jax.Array) -> DecodeState:
    tokens = jax.vmap(lambda row, new: row.at[: new.shape[0]].set(new))(state.tokens, choices)
    return dataclasses.replace(state, tokens=tokens, cache=cache)


def _some_tree(state: DecodeState, drafting: Drafting) -> DraftTree:
    """The chain, and every other node below the root: a pass costs the same for trees of one size and depth."""
    index = jnp.arange(drafting.tree_nodes + 1, dtype=jnp.int32)
    chain = index <= drafting.draft_tokens
    rows = jnp.zeros_like(state.length)[:, None]
    parent = jnp.where(chain, jnp.maximum(index - 1, 0), 0)
    depth = jnp.where(chain, index, 1)
    tokens = state.tokens[:, :1] + rows + jnp.zeros_like(index)
    return DraftTree(tokens, rows + parent, rows + depth, drafting.draft_tokens)
