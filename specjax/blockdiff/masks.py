"""What a block learns and what it sees, as masks and half-open ranges of row positions.

A row with two documents and padding, blocks of B = 4 slots with anchors p = 3 and p = 8 (C context seen by every
query of the block, A the anchor slot, K a MASK slot, . not seen):

    position       0 1 2 3 4 5 6 7 8 9 10 11
    document       1 1 1 1 1 1 2 2 2 2 2  0
    loss_mask      0 0 1 1 1 1 0 1 1 1 1  0
    block p = 3    C C C A K K K . . . .  .     context [0, 3), strictly before the anchor
    block p = 8    . . . . . . C C A K K  K     context [6, 8), its own document only
    supervised           - x x .                p = 3: slots 1, 2; slot 3 is in the next document
                                   - x x  .     p = 8: slots 1, 2; slot 3 is padding

At inference the anchor is the bonus token, whose hidden state does not exist yet: that is why its own position is
not context. The block's slots are keys of their own, seen by all queries of the block and by no other block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def slot_mask(
    loss_mask_bt: jax.Array,
    document_ids_bt: jax.Array,
    anchors_bN: jax.Array,
    valid_bN: jax.Array,
    block_size: int,
    *,
    cumulative: bool = True,
) -> jax.Array:
    """Supervised slots, bool [b, N, B]: slot k >= 1 of a valid block, inside the row and the anchor's document.

    Cumulative: all of loss_mask[p+1 .. p+k] must be set, so supervision never crosses a turn. Otherwise only
    loss_mask[p+k] counts (the rule of older trainers).
    """
    slots = jnp.arange(block_size)
    length = loss_mask_bt.shape[1]
    positions_bNB = anchors_bN[..., None] + slots
    index = jnp.minimum(positions_bNB, length - 1)
    documents_bNB = _per_row(document_ids_bt, index)
    learnt_bNB = _per_row(loss_mask_bt, index).astype(bool) | (slots == 0)
    inside = (positions_bNB < length) & (documents_bNB == documents_bNB[..., :1])
    if cumulative:
        learnt_bNB = jnp.cumprod(learnt_bNB.astype(jnp.int32), axis=-1).astype(bool)
    return learnt_bNB & inside & valid_bN[..., None] & (slots > 0)


def reveal(mask_bNB: jax.Array, shown_bNB: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(shown, supervised), bool [b, N, B]: a `slot_mask` split into what a block shows and what it has to predict.

    Besides the anchor only what would have been supervised is shown: nothing behind the end of a turn or a document.
    """
    anchor = jnp.arange(mask_bNB.shape[-1]) == 0
    return (mask_bNB | anchor) & shown_bNB, mask_bNB & ~shown_bNB


def covered_tokens(mask_bNB: jax.Array, anchors_bN: jax.Array, length: int) -> jax.Array:
    """Tokens that some block supervises, bool [b, length]; `mask_bNB` is a `slot_mask`."""
    positions_bNB = anchors_bN[..., None] + jnp.arange(mask_bNB.shape[-1])
    positions_bNB = jnp.where(mask_bNB, positions_bNB, length)

    def row(positions: jax.Array) -> jax.Array:
        return jnp.zeros(length, bool).at[positions.ravel()].set(True, mode="drop")

    return jax.vmap(row)(positions_bNB)


def document_starts(document_ids_bt: jax.Array) -> jax.Array:
    """First position of each token's document, int32 [b, t]; documents are contiguous, padding is a run of its own."""
    position = jnp.arange(document_ids_bt.shape[1], dtype=jnp.int32)
    previous = jnp.pad(document_ids_bt[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(document_ids_bt != previous, position, 0), axis=1)


def context_ranges(document_ids_bt: jax.Array, anchors_bN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Context each block sees: (start, stop), int32 [b, N]; visible positions are start <= s < stop.

    start is the first position of the anchor's document; stop is the anchor itself, exclusive.
    """
    return _per_row(document_starts(document_ids_bt), anchors_bN), anchors_bN.astype(jnp.int32)


def _per_row(values_bt: jax.Array, index: jax.Array) -> jax.Array:
    """Row-wise gather: a plain advanced index is ambiguous when rows are sharded over an explicit mesh."""
    return jax.vmap(lambda values, i: values[i])(values_bt, index)
