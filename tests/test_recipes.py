"""The recipes for real targets at their true size, without a weight: shapes, taps, mask token, split over devices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from flax import nnx

from specjax.config import RunConfig, load_config
from specjax.models.decoder import Decoder, DecoderConfig, check_mesh_fits
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.layers import RopeConfig
from specjax.models.sharding import make_mesh, mesh_scope
from specjax.training.tasks import draft_config_of
from specjax.weights.hf_config import decoder_config_from_hf
from specjax.weights.module_params import abstract_module, flat_params

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# The published config.json of each target.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class Expected:
    """What a recipe must come to; target_parameters is the published count."""

    hf: dict
    target_parameters: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int
    rope: RopeConfig


RECIPES = {
    "qwen3-8b-dflash": Expected(QWEN3_8B, 8_190_735_360, (1, 9, 17, 25, 33), 151669, 16, RopeConfig(theta=1_000_000.0)),
    "llama3.1-8b-dflash": Expected(
        LLAMA_3_1_8B, 8_030_261_248, (1, 8, 15, 22, 29), 128002, 10, RopeConfig(theta=500_000.0)
    ),
}


@dataclass(frozen=True)
class Recipe:
    expected: Expected
    config: RunConfig
    target: DecoderConfig
    draft: DFlashConfig


@pytest.fixture(params=RECIPES)
def recipe(request, tmp_path) -> Recipe:
    expected = RECIPES[request.param]
    (tmp_path / "config.json").write_text(json.dumps(expected.hf), encoding="utf-8")
    config = load_config(CONFIGS / f"{request.param}.yaml", [f"target.path={tmp_path}"])
    return Recipe(expected, config, decoder_config_from_hf(expected.hf, "config.json"), draft_config_of(config))


def test_the_target_has_its_published_size(recipe):
    assert _size(lambda: Decoder(recipe.target, rngs=nnx.Rngs(0))) == recipe.expected.target_parameters


def test_the_draft_is_the_published_architecture(recipe):
    draft, expected = recipe.draft, recipe.expected
    assert draft.target_layer_ids == expected.target_layer_ids
    assert (draft.mask_token_id, draft.block_size) == (expected.mask_token_id, expected.block_size)
    assert draft.rope == expected.rope  # the target's theta, without its scaling
    assert draft.layer_types == ("full_attention",) * 5
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(draft, name) == expected.hf[name]


def test_the_draft_has_the_size_of_its_matrices(recipe):
    hidden, intermediate = (recipe.expected.hf[name] for name in ("hidden_size", "intermediate_size"))
    queries, keys = 32 * 128, 8 * 128
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * intermediate + 2 * hidden + 2 * 128
    fusion = 5 * hidden * hidden + hidden
    assert _size(lambda: DFlashDraft(recipe.draft, rngs=nnx.Rngs(0))) == 5 * layer + fusion + hidden


def test_the_mesh_of_the_recipe_splits_both_models_over_eight_devices(recipe):
    mesh = recipe.config.mesh
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (-1, 8, 1)
    assert recipe.config.training.batch_size % mesh.fsdp == 0
    with jax.set_mesh(make_mesh(1, mesh.fsdp, mesh.tensor)):
        check_mesh_fits(recipe.target)
        for build in (
            lambda: Decoder(recipe.target, rngs=nnx.Rngs(0)),
            lambda: DFlashDraft(recipe.draft, rngs=nnx.Rngs(0)),
        ):
            params = flat_params(abstract_module(build)).values()
            held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in params)
            assert held < 1.001 * sum(x.size for x in params) / 8


def _size(build: Callable[[], nnx.Module]) -> int:
    with mesh_scope():
        return sum(x.size for x in flat_params(abstract_module(build)).values())
