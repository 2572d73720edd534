"""Trees of drafts in plain Python, as a best-first search: the reference."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

Path = tuple[int, ...]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def chain(tokens: Sequence[int]) -> list[Path]:
    return [tuple(tokens[: d + 1]) for d in range(len(tokens))]


def best_first(logits: np.ndarray, nodes: int) -> list[Path]:
    """The tree's nodes as paths of tokens: the chain, then the likeliest other ones in falling order.

    logits: [D, v]. Of equal probabilities the shallower comes first, then the one of the better ranks.
    """
    log_probs = log_softmax(logits)
    ranked = np.argsort(-logits, axis=-1, kind="stable")
    best = chain(ranked[:, 0].tolist())
    others: list[Path] = []
    heap: list[tuple[float, int, Path, Path]] = [(0.0, 0, (), ())]  # -log probability, depth, ranks, tokens
    while len(others) < nodes - len(best):
        score, depth, ranks, tokens = heapq.heappop(heap)
        if depth and any(ranks):
            others.append(tokens)
        for rank, token in enumerate(ranked[depth].tolist() if depth < len(logits) else ()):
            child = score - log_probs[depth, token]
            heapq.heappush(heap, (child, depth + 1, (*ranks, rank), (*tokens, token)))
    return best + others


def follow(paths: Sequence[Path], answer: Sequence[int]) -> int:
    """How many tokens of the answer the tree holds."""
    found, matched = set(paths), 0
    while matched < len(answer) and tuple(answer[: matched + 1]) in found:
        matched += 1
    return matched
