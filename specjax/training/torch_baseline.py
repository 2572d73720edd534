"""The same training step in eager PyTorch, as the yardstick of `specjax.training.benchmark`; needs the test extra.

Written from the method's description (arXiv 2602.06036) and not from the JAX modules: captured target states in,
cross-entropy with the data's tokens, clipping, AdamW. Parameters have the names of released draft folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from specjax.config import RunConfig
from specjax.models.dflash import DFlashConfig

Result = TypeVar("Result")
Variant = Literal["ranges", "dense"]
VARIANTS: dict[Variant, str] = {
    "ranges": "keys of the context and of the own block, one softmax",
    "dense": "one mask over the context's and all blocks' keys, scaled_dot_product_attention",
}
DEFAULT_ALPHA = 0.5


@dataclass(frozen=True)
class Rows:
    """Rows of one document each, all of it learnt.

    states [b, t, K * d]: the target's tapped hidden states. tokens [b, t] int64. anchors [b, N] int64, and valid
    [b, N] bool, false where a slot holds no anchor.
    """

    states: Tensor
    tokens: Tensor
    anchors: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Visible:
    """What queries see. `ranges`: context [b, N, t] alone; `dense`: mask [b, 1, N * B, t + N * B] alone."""

    context: Tensor | None = None
    mask: Tensor | None = None


class Attention(nn.Module):
    def __init__(self, shape: DFlashConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, shape.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, shape.rms_norm_eps)

    def forward(self, noise: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        """noise [b, q, d], context [b, t, d], rotary tables [b, t + q, 1, h] of all keys -> [b, q, d]."""
        t = context.shape[1]
        keys_in = torch.cat([context, noise], 1)
        tables = rotary[0][:, t:], rotary[1][:, t:]
        q = rotate(self.q_norm(self.q_proj(noise).unflatten(-1, (self.heads, -1))), tables).transpose(1, 2)
        k = rotate(self.k_norm(self.k_proj(keys_in).unflatten(-1, (self.kv_heads, -1))), rotary).transpose(1, 2)
        v = self.v_proj(keys_in).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if visible.context is None:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask, enable_gqa=True)
        else:
            out = attend_ranges(q, k, v, visible.context)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def attend_ranges(q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> Tensor:
    """Attention of blocks over the visible context and their own slots, by one softmax over both parts' scores.

    q [b, n, N * B, h]; k, v [b, k, t + N * B, h], context first; context [b, N, t] bool. Returns [b, n, N * B, h].
    """
    b, heads, slots, h = q.shape
    (blocks, t), kv_heads = context.shape[1:], k.shape[1]
    size, groups = slots // blocks, heads // kv_heads
    # Query heads of one key/value head share its products: [b, k, N, g * B, h].
    q = q.view(b, kv_heads, groups, blocks, size, h).transpose(2, 3).reshape(b, kv_heads, blocks, groups * size, h)
    q = q * h**-0.5
    own_k, own_v = (x[:, :, t:].unflatten(2, (blocks, size)) for x in (k, v))
    hidden = ~context[:, None, :, None]
    far = (q.flatten(2, 3) @ k[:, :, :t].mT).unflatten(2, (blocks, groups * size)).masked_fill(hidden, float("-inf"))
    near = q @ own_k.mT
    far, near = torch.cat([far, near], -1).softmax(-1, dtype=torch.float32).to(v.dtype).split([t, size], -1)
    out = (far.flatten(2, 3) @ v[:, :, :t]).unflatten(2, (blocks, groups * size)) + near @ own_v
    out = out.view(b, kv_heads, blocks, groups, size, h).transpose(2, 3)
    return out.reshape(b, heads, slots, h)


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

    def forward(self, x: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, rotary, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class Draft(nn.Module):
    """The draft network with full attention and default rotary embedding."""

    def __init__(self, shape: DFlashConfig, variant: Variant):
        super().__init__()
        self.shape, self.variant = shape, variant
        self.fc = nn.Linear(len(shape.target_layer_ids) * shape.hidden_size, shape.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, states: Tensor, noise: Tensor, anchors: Tensor) -> Tensor:
        """states [b, t, K * d], embedded blocks [b, N * B, d], anchors [b, N] -> [b, N * B, d] after the final norm."""
        t, size = states.shape[1], self.shape.block_size
        context = self.hidden_norm(self.fc(states))
        slots = (anchors[..., None] + torch.arange(size)).flatten(1)
        positions = torch.cat([torch.arange(t).expand(len(states), t), slots], 1)
        rotary = rotary_tables(positions, self.shape.head_dim, self.shape.rope.theta, noise.dtype)
        visible = visibility(anchors, t, size, self.variant)
        x = noise
        for layer in self.layers:
            x = layer(x, context, rotary, visible)
        return self.norm(x)


def visibility(anchors: Tensor, t: int, size: int, variant: Variant) -> Visible:
    """Keys of the context strictly before the block's anchor, and those of its own `size` slots."""
    context = torch.arange(t) < anchors[..., None]
    if variant == "ranges":
        return Visible(context=context)
    block = torch.arange(anchors.shape[1]).repeat_interleave(size)
    own = (block[:, None] == block).expand(len(anchors), -1, -1)
    return Visible(mask=torch.cat([context.repeat_interleave(size, 1), own], -1)[:, None])


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [b, t, 1, h] of positions [b, t]."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles = positions[..., None, None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * tables[0] + torch.cat([-second, first], -1) * tables[1]


class TrainStep:
    """Draft, optimizer and frozen matrices of the target; a call makes one update.

    weights: the draft's parameters under their names in a draft folder, [out, in]. embedding [v, d] and head [v, d]
    are the target's. Objective `ce`; settings of loss and optimizer are the config's, at its peak learning rate.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: DFlashConfig,
        variant: Variant,
        weights: dict[str, np.ndarray],
        embedding: np.ndarray,
        head: np.ndarray,
        dtype: str,
    ):
        self.config, self.shape, self.dtype = config, shape, getattr(torch, dtype)
        self.draft = Draft(shape, variant)
        self.draft.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        self.embedding, self.head = (torch.tensor(x).to(self.dtype) for x in (embedding, head))
        settings = config.optimizer
        matrices = [p for p in self.draft.parameters() if p.ndim > 1]
        vectors = [p for p in self.draft.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    def __call__(self, rows: Rows) -> tuple[float, float]:
        """One update: (loss, norm of the gradient before clipping)."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = self._loss(rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.draft.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        return float(loss.detach()), float(norm)

    def _loss(self, rows: Rows) -> Tensor:
        size, t = self.shape.block_size, rows.tokens.shape[1]
        slots = rows.anchors[..., None] + torch.arange(size)
        labels = rows.tokens.gather(1, slots.clamp(max=t - 1).flatten(1)).view(slots.shape)
        ids = torch.full_like(labels, self.shape.mask_token_id)
        ids[..., 0] = labels[..., 0]
        noise = functional.embedding(ids.flatten(1), self.embedding)
        hidden = self.draft(rows.states.to(self.dtype), noise, rows.anchors).view(*slots.shape, -1)
        logits = hidden[:, :, 1:] @ self.head.mT
        losses = functional.cross_entropy(logits.float().flatten(0, 2), labels[:, :, 1:].flatten(), reduction="none")
        losses = losses.view(*slots.shape[:2], size - 1)
        supervised = (slots[..., 1:] < t) & rows.valid[..., None]
        weights = slot_weights(self.config, losses.detach(), supervised)
        return (weights * losses).sum() / weights.sum()


def slot_weights(config: RunConfig, losses: Tensor, supervised: Tensor) -> Tensor:
    """Weights [b, N, B - 1] of the slots after the anchor by `loss.weighting`: exp, uniform or dpace."""
    if config.loss.weighting == "dpace":
        alpha = DEFAULT_ALPHA if config.loss.alpha is None else config.loss.alpha
        smoothed = ((1 - alpha) * (-losses).exp() + alpha).where(supervised, torch.ones(()))
        reached = smoothed.cumprod(-1) * supervised
        return reached.flip(-1).cumsum(-1).flip(-1) * supervised
    slots = torch.arange(losses.shape[-1], dtype=torch.float32)
    schedule = torch.ones_like(slots) if config.gamma is None else (-slots / config.gamma).exp()
    return schedule * supervised


def with_threads(threads: int, run: Callable[[], Result]) -> Callable[[], Result]:
    """`run` with PyTorch on `threads` threads, whose number is restored after every call."""

    def limited() -> Result:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return limited
