"""LoRA adapters: formulas in NumPy, tokens they leave alone, dropout, meshes, merging."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec as P

from specjax.models.attention import KeySegment, attention
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache
from specjax.models.layers import rotary_tables
from specjax.models.lora import PROJECTIONS, AppliedPair, LoRAAdapters, LoRAConfig, merge, projection, unmerge
from specjax.models.sharding import SPECS, make_mesh, put
from tests.weights.tiny import filled, raw_config, tiny_decoder

ROWS, TOKENS, SPLIT = 8, 12, 7
CONFIG = LoRAConfig(r=3, alpha=4.0, dropout=0.25)
RAW = raw_config(num_attention_heads=8, head_dim=8, mlp_bias=True, attention_bias=True, model_type="llama")


def tiny_adapters(base: Decoder, config: LoRAConfig = CONFIG) -> LoRAAdapters:
    """Adapters on the mesh in force, neither matrix of a pair being zero."""
    return filled(nnx.eval_shape(lambda: LoRAAdapters(config, base.config, rngs=nnx.Rngs(0))))


def random_tokens() -> jax.Array:
    return put(np.random.default_rng(0).integers(0, 64, (ROWS, TOKENS), dtype=np.int32), SPECS.act_bt)


def suffix() -> jax.Array:
    """The tokens from SPLIT on."""
    return put(np.tile(np.arange(TOKENS) >= SPLIT, (ROWS, 1)), SPECS.act_bt)


@jax.jit
def forward(model: Decoder, tokens: jax.Array, **how: Any) -> jax.Array:
    return model(tokens, **how).hidden


def hidden(
    model: Decoder,
    adapters: LoRAAdapters | None = None,
    adapted: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    return forward(model, random_tokens(), adapters=adapters, adapted_bt=adapted, dropout_key=key)


@pytest.fixture(scope="module")
def base(one_device_mesh: None) -> Decoder:
    return tiny_decoder(RAW)


@pytest.fixture(scope="module")
def adapters(base: Decoder) -> LoRAAdapters:
    return tiny_adapters(base)


def test_the_scale_is_pefts() -> None:
    assert LoRAConfig(r=16, alpha=8).scale == 0.5
    assert LoRAConfig(r=16, alpha=8, rslora=True).scale == 2.0


def test_target_modules_are_kept_in_one_order() -> None:
    assert LoRAConfig(r=1, alpha=1).target_modules == tuple(PROJECTIONS)
    assert LoRAConfig(r=1, alpha=1, target_modules=("v_proj", "q_proj")).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r 0 leaves no adapter"),
        ({"alpha": 0.0}, "alpha 0.0 must be a number above 0"),
        ({"alpha": math.inf}, "alpha inf"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"dropout": 1.0}, r"dropout 1.0 must be at least 0 and below 1"),
        ({"target_modules": ("q_proj", "lm_head")}, r"'lm_head'\] must be one or more of q_proj, "),
        ({"target_modules": ()}, "one or more of"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**{"r": 2, "alpha": 2.0} | fields)


def test_new_adapters_are_drawn_as_in_peft_and_change_nothing(base: Decoder) -> None:
    config = LoRAConfig(r=64, alpha=64, target_modules=("q_proj", "down_proj"))
    new = jax.jit(lambda: LoRAAdapters(config, base.config, rngs=nnx.Rngs(0)))()
    for layer in new.layers:
        assert [name for name, _ in layer.pairs()] == ["q_proj", "down_proj"]
    for pair, (inputs, outputs) in ((new.layers[1].q_proj, (32, 64)), (new.layers[1].down_proj, (48, 32))):
        a, b = pair.a[...], pair.b[...]
        assert (a.shape, b.shape, a.dtype, b.dtype) == ((inputs, 64), (64, outputs), jnp.float32, jnp.float32)
        theirs = torch.nn.init.kaiming_uniform_(torch.empty(4096, inputs), a=math.sqrt(5))
        np.testing.assert_allclose(np.abs(a).max(), theirs.abs().max(), rtol=0.01)
        np.testing.assert_allclose(np.std(a), theirs.std(), rtol=0.05)
        assert not np.any(b)
    assert np.any(new.layers[0].q_proj.a[...] != new.layers[1].q_proj.a[...])
    np.testing.assert_array_equal(hidden(base, new), hidden(base))


def test_a_filter_separates_adapters_from_their_base(base: Decoder, adapters: LoRAAdapters) -> None:
    _, trained, rest = nnx.split((base, adapters), nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(trained)) == 2 * 7 * 2
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(base))


def test_a_pair_adds_its_product_to_the_projection(base: Decoder, adapters: LoRAAdapters) -> None:
    rng = np.random.default_rng(3)
    applied = adapters.applied()[1]
    for name in PROJECTIONS:
        linear, pair = projection(base.layers[1], name), getattr(adapters.layers[1], name)
        x = rng.standard_normal((2, 3, linear.kernel.shape[0])).astype(np.float32)
        kernel, bias, a, b = (np.asarray(p[...], np.float64) for p in (linear.kernel, linear.bias, pair.a, pair.b))
        expected = x @ kernel + bias + 4 / 3 * (x @ a) @ b
        actual = linear(put(x, SPECS.act_btd), SPECS.act_btd, getattr(applied, name))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_tokens_that_are_not_adapted_are_the_bases_bit_for_bit(base: Decoder, adapters: LoRAAdapters) -> None:
    """Operation by operation; whole programs may differ in the last bit, since XLA fuses each in its own way."""
    tokens, adapted = random_tokens()[:2], suffix()[:2]
    plain = base(tokens, tap_ids=(0, 1))
    gated = base(tokens, adapters=adapters, adapted_bt=adapted, tap_ids=(0, 1))
    for ours, theirs in ((gated.hidden, plain.hidden), (gated.taps, plain.taps)):
        assert ours is not None
        assert theirs is not None
        assert np.asarray(ours[:, :SPLIT]).tobytes() == np.asarray(theirs[:, :SPLIT]).tobytes()
        assert np.abs(ours - theirs)[:, SPLIT:].min(axis=-1).max() > 1e-3


def test_tokens_that_are_not_adapted_do_not_feel_the_adapters_values(base: Decoder, adapters: LoRAAdapters) -> None:
    ours = hidden(base, adapters, suffix())
    for others in (jax.tree.map(lambda x: -3 * x, adapters), jax.tree.map(lambda x: x * jnp.nan, adapters)):
        theirs = hidden(base, others, put(np.zeros((ROWS, TOKENS), bool), SPECS.act_bt))
        np.testing.assert_array_equal(ours[:, :SPLIT], theirs[:, :SPLIT])
        np.testing.assert_allclose(theirs, hidden(base), rtol=0, atol=2e-6)


def test_a_negative_zero_stays_one() -> None:
    y = put(np.full((1, 2, 4), -0.0, np.float32), SPECS.act_btd)
    x, a, b = put(np.ones((1, 2, 3), np.float32), SPECS.act_btd), jnp.ones((3, 2)), jnp.zeros((2, 4))
    pair = AppliedPair(a, b, put(np.array([[True, False]]), SPECS.act_bt), None, 0.0)
    assert np.signbit(pair(x, y, SPECS.act_btd))[0].tolist() == [[False] * 4, [True] * 4]


def test_a_gated_call_is_the_bases_cache_and_adapters_on_the_rest(base: Decoder, adapters: LoRAAdapters) -> None:
    @jax.jit
    def in_two_steps(base: Decoder, adapters: LoRAAdapters, tokens: jax.Array) -> jax.Array:
        cache = KVCache.create(2, ROWS, 2, TOKENS, 8, jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (ROWS, TOKENS))
        cache = base(tokens[:, :SPLIT], positions[:, :SPLIT], cache=cache).cache
        return base(tokens[:, SPLIT:], positions[:, SPLIT:], cache=cache, adapters=adapters).hidden

    expected = in_two_steps(base, adapters, random_tokens())
    np.testing.assert_allclose(hidden(base, adapters, suffix())[:, SPLIT:], expected, rtol=0, atol=2e-5)


def test_layers_alone_take_the_adapters_of_a_call(base: Decoder, adapters: LoRAAdapters) -> None:
    """As a stream of tokens beside the decoder's own does, which calls a layer's methods."""
    config = base.config
    positions = put(np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1)), SPECS.act_bt)
    rotary = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions)
    x = base.embed(random_tokens())
    for layer, applied in zip(base.layers, adapters.applied(), strict=True):
        normed = layer.input_layernorm(x)
        keys, values = layer.self_attn.keys_values(normed, rotary, applied)
        segment = KeySegment(keys, values, 0 * positions[:, None], positions[:, None] + 1)
        queries = layer.self_attn.queries(normed, rotary, applied)
        attended = attention(queries[:, None], [segment], scale=config.head_dim**-0.5)
        x = layer.residual(x, attended[:, 0], applied)
    np.testing.assert_allclose(base.norm(x), hidden(base, adapters), rtol=0, atol=2e-5)


def pair_with_dropout(dropout: float, key: jax.Array | None) -> AppliedPair:
    """A pair that hands through what it sees of 64 inputs, as `applied` builds it."""
    identity = jnp.eye(64, dtype=jnp.float32)
    factor = 1 / (1 - dropout) if key is not None else 1.0
    return AppliedPair(identity, factor * identity, None, key, dropout)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = put(np.ones((16, 100, 64), np.float32), SPECS.act_btd)
    seen = np.asarray(pair_with_dropout(0.25, jax.random.key(0))(x, 0 * x, SPECS.act_btd))
    assert set(np.unique(seen)) == {0.0, np.float32(1 / 0.75)}
    count = seen.size
    assert abs((seen == 0).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)
    # Independent along every axis: between rows, tokens and inputs the share varies as chance has it.
    for axes in ((1, 2), (0, 2), (0, 1)):
        shares = (seen == 0).mean(axis=axes)
        expected = math.sqrt(0.25 * 0.75 * shares.size / count)
        assert 0.4 * expected < shares.std() < 2 * expected


def test_adapters_under_dropout_have_the_mean_of_those_without(base: Decoder, adapters: LoRAAdapters) -> None:
    linear = base.layers[0].mlp.down_proj
    x = put(np.random.default_rng(5).standard_normal((1, 2, 48)).astype(np.float32), SPECS.act_btd)
    y = linear(x, SPECS.act_btd)

    def delta(key: jax.Array | None) -> jax.Array:
        return linear(x, SPECS.act_btd, adapters.applied(dropout_key=key)[0].down_proj) - y

    drawn = np.stack([jax.jit(delta)(key) for key in jax.random.split(jax.random.key(2), 2000)])
    error = drawn.mean(axis=0) - delta(None)
    standard_error = drawn.std(axis=0) / math.sqrt(len(drawn))
    assert np.all(standard_error > 0)
    assert np.abs(error / standard_error).max() < 5


def test_dropout_is_decided_by_the_key_and_off_without_one(base: Decoder, adapters: LoRAAdapters) -> None:
    once, again, other = (hidden(base, adapters, None, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    for different in (other, hidden(base, adapters)):
        assert np.abs(once - different).max() > 1e-2
    sure = tiny_adapters(base, LoRAConfig(r=3, alpha=4.0, dropout=0.0))
    np.testing.assert_array_equal(hidden(base, sure, None, jax.random.key(1)), hidden(base, sure))


def test_every_projection_of_every_layer_draws_its_own_mask(base: Decoder, adapters: LoRAAdapters) -> None:
    applied = adapters.applied(dropout_key=jax.random.key(0))
    keys = [jax.random.key_data(getattr(layer, name).dropout_key).tolist() for layer in applied for name in PROJECTIONS]
    assert len({tuple(key) for key in keys}) == 14


class Results(NamedTuple):
    hidden: jax.Array
    gradients: LoRAAdapters
    merged: Decoder


@partial(jax.jit, static_argnames="remat")
def train_step(base: Decoder, adapters: LoRAAdapters, tokens: jax.Array, adapted: jax.Array, remat: bool) -> Results:
    def loss(adapters: LoRAAdapters) -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(4)
        out = base(tokens, adapters=adapters, adapted_bt=adapted, dropout_key=key, remat=remat).hidden
        return (jax.nn.log_softmax(base.logits(out)) ** 2).mean(), out

    gradients, out = jax.grad(loss, has_aux=True)(adapters)
    return Results(out, gradients, merge(base, adapters))


def run(shape: tuple[int, int, int], remat: bool = False) -> Results:
    with jax.set_mesh(make_mesh(*shape)):
        wide = tiny_decoder(RAW)
        # Halved, so that layers do not amplify the rounding of those before them.
        base, adapters = jax.tree.map(lambda x: x / 2, (wide, tiny_adapters(wide)))
        adapted = jax.reshard(suffix(), P("tensor"))  # any layout is taken
        return jax.tree.map(np.asarray, train_step(base, adapters, random_tokens(), adapted, remat))


@pytest.fixture(scope="module")
def one_device() -> Results:
    return run((1, 1, 1))


def assert_close(results: Results, expected: Results) -> None:
    for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        scale = np.abs(theirs).max()
        assert scale > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_every_mesh_gives_the_same_forward_gradients_and_merged_kernels(
    shape: tuple[int, int, int], one_device: Results
) -> None:
    assert_close(run(shape), one_device)


def test_remat_draws_the_same_dropout_again(one_device: Results) -> None:
    assert_close(run((1, 1, 1), remat=True), one_device)


@pytest.mark.parametrize("tensor", [2, 4])
def test_pairs_are_split_as_their_kernels_and_never_over_the_rank(tensor: int) -> None:
    with jax.set_mesh(make_mesh(1, 2, tensor)):
        base = tiny_decoder(RAW)
        layer = jax.jit(lambda: LoRAAdapters(CONFIG, base.config, rngs=nnx.Rngs(0)))().layers[0]
        merged = merge(base, tiny_adapters(base)).layers[0]
    column, row = (P("fsdp", None), P(None, "tensor")), (P("tensor", None), P(None, "fsdp"))
    shared = P("fsdp", None), P(None, None)  # two key/value heads are not split over four shards
    kv = column if tensor == 2 else shared
    wanted = {"q_proj": column, "k_proj": kv, "v_proj": kv, "o_proj": row, "gate_proj": column, "up_proj": column}
    for name, specs in (wanted | {"down_proj": row}).items():
        pair = getattr(layer, name)
        assert (pair.a[...].sharding.spec, pair.b[...].sharding.spec) == specs, name
        assert projection(merged, name).kernel[...].sharding.spec == P(specs[0][0], specs[1][1]), name


def test_a_new_adapter_does_not_depend_on_the_mesh(base: Decoder) -> None:
    make = jax.jit(lambda: LoRAAdapters(CONFIG, base.config, rngs=nnx.Rngs(0)))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        split = jax.tree.map(np.asarray, jax.jit(lambda: LoRAAdapters(CONFIG, base.config, rngs=nnx.Rngs(0)))())
    jax.tree.map(np.testing.assert_array_equal, split, jax.tree.map(np.asarray, make()))


def test_a_merged_decoder_computes_alone_what_base_and_adapters_do(base: Decoder, adapters: LoRAAdapters) -> None:
    before = jax.tree.map(np.asarray, base)
    merged = merge(base, adapters)
    expected = hidden(base, adapters)
    assert np.abs(expected - hidden(base)).max() > 0.1
    np.testing.assert_allclose(hidden(merged), expected, rtol=0, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, base, before)
    assert merged.embed_tokens.weight.get_value() is base.embed_tokens.weight.get_value()
    restored = unmerge(merged, adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), restored, base)


def test_merging_sums_in_float32_and_rounds_once(base: Decoder) -> None:
    half = tiny_decoder(RAW, jnp.bfloat16)
    adapters = tiny_adapters(half, LoRAConfig(r=3, alpha=1.0, target_modules=("up_proj",)))
    merged = merge(half, adapters)
    pair = adapters.layers[0].up_proj
    kernel, a, b = (np.asarray(x[...], np.float64) for x in (half.layers[0].mlp.up_proj.kernel, pair.a, pair.b))
    exact = kernel + a @ b / 3
    ours = merged.layers[0].mlp.up_proj.kernel[...]
    assert ours.dtype == jnp.bfloat16
    nearest = exact.astype(np.float32).astype(jnp.bfloat16)
    assert (np.asarray(ours) == nearest).mean() > 0.999  # but for ties that float32 decides otherwise
    assert merged.layers[0].mlp.gate_proj.kernel.get_value() is half.layers[0].mlp.gate_proj.kernel.get_value()


def test_bfloat16_compute_keeps_float32_adapters_and_gradients(base: Decoder, adapters: LoRAAdapters) -> None:
    half = nnx.eval_shape(lambda: Decoder(base.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    nnx.update(half, nnx.state(base))

    @jax.jit
    def gradients(model: Decoder, adapters: LoRAAdapters, tokens: jax.Array) -> tuple[LoRAAdapters, jax.Array]:
        def loss(adapters: LoRAAdapters) -> tuple[jax.Array, jax.Array]:
            out = model(tokens, adapters=adapters).hidden
            return (out.astype(jnp.float32) ** 3).mean(), out

        return jax.grad(loss, has_aux=True)(adapters)

    ours, out = gradients(half, adapters, random_tokens())
    exact, _ = gradients(base, adapters, random_tokens())
    assert out.dtype == jnp.bfloat16
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert mine.dtype == jnp.float32
        assert 1e-4 < np.abs(mine - theirs).mean() / np.abs(theirs).mean() < 0.2


def test_the_scale_is_not_rounded_to_the_compute_dtype() -> None:
    config = LoRAConfig(r=3, alpha=1.0, rslora=True)
    base = tiny_decoder(RAW)
    pair = tiny_adapters(base, config).applied()[0].q_proj
    assert isinstance(pair, AppliedPair)
    unscaled = tiny_adapters(base, config).layers[0].q_proj.b[...]
    np.testing.assert_allclose(pair.b_ro, unscaled / math.sqrt(3), rtol=1e-6)
    assert pair.b_ro.dtype == jnp.float32


def test_wrong_calls_are_refused(base: Decoder, adapters: LoRAAdapters) -> None:
    tokens = random_tokens()
    for how in ({"adapted_bt": suffix()}, {"dropout_key": jax.random.key(0)}):
        with pytest.raises(ValueError, match="give adapters too"):
            base(tokens, **how)
    config = dataclasses.replace(base.config, num_hidden_layers=3, layer_types=())
    deeper = nnx.eval_shape(lambda: LoRAAdapters(CONFIG, config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="adapters of 3 layers for a decoder of 2"):
        base(tokens, adapters=deeper)
