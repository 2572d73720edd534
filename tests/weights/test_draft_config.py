from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from transformers import Qwen3Config

from specjax.errors import InputError
from specjax.models.dflash import DFlashConfig, target_mismatches
from specjax.models.layers import RopeConfig
from specjax.weights import decoder_config_from_hf, draft_config_from_hf, draft_config_to_hf
from tests.weights.tiny import draft_config, raw_config

MIXED = {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 4}
SLIDING = {"layer_types": ("sliding_attention",) * 2, "sliding_window": 4}


def read(raw: dict[str, Any]) -> DFlashConfig:
    return draft_config_from_hf(raw, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        MIXED,
        MIXED | {"sliding_causal": True},
        SLIDING,
        SLIDING | {"sliding_causal": True},
        {"rope": RopeConfig(theta=1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=32)},
        {"own_mask_embedding": True},
        {"own_mask_embedding": True, "mask_token_id": 151936},
    ],
)
def test_configs_survive_the_round_trip(changes: dict[str, Any]) -> None:
    config = draft_config(**changes)
    assert read(draft_config_to_hf(config)) == config


def test_export_has_the_keys_servers_read() -> None:
    raw = draft_config_to_hf(draft_config())
    assert raw["architectures"] == ["DFlashDraftModel"]
    assert raw["model_type"] == "qwen3"
    assert raw["block_size"] == 4
    assert raw["dflash_config"] == {"mask_token_id": 63, "target_layer_ids": [1, 0], "block_size": 4}
    assert raw["num_target_layers"] == 4
    assert raw["tie_word_embeddings"] is False
    assert raw["rope_theta"] == 5000.0
    assert raw["rope_scaling"] is None
    assert raw["rope_parameters"] == {"rope_theta": 5000.0, "rope_type": "default"}
    assert raw["layer_types"] == ["full_attention"] * 2
    assert (raw["use_sliding_window"], raw["sliding_window"], raw["max_window_layers"]) == (False, None, 2)
    assert "auto_map" not in raw
    assert "is_causal" not in raw


@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_may_call_its_missing_head_tied(tied: bool) -> None:
    assert read(draft_config_to_hf(draft_config()) | {"tie_word_embeddings": tied}) == draft_config()


def test_export_says_bidirectional_only_where_sliding_layers_are() -> None:
    causal, bidirectional = (draft_config_to_hf(draft_config(**MIXED, sliding_causal=x)) for x in (True, False))
    assert "is_causal" not in causal
    assert "causal" not in causal["dflash_config"]
    assert bidirectional["is_causal"] is bidirectional["dflash_config"]["causal"] is False


def test_transformers_keeps_the_window_of_an_export() -> None:
    hf = Qwen3Config(**draft_config_to_hf(draft_config(**MIXED)))
    assert (hf.sliding_window, hf.layer_types) == (4, list(MIXED["layer_types"]))
    assert hf.rope_parameters == {"rope_theta": 5000.0, "rope_type": "default"}


def test_unsaid_causality_means_causal_sliding_layers() -> None:
    raw = draft_config_to_hf(draft_config(**MIXED, sliding_causal=True))
    assert read(raw).sliding_causal
    assert not read(raw | {"is_causal": False}).sliding_causal
    assert not read(raw | {"dflash_config": raw["dflash_config"] | {"causal": False}}).sliding_causal
    with pytest.raises(InputError, match="full-attention layers causal"):
        read(raw | {"is_causal": True})
    with pytest.raises(InputError, match="disagrees"):
        read(raw | {"is_causal": False, "dflash_config": raw["dflash_config"] | {"causal": True}})


def test_reads_older_folders() -> None:
    """Early z-lab folders: ids only inside dflash_config, no use_sliding_window, an auto_map; taps may be unnamed."""
    raw = draft_config_to_hf(draft_config(num_target_layers=36, target_layer_ids=(9, 25)))
    for name in ("use_sliding_window", "max_window_layers", "rope_parameters", "rope_scaling"):
        del raw[name]
    raw |= {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "layer_types": ["sliding_attention"] * 2}
    raw["sliding_window"] = 8
    config = read(raw)
    assert (config.sliding_window, config.target_layer_ids) == (8, (9, 25))
    del raw["dflash_config"]["target_layer_ids"]
    assert read(raw | {"num_hidden_layers": 5, "layer_types": None}).target_layer_ids == (1, 9, 17, 25, 33)
    top_level = {"mask_token_id": 63, "target_layer_ids": [2, 3], "dflash_config": {}}
    assert read(raw | top_level).target_layer_ids == (2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 8}, "block_size is 8, dflash_config.block_size is 4: these must agree"),
        ({"dflash_config": {"projector_type": "dspark"}}, "extension of DFlash is not supported"),
        ({"dflash_config": {"conv_kernel_size": 2}}, "dflash_config.conv_kernel_size is 2: not a field known"),
        ({"block_size": 1, "dflash_config": {}}, "at least 2"),
        ({"dflash_config": {"mask_token_id": 64}}, "outside the vocabulary of 64"),
        ({"dflash_config": {"mask_token_id": 2**31, "mask_embedding": "own"}}, "outside the vocabulary of 64"),
        ({"dflash_config": {"mask_embedding": True}}, "dflash_config.mask_embedding is True: must be 'own' or absent"),
        ({"dflash_config": {"target_layer_ids": [3]}}, "last cannot be tapped"),
        ({"dflash_config": {"target_layer_ids": "all"}}, "list of whole numbers"),
        ({"num_target_layers": None}, "num_target_layers"),
        ({"attention_bias": True}, "has no biases"),
        ({"partial_rotary_factor": 0.25}, "only 1"),
        ({"architectures": ["DFlash2DraftModel"]}, "supported is DFlashDraftModel"),
        ({"speculators_model_type": "dflash", "architectures": ["DFlashSpeculator"]}, "z-lab folder"),
        ({"surprise": 1}, "surprise is 1"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(draft_config_to_hf(draft_config()) | changes)


def test_every_problem_is_reported_at_once() -> None:
    raw = draft_config_to_hf(draft_config()) | {"vocab_size": 0, "surprise": 1, "hidden_act": "gelu"}
    raw["dflash_config"] = {"block_size": 5, "mask_token_id": 0}
    with pytest.raises(InputError) as caught:
        read(raw)
    for name in ("vocab_size", "surprise", "hidden_act", "block_size"):
        assert name in str(caught.value)


def test_every_field_of_the_file_reaches_the_config() -> None:
    """Changing any value in the exported file changes what is read back, so no field is dead on the way in."""
    base = draft_config(**MIXED, sliding_causal=True)
    changed: dict[str, Any] = {
        "rope": RopeConfig(theta=7.0),
        "layer_types": ("sliding_attention", "full_attention"),
        "target_layer_ids": (2,),
        "rms_norm_eps": 0.5,
        "sliding_causal": False,
        "own_mask_embedding": True,
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "head_dim": 8,
        "num_attention_heads": 8,
        "vocab_size": 80,
    }
    for field in fields(DFlashConfig):
        value = changed.get(field.name, getattr(base, field.name) - 1 if field.name not in changed else None)
        extra = {"layer_types": ("sliding_attention",) * 3} if field.name == "num_hidden_layers" else {}
        other = replace(base, **{field.name: value, **extra})
        assert read(draft_config_to_hf(other)) == other != base, field.name


def test_a_draft_is_checked_against_its_target() -> None:
    target = decoder_config_from_hf(raw_config(num_hidden_layers=4), "config.json")
    assert not target_mismatches(draft_config(), target)
    other = decoder_config_from_hf(raw_config(num_hidden_layers=2, hidden_size=64, vocab_size=63), "config.json")
    found = "; ".join(target_mismatches(draft_config(), other))
    for text in (
        "hidden_size is 32, the target's hidden_size is 64",
        "mask_token_id is 63, the target's vocab_size is 63",
        "num_target_layers is 4, the target's num_hidden_layers is 2",
        "target_layer_ids [1, 0]",
    ):
        assert text in found


def test_a_target_may_have_other_rows_as_long_as_it_has_the_masks() -> None:
    for rows in (128, 64):
        target = decoder_config_from_hf(raw_config(num_hidden_layers=4, vocab_size=rows), "config.json")
        assert not target_mismatches(draft_config(), target)
        assert not target_mismatches(draft_config(mask_token_id=200, own_mask_embedding=True), target)
    smaller = decoder_config_from_hf(raw_config(num_hidden_layers=4, vocab_size=48), "config.json")
    assert not target_mismatches(draft_config(mask_token_id=47), smaller)
    assert not target_mismatches(draft_config(own_mask_embedding=True), smaller)
    (problem,) = target_mismatches(draft_config(mask_token_id=48), smaller)
    assert problem.startswith("mask_token_id is 48, the target's vocab_size is 48")
