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
from specjax.decoding.loop import DecodeState
from specjax.decoding.sampling import Sampling, choose
from specjax.decoding.verify import propose
from specjax.models.decoder import Decoder, DecoderOutput

STEP_REPEATS = 16

Step = Callable[[Decoder, Drafter | None, DecodeState, Sampling | None, int], DecodeState]


def ar_seconds(target: Decoder, batch: Batch) -> float:
    """Seconds of an autoregressive step: the target's pass over one token of every row, and its choices."""
    state = batch.prefill(target, None)
    return _seconds(_verify, target, None, state, batch.sampling, 0)[0]


def round_seconds(target: Decoder, drafter: Drafter, batch: Batch, draft_tokens: int) -> tuple[float, float]:
    """Seconds (draft, verify) of a round: the target's pass over draft_tokens + 1 tokens, and what a draft adds to it.

    A draft is measured in turn with verify passes, as in decoding: alone in a loop, a small draft's weights would stay
    in the processor's caches, from where the target's weights drive them in every round.
    """
    state = batch.prefill(target, drafter)
    verify, state = _seconds(_verify, target, drafter, state, batch.sampling, draft_tokens)
    both, _ = _seconds(_draft_and_verify, target, drafter, state, batch.sampling, draft_tokens)
    return both - verify, verify


def _seconds(
    step: Step, target: Decoder, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, width: int
) -> tuple[float, DecodeState]:
    """Seconds of one `step` of STEP_REPEATS in one compiled loop, the first step's included; and the state after."""
    state = jax.block_until_ready(state)
    started = time.perf_counter()
    state = jax.block_until_ready(_repeat(target, drafter, state, sampling, step=step, draft_tokens=width))
    return (time.perf_counter() - started) / STEP_REPEATS, state


@partial(jax.jit, static_argnames=("step", "draft_tokens"), donate_argnames=("state",))
def _repeat(
    target: Decoder,
    drafter: Drafter | None,
    state: DecodeState,
    sampling: Sampling | None,
    *,
    step: Step,
    draft_tokens: int,
) -> DecodeState:
    def body(_: jax.Array, state: DecodeState) -> DecodeState:
        return step(target, drafter, state, sampling, draft_tokens)

    return jax.lax.fori_loop(0, STEP_REPEATS, body, state)


def _verify(
    target: Decoder, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, draft_tokens: int
) -> DecodeState:
    """The target's pass, with its choices fed back so that nothing is skipped."""
    block = state.tokens[:, : draft_tokens + 1]
    return _run(target, state, block, sampling, ())[0]


def _draft_and_verify(
    target: Decoder, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, draft_tokens: int
) -> DecodeState:
    """A round without its bookkeeping: neither matching nor committing."""
    assert drafter is not None
    known = state.tokens[:, :1]
    logits = drafter.draft_logits(state.drafter, target, known[:, 0], state.length, draft_tokens)
    drafts = propose(logits, state.length, sampling, rule="match", draft_choice="argmax")
    block = jnp.concatenate([known, drafts], axis=1)
    state, output, positions = _run(target, state, block, sampling, drafter.tap_ids)
    return dataclasses.replace(state, drafter=drafter.observe(state.drafter, output.taps, positions, positions))


def _run(
    target: Decoder, state: DecodeState, block: jax.Array, sampling: Sampling | None, tap_ids: tuple[int, ...]
) -> tuple[DecodeState, DecoderOutput, jax.Array]:
    positions = state.length[:, None] + jnp.arange(block.shape[1], dtype=jnp.int32)
    output = target(block, positions, cache=state.cache, tap_ids=tap_ids)
    choices = choose(target.logits(output.hidden), positions + 1, sampling)
    tokens = jax.vmap(lambda row, new: row.at[: new.shape[0]].set(new))(state.tokens, choices)
    assert output.cache is not None
    return dataclasses.replace(state, tokens=tokens, cache=output.cache), output, positions
