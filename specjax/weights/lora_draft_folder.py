"""LoRA draft folders: a PEFT adapter folder, and beside it what PEFT has no field for.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's own, so `peft` loads the folder as it is. The draft's
settings stand in `specjax.json`, which it passes over, and an own embedding of MASK in `mask_embedding.pt`. In a
training run one JSON object holds both halves of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax.errors import InputError
from specjax.models.decoder import DecoderConfig
from specjax.models.dflash import TOKEN_ID_LIMIT
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import SPECS, mesh_scope, put
from specjax.weights.config_fields import ConfigReader, FieldTables, read_json
from specjax.weights.draft_config import MASK_EMBEDDING
from specjax.weights.fingerprint import FINGERPRINT_FILE, UNKNOWN, TargetFingerprint
from specjax.weights.mask_embedding_file import MASK_EMBEDDING_FILE, mask_embedding_bytes, read_mask_embedding
from specjax.weights.module_params import abstract_module, flat_params, with_params
from specjax.weights.peft import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILES,
    adapter_config_from_peft,
    adapter_config_to_peft,
    load_adapters,
    write_adapter_folder,
)
from specjax.weights.save import host_array, json_text

ADAPTER, DRAFT = "adapter", "draft"  # PEFT's words, and the draft's settings
SETTINGS = ("block_size", "mask_token_id", "own_mask_embedding", "masked_anchor", "adapt_context")
ADAPTERS = "adapters."  # of the names of a draft's parameters


def is_lora_draft_config(raw: Mapping[str, Any]) -> bool:
    """Whether a run's `draft_config.json` describes a LoRA draft rather than a DFlash draft."""
    return ADAPTER in raw


def is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_FILE).exists()


def lora_draft_config_to_json(config: LoRADraftConfig) -> dict[str, Any]:
    """`adapter`: an adapter_config.json object without its base's name; `draft`: the draft's settings."""
    return {ADAPTER: adapter_config_to_peft(config.lora, None), DRAFT: _settings_to_json(config)}


def lora_draft_config_from_json(raw: Mapping[str, Any], source: str, base: DecoderConfig) -> LoRADraftConfig:
    """What `lora_draft_config_to_json` was given, for a target of config `base`; `source` names the file in errors.

    Raises:
        InputError: lists every field that is missing, malformed or unknown.
    """
    adapter = raw.get(ADAPTER)
    if not isinstance(adapter, dict):
        raise InputError(f"{source}: {ADAPTER} is {adapter!r}; it must be an object, as in an {ADAPTER_CONFIG_FILE}")
    return _config(adapter, f"{source}, {ADAPTER}", raw.get(DRAFT), source, base)


def read_lora_draft_config(folder: Path, base: DecoderConfig) -> LoRADraftConfig:
    """The configuration of a LoRA draft's folder, without its weights.

    Raises:
        InputError: as `lora_draft_config_from_json`, or the folder holds an adapter that is no draft.
    """
    adapter, side = folder / ADAPTER_CONFIG_FILE, folder / FINGERPRINT_FILE
    settings = read_json(side).get(DRAFT) if side.exists() else None
    if settings is None:
        raise InputError(
            f"{folder}: holds an adapter, but no draft: {side.name} does not say its {', '.join(SETTINGS)}; "
            "give a draft that specjax exported, or read the adapter alone with load_adapters"
        )
    config = _config(read_json(adapter), str(adapter), settings, str(side), base)
    if not config.own_mask_embedding and (folder / MASK_EMBEDDING_FILE).exists():
        raise InputError(
            f"{folder}: holds {MASK_EMBEDDING_FILE}, but in {side.name} own_mask_embedding is false; delete the file, "
            "or set it to true"
        )
    return config


def load_lora_draft(folder: Path, base: DecoderConfig) -> LoRADraft:
    """The LoRA draft of a folder for a target of config `base`, in float32, on the mesh in force.

    Raises:
        InputError: as `read_lora_draft_config` and `load_adapters`, or a mask embedding that is missing or damaged.
    """
    config = read_lora_draft_config(folder, base)
    arrays = {ADAPTERS + path: array for path, array in flat_params(load_adapters(folder, base)).items()}
    with mesh_scope():
        if config.own_mask_embedding:
            path = folder / MASK_EMBEDDING_FILE
            row = read_mask_embedding(path, config.mask_token_id, base.hidden_size, said_in=FINGERPRINT_FILE)
            arrays[MASK_EMBEDDING] = put(row.astype(np.float32), SPECS.mask_embedding_d)
        return with_params(abstract_module(lambda: LoRADraft(config, base, rngs=nnx.Rngs(0))), arrays)


def save_lora_draft(
    draft: LoRADraft,
    folder: str | Path,
    *,
    fingerprint: TargetFingerprint | None,
    base_name: str | None = None,
    dtype: Any = jnp.float32,
) -> Path:
    """Writes `draft` so that `peft` and `load_lora_draft` read it; other files of `folder` stay.

    base_name: path or hub id of the target, for PEFT. dtype: of adapters and mask embedding; float32, in which they
    are trained and applied, loses nothing, and they are small.
    """
    dtype = jnp.dtype(dtype)
    recorded = UNKNOWN if fingerprint is None else fingerprint.to_json()
    others = {FINGERPRINT_FILE: json_text(recorded | {DRAFT: _settings_to_json(draft.config)})}
    if draft.mask_embedding is not None:
        with mesh_scope():
            row = host_array(draft.mask_embedding[...], "copy", dtype)
        others[MASK_EMBEDDING_FILE] = mask_embedding_bytes(row, draft.config.mask_token_id)
    owned = (*ADAPTER_FILES, MASK_EMBEDDING_FILE)
    return write_adapter_folder(draft.adapters, Path(folder), base_name, dtype, others, owned)


def _settings_to_json(config: LoRADraftConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS}


def _config(
    adapter: Mapping[str, Any], adapter_source: str, settings: Any, source: str, base: DecoderConfig
) -> LoRADraftConfig:
    if not isinstance(settings, dict):
        raise InputError(f"{source}: {DRAFT} is {settings!r}; it must be an object with {', '.join(SETTINGS)}")
    lora = adapter_config_from_peft(adapter, adapter_source, base)
    reader = ConfigReader(settings, f"{source}, {DRAFT}", FieldTables({}, {}, {}))
    values: dict[str, Any] = {
        "block_size": reader.integer("block_size", minimum=2),
        "mask_token_id": reader.integer("mask_token_id", minimum=0),
        "own_mask_embedding": reader.boolean("own_mask_embedding"),
        "masked_anchor": _share(reader, "masked_anchor"),
        "adapt_context": reader.boolean("adapt_context"),
    }
    if values["mask_token_id"] >= TOKEN_ID_LIMIT:
        reader.problem("mask_token_id", f"must be below {TOKEN_ID_LIMIT}")
    reader.finish()
    try:
        return LoRADraftConfig(lora, **values)
    except ValueError as error:
        raise InputError(f"{source}, {DRAFT}: {error}") from error


def _share(reader: ConfigReader, name: str) -> float:
    value = reader.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        missing = "" if name in reader.raw else "the field is missing; it "
        reader.problem(name, f"{missing}must be a number from 0 to 1")
        return 0.0
    return float(value)
