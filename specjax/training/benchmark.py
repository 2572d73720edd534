"""How fast a run config trains here: its own train step on synthetic rows, whole, in parts, and against PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from specjax.blockdiff.anchors import draw_anchors
from specjax.config import RunConfig
from specjax.errors import InputError
from specjax.models.decoder import Decoder
from specjax.models.precision import matmul_precision
from specjax.models.sharding import BATCH
from specjax.training import flops
from specjax.training.breakdown import context_scores, measure_parts
from specjax.training.loop import to_device
from specjax.training.objectives import BlockDiffusionLoss
from specjax.training.optimizer import learning_rate_schedule, make_optimizer
from specjax.training.run import check_batch_size, mesh_of
from specjax.training.state import TrainState
from specjax.training.step import Batch, make_train_step
from specjax.training.stopwatch import seconds_of, spread
from specjax.training.tasks import Task, check_mesh, compute_dtype, draft_config_of, draft_task_of
from specjax.training.torch_comparison import check_comparable, compare_with_torch
from specjax.weights import load_target, read_target_config
from specjax.weights.tokenizer import load_tokenizer, stop_token_ids

DEFAULT_TOTAL_STEPS = 1000  # shapes the learning rate where the config counts epochs of data that need not exist
Report = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """steps, warmup: timed and untimed steps. random_target: weights drawn to the shape in the target's config.json.

    captured: random states stand for the target's, as with `data.taps`. against_torch: also time PyTorch's step;
    both sides then train on captured states.
    """

    steps: int = 20
    warmup: int = 3
    random_target: bool = False
    captured: bool = False
    against_torch: bool = False


@dataclass
class Trainer:
    """A compiled train step and the state that it replaces at every call."""

    step: Callable[[TrainState[Any], Any, Batch], tuple[TrainState[Any], dict[str, jax.Array]]]
    state: TrainState[Any]
    frozen: Any
    batch: Batch

    def __call__(self) -> dict[str, jax.Array]:
        """One step, waited for; its metrics."""
        self.state, metrics = self.step(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))
        return metrics


def check_measurable(config: RunConfig, settings: Settings) -> None:
    """Raises InputError for a config that trains no draft, or that PyTorch's step does not follow."""
    if config.kind == "causal_lm":
        raise InputError(f"kind is {config.kind}; the benchmark times the training of drafts: give kind dflash or lora")
    if config.kind == "lora" and (settings.captured or settings.against_torch):
        raise InputError("kind lora needs the target's keys, not captured states; leave --captured and --compare out")
    if settings.against_torch:
        check_comparable(config)


def benchmark_training(config: RunConfig, settings: Settings, progress: Progress = lambda text: None) -> Report:
    """Compiles and times the train step of `config` on its mesh; times in seconds, memory in bytes a device.

    Rows are full, of random tokens, every one of them learnt; anchors are drawn as in training. The data files that
    the config names are not read.

    config: one that `check_measurable` passes.

    Raises:
        InputError: anything wrong with mesh, batch size or target.
    """
    if settings.captured or settings.against_torch:
        config = updated(config, "data", taps=config.data.taps or "random")
    with mesh_of(config), matmul_precision(compute_dtype(config)):
        check_batch_size(config)
        progress("making the target")
        config, target = _with_target(config, settings.random_target)
        task = draft_task_of(config, target)
        host, batch = synthetic_batch(config, target)
        progress("compiling the step")
        trainer, compiled = _compiled(config, task, batch)
        report = _shape(config, task, host) | compiled
        if settings.against_torch:
            # Before any update: all start from the same weights, and must find the same loss and gradient.
            progress("against PyTorch")
            runs = settings.steps, settings.warmup
            report["torch"] = compare_with_torch(config, trainer, trainer.state, target, batch, *runs)
        progress("timing the step")
        for _ in range(settings.warmup):
            trainer()
        report |= _speeds([seconds_of(trainer) for _ in range(settings.steps)], report)
        report["device_memory"] = jax.local_devices()[0].memory_stats()
        if config.kind == "lora":  # its parts are the target's own passes
            return report
        progress("timing its parts")
        assert isinstance(task.loss, BlockDiffusionLoss)
        report["context_scores"] = context_scores(task.loss, trainer.state.model, batch)
        runs = settings.steps, settings.warmup
        report["parts_s"] = measure_parts(config, task.loss, trainer.state, target, batch, *runs)
        report["parts_sum_s"] = sum(report["parts_s"].values())
    return report


def updated(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _with_target(config: RunConfig, random: bool) -> tuple[RunConfig, Decoder]:
    """The frozen target on the mesh, and the config with a mask token for a random target that has no tokenizer."""
    path, dtype = config.target.path, compute_dtype(config)
    shape = read_target_config(path)
    check_mesh(shape)
    if not random:
        return config, load_target(path, dtype=dtype)
    make = jax.jit(lambda: Decoder(shape, rngs=nnx.Rngs(config.seed), dtype=dtype, param_dtype=dtype))
    return with_mask_token(config, shape.vocab_size), make()


def with_mask_token(config: RunConfig, vocab_size: int) -> RunConfig:
    """The config with a mask token even where the target has no tokenizer to tell it."""
    path = config.target.path
    if config.draft.mask_token_id is not None or load_tokenizer(path) is not None:
        return config
    return updated(config, "draft", mask_token_id=max(set(range(vocab_size)) - set(stop_token_ids(path))))


def synthetic_rows(config: RunConfig, vocab_size: int) -> dict[str, np.ndarray]:
    """A step's rows on the host: full, of random tokens, with the anchors of a first epoch; fields [rows, ...]."""
    rows, length = config.training.batch_size, config.data.max_length
    tokens = np.random.default_rng(config.seed).integers(0, vocab_size, (rows, length), np.int32)
    learnt, documents = np.ones((rows, length), bool), np.ones((rows, length), np.int32)
    drawn = [
        draw_anchors(learnt[i], documents[i], config.data.num_anchors, seed=config.seed, epoch=0, sample_ids=[i])
        for i in range(rows)
    ]
    anchors, valid = (np.stack(x) for x in zip(*drawn, strict=True))
    return {
        "input_ids": tokens,
        "loss_mask": learnt,
        "document_ids": documents,
        "anchors": anchors,
        "anchor_valid": valid,
    }


def states_shape(config: RunConfig, hidden_size: int) -> tuple[int, ...]:
    """Of a step's captured states: [micro-batches, rows, tokens, (taps + 1) * hidden size]."""
    micro = config.training.accumulation_steps
    width = (len(draft_config_of(config).target_layer_ids) + 1) * hidden_size
    return micro, config.training.batch_size // micro, config.data.max_length, width


def synthetic_batch(config: RunConfig, target: Decoder) -> tuple[dict[str, np.ndarray], Batch]:
    """`synthetic_rows` and the step's batch made of them, [micro-batches, rows, ...].

    With `data.taps` the batch also has random `states`, standard normal, made on the devices.
    """
    host = synthetic_rows(config, target.config.vocab_size)
    batch = to_device(host, config.training.accumulation_steps)
    if config.data.taps is not None:
        shape = states_shape(config, target.config.hidden_size)

        def states() -> jax.Array:
            return jax.reshard(jax.random.normal(jax.random.key(0), shape, target.dtype), P(None, BATCH))

        batch["states"] = jax.jit(states)()
    return host, batch


def train_step_of(config: RunConfig, task: Task) -> tuple[optax.GradientTransformation, Any]:
    """The config's optimizer and jitted train step."""
    schedule = learning_rate_schedule(config.optimizer, config.training.steps or DEFAULT_TOTAL_STEPS)
    optimizer = make_optimizer(config.optimizer, schedule)
    return optimizer, make_train_step(task.loss, optimizer, schedule, config.optimizer.ema_decay, task.dropout_seed)


def _compiled(config: RunConfig, task: Task, batch: Batch) -> tuple[Trainer, Report]:
    """The config's train step, compiled for `batch`, and what compiling says of it."""
    optimizer, step = train_step_of(config, task)
    state = TrainState.create(task.model, optimizer, averages=config.optimizer.ema_decay is not None)
    started = time.perf_counter()
    lowered = step.lower(state, task.frozen, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    report = {"trace_s": traced - started, "compile_s": time.perf_counter() - traced}
    memory = compiled.memory_analysis()
    if memory is not None:
        report["memory_arguments_bytes"] = memory.argument_size_in_bytes
        report["memory_temporaries_bytes"] = memory.temp_size_in_bytes
        report["memory_peak_bytes"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Trainer(compiled, state, task.frozen, batch), report


def _shape(config: RunConfig, task: Task, host: dict[str, np.ndarray]) -> Report:
    """What one step consists of."""
    return {
        "batch_size": config.training.batch_size,
        "max_length": config.data.max_length,
        "num_anchors": config.data.num_anchors,
        "block_size": config.draft.block_size,
        "draft": f"{config.draft.num_layers} layers" if config.kind == "dflash" else "adapters",
        "dtype": jnp.dtype(compute_dtype(config)).name,
        "mesh": dict(jax.sharding.get_mesh().shape),
        "target_runs": config.data.taps is None,
        "trained_parameters": sum(x.size for x in jax.tree.leaves(task.model)),
        "tokens_per_step": host["input_ids"].size,
        "anchors_per_step": int(host["anchor_valid"].sum()),
        "flops_per_step": task.flops_per_step,
        "flops_formula": task.flops_formula,
        "peak_flops": flops.peak_flops(config.logging.peak_tflops),
    }


def _speeds(seconds: list[float], shape: Report) -> Report:
    """Times of the steps and the rates at their median; MFU is None where the devices' peak is not known."""
    median = statistics.median(seconds)
    rate, peak = shape["flops_per_step"] / median, shape["peak_flops"]
    return {
        "step_s": spread(seconds),
        "step_all_s": seconds,
        "tokens_per_s": shape["tokens_per_step"] / median,
        "anchors_per_s": shape["anchors_per_step"] / median,
        "tflops_per_s": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
    }
