"""The decoder: prefill, then rounds of draft and verify in one compiled while_loop.

A row's tokens are committed up to its `length`; the token at `length` (the bonus token) is known but has no K/V yet:

    position   0 ... length-1 | length | length+1 ... length+n
    token      in the cache   | bonus  | drafts
                                target runs these n + 1 tokens in one pass and yields, after each, its own choice

The drafts that equal the target's choices are kept, and the choice after the last kept one is the next bonus token
(other rules: `verify`). Autoregressive decoding is the same loop with no drafts (n = 0), so baseline and speculation
share every line. Caches are never rolled back: entries of rejected tokens are overwritten by the next round before any
query can see them. The drafts may also be a tree, which continues the tokens in several ways: see `tree`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from specjax.decoding.drafter import Drafter, Rows, Seen, one_pass_drafter
from specjax.decoding.drafting import Drafting, draft_and_verify
from specjax.decoding.flat import Flat, whole
from specjax.decoding.sampling import Sampling, choose
from specjax.decoding.target_pass import Verified
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache
from specjax.models.sharding import SPECS

TAPS_BUFFER = 16  # rounds without drafts whose taps a drafter takes in together


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
    round: int32 scalar, rounds run. finite: [b] bool, whether all of the target's hidden states were.
    """

    tokens: jax.Array
    length: jax.Array
    done: jax.Array
    cache: KVCache
    drafter: Any
    rounds: jax.Array
    round: jax.Array
    finite: jax.Array


@partial(jax.jit, static_argnames=("capacity", "max_rounds", "chunk", "samples"))
def prefill(
    target: Decoder | Flat[Decoder],
    drafter: Drafter | Flat[Drafter | None] | None,
    prompts_bt: jax.Array,
    prompt_length_b: jax.Array,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    capacity: int,
    max_rounds: int,
    chunk: int,
    samples: int = 1,
) -> DecodeState:
    """Runs right-padded prompts [b, bucket] and commits each row's first token, the target's choice (see `choose`).

    A bucket beyond `chunk` tokens, which divides it, runs in chunks, up to the end of the longest prompt. With
    `samples`, every prompt is run once and becomes that many neighbouring rows; limits and sampling are those of the
    b * samples rows. Rows with `prompt_length_b` 0 are padding and done from the start. The padding's K/V are
    overwritten before a query can see them.
    """
    target, drafter = whole(target), whole(drafter)
    b, bucket = prompts_bt.shape
    last = jnp.maximum(prompt_length_b - 1, 0)
    carry = (
        target.empty_cache(b, capacity),
        None if drafter is None else drafter.init(target, b, capacity),
        jnp.zeros((b, 1, target.config.hidden_size), target.dtype, out_sharding=SPECS.act_btd),
    )
    size = min(bucket, chunk)

    def run(index: jax.Array | int, carry: tuple[KVCache, Any, jax.Array]) -> tuple[KVCache, Any, jax.Array]:
        cache, drafter_state, hidden = carry
        first = jnp.asarray(index * size, jnp.int32)
        tokens = jax.lax.dynamic_slice_in_dim(prompts_bt, first, size, axis=1)
        positions = _positions(jnp.zeros_like(last) + first, size)
        output = target(tokens, positions, cache=cache, tap_ids=drafter.tap_ids if drafter else ())
        if drafter is not None:
            drafter_state = drafter.observe(drafter_state, target, Seen(tokens, output.taps, positions, positions))
        assert output.cache is not None
        at = last - first
        picked = jax.vmap(lambda rows, i: rows[i])(output.hidden, jnp.clip(at, 0, size - 1))
        here = (at >= 0) & (at < size)
        return output.cache, drafter_state, jnp.where(here[:, None, None], picked[:, None], hidden)

    chunks = -(-jnp.max(prompt_length_b) // size)
    cache, drafter_state, hidden = run(0, carry) if size == bucket else jax.lax.fori_loop(0, chunks, run, carry)
    state = DecodeState(
        tokens=jnp.pad(prompts_bt, ((0, 0), (0, capacity - bucket))),
        length=last,
        done=prompt_length_b == 0,
        cache=cache,
        drafter=drafter_state,
        rounds=jnp.zeros((b, max_rounds), jnp.int32, out_sharding=SPECS.act_bt),
        round=jnp.zeros((), jnp.int32),
        finite=jnp.isfinite(hidden).all(axis=(1, 2)),
    )
    state, logits = jax.tree.map(partial(_each_again, samples), (state, target.logits(hidden)))
    first = choose(logits, state.length[:, None] + 1, sampling)
    return _commit(state, limits, first, jnp.zeros_like(state.length))


def decode_round(
    target: Decoder,
    drafter: Drafter | None,
    state: DecodeState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    drafting: Drafting,
) -> DecodeState:
    """One round: draft, verify the drafts in one target pass, commit what was kept plus one.

    With `one_pass` the drafter's state holds the drafts of rows that are not done, and then those of the next round.
    """
    state, verified = _round(target, drafter, state, limits, sampling, drafting)
    if drafter is None:
        return state
    return replace(state, drafter=drafter.observe(state.drafter, target, verified.seen))


@partial(jax.jit, static_argnames=("drafting",), donate_argnames=("state",))
def decode(
    target: Decoder | Flat[Decoder],
    drafter: Drafter | Flat[Drafter | None] | None,
    state: DecodeState,
    limits: Limits,
    sampling: Sampling | None = None,
    until: jax.Array | None = None,
    *,
    drafting: Drafting,
) -> DecodeState:
    """Rounds until every row is done or `until` (int32 scalar) rounds were run since the prefill. `state` is donated.

    With a drafter and no drafts the drafter still takes in every token, many at a time. With `one_pass`, a pass of the
    drafter alone comes first where its state holds no drafts for where rows stand: after the prefill and other rounds.
    """
    target, drafter = whole(target), whole(drafter)

    def unfinished(state: DecodeState, until: jax.Array | None = until) -> jax.Array:
        going = ~state.done.all()
        return going if until is None else going & (state.round < until)

    def round_of_drafts(state: DecodeState) -> DecodeState:
        return decode_round(target, drafter, state, limits, sampling, drafting=drafting)

    def plain_rounds(state: DecodeState) -> DecodeState:
        assert drafter is not None
        first, start = state.round, state.length
        end = first + TAPS_BUFFER if until is None else jnp.minimum(first + TAPS_BUFFER, until)

        def plain_round(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
            state, taps = carry
            index = state.round - first
            state, verified = _round(target, drafter, state, limits, sampling, drafting)
            if verified.seen.taps is None:
                return state, taps
            return state, jax.lax.dynamic_update_slice_in_dim(taps, verified.seen.taps, index, axis=1)

        width = len(drafter.tap_ids) * target.config.hidden_size
        taps = jnp.zeros((len(start), TAPS_BUFFER, width), target.dtype, out_sharding=SPECS.act_btd)
        state, taps = jax.lax.while_loop(lambda carry: unfinished(carry[0], end), plain_round, (state, taps))
        positions = _positions(start, TAPS_BUFFER)
        slots = jnp.where(positions < state.length[:, None], positions, state.tokens.shape[1])
        tokens = jax.vmap(lambda row, at: row.at[at].get(mode="clip"))(state.tokens, positions)
        seen = Seen(tokens, taps if drafter.tap_ids else None, positions, slots)
        return replace(state, drafter=drafter.observe(state.drafter, target, seen))

    if drafting.one_pass:
        state = _with_drafts(target, drafter, state)
    deferred = drafter is not None and not drafting.draft_tokens
    return jax.lax.while_loop(unfinished, plain_rounds if deferred else round_of_drafts, state)


def _with_drafts(target: Decoder, drafter: Drafter | None, state: DecodeState) -> DecodeState:
    """The state with blocks that were drafted ahead for where its rows stand."""
    ahead = one_pass_drafter(drafter)
    assert ahead is not None
    held = (state.drafter.length == state.length) | state.done
    draft = partial(ahead.draft_ahead, target, state.cache, state.length)
    return replace(state, drafter=jax.lax.cond(held.all(), lambda: state.drafter, draft))


def _round(
    target: Decoder,
    drafter: Drafter | None,
    state: DecodeState,
    limits: Limits,
    sampling: Sampling | None,
    drafting: Drafting,
) -> tuple[DecodeState, Verified]:
    """A round that the drafter has not taken in yet."""
    rows = Rows(_token_at(state.tokens, state.length), state.length, state.done, state.cache)
    verified = draft_and_verify(target, drafter, state.drafter, rows, sampling, drafting)
    drafter_state = state.drafter if verified.ahead is None else verified.ahead
    advanced = jnp.where(state.done, 0, verified.matched + 1)
    rounds = jax.vmap(lambda row, value: row.at[state.round].set(value, mode="drop"))(state.rounds, advanced)
    finite = state.finite & (state.done | verified.finite)
    round_ = state.round + 1
    state = replace(state, cache=verified.cache, drafter=drafter_state, rounds=rounds, round=round_, finite=finite)
    return _commit(state, limits, verified.tokens, verified.matched), verified


def _commit(state: DecodeState, limits: Limits, new_bt: jax.Array, matched: jax.Array) -> DecodeState:
    """Appends new[:, : matched + 1] after position `length`, cut at a stop token or the row's limit."""
    index = jnp.arange(new_bt.shape[1], dtype=jnp.int32)
    stopping = (new_bt[:, :, None] == limits.stops[:, None, :]).any(-1)
    room = limits.total - (state.length + 1)
    stop = jnp.where(stopping, index, new_bt.shape[1]).min(axis=1)
    count = jnp.minimum(jnp.minimum(matched + 1, stop + 1), room)
    count = jnp.where(state.done, 0, count)
    positions = state.length[:, None] + 1 + index
    kept = jnp.where(index < count[:, None], positions, state.tokens.shape[1])
    tokens = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(state.tokens, kept, new_bt)
    done = state.done | (stop < count) | (count >= room)
    return replace(state, tokens=tokens, length=state.length + count, done=done)


def _positions(first_b: jax.Array, count: int) -> jax.Array:
    return first_b[:, None] + jnp.arange(count, dtype=jnp.int32)


def _token_at(tokens_bt: jax.Array, index_b: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, i: row[i])(tokens_bt, index_b)


def _each_again(times: int, x: jax.Array) -> jax.Array:
    """Every row of x [b, ...] `times` times, as neighbours; a scalar stays."""
    if times == 1 or not x.ndim:
        return x
    sharding = jax.typeof(x).sharding.spec
    copies = jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:]))
    return jnp.reshape(copies, (x.shape[0] * times, *x.shape[1:]), out_sharding=sharding)
