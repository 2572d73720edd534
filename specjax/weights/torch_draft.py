"""The draft's layers in eager PyTorch and their weights, for the yardsticks of both benchmarks; needs the test extra.

Written from the method's description (arXiv 2602.06036) and not from the JAX modules. Parameters have the names of
released draft folders.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from specjax.fetch import fetch
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.weights.key_tables import DRAFT_KEYS
from specjax.weights.module_params import flat_params

Rotary = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Projections of grouped-query attention; who uses it decides what a query sees."""

    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, shape.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, shape.rms_norm_eps)

    def queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x [b, q, d], tables [b, q, 1, h] -> [b, n, q, h]."""
        return rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))), rotary).transpose(1, 2)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """x [b, t, d], tables [b, t, 1, h] -> keys and values, each [b, k, t, h]."""
        keys = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, -1))), rotary).transpose(1, 2)
        return keys, self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)

    def output(self, attended: Tensor) -> Tensor:
        """[b, n, q, h] -> [b, q, d]."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def residual(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [b, q, d] after attention [b, n, q, h] and MLP."""
        x = x + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftLayers(nn.Module):
    """The draft's parameters: full attention, default rotary embedding."""

    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(len(shape.target_layer_ids) * shape.hidden_size, shape.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.layers: Any = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def context(self, states: Tensor) -> Tensor:
        """The target's tapped states [b, t, K * d] fused into [b, t, d]."""
        return self.hidden_norm(self.fc(states))


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines [b, t, 1, h] of positions [b, t]."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles = positions[..., None, None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: Rotary) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * tables[0] + torch.cat([-second, first], -1) * tables[1]


def draft_weights(draft: DFlashDraft) -> dict[str, Tensor]:
    """The draft's parameters in float32 under their names in a draft folder, [out, in]."""
    weights = {}
    for path, value in flat_params(draft).items():
        name, transform = DRAFT_KEYS.to_file(path)
        array = np.asarray(fetch(value), np.float32)
        weights[name] = torch.tensor(array.T if transform == "transpose" else array)
    return weights
