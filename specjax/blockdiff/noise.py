"""Inputs and labels of the blocks of a row, and how many of a block's tokens are shown to the draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from specjax.blockdiff.anchors import sample_generator


@dataclass(frozen=True)
class RevealedPrefix:
    """The noise schedule: how many tokens of a block after its anchor are shown, and not predicted.

    fraction: `value` of the B - 1 draft slots, rounded down, in every block. geometric: each further token is shown
    with probability `value`. At least the last slot always stays masked.
    """

    law: Literal["fraction", "geometric"]
    value: float
    block_size: int

    def lengths(self, uniform: np.ndarray) -> np.ndarray:
        """int32 lengths from numbers uniform in [0, 1), of any shape."""
        most = self.block_size - 2
        if self.law == "fraction":
            return np.full(uniform.shape, min(int(self.value * (self.block_size - 1)), most), np.int32)
        # P(length >= n) = value^n
        return np.minimum(np.log1p(-uniform) / np.log(self.value), most).astype(np.int32)


def draw_revealed(
    prefix: RevealedPrefix,
    anchors: np.ndarray,
    document_ids: np.ndarray,
    *,
    seed: int,
    epoch: int,
    sample_ids: Sequence[int],
) -> np.ndarray:
    """Revealed tokens int32 [N] of the blocks at `anchors` [N] of one row; arguments as `anchors.draw_anchors`'s.

    A block's number depends on (seed, epoch, its sample id, its place in the sample) alone.
    """
    revealed = np.zeros(len(anchors), np.int32)
    for document, sample_id in enumerate(sample_ids, 1):
        places = np.flatnonzero(document_ids == document)
        own = document_ids[anchors] == document
        uniform = sample_generator(seed, epoch, sample_id, stream=1).random(len(places))
        revealed[own] = prefix.lengths(uniform[anchors[own] - places[:1]])
    return revealed


def block_inputs(
    tokens_bt: jax.Array,
    anchors_bN: jax.Array,
    block_size: int,
    mask_token_id: int,
    shown_bNB: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (noise ids [b, N, B], labels [b, N, B]) of the blocks that start at `anchors_bN`.

        slot        0         1           2           ...  B-1
        position    p         p+1         p+2         ...  p+B-1
        noise id    token(p)  MASK        MASK        ...  MASK
        label       token(p)  token(p+1)  token(p+2)  ...  token(p+B-1)

    Labels sit at the slot's own position: slot k predicts token(p + k), there is no shift. Slot 0 is the known anchor
    and never supervised. Positions past the row repeat its last token; `masks.slot_mask` leaves them out. Slots of
    `shown_bNB` hold their token too (see `masks.reveal`).
    """
    slots = jnp.arange(block_size)
    last = tokens_bt.shape[1] - 1
    positions_bNB = jnp.minimum(anchors_bN[..., None] + slots, last)
    labels_bNB = jax.vmap(lambda tokens, positions: tokens[positions])(tokens_bt, positions_bNB)
    known = slots == 0 if shown_bNB is None else shown_bNB | (slots == 0)
    return jnp.where(known, labels_bNB, mask_token_id), labels_bNB
