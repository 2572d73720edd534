"""The DFlash draft against plain PyTorch, and the facts of its configuration."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from specjax.models.decoder import DecoderConfig
from specjax.models.dflash import DFlashConfig, DFlashDraft, default_target_layer_ids
from specjax.models.layers import Embedding, RopeConfig
from specjax.models.sharding import SPECS, put
from tests.models.torch_weights import filled
from tests.torch_draft import TorchDraft, randomised

FULL = DFlashConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    vocab_size=64,
    rope=RopeConfig(theta=500.0),
    block_size=4,
    mask_token_id=63,
    target_layer_ids=(4, 1),
    num_target_layers=8,
)
SLIDING = dataclasses.replace(FULL, layer_types=("sliding_attention", "full_attention"), sliding_window=6)
CONFIGS = {
    "full": FULL,
    "sliding-bidirectional": SLIDING,
    "sliding-causal": dataclasses.replace(SLIDING, sliding_causal=True),
    "window-shorter-than-block": dataclasses.replace(SLIDING, sliding_window=3),
}
CONTEXT = 16


class Inputs(NamedTuple):
    taps: np.ndarray
    positions: np.ndarray
    noise: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def torch(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(x) for x in self)

    def jax(self) -> tuple[jax.Array, ...]:
        specs = SPECS.act_btd, SPECS.act_bt, SPECS.act_bNBd, SPECS.act_bN, SPECS.act_bN
        return tuple(put(x, spec) for x, spec in zip(self, specs, strict=True))


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """Row 0 holds documents of 9 and 7 tokens, row 1 one of 13; the last block of each row is padding."""
    rng = np.random.default_rng(0)
    return Inputs(
        taps=rng.standard_normal((2, CONTEXT, 2 * FULL.hidden_size)).astype(np.float32),
        positions=np.array([[*range(9), *range(7)], [*range(13), 0, 0, 0]], np.int32),
        noise=rng.standard_normal((2, 4, FULL.block_size, FULL.hidden_size)).astype(np.float32),
        start=np.array([[0, 0, 9, 0], [0, 0, 0, 0]], np.int32),
        stop=np.array([[1, 8, 13, 0], [3, 7, 12, 0]], np.int32),
    )


def make_draft(config: DFlashConfig) -> DFlashDraft:
    return DFlashDraft(config, rngs=nnx.Rngs(0), dtype=jnp.float32)


def load(config: DFlashConfig) -> tuple[TorchDraft, DFlashDraft]:
    reference = randomised(TorchDraft(config), seed=1)
    return reference, filled(partial(make_draft, config), reference.state_dict())


@partial(jax.jit, static_argnames=("remat", "query_chunk"))
def run(
    draft: DFlashDraft,
    taps: jax.Array,
    positions: jax.Array,
    noise: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    remat: bool = False,
    query_chunk: int = 1024,
) -> jax.Array:
    context_kv = draft.context_kv(draft.context(taps), positions)
    return draft(noise, context_kv, start, stop, remat=remat, query_chunk=query_chunk)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_equal_torch(name: str, inputs: Inputs) -> None:
    reference, draft = load(CONFIGS[name])
    with torch.no_grad():
        expected = reference(*inputs.torch())
    assert expected.std() > 0.5
    np.testing.assert_allclose(run(draft, *inputs.jax()), expected, rtol=0, atol=2e-5)


def test_gradients_equal_torch_chunked_and_rematerialised(inputs: Inputs) -> None:
    reference, draft = load(CONFIGS["sliding-causal"])
    reference(*inputs.torch()).sin().sum().backward()
    arrays = inputs.jax()
    loss = lambda draft: jnp.sin(run(draft, *arrays, remat=True, query_chunk=6)).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(draft)
    state = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    expected = filled(partial(make_draft, draft.config), state)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("mask_token_id", [63, 64])
def test_a_mask_embedding_of_its_own_is_a_row_of_the_table_that_learns(mask_token_id: int, inputs: Inputs) -> None:
    """In torch it is a row of an embedding; the target's table here holds another at this id, or none."""
    config = dataclasses.replace(FULL, mask_token_id=mask_token_id, own_mask_embedding=True)
    reference = randomised(TorchDraft(config), seed=1)
    rng = np.random.default_rng(2)
    table = rng.standard_normal((65, FULL.hidden_size)).astype(np.float32)
    ids = rng.integers(0, 63, inputs.noise.shape[:3], np.int32)
    ids[..., 1:] = np.where(rng.random(ids[..., 1:].shape) < 0.8, mask_token_id, ids[..., 1:])
    ids[..., 0] = mask_token_id - 1
    rows = torch.tensor(table).requires_grad_()
    taps, positions, _, start, stop = inputs.torch()
    reference(taps, positions, rows[torch.tensor(ids)], start, stop).sin().sum().backward()
    assert rows.grad is not None

    state = reference.state_dict() | {"mask_embedding": torch.tensor(table[mask_token_id])}
    draft = filled(partial(make_draft, config), state)
    embedding = Embedding(64, FULL.hidden_size, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    others = np.where(np.arange(64)[:, None] == mask_token_id, 9.0, table[:64])
    embedding.weight[...] = jnp.asarray(others)
    target: Any = SimpleNamespace(embed=embedding)
    arrays, noise_ids = inputs.jax(), put(ids, SPECS.act_bNB)

    def loss(draft: DFlashDraft) -> jax.Array:
        noise = draft.embed_noise(target, noise_ids)
        return jnp.sin(run(draft, *arrays[:2], noise, *arrays[3:])).sum()

    gradient = jax.jit(jax.grad(loss))(draft).mask_embedding[...]
    expected = rows.grad[mask_token_id].numpy()
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_target_is_never_asked_for_a_mask_that_the_draft_embeds() -> None:
    config = dataclasses.replace(FULL, mask_token_id=64, own_mask_embedding=True)
    asked = []
    target: Any = SimpleNamespace(embed=lambda ids: asked.append(ids) or jnp.ones((*ids.shape, FULL.hidden_size)))
    ids = put(np.array([[[5, 64, 64, 63]]], np.int32), SPECS.act_bNB)
    noise = DFlashDraft(config, rngs=nnx.Rngs(0), dtype=jnp.float32).embed_noise(target, ids)
    np.testing.assert_array_equal(noise[0, 0, :, 0], [1.0, 0.0, 0.0, 1.0])
    np.testing.assert_array_equal(np.asarray(asked[0])[ids != 64], [5, 63])
    assert int(asked[0].max()) < 64


def test_the_gradient_of_a_mask_embedding_is_summed_in_float32_under_bfloat16_compute() -> None:
    """Each of 1001 slots adds 1, and bfloat16 has no 1001."""
    config = dataclasses.replace(FULL, own_mask_embedding=True)
    draft = DFlashDraft(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    target: Any = SimpleNamespace(embed=lambda ids: jnp.zeros((*ids.shape, FULL.hidden_size), jnp.bfloat16))
    ids = put(np.full((1, 143, 7), 63, np.int32), SPECS.act_bNB)

    def loss(draft: DFlashDraft) -> jax.Array:
        noise = draft.embed_noise(target, ids)
        assert noise.dtype == jnp.bfloat16
        return noise.astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(loss)(draft).mask_embedding[...], 1001.0)


def test_a_block_sees_its_documents_context_strictly_before_its_anchor(inputs: Inputs) -> None:
    """At inference the anchor is the bonus token, whose hidden state does not exist yet."""
    _, draft = load(FULL)
    base = np.asarray(run(draft, *inputs.jax()))
    for slot in range(CONTEXT):
        taps = inputs.taps.copy()
        taps[:, slot] += 1.0
        changed = np.abs(np.asarray(run(draft, *inputs._replace(taps=taps).jax())) - base).max(-1)
        seen = (inputs.start <= slot) & (slot < inputs.stop)
        np.testing.assert_array_equal(changed == 0.0, np.repeat(~seen[..., None], FULL.block_size, -1), str(slot))


def test_positions_go_on_past_every_length_that_the_config_names() -> None:
    """A draft is used beyond the lengths that it was trained on; clamped positions would make all of them one."""
    cos, sin = make_draft(FULL).rotary(jnp.arange(8 * FULL.max_position_embeddings))
    frequencies = FULL.rope.theta ** -(np.arange(0, FULL.head_dim, 2) / FULL.head_dim)
    angles = np.arange(8 * FULL.max_position_embeddings)[:, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=1e-4)


def test_a_single_row_equals_its_row_of_a_batch(inputs: Inputs) -> None:
    _, draft = load(FULL)
    batch = run(draft, *inputs.jax())
    alone = run(draft, *Inputs(*(x[1:] for x in inputs)).jax(), query_chunk=6)
    np.testing.assert_allclose(alone, batch[1:], rtol=0, atol=1e-5)


def test_a_block_sees_no_other_block(inputs: Inputs) -> None:
    _, draft = load(FULL)
    base = np.asarray(run(draft, *inputs.jax()))
    noise = inputs.noise.copy()
    noise[:, 1] += 1.0
    changed = np.abs(np.asarray(run(draft, *inputs._replace(noise=noise).jax())) - base).max((-1, -2)) > 0
    np.testing.assert_array_equal(changed, [[False, True, False, False]] * 2)


@pytest.mark.parametrize(
    ("layers", "count", "ids"),
    [
        (36, 5, (1, 9, 17, 25, 33)),
        (78, 5, (1, 20, 38, 56, 75)),  # 19.5 -> 20 and 56.5 -> 56: half to even
        (36, 1, (18,)),
        (13, 1, (6,)),
        (8, 5, (1, 2, 3, 4, 5)),
        (36, 2, (1, 33)),
    ],
)
def test_default_taps(layers: int, count: int, ids: tuple[int, ...]) -> None:
    assert default_target_layer_ids(layers, count) == ids


def test_default_taps_are_distinct_and_can_be_tapped() -> None:
    """`DFlashConfig` refuses ids that are not."""
    for layers in range(4, 100):
        for count in range(1, min(layers - 3, 12) + 1):
            ids = default_target_layer_ids(layers, count)
            config = dataclasses.replace(FULL, target_layer_ids=ids, num_target_layers=layers)
            assert list(config.target_layer_ids) == sorted(ids)
            assert len(ids) == count


@pytest.mark.parametrize(("layers", "count", "message"), [(7, 5, "set target_layer_ids"), (36, 0, "at least 1")])
def test_default_taps_that_do_not_exist(layers: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_target_layer_ids(layers, count)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_layer_ids": (1, 7)}, "from 0 to 6"),
        ({"target_layer_ids": (-1,)}, "from 0 to 6"),
        ({"target_layer_ids": (2, 2)}, "distinct"),
        ({"target_layer_ids": ()}, "distinct"),
        ({"block_size": 1}, "block_size 1"),
        ({"mask_token_id": 64}, "mask_token_id 64"),
        ({"mask_token_id": -1, "own_mask_embedding": True}, "mask_token_id -1"),
        ({"mask_token_id": 2**31, "own_mask_embedding": True}, "mask_token_id 2147483648"),
        ({"layer_types": ("sliding_attention",) * 2}, "sliding_window is not set"),
        ({"layer_types": ("full_attention",)}, "1 entries for 2 layers"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FULL, **fields)


@pytest.mark.parametrize("window", [None, 32])
def test_the_default_draft_of_a_target_takes_its_shape_but_not_its_rope_scaling(window: int | None) -> None:
    target = DecoderConfig(
        model_type="llama",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        rope=RopeConfig(theta=5e5, rope_type="llama3", factor=8.0, original_max_position_embeddings=64),
        attention_bias=True,
    )
    draft = DFlashConfig.for_target(
        target, num_layers=2, block_size=8, mask_token_id=95, target_layer_ids=(1, 8), sliding_window=window
    )
    shared = {f.name for f in dataclasses.fields(target)} & {f.name for f in dataclasses.fields(draft)}
    shared -= {"num_hidden_layers", "rope", "layer_types", "sliding_window"}
    assert all(getattr(draft, name) == getattr(target, name) for name in shared)
    assert len(shared) == 8
    assert draft.rope == RopeConfig(theta=5e5)
    assert draft.num_target_layers == 12
    assert not draft.block.attention_bias
    assert draft.block.qk_norm
    assert draft.layer_types == (("full_attention" if window is None else "sliding_attention"),) * 2
    assert draft.sliding_window == window
    assert not draft.sliding_causal
