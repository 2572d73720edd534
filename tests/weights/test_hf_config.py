from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config

from specjax.errors import InputError
from specjax.models.layers import RopeConfig, rope_frequencies
from specjax.weights import hf_config
from specjax.weights.config_fields import FIXED, IGNORED, REFUSED, ROPE_FIELDS, ConfigReader
from specjax.weights.hf_config import decoder_config_from_hf, decoder_config_to_hf
from tests.weights.tiny import logits, raw_config, tiny_decoder

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}

# The published config.json of Qwen/Qwen2.5-7B.
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

# Field read for the family -> (the rest of the config, the two values to compare).
PERTURBED: dict[str, dict[str, tuple[dict[str, Any], Any, Any]]] = {
    "qwen3": {
        "vocab_size": ({}, 64, 72),
        "hidden_size": ({}, 32, 48),
        "intermediate_size": ({}, 48, 32),
        "num_hidden_layers": ({}, 1, 2),
        "num_attention_heads": ({}, 4, 2),
        "num_key_value_heads": ({}, 2, 4),
        "head_dim": ({}, 16, 8),
        "rms_norm_eps": ({}, 1e-6, 1e-2),
        "max_position_embeddings": ({"rope_scaling": YARN}, 64, 16),
        "rope_theta": ({}, 10000.0, 100.0),
        "rope_scaling": ({}, None, LINEAR),
        "rope_parameters": ({"rope_theta": None}, {"rope_theta": 10000.0}, {"rope_theta": 500.0}),
        "tie_word_embeddings": ({}, False, True),
        "attention_bias": ({}, False, True),
        "use_sliding_window": (SLIDING, True, False),
        "sliding_window": (SLIDING, 4, 2),
        "max_window_layers": (SLIDING, 0, 1),
        "layer_types": (SLIDING, ["full_attention"], ["sliding_attention"]),
        "model_type": ({}, "qwen3", "llama"),
    },
    "llama": {"attention_bias": ({}, False, True), "mlp_bias": ({}, False, True)},
}
CASES = [(family, name, *case) for family, cases in PERTURBED.items() for name, case in cases.items()]

ROPE_BASE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": None,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": True,
    },
}
ROPE_CHANGED = {
    "factor": 3.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.5,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "mscale": 0.9,
    "mscale_all_dim": 0.5,
    "truncate": False,
}


@functools.cache
def one_layer_logits(raw: str) -> np.ndarray:
    return logits(tiny_decoder(json.loads(raw)))


def read(**changes: Any) -> Any:
    return decoder_config_from_hf(raw_config(**changes), "config.json")


def differs(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape != b.shape or float(np.abs(a - b).max()) > 1e-4


@pytest.mark.parametrize(("family", "name", "rest", "before", "after"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_every_used_field_changes_the_output(family: str, name: str, rest: Any, before: Any, after: Any) -> None:
    raws = [raw_config(family, num_hidden_layers=1) | rest | {name: value} for value in (before, after)]
    assert differs(*(one_layer_logits(json.dumps(raw, sort_keys=True)) for raw in raws))


@pytest.mark.parametrize(("rope_type", "name"), [(t, n) for t in ROPE_BASE for n in ROPE_BASE[t]])
def test_every_rope_field_changes_the_rotary_frequencies(rope_type: str, name: str) -> None:
    before = {"rope_type": rope_type} | ROPE_BASE[rope_type]
    ropes = [read(rope_parameters=rope).rope for rope in (before, before | {name: ROPE_CHANGED[name]})]
    first, second = (np.append(*rope_frequencies(rope, 16, 64)) for rope in ropes)
    assert differs(first, second)


def test_the_perturbations_cover_every_field_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[ConfigReader] = []

    class Recording(ConfigReader):
        def __init__(self, *args: Any):
            super().__init__(*args)
            readers.append(self)

    monkeypatch.setattr(hf_config, "ConfigReader", Recording)
    covered = {name for cases in PERTURBED.values() for name in cases}
    for family in hf_config.FAMILIES:
        decoder_config_from_hf(raw_config(family), "config.json")
        # `architectures` selects nothing by itself: a wrong one is refused, see test_unknown_architectures.
        assert readers[-1].used - covered == {"architectures"}
    assert {t: set(ROPE_BASE.get(t, {})) for t in ROPE_FIELDS} == {t: set(a | b) for t, (a, b) in ROPE_FIELDS.items()}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_both_rope_spellings_mean_the_same(scaling: dict[str, Any] | None) -> None:
    old = read(rope_theta=5e5, rope_scaling=scaling)
    parameters = {"rope_theta": 5e5} | {("rope_type" if k == "type" else k): v for k, v in (scaling or {}).items()}
    new = decoder_config_from_hf(
        {k: v for k, v in raw_config().items() if k != "rope_theta"} | {"rope_parameters": parameters}, "config.json"
    )
    both = read(rope_theta=5e5, rope_scaling=scaling, rope_parameters=parameters)
    assert old == new == both


def test_spellings_that_disagree_are_refused() -> None:
    with pytest.raises(InputError, match="must agree"):
        read(rope_theta=1e4, rope_parameters={"rope_theta": 1e6})
    with pytest.raises(InputError, match="disagrees with rope_parameters"):
        read(rope_scaling=LINEAR, rope_parameters=YARN)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        read(hidden_act="gelu", quantization_config={"bits": 4}, vocab_size="many", surprise=1, num_hidden_layers=None)
    for name in ("hidden_act", "quantization_config", "vocab_size", "surprise", "num_hidden_layers", "config.json"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not one of default, linear"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "multimodal rotary"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "does not use beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "must be a number above 0"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention is not one of"),
        ({"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window is not true"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "must be even"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"mlp_bias": True}, "this family always has False"),
        ({"model_type": "qwen2", "attention_bias": False}, "this family always has True"),
        ({"model_type": "llama", "sliding_window": 8}, "no sliding window"),
        ({"rms_norm_eps": 0}, "a number above 0"),
        ({"is_encoder_decoder": True}, "only false is supported"),
    ],
)
def test_refused_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**changes)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals_say_why(name: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**{name: 8})
    assert REFUSED[name] in str(caught.value)


def test_ignored_fields_are_ignored() -> None:
    assert read(**dict.fromkeys(IGNORED, "anything")) == read()
    assert read(**{name: values[0] for name, values in FIXED.items()}) == read()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"architectures": ["Qwen3ForSequenceClassification"]},
        {"architectures": ["LlamaForCausalLM"]},
        {"model_type": "qwen3_vl", "text_config": {}},
    ],
)
def test_unknown_architectures_are_refused_naming_the_known(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        read(**changes)
    for known in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert known in str(caught.value)


@pytest.mark.parametrize("cls", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("dump", ["to_dict", "to_diff_dict"])
def test_reads_what_transformers_writes(cls: Any, dump: str) -> None:
    hf = cls(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    config = decoder_config_from_hf(getattr(hf, dump)(), "config.json")
    assert config.num_hidden_layers == 3
    assert config.head_dim == (128 if cls is Qwen3Config else 8)
    assert config.rope == RopeConfig(theta=10000.0)


def test_windows_follow_transformers() -> None:
    hf = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=16, max_window_layers=3)
    config = decoder_config_from_hf(hf.to_diff_dict(), "config.json")
    assert (list(config.layer_types), config.sliding_window) == (hf.layer_types, 16)
    unused = Qwen2Config(num_hidden_layers=4, use_sliding_window=False, sliding_window=131072, max_window_layers=0)
    raw = unused.to_diff_dict() | {"sliding_window": 131072, "layer_types": None}
    assert decoder_config_from_hf(raw, "config.json").sliding_window is None


@pytest.mark.parametrize(
    "raw",
    [
        raw_config("llama", attention_bias=True, mlp_bias=True, rope_scaling=ROPE_BASE["llama3"] | {"type": "llama3"}),
        raw_config("qwen2", tie_word_embeddings=True, **SLIDING | {"max_window_layers": 1}),
        raw_config("qwen3", rope_scaling=YARN | {"original_max_position_embeddings": 16, "truncate": False}),
    ],
    ids=lambda raw: raw["model_type"],
)
def test_configs_survive_the_round_trip_and_transformers_reads_them(raw: dict[str, Any], tmp_path: Any) -> None:
    config = decoder_config_from_hf(raw, "config.json")
    written = decoder_config_to_hf(config)
    assert decoder_config_from_hf(written, "config.json") == config
    hf = AutoConfig.for_model(**written)
    assert decoder_config_from_hf(hf.to_diff_dict(), "config.json") == config


def test_a_config_that_the_family_cannot_carry_is_refused() -> None:
    with pytest.raises(InputError, match="causal is False"):
        decoder_config_to_hf(replace(read(), causal=False))
    with pytest.raises(InputError, match="qk_norm is True"):
        decoder_config_to_hf(replace(read(model_type="llama"), qk_norm=True))


def test_qwen2_5_is_read_as_published() -> None:
    config = decoder_config_from_hf(QWEN2_5_7B, "test")
    assert (config.head_dim, config.attention_bias, config.qk_norm) == (128, True, False)
    assert config.layer_types == ("full_attention",) * 28
    with pytest.raises(InputError, match="use_mrope"):
        decoder_config_from_hf(QWEN2_5_7B | {"use_mrope": True}, "test")
