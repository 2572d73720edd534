"""What the networks' passes cost inside compiled loops: the part of decoding that no loop around them can save."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from specjax.decoding.batch import Batch
from specjax.decoding.drafter import Drafter, Rows
from specjax.decoding.drafting import PLAIN, Drafting, draft_and_verify
from specjax.decoding.flat import Flat, whole
from specjax.decoding.loop import DecodeState
from specjax.decoding.sampling import Sampling
from specjax.decoding.target_pass import Verified, verify_chain, verify_tree
from specjax.decoding.tree import DraftTree
from specjax.models.decoder import Decoder
from specjax.models.sharding import SPECS, put

ROUNDS = 16  # of a measurement

Step = Callable[[Decoder, Drafter | None, DecodeState, Sampling | None, Drafting], DecodeState]


def ar_seconds(target: Decoder, batch: Batch, block_size: int) -> float:
    """Seconds of an autoregressive step: the target's pass over one token of every row, and its choices.

    Of as many steps as `round_seconds` runs tokens of blocks of `block_size`: of few, the program's start would count.
    """
    state = batch.prefill(Flat.of(target), Flat.of(None))  # as `generate` runs it, which compiles it once
    return _seconds(_verify, target, None, state, batch.sampling, PLAIN, ROUNDS * block_size)[0]


def round_seconds(target: Decoder, drafter: Drafter, batch: Batch, drafting: Drafting) -> tuple[float, float]:
    """Seconds (draft, verify) of a round: the target's pass over its drafts + 1 tokens with the rule that verifies
    them, and what a draft adds to it.

    The pass is the decoder's own, `verify_chain` or `verify_tree`, with what it writes into the caches. Drafting is the
    drafter's pass, or with `one_pass` what its blocks add to the target's, the choice of drafts, building the tree, and
    taking in what the target has run. A round of the decoder also commits
    tokens, and counts. The program's start is included, once in `ROUNDS`; compiling is not, of the second call.

    A draft is measured in turn with verify passes, as in decoding: alone in a loop, a small draft's weights would stay
    in the processor's caches, from where the target's weights drive them in every round.
    """
    state = batch.prefill(Flat.of(target), Flat.of(drafter))
    verify, state = _seconds(_verify, target, drafter, state, batch.sampling, drafting, ROUNDS)
    both, _ = _seconds(_draft_and_verify, target, drafter, state, batch.sampling, drafting, ROUNDS)
    return both - verify, verify


def _seconds(
    step: Step,
    target: Decoder,
    drafter: Drafter | None,
    state: DecodeState,
    sampling: Sampling | None,
    drafting: Drafting,
    steps: int,
) -> tuple[float, DecodeState]:
    """Seconds of one `step` of so many in one compiled loop, the program's start shared among them; the state after."""
    state = jax.block_until_ready(state)
    arguments = Flat.of(target), Flat.of(drafter), state, sampling, put(np.int32(steps), P())
    started = time.perf_counter()
    state = jax.block_until_ready(_repeat(*arguments, step=step, drafting=drafting))
    return (time.perf_counter() - started) / steps, state


@partial(jax.jit, static_argnames=("step", "drafting"), donate_argnames=("state",))
def _repeat(
    target: Decoder | Flat[Decoder],
    drafter: Drafter | Flat[Drafter | None] | None,
    state: DecodeState,
    sampling: Sampling | None,
    steps: jax.Array,
    *,
    step: Step,
    drafting: Drafting,
) -> DecodeState:
    target, drafter = whole(target), whole(drafter)

    def body(i: jax.Array, state: DecodeState) -> DecodeState:
        # Rows stay where they are: of their own seeds, they would draw the same every time, and the compiler but once.
        fresh = None if sampling is None else dataclasses.replace(sampling, seeds=sampling.seeds + i.astype(jnp.uint32))
        return step(target, drafter, state, fresh, drafting)

    return jax.lax.fori_loop(0, steps, body, state)


def _verify(
    target: Decoder, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, drafting: Drafting
) -> DecodeState:
    """The target's pass, with its choices fed back so that nothing is skipped."""
    if drafting.tree_nodes:
        tree = _some_tree(state, drafting)
        return _fed_back(state, verify_tree(target, _rows(state), tree, sampling))
    drafts = state.tokens[:, 1 : drafting.draft_tokens + 1]
    law = None
    if drafting.draft_choice == "sample":  # some law: what a rule costs does not depend on it
        law = jax.reshard(jax.nn.one_hot(drafts, target.config.vocab_size), SPECS.act_btv)
    return _fed_back(state, verify_chain(target, _rows(state), drafts, law, sampling, drafting.rule))


def _draft_and_verify(
    target: Decoder, drafter: Drafter | None, state: DecodeState, sampling: Sampling | None, drafting: Drafting
) -> DecodeState:
    """A round without its bookkeeping: nothing is committed."""
    assert drafter is not None
    verified = draft_and_verify(target, drafter, state.drafter, _rows(state), sampling, drafting)
    drafter_state = state.drafter if verified.ahead is None else verified.ahead
    observed = drafter.observe(drafter_state, target, verified.seen)
    return dataclasses.replace(_fed_back(state, verified), drafter=observed)


def _rows(state: DecodeState) -> Rows:
    """The state's rows, of which none is done."""
    return Rows(state.tokens[:, 0], state.length, jnp.zeros_like(state.done), state.cache)


def _fed_back(state: DecodeState, verified: Verified) -> DecodeState:
    tokens = jax.vmap(lambda row, new: row.at[: new.shape[0]].set(new))(state.tokens, verified.tokens)
    return dataclasses.replace(state, tokens=tokens, cache=verified.cache)


def _some_tree(state: DecodeState, drafting: Drafting) -> DraftTree:
    """The chain, and every other node below the root: a pass costs the same for trees of one size and depth."""
    index = jnp.arange(drafting.tree_nodes + 1, dtype=jnp.int32)
    chain = index <= drafting.draft_tokens
    rows = jnp.zeros_like(state.length)[:, None]
    parent = jnp.where(chain, jnp.maximum(index - 1, 0), 0)
    depth = jnp.where(chain, index, 1)
    tokens = state.tokens[:, :1] + rows + jnp.zeros_like(index)
    return DraftTree(tokens, rows + parent, rows + depth, drafting.draft_tokens)
