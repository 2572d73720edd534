"""One pass of the target over a round's drafts, a chain or a tree, and what of them it keeps."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.decoding.drafter import Ahead, OnePassDrafter, Rows, Seen
from specjax.decoding.sampling import Sampling, choose
from specjax.decoding.tree import DraftTree, pick
from specjax.decoding.verify import verify
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache


class Verified(NamedTuple):
    """What a pass found, for b rows.

    tokens: [b, t] int32, of which the first matched + 1 follow the known token. matched: [b] int32, drafts taken.
    cache: the target's, with what was taken. finite: [b] bool, whether the hidden states were. seen: what a drafter
    observes, the known token and those but the last. ahead: the next round's blocks, where the pass ran them too.
    """

    tokens: jax.Array
    matched: jax.Array
    cache: KVCache
    finite: jax.Array
    seen: Seen
    ahead: Ahead | None = None


def verify_chain(
    target: Decoder,
    rows: Rows,
    drafts_bn: jax.Array | None,
    draft_logits_bnv: jax.Array | None,
    sampling: Sampling | None,
    rule: str,
    *,
    tap_ids: tuple[int, ...] = (),
    drafting_ahead: OnePassDrafter | None = None,
) -> Verified:
    """Runs the known token and n drafts after it; see `verify`. With `drafting_ahead`, the blocks that follow too.

    Keys and values of all are written, none where a row is done; those of refused drafts are overwritten by the next
    pass before a query can see them.
    """
    block = rows.token[:, None]
    if drafts_bn is not None:
        block = jnp.concatenate([block, drafts_bn], axis=1)
    positions = rows.length[:, None] + jnp.arange(block.shape[1], dtype=jnp.int32)
    slots = jnp.where(rows.done[:, None], rows.cache.capacity, positions)
    taps = blocks = None
    if drafting_ahead is None:
        output = target(block, positions, cache=rows.cache, slots_bt=slots, tap_ids=tap_ids)
        hidden, cache, taps = output.hidden, output.cache, output.taps
        assert cache is not None
    else:
        hidden, blocks, cache = drafting_ahead.run_one_pass(target, block, rows.length, slots, rows.cache)
    tokens, matched = verify(target.logits(hidden), block[:, 1:], draft_logits_bnv, rows.length, sampling, rule=rule)
    seen = Seen(_known_first(rows, tokens), taps, positions, slots)
    ahead = None if blocks is None else Ahead(pick(blocks, matched[:, None])[:, 0], rows.length + matched + 1)
    return Verified(tokens, matched, cache, _finite(hidden), seen, ahead)


def verify_tree(
    target: Decoder, rows: Rows, tree: DraftTree, sampling: Sampling | None, *, tap_ids: tuple[int, ...] = ()
) -> Verified:
    """Follows the target's choices through the trees, whose roots are the known tokens.

    Nodes see the cache and those above them, and their own keys and values stay
    outside it: siblings have one position. Those of the accepted path are written then, none where a row is done.
    """
    ancestors = tree.ancestors()
    cache = rows.cache
    positions = rows.length[:, None] + tree.depth
    output = target(tree.tokens, positions, cache=cache, tree_btt=ancestors, tap_ids=tap_ids)
    assert output.cache is not None
    choices = choose(target.logits(output.hidden), positions + 1, sampling)
    path, matched = tree.accepted(choices, ancestors)
    levels = jnp.arange(path.shape[1], dtype=jnp.int32)
    path_positions = rows.length[:, None] + levels
    taken = (levels <= matched[:, None]) & ~rows.done[:, None]
    slots = jnp.where(taken, path_positions, cache.capacity)
    for layer, (keys, values) in enumerate(zip(output.cache.keys, output.cache.values, strict=True)):
        cache = cache.write(layer, _along(keys, path), _along(values, path), slots)
    taps = None if output.taps is None else pick(output.taps, path)
    tokens = pick(choices, path)
    seen = Seen(_known_first(rows, tokens), taps, path_positions, slots)
    return Verified(tokens, matched, cache, _finite(output.hidden), seen)


def _known_first(rows: Rows, tokens_bt: jax.Array) -> jax.Array:
    """The known token, and those that follow it but the last."""
    return jnp.concatenate([rows.token[:, None], tokens_bt[:, :-1]], axis=1)


def _finite(hidden_btd: jax.Array) -> jax.Array:
    return jnp.isfinite(hidden_btd).all(axis=(1, 2))


def _along(nodes_bkth: jax.Array, path_bt: jax.Array) -> jax.Array:
    """Keys or values of the path's nodes; per row and head, which may both be split."""
    return jax.vmap(jax.vmap(lambda nodes, at: nodes[at], (0, None)))(nodes_bkth, path_bt)
