"""AdamW or Muon with warm-up, a decay schedule and global-norm clipping."""

from __future__ import annotations

from typing import Any

import jax
import optax

from specjax.config_sections import OptimizerConfig

DEFAULT_DECAY_RATIO = 0.2
DEFAULT_MIN_LR_RATIO = 0.1
MUON_UPDATE_RMS = 0.2  # of an AdamW update, about
VOCABULARY_MODULES = ("embed_tokens", "lm_head")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then down to `min_lr_ratio` of the peak.

    cosine, linear: over all remaining steps. wsd: linearly over the last `decay_ratio` of the steps. constant: never.
    """
    warmup = max(1, round(config.warmup_ratio * total_steps))
    peak = config.learning_rate
    ratio = DEFAULT_MIN_LR_RATIO if config.min_lr_ratio is None else config.min_lr_ratio
    end = peak * ratio
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup), alpha=ratio)
        return optax.join_schedules([rise, fall], [warmup])
    share = 1.0 if config.schedule == "linear" else config.decay_ratio or DEFAULT_DECAY_RATIO
    start = max(warmup, total_steps - max(1, round(share * total_steps)))
    fall = optax.linear_schedule(peak, end, total_steps - start)
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, start])


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (weight decay skips norms and biases) or Muon.

    muon: hidden matrices move along their orthogonalised momentum (Newton-Schulz), scaled to the size of an AdamW
    update, so that one learning rate serves both (arXiv 2502.16982); embeddings, heads and vectors take
    Adam with Nesterov momentum and no weight decay.
    """
    clip = optax.clip_by_global_norm(config.clip_norm)
    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    b1, b2 = config.betas
    if config.name == "adamw":
        return optax.chain(
            clip, optax.adamw(schedule, b1, b2, config.eps, weight_decay=config.weight_decay, mask=decayed)
        )
    muon = optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        eps=config.eps,
        muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=MUON_UPDATE_RMS,
    )
    return _placed_by_compiler(optax.chain(clip, muon))


def _muon_dimensions(params: Any) -> Any:
    """Per parameter: which axes Muon orthogonalises, or None for one that Adam trains."""

    def dimensions(path: tuple[Any, ...], param: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        vocabulary = any(name in jax.tree_util.keystr(path) for name in VOCABULARY_MODULES)
        return None if vocabulary or param.ndim != 2 else optax.contrib.MuonDimensionNumbers()

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _placed_by_compiler(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with results sharded like its arguments and everything between left to the compiler.

    Products of sharded matrices inside an optimizer have no sharding that Explicit axes could infer.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        return jax.sharding.auto_axes(optimizer.update, out_sharding=shardings)(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)
