"""What a train step takes of a device's memory, by the compiler's word: nothing is allocated and nothing runs.

So the answer is to be had for models, meshes and TPU slices that are not here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from specjax.config import RunConfig
from specjax.errors import InputError
from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.precision import matmul_precision
from specjax.models.sharding import BATCH
from specjax.training.benchmark import states_shape, synthetic_rows, train_step_of, updated, with_mask_token
from specjax.training.run import check_batch_size, mesh_of
from specjax.training.state import TrainState
from specjax.training.tasks import check_mesh, compute_dtype, draft_task_of
from specjax.weights import read_target_config

MIB = 2**20


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice that need not be here, such as v5e:4x4, to compile for.

    Raises:
        InputError: libtpu is not installed, or does not know the slice.
    """
    # Else libtpu asks the cloud's metadata server who it is, and lets one process at a time ask it anything.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except RuntimeError as error:
        raise InputError(
            f"--topology {name}: {error}; give one such as v5e:4x4, with libtpu installed (pip install 'jax[tpu]')"
        ) from error


def step_memory(
    config: RunConfig, *, vocab_size: int | None = None, devices: Sequence[jax.Device] | None = None
) -> dict[str, int]:
    """Bytes a device: arguments (parameters, optimizer state, target, batch), temporaries, and their sum, the peak.

    Empty where the compiler finds that the devices have too little.

    Args:
        config: of a draft. No weights are read, neither its target's nor those of `draft.init`. With `data.taps` the
            target does not run, and the batch holds its states.
        vocab_size: instead of the target's. devices: to compile for, instead of those here; the dtype auto is then
            bfloat16.

    Raises:
        InputError: anything wrong with mesh, batch size or target.
    """
    shape = read_target_config(config.target.path)
    config = with_mask_token(config, shape.vocab_size)
    shape = shape if vocab_size is None else replace(shape, vocab_size=vocab_size)
    if devices is not None and config.target.dtype == "auto":  # which would be this machine's
        config = updated(config, "target", dtype="bfloat16")
    with mesh_of(config, devices) as mesh, matmul_precision(compute_dtype(config)):
        check_batch_size(config)
        check_mesh(shape)
        models, step = _abstract(config, shape)
        arguments = jax.tree.map(lambda x: _placed(x, mesh), (*models, _abstract_batch(config, shape)))
        try:
            memory = step.lower(*arguments).compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {}
    found = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return found | {"peak": sum(found.values())}


def _abstract(config: RunConfig, shape: DecoderConfig) -> tuple[tuple[TrainState[Any], Decoder], Any]:
    """Shapes and shardings of the state and the target, and the jitted step."""
    dtype, steps = compute_dtype(config), []

    def make() -> tuple[TrainState[Any], Decoder]:
        target = Decoder(shape, rngs=nnx.Rngs(config.seed), dtype=dtype, param_dtype=dtype)
        task = draft_task_of(config, target, load_init=False)
        optimizer, step = train_step_of(config, task)
        steps.append(step)
        return TrainState.create(task.model, optimizer, averages=config.optimizer.ema_decay is not None), target

    return jax.eval_shape(make), steps[0]


def _abstract_batch(config: RunConfig, shape: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    micro, spec = config.training.accumulation_steps, P(None, BATCH)
    batch = {
        name: jax.ShapeDtypeStruct((micro, len(rows) // micro, *rows.shape[1:]), rows.dtype, sharding=spec)
        for name, rows in synthetic_rows(config, shape.vocab_size).items()
    }
    if config.data.taps is not None:
        states = states_shape(config, shape.hidden_size)
        batch["states"] = jax.ShapeDtypeStruct(states, compute_dtype(config), sharding=spec)
    return batch


def _placed(x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """`x` on the devices of `mesh`: shapes alone have the mesh of their tracing, which has none."""
    spec = getattr(x.sharding, "spec", x.sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P() if spec is None else spec))
