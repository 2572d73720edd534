"""Model FLOPs of a train step and the peak of known devices, for MFU."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from specjax.models.decoder import BlockConfig, DecoderConfig
from specjax.models.dflash import DFlashConfig

# Dense bf16 peak of one device in TFLOP/s, by the vendors' data sheets, keyed by `jax.Device.device_kind`.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 2307.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}

DFLASH_FORMULA = (
    "2*N_target*T + 4*pairs_target (forward only; 0 with data.taps) + 6*N_layers*N*B + 6*(fc + context k/v)*S + "
    "4*V*H*rows (frozen head; 6 with a teacher) + 12*pairs_draft*heads*head_dim; recompute excluded"
)
CAUSAL_LM_FORMULA = "6*N*T + 12*pairs*heads*head_dim; recompute excluded"


@dataclass(frozen=True)
class StepShape:
    """Rows of a step, tokens and blocks of a row."""

    batch_size: int
    max_length: int
    num_anchors: int


def layer_parameters(block: BlockConfig) -> int:
    """Matrix parameters of one layer."""
    attention = block.hidden_size * block.head_dim * (2 * block.num_attention_heads + 2 * block.num_key_value_heads)
    return attention + 3 * block.hidden_size * block.intermediate_size


def dflash_step_flops(
    target: DecoderConfig, draft: DFlashConfig, shape: StepShape, *, runs_target: bool = True, teacher: bool = False
) -> float:
    """FLOPs of one step by `DFLASH_FORMULA`; anchors count as uniform, so a block sees S / 2 context keys on average.

    The target runs up to its last tapped layer: what lies behind it is computed, and its head applied to the blocks,
    only for objectives with a `teacher`. It does not run on captured taps (`runs_target` False).
    """
    rows, length = shape.batch_size, shape.max_length
    layers = target.num_hidden_layers if teacher else max(draft.target_layer_ids) + 1
    layers = layers if runs_target else 0
    target_matrices = 2.0 * layers * layer_parameters(target.block) * rows * length
    target_attention = 4.0 * layers * rows * length**2 / 2 * target.num_attention_heads * target.head_dim
    slots = rows * shape.num_anchors * draft.block_size
    draft_matrices = 6.0 * draft.num_hidden_layers * layer_parameters(draft.block) * slots
    fused = len(draft.target_layer_ids) * draft.hidden_size**2
    context_kv = draft.num_hidden_layers * 2 * draft.hidden_size * draft.num_key_value_heads * draft.head_dim
    context = 6.0 * (fused + context_kv) * rows * length
    head = (
        (6.0 if teacher else 4.0)
        * draft.vocab_size
        * draft.hidden_size
        * slots
        * (draft.block_size - 1)
        / draft.block_size
    )
    pairs = slots * (length / 2 + draft.block_size) * draft.num_hidden_layers
    attention = 12.0 * pairs * draft.num_attention_heads * draft.head_dim
    return target_matrices + target_attention + draft_matrices + context + head + attention


def causal_lm_step_flops(config: DecoderConfig, shape: StepShape) -> float:
    """FLOPs of one step by `CAUSAL_LM_FORMULA`, N with the head and without the embedding."""
    matrices = config.num_hidden_layers * layer_parameters(config.block) + config.vocab_size * config.hidden_size
    tokens = shape.batch_size * shape.max_length
    pairs = shape.batch_size * shape.max_length**2 / 2 * config.num_hidden_layers
    return 6.0 * matrices * tokens + 12.0 * pairs * config.num_attention_heads * config.head_dim


def peak_flops(peak_tflops: float | None) -> float | None:
    """FLOP/s of all devices of the mesh together; None if the device is not known and no peak is given."""
    devices = jax.sharding.get_mesh().devices
    peak = peak_tflops or PEAK_TFLOPS.get(devices.flat[0].device_kind)
    return None if peak is None else peak * 1e12 * devices.size
