"""AdamW with warm-up, a decay schedule and global-norm clipping."""

from __future__ import annotations

import jax
import optax

from specjax.config import OptimizerConfig

DEFAULT_DECAY_RATIO = 0.2


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then down to `min_lr_ratio` of the peak.

    cosine: decays over all remaining steps. wsd: stays at the peak and decays linearly over the last `decay_ratio`.
    """
    warmup = max(1, round(config.warmup_ratio * total_steps))
    peak, end = config.learning_rate, config.learning_rate * config.min_lr_ratio
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup), alpha=config.min_lr_ratio)
        return optax.join_schedules([rise, fall], [warmup])
    decay = max(1, round((config.decay_ratio or DEFAULT_DECAY_RATIO) * total_steps))
    start = max(warmup, total_steps - decay)
    fall = optax.linear_schedule(peak, end, total_steps - start)
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, start])


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay skips vectors (norms and biases)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.betas[0],
            b2=config.betas[1],
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
