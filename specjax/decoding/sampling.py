"""The target's choice of a token: greedy, or drawn by a randomness that belongs to the prompt and the position alone.

A draw is keyed by (the prompt's seed, the token's absolute position, the draw's purpose), never by the batch or the way
there. So a draft's token is right if it equals the token that the target draws itself (the rule `match`), and
speculative decoding gives at any temperature the very tokens that autoregressive decoding gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from specjax.models.sharding import BATCH, SPECS

EXCLUDED = -1e30
PIECE_BYTES = 2**24  # of float32 scores on a device, whose noise, masses and order take ten times as much
TARGET_DRAWS, DRAFT_DRAWS, ACCEPTANCE_DRAWS = range(3)  # purposes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How a batch of b rows draws; all traced, so other values do not recompile.

    temperature: float32 scalar above 0; None: the likeliest token, ties to the lowest id. seeds: [b] uint32. top_k:
    int32 scalar. top_p: float32 scalar. None: no limit. allowed: [b, v] bool, tokens that may come; None: all may.
    """

    temperature: jax.Array | None
    seeds: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    allowed: jax.Array | None = None


def choose(logits_btv: jax.Array, positions_bt: jax.Array, sampling: Sampling | None) -> jax.Array:
    """The tokens [b, t] int32 for `positions_bt` from their logits, whose vocabulary may be sharded.

    Without sampling the greatest logit, ties to the lowest id. Given a draft's logits of the same positions it draws
    by the same randomness, and so the likelier the same token the closer the two laws are.
    """
    if sampling is None or sampling.temperature is None:
        return greedy(logits_btv, sampling)
    return by_row(_choose, sampling, logits_btv, positions_bt, out_ndim=2)


def greedy(logits_btv: jax.Array, sampling: Sampling | None) -> jax.Array:
    """The likeliest of the allowed tokens, [b, t] int32."""
    if sampling is None or sampling.allowed is None:
        return jnp.argmax(logits_btv, axis=-1).astype(jnp.int32)

    def row(sampling: Sampling, logits_tv: jax.Array) -> jax.Array:
        return jnp.argmax(processed(logits_tv, sampling), axis=-1).astype(jnp.int32)

    return by_row(row, replace(sampling, temperature=None), logits_btv, out_ndim=2)


def masked(logits_btv: jax.Array, sampling: Sampling | None) -> jax.Array:
    """Logits, those of tokens that are not allowed far below all others, but finite. The vocabulary stays split."""
    if sampling is None or sampling.allowed is None:
        return logits_btv
    allowed = jax.reshard(sampling.allowed, P(BATCH, SPECS.act_btv[2]))
    return jnp.where(allowed[:, None], logits_btv, EXCLUDED)


def by_row(
    function: Callable[..., Any], sampling: Sampling, *arrays: jax.Array, out_ndim: int | tuple[int, ...]
) -> Any:
    """`function` of the row's sampling and its part of `arrays` [b, ...], for every row, in pieces of rows.

    The vocabulary is whole on every device then: all of `tensor` draw the same tokens. out_ndim: of the results.
    """

    def spec(ndim: int) -> P:
        return P(BATCH, *[None] * (ndim - 1))

    rows, shared = (sampling.seeds, sampling.allowed), replace(sampling, seeds=None, allowed=None)  # type: ignore[arg-type]

    def local(shared: Sampling, rows: Any, arrays: tuple[jax.Array, ...]) -> Any:
        def one(x: tuple[Any, tuple[jax.Array, ...]]) -> Any:
            (seed, allowed), parts = x
            return function(replace(shared, seeds=seed, allowed=allowed), *parts)

        return _in_pieces(one, (rows, arrays), max(x[0].size for x in arrays))

    in_specs = (jax.tree.map(lambda _: P(), shared), *jax.tree.map(lambda x: spec(x.ndim), (rows, arrays)))
    rows, arrays = jax.reshard((rows, arrays), in_specs[1:])
    return jax.shard_map(local, in_specs=in_specs, out_specs=jax.tree.map(spec, out_ndim))(shared, rows, arrays)


@jax.jit  # for calls outside of compiled code: a loop would compile at every one
def processed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., v] as transformers' processors leave them: masks, temperature, top-k, then top-p; excluded ones are
    -inf.

    `sampling` is one row's. Logits that are equal at the edge of top-k or top-p stay or go together.
    """
    scores = logits if sampling.allowed is None else jnp.where(sampling.allowed, logits, -jnp.inf)
    if sampling.temperature is None:
        return scores
    scores = scores * (1 / sampling.temperature)  # a division would become this, but in loops stay one
    if sampling.top_k is None and sampling.top_p is None:
        return scores
    order = _order(scores)
    if sampling.top_k is not None:
        least = _least_kept(order, jnp.ones_like(order), sampling.top_k)
        scores = jnp.where(order >= least, scores, -jnp.inf)
    if sampling.top_p is not None:
        masses = _masses(scores)
        total = masses.sum(-1, keepdims=True)
        spare = jnp.floor((1 - sampling.top_p) * total).astype(jnp.int32)
        least = _least_kept(order, masses, jnp.maximum(total - spare, 1))  # the likeliest always stays
        scores = jnp.where((order >= least) | (sampling.top_p >= 1), scores, -jnp.inf)
    return scores


def _least_kept(order: jax.Array, weights: jax.Array, needed: jax.Array) -> jax.Array:
    """[..., 1] int32: the greatest number from which on the entries of `order` [..., v] weigh at least `needed` in sum.

    The least int32 if all of them weigh less. It is found bit by bit, which needs no sort: those are slow on TPU.
    """

    def decide(bit: jax.Array, found: jax.Array) -> jax.Array:
        higher = found + jnp.left_shift(jnp.int32(1), 31 - bit)  # the sign's bit wraps from the least int32 to 0
        enough = jnp.where(order >= higher, weights, 0).sum(-1, keepdims=True) >= needed
        return jnp.where(enough, higher, found)

    return jax.lax.fori_loop(0, 32, decide, jnp.full_like(order[..., :1], jnp.iinfo(jnp.int32).min))


def _order(scores: jax.Array) -> jax.Array:
    """Int32 numbers that compare as the float32 scores do, both zeros being equal."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)


def _masses(scores: jax.Array) -> jax.Array:
    """The softmax of scores [..., v] in units of about 2^-30, int32; their sum is below 2^31 for v below 2^20.

    The same for a position alone and among others, to the last bit: sums of integers have no order, and every float
    operation here is rounded by itself. XLA's exp and its float sums depend on the shape, which at the edge of top-p
    would give speculation another token than autoregressive decoding.
    """
    finite = jnp.maximum(scores, jnp.finfo(jnp.float32).min)  # and not rounded together with what made the scores
    below = jnp.minimum(finite.max(-1, keepdims=True) - finite, 31.0)  # exp(-31) is no unit
    steps = jnp.floor(below * 2**12).astype(jnp.int32)
    weights = 1 - (below - steps * 2.0**-12)  # exp(-x) to 2^-25 for x below 2^-12
    for bit in range(17):
        weights = weights * jnp.where(steps >> bit & 1, math.exp(-(2.0 ** (bit - 12))), 1.0)
    coarse = jnp.floor(weights * 2**11)
    fine = jnp.floor((weights * 2**11 - coarse) * 2**11)
    coarse_sum, fine_sum = (x.astype(jnp.int32).sum(-1, keepdims=True) for x in (coarse, fine))
    total = coarse_sum * 2.0**-11 + fine_sum * 2.0**-22
    return jnp.round(weights * (2**30 / total)).astype(jnp.int32)


def gumbel(vocab_size: int, purpose: int, *of: jax.Array) -> jax.Array:
    """[v]: what makes the greatest of scores + noise a draw from their softmax."""
    return jax.random.gumbel(_key(purpose, of), (vocab_size,), jnp.float32, mode="high")  # default: coarse rare tokens


def uniform(purpose: int, *of: jax.Array) -> jax.Array:
    """A float32 scalar in [0, 1)."""
    return jax.random.uniform(_key(purpose, of))


def _key(purpose: int, of: tuple[jax.Array, ...]) -> jax.Array:
    key = jax.random.key(purpose)
    for value in of:
        key = jax.random.fold_in(key, value)
    return key


def _choose(sampling: Sampling, logits_tv: jax.Array, positions_t: jax.Array) -> jax.Array:
    def one(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits_v, position = x
        noise = gumbel(logits_v.size, TARGET_DRAWS, sampling.seeds, position)
        return jnp.argmax(processed(logits_v, sampling) + noise).astype(jnp.int32)

    return _in_pieces(one, (logits_tv, positions_t), logits_tv.shape[-1])


def _in_pieces(function: Callable[[Any], Any], xs: Any, scores: int) -> Any:
    """`function` of every entry of the leading axis of `xs`, as many at a time as have `PIECE_BYTES` of scores.

    scores: how many an entry has. Pieces are equal: for a rest, XLA would copy what precedes it.
    """
    count = jax.tree.leaves(xs)[0].shape[0]
    if 4 * scores * count <= PIECE_BYTES:
        return jax.vmap(function)(xs)
    sizes = [size for size in range(2, count) if count % size == 0 and 4 * scores * size <= PIECE_BYTES]
    return jax.lax.map(function, xs, batch_size=max(sizes, default=None))  # not 1: it copies `xs`
