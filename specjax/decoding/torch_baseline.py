"""Greedy decoding in eager PyTorch on the same weights: transformers' `generate`, and a host-driven DFlash loop.

The loop is the method's own (arXiv 2602.06036): every round Python embeds the block, runs the draft over its cache of
context keys and values, runs transformers' target over the block, compares on the host, and crops both caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specjax.models.dflash import DFlashConfig
from specjax.weights.torch_draft import Attention, DraftLayers, Rotary, rotary_tables


class CachedDraft(DraftLayers):
    """The draft of one row over its cached context, whose keys and values are written once."""

    def __init__(self, shape: DFlashConfig, capacity: int):
        """capacity: positions of the cache, at least the row's tokens plus one block."""
        super().__init__(shape)
        positions = torch.arange(capacity)[None]
        self.rotary = rotary_tables(positions, shape.head_dim, shape.rope.theta, torch.float32)
        cache = shape.num_hidden_layers, 2, 1, shape.num_key_value_heads, capacity, shape.head_dim
        self.cache = torch.zeros(cache)

    def observe(self, states: Tensor, first: int) -> None:
        """Takes in the target's tapped states [1, t, K * d] of the tokens at positions first, first + 1, ..."""
        context = self.context(states)
        for index, layer in enumerate(self.layers):
            self._write(index, layer.self_attn, context, first)

    def forward(self, noise: Tensor, length: int) -> Tensor:
        """An embedded block [1, B, d] whose first token has position `length`, the end of the context -> [1, B, d]."""
        stop = length + noise.shape[1]
        tables = self._tables(length, stop)
        x = noise
        for index, layer in enumerate(self.layers):
            normed = layer.input_layernorm(x)
            self._write(index, layer.self_attn, normed, length)  # the next context overwrites the block
            keys, values = self.cache[index, :, :, :, :stop]
            x = layer.residual(x, _attend(layer.self_attn.queries(normed, tables), keys, values))
        return self.norm(x)

    def _write(self, index: int, attention: Attention, x: Tensor, first: int) -> None:
        stop = first + x.shape[1]
        keys, values = attention.keys_values(x, self._tables(first, stop))
        self.cache[index, 0, :, :, first:stop] = keys
        self.cache[index, 1, :, :, first:stop] = values

    def _tables(self, first: int, stop: int) -> Rotary:
        return self.rotary[0][:, first:stop], self.rotary[1][:, first:stop]


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """queries [1, n, q, h] see all of keys, values [1, k, t, h]; those of one key/value head share its product."""
    b, heads, size, h = queries.shape
    grouped = queries.reshape(b, keys.shape[1], heads // keys.shape[1] * size, h)
    return scaled_dot_product_attention(grouped, keys, values).reshape(queries.shape)


@torch.inference_mode()
def speculate(
    target: Any, draft: CachedDraft, prompt: Sequence[int], max_new_tokens: int, stops: Sequence[int], draft_tokens: int
) -> tuple[list[int], list[int]]:
    """(new tokens, matched drafts + 1 of every round) of one prompt, greedy; at most `draft_tokens` drafts verified.

    target: a transformers causal language model in float32.
    """
    from transformers import DynamicCache

    shape, cache = draft.shape, DynamicCache()  # without a config: sliding layers, too, keep what a window hides
    embed, stopping = target.get_input_embeddings(), frozenset(stops)
    block = torch.full((1, shape.block_size), shape.mask_token_id)

    def run(ids: Tensor, first: int, logits_to_keep: int) -> tuple[list[int], Tensor]:
        """The target's choices after the last tokens of ids [1, t], at positions from `first` on, and the taps."""
        output = target(
            ids,
            position_ids=torch.arange(first, first + ids.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
            logits_to_keep=logits_to_keep,
        )
        taps = torch.cat([output.hidden_states[layer + 1] for layer in shape.target_layer_ids], -1)
        return output.logits[0].argmax(-1).tolist(), taps

    choices, taps = run(torch.tensor([list(prompt)]), 0, 1)
    tokens, rounds, length = choices, [], len(prompt)
    draft.observe(taps, 0)
    while len(tokens) < max_new_tokens and tokens[-1] not in stopping:
        block[0, 0] = tokens[-1]
        hidden = draft(embed(block), length)[:, 1 : draft_tokens + 1]
        drafts = target.lm_head(hidden)[0].argmax(-1)
        verified = torch.cat([block[0, :1], drafts])[None]
        choices, taps = run(verified, length, verified.shape[1])
        matched = 0
        for proposal, choice in zip(drafts.tolist(), choices, strict=False):
            if proposal != choice:
                break
            matched += 1
        draft.observe(taps[:, : matched + 1], length)
        length += matched + 1
        if rejected := verified.shape[1] - matched - 1:
            cache.crop(-rejected)
        rounds.append(matched + 1)
        tokens = _until_stop(tokens, choices[: matched + 1], stopping)
    return tokens[:max_new_tokens], rounds


def _until_stop(tokens: list[int], new: list[int], stops: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(new) if token in stops), len(new) - 1)
    return tokens + new[: end + 1]


def transformers_generate(target: Any, prompt: Sequence[int], max_new_tokens: int, stops: Sequence[int]) -> list[int]:
    """New tokens of one prompt by transformers' `generate`, greedy."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        generated = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # some folders' generation_config.json has another, and greedy is not greedy then
            eos_token_id=list(stops) or None,
            pad_token_id=0,
        )
    return generated[0, len(prompt) :].tolist()
