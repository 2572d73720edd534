"""The loss of the blocks' slots, in chunks of blocks: no array over all blocks and the vocabulary exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from specjax.blockdiff.chunks import sum_over_chunks
from specjax.blockdiff.terms import (
    Law,
    check_objective,
    is_streak,
    needs_teacher,
    slot_loss,
    streak_loss,
    total_variation,
)
from specjax.blockdiff.weightings import SlotWeights, slot_weights

CROSS_ENTROPY = {"ce": 1.0}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockLoss:
    """Unnormalised sums over blocks, all float32 and additive over rows, micro-batches and processes.

    loss_sum: sum of the objective, weighted; divide by the whole global batch's `weight_sum`.
    weight_sum: sum of the weights of the supervised slots; of a streak, the number of blocks with a supervised slot.
    correct_k, supervised_k: [B] supervised slots k, and those whose argmax (lowest id of a tie) is the label.
    prefix_sum: sum, over blocks with a supervised slot, of the slots predicted right from the first supervised one on,
        plus 1.
    expected_sum: the same of the expected number when drafts are sampled, sum_j prod_{i <= j} (1 - TV_i), plus 1;
        0 without a teacher.
    blocks: number of blocks with a supervised slot.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    correct_k: jax.Array
    supervised_k: jax.Array
    prefix_sum: jax.Array
    expected_sum: jax.Array
    blocks: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teacher:
    """Where the target's distributions come from: final hidden states [b, t, d] and the blocks' anchors [b, N]."""

    hidden_btd: jax.Array
    anchors_bN: jax.Array  # noqa: N815


def block_loss(
    hidden_bNBd: jax.Array,
    head_dv: jax.Array,
    labels_bNB: jax.Array,
    mask_bNB: jax.Array,
    *,
    objective: Mapping[str, float] = CROSS_ENTROPY,
    teacher: Teacher | None = None,
    weighting: str | None,
    gamma: float | None = None,
    alpha: float | None = None,
    chunk_blocks: int,
) -> BlockLoss:
    """The objective's sum over the supervised slots, and the counts that metrics need.

    Logits (float32) of the draft, and of the teacher where there is one, exist for `chunk_blocks` blocks of every row
    at a time, and only once: their gradient is taken beside them. That holds two to three arrays (with a teacher five
    to six) of 4 * b * chunk_blocks * (B - 1) * v bytes over all devices. Slot 0 is never supervised, whatever the mask
    says. Differentiable in hidden and head, by `loss_sum` alone; the teacher is a constant.

    Rows keep the sharding of `hidden_bNBd` and the vocabulary that of `head_dv`, whose d axis is gathered once. Call
    it under `jax.set_mesh`.

    Args:
        hidden_bNBd: final hidden states of the draft, rows possibly sharded.
        head_dv: the target's output projection.
        labels_bNB, mask_bNB: from `noise.block_inputs` and `masks.slot_mask`.
        objective: weights of `terms.TERMS`. Streaks have no weighting: leave it None.
        teacher: the target after its final norm; terms that compare with its distribution need it.
        gamma: of weighting "exp" (see `position_weights`). alpha: of weighting "dpace", by default 0.5. Its q is the
            probability of the label.

    Raises:
        ValueError: unknown term or weighting, a setting that is ignored or out of range, chunk_blocks below 1, a
            missing teacher.
    """
    check_objective(objective)
    if chunk_blocks < 1:
        raise ValueError(f"chunk_blocks is {chunk_blocks}: give at least 1")
    if needs_teacher(objective) and teacher is None:
        raise ValueError(f"objective {', '.join(objective)} compares with the target: give its final hidden states")
    weigh = _weigher(objective, weighting, hidden_bNBd.shape[2], gamma, alpha)
    rows, vocabulary = jax.typeof(hidden_bNBd).sharding.spec[0], jax.typeof(head_dv).sharding.spec[1]
    head_dv = jax.reshard(head_dv, P(None, vocabulary))

    hidden, labels, mask = (_split(x[:, :, 1:], chunk_blocks) for x in (hidden_bNBd, labels_bNB, mask_bNB))
    anchors = final = None
    if teacher is not None:
        # Afterwards: reshapes of a single row lose the batch axes from the type.
        anchors = jax.reshard(_split(teacher.anchors_bN, chunk_blocks), P(None, rows))
        final = jax.reshard(teacher.hidden_btd, P(rows))
    chunk_loss = partial(_chunk_loss, objective=objective, weigh=weigh, logits_spec=P(rows, None, None, vocabulary))
    loss_sum, sums = sum_over_chunks(chunk_loss, hidden, head_dv, (labels, mask, anchors), final)
    return replace(sums, loss_sum=loss_sum)


def _chunk_loss(
    hidden: jax.Array,
    head: jax.Array,
    own: tuple[jax.Array, ...],
    final: jax.Array | None,
    *,
    objective: Mapping[str, float],
    weigh: SlotWeights | None,
    logits_spec: P,
) -> tuple[jax.Array, BlockLoss]:
    """(losses of rows [b], sums of rows) of the blocks of a chunk; own: their labels, mask and anchors."""

    def law(hidden: jax.Array) -> Law:
        dtype = jnp.result_type(hidden, head, jnp.float32)  # bf16 inputs, float32 logits
        logits = jnp.einsum("bNBd,dv->bNBv", hidden, head, preferred_element_type=dtype, out_sharding=logits_spec)
        return Law.of(logits)

    labels, mask, anchors = own
    taught = None
    if final is not None:
        taught = jax.tree.map(jax.lax.stop_gradient, law(_label_rows(final, anchors, labels.shape[2])))
    sums = _row_sums(law(hidden), labels, mask, objective, weigh, taught)
    return sums.loss_sum, sums


def _weigher(
    objective: Mapping[str, float], weighting: str | None, block_size: int, gamma: float | None, alpha: float | None
) -> SlotWeights | None:
    if not is_streak(objective):
        if weighting is None:
            raise ValueError(f"weighting is None, but the objective {', '.join(objective)} needs one")
        return slot_weights(weighting, block_size, gamma, alpha)
    for name, value in (("weighting", weighting), ("gamma", gamma), ("alpha", alpha)):
        if value is not None:
            raise ValueError(f"{name} is {value!r}, but {', '.join(objective)} weighs its slots itself: leave it out")
    return None


def _label_rows(hidden_btd: jax.Array, anchors_bn: jax.Array, slots: int) -> jax.Array:
    """Hidden states [b, n, slots, d] whose logits are of the labels of slots 1..: those of the token before each."""
    positions = jnp.clip(anchors_bn[..., None] + jnp.arange(slots), 0, hidden_btd.shape[1] - 1)
    return jax.vmap(lambda hidden, index: hidden[index])(hidden_btd, positions)


def _row_sums(
    law: Law,
    labels: jax.Array,
    mask: jax.Array,
    objective: Mapping[str, float],
    weigh: SlotWeights | None,
    teacher: Law | None,
) -> BlockLoss:
    """Sums over the blocks of each row, [b, ...]; slots are 1.. B-1."""
    supervised = mask.any(-1)
    cross_entropy = law.cross_entropy(labels)
    if weigh is None:
        (name,) = objective
        losses = objective[name] * streak_loss(name, cross_entropy, mask)
        loss_sum, weight_sum = losses.sum(1), supervised.astype(jnp.float32).sum(1)
    else:
        weights = weigh(jnp.exp(-cross_entropy), mask)
        losses = slot_loss(objective, law, labels, teacher)
        loss_sum, weight_sum = (weights * losses).sum((1, 2)), weights.sum((1, 2))

    correct = mask & (law.argmax == labels)
    by_slot = lambda x: jnp.pad(x.astype(jnp.float32).sum(1), ((0, 0), (1, 0)))  # noqa: E731
    expected = jnp.zeros_like(loss_sum)
    if teacher is not None:
        expected = _prefixes(1.0 - total_variation(law, teacher), mask)
    return BlockLoss(
        loss_sum=loss_sum,
        weight_sum=weight_sum,
        correct_k=by_slot(correct),
        supervised_k=by_slot(mask),
        prefix_sum=_prefixes(correct.astype(jnp.float32), mask),
        expected_sum=expected,
        blocks=supervised.astype(jnp.float32).sum(1),
    )


def _prefixes(probability: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum [b], over blocks with a supervised slot, of 1 + sum_j prod_{i <= j} probability_i.

    The sum runs over the supervised slots from a block's first one on, up to the next slot that is not.
    """
    shown = jnp.cumsum(mask, axis=-1) == 0
    product = jnp.cumprod(jnp.where(shown, 1.0, jnp.where(mask, probability, 0.0)), axis=-1)
    reached = jnp.where(mask, product, 0.0).sum(-1)
    return jnp.where(mask.any(-1), jax.lax.stop_gradient(reached) + 1.0, 0.0).sum(1)


def _split(x: jax.Array, size: int) -> jax.Array:
    """[b, N, ...] -> [chunks, b, size, ...], N padded with zeros; the row axis, which may be sharded, stays whole."""
    b, blocks = x.shape[:2]
    size = min(size, blocks)
    chunks = -(-blocks // size)
    x = jnp.pad(x, ((0, 0), (0, chunks * size - blocks), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(b, chunks, size, *x.shape[2:]), 1, 0)
