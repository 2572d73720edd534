"""A training run from its config: mesh, models, data, step, loop."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from specjax.blockdiff.terms import needs_teacher
from specjax.config import RunConfig, dump_config, load_config
from specjax.data.pipeline import TrainingData, fixed_batches
from specjax.data.taps import TapCache, TapRecipe
from specjax.errors import InputError
from specjax.metadata import run_metadata
from specjax.models.decoder import Decoder, DecoderConfig, check_mesh_fits
from specjax.models.dflash import DFlashConfig, DFlashDraft, default_target_layer_ids
from specjax.models.precision import matmul_precision
from specjax.models.sharding import make_mesh
from specjax.training import flops
from specjax.training.checkpoints import Checkpoints
from specjax.training.data import RunData, examples_of, open_data
from specjax.training.evaluation import causal_lm_evaluator, draft_evaluator
from specjax.training.loop import Loop, Plan, data_share
from specjax.training.metrics import Metrics, MetricsWriter
from specjax.training.objectives import BlockDiffusionLoss, CausalLMLoss
from specjax.training.optimizer import learning_rate_schedule, make_optimizer
from specjax.training.state import TrainState
from specjax.training.step import LossFunction, make_train_step
from specjax.weights import (
    decoder_config_to_hf,
    draft_config_to_hf,
    load_target,
    model_folder,
    read_target_config,
    target_digest,
    target_fingerprint,
)
from specjax.weights.config_fields import read_json
from specjax.weights.load import CONFIG_FILE as MODEL_CONFIG_FILE
from specjax.weights.orbax_checkpoint import RUN_DRAFT_CONFIG, RUN_TARGET_CONFIG, latest_step
from specjax.weights.side_files import copy_side_files, unshaping_fields
from specjax.weights.tokenizer import load_tokenizer, resolve_mask_token_id, stop_token_ids

CONFIG_FILE = "config.yaml"
METADATA_FILE = "metadata.json"
DATA_FILE = "data.json"
TARGET_FILE = "target.json"
# Sections that a resumed run may change: they do not touch the sequence of updates.
FREE_ON_RESUME = ("checkpoint", "evaluation", "logging", "mesh", "output_dir")


@dataclass(frozen=True)
class Task:
    """What differs between training a draft and training a decoder."""

    model: nnx.Module
    loss: LossFunction[Any]
    frozen: Any
    evaluator: Callable[[list[Any]], Callable[[Any], tuple[Metrics, float]]]
    flops_per_step: float
    flops_formula: str
    num_anchors: int | None
    files: dict[str, Any]


def train(config: RunConfig, *, resume: bool = False) -> Path:
    """Runs `config` to its end, or to the first SIGINT or SIGTERM, and returns the run folder.

    resume: continue the run in `output_dir` from its latest checkpoint (or start it, if there is none).

    Raises:
        InputError: anything wrong with config, target, data or an existing `output_dir`.
    """
    if "://" in config.output_dir:
        raise InputError(f"output_dir {config.output_dir}: is a URL; mount the bucket and give its folder")
    run = Path(config.output_dir)
    _on_first_process(lambda: _check_output(run, config, resume))
    with mesh_of(config), matmul_precision(compute_dtype(config)):
        records = open_data(config)  # before the target, whose loading may take minutes
        task = draft_task(config) if config.kind == "dflash" else causal_lm_task(config)
        data, validation = read_data(config, task, records)
        total = config.training.steps or data.num_steps
        assert total is not None
        files = task.files | {DATA_FILE: records.identity()}
        _on_first_process(lambda: _write_files(run, config, files))
        _fit(config, run, task, data, validation, total)
    return run


def _fit(config: RunConfig, run: Path, task: Task, data: TrainingData, validation: list[Any], total: int) -> None:
    schedule = learning_rate_schedule(config.optimizer, total)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = TrainState.create(task.model, optimizer)
    kept = config.checkpoint
    with Checkpoints(run, keep_last=kept.keep_last, keep_best=kept.keep_best) as checkpoints:
        first = checkpoints.latest_step or 0
        if first:
            state = checkpoints.restore(state)
        writer = MetricsWriter(
            run,
            total_steps=total,
            first_step=first,
            tensorboard=config.logging.tensorboard,
            active=jax.process_index() == 0,
        )
        with contextlib.closing(writer):
            writer.say(f"{run}: {config.kind}, steps {first} to {total}, {_size(state.model):,} trained parameters")
            plan = _plan(config, task, total)
            if plan.peak_flops is not None:
                writer.say(f"mfu: {plan.flops_per_step:.3e} FLOPs a step = {task.flops_formula}")
            loop = Loop(
                plan=plan,
                step=make_train_step(task.loss, optimizer, schedule),
                frozen=task.frozen,
                checkpoints=checkpoints,
                writer=writer,
                evaluate=task.evaluator(validation) if validation else None,
            )
            if first < total:
                loop.run(state, first, data.batches(first))


def _plan(config: RunConfig, task: Task, total: int) -> Plan:
    return Plan(
        total_steps=total,
        accumulation_steps=config.training.accumulation_steps,
        log_every=config.logging.every_steps,
        checkpoint_every=config.checkpoint.every_steps,
        evaluate_every=config.evaluation.every_steps,
        tokens_per_step=config.training.batch_size * config.data.max_length,
        flops_per_step=task.flops_per_step,
        peak_flops=flops.peak_flops(config.logging.peak_tflops),
    )


def draft_task(config: RunConfig) -> Task:
    """A fresh draft on the mesh in force, with the frozen target that teaches it."""
    dtype = compute_dtype(config)
    draft_config = draft_config_of(config)
    _check_mesh(read_target_config(config.target.path))
    target = load_target(config.target.path, dtype=dtype)
    loss = BlockDiffusionLoss(
        objective=config.loss.objective,
        weighting=config.loss.weighting,
        gamma=config.gamma,
        alpha=config.loss.alpha,
        cumulative_mask=config.loss.cumulative_mask,
        chunk_blocks=config.loss.chunk_blocks,
        query_chunk=config.training.attention_chunk,
        remat=config.training.remat,
    )
    tokenizer = load_tokenizer(config.target.path)
    fingerprint = target_fingerprint(
        target,
        chat_template=None if tokenizer is None else tokenizer.get_chat_template() if tokenizer.chat_template else None,
        thinking=json.dumps(config.data.chat_template_kwargs, sort_keys=True),
    )
    return Task(
        model=jax.jit(lambda: DFlashDraft(draft_config, rngs=nnx.Rngs(config.seed), dtype=dtype))(),
        loss=loss,
        frozen=target,
        evaluator=lambda batches: draft_evaluator(loss, target, batches),
        flops_per_step=flops.dflash_step_flops(
            target.config,
            draft_config,
            _shape(config),
            runs_target=config.data.taps is None,
            teacher=needs_teacher(config.loss.objective),
        ),
        flops_formula=flops.DFLASH_FORMULA,
        num_anchors=config.data.num_anchors,
        files={
            RUN_DRAFT_CONFIG: draft_config_to_hf(draft_config),
            "specjax.json": fingerprint.to_json(),
            TARGET_FILE: {"digest": target_digest(config.target.path)},
        },
    )


def draft_config_of(config: RunConfig) -> DFlashConfig:
    """The draft's architecture: the config's settings, completed from the target's."""
    target = read_target_config(config.target.path)
    draft = config.draft
    try:
        taps = draft.target_layer_ids or default_target_layer_ids(target.num_hidden_layers, draft.num_taps or 0)
        return DFlashConfig.for_target(
            target,
            num_layers=draft.num_layers,
            block_size=draft.block_size,
            mask_token_id=resolve_mask_token_id(
                draft.mask_token_id,
                load_tokenizer(config.target.path),
                target.vocab_size,
                stop_token_ids(config.target.path),
            ),
            target_layer_ids=tuple(taps),
            sliding_window=draft.sliding_window,
        )
    except ValueError as error:
        raise InputError(f"draft: {error}") from error


def causal_lm_task(config: RunConfig) -> Task:
    """The target itself, random or with its weights, on the mesh in force."""
    dtype = compute_dtype(config)
    folder = model_folder(config.target.path)
    target_config = read_target_config(folder)
    _check_mesh(target_config)
    files = {RUN_TARGET_CONFIG: decoder_config_to_hf(target_config) | unshaping_fields(folder / MODEL_CONFIG_FILE)}
    if config.target.init == "random":
        model = jax.jit(lambda: Decoder(target_config, rngs=nnx.Rngs(config.seed), dtype=dtype))()
    else:
        model = load_target(config.target.path, dtype=dtype, param_dtype=jnp.float32)
        files[TARGET_FILE] = {"digest": target_digest(config.target.path)}
    loss = CausalLMLoss(query_chunk=config.training.attention_chunk, remat=config.training.remat)
    return Task(
        model=model,
        loss=loss,
        frozen=None,
        evaluator=lambda batches: causal_lm_evaluator(loss, batches),
        flops_per_step=flops.causal_lm_step_flops(target_config, _shape(config)),
        flops_formula=flops.CAUSAL_LM_FORMULA,
        num_anchors=None,
        files=files,
    )


def _check_mesh(target: DecoderConfig) -> None:
    try:
        check_mesh_fits(target)
    except ValueError as error:
        raise InputError(f"mesh: {error}") from error


def _shape(config: RunConfig) -> flops.StepShape:
    return flops.StepShape(config.training.batch_size, config.data.max_length, config.data.num_anchors)


def read_data(config: RunConfig, task: Task, records: RunData) -> tuple[TrainingData, list[Any]]:
    """This process's share of the training batches, and of the evaluation batches (none without validation data)."""
    check_batch_size(config)
    examples = examples_of(config, records.train)
    taps = None
    if config.data.taps is not None:
        captured, order = records.train.distinct()
        taps = TapCache(config.data.taps, tap_recipe(config, len(captured)), order)
    share, shares = data_share()
    data = TrainingData(
        examples,
        batch_size=config.training.batch_size,
        max_length=config.data.max_length,
        num_anchors=task.num_anchors,
        seed=config.seed,
        epochs=None if config.training.steps else config.training.epochs,
        packing=config.data.packing,
        taps=taps,
        process_index=share,
        process_count=shares,
    )
    if records.validation is None:
        return data, []
    validation = fixed_batches(
        examples_of(config, records.validation),
        config.evaluation.samples,
        batch_size=config.training.batch_size // config.training.accumulation_steps,
        max_length=config.data.max_length,
        num_anchors=task.num_anchors,
        process_index=share,
        process_count=shares,
    )
    return data, validation


def check_batch_size(config: RunConfig) -> None:
    """Raises InputError unless the mesh in force and the micro-batches share a batch evenly."""
    axes = jax.sharding.get_mesh().shape
    rows = axes["data"] * axes["fsdp"] * config.training.accumulation_steps
    if config.training.batch_size % rows:
        raise InputError(
            f"training.batch_size is {config.training.batch_size}: not a multiple of {rows} "
            "(mesh data * fsdp * training.accumulation_steps)"
        )


def tap_recipe(config: RunConfig, examples: int) -> TapRecipe:
    """What the taps of the config's `examples` distinct training examples are made of."""
    return TapRecipe(
        target=target_digest(config.target.path),
        target_layer_ids=draft_config_of(config).target_layer_ids,
        dtype=jnp.dtype(compute_dtype(config)).name,
        max_length=config.data.max_length,
        examples=examples,
        reasoning=config.data.reasoning,
        validation_fraction=config.data.validation_fraction,
    )


def compute_dtype(config: RunConfig) -> Any:
    """`target.dtype`, with auto resolved: bfloat16 on accelerators, float32 on CPU."""
    if config.target.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.target.dtype)


@contextlib.contextmanager
def mesh_of(config: RunConfig) -> Iterator[None]:
    """The config's mesh over all devices, in force."""
    mesh, devices = config.mesh, jax.device_count()
    data = mesh.data if mesh.data > 0 else devices // (mesh.fsdp * mesh.tensor)
    if data * mesh.fsdp * mesh.tensor != devices:
        raise InputError(
            f"mesh data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor}: does not divide the {devices} devices here"
        )
    with jax.set_mesh(make_mesh(data, mesh.fsdp, mesh.tensor)):
        yield


def _check_output(run: Path, config: RunConfig, resume: bool) -> None:
    previous = run / CONFIG_FILE
    if latest_step(run) is None:
        if previous.exists() and not (run / METADATA_FILE).exists():
            raise InputError(f"output_dir {run}: {CONFIG_FILE} in it is not of a run; choose another folder")
        return
    if not resume:
        raise InputError(f"output_dir {run} already holds a run; continue it with --resume, or choose another folder")
    old, new = load_config(previous).model_dump(), config.model_dump()
    for settings in (old, new):
        del settings["data"]["taps"]  # the losses are the same with and without
    changed = [name for name in old if name not in FREE_ON_RESUME and old[name] != new[name]]
    if changed:
        raise InputError(
            f"{previous}: the run to resume differs in {', '.join(changed)}; restore these settings or choose another "
            "output_dir"
        )


def _write_files(run: Path, config: RunConfig, files: dict[str, Any]) -> None:
    """Checks what a run to resume was made from, then records it. What never saved a step is simply replaced."""
    resumes = latest_step(run) is not None
    for name, value in files.items():
        path = run / name
        if resumes and path.exists() and read_json(path) != json.loads(json.dumps(value)):
            changed = (
                "other files of data.train or data.validation than there are now; restore them"
                if name == DATA_FILE
                else f"another target or mask token than {config.target.path} has now; restore it"
            )
            raise InputError(f"{path}: the run to resume was made with {changed} or choose another output_dir")
    try:
        run.mkdir(parents=True, exist_ok=True)
        if config.kind == "causal_lm":
            copy_side_files(model_folder(config.target.path), run)
        for name, value in (files | {METADATA_FILE: run_metadata()}).items():
            (run / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        # Last: without the metadata it is a file of the user's, which must not be replaced.
        (run / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise InputError(f"output_dir {run}: cannot be written ({error.strerror}); choose another folder") from error


def _on_first_process(action: Callable[[], None]) -> None:
    """Runs `action` on process 0 alone; where it fails, all processes do, and none waits for another."""
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:  # noqa: BLE001 (raised below, once the others know)
            failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.array(failure is not None))
        if failed and failure is None:
            failure = InputError("process 0 refused the run; its message says why")
    if failure is not None:
        raise failure


def _size(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(model))
