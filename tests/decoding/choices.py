"""The target's choice of a token in NumPy: from logits without a cache, in float64, by the documented key of a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models.decoder import Decoder
from tests.decoding.tiny import TARGET, TIE_MARGIN, Tokens, all_logits

POSITIONS = TARGET.max_position_embeddings


@dataclass(frozen=True)
class Settings:
    """Of one row. temperature 0: greedy, and then neither top_k nor top_p. allowed: [v] bool; None: all."""

    seed: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    allowed: np.ndarray | None = None


@jax.jit
def _noise(seeds_b: jax.Array) -> jax.Array:
    """Gumbel noise [b, positions, v]: of a row's seed and the token's absolute position."""

    def draw(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), position)
        return jax.random.gumbel(key, (TARGET.vocab_size,), jnp.float32, mode="high")

    return jax.vmap(lambda seed: jax.vmap(lambda at: draw(seed, at))(jnp.arange(POSITIONS)))(seeds_b)


def noise(settings: Sequence[Settings]) -> np.ndarray:
    return np.asarray(_noise(np.array([s.seed for s in settings], np.uint32)))


def kept(logits_nv: np.ndarray, settings: Settings, slack: np.ndarray | float = 0.0) -> np.ndarray:
    """[n, v] bool, the tokens that may come: those allowed, of these the top_k, and of these the top_p.

    slack: as far as rounding may have moved logits; negative keeps what rounding cannot have removed.
    """
    allowed = np.broadcast_to(True if settings.allowed is None else settings.allowed, logits_nv.shape)
    if settings.temperature == 0:
        return allowed
    scores = np.where(allowed, logits_nv.astype(np.float64), -np.inf) / settings.temperature
    above = scores[:, None, :] > scores[:, :, None] + np.reshape(slack, (-1, 1, 1)) / settings.temperature
    above &= ~np.eye(scores.shape[-1], dtype=bool)
    found = allowed.copy()
    if settings.top_k is not None:
        found &= above.sum(-1) < settings.top_k
    if settings.top_p is not None:
        weights = np.where(found, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        before = (above * weights[:, None]).sum(-1) / weights.sum(-1, keepdims=True).clip(min=1e-300)
        found &= before < settings.top_p + np.sign(np.ravel(slack)[0]) * TIE_MARGIN
    return found


def choose(logits_nv: np.ndarray, noise_nv: np.ndarray, settings: Settings) -> np.ndarray:
    """[n] int, the target's tokens."""
    return np.argmax(_scores(logits_nv, noise_nv, settings, 0.0), axis=-1)


def may_choose(logits_v: np.ndarray, noise_v: np.ndarray, settings: Settings) -> set[int]:
    """Every token that the target may choose if its logits are rounded in another way; more than one: a tie."""
    found: set[int] = set()
    slack = TIE_MARGIN * (logits_v.max() - logits_v.min())
    for edge in (-slack, slack):
        scores = _scores(logits_v[None], noise_v[None], settings, edge)[0]
        if np.isfinite(scores).any():
            found |= set(np.flatnonzero(scores >= scores.max() - slack / (settings.temperature or 1)).tolist())
    return found


def _scores(logits_nv: np.ndarray, noise_nv: np.ndarray, settings: Settings, slack: float) -> np.ndarray:
    scores = logits_nv.astype(np.float64)
    if settings.temperature:
        scores = scores / settings.temperature + noise_nv
    return np.where(kept(logits_nv, settings, slack), scores, -np.inf)


def continued(target: Decoder, rows: Tokens, settings: Sequence[Settings], count: int) -> list[list[int]]:
    """The target's next `count` tokens after `rows`, one pass without a cache for each."""
    rows, drawn = [list(row) for row in rows], noise(settings)
    for _ in range(count):
        for row, logits, draws, setting in zip(rows, all_logits(target, rows), drawn, settings, strict=True):
            at = len(row)
            row.append(int(choose(logits[at - 1 : at], draws[at : at + 1], setting)[0]))
    return [row[-count:] for row in rows]
