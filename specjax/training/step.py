"""The jitted train step: accumulate, normalise over the whole global batch, clip, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from specjax.training.state import TrainState

Model = TypeVar("Model")
Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """Unnormalised results of a micro-batch, all additive over rows.

    weight: sum of the loss weights, by which loss and gradient of the whole step are divided.
    statistics: counts for the metrics (float32 scalars or vectors).
    """

    weight: jax.Array
    statistics: dict[str, jax.Array]


LossFunction = Callable[[Model, Any, Batch], tuple[jax.Array, LossSums]]
"""(trained module, frozen modules, micro-batch) -> (sum of weighted losses, sums)."""


def make_train_step(
    loss_function: LossFunction[Model],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema_decay: float | None = None,
    dropout_seed: int | None = None,
) -> Callable[[TrainState[Model], Any, Batch], tuple[TrainState[Model], dict[str, jax.Array]]]:
    """Returns a jitted `step(state, frozen, batch) -> (state, metrics)` that donates `state`.

    `batch` leaves are [micro-batches, rows, ...]. Gradients of the loss *sums* are accumulated and divided once by
    the sum of weights of the whole global batch, so a step does not depend on how the batch is split over devices
    and micro-batches. A batch without any weight leaves the parameters' gradient at zero. `ema_decay` is that of the
    state's average, which must exist if it is given. With `dropout_seed` every micro-batch gets a `dropout_key`, a
    function of that seed, the step and the micro-batch's place.
    """

    def gradients(model: Model, frozen: Any, batch: Batch) -> tuple[Any, jax.Array, LossSums]:
        grad = jax.value_and_grad(loss_function, has_aux=True)

        def micro_step(carry: Any, micro: Batch) -> tuple[Any, None]:
            (loss, sums), grads = grad(model, frozen, micro)
            return jax.tree.map(jnp.add, carry, (grads, loss, sums)), None

        first = jax.tree.map(lambda x: x[0], batch)
        if next(iter(batch.values())).shape[0] == 1:
            (loss, sums), grads = grad(model, frozen, first)
            return grads, loss, sums
        (loss, sums), grads = jax.eval_shape(grad, model, frozen, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), (grads, loss, sums))
        return jax.lax.scan(micro_step, zeros, batch)[0]

    def step(state: TrainState[Model], frozen: Any, batch: Batch) -> tuple[TrainState[Model], dict[str, jax.Array]]:
        if dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
            batch = batch | {"dropout_key": jax.random.split(key, next(iter(batch.values())).shape[0])}
        grads, loss, sums = gradients(state.model, frozen, batch)
        scale = 1.0 / jnp.maximum(sums.weight, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics = {
            "loss_sum": loss,
            "weight": sums.weight,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": schedule(state.step),
            **sums.statistics,
        }
        average = state.average
        if ema_decay is not None:
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda old, new: new + decay * (old - new), average, model)
        return TrainState(state.step + 1, model, opt_state, average), metrics

    return jax.jit(step, donate_argnums=0)
