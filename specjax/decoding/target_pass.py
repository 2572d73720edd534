"""One pass of the target over a round's drafts, a chain or a tree, and what of them it keeps."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.decoding.drafter import Ahead, OnePassDrafter, Seen
from specjax.decoding.sampling import Sampling, choose
from specjax.decoding.tree import DraftTree, pick
from specjax.decoding.verify import verify
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache


class Verified(NamedTuple):
    """What a pass found, for b rows.

    tokens: [b, t] int32, of which the first matched + 1 follow the known token. matched: [b] int32, drafts taken.
    cache: the target's, with what was taken. finite: [b] bool, whether the hidden states were. seen: what a drafter
    observes, the known token and those but the last.
    """

    tokens: jax.Array
    matched: jax.Array
    cache: KVCache
    finite: jax.Array
    seen: Seen


def verify_chain(
    target: Decoder,
    tap_ids: tuple[int, ...],
    block_bt: jax.Array,
    draft_logits_bnv: jax.Array | None,
    length_b: jax.Array,
    done_b: jax.Array,
    cache: KVCache,
    sampling: Sampling | None,
    rule: str,
) -> Verified:
    """Runs the known token, at position `length_b`, and the drafts after it: [b, n + 1]. See `verify`.

    Keys and values of all are written, none where a row is done; those of refused drafts are overwritten by the next
    pass before a query can see them.
    """
    positions, slots = _of_chain(block_bt, length_b, done_b, cache)
    output = target(block_bt, positions, cache=cache, slots_bt=slots, tap_ids=tap_ids)
    assert output.cache is not None
    logits = target.logits(output.hidden)
    tokens, matched = verify(logits, block_bt[:, 1:], draft_logits_bnv, length_b, sampling, rule=rule)
    seen = Seen(_known_first(block_bt, tokens), output.taps, positions, slots)
    return Verified(tokens, matched, output.cache, _finite(output.hidden), seen)


def verify_and_draft(
    target: Decoder,
    drafter: OnePassDrafter,
    block_bt: jax.Array,
    draft_logits_bnv: jax.Array | None,
    length_b: jax.Array,
    done_b: jax.Array,
    cache: KVCache,
    sampling: Sampling | None,
    rule: str,
) -> tuple[Verified, Ahead]:
    """`verify_chain`, and from the same pass the blocks that follow what it keeps."""
    positions, slots = _of_chain(block_bt, length_b, done_b, cache)
    output = drafter.run_one_pass(target, block_bt, length_b, slots, cache)
    logits = target.logits(output.hidden)
    tokens, matched = verify(logits, block_bt[:, 1:], draft_logits_bnv, length_b, sampling, rule=rule)
    seen = Seen(_known_first(block_bt, tokens), None, positions, slots)
    verified = Verified(tokens, matched, output.cache, _finite(output.hidden), seen)
    return verified, Ahead(pick(output.blocks, matched[:, None])[:, 0], length_b + matched + 1)


def verify_tree(
    target: Decoder,
    tap_ids: tuple[int, ...],
    tree: DraftTree,
    length_b: jax.Array,
    done_b: jax.Array,
    cache: KVCache,
    sampling: Sampling | None,
) -> Verified:
    """Follows the target's choices through the trees, whose roots stand at positions `length_b`.

    The cache holds the tokens before the root. Nodes see it and those above them, and their own keys and values stay
    outside it: siblings have one position. Those of the accepted path are written then, none where a row is done.
    """
    ancestors = tree.ancestors()
    positions = length_b[:, None] + tree.depth
    output = target(tree.tokens, positions, cache=cache, tree_btt=ancestors, tap_ids=tap_ids)
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
    tokens = pick(choices, path)
    seen = Seen(_known_first(tree.tokens, tokens), taps, path_positions, slots)
    return Verified(tokens, matched, cache, _finite(output.hidden), seen)


def _of_chain(
    block_bt: jax.Array, length_b: jax.Array, done_b: jax.Array, cache: KVCache
) -> tuple[jax.Array, jax.Array]:
    """Positions and slots [b, t]."""
    positions = length_b[:, None] + jnp.arange(block_bt.shape[1], dtype=jnp.int32)
    return positions, jnp.where(done_b[:, None], cache.capacity, positions)


def _known_first(block_bt: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """The known token, which is the block's first, and the tokens that follow it, but the last."""
    return jnp.concatenate([block_bt[:, :1], tokens_bt[:, :-1]], axis=1)


def _finite(hidden_btd: jax.Array) -> jax.Array:
    return jnp.isfinite(hidden_btd).all(axis=(1, 2))


def _along(nodes_bkth: jax.Array, path_bt: jax.Array) -> jax.Array:
    """Keys or values of the path's nodes; per row and head, which may both be split."""
    return jax.vmap(jax.vmap(lambda nodes, at: nodes[at], (0, None)))(nodes_bkth, path_bt)
