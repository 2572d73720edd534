"""The decoder against transformers: logits and every hidden state, float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.layers import RopeConfig
from specjax.models.sharding import SPECS, put
from tests.models.ropes import ROPES, hf_rope
from tests.models.torch_weights import filled, randomise

TOKENS = 40
TOLERANCE = 2e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Family:
    """A transformers class, its arguments and those of DecoderConfig, beside the shape that both take."""

    model_type: str
    model: type
    config: type
    theirs: dict[str, Any]
    ours: dict[str, Any]
    rope: str = "default"
    causal: bool = True


FAMILIES = {
    "llama-llama3-untied": Family("llama", LlamaForCausalLM, LlamaConfig, {}, {}, "llama3"),
    "llama-yarn-tied": Family(
        "llama", LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}, {"tie_word_embeddings": True}, "yarn"
    ),
    "llama-linear-all-biases": Family(
        "llama",
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        "linear",
    ),
    "qwen2-sliding": Family(
        "qwen2",
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {
            "attention_bias": True,
            "sliding_window": 5,
            "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        },
    ),
    "qwen3-max-window-layers": Family(
        "qwen3",
        Qwen3ForCausalLM,
        Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True},
        {
            "qk_norm": True,
            "sliding_window": 7,
            "layer_types": ("full_attention", "sliding_attention", "sliding_attention"),
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-bidirectional": Family("qwen2", Qwen2ForCausalLM, Qwen2Config, {}, {"attention_bias": True}, causal=False),
}


def hf_model(family: Family) -> torch.nn.Module:
    config = family.config(
        **SHAPE | family.theirs, rope_parameters=hf_rope(ROPES[family.rope]), attn_implementation="eager"
    )
    model = family.model(config).eval()
    randomise(model, seed=0)
    return model


def decoder_config(family: Family) -> DecoderConfig:
    rope = RopeConfig(**ROPES[family.rope])
    return DecoderConfig(model_type=family.model_type, rope=rope, causal=family.causal, **SHAPE | family.ours)


def make_decoder(config: DecoderConfig) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32)


def random_tokens(seed: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (batch, TOKENS), dtype=np.int32)


@partial(jax.jit, static_argnames="tap_ids")
def run(model: Decoder, tokens: jax.Array, tap_ids: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    out = model(tokens, tap_ids=tap_ids)
    assert out.taps is not None
    return model.logits(out.hidden), out.hidden, out.taps


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_hidden_states_equal_transformers(name: str) -> None:
    family = FAMILIES[name]
    reference = hf_model(family)
    model = filled(partial(make_decoder, decoder_config(family)), reference.state_dict())
    tokens = random_tokens(1)
    full = torch.zeros(2, 1, TOKENS, TOKENS)
    mask = {} if family.causal else {"attention_mask": full}
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True, **mask)
    layers = SHAPE["num_hidden_layers"]
    logits, hidden, taps = run(model, put(tokens, SPECS.act_bt), tuple(reversed(range(layers - 1))))
    # Tap l is hidden_states[l + 1], in the order asked for; the last hidden state is taken after the final norm.
    expected = torch.cat([theirs.hidden_states[i + 1] for i in reversed(range(layers - 1))], dim=-1)
    assert theirs.logits.std() > 0.3
    np.testing.assert_allclose(taps, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(hidden, theirs.hidden_states[-1], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits, theirs.logits, rtol=0, atol=TOLERANCE)
    assert logits.dtype == jnp.float32


@pytest.fixture(scope="module")
def sliding_decoder() -> Decoder:
    family = FAMILIES["qwen2-sliding"]
    return filled(partial(make_decoder, decoder_config(family)), hf_model(family).state_dict())


def test_a_packed_row_equals_its_documents_alone(sliding_decoder: Decoder) -> None:
    tokens, lengths = random_tokens(2, batch=1), (9, 25, 6)
    starts = np.cumsum((0, *lengths[:-1]))
    document_start = np.repeat(starts, lengths).astype(np.int32)[None]
    packed = jax.jit(lambda model, x, start: model(x, document_start_bt=start, tap_ids=(0,)))(
        sliding_decoder, put(tokens, SPECS.act_bt), put(document_start, SPECS.act_bt)
    )
    alone = np.zeros((len(lengths), TOKENS), np.int32)  # what follows a document cannot be seen by it
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        alone[row, :length] = tokens[0, start : start + length]
    _, hidden, taps = run(sliding_decoder, put(alone, SPECS.act_bt), (0,))
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        inside = slice(start, start + length)
        np.testing.assert_allclose(packed.hidden[0, inside], hidden[row, :length], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(packed.taps[0, inside], taps[row, :length], rtol=0, atol=TOLERANCE)


def test_remat_and_query_chunks_change_neither_loss_nor_gradient(sliding_decoder: Decoder) -> None:
    tokens = put(random_tokens(3), SPECS.act_bt)

    @partial(jax.jit, static_argnames=("remat", "query_chunk"))
    def loss_and_gradient(model: Decoder, remat: bool, query_chunk: int) -> tuple[jax.Array, Decoder]:
        def loss(model: Decoder) -> jax.Array:
            hidden = model(tokens, remat=remat, query_chunk=query_chunk).hidden
            return (jax.nn.log_softmax(model.logits(hidden)) ** 2).mean()

        return jax.value_and_grad(loss)(model)

    plain, chunked = (loss_and_gradient(sliding_decoder, *how) for how in ((False, 1024), (True, 7)))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, chunked)


def test_bfloat16_compute_keeps_float32_parameters_and_logits(sliding_decoder: Decoder) -> None:
    tokens = put(random_tokens(4), SPECS.act_bt)
    half = nnx.eval_shape(lambda: Decoder(sliding_decoder.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    nnx.update(half, nnx.state(sliding_decoder))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.float32)}
    logits, hidden, taps = run(half, tokens, (0,))
    assert (logits.dtype, hidden.dtype, taps.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    exact = run(sliding_decoder, tokens, (0,))[0]
    error = np.abs(logits - exact).mean() / np.abs(exact).mean()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ("full_attention",)}, "1 entries for 3 layers"),
        ({"layer_types": ("full_attention", "full_attention", "chunked_attention")}, "chunked_attention"),
        ({"layer_types": ("sliding_attention",) * 3}, "sliding_window is not set"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(model_type="qwen3", rope=RopeConfig(), **SHAPE | fields)
