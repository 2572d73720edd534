"""The DFlash draft: a small block-diffusion model fed with the target's hidden states (arXiv 2602.06036).

Every layer takes its queries from the noise stream (the block's tokens) and its keys and values from the context
(the target's tapped hidden states, fused once and shared by all layers) and the noise, through the same k and v
projections. Embedding and head are the target's and stay outside this module; the embedding of MASK may be its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.models.attention import DEFAULT_QUERY_CHUNK
from specjax.models.block_stream import ContextKV, Ranges, embed_noise, run_blocks, visible_ranges
from specjax.models.decoder import BlockConfig, Decoder, DecoderConfig, DecoderLayer, check_heads, check_layer_types
from specjax.models.layers import Linear, RMSNorm, RopeConfig, rotary_tables
from specjax.models.sharding import SPECS

TOKEN_ID_LIMIT = 2**31  # they are int32


@dataclass(frozen=True)
class DFlashConfig:
    """A draft's architecture and the target it belongs to.

    target_layer_ids: tapped target layers, zero-based (the OUTPUT of decoder layer l, HF `hidden_states[l + 1]`).
    sliding_causal: causality inside the block, on sliding-window layers only; full layers are bidirectional.
    own_mask_embedding: MASK is embedded by a parameter of the draft instead of the target's row `mask_token_id`, which
    may then be any id without a token, also one past the target's embedding.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    vocab_size: int
    rope: RopeConfig
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    sliding_causal: bool = False
    own_mask_embedding: bool = False

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)
        check_layer_types(self.layer_types, self.num_hidden_layers, self.sliding_window)
        check_heads(self.num_attention_heads, self.num_key_value_heads)
        if self.block_size < 2:
            raise ValueError(f"block_size {self.block_size} drafts nothing; it must be at least 2")
        if not self.mask_token_fits(self.vocab_size):
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size} rows")
        check_target_layer_ids(self.target_layer_ids, self.num_target_layers)

    def mask_token_fits(self, vocab_size: int) -> bool:
        """Whether MASK has an embedding beside a target of `vocab_size` embedding rows."""
        return 0 <= self.mask_token_id < (TOKEN_ID_LIMIT if self.own_mask_embedding else vocab_size)

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.rms_norm_eps,
            qk_norm=True,
        )

    @classmethod
    def for_target(
        cls,
        target: DecoderConfig,
        *,
        num_layers: int,
        block_size: int,
        mask_token_id: int,
        target_layer_ids: tuple[int, ...],
        sliding_window: int | None = None,
        own_mask_embedding: bool = False,
    ) -> DFlashConfig:
        """The default draft of a target: its shape and rope theta, no rope scaling, no attention bias.

        With `sliding_window` (tokens) every layer is a bidirectional sliding-window layer.
        """
        kind = "full_attention" if sliding_window is None else "sliding_attention"
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=target.num_attention_heads,
            num_key_value_heads=target.num_key_value_heads,
            head_dim=target.head_dim,
            rms_norm_eps=target.rms_norm_eps,
            max_position_embeddings=target.max_position_embeddings,
            vocab_size=target.vocab_size,
            rope=RopeConfig(theta=target.rope.theta),
            block_size=block_size,
            mask_token_id=mask_token_id,
            target_layer_ids=target_layer_ids,
            num_target_layers=target.num_hidden_layers,
            layer_types=(kind,) * num_layers,
            sliding_window=sliding_window,
            own_mask_embedding=own_mask_embedding,
        )


def default_target_layer_ids(num_target_layers: int, count: int) -> tuple[int, ...]:
    """The tapped layers when none are named: the middle one, or `count` spread from 1 to T - 3.

    Raises:
        ValueError: the target is too shallow for `count` distinct taps; name the ids instead.
    """
    if count < 1:
        raise ValueError(f"the number of taps must be at least 1, got {count}")
    if num_target_layers - 3 < count:
        raise ValueError(
            f"a target of {num_target_layers} layers has no {count} default taps; set target_layer_ids explicitly"
        )
    if count == 1:
        return (num_target_layers // 2,)
    return tuple(round(1 + i * (num_target_layers - 4) / (count - 1)) for i in range(count))


def check_target_layer_ids(ids: tuple[int, ...], num_target_layers: int) -> None:
    """Raises ValueError unless `ids` are distinct layers in [0, T - 2].

    The last layer is refused because HF's last hidden state is taken after the final norm.
    """
    bad = [i for i in ids if not 0 <= i <= num_target_layers - 2]
    if not ids or bad or len(set(ids)) != len(ids):
        raise ValueError(
            f"target_layer_ids {list(ids)} must be distinct ids from 0 to {num_target_layers - 2} "
            f"(the target has {num_target_layers} layers; its last cannot be tapped)"
        )


def target_mismatches(draft: DFlashConfig, target: DecoderConfig) -> list[str]:
    """What keeps `draft` from drafting for `target`, one phrase each.

    Embedding and head are the target's, so its vocabulary may have grown since the draft was trained, or shrunk, as
    long as it still has MASK's row.
    """
    pairs = (
        ("hidden_size", draft.hidden_size, "hidden_size", target.hidden_size),
        ("num_target_layers", draft.num_target_layers, "num_hidden_layers", target.num_hidden_layers),
    )
    problems = [f"{a} is {x}, the target's {b} is {y}" for a, x, b, y in pairs if x != y]
    if not draft.mask_token_fits(target.vocab_size):
        problems.append(f"mask_token_id is {draft.mask_token_id}, the target's vocab_size is {target.vocab_size}")
    try:
        check_target_layer_ids(draft.target_layer_ids, target.num_hidden_layers)
    except ValueError as error:
        problems.append(str(error))
    return problems


class DFlashDraft(nnx.Module):
    """The draft's parameters and its computations: noise embedding, context, its keys/values, and the block forward.

    mask_embedding: [d], zero until it is trained or loaded; None where MASK is embedded by the target.
    """

    def __init__(
        self,
        config: DFlashConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.bfloat16,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config = config
        self.dtype = dtype
        taps_width = len(config.target_layer_ids) * config.hidden_size
        shape = taps_width, config.hidden_size
        self.fc = Linear(*shape, spec=SPECS.shared_io, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.layers = nnx.List(
            DecoderLayer(config.block, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        mask = jax.reshard(jnp.zeros((config.hidden_size,), param_dtype), SPECS.mask_embedding_d)
        self.mask_embedding = nnx.Param(mask) if config.own_mask_embedding else None

    def embed_noise(self, target: Decoder, noise_ids: jax.Array) -> jax.Array:
        """Embeds the slots of blocks, ids [b, ...] int32 -> [b, ..., d]; see `block_stream.embed_noise`."""
        return embed_noise(target, noise_ids, self.config.mask_token_id, self.mask_embedding)

    def context(self, taps_btm: jax.Array) -> jax.Array:
        """Fuses the target's tapped hidden states [b, t, m] into the context [b, t, d]."""
        return self.hidden_norm(self.fc(taps_btm.astype(self.dtype), SPECS.act_btd))

    def context_kv(self, context_btd: jax.Array, positions_bt: jax.Array) -> ContextKV:
        """Per layer, the context's keys and values, each [b, k, t, h]; the context itself is not normed again."""
        rotary = self.rotary(positions_bt)
        return tuple(layer.self_attn.keys_values(context_btd, rotary) for layer in self.layers)

    def __call__(
        self,
        noise_bNBd: jax.Array,
        context_kv: ContextKV,
        start_bN: jax.Array,
        stop_bN: jax.Array,
        *,
        remat: bool = False,
        query_chunk: int = DEFAULT_QUERY_CHUNK,
    ) -> jax.Array:
        """Runs embedded blocks [b, N, B, d] and returns hidden states [b, N, B, d] after the final norm.

        Block j sees its own slots and the context slots start <= s < stop, where stop is its anchor's slot:
        strictly before the anchor, whose hidden state does not exist at inference. Slot k of a block has
        position stop - start + k.
        """
        start_bN, stop_bN = (jax.reshard(x, SPECS.act_bN) for x in (start_bN, stop_bN))
        size = noise_bNBd.shape[2]
        ranges = [self.visible(kind, start_bN, stop_bN, size) for kind in self.config.layer_types]
        x = run_blocks(
            self.layers,
            noise_bNBd,
            context_kv,
            ranges,
            self.rotary,
            start_bN,
            stop_bN,
            remat=remat,
            query_chunk=query_chunk,
        )
        return self.norm(x)

    def visible(self, kind: str, start_bN: jax.Array, stop_bN: jax.Array, size: int) -> Ranges:
        """What every slot sees in a layer of `kind`."""
        sliding = kind == "sliding_attention"
        window = self.config.sliding_window if sliding else None
        return visible_ranges(start_bN, stop_bN, size, window, causal=sliding and self.config.sliding_causal)

    def rotary(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tables (cos, sin), each [..., h / 2], of the draft's own rotary embedding."""
        config = self.config
        return rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions)
