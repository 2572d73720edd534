"""How much each slot of a block counts: fixed schedules, and D-PACE's, which follow the draft's confidence."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

WEIGHTINGS = ("exp", "uniform", "dpace")
DEFAULT_ALPHA = 0.5

SlotWeights = Callable[[jax.Array, jax.Array], jax.Array]
"""(label probability, mask) [b, N, B - 1], slots 1.. -> weights, 0 where unsupervised."""


def position_weights(weighting: str, block_size: int, gamma: float | None = None) -> np.ndarray:
    """Weights [B], float32, of a fixed schedule; slot 0 has none.

    exp: exp(-(k - 1) / gamma) for slot k. uniform: 1.

    Raises:
        ValueError: not a fixed schedule, no gamma or one not above 0, or gamma given to a weighting that ignores it.
    """
    slots = np.arange(block_size, dtype=np.float32)
    if weighting == "uniform":
        _refuse("gamma", gamma, weighting)
        weights = np.ones_like(slots)
    elif weighting == "exp":
        if gamma is None or gamma <= 0:
            raise ValueError(f"gamma is {gamma}: give a number above 0")
        weights = np.exp(-(slots - 1) / gamma)
    else:
        raise ValueError(f"weighting {weighting!r} is no fixed schedule: use 'exp' or 'uniform'")
    return np.where(slots == 0, np.float32(0), weights)


def dpace_weights(label_probability: jax.Array, mask: jax.Array, alpha: float = DEFAULT_ALPHA) -> jax.Array:
    """D-PACE weights of slots 1.. along the last axis, detached, 0 where unsupervised (arXiv 2605.18810).

    w_k = sum_{j >= k} prod_{i <= j} s_i with s_i = (1 - alpha) * q_i + alpha, q_i the draft's probability of the
    label. Unsupervised slots have s = 1 and leave the sum.
    """
    smoothed = jnp.where(mask, (1.0 - alpha) * jax.lax.stop_gradient(label_probability) + alpha, 1.0)
    reached = jnp.where(mask, jnp.cumprod(smoothed, axis=-1), 0.0)
    return jnp.where(mask, jax.lax.cumsum(reached, axis=reached.ndim - 1, reverse=True), 0.0)


def slot_weights(
    weighting: str, block_size: int, gamma: float | None = None, alpha: float | None = None
) -> SlotWeights:
    """The weights of a block's supervised slots.

    Raises:
        ValueError: unknown weighting, a setting that it ignores or that is out of range.
    """
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
