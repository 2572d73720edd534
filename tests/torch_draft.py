"""The DFlash draft in plain PyTorch: the reference that the JAX draft is compared with.

Written from the method's description (arXiv 2602.06036) and not from the package, of which only the configuration is
read: float32, one dense mask made by a plain Python loop, no cache, default rotary embedding only. `state_dict()` has
the tensor names and [out, in] layouts of a released draft folder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specjax.models.dflash import DFlashConfig


def visibility(
    kind: str, window: int | None, causal: bool, start: list[int], stop: list[int], context: int, size: int
) -> Tensor:
    """Boolean [N * size, context + N * size] of one row: which keys, context first and then the noise, a slot sees.

    Block j starts at its anchor, position stop[j] of the row, and belongs to a document starting at start[j]. It sees
    the document's context strictly before the anchor and its own slots; on sliding layers only keys less than `window`
    positions behind the query, and, if `causal`, no own slot after the query's.
    """
    sliding = kind == "sliding_attention"
    visible = torch.zeros(len(stop) * size, context + len(stop) * size, dtype=torch.bool)
    for j in range(len(stop)):
        for k in range(size):
            query = stop[j] + k
            for key in range(context):
                near = not sliding or window is None or query - key < window
                visible[j * size + k, key] = start[j] <= key and key < stop[j] and near
            for slot in range(size):
                near = not sliding or window is None or query - (stop[j] + slot) < window
                past = not sliding or not causal or slot <= k
                visible[j * size + k, context + j * size + slot] = near and past
    return visible


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)

    def forward(self, noise: Tensor, context: Tensor, angles: Tensor, visible: Tensor) -> Tensor:
        """noise [q, d], context [t, d], angles [t + q, h / 2] of the keys, visible [q, t + q] -> [q, d]."""
        keys_in = torch.cat([context, noise])
        q = rotate(self.q_norm(self.q_proj(noise).view(len(noise), self.heads, -1)), angles[len(context) :])
        k = rotate(self.k_norm(self.k_proj(keys_in).view(len(keys_in), self.kv_heads, -1)), angles)
        v = self.v_proj(keys_in).view(len(keys_in), self.kv_heads, -1)
        out = []
        for head in range(self.heads):
            group = head // (self.heads // self.kv_heads)
            scores = q[:, head] @ k[:, group].T / self.head_dim**0.5
            out.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v[:, group])
        return self.o_proj(torch.cat(out, dim=-1))


class MLP(nn.Module):
    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, context: Tensor, angles: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, angles, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class TorchDraft(nn.Module):
    """The draft network of a configuration without rope scaling."""

    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(len(shape.target_layer_ids) * shape.hidden_size, shape.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, taps: Tensor, positions: Tensor, noise: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Hidden states [b, N, B, d] after the final norm.

        taps [b, t, K * d] of the target, positions [b, t] of its tokens in their documents, noise [b, N, B, d] the
        embedded blocks, start and stop [b, N] the slot where the block's document begins and the anchor's slot.
        """
        return torch.stack([self._row(*row) for row in zip(taps, positions, noise, start, stop, strict=True)])

    def _row(self, taps: Tensor, positions: Tensor, noise: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        shape, (blocks, size, _) = self.shape, noise.shape
        context = self.hidden_norm(self.fc(taps))
        block_positions = [int(b) - int(a) + k for a, b in zip(start, stop, strict=True) for k in range(size)]
        angles = self._angles(torch.cat([positions, torch.tensor(block_positions)]))
        x = noise.reshape(blocks * size, -1)
        for layer, kind in zip(self.layers, shape.layer_types, strict=True):
            window, causal = shape.sliding_window, shape.sliding_causal
            visible = visibility(kind, window, causal, start.tolist(), stop.tolist(), len(taps), size)
            x = layer(x, context, angles, visible)
        return self.norm(x).view(blocks, size, -1)

    def _angles(self, positions: Tensor) -> Tensor:
        exponents = torch.arange(0, self.shape.head_dim, 2).float() / self.shape.head_dim
        return positions.float()[:, None] / self.shape.rope.theta**exponents


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates the pairs (i, i + h / 2) of x [t, heads, h] by angles [t, h / 2]."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def randomised(draft: TorchDraft, seed: int) -> TorchDraft:
    """The draft with every parameter drawn anew, norms around one, so that each of them matters in a comparison."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * drawn)
            else:
                parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
    return draft.eval()
