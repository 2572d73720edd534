"""In-training evaluation on fixed held-out rows and anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from specjax.fetch import fetch
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.training.loop import HostBatch, to_device
from specjax.training.metrics import Metrics, add, readable
from specjax.training.objectives import BlockDiffusionLoss, CausalLMLoss, statistics
from specjax.training.step import Batch

Sums = dict[str, jax.Array]


def draft_evaluator(
    loss: BlockDiffusionLoss, target: Decoder, batches: Sequence[HostBatch]
) -> Callable[[DFlashDraft], tuple[Metrics, float]]:
    """Returns `draft -> (metrics, score)`: loss and acc@k against the data, acceptance length against the target.

    The score is the teacher-forced acceptance length: how many of the target's own greedy choices a block matches,
    plus one.
    """

    def sums(draft: DFlashDraft, target: Decoder, batch: Batch) -> tuple[Sums, Sums]:
        loss_sum, data = loss(draft, target, batch)
        greedy = loss.against_target(draft, target, batch)
        return (
            {"loss_sum": loss_sum, "weight": data.weight, **data.statistics},
            {"loss_sum": greedy.loss_sum, "weight": greedy.weight_sum, **statistics(greedy)},
        )

    jitted = jax.jit(sums)

    def evaluate(draft: DFlashDraft) -> tuple[Metrics, float]:
        data, greedy = _total(lambda batch: jitted(draft, target, batch), batches, 2)
        metrics = readable(data)
        against = readable(greedy)
        names = ("acceptance_length_tf", "acceptance_length_sampled_tf")
        return metrics | {name: against[name] for name in names}, against["acceptance_length_tf"]

    return evaluate


def causal_lm_evaluator(loss: CausalLMLoss, batches: Sequence[HostBatch]) -> Callable[[Decoder], tuple[Metrics, float]]:
    """Returns `model -> (metrics, score)`; the score is minus the loss."""

    def sums(model: Decoder, batch: Batch) -> tuple[Sums]:
        loss_sum, data = loss(model, None, batch)
        return ({"loss_sum": loss_sum, "weight": data.weight, **data.statistics},)

    jitted = jax.jit(sums)

    def evaluate(model: Decoder) -> tuple[Metrics, float]:
        (total,) = _total(lambda batch: jitted(model, batch), batches, 1)
        metrics = readable(total)
        return metrics, -metrics["loss"]

    return evaluate


def _total(run: Callable[[Batch], Any], batches: Sequence[HostBatch], parts: int) -> list[dict[str, np.ndarray]]:
    totals: list[dict[str, np.ndarray]] = [{} for _ in range(parts)]
    for host_batch in batches:
        batch = {name: x[0] for name, x in to_device(host_batch, 1).items()}
        for i, part in enumerate(fetch(run(batch))):
            totals[i] = add(totals[i], part)
    return totals
