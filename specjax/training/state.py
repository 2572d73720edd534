"""What a run carries from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import optax

Model = TypeVar("Model")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState(Generic[Model]):
    """The trained module (float32 masters), its optimizer state, and the number of updates made (int32 scalar).

    average: the running average of the module's parameters, None without `optimizer.ema_decay`.
    The data position is a function of `step`, and all randomness of the run (anchors, shuffling, dropout) is a
    function of the run's seed, the data position and `step`, so nothing else has to be saved.
    """

    step: jax.Array
    model: Model
    opt_state: optax.OptState
    average: Model | None = None

    @classmethod
    def create(
        cls, model: Model, optimizer: optax.GradientTransformation, *, averages: bool = False
    ) -> TrainState[Model]:
        """The state before the first step. `model` is donated: its arrays become the state's."""

        def init(model: Model) -> TrainState[Model]:
            average = jax.tree.map(jnp.copy, model) if averages else None
            return cls(jnp.zeros((), jnp.int32), model, optimizer.init(model), average)

        return jax.jit(init, donate_argnums=0)(model)

    @property
    def result(self) -> Model:
        """What is evaluated and exported: the average where there is one."""
        return self.model if self.average is None else self.average
