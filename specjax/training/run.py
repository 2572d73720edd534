"""A training run from its config: mesh, models, data, step, loop."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from specjax.blockdiff.anchors import PureContext
from specjax.blockdiff.noise import BlockNoise
from specjax.config import RunConfig, dump_config, load_config
from specjax.config_messages import shown
from specjax.data.pipeline import TrainingData, fixed_batches, fixed_prompts
from specjax.data.taps import TapCache, TapRecipe
from specjax.errors import InputError
from specjax.metadata import run_metadata
from specjax.models.precision import matmul_precision
from specjax.models.sharding import make_mesh
from specjax.training import flops
from specjax.training.checkpoints import Checkpoints
from specjax.training.data import RunData, answer_warnings, examples_of, open_data
from specjax.training.evaluation import Answers, Generate
from specjax.training.loop import Loop, Plan, data_share
from specjax.training.metrics import Evaluation, MetricsWriter
from specjax.training.optimizer import learning_rate_schedule, make_optimizer
from specjax.training.state import TrainState
from specjax.training.step import make_train_step
from specjax.training.tasks import Task, causal_lm_task, compute_dtype, draft_config_of, draft_task
from specjax.weights import model_folder, model_name, read_fingerprint, read_target_config, target_digest
from specjax.weights.config_fields import read_json
from specjax.weights.fingerprint import FINGERPRINT_FILE, RECORDED, TargetFingerprint
from specjax.weights.orbax_checkpoint import RUN_DRAFT_CONFIG, latest_step
from specjax.weights.side_files import copy_side_files
from specjax.weights.tokenizer import load_tokenizer, stop_token_ids

CONFIG_FILE = "config.yaml"
METADATA_FILE = "metadata.json"
TARGET_NAME = "target"  # in the metadata: by which the export says of what model it is
DATA_FILE = "data.json"
# Sections, and settings of others, that a resumed run may change: they touch the sequence of updates by rounding alone.
FREE_ON_RESUME = ("checkpoint", "evaluation", "logging", "mesh", "output_dir")
FREE_SETTINGS = (("data", "taps"), ("loss", "chunk_blocks"), ("training", "attention_chunk"))


def train(config: RunConfig, *, generate: Generate | None = None, resume: bool = False) -> Path:
    """Runs `config` to its end, or to the first SIGINT or SIGTERM, and returns the run folder.

    generate: `decoding.generate`, for evaluation by answers; None leaves only the teacher-forced measures.
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
        task = causal_lm_task(config) if config.kind == "causal_lm" else draft_task(config)
        data, validation = read_data(config, task, records)
        total = config.training.steps or data.num_steps
        assert total is not None
        files = task.files | {DATA_FILE: records.identity()}
        _on_first_process(lambda: _write_files(run, config, files))
        answers = held_out_answers(config, records, generate) if validation and generate is not None else None
        evaluate = task.evaluator(validation, answers) if validation else None
        warnings = [] if config.kind == "causal_lm" else answer_warnings(config, records)
        _fit(config, run, task, data, evaluate, total, warnings)
    return run


def _fit(
    config: RunConfig,
    run: Path,
    task: Task,
    data: TrainingData,
    evaluate: Callable[[Any], Evaluation] | None,
    total: int,
    warnings: list[str],
) -> None:
    schedule = learning_rate_schedule(config.optimizer, total)
    optimizer = make_optimizer(config.optimizer, schedule)
    averages = config.optimizer.ema_decay is not None
    state = TrainState.create(task.model, optimizer, averages=averages)
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
            for warning in warnings:
                writer.say(f"warning: {warning}")
            plan = _plan(config, task, total)
            if plan.peak_flops is not None:
                writer.say(f"mfu: {plan.flops_per_step:.3e} FLOPs a step = {task.flops_formula}")
            loop = Loop(
                plan=plan,
                step=make_train_step(task.loss, optimizer, schedule, config.optimizer.ema_decay, task.dropout_seed),
                frozen=task.frozen,
                checkpoints=checkpoints,
                writer=writer,
                evaluate=evaluate,
            )
            if first < total:
                loop.run(state, first, data.batches(first))
            if checkpoints.latest_step == total:
                writer.say(f"{run}: done; export it with: python -m converters.flax_to_hf {run} OUT")


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
        noise=block_noise(config),
        context=PureContext(config.data.context_len, config.data.context_ratio),
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


def block_noise(config: RunConfig) -> BlockNoise | None:
    """What the training blocks show but for their anchors; None: nothing, and every anchor."""
    noise = config.noise
    if noise.revealed == "none" and not config.lora.masked_anchor:
        return None
    value = noise.fraction or noise.probability or 0.0
    return BlockNoise(noise.revealed, value, config.draft.block_size, config.lora.masked_anchor)


def held_out_answers(config: RunConfig, records: RunData, generate: Generate) -> Answers | None:
    """The validation prompts that evaluation answers; None for a decoder and for evaluation.prompts 0."""
    settings = config.evaluation
    if config.kind == "causal_lm" or not settings.prompts:
        return None
    assert records.validation is not None
    limit = read_target_config(config.target.path).max_position_embeddings
    longest = min(config.data.max_length, limit - settings.max_new_tokens)
    prompts = fixed_prompts(examples_of(config, records.validation), settings.prompts, longest=longest)
    if not prompts:
        raise InputError(
            f"validation data: no sample has a prompt of at most {longest} tokens before its first supervised one "
            f"(of a context of {limit}, evaluation.max_new_tokens takes {settings.max_new_tokens}); give such samples, "
            "or set evaluation.prompts=0"
        )
    tokenizer = load_tokenizer(config.target.path)
    return Answers(
        generate,
        prompts,
        settings.max_new_tokens,
        stop_token_ids(config.target.path),
        (lambda ids: " ".join(map(str, ids))) if tokenizer is None else tokenizer.decode,
    )


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


@contextlib.contextmanager
def mesh_of(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Iterator[jax.sharding.Mesh]:
    """The config's mesh over all devices, or those given, in force."""
    mesh, devices = config.mesh, jax.devices() if devices is None else devices
    data = mesh.data if mesh.data > 0 else len(devices) // (mesh.fsdp * mesh.tensor)
    if data * mesh.fsdp * mesh.tensor != len(devices):
        raise InputError(
            f"mesh data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor}: does not divide the {len(devices)} devices"
        )
    made = make_mesh(data, mesh.fsdp, mesh.tensor, devices)
    with jax.set_mesh(made):
        yield made


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
        for section, name in FREE_SETTINGS:
            if settings[section] is not None:
                del settings[section][name]
    changed = [line for name in old if name not in FREE_ON_RESUME for line in _differences(name, old[name], new[name])]
    if changed:
        raise InputError(
            f"{previous}: the run to resume has other settings: {'; '.join(changed)}; restore them or choose another "
            "output_dir"
        )


def _differences(name: str, old: Any, new: Any) -> list[str]:
    """`section.key is OLD, now NEW` of every setting that differs."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [line for key in old for line in _differences(f"{name}.{key}", old[key], new[key])]
    return [] if old == new else [f"{name} is {shown(old)}, now {shown(new)}"]


def _write_files(run: Path, config: RunConfig, files: dict[str, Any]) -> None:
    """Checks what a run to resume was made from, then records it. What never saved a step is simply replaced."""
    resumes = latest_step(run) is not None
    for name, value in files.items():
        path = run / name
        if resumes and path.exists() and not _same(path, value):
            changed = f"another target or mask token than {config.target.path} has now; restore it"
            if name == DATA_FILE:
                changed = "other files of data.train or data.validation than there are now; restore them"
            elif config.kind == "lora" and name == RUN_DRAFT_CONFIG:
                found = [_differences(key, old, value[key]) for key, old in read_json(path).items() if key in value]
                changed = f"other adapters: {'; '.join(chain(*found))}; restore them"
            raise InputError(f"{path}: the run to resume was made with {changed} or choose another output_dir")
    metadata = run_metadata() | {TARGET_NAME: model_name(config.target.path)}
    try:
        run.mkdir(parents=True, exist_ok=True)
        if config.kind == "causal_lm":
            copy_side_files(model_folder(config.target.path), run)
        for name, value in (files | {METADATA_FILE: metadata}).items():
            (run / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        # Last: without the metadata it is a file of the user's, which must not be replaced.
        (run / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise InputError(f"output_dir {run}: cannot be written ({error.strerror}); choose another folder") from error


def _same(path: Path, value: Any) -> bool:
    """Whether the file at `path` says what is to be written there."""
    if path.name == FINGERPRINT_FILE:
        recorded = read_fingerprint(path.parent)
        return recorded is None or not recorded.differs(TargetFingerprint(**value[RECORDED]))
    return bool(read_json(path) == json.loads(json.dumps(value)))


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
