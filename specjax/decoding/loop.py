"""The decoder: prefill, then rounds of draft and verify in one compiled while_loop.

A row's tokens are committed up to its `length`; the token at `length` (the bonus token) is known but has no K/V yet:

    position   0 ... length-1 | length | length+1 ... length+n
    token      in the cache   | bonus  | drafts
                                target runs these n + 1 tokens in one pass and yields, after each, its own choice

The drafts that equal the target's choices are kept, and the choice after the last kept one is the next bonus token.
Autoregressive decoding is the same loop with no drafts (n = 0), so baseline and speculation share every line. Caches
are never rolled back: entries of rejected tokens are overwritten by the next round before any query can see them.
The drafts may also be a tree, which continues the tokens in several ways: see `tree` and `tree_round`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from specjax.decoding.drafter import Drafter
from specjax.decoding.sampling import Sampling, choose
from specjax.decoding.tree import draft_tree
from specjax.decoding.tree_round import Verified, verify_tree
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache
from specjax.models.sharding import SPECS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Limits:
    """When rows end; all traced, so other limits do not recompile.

    total: [b] int32, prompt length + max_new_tokens. stops: [b, k] int32, stop token ids, padded with -1.
    """

    total: jax.Array
    stops: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What the loop carries, for b rows.

    tokens: [b, capacity] int32, the prompt and what was generated.
    length: [b] int32, tokens whose K/V are in the cache; the bonus token stands at this position.
    done: [b] bool. cache: the target's K/V. drafter: the drafter's state (None without one).
    rounds: [b, max_rounds] int32, matched drafts + 1 of each of the row's rounds, before any cut; 0 where it had none.
    round: int32 scalar, rounds run.
    """

    tokens: jax.Array
    length: jax.Array
    done: jax.Array
    cache: KVCache
    drafter: Any
    rounds: jax.Array
    round: jax.Array


@partial(jax.jit, static_argnames=("capacity", "max_rounds"))
def prefill(
    target: Decoder,
    drafter: Drafter | None,
    prompts_bt: jax.Array,
    prompt_length_b: jax.Array,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    capacity: int,
    max_rounds: int,
) -> DecodeState:
    """Runs right-padded prompts [b, bucket] and commits each row's first token, the target's choice (see `choose`).

    Rows with `prompt_length_b` 0 are padding and done from the start. The padding's K/V are overwritten before a
    query can see them.
    """
    b, bucket = prompts_bt.shape
    config = target.config
    shape = config.num_hidden_layers, b, config.num_key_value_heads, capacity, config.head_dim
    cache = KVCache.create(*shape, target.dtype)
    positions = _positions(jnp.zeros_like(prompt_length_b), bucket)
    output = target(prompts_bt, positions, cache=cache, tap_ids=drafter.tap_ids if drafter else ())
    assert output.cache is not None
    last = jnp.maximum(prompt_length_b - 1, 0)
    hidden = jax.vmap(lambda rows, i: rows[i])(output.hidden, last)[:, None]
    first = choose(target.logits(hidden), last[:, None] + 1, sampling)
    drafter_state = None
    if drafter is not None:
        drafter_state = drafter.observe(drafter.init(b, capacity), output.taps, positions, positions)
    state = DecodeState(
        tokens=jnp.pad(prompts_bt, ((0, 0), (0, capacity - bucket))),
        length=last,
        done=prompt_length_b == 0,
        cache=output.cache,
        drafter=drafter_state,
        rounds=jnp.zeros((b, max_rounds), jnp.int32, out_sharding=SPECS.act_bt),
        round=jnp.zeros((), jnp.int32),
    )
    return _commit(state, limits, first, jnp.zeros_like(last))


def decode_round(
    target: Decoder,
    drafter: Drafter | None,
    state: DecodeState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    draft_tokens: int,
    tree_nodes: int = 0,
) -> DecodeState:
    """One round: draft, verify `draft_tokens` of the proposals in one target pass, commit what matched plus one.

    draft_tokens 0 (or no drafter) decodes one token autoregressively. With tree_nodes, a tree of so many drafts is
    verified, `draft_tokens` deep.
    """
    known = _token_at(state.tokens, state.length)
    block = known[:, None]
    if drafter is not None and draft_tokens:
        logits = drafter.draft_logits(state.drafter, target, known, state.length)[:, :draft_tokens]
        block = jnp.concatenate([block, jnp.argmax(logits, axis=-1).astype(jnp.int32)], axis=1)
    if drafter is not None and tree_nodes:
        tree = draft_tree(known, logits, tree_nodes)
        caches = state.cache, state.drafter
        verified = verify_tree(target, drafter, tree, state.length, state.done, *caches, sampling)
    else:
        verified = _verify_chain(target, drafter, block, state, sampling)
    advanced = jnp.where(state.done, 0, verified.matched + 1)
    rounds = jax.vmap(lambda row, value: row.at[state.round].set(value, mode="drop"))(state.rounds, advanced)
    caches = verified.cache, verified.drafter
    state = DecodeState(state.tokens, state.length, state.done, *caches, rounds, state.round + 1)
    return _commit(state, limits, verified.choices, verified.matched)


def _verify_chain(
    target: Decoder, drafter: Drafter | None, block: jax.Array, state: DecodeState, sampling: Sampling | None
) -> Verified:
    """Runs the known token and drafts [b, n + 1] and takes the drafts that equal the target's choices."""
    positions = _positions(state.length, block.shape[1])
    slots = jnp.where(state.done[:, None], state.tokens.shape[1], positions)
    tap_ids = drafter.tap_ids if drafter is not None else ()
    output = target(block, positions, cache=state.cache, slots_bt=slots, tap_ids=tap_ids)
    assert output.cache is not None
    choices = choose(target.logits(output.hidden), positions + 1, sampling)
    matches = jnp.cumprod((block[:, 1:] == choices[:, :-1]).astype(jnp.int32), axis=1)
    drafter_state = state.drafter
    if drafter is not None:
        drafter_state = drafter.observe(state.drafter, output.taps, positions, slots)
    return Verified(choices, matches.sum(axis=1).astype(jnp.int32), output.cache, drafter_state)


@partial(jax.jit, static_argnames=("draft_tokens", "tree_nodes"), donate_argnames=("state",))
def decode(
    target: Decoder,
    drafter: Drafter | None,
    state: DecodeState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    draft_tokens: int,
    tree_nodes: int = 0,
) -> DecodeState:
    """Rounds until every row is done; see `decode_round`. `state` is donated."""

    def unfinished(state: DecodeState) -> jax.Array:
        return ~state.done.all()

    def body(state: DecodeState) -> DecodeState:
        return decode_round(target, drafter, state, limits, sampling, draft_tokens=draft_tokens, tree_nodes=tree_nodes)

    return jax.lax.while_loop(unfinished, body, state)


def _commit(state: DecodeState, limits: Limits, choices: jax.Array, matched: jax.Array) -> DecodeState:
    """Appends choices[:, : matched + 1] [b, n + 1] after position `length`, cut at a stop token or the row's limit."""
    index = jnp.arange(choices.shape[1], dtype=jnp.int32)
    stopping = (choices[:, :, None] == limits.stops[:, None, :]).any(-1)
    room = limits.total - (state.length + 1)
    stop = jnp.where(stopping, index, choices.shape[1]).min(axis=1)
    count = jnp.minimum(jnp.minimum(matched + 1, stop + 1), room)
    count = jnp.where(state.done, 0, count)
    positions = state.length[:, None] + 1 + index
    kept = jnp.where(index < count[:, None], positions, state.tokens.shape[1])
    tokens = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(state.tokens, kept, choices)
    done = state.done | (stop < count) | (count >= room)
    return DecodeState(tokens, state.length + count, done, state.cache, state.drafter, state.rounds, state.round)


def _positions(first_b: jax.Array, count: int) -> jax.Array:
    return first_b[:, None] + jnp.arange(count, dtype=jnp.int32)


def _token_at(tokens_bt: jax.Array, index_b: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, i: row[i])(tokens_bt, index_b)
