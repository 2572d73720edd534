"""Verifying a tree of drafts: one pass of the target over all nodes, of which the accepted path is kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.decoding.drafter import Drafter
from specjax.decoding.sampling import Sampling, choose
from specjax.decoding.tree import DraftTree, pick
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache


class Verified(NamedTuple):
    """What a target pass found, for b rows.

    choices: [b, t] int32, the target's choices after the known token and after each draft that it took; the entries
    past `matched` are not used. matched: [b] int32, drafts taken. cache: the target's, drafter: the drafter's state,
    both with what was taken.
    """

    choices: jax.Array
    matched: jax.Array
    cache: KVCache
    drafter: Any


def verify_tree(
    target: Decoder,
    drafter: Drafter,
    tree: DraftTree,
    length_b: jax.Array,
    done_b: jax.Array,
    cache: KVCache,
    drafter_state: Any,
    sampling: Sampling | None,
) -> Verified:
    """Follows the target's choices through the trees, whose roots stand at positions `length_b`.

    The cache holds the tokens before the root. Nodes see it and those above them, and their own keys and values stay
    outside it: siblings have one position. Those of the accepted path are written then, none where a row is done.
    """
    positions = length_b[:, None] + tree.depth
    ancestors = tree.ancestors()
    output = target(tree.tokens, positions, cache=cache, tree_btt=ancestors, tap_ids=drafter.tap_ids)
    assert output.cache is not None
    choices = choose(target.logits(output.hidden), positions + 1, sampling)
    path, matched = tree.accepted(choices, ancestors)
    levels = jnp.arange(path.shape[1], dtype=jnp.int32)
    path_positions = length_b[:, None] + levels
    taken = (levels <= matched[:, None]) & ~done_b[:, None]
    slots = jnp.where(taken, path_positions, cache.capacity)
    for layer, (keys, values) in enumerate(zip(output.cache.keys, output.cache.values, strict=True)):
        cache = cache.write(layer, _along(keys, path), _along(values, path), slots)
    taps = None if output.taps is None else pick(output.taps, path)
    drafter_state = drafter.observe(drafter_state, taps, path_positions, slots)
    return Verified(pick(choices, path), matched, cache, drafter_state)


def _along(nodes_bkth: jax.Array, path_bt: jax.Array) -> jax.Array:
    """Keys or values of the path's nodes; per row and head, which may both be split."""
    return jax.vmap(jax.vmap(lambda nodes, at: nodes[at], (0, None)))(nodes_bkth, path_bt)
