"""Inputs and labels of the blocks of a row, and which of a block's tokens are shown to the draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from specjax.blockdiff.anchors import sample_generator


@dataclass(frozen=True)
class BlockNoise:
    """Which slots of a training block show their token; the others hold MASK.

    law: of the tokens after the anchor, which are shown, and not predicted. none: none. fraction: `value` of the B - 1
    slots, rounded down, the first ones of every block. geometric: each further one with probability `value`, the first
    ones again. random: each with probability `value`, wherever it stands. The last slot always stays masked.
    masked_anchor: share of the blocks that do not show even their anchor.
    """

    law: Literal["none", "fraction", "geometric", "random"]
    value: float
    block_size: int
    masked_anchor: float = 0.0

    def shown(self, uniform_b: np.ndarray) -> np.ndarray:
        """bool [..., B] from numbers uniform in [0, 1): slot 0's decides on the anchor, slot 1's on a prefix."""
        slots, first = np.arange(self.block_size), uniform_b[..., 1:2]
        if self.law == "random":
            shown = uniform_b < self.value
        elif self.law == "geometric":  # P(length >= n) = value^n
            shown = slots <= np.log1p(-first) / np.log(self.value)
        else:
            length = int(self.value * (self.block_size - 1)) if self.law == "fraction" else 0
            shown = np.broadcast_to(slots <= length, uniform_b.shape).copy()
        shown[..., -1] = False
        shown[..., 0] = uniform_b[..., 0] >= self.masked_anchor
        return shown


def draw_shown(
    noise: BlockNoise,
    anchors: np.ndarray,
    document_ids: np.ndarray,
    *,
    seed: int,
    epoch: int,
    sample_ids: Sequence[int],
) -> np.ndarray:
    """Shown slots bool [N, B] of the blocks at `anchors` [N] of one row; arguments as `anchors.draw_anchors`'s.

    What a block shows depends on (seed, epoch, its sample id, its place in the sample) alone.
    """
    shown = np.zeros((len(anchors), noise.block_size), bool)
    for document, sample_id in enumerate(sample_ids, 1):
        places = np.flatnonzero(document_ids == document)
        own = document_ids[anchors] == document
        uniform = sample_generator(seed, epoch, sample_id, stream=1).random((len(places), noise.block_size))
        shown[own] = noise.shown(uniform[anchors[own] - places[:1]])
    return shown


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
    and never supervised. Positions past the row repeat its last token; `masks.slot_mask` leaves them out. With
    `shown_bNB` these slots, and no others, hold their token (see `masks.reveal`).
    """
    slots = jnp.arange(block_size)
    last = tokens_bt.shape[1] - 1
    positions_bNB = jnp.minimum(anchors_bN[..., None] + slots, last)
    labels_bNB = jax.vmap(lambda tokens, positions: tokens[positions])(tokens_bt, positions_bNB)
    known = slots == 0 if shown_bNB is None else shown_bNB
    return jnp.where(known, labels_bNB, mask_token_id), labels_bNB
