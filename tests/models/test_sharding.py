"""Meshes: the same numbers on all of them, what is split over which axis, and models of true size, abstractly."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh

from specjax.models.decoder import Decoder, DecoderConfig, check_mesh_fits
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.kv_cache import KVCache
from specjax.models.layers import RopeConfig
from specjax.models.sharding import SPECS, axis_size, make_mesh, mesh_scope, put

ROWS, TOKENS, BLOCKS, BLOCK = 8, 12, 3, 4
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
TARGET = DecoderConfig(
    model_type="qwen3",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    rope=RopeConfig(),
    attention_bias=True,
    attention_output_bias=True,
    qk_norm=True,
)
MASK = TARGET.vocab_size + 5  # past every shard of the embedding: the draft embeds it itself
DRAFT = DFlashConfig.for_target(
    TARGET, num_layers=1, block_size=BLOCK, mask_token_id=MASK, target_layer_ids=(0, 1), own_mask_embedding=True
)


class Models(NamedTuple):
    target: Decoder
    draft: DFlashDraft


class Results(NamedTuple):
    logits: jax.Array
    taps: jax.Array
    final: jax.Array
    cached: jax.Array
    draft_hidden: jax.Array
    gradients: DFlashDraft


def make_models(target: DecoderConfig = TARGET, draft: DFlashConfig = DRAFT) -> Models:
    rngs = nnx.Rngs(0)
    return Models(Decoder(target, rngs=rngs, dtype=jnp.float32), DFlashDraft(draft, rngs=rngs, dtype=jnp.float32))


@jax.jit
def forward_and_gradients(models: Models, tokens: jax.Array, blocks: jax.Array, stop: jax.Array) -> Results:
    target = models.target
    out = target(tokens, tap_ids=DRAFT.target_layer_ids)
    assert out.taps is not None
    taps = out.taps
    cache = KVCache.create(3, ROWS, TARGET.num_key_value_heads, TOKENS, TARGET.head_dim, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (ROWS, TOKENS))
    cached = target(tokens, positions, cache=cache).hidden

    def loss(draft: DFlashDraft) -> tuple[jax.Array, jax.Array]:
        context_kv = draft.context_kv(draft.context(taps), positions)
        hidden = draft(draft.embed_noise(target, blocks), context_kv, jnp.zeros_like(stop), stop)
        logits = target.logits(hidden.reshape(ROWS, BLOCKS * BLOCK, -1))
        return (jax.nn.log_softmax(logits) ** 2).mean(), hidden

    gradients, hidden = jax.grad(loss, has_aux=True)(models.draft)
    return Results(target.logits(out.hidden), taps, out.hidden, cached, hidden, gradients)


def run(models: Models) -> Results:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TARGET.vocab_size, (ROWS, TOKENS), dtype=np.int32)
    blocks = rng.integers(0, TARGET.vocab_size, (ROWS, BLOCKS, BLOCK), dtype=np.int32)
    blocks[..., 2:] = MASK
    stop = rng.integers(0, TOKENS, (ROWS, BLOCKS), dtype=np.int32)
    arrays = put(tokens, SPECS.act_bt), put(blocks, SPECS.act_bNB), put(stop, P())  # any layout is taken
    return jax.tree.map(np.asarray, forward_and_gradients(models, *arrays))


@pytest.fixture(scope="module")
def initial() -> Models:
    """The parameters as they are drawn on one device, on the host."""
    return jax.tree.map(np.asarray, jax.jit(make_models)())


@pytest.fixture(scope="module")
def host_models(initial: Models) -> Models:
    """Wider parameters: norms away from one and biases from zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + np.float32(0.2) * rng.standard_normal(x.shape, np.float32), initial)


def placed(host: Models) -> Models:
    return jax.tree.map(lambda x, a: put(x, a.sharding.spec), host, nnx.eval_shape(make_models))


@pytest.fixture(scope="module")
def one_device(host_models: Models) -> Results:
    return run(placed(host_models))


def test_a_cache_filled_in_one_step_gives_what_no_cache_gives(one_device: Results) -> None:
    np.testing.assert_allclose(one_device.cached, one_device.final, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_gives_the_same_forward_and_draft_gradients(
    shape: tuple[int, int, int], host_models: Models, one_device: Results
) -> None:
    with jax.set_mesh(make_mesh(*shape)):
        results = run(placed(host_models))
    for ours, expected in zip(jax.tree.leaves(results), jax.tree.leaves(one_device), strict=True):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * scale)


def test_initial_parameters_do_not_depend_on_the_mesh(initial: Models) -> None:
    with jax.set_mesh(make_mesh(2, 2, 2)):
        models = jax.jit(make_models)()
        assert models.target.layers[0].self_attn.q_proj.kernel.sharding.spec == SPECS.column_io
    jax.tree.map(np.testing.assert_array_equal, models, initial)


def layouts(models: Models) -> dict[str, P]:
    """Path of every parameter of the first layers and outside of the layers -> its PartitionSpec."""
    specs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(models):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        if ".layers." not in name or ".layers.0." in name:
            specs[name] = leaf.sharding.spec
    return specs


def without(specs: dict[str, P], axis: str) -> set[str]:
    return {name for name, spec in specs.items() if axis not in spec}


NORMS = {
    *(f"{model}.norm.scale" for model in ("target", "draft")),
    "draft.hidden_norm.scale",
    "draft.mask_embedding",
    *(
        f"{model}.layers.0.{norm}.scale"
        for model in ("target", "draft")
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    ),
}
OUTPUT_BIAS = {"target.layers.0.self_attn.o_proj.bias"}
KV_KERNELS = {f"{m}.layers.0.self_attn.{p}.kernel" for m in ("target", "draft") for p in ("k_proj", "v_proj")}
KV_BIASES = {f"target.layers.0.self_attn.{p}.bias" for p in ("k_proj", "v_proj")}


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_what_is_not_split_on_a_2x2x2_mesh(kv_heads: int) -> None:
    """Key/value projections are whole on every tensor shard only where their heads do not divide the axis."""
    target = dataclasses.replace(TARGET, num_key_value_heads=kv_heads)
    draft = dataclasses.replace(DRAFT, num_key_value_heads=kv_heads)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        specs = layouts(nnx.eval_shape(partial(make_models, target, draft)))
    whole = kv_heads == 1
    replicated = NORMS | OUTPUT_BIAS | (KV_BIASES if whole else set())
    assert without(specs, "tensor") & without(specs, "fsdp") == replicated
    assert without(specs, "tensor") == replicated | {"draft.fc.kernel"} | (KV_KERNELS if whole else set())
    biases = {name for name in specs if name.endswith("bias")}
    assert without(specs, "fsdp") == replicated | biases
    assert not any("data" in spec for spec in specs.values())


LLAMA_3_1_8B = DecoderConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    rope=RopeConfig(theta=5e5, rope_type="llama3", factor=8.0, original_max_position_embeddings=8192),
)
QWEN3_8B = DecoderConfig(
    model_type="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    rope=RopeConfig(theta=1e6),
    qk_norm=True,
)


@pytest.mark.parametrize(
    ("config", "count"), [(QWEN3_8B, 8_190_735_360), (LLAMA_3_1_8B, 8_030_261_248)], ids=["qwen3-8b", "llama-3.1-8b"]
)
def test_models_of_true_size_have_the_published_number_of_parameters(config: DecoderConfig, count: int) -> None:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model)) == count


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 2, 4), "needs 16 devices, there are 8"), ((0, 1, 1), "at least 1")]
)
def test_a_mesh_that_does_not_fit_is_refused(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(*shape)


def test_a_model_that_a_mesh_does_not_divide_is_refused_by_every_field() -> None:
    odd = dataclasses.replace(TARGET, num_attention_heads=6, vocab_size=63, hidden_size=33)
    with jax.set_mesh(make_mesh(2, 1, 4)):
        check_mesh_fits(TARGET)
        with pytest.raises(
            ValueError, match=r"tensor 4 does not divide num_attention_heads 6; .* vocab_size 63; choose"
        ):
            check_mesh_fits(odd)
    with jax.set_mesh(make_mesh(fsdp=2)), pytest.raises(ValueError, match="fsdp 2 does not divide hidden_size 33"):
        check_mesh_fits(odd)


def test_mesh_scope_keeps_the_mesh_in_force_and_otherwise_enters_one_device() -> None:
    with jax.set_mesh(make_mesh(2, 2, 2)), mesh_scope():
        assert axis_size("data", "tensor") == 4
    with mesh_scope():
        assert get_abstract_mesh().size == 1
