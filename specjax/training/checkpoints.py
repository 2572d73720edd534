"""A run's checkpoints: asynchronous, the last k and the best k kept, restored onto any mesh.

Layout (`weights.orbax_checkpoint` reads it): `checkpoints/STEP/` with the checkpointables `params` (the arrays of what
is exported, by dotted name) and `optimizer` (by tree path: the step, the optimizer's state and, where `params` is an
average, the parameters that training goes on with).
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from specjax.training.state import TrainState
from specjax.weights import flat_params, with_params
from specjax.weights.orbax_checkpoint import PARAMS, RUN_CHECKPOINTS, SCORE

OPTIMIZER = "optimizer"
Model = TypeVar("Model", bound=nnx.Module)


class Checkpoints:
    """Saves and restores `TrainState`s under RUN/checkpoints."""

    def __init__(self, run: Path, *, keep_last: int, keep_best: int):
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[SCORE], n=keep_best, keep_checkpoints_without_metrics=False
        )
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep_last), best])
        root = (run / RUN_CHECKPOINTS).absolute()
        self._checkpointer = ocp.training.Checkpointer(root, preservation_policy=policy, cleanup_tmp_directories=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState[Model], step: int, score: float | None = None) -> None:
        """Starts writing `state`; the arrays are copied before this returns, so they may be donated."""
        if self.latest_step == step:
            return
        metrics = None if score is None else {SCORE: score}
        self._checkpointer.save_checkpointables_async(step, _checkpointables(state), metrics=metrics, force=True)

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        self._checkpointer.wait()

    def restore(self, state: TrainState[Model], step: int | None = None) -> TrainState[Model]:
        """The state saved at `step` (default: the latest), laid out as `state` is, whose values are not used."""
        abstract = jax.tree.map(_abstract, _checkpointables(state))
        restored = self._checkpointer.load_checkpointables(step, abstract)
        leaves, structure = jax.tree.flatten(_optimizer_part(state))
        names = list(_checkpointables(state)[OPTIMIZER])
        assert len(names) == len(leaves)
        count, opt_state, *trained = jax.tree.unflatten(structure, [restored[OPTIMIZER][name] for name in names])
        result = with_params(state.model, restored[PARAMS])
        if state.average is None:
            return TrainState(count, result, opt_state)
        return TrainState(count, with_params(state.model, trained[0]), opt_state, result)


def _optimizer_part(state: TrainState[Model]) -> tuple[Any, ...]:
    trained = () if state.average is None else (flat_params(state.model),)
    return state.step, state.opt_state, *trained


def _checkpointables(state: TrainState[Model]) -> dict[str, dict[str, jax.Array]]:
    named = jax.tree_util.tree_leaves_with_path(_optimizer_part(state))
    optimizer = {jax.tree_util.keystr(path): leaf for path, leaf in named}
    return {PARAMS: flat_params(state.result), OPTIMIZER: optimizer}


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
