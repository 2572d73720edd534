"""Model FLOPs of a train step and the peak of the mesh, for MFU."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from specjax.devices import PEAKS
from specjax.models.decoder import DecoderConfig
from specjax.models.dflash import DFlashConfig
from specjax.models.lora import matrix_parameters
from specjax.models.lora_draft import LoRADraftConfig

DFLASH_FORMULA = (
    "2*N_target*T + 4*pairs_target (forward only; 0 with data.taps) + 6*N_layers*N*B + 6*(fc + context k/v)*S + "
    "4*V*H*rows (frozen head; 6 with a teacher) + 12*pairs_draft*heads*head_dim; recompute excluded"
)
LORA_FORMULA = (
    "2*N_target*T + 4*pairs_target (forward only; 0 with an adapted context and no teacher) + (4*N_layers (frozen) + "
    "6*N_adapters)*(N*B, and T of an adapted context) + 4*V*H*rows (frozen head; 6 with a teacher) + (8*pairs with "
    "frozen keys + 12*pairs with adapted ones)*heads*head_dim; recompute excluded"
)
CAUSAL_LM_FORMULA = "6*N*T + 12*pairs*heads*head_dim; recompute excluded"


@dataclass(frozen=True)
class StepShape:
    """Rows of a step, tokens and blocks of a row."""

    batch_size: int
    max_length: int
    num_anchors: int


def dflash_step_flops(
    target: DecoderConfig, draft: DFlashConfig, shape: StepShape, *, runs_target: bool = True, teacher: bool = False
) -> float:
    """FLOPs of one step by `DFLASH_FORMULA`; anchors count as uniform, so a block sees S / 2 context keys on average.

    The target runs up to its last tapped layer: what lies behind it is computed, and its head applied to the blocks,
    only for objectives with a `teacher`. It does not run on captured taps (`runs_target` False).
    """
    rows, length = shape.batch_size, shape.max_length
    layers = target.num_hidden_layers if teacher else max(draft.target_layer_ids) + 1
    slots = rows * shape.num_anchors * draft.block_size
    draft_matrices = 6.0 * draft.num_hidden_layers * matrix_parameters(draft.block) * slots
    fused = len(draft.target_layer_ids) * draft.hidden_size**2
    context_kv = draft.num_hidden_layers * 2 * draft.hidden_size * draft.num_key_value_heads * draft.head_dim
    context = 6.0 * (fused + context_kv) * rows * length
    head = _head_flops(draft.vocab_size, draft.hidden_size, draft.block_size, shape, teacher)
    pairs = slots * (length / 2 + draft.block_size) * draft.num_hidden_layers
    attention = 12.0 * pairs * draft.num_attention_heads * draft.head_dim
    return _forward_flops(target, layers if runs_target else 0, shape) + draft_matrices + context + head + attention


def lora_step_flops(target: DecoderConfig, draft: LoRADraftConfig, shape: StepShape, *, teacher: bool = False) -> float:
    """FLOPs of one step by `LORA_FORMULA`: the target over the context, and forward and backward over the blocks.

    The frozen matrices have no gradient of their own: they cost two thirds of trained ones. With `adapt_context` the
    adapted pass over the context is trained too.
    """
    rows, length, layers = shape.batch_size, shape.max_length, target.num_hidden_layers
    slots = rows * shape.num_anchors * draft.block_size
    frozen, trained = matrix_parameters(target.block), draft.lora.parameters(target.block)
    per_token = layers * (4.0 * frozen + 6.0 * trained)
    heads = layers * target.num_attention_heads * target.head_dim
    of_context = 12.0 if draft.adapt_context else 8.0  # the context's own keys and values have no gradient else
    total = per_token * slots + heads * slots * (of_context * length / 2 + 12.0 * draft.block_size)
    if draft.adapt_context:
        total += per_token * rows * length + 12.0 * heads * rows * length**2 / 2
    if teacher or not draft.adapt_context:
        total += _forward_flops(target, layers, shape)
    return total + _head_flops(target.vocab_size, target.hidden_size, draft.block_size, shape, teacher)


def _forward_flops(target: DecoderConfig, layers: int, shape: StepShape) -> float:
    """The first `layers` of the target over the rows, without its head."""
    tokens, pairs = shape.batch_size * shape.max_length, shape.batch_size * shape.max_length**2 / 2
    return layers * (
        2.0 * matrix_parameters(target.block) * tokens + 4.0 * pairs * target.num_attention_heads * target.head_dim
    )


def _head_flops(vocab_size: int, hidden_size: int, block_size: int, shape: StepShape, teacher: bool) -> float:
    """The frozen head over the blocks, forward and backward, and forward over the teacher's states."""
    predicted = shape.batch_size * shape.num_anchors * (block_size - 1)
    return (6.0 if teacher else 4.0) * vocab_size * hidden_size * predicted


def causal_lm_step_flops(config: DecoderConfig, shape: StepShape) -> float:
    """FLOPs of one step by `CAUSAL_LM_FORMULA`, N with the head and without the embedding."""
    matrices = config.num_hidden_layers * matrix_parameters(config.block) + config.vocab_size * config.hidden_size
    tokens = shape.batch_size * shape.max_length
    pairs = shape.batch_size * shape.max_length**2 / 2 * config.num_hidden_layers
    return 6.0 * matrices * tokens + 12.0 * pairs * config.num_attention_heads * config.head_dim


def peak_flops(peak_tflops: float | None) -> float | None:
    """FLOP/s of all devices of the mesh together; None if the device is not known and no peak is given."""
    devices = jax.sharding.get_mesh().devices
    known = PEAKS.get(devices.flat[0].device_kind)
    peak = peak_tflops or (known and known.tflops)
    return None if peak is None else peak * 1e12 * devices.size
