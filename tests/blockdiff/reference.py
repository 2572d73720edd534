"""The block loss written as plain loops over slots, in NumPy float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class ReferenceLoss:
    hidden_grad: np.ndarray
    head_grad: np.ndarray
    correct_k: np.ndarray
    supervised_k: np.ndarray
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    prefix_sum: float = 0.0
    blocks: float = 0.0
    weights: list[float] = field(default_factory=list)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def slot_weights(weighting: str, probability: list[float], slots: list[int], setting: float | None) -> list[float]:
    """Weights of the supervised `slots` of one block, whose labels have `probability`."""
    if weighting == "uniform":
        return [1.0 for _ in slots]
    if weighting == "exp":
        return [float(np.exp(-(k - 1) / setting)) for k in slots]
    smoothed = [(1 - setting) * q + setting for q in probability]
    return [sum(float(np.prod(smoothed[: j + 1])) for j in range(i, len(slots))) for i in range(len(slots))]


def reference_loss(
    hidden: np.ndarray,
    head: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray,
    weighting: str,
    setting: float | None,
) -> ReferenceLoss:
    """Sums and the gradients of the loss sum; `setting` is gamma of "exp" or alpha of "dpace"."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    b, n, block_size, _ = hidden.shape
    out = ReferenceLoss(np.zeros_like(hidden), np.zeros_like(head), np.zeros(block_size), np.zeros(block_size))
    for i in range(b):
        for j in range(n):
            slots = [k for k in range(1, block_size) if mask[i, j, k]]
            if not slots:
                continue
            logits = {k: hidden[i, j, k] @ head for k in slots}
            law = {k: softmax(logits[k]) for k in slots}
            right = {k: int(np.argmax(logits[k])) == labels[i, j, k] for k in slots}
            probability = [float(law[k][labels[i, j, k]]) for k in slots]
            for k, q, w in zip(slots, probability, slot_weights(weighting, probability, slots, setting), strict=True):
                out.loss_sum -= w * np.log(q)
                out.weight_sum += w
                error = law[k].copy()
                error[labels[i, j, k]] -= 1
                out.hidden_grad[i, j, k] = w * (head @ error)
                out.head_grad += w * np.outer(hidden[i, j, k], error)
                out.correct_k[k] += right[k]
                out.supervised_k[k] += 1
            prefix = 0
            while right.get(slots[0] + prefix, False):
                prefix += 1
            out.prefix_sum += prefix + 1
            out.blocks += 1
    return out
