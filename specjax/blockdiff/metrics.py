"""Training metrics from the counts of `losses.BlockLoss`; NumPy, for values already fetched from the devices.

Counts are additive: sum them over steps or processes first, then divide. What was never measured is NaN, not 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accuracy_by_position(correct_k: np.ndarray, supervised_k: np.ndarray) -> np.ndarray:
    """acc@k, float64 [B]: share of the supervised slots k whose argmax is the label. Entry 0 (the anchor) is NaN."""
    correct_k, supervised_k = np.asarray(correct_k, np.float64), np.asarray(supervised_k, np.float64)
    return np.divide(correct_k, supervised_k, out=np.full(correct_k.shape, np.nan), where=supervised_k > 0)


def teacher_forced_acceptance_length(prefix_sum: float, blocks: float) -> float:
    """Mean over supervised blocks of the greedy prefix length + 1 (the target's own token).

    The prefix is the run of leading supervised slots whose argmax is the label. A block that its turn's end cuts
    short cannot match more slots than it has, so short answers bound this below what decoding can reach.
    """
    return float(prefix_sum) / float(blocks) if blocks else float("nan")


def repeated_ngrams(outputs: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of the n-grams of an output that occurred before in the same output, over all outputs."""
    repeated = total = 0
    for tokens in outputs:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0
