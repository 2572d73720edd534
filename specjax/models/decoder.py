"""Decoder-only language model: Llama 3, Qwen2/2.5, Qwen3, and Dream with `causal=False`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.models.attention import DEFAULT_QUERY_CHUNK, KeySegment, attention
from specjax.models.kv_cache import KVCache, write_slots
from specjax.models.layers import (
    MLP,
    NO_ADAPTERS,
    Embedding,
    LayerAdapters,
    Linear,
    RMSNorm,
    RopeConfig,
    apply_rotary,
    rotary_tables,
)
from specjax.models.sharding import SPECS, axis_size

if TYPE_CHECKING:
    from specjax.models.lora import LoRAAdapters

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class BlockConfig:
    """Shape of one transformer layer: what a target's layer and a draft's layer have in common."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class DecoderConfig:
    """A target's architecture. Field names are those of Hugging Face's `config.json` where one exists."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    causal: bool = True

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)
        check_layer_types(self.layer_types, self.num_hidden_layers, self.sliding_window)
        check_heads(self.num_attention_heads, self.num_key_value_heads)

    @property
    def block(self) -> BlockConfig:
        names = BlockConfig.__dataclass_fields__
        return BlockConfig(**{name: getattr(self, name) for name in names})

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Tokens that each layer sees up to and with its own; None: all."""
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)


def check_heads(num_attention_heads: int, num_key_value_heads: int) -> None:
    """Raises ValueError unless every key/value head serves the same number of query heads."""
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {num_attention_heads} is not a multiple of num_key_value_heads {num_key_value_heads}"
        )


def check_mesh_fits(config: DecoderConfig) -> None:
    """Raises ValueError, naming every field, where the mesh in force does not divide the model's dimensions.

    Key/value heads need not divide: they are copied to every tensor shard when they do not.
    """
    split = (
        ("tensor", "num_attention_heads", config.num_attention_heads),
        ("tensor", "intermediate_size", config.intermediate_size),
        ("tensor", "vocab_size", config.vocab_size),
        ("fsdp", "hidden_size", config.hidden_size),
    )
    wrong = [
        f"{axis} {axis_size(axis)} does not divide {name} {size}"
        for axis, name, size in split
        if size % axis_size(axis)
    ]
    if wrong:
        raise ValueError("; ".join(wrong) + "; choose another mesh")


def check_layer_types(layer_types: tuple[str, ...], num_layers: int, sliding_window: int | None) -> None:
    """Raises ValueError where `layer_types` is no list of `num_layers` known types or lacks its window."""
    if len(layer_types) != num_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for {num_layers} layers")
    for name in layer_types:
        if name not in LAYER_TYPES:
            raise ValueError(f"layer type {name!r} is not one of {', '.join(LAYER_TYPES)}")
    if "sliding_attention" in layer_types and not sliding_window:
        raise ValueError("layer_types has sliding_attention layers, but sliding_window is not set")


class DecoderOutput(NamedTuple):
    """hidden: [b, t, d] after the final norm; taps: [b, t, m], the tapped layers' outputs side by side.

    cache: the one given, with the tokens written to it; of a tree the nodes' own keys and values, slot i being node i;
    with `keep_keys` the tokens' own.
    """

    hidden: jax.Array
    taps: jax.Array | None
    cache: KVCache | None


class Attention(nnx.Module):
    """Projections, q/k norm and rotary of one layer; the keys it attends are the caller's segments."""

    def __init__(self, config: BlockConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        def linear(i: int, o: int, spec: jax.sharding.PartitionSpec, use_bias: bool) -> Linear:
            return Linear(i, o, use_bias=use_bias, spec=spec, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        width, kv_width = (
            config.head_dim * heads for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        split_kv = config.num_key_value_heads % axis_size("tensor") == 0
        kv_spec = SPECS.column_io if split_kv else SPECS.shared_io
        self.q_proj = linear(config.hidden_size, width, SPECS.column_io, config.attention_bias)
        self.k_proj = linear(config.hidden_size, kv_width, kv_spec, config.attention_bias)
        self.v_proj = linear(config.hidden_size, kv_width, kv_spec, config.attention_bias)
        self.o_proj = linear(width, config.hidden_size, SPECS.row_io, config.attention_output_bias)
        norm = lambda: RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype=param_dtype)  # noqa: E731
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.head_dim = config.head_dim

    def queries(
        self, x_btd: jax.Array, rotary: tuple[jax.Array, jax.Array], adapters: LayerAdapters = NO_ADAPTERS
    ) -> jax.Array:
        """[b, t, n, h], normed and rotated."""
        q = self._heads(self.q_proj(x_btd, SPECS.act_btf, adapters.q_proj), SPECS.act_btf)
        return apply_rotary(q if self.q_norm is None else self.q_norm(q), rotary)

    def keys_values(
        self, x_btd: jax.Array, rotary: tuple[jax.Array, jax.Array], adapters: LayerAdapters = NO_ADAPTERS
    ) -> tuple[jax.Array, jax.Array]:
        """Keys (normed and rotated) and values, each [b, k, t, h]."""
        heads = self.k_proj.kernel.shape[1] // self.head_dim
        spec = SPECS.act_btf if heads % axis_size("tensor") == 0 else SPECS.act_btd
        k = self._heads(self.k_proj(x_btd, spec, adapters.k_proj), spec)
        v = self._heads(self.v_proj(x_btd, spec, adapters.v_proj), spec)
        k = apply_rotary(k if self.k_norm is None else self.k_norm(k), rotary)
        return k.swapaxes(1, 2), v.swapaxes(1, 2)

    def output(self, attended_btnh: jax.Array, adapters: LayerAdapters = NO_ADAPTERS) -> jax.Array:
        b, t = attended_btnh.shape[:2]
        return self.o_proj(attended_btnh.reshape(b, t, -1), SPECS.act_btd, adapters.o_proj)

    def _heads(self, x: jax.Array, spec: jax.sharding.PartitionSpec) -> jax.Array:
        # The split is the heads' also where there is only one: JAX would give it to the other axis then.
        shape = (*x.shape[:2], x.shape[2] // self.head_dim, self.head_dim)
        return jnp.reshape(x, shape, out_sharding=jax.sharding.PartitionSpec(*spec, None))


class DecoderLayer(nnx.Module):
    """Pre-norm transformer layer; the target's and the draft's."""

    def __init__(self, config: BlockConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            use_bias=config.mlp_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def residual(self, x_btd: jax.Array, attended_btnh: jax.Array, adapters: LayerAdapters = NO_ADAPTERS) -> jax.Array:
        """The layer's output from its input and its attention's heads."""
        x_btd = x_btd + self.self_attn.output(attended_btnh, adapters)
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd), adapters)


class Decoder(nnx.Module):
    """A decoder-only LM, with or without a key/value cache.

    Parameters are created on the mesh in force, split as `sharding.Specs` says; under `nnx.eval_shape` the module
    is abstract and its leaves carry those shardings.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.bfloat16,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config = config
        self.dtype = dtype
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nnx.List(
            DecoderLayer(config.block, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        shape = config.hidden_size, config.vocab_size
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(*shape, spec=SPECS.head_dv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        )

    def __call__(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array | None = None,
        *,
        document_start_bt: jax.Array | None = None,
        cache: KVCache | None = None,
        slots_bt: jax.Array | None = None,
        tree_btt: jax.Array | None = None,
        adapters: LoRAAdapters | None = None,
        adapted_bt: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        tap_ids: tuple[int, ...] = (),
        keep_keys: bool = False,
        remat: bool = False,
        query_chunk: int = DEFAULT_QUERY_CHUNK,
    ) -> DecoderOutput:
        """Runs tokens [b, t] int32 and returns the final hidden states and the outputs of the layers `tap_ids`.

        Without a cache, token i of a row occupies slot i; `document_start_bt` [b, t] names the first slot of each
        token's document (packed rows; default 0) and positions count from there. With a cache, keys are written at
        `slots_bt` (default: the positions; a slot outside the cache is not written) and a query at position p sees
        the cache's slots up to p. `keep_keys`: return the tokens' keys and values where there is no cache to write to.
        `remat` recomputes each layer in the backward pass.

        With a cache and `tree_btt` [b, t, t] bool, the tokens are the nodes of a tree that continues the cached ones:
        node 0 is the root, a node's position is the root's plus its depth, and node i sees the slots before the root
        and, window permitting, the nodes j with tree[i, j], which are itself and those above it. Nothing is written.

        `adapters` act on the tokens where `adapted_bt` [b, t] bool (default: on all); the projections of the others are
        the base's, bit for bit but for what XLA fuses otherwise in a program with adapters than in one without. With
        `dropout_key`, in training, what the adapters see is dropped out.

        Raises:
            ValueError: a cache is given to a bidirectional decoder, which would see its unwritten slots; a tree
                without a cache, or with slots; adapters of a decoder of another depth; tokens to adapt or a key
                without adapters.
        """
        if tree_btt is not None and (cache is None or slots_bt is not None):
            raise ValueError("a tree continues cached tokens and writes none: give it a cache and no slots")
        if cache is not None and not self.config.causal:
            raise ValueError(
                "a bidirectional decoder (causal=False) sees the whole row at once: call it without a cache"
            )
        b, t = tokens_bt.shape
        index = jax.reshard(jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)), SPECS.act_bt)
        if document_start_bt is None:
            document_start_bt = jnp.zeros_like(index)
        if positions_bt is None:
            positions_bt = index - document_start_bt
        document_start_bt, positions_bt = (jax.reshard(x, SPECS.act_bt) for x in (document_start_bt, positions_bt))
        query_slots = index if cache is None else positions_bt
        slots_bt = query_slots if slots_bt is None else jax.reshard(slots_bt, SPECS.act_bt)
        rotary = self.rotary(positions_bt)
        x = self.embed(tokens_bt)
        applied = self._applied(adapters, adapted_bt, dropout_key)
        taps: dict[int, jax.Array] = {}
        keys_values: list[tuple[jax.Array, jax.Array]] = []
        for i, (layer, layer_adapters) in enumerate(zip(self.layers, applied, strict=True)):
            start, stop = self._visible(i, document_start_bt, query_slots, t if cache is None else cache.capacity)
            step = _layer_step if not remat else jax.checkpoint(_layer_step, static_argnums=(7,))
            cached = None if cache is None else (cache.keys[i], cache.values[i])
            x, kept = step(layer, x, rotary, start, stop, cached, slots_bt, query_chunk, tree_btt, layer_adapters)
            keys_values.append(kept)
            if i in tap_ids:
                taps[i] = x
        concatenated = jnp.concatenate([taps[i] for i in tap_ids], axis=-1) if tap_ids else None
        kept_all = None if cache is None and not keep_keys else KVCache(*map(tuple, zip(*keys_values, strict=True)))
        return DecoderOutput(self.norm(x), concatenated, kept_all)

    def _applied(
        self, adapters: LoRAAdapters | None, adapted_bt: jax.Array | None, dropout_key: jax.Array | None
    ) -> list[LayerAdapters]:
        """The adapters of every layer of this decoder."""
        if adapters is None:
            if adapted_bt is not None or dropout_key is not None:
                raise ValueError("adapted_bt and dropout_key say how adapters act: give adapters too")
            return [NO_ADAPTERS] * len(self.layers)
        if len(adapters.layers) != len(self.layers):
            raise ValueError(f"adapters of {len(adapters.layers)} layers for a decoder of {len(self.layers)}")
        return adapters.applied(adapted_bt, dropout_key)

    def _visible(
        self, layer: int, document_start: jax.Array, slots: jax.Array, num_keys: int
    ) -> tuple[jax.Array, jax.Array]:
        """Range of key slots each query of the layer sees."""
        start, window = document_start, self.config.windows[layer]
        if window is not None:
            start = jnp.maximum(start, slots - window + 1)
        return start, slots + 1 if self.config.causal else jnp.full_like(slots, num_keys)

    def empty_cache(self, rows: int, capacity: int) -> KVCache:
        """A cache for `rows` rows of `capacity` tokens."""
        c = self.config
        return KVCache.create(c.num_hidden_layers, rows, c.num_key_value_heads, capacity, c.head_dim, self.dtype)

    def rotary(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tables (cos, sin), each [..., h / 2]."""
        config = self.config
        return rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [b, ...] -> [b, ..., d]."""
        return self.embed_tokens(tokens)

    def head_kernel(self) -> jax.Array:
        """The output projection [d, v] in the compute dtype (the embedding transposed, when tied)."""
        kernel = self.embed_tokens.weight[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return kernel.astype(self.dtype)

    def logits(self, hidden_btd: jax.Array) -> jax.Array:
        """Next-token logits [b, t, v], float32, split over `tensor` along the vocabulary."""
        return jnp.einsum(
            "btd,dv->btv",
            hidden_btd,
            self.head_kernel(),
            preferred_element_type=jnp.float32,
            out_sharding=SPECS.act_btv,
        )


def _layer_step(
    layer: DecoderLayer,
    x_btd: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    start_bt: jax.Array,
    stop_bt: jax.Array,
    cached: tuple[jax.Array, jax.Array] | None,
    slots_bt: jax.Array,
    query_chunk: int,
    tree_btt: jax.Array | None,
    adapters: LayerAdapters,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer: attends, applies the MLP; returns also its keys and values, those cached with the tokens' written to
    them, or without a cache and of a tree the tokens' own."""
    attn = layer.self_attn
    normed = layer.input_layernorm(x_btd)
    queries = attn.queries(normed, rotary, adapters)
    keys, values = attn.keys_values(normed, rotary, adapters)
    start, stop = start_bt[:, None], stop_bt[:, None]
    kept = keys, values
    if tree_btt is not None:
        assert cached is not None
        root = jnp.broadcast_to(slots_bt[:, None, :1], start.shape)
        nodes = tree_btt & (start_bt[:, :, None] <= slots_bt[:, None, :])
        segments = [
            KeySegment(*cached, start, root),
            KeySegment(keys[:, None], values[:, None], 0 * start, 0 * start + keys.shape[2], nodes[:, None]),
        ]
    else:
        if cached is not None:
            kept = write_slots(cached[0], keys, slots_bt), write_slots(cached[1], values, slots_bt)
        segments = [KeySegment(*kept, start, stop)]
    attended = attention(queries[:, None], segments, scale=attn.head_dim**-0.5, query_chunk=query_chunk)
    return layer.residual(x_btd, attended[:, 0], adapters), kept
