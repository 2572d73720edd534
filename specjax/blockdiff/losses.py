"""Cross-entropy of the blocks' slots, in chunks of blocks, with the position weights of block-diffusion drafters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

WEIGHTINGS = ("exp", "uniform", "dpace")
DEFAULT_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}  # by block size: the DFlash paper's settings (arXiv 2602.06036)
DEFAULT_ALPHA = 0.5

SlotWeights = Callable[[jax.Array, jax.Array], jax.Array]
"""(label probability, mask) [b, N, B - 1], slots 1.. -> weights, 0 where unsupervised."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockLoss:
    """Unnormalised sums over blocks, all float32 and additive over rows, micro-batches and processes.

    loss_sum: sum of weight * cross-entropy (nats); divide by the whole global batch's `weight_sum`.
    weight_sum: sum of the weights of the supervised slots.
    correct_k, supervised_k: [B] supervised slots k, and those whose argmax (lowest id of a tie) is the label.
    prefix_sum: sum, over blocks with a supervised slot, of the leading supervised slots predicted right, plus 1.
    blocks: number of blocks with a supervised slot.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    correct_k: jax.Array
    supervised_k: jax.Array
    prefix_sum: jax.Array
    blocks: jax.Array


def position_weights(weighting: str, block_size: int, gamma: float | None = None) -> jax.Array:
    """Weights [B] of a fixed schedule; slot 0 has none.

    exp: exp(-(k - 1) / gamma) for slot k, gamma by default 7, 5, 4 for B = 16, 10, 8. uniform: 1.

    Raises:
        ValueError: not a fixed schedule, no gamma known for this block size, gamma not above 0, or gamma given to a
            weighting that ignores it.
    """
    slots = jnp.arange(block_size, dtype=jnp.float32)
    if weighting == "uniform":
        _refuse("gamma", gamma, weighting)
        weights = jnp.ones_like(slots)
    elif weighting == "exp":
        gamma = DEFAULT_GAMMA.get(block_size) if gamma is None else gamma
        if gamma is None:
            known = ", ".join(map(str, DEFAULT_GAMMA))
            raise ValueError(f"gamma has no default for block size {block_size} (only for {known}): give one")
        if gamma <= 0:
            raise ValueError(f"gamma is {gamma}: give a number above 0")
        weights = jnp.exp(-(slots - 1) / gamma)
    else:
        raise ValueError(f"weighting {weighting!r} is no fixed schedule: use 'exp' or 'uniform'")
    return jnp.where(slots == 0, 0.0, weights)


def dpace_weights(label_probability: jax.Array, mask: jax.Array, alpha: float = DEFAULT_ALPHA) -> jax.Array:
    """D-PACE weights of slots 1.. along the last axis, detached, 0 where unsupervised (arXiv 2605.18810).

    w_k = sum_{j >= k} prod_{i <= j} s_i with s_i = (1 - alpha) * q_i + alpha, q_i the draft's probability of the
    label. Unsupervised slots have s = 1 and leave the sum.
    """
    smoothed = jnp.where(mask, (1.0 - alpha) * jax.lax.stop_gradient(label_probability) + alpha, 1.0)
    reached = jnp.where(mask, jnp.cumprod(smoothed, axis=-1), 0.0)
    return jnp.where(mask, jax.lax.cumsum(reached, axis=reached.ndim - 1, reverse=True), 0.0)


def block_cross_entropy(
    hidden_bNBd: jax.Array,
    head_dv: jax.Array,
    labels_bNB: jax.Array,
    mask_bNB: jax.Array,
    *,
    weighting: str,
    gamma: float | None = None,
    alpha: float | None = None,
    chunk_blocks: int,
) -> BlockLoss:
    """Weighted cross-entropy of the supervised slots with their labels, and the counts that metrics need.

    Logits (float32) exist for `chunk_blocks` blocks of every row at a time and are computed again in the backward
    pass, which holds two to three arrays of 4 * b * chunk_blocks * (B - 1) * v bytes over all devices. Slot 0 is never
    supervised, whatever the mask says. Differentiable in hidden and head.

    Rows keep the sharding of `hidden_bNBd` and the vocabulary that of `head_dv`, whose d axis is gathered once. Call
    it under `jax.set_mesh`.

    Args:
        hidden_bNBd: final hidden states of the draft, rows possibly sharded.
        head_dv: the target's output projection.
        labels_bNB, mask_bNB: from `noise.block_inputs` and `masks.slot_mask`.
        gamma: of weighting "exp" (see `position_weights`). alpha: of weighting "dpace", by default 0.5.

    Raises:
        ValueError: unknown weighting, a setting that it ignores or that is out of range, chunk_blocks below 1.
    """
    if chunk_blocks < 1:
        raise ValueError(f"chunk_blocks is {chunk_blocks}: give at least 1")
    weigh = _weighting(weighting, hidden_bNBd.shape[2], gamma, alpha)
    rows, vocabulary = jax.typeof(hidden_bNBd).sharding.spec[0], jax.typeof(head_dv).sharding.spec[1]
    head_dv = jax.reshard(head_dv, P(None, vocabulary))

    def chunk_loss(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> BlockLoss:
        hidden, labels, mask = chunk
        logits = jnp.einsum(
            "bNBd,dv->bNBv",
            hidden,
            head_dv,
            preferred_element_type=jnp.result_type(hidden, head_dv, jnp.float32),  # bf16 inputs, float32 logits
            out_sharding=P(rows, None, None, vocabulary),
        )
        return _row_sums(logits, labels, mask, weigh)

    chunks = tuple(_split(x[:, :, 1:], chunk_blocks) for x in (hidden_bNBd, labels_bNB, mask_bNB))
    per_row = jax.lax.map(jax.checkpoint(chunk_loss, prevent_cse=False), chunks)
    return jax.tree.map(lambda x: x.sum((0, 1)), per_row)


def _row_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array, weigh: SlotWeights) -> BlockLoss:
    """Sums over the blocks of each row, [b, ...]; slots are 1.. B-1.

    Labels are compared, not gathered, and the argmax is a maximum and a minimum: both run on a sharded vocabulary.
    """
    vocabulary = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_normaliser = jnp.log(jnp.exp(logits - peak).sum(-1)) + peak[..., 0]
    label_logit = jnp.where(vocabulary == labels[..., None], logits, 0.0).sum(-1)
    cross_entropy = log_normaliser - label_logit
    argmax = jnp.where(logits == peak, vocabulary, logits.shape[-1]).min(-1)

    weights = weigh(jnp.exp(-cross_entropy), mask)
    correct = mask & (argmax == labels)
    supervised = mask.any(-1)
    prefix = jnp.cumprod(correct.astype(jnp.float32), axis=-1).sum(-1)
    by_slot = lambda x: jnp.pad(x.astype(jnp.float32).sum(1), ((0, 0), (1, 0)))  # noqa: E731
    return BlockLoss(
        loss_sum=(weights * cross_entropy).sum((1, 2)),
        weight_sum=weights.sum((1, 2)),
        correct_k=by_slot(correct),
        supervised_k=by_slot(mask),
        prefix_sum=jnp.where(supervised, prefix + 1.0, 0.0).sum(1),
        blocks=supervised.astype(jnp.float32).sum(1),
    )


def _split(x: jax.Array, size: int) -> jax.Array:
    """[b, N, ...] -> [chunks, b, size, ...], N padded with zeros; the row axis, which may be sharded, stays whole."""
    b, blocks = x.shape[:2]
    size = min(size, blocks)
    chunks = -(-blocks // size)
    x = jnp.pad(x, ((0, 0), (0, chunks * size - blocks), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(b, chunks, size, *x.shape[2:]), 1, 0)


def _weighting(weighting: str, block_size: int, gamma: float | None, alpha: float | None) -> SlotWeights:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}: give one of {', '.join(WEIGHTINGS)}")
    if weighting == "dpace":
        _refuse("gamma", gamma, weighting)
        chosen = DEFAULT_ALPHA if alpha is None else alpha
        if not 0 <= chosen <= 1:
            raise ValueError(f"alpha is {alpha}: give a number from 0 to 1")
        return lambda probability, mask: dpace_weights(probability, mask, chosen)
    _refuse("alpha", alpha, weighting)
    schedule = position_weights(weighting, block_size, gamma)[1:]
    return lambda probability, mask: jnp.where(mask, schedule, 0.0)


def _refuse(name: str, value: float | None, weighting: str) -> None:
    if value is not None:
        raise ValueError(f"{name} is {value}, but weighting {weighting!r} ignores it: leave {name} out")
