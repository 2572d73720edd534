"""What a slot of a block is charged: the terms that objectives are sums of, from logits [..., v] in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

TEACHER_TERMS = ("ce_argmax", "kl", "tv", "lk")  # need the target's distribution
SLOT_TERMS = ("ce", *TEACHER_TERMS)  # summed over slots with position weights
STREAK_TERMS = ("streak", "ce_streak")  # of whole blocks, which weigh their slots themselves
TERMS = (*SLOT_TERMS, *STREAK_TERMS)
LK_DECAY = 3.0


def check_objective(objective: Mapping[str, float]) -> None:
    """Raises ValueError unless `objective` is a sum of known terms with weights above 0, a streak alone."""
    if not objective:
        raise ValueError(f"objective is empty: give at least one of {', '.join(TERMS)}")
    for name, weight in objective.items():
        if name not in TERMS:
            raise ValueError(f"objective has the term {name!r}: give one of {', '.join(TERMS)}")
        if not weight > 0:
            raise ValueError(f"objective gives {name} the weight {weight}: give a number above 0, or leave it out")
        if name in STREAK_TERMS and len(objective) > 1:
            raise ValueError(
                f"objective adds {name} to other terms: it is divided by blocks, not by weights; use it alone"
            )


def needs_teacher(objective: Mapping[str, float]) -> bool:
    return any(name in TEACHER_TERMS for name in objective)


def is_streak(objective: Mapping[str, float]) -> bool:
    return any(name in STREAK_TERMS for name in objective)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Law:
    """Logits [..., v] with what a softmax needs: their maximum [..., 1] (detached) and log of the normaliser [...]."""

    logits: jax.Array
    peak: jax.Array
    log_normaliser: jax.Array

    @classmethod
    def of(cls, logits: jax.Array) -> Law:
        peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        return cls(logits, peak, jnp.log(jnp.exp(logits - peak).sum(-1)) + peak[..., 0])

    @property
    def argmax(self) -> jax.Array:
        """Lowest id of a tie, int32 [...]; a maximum and a minimum, which run on a sharded vocabulary."""
        vocabulary = jnp.arange(self.logits.shape[-1], dtype=jnp.int32)
        return jnp.where(self.logits == self.peak, vocabulary, self.logits.shape[-1]).min(-1)

    @property
    def probabilities(self) -> jax.Array:
        return jnp.exp(self.logits - self.log_normaliser[..., None])

    def cross_entropy(self, labels: jax.Array) -> jax.Array:
        """Nats [...]; labels [...] are compared, not gathered, for a sharded vocabulary."""
        vocabulary = jnp.arange(self.logits.shape[-1], dtype=labels.dtype)
        label_logit = jnp.where(vocabulary == labels[..., None], self.logits, 0.0).sum(-1)
        return self.log_normaliser - label_logit


def kl_divergence(draft: Law, teacher: Law) -> jax.Array:
    """Forward KL [...] of the draft's law from the teacher's, nats."""
    difference = (teacher.probabilities * (teacher.logits - draft.logits)).sum(-1)
    return difference - teacher.log_normaliser + draft.log_normaliser


def total_variation(draft: Law, teacher: Law) -> jax.Array:
    """1 - sum_v min(p, q) [...]: the probability that a draft sampled from q is rejected."""
    return 1.0 - jnp.minimum(teacher.probabilities, draft.probabilities).sum(-1)


def slot_loss(objective: Mapping[str, float], draft: Law, labels: jax.Array, teacher: Law | None) -> jax.Array:
    """The weighted sum of the objective's terms at every slot [...].

    ce: cross-entropy with the data's token. ce_argmax: with the teacher's greedy choice. kl, tv: as the functions
    above. lk: lam * kl + (1 - lam) * tv with lam = exp(-3 * (1 - tv)), detached, so that slots already accepted are
    pushed by their overlap.
    """
    total = jnp.zeros(labels.shape, draft.logits.dtype)
    for name, weight in objective.items():
        if name == "ce":
            term = draft.cross_entropy(labels)
        else:
            assert teacher is not None
            term = _teacher_term(name, draft, teacher)
        total = total + weight * term
    return total


def _teacher_term(name: str, draft: Law, teacher: Law) -> jax.Array:
    if name == "ce_argmax":
        return draft.cross_entropy(teacher.argmax)
    if name == "kl":
        return kl_divergence(draft, teacher)
    variation = total_variation(draft, teacher)
    if name == "tv":
        return variation
    share = jnp.exp(-LK_DECAY * (1.0 - jax.lax.stop_gradient(variation)))
    return share * kl_divergence(draft, teacher) + (1.0 - share) * variation


def streak_loss(name: str, cross_entropy: jax.Array, mask: jax.Array) -> jax.Array:
    """Loss of whole blocks [...] from slots [..., B - 1] (SpecDiff-2): minus the expected number of leading matches.

    streak: -sum_j prod_{i <= j} q_i. ce_streak: -sum_j stopgrad(prod_{i < j} q_i) * log q_j. q is the draft's
    probability of the label; slots outside the mask have q = 1 and leave the sum.
    """
    log_q = jnp.where(mask, -cross_entropy, 0.0)
    reached = jnp.cumsum(log_q, axis=-1)
    if name == "streak":
        return -jnp.where(mask, jnp.exp(reached), 0.0).sum(-1)
    before = jax.lax.stop_gradient(jnp.exp(reached - log_q))
    return -(before * log_q).sum(-1)
