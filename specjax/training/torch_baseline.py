"""The same training step in eager PyTorch, as the yardstick of `specjax.training.benchmark`; needs the test extra.

Captured target states in, cross-entropy with the data's tokens, clipping, AdamW; the network is that of
`specjax.weights.torch_draft`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from specjax.config import RunConfig
from specjax.models.dflash import DFlashConfig
from specjax.weights.torch_draft import Attention, DraftLayers, Rotary, rotary_tables

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


class Draft(DraftLayers):
    """The draft's training forward: every block of a row at once."""

    def __init__(self, shape: DFlashConfig, variant: Variant):
        super().__init__(shape)
        self.variant = variant

    def forward(self, states: Tensor, noise: Tensor, anchors: Tensor) -> Tensor:
        """states [b, t, K * d], embedded blocks [b, N * B, d], anchors [b, N] -> [b, N * B, d] after the final norm."""
        t, size = states.shape[1], self.shape.block_size
        context = self.context(states)
        slots = (anchors[..., None] + torch.arange(size)).flatten(1)
        positions = torch.cat([torch.arange(t).expand(len(states), t), slots], 1)
        rotary = rotary_tables(positions, self.shape.head_dim, self.shape.rope.theta, noise.dtype)
        visible = visibility(anchors, t, size, self.variant)
        x = noise
        for layer in self.layers:
            x = layer.residual(x, attend(layer.self_attn, layer.input_layernorm(x), context, rotary, visible))
        return self.norm(x)


def attend(attention: Attention, noise: Tensor, context: Tensor, rotary: Rotary, visible: Visible) -> Tensor:
    """noise [b, q, d], context [b, t, d], rotary tables [b, t + q, 1, h] of all keys -> [b, n, q, h]."""
    t = context.shape[1]
    q = attention.queries(noise, (rotary[0][:, t:], rotary[1][:, t:]))
    k, v = attention.keys_values(torch.cat([context, noise], 1), rotary)
    if visible.context is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask, enable_gqa=True)
    return attend_ranges(q, k, v, visible.context)


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


def visibility(anchors: Tensor, t: int, size: int, variant: Variant) -> Visible:
    """Keys of the context strictly before the block's anchor, and those of its own `size` slots."""
    context = torch.arange(t) < anchors[..., None]
    if variant == "ranges":
        return Visible(context=context)
    block = torch.arange(anchors.shape[1]).repeat_interleave(size)
    own = (block[:, None] == block).expand(len(anchors), -1, -1)
    return Visible(mask=torch.cat([context.repeat_interleave(size, 1), own], -1)[:, None])


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
        weights: dict[str, Tensor],
        embedding: np.ndarray,
        head: np.ndarray,
        dtype: str,
    ):
        self.config, self.shape, self.dtype = config, shape, getattr(torch, dtype)
        self.draft = Draft(shape, variant)
        self.draft.load_state_dict(weights)
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
