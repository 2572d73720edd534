"""PEFT adapter folders <-> `LoRAAdapters`: `adapter_config.json`, `adapter_model.safetensors`, in PEFT's own words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax.errors import InputError
from specjax.models.decoder import DecoderConfig
from specjax.models.lora import PROJECTIONS, LoRAAdapters, LoRAConfig
from specjax.models.sharding import mesh_scope
from specjax.weights.config_fields import BOOKKEEPING, ConfigReader, FieldTables, raise_problems, read_json
from specjax.weights.fingerprint import FINGERPRINT_FILE
from specjax.weights.key_tables import ADAPTER_KEYS
from specjax.weights.load import plan_loading, read_planned
from specjax.weights.module_params import abstract_module, flat_params, with_params
from specjax.weights.safetensors_files import model_folder, open_tensors
from specjax.weights.save import json_text, replacing, write_rows

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_model.*",)

PEFT_TYPE, TASK_TYPE = "LORA", "CAUSAL_LM"
ALL_LINEAR = "all-linear"
OUTSIDE_LAYERS = ("lm_head", "model.embed_tokens")

INITIALISATION = "matters before training only"
MERGE = "merge it into its base with peft's merge_and_unload, and give the merged model"

FIELDS = FieldTables(
    ignored={
        "auto_mapping": BOOKKEEPING,
        "corda_config": INITIALISATION,
        "ensure_weight_tying": "concerns adapters of the embedding, which are refused",
        "eva_config": INITIALISATION,
        "inference_mode": "the caller chooses what is trained",
        "loftq_config": INITIALISATION,
        "lora_ga_config": INITIALISATION,
        "megatron_core": "names a library that counts with megatron_config only",
        "peft_version": BOOKKEEPING,
        "qalora_group_size": "counts with use_qalora only",
        "revision": "of the base, which the caller chooses",
    },
    fixed={
        "alora_invocation_tokens": (None,),
        "alpha_pattern": ({}, None),
        "arrow_config": (None,),
        "bias": ("none",),
        "fan_in_fan_out": (False,),
        "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
        "kasa_config": (None,),
        "layer_replication": (None,),
        "layers_pattern": (None, [], ""),
        "layers_to_transform": (None, []),
        "lora_bias": (False,),
        "megatron_config": (None,),
        "modules_to_save": (None, []),
        "monteclora_config": (None,),
        "rank_pattern": ({}, None),
        "target_parameters": (None, []),
        "task_type": (TASK_TYPE, None),
        "trainable_token_indices": (None,),
        "use_bdlora": (None, False),
        "use_dora": (False,),
        "use_qalora": (False,),
        "velora_config": (None,),
    },
    refused={
        "alpha_pattern": f"only one alpha for all projections is supported; {MERGE}",
        "bias": f'biases trained with an adapter are not supported, only "none"; {MERGE}',
        "fan_in_fan_out": "only false is supported: the families read here store their weights as torch.nn.Linear does",
        "init_lora_weights": "this initialisation changes the base as well; save the adapter with peft's "
        "path_initial_model_for_weight_conversion",
        "layers_to_transform": f"only adapters of all layers are supported; {MERGE}",
        "lora_bias": f"biases of adapters are not supported; {MERGE}",
        "modules_to_save": f"modules trained beside the adapter are not supported; {MERGE}",
        "rank_pattern": f"only one rank for all projections is supported; {MERGE}",
        "use_dora": f"DoRA is not supported; {MERGE}",
    },
)


def load_adapters(path_or_id: str | Path, base: DecoderConfig) -> LoRAAdapters:
    """The adapters of a PEFT folder or hub id for a decoder of config `base`, in float32, on the mesh in force.

    Whether they belong to the base is decided by the shapes: the name that the folder gives its base is a path on
    another machine as often as not. An adapter of another model of the same shape is not noticed.

    Raises:
        InputError: lists everything wrong with the folder: unsupported config fields; modules that the base does not
            have; missing, unexpected or misshapen tensors; truncated or absent files; weights that are NaN or infinite.
    """
    folder = model_folder(path_or_id)
    path = folder / ADAPTER_CONFIG_FILE
    if not path.exists():
        raise InputError(f"{path}: no such file; give a folder with an adapter that PEFT saved")
    raw = read_json(path)
    config = adapter_config_from_peft(raw, str(path), base)
    with mesh_scope():
        files = open_tensors(folder, ADAPTER_FILE)
        abstract = abstract_module(lambda: LoRAAdapters(config, base, rngs=nnx.Rngs(0)))
        params = flat_params(abstract)
        plan, problems = plan_loading(files, ADAPTER_KEYS, params, tied=False)
        if problems:
            name = raw.get("base_model_name_or_path")
            hint = f"base_model_name_or_path is {name!r}: " if name else ""
            problems.append(f"{hint}give the base that the adapter was trained on; shapes follow from it and from r")
        raise_problems(str(folder), files.problems + problems)
        return with_params(abstract, read_planned(folder, files, plan, params))


def save_adapters(
    adapters: LoRAAdapters, folder: str | Path, *, base_name: str | None, dtype: Any = jnp.float32
) -> Path:
    """Writes `adapters` in `dtype` so that `peft.PeftModel.from_pretrained` loads them; other files of `folder` stay.

    base_name: path or hub id of the base, by which `peft.AutoPeftModelForCausalLM` finds it; None: unsaid.

    Raises:
        InputError: the folder holds a draft, whose settings would then be said of other adapters.
    """
    if (Path(folder) / FINGERPRINT_FILE).exists():
        raise InputError(f"{folder}: holds a draft, with {FINGERPRINT_FILE}; give a folder of its own")
    return write_adapter_folder(adapters, Path(folder), base_name, jnp.dtype(dtype), {}, ADAPTER_FILES)


def write_adapter_folder(
    adapters: LoRAAdapters,
    folder: Path,
    base_name: str | None,
    dtype: np.dtype,
    others: Mapping[str, bytes],
    owned: tuple[str, ...],
) -> Path:
    """`save_adapters`, with `others`, files by name, that come and go with the adapter; `owned`: see `replacing`."""
    rows = [(*ADAPTER_KEYS.to_file(path), array) for path, array in flat_params(adapters).items()]
    with mesh_scope(), replacing(folder, owned, ADAPTER_CONFIG_FILE) as new:
        write_rows(None if new is None else new / ADAPTER_FILE, rows, dtype)
        if new is not None:
            for name, content in others.items():
                (new / name).write_bytes(content)
            (new / ADAPTER_CONFIG_FILE).write_bytes(json_text(adapter_config_to_peft(adapters.config, base_name)))
    return folder


def adapter_base_name(folder: Path) -> str | None:
    """The base that an adapter's folder names, by path or hub id; None where it names none, or is no adapter's."""
    path = folder / ADAPTER_CONFIG_FILE
    name = read_json(path).get("base_model_name_or_path") if path.exists() else None
    return name if isinstance(name, str) else None


def adapter_config_from_peft(raw: Mapping[str, Any], source: str, base: DecoderConfig) -> LoRAConfig:
    """The LoRAConfig that an `adapter_config.json` describes for `base`; `source` names the file in errors.

    Raises:
        InputError: lists every field that is missing, malformed, unknown, or names something not built here.
    """
    if raw.get("peft_type") != PEFT_TYPE:
        raise InputError(
            f"{source}: peft_type is {raw.get('peft_type')!r}; only {PEFT_TYPE} adapters are supported: {MERGE}"
        )
    reader = ConfigReader(raw, source, FIELDS)
    reader.used |= {"peft_type", "base_model_name_or_path"}
    r, alpha = reader.integer("r"), reader.number("lora_alpha")
    if not math.isfinite(alpha):
        reader.problem("lora_alpha", "must be finite")
    dropout = reader.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        reader.problem("lora_dropout", "must be a number of at least 0 and below 1")
    rslora = reader.boolean("use_rslora", False)
    modules = _target_modules(reader, base.num_hidden_layers)
    reader.finish()
    return LoRAConfig(r, alpha, float(dropout), rslora, modules)


def adapter_config_to_peft(config: LoRAConfig, base_name: str | None) -> dict[str, Any]:
    """The `adapter_config.json` object; what it does not name has PEFT's default, which is what is built here."""
    return {
        "peft_type": PEFT_TYPE,
        "task_type": TASK_TYPE,
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _target_modules(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    """The projections that `target_modules` and `exclude_modules` pick by PEFT's rules; the same in every layer."""
    wanted, excluded = reader.get("target_modules"), reader.get("exclude_modules")
    if wanted is not None and isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        wanted = list(PROJECTIONS)
    before = len(reader.problems)
    _check_pattern(reader, "target_modules", wanted)
    _check_pattern(reader, "exclude_modules", excluded or [])
    if len(reader.problems) > before:
        return tuple(PROJECTIONS)

    paths = {
        name: [f"model.layers.{i}.{parent}.{name}" for i in range(num_layers)] for name, parent in PROJECTIONS.items()
    }
    known = [*OUTSIDE_LAYERS, *(path for of_name in paths.values() for path in of_name)]
    absent = [] if isinstance(wanted, str) else [x for x in wanted if not any(_picks([x], path) for path in known)]
    picked = {path for path in known if _picks(wanted, path) and not _picks(excluded or [], path)}
    outside = sorted(picked & set(OUTSIDE_LAYERS))
    partly = [name for name in PROJECTIONS if 0 < len(picked & set(paths[name])) < num_layers]
    modules = tuple(name for name in PROJECTIONS if paths[name][0] in picked)
    supported = f"supported are {', '.join(PROJECTIONS)}, each in every layer"
    if absent:
        reader.problem("target_modules", f"the base has no {', '.join(absent)}; {supported}")
    if outside:
        reader.problem("target_modules", f"picks {', '.join(outside)}; {supported}")
    if partly:
        reader.problem("target_modules", f"picks {', '.join(partly)} in some of {num_layers} layers; {supported}")
    if not (absent or outside or partly or modules):
        reader.problem("target_modules", f"picks nothing of the base; {supported}")
    return modules or tuple(PROJECTIONS)


def _check_pattern(reader: ConfigReader, name: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            reader.problem(name, f"is no regular expression ({error})")
    elif not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        reader.problem(name, f"must be a list of module names, a regular expression or {ALL_LINEAR!r}")


def _picks(pattern: str | list[str], path: str) -> bool:
    """Whether PEFT's pattern, a regular expression or the ends of paths, picks the module at `path`."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == end or path.endswith(f".{end}") for end in pattern)
