"""Inputs and labels of the blocks of a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def block_inputs(
    tokens_bt: jax.Array, anchors_bN: jax.Array, block_size: int, mask_token_id: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (noise ids [b, N, B], labels [b, N, B]) of the blocks that start at `anchors_bN`.

        slot        0         1           2           ...  B-1
        position    p         p+1         p+2         ...  p+B-1
        noise id    token(p)  MASK        MASK        ...  MASK
        label       token(p)  token(p+1)  token(p+2)  ...  token(p+B-1)

    Labels sit at the slot's own position: slot k predicts token(p + k), there is no shift. Slot 0 is the known anchor
    and never supervised. Positions past the row repeat its last token; `masks.slot_mask` leaves them out.
    """
    slots = jnp.arange(block_size)
    last = tokens_bt.shape[1] - 1
    positions_bNB = jnp.minimum(anchors_bN[..., None] + slots, last)
    labels_bNB = jax.vmap(lambda tokens, positions: tokens[positions])(tokens_bt, positions_bNB)
    return jnp.where(slots == 0, labels_bNB, mask_token_id), labels_bNB
