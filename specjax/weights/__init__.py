"""Weights: Hugging Face folders and Orbax checkpoints <-> modules."""

from specjax.weights.draft_config import (
    draft_config_from_hf,
    draft_config_to_hf,
    is_draft_config,
)
from specjax.weights.drafts import load_draft, read_draft_config, save_draft
from specjax.weights.fingerprint import (
    TargetFingerprint,
    fingerprint_warning,
    read_fingerprint,
    target_digest,
    target_fingerprint,
)
from specjax.weights.hf_config import decoder_config_from_hf, decoder_config_to_hf
from specjax.weights.load import load_target, read_target_config, weights_dtype
from specjax.weights.lora_draft_folder import lora_draft_config_from_json, lora_draft_config_to_json
from specjax.weights.module_params import flat_params, with_params
from specjax.weights.orbax_checkpoint import (
    load_checkpoint,
    load_run_draft,
    load_run_params,
    read_run_draft_config,
    save_checkpoint,
)
from specjax.weights.peft import (
    adapter_base_name,
    adapter_config_from_peft,
    adapter_config_to_peft,
    load_adapters,
    save_adapters,
)
from specjax.weights.safetensors_files import model_folder, model_name
from specjax.weights.save import save_target

__all__ = [
    "TargetFingerprint",
    "adapter_base_name",
    "adapter_config_from_peft",
    "adapter_config_to_peft",
    "decoder_config_from_hf",
    "decoder_config_to_hf",
    "draft_config_from_hf",
    "draft_config_to_hf",
    "fingerprint_warning",
    "flat_params",
    "is_draft_config",
    "load_adapters",
    "load_checkpoint",
    "load_draft",
    "load_run_draft",
    "load_run_params",
    "load_target",
    "lora_draft_config_from_json",
    "lora_draft_config_to_json",
    "model_folder",
    "model_name",
    "read_draft_config",
    "read_fingerprint",
    "read_run_draft_config",
    "read_target_config",
    "save_adapters",
    "save_checkpoint",
    "save_draft",
    "save_target",
    "target_digest",
    "target_fingerprint",
    "weights_dtype",
    "with_params",
]
