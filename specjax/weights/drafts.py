"""A draft's folder, of either kind: a DFlash draft in the z-lab layout, or a LoRA draft as a PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

import jax.numpy as jnp

from specjax.errors import InputError
from specjax.models.decoder import DecoderConfig
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.weights.fingerprint import TargetFingerprint
from specjax.weights.load import CONFIG_FILE, load_dflash_draft, read_dflash_config
from specjax.weights.lora_draft_folder import (
    is_adapter_folder,
    load_lora_draft,
    read_lora_draft_config,
    save_lora_draft,
)
from specjax.weights.peft import ADAPTER_CONFIG_FILE
from specjax.weights.safetensors_files import model_folder
from specjax.weights.save import save_dflash_draft


@overload
def load_draft(
    path_or_id: str | Path, *, dtype: Any = jnp.bfloat16, param_dtype: Any = None, base: None = None
) -> DFlashDraft: ...
@overload
def load_draft(
    path_or_id: str | Path, *, dtype: Any = jnp.bfloat16, param_dtype: Any = None, base: DecoderConfig
) -> DFlashDraft | LoRADraft: ...
def load_draft(
    path_or_id: str | Path, *, dtype: Any = jnp.bfloat16, param_dtype: Any = None, base: DecoderConfig | None = None
) -> DFlashDraft | LoRADraft:
    """The draft of a folder or hub id, on the mesh in force.

    dtype, param_dtype: of a DFlash draft, as `load_target`'s; a LoRA draft's parameters are float32 and computed with
    in the target's dtype. base: the target's config, from which a LoRA draft has its shapes; without it there is none.

    Raises:
        InputError: lists everything wrong with the folder; or it holds a LoRA draft and there is no `base`.
    """
    folder = model_folder(path_or_id)
    if is_adapter_folder(folder):
        return load_lora_draft(folder, _required(base, folder))
    return load_dflash_draft(folder, dtype=dtype, param_dtype=param_dtype)


@overload
def read_draft_config(path_or_id: str | Path, base: None = None) -> DFlashConfig: ...
@overload
def read_draft_config(path_or_id: str | Path, base: DecoderConfig) -> DFlashConfig | LoRADraftConfig: ...
def read_draft_config(path_or_id: str | Path, base: DecoderConfig | None = None) -> DFlashConfig | LoRADraftConfig:
    """The configuration of a draft's folder or hub id, without its weights; `base` and errors as `load_draft`'s."""
    folder = model_folder(path_or_id, weights=False)
    if is_adapter_folder(folder):
        return read_lora_draft_config(folder, _required(base, folder))
    return read_dflash_config(folder)


def save_draft(
    draft: DFlashDraft | LoRADraft,
    folder: str | Path,
    *,
    fingerprint: TargetFingerprint | None,
    base_name: str | None = None,
    dtype: Any = None,
) -> Path:
    """Writes `draft`: a DFlash draft in the z-lab layout, in bfloat16; a LoRA draft as a PEFT adapter, in float32.

    fingerprint: of the target, None where it is unknown. base_name, dtype: as `save_lora_draft`'s; a DFlash draft has
    neither.

    Raises:
        InputError: a DFlash draft in another dtype or with a base's name, or a folder that holds another kind of model.
    """
    folder = Path(folder)
    other = folder / (CONFIG_FILE if isinstance(draft, LoRADraft) else ADAPTER_CONFIG_FILE)
    if other.exists():
        raise InputError(f"{folder}: holds another kind of model, with {other.name}; give a folder of its own")
    if isinstance(draft, LoRADraft):
        dtype = jnp.float32 if dtype is None else dtype
        return save_lora_draft(draft, folder, fingerprint=fingerprint, base_name=base_name, dtype=dtype)
    if base_name is not None or dtype not in (None, jnp.bfloat16):
        raise InputError(f"{folder}: a DFlash draft is written in bfloat16, without a base_name; leave both out")
    return save_dflash_draft(draft, folder, fingerprint=fingerprint)


def _required(base: DecoderConfig | None, folder: Path) -> DecoderConfig:
    if base is None:
        raise InputError(
            f"{folder}: holds a LoRA draft, which has its shapes from its target, and no DFlash draft; "
            "load it with base=target.config"
        )
    return base
