"""Tiny models of every family, and parameters that make every one of them matter."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.layers import RopeConfig
from specjax.models.sharding import mesh_scope
from specjax.weights import decoder_config_from_hf
from specjax.weights.module_params import abstract_module, flat_params, with_params

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)


def raw_config(model_type: str = "qwen3", **changes: Any) -> dict[str, Any]:
    """A config.json object in the older spelling, as small as the family allows."""
    raw: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return raw | changes


def draft_config(**changes: Any) -> DFlashConfig:
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "vocab_size": 64,
        "rope": RopeConfig(theta=5000.0),
        "block_size": 4,
        "mask_token_id": 63,
        "target_layer_ids": (1, 0),
        "num_target_layers": 4,
    }
    return DFlashConfig(**values | changes)


def random_array(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that depend on the parameter's path alone; norm scales are spread around one."""
    drawn = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape, np.float32)
    return 1 + 0.3 * drawn if path.endswith("scale") else 0.3 * drawn


def filled(module: Any, dtype: Any = jnp.float32) -> Any:
    """A module with the shapes of the abstract `module` on the mesh in force, and values of `random_array`."""
    arrays = {}
    for path, param in flat_params(module).items():
        arrays[path] = jax.device_put(jnp.asarray(random_array(path, param.shape), dtype), param.sharding)
    return with_params(module, arrays)


def tiny_decoder(raw: dict[str, Any], dtype: Any = jnp.float32) -> Decoder:
    config = decoder_config_from_hf(raw, "config.json")
    with mesh_scope():
        build = lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)  # noqa: E731
        return filled(abstract_module(build), dtype)


def tiny_draft(config: DFlashConfig, dtype: Any = jnp.float32) -> DFlashDraft:
    with mesh_scope():
        build = lambda: DFlashDraft(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)  # noqa: E731
        return filled(abstract_module(build), dtype)


@jax.jit
def _logits(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    return decoder.logits(decoder(tokens).hidden)


def logits(decoder: Decoder, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with mesh_scope():
        return np.asarray(_logits(decoder, jnp.asarray(tokens)))


def assert_same_params(a: Any, b: Any) -> None:
    """Equal names, dtypes and bytes."""
    left, right = flat_params(a), flat_params(b)
    assert list(left) == list(right)
    for path in left:
        x, y = np.asarray(left[path]), np.asarray(right[path])
        assert (path, x.dtype, x.shape, x.tobytes()) == (path, y.dtype, y.shape, y.tobytes())
