"""The LoRA draft: the target itself, with adapters on, proposes a block; with them off it verifies.

The context runs without adapters, so its keys and values are the target's own: one cache serves drafting and
verifying. Only the blocks run with them, `[anchor, MASK, ...]`, and see the context strictly before their anchor and
themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.models.attention import DEFAULT_QUERY_CHUNK
from specjax.models.block_stream import ContextKV, embed_noise, run_blocks, visible_ranges
from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.lora import LoRAAdapters, LoRAConfig, projection_shapes
from specjax.models.sharding import SPECS


@dataclass(frozen=True)
class LoRADraftConfig:
    """What a LoRA draft adds to its target.

    own_mask_embedding: MASK is embedded by a parameter of the draft instead of the target's row `mask_token_id`.
    masked_anchor: share of the blocks it was trained on whose anchor was MASK too. Above 0 it can propose a block whose
    first token is not known yet, while the target verifies the tokens before; at 1 it does nothing else.
    adapt_context: the adapters act on the context too, whose keys and values are then not the target's.
    """

    lora: LoRAConfig
    block_size: int
    mask_token_id: int
    own_mask_embedding: bool = False
    masked_anchor: float = 0.0
    adapt_context: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size {self.block_size} drafts nothing; it must be at least 2")
        if not 0 <= self.masked_anchor <= 1:
            raise ValueError(f"masked_anchor {self.masked_anchor} is a share of blocks; it must be from 0 to 1")
        if self.adapt_context and self.masked_anchor:
            raise ValueError(
                "masked_anchor drafts while the target verifies, over the target's own keys; adapt_context has others"
            )


def lora_target_mismatches(draft: LoRADraft, target: DecoderConfig) -> list[str]:
    """What keeps `draft` from drafting for `target`, one phrase each."""
    layers, problems = len(draft.adapters.layers), []
    if layers != target.num_hidden_layers:
        problems.append(f"it adapts {layers} layers, the target's num_hidden_layers is {target.num_hidden_layers}")
    if not draft.config.own_mask_embedding and not 0 <= draft.config.mask_token_id < target.vocab_size:
        problems.append(
            f"mask_token_id is {draft.config.mask_token_id}, the target's vocab_size is {target.vocab_size}"
        )
    rank, shapes = draft.config.lora.r, projection_shapes(target.block)
    for name, pair in draft.adapters.layers[0].pairs() if layers else ():
        inputs, outputs = shapes[name]
        for side, array, wanted in (("a", pair.a, (inputs, rank)), ("b", pair.b, (rank, outputs))):
            if array.shape != wanted:
                problems.append(
                    f"{name}.{side} has shape {list(array.shape)}, of the target it would have {list(wanted)}"
                )
    return problems


class LoRADraft(nnx.Module):
    """Adapters and, if it has one, the draft's own embedding of MASK ([d], zero until it is trained or loaded)."""

    def __init__(self, config: LoRADraftConfig, base: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.adapters = LoRAAdapters(config.lora, base, rngs=rngs)
        mask = jax.reshard(jnp.zeros((base.hidden_size,), jnp.float32), SPECS.mask_embedding_d)
        self.mask_embedding = nnx.Param(mask) if config.own_mask_embedding else None

    def embed_noise(self, target: Decoder, noise_ids: jax.Array) -> jax.Array:
        """Embeds the slots of blocks, ids [b, ...] int32 -> [b, ..., d]; see `block_stream.embed_noise`."""
        return embed_noise(target, noise_ids, self.config.mask_token_id, self.mask_embedding)

    def unknown_blocks(self, target: Decoder, rows: int, blocks: int) -> jax.Array:
        """[rows, blocks, B, d]: embedded blocks whose anchor is not known, so that every slot is MASK."""
        ids = jnp.full((rows, blocks, self.config.block_size), self.config.mask_token_id, jnp.int32)
        return self.embed_noise(target, jax.reshard(ids, SPECS.act_bNB))

    def __call__(
        self,
        target: Decoder,
        noise_bNBd: jax.Array,
        context_kv: ContextKV,
        start_bN: jax.Array,
        stop_bN: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        remat: bool = False,
        query_chunk: int = DEFAULT_QUERY_CHUNK,
    ) -> jax.Array:
        """Runs embedded blocks [b, N, B, d] through the adapted target; hidden states [b, N, B, d] after its norm.

        context_kv: the target's own keys and values of the tokens, without adapters. Block j sees those of the slots
        start <= s < stop, where stop is its anchor's slot, in a sliding layer within the window, and its own slots,
        whatever their order. With `dropout_key`, in training, what the adapters see is dropped out.
        """
        start_bN, stop_bN = (jax.reshard(x, SPECS.act_bN) for x in (start_bN, stop_bN))
        x = run_blocks(
            target.layers,
            noise_bNBd,
            context_kv,
            [visible_ranges(start_bN, stop_bN, noise_bNBd.shape[2], window) for window in target.config.windows],
            target.rotary,
            start_bN,
            stop_bN,
            adapters=self.adapters.applied(dropout_key=dropout_key),
            remat=remat,
            query_chunk=query_chunk,
        )
        return target.norm(x)
