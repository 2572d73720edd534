from __future__ import annotations

import pytest

from specjax.weights.key_tables import DRAFT_KEYS, LM_HEAD, TARGET_KEYS, KeyTable
from specjax.weights.module_params import flat_params
from tests.weights.tiny import draft_config, raw_config, tiny_decoder, tiny_draft

MODELS = {
    "llama": (TARGET_KEYS, lambda: tiny_decoder(raw_config("llama", attention_bias=True, mlp_bias=True))),
    "qwen2": (TARGET_KEYS, lambda: tiny_decoder(raw_config("qwen2", tie_word_embeddings=True))),
    "qwen3": (TARGET_KEYS, lambda: tiny_decoder(raw_config("qwen3"))),
    "draft": (DRAFT_KEYS, lambda: tiny_draft(draft_config())),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_name_and_every_name_one_parameter(name: str) -> None:
    table, make = MODELS[name]
    paths = list(flat_params(make()))
    names = [table.to_file(path) for path in paths]
    assert len({file_name for file_name, _ in names}) == len(paths)
    for path, (file_name, transform) in zip(paths, names, strict=True):
        assert table.to_module(file_name) == [(path, transform)]


@pytest.mark.parametrize("table", [TARGET_KEYS, DRAFT_KEYS])
def test_no_two_rows_match_one_name(table: KeyTable) -> None:
    for rule in table.rules:
        name = rule.file_name.replace("{i}", "12")
        assert table.to_module(name) == [(rule.module_path.replace("{i}", "12"), rule.transform)]


def test_only_matrices_of_linear_layers_are_transposed() -> None:
    for table in (TARGET_KEYS, DRAFT_KEYS):
        for rule in table.rules:
            assert (rule.transform == "transpose") == rule.module_path.endswith(".kernel")


def test_the_prefix_is_written_and_optional_in_reading() -> None:
    assert TARGET_KEYS.to_file("norm.scale") == ("model.norm.weight", "copy")
    assert (
        TARGET_KEYS.to_module("norm.weight") == TARGET_KEYS.to_module("model.norm.weight") == [("norm.scale", "copy")]
    )
    assert TARGET_KEYS.to_file("lm_head.kernel") == (LM_HEAD, "transpose")
    assert TARGET_KEYS.to_module("model.lm_head.weight") == []
    assert DRAFT_KEYS.to_module("model.norm.weight") == []


def test_names_must_match_whole() -> None:
    for name in (
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.01.input_layernorm.weight",
        "xnorm.weight",
    ):
        assert TARGET_KEYS.to_module(name) == []
    assert TARGET_KEYS.is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not TARGET_KEYS.is_ignored("model.norm.weight")
    with pytest.raises(KeyError):
        DRAFT_KEYS.to_file("lm_head.kernel")
