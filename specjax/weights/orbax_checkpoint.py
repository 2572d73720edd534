"""Orbax checkpoints: converted models (`CHECKPOINT/config.json` + `CHECKPOINT/checkpoint/`) and training runs.

A run folder holds `draft_config.json` or `target_config.json` (what the exported config.json will be; of a LoRA draft
its settings, with the target's config in `lora_base.json`) and `checkpoints/STEP/`, written by
`orbax.checkpoint.v1.training.Checkpointer`. In both, the checkpointable `params` is `flat_params(module)`: arrays by
dotted path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from specjax.errors import InputError
from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import mesh_scope
from specjax.weights.config_fields import raise_problems, read_json
from specjax.weights.draft_config import draft_config_from_hf, is_draft_config
from specjax.weights.hf_config import decoder_config_from_hf
from specjax.weights.load import CONFIG_FILE
from specjax.weights.lora_draft_folder import is_lora_draft_config, lora_draft_config_from_json
from specjax.weights.module_params import Module, abstract_module, flat_params, with_params

PARAMS = "params"
CHECKPOINT = "checkpoint"
RUN_CHECKPOINTS = "checkpoints"
RUN_DRAFT_CONFIG = "draft_config.json"
RUN_TARGET_CONFIG = "target_config.json"
RUN_LORA_BASE = "lora_base.json"  # the config.json of a LoRA draft's target, from which the draft has its shapes
WRITE_BYTES = 2**30  # that wait in copies to be written, on each host
SCORE = "score"  # the metric, higher is better, by which a run's best checkpoint is chosen


def save_checkpoint(module: nnx.Module, folder: str | Path, config: Mapping[str, Any]) -> Path:
    """Writes `module` as an Orbax checkpoint with its Hugging Face style `config`."""
    folder = Path(folder)
    # The first process looks for all: another's answer would depend on whether the folder was already made.
    if multihost_utils.broadcast_one_to_all(folder.exists()):
        raise InputError(f"{folder}: exists; give a new folder")
    if jax.process_index() == 0:
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    params, context = flat_params(module), ocp.Context()
    # Without a limit all tensors are copied before the first is written; it must exceed every single one.
    context.memory.write_concurrent_bytes = max(WRITE_BYTES, *(x.nbytes + 1 for x in params.values()))
    with mesh_scope(), context:
        ocp.save_checkpointables((folder / CHECKPOINT).absolute(), {PARAMS: params})
    return folder


def load_checkpoint(folder: str | Path, *, dtype: Any = jnp.bfloat16) -> Decoder | DFlashDraft:
    """The model `save_checkpoint` wrote, in `dtype`, on the mesh in force."""
    folder = Path(folder)
    config = folder / CONFIG_FILE
    return _load(folder / CHECKPOINT, config, _build(config, dtype))


def checkpoint_dtype(folder: str | Path) -> Any:
    """The widest dtype among a converted checkpoint's parameters, which holds all of them exactly."""
    metadata = _params_metadata(Path(folder) / CHECKPOINT)
    return jnp.result_type(*{jnp.dtype(leaf.dtype) for leaf in metadata.values()})


def load_run_params(
    run_folder: str | Path, step: Literal["best"] | int | None = None, *, dtype: Any = jnp.float32
) -> Decoder | DFlashDraft | LoRADraft:
    """The model a training run saved at `step` (None: the latest; "best": the highest `score` metric).

    dtype: compute dtype, also of the parameters; a LoRA draft's are float32, computed with in its target's dtype.

    Raises:
        InputError: the folder is no run, or has no such checkpoint (those it has are listed).
    """
    run = Path(run_folder)
    configs = [run / name for name in (RUN_DRAFT_CONFIG, RUN_TARGET_CONFIG) if (run / name).exists()]
    if not configs or not (run / RUN_CHECKPOINTS).is_dir():
        raise InputError(f"{run}: no training run ({RUN_DRAFT_CONFIG} or {RUN_TARGET_CONFIG}, and {RUN_CHECKPOINTS}/)")
    config, checkpoint = configs[0], checkpoint_path(run, step)
    if is_lora_draft_config(read_json(config)):
        return _load(checkpoint, config, _build_lora(config))
    return _load(checkpoint, config, _build(config, dtype))


def load_run_draft(
    run_folder: str | Path, step: Literal["best"] | int | None = None, *, dtype: Any = jnp.float32
) -> DFlashDraft | LoRADraft:
    """The draft a training run saved; arguments and errors as `load_run_params`'s, and a run of another kind."""
    model = load_run_params(run_folder, step, dtype=dtype)
    if isinstance(model, Decoder):
        raise InputError(f"{run_folder}: is a run that trained a target, not a draft")
    return model


def read_run_draft_config(run_folder: str | Path) -> DFlashConfig | LoRADraftConfig:
    """The configuration of the draft that a training run trains, without its weights.

    Raises:
        InputError: the run has none, or it cannot be read.
    """
    file = Path(run_folder) / RUN_DRAFT_CONFIG
    raw = read_json(file)
    if is_lora_draft_config(raw):
        return lora_draft_config_from_json(raw, str(file), _lora_base(file))
    return draft_config_from_hf(raw, str(file))


def _lora_base(config_file: Path) -> DecoderConfig:
    """The config of the target of the LoRA draft that a run's `config_file` describes."""
    file = config_file.parent / RUN_LORA_BASE
    if not file.exists():
        raise InputError(f"{file}: no such file; the run of a LoRA draft holds its target's config.json there")
    return decoder_config_from_hf(read_json(file), str(file))


def latest_step(run: Path) -> int | None:
    """The last step that a run has saved, read from the names of its folders; None before the first."""
    folder = run / RUN_CHECKPOINTS
    steps = (int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else ()
    return max(steps, default=None)


def checkpoint_path(run: Path, step: Literal["best"] | int | None) -> Path:
    """The folder of a run's checkpoint; errors as `load_run_params`'s."""
    with ocp.training.Checkpointer((run / RUN_CHECKPOINTS).absolute()) as checkpointer:
        saved = list(checkpointer.checkpoints)
    if step == "best":
        found = [c for c in saved if c.metrics and SCORE in c.metrics]
        found = sorted(found, key=lambda c: (c.metrics[SCORE], c.step))[-1:]
    else:
        found = [c for c in saved if step is None or c.step == step][-1:]
    if not found:
        wanted = "latest checkpoint" if step is None else f"checkpoint {step!r}"
        steps = ", ".join(str(c.step) for c in saved) or "none"
        why = " (none was evaluated: the run has no validation data)" if saved and step == "best" else ""
        raise InputError(f"{run}: has no {wanted}{why}; saved steps: {steps}")
    return Path(found[0].path)


def _build(config_file: Path, dtype: Any) -> Callable[..., Decoder | DFlashDraft]:
    raw, source = read_json(config_file), str(config_file)
    same = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    if is_draft_config(raw):
        return partial(DFlashDraft, draft_config_from_hf(raw, source), **same)
    return partial(Decoder, decoder_config_from_hf(raw, source), **same)


def _build_lora(config_file: Path) -> Callable[..., LoRADraft]:
    base = _lora_base(config_file)
    config = lora_draft_config_from_json(read_json(config_file), str(config_file), base)
    return partial(LoRADraft, config, base)


def _load(checkpoint: Path, config_file: Path, build: Callable[..., Module]) -> Module:
    with mesh_scope():
        abstract = abstract_module(lambda: build(rngs=nnx.Rngs(0)))
        params = flat_params(abstract)
        _check_shapes(checkpoint, config_file, params)
        restored = ocp.load_checkpointables(checkpoint.absolute(), {PARAMS: params})
        return with_params(abstract, restored[PARAMS])


def _check_shapes(checkpoint: Path, config_file: Path, params: Mapping[str, jax.Array]) -> None:
    """Raises InputError unless the checkpoint holds the arrays the config describes (Orbax would say so less well)."""
    saved = {path: tuple(leaf.shape) for path, leaf in _params_metadata(checkpoint).items()}
    wanted = {path: tuple(param.shape) for path, param in params.items()}
    problems = [f"missing {path}" for path in wanted if path not in saved]
    problems += [f"unexpected {path}" for path in saved if path not in wanted]
    problems += [
        f"{path}: shape {list(saved[path])}, {config_file.name} makes it {list(shape)}"
        for path, shape in wanted.items()
        if saved.get(path, shape) != shape
    ]
    raise_problems(f"{checkpoint}: is not a checkpoint of {config_file.name}'s model", problems)


def _params_metadata(checkpoint: Path) -> dict[str, Any]:
    try:
        metadata = ocp.checkpointables_metadata(checkpoint.absolute()).metadata[PARAMS]
    except (ValueError, KeyError, FileNotFoundError, ocp.errors.InvalidLayoutError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{checkpoint}: holds no readable {PARAMS!r} ({reason})") from error
    return dict(metadata)
