"""Tiny models whose answers vary, and how two answers are compared."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.layers import RopeConfig
from specjax.models.sharding import SPECS, mesh_scope, put
from specjax.weights.module_params import abstract_module, flat_params, with_params

# Heads, width and vocabulary divide by 8; key/value heads do not, so a tensor axis of 8 copies them.
TARGET = DecoderConfig(
    model_type="qwen3",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position_embeddings=160,
    rope=RopeConfig(theta=500.0),
    qk_norm=True,
)
FULL = DFlashConfig.for_target(TARGET, num_layers=2, block_size=4, mask_token_id=95, target_layer_ids=(1, 0))
SLIDING = dataclasses.replace(
    FULL, layer_types=("sliding_attention", "full_attention"), sliding_window=5, sliding_causal=True, block_size=8
)
# MASK is past every shard of the target's embedding, and embedded by the draft.
OWN_MASK = dataclasses.replace(FULL, mask_token_id=100, own_mask_embedding=True)
DRAFTS = {"full": FULL, "sliding": SLIDING}
OTHER_TARGETS = {
    "sliding": dataclasses.replace(
        TARGET, sliding_window=6, layer_types=("sliding_attention", "full_attention", "sliding_attention")
    ),
    "qwen2": dataclasses.replace(TARGET, model_type="qwen2", attention_bias=True, qk_norm=False),
    "one key/value head": dataclasses.replace(TARGET, num_key_value_heads=1),
}
TIE_MARGIN = 1e-5  # of the logits' range

Tokens = Sequence[Sequence[int]]
Case = tuple[Decoder, list[list[int]], list[list[int]]]  # a target, prompts and its answers
Cases = Callable[[int, int], Case]  # of a seed and a number of prompts


def random_target(seed: int, config: DecoderConfig = TARGET) -> Decoder:
    return _filled(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32), seed)


def random_draft(seed: int, config: DFlashConfig) -> DFlashDraft:
    return _filled(lambda: DFlashDraft(config, rngs=nnx.Rngs(0), dtype=jnp.float32), seed)


def _filled(build: Any, seed: int) -> Any:
    """The module on the mesh in force; values depend on the parameter's path and `seed` alone.

    Weights are wide, so that greedy answers wander instead of repeating one token.
    """
    with mesh_scope():
        module = abstract_module(build)
        arrays = {}
        for path, param in flat_params(module).items():
            drawn = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(param.shape, np.float32)
            scale = 1.0 if path.startswith("embed_tokens") else 2.0 * param.shape[0] ** -0.5
            value = 1 + 0.3 * drawn if path.endswith("scale") else scale * drawn
            arrays[path] = put(np.asarray(value, np.float32), param.sharding.spec)
        return with_params(module, arrays)


def random_prompts(seed: int, count: int, longest: int = 24) -> list[list[int]]:
    """Prompts of unequal lengths, the first of one token."""
    rng = np.random.default_rng([seed, count])
    lengths = [1, *rng.permutation(np.arange(2, longest + 1))[: count - 1]]
    return [rng.integers(0, TARGET.vocab_size, n).tolist() for n in lengths]


@jax.jit
def _logits(target: Decoder, tokens_bt: jax.Array) -> jax.Array:
    return target.logits(target(tokens_bt).hidden)


def all_logits(target: Decoder, rows: Tokens) -> np.ndarray:
    """Logits [b, positions, v] after every token of `rows`, without a cache; a row's padding has some too."""
    padded = np.zeros((len(rows), TARGET.max_position_embeddings), np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    with mesh_scope():
        return np.asarray(_logits(target, put(padded, SPECS.act_bt)))


def next_logits(target: Decoder, tokens: Sequence[int]) -> np.ndarray:
    """Logits after the last of `tokens`, without a cache."""
    return all_logits(target, [tokens])[0, len(tokens) - 1]


def is_tie(logits: np.ndarray) -> bool:
    second, first = np.sort(logits)[-2:]
    return bool(first - second < TIE_MARGIN * (logits.max() - logits.min()))


def assert_same_tokens(target: Decoder, prompts: Tokens, actual: Tokens, expected: Tokens) -> None:
    """Equal token for token; at most one row may leave the other, and only where the target's choice is a tie."""
    ties = 0
    for prompt, left, right in zip(prompts, actual, expected, strict=True):
        if list(left) == list(right):
            continue
        pairs = list(zip(left, right, strict=False))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        assert at is not None, f"lengths {len(left)} and {len(right)}"
        assert is_tie(next_logits(target, [*prompt, *right[:at]])), f"token {at}: {left[at]}, not {right[at]}"
        ties += 1
    assert ties <= 1
