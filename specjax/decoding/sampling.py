"""The target's choice of a token: greedy, or drawn by a randomness that belongs to the prompt and the position alone.

A draw is keyed by (the prompt's seed, the token's absolute position), never by the batch, the round or the way there.
So a draft's token is right if it equals the token that the target draws itself (the rule `match`), and speculative
decoding gives at any temperature the very tokens that autoregressive decoding gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from specjax.models.sharding import SPECS

TARGET_DRAWS = 0  # draws of another purpose must have another number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How a batch of b rows draws; all traced, so other values do not recompile.

    temperature: float32 scalar above 0. seeds: [b] uint32. top_k: int32 scalar. top_p: float32 scalar. None: no limit.
    """

    temperature: jax.Array
    seeds: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None


def choose(logits_btv: jax.Array, positions_bt: jax.Array, sampling: Sampling | None) -> jax.Array:
    """The tokens [b, t] int32 for `positions_bt` from their logits, whose vocabulary may be sharded.

    Without sampling the greatest logit, ties to the lowest id.
    """
    if sampling is None:
        return jnp.argmax(logits_btv, axis=-1).astype(jnp.int32)
    whole = P(SPECS.act_bt[0], None, None)
    specs = Sampling(P(), SPECS.act_b, *(None if x is None else P() for x in (sampling.top_k, sampling.top_p)))  # type: ignore[arg-type]

    def local(logits: jax.Array, positions: jax.Array, sampling: Sampling) -> jax.Array:
        noise = jax.vmap(jax.vmap(gumbel, (None, 0, None)), (0, 0, None))(sampling.seeds, positions, logits.shape[-1])
        return jnp.argmax(processed(logits, sampling) + noise, axis=-1).astype(jnp.int32)

    # The vocabulary is whole on every device: all of `tensor` draw the same tokens.
    logits, positions = jax.reshard((logits_btv, positions_bt), (whole, SPECS.act_bt))
    in_specs = (whole, SPECS.act_bt, specs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=SPECS.act_bt)(logits, positions, sampling)


def processed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., v] as transformers' warpers leave them: temperature, then top-k, then top-p; excluded ones are -inf.

    Logits that are equal at the edge of top-k or top-p stay or go together.
    """
    scores = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return scores
    falling = -jnp.sort(-scores, axis=-1)
    rank = jnp.arange(scores.shape[-1])
    kept = jnp.ones_like(falling, bool)
    if sampling.top_k is not None:
        kept &= falling >= jnp.where(rank == sampling.top_k - 1, falling, -jnp.inf).max(-1, keepdims=True)
    if sampling.top_p is not None:
        share = jax.nn.softmax(jnp.where(kept, falling, -jnp.inf), axis=-1)
        kept &= jnp.cumsum(share, axis=-1) - share < sampling.top_p  # what comes before it
    least = jnp.where(kept, falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(scores >= least, scores, -jnp.inf)


def gumbel(seed: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
    """The noise [v] of a draw: the greatest of scores and noise is a token drawn from the softmax of the scores."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(TARGET_DRAWS), seed), position)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32, mode="high")  # the default is too coarse for rare tokens
