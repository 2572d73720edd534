from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

from specjax.errors import InputError
from specjax.models.dflash import DFlashConfig
from specjax.models.layers import RopeConfig
from specjax.models.sharding import SPECS, make_mesh, mesh_scope, put
from specjax.weights import flat_params, load_draft, load_target, save, save_draft, save_target
from specjax.weights.fingerprint import TargetFingerprint
from tests.torch_draft import TorchDraft
from tests.weights.tiny import (
    TOKENS,
    assert_same_params,
    draft_config,
    logits,
    raw_config,
    tiny_decoder,
    tiny_draft,
)

MIXED = {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 3}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same_tensors(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype == ml_dtypes.bfloat16
        assert left[name].tobytes() == right[name].tobytes(), name


def test_targets_survive_the_round_trip_bit_for_bit(hf_folder: Path, tmp_path: Path) -> None:
    for dtype in (jnp.bfloat16, jnp.float32):  # bf16 files are exact in either
        out = save_target(load_target(hf_folder, dtype=dtype), tmp_path / jnp.dtype(dtype).name)
        assert_same_tensors(hf_folder, out)
        assert_same_params(load_target(hf_folder), load_target(out))


def test_transformers_loads_saved_targets(hf_folder: Path, tmp_path: Path) -> None:
    save_target(load_target(hf_folder), tmp_path / "out", extra_config={"eos_token_id": 7})
    before, after = (
        AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32) for x in (hf_folder, tmp_path / "out")
    )
    assert after.config.eos_token_id == 7
    with torch.no_grad():
        left, right = (model(torch.tensor(TOKENS, dtype=torch.long)).logits for model in (before, after))
    assert torch.equal(left, right)


def test_sharded_models_are_saved_like_any_other(tmp_path: Path) -> None:
    save_target(tiny_decoder(raw_config(), jnp.bfloat16), tmp_path / "one")
    with jax.set_mesh(make_mesh(2, 2, 2)):
        save_target(load_target(tmp_path / "one"), tmp_path / "eight")
    one, eight = ((tmp_path / x / "model.safetensors").read_bytes() for x in ("one", "eight"))
    assert one == eight


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder(raw_config(), jnp.bfloat16)
    save_target(decoder, tmp_path / "m")
    monkeypatch.setattr(save, "SHARD_BYTES", 20_000)
    save_target(decoder, tmp_path / "m")
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"  # the single file of before is gone
    assert all((tmp_path / "m" / name).stat().st_size < 25_000 for name in shards)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(tmp_path / "m").values())
    assert_same_params(load_target(tmp_path / "m"), decoder)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        expected = hf(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits(load_target(tmp_path / "m", dtype=jnp.float32)), expected, atol=1e-4)


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder(raw_config(), jnp.bfloat16)
    save_target(decoder, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(save, "write_safetensors", fail)
        for folder in ("m", "new"):
            with pytest.raises(OSError, match="disk full"):
                save_target(decoder, tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    save_target(tiny_decoder(raw_config(tie_word_embeddings=True), jnp.bfloat16), tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").exists()
    assert load_target(tmp_path / "m").config.tie_word_embeddings


def test_fields_that_shape_the_network_cannot_be_slipped_in(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rms_norm_eps: shapes the network"):
        save_target(tiny_decoder(raw_config()), tmp_path / "m", extra_config={"rms_norm_eps": 1.0, "eos_token_id": 1})


@pytest.mark.parametrize("own", [False, True])
def test_drafts_survive_the_round_trip_bit_for_bit(own: bool, tmp_path: Path) -> None:
    draft = tiny_draft(draft_config(**MIXED, own_mask_embedding=own), jnp.bfloat16)
    fingerprint = TargetFingerprint("rows", "template", "off")
    first = save_draft(draft, tmp_path / "a", fingerprint=fingerprint)
    names = {"config.json", "model.safetensors", "specjax.json"} | ({"mask_embedding.pt"} if own else set())
    assert {path.name for path in first.iterdir()} == names
    assert ("mask_embedding" in flat_params(draft)) == own
    loaded = load_draft(first, dtype=jnp.float32)
    assert loaded.config == draft.config
    second = save_draft(loaded, tmp_path / "b", fingerprint=fingerprint)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert_same_params(load_draft(second), draft)


def as_servers_read_it(folder: Path) -> np.ndarray:
    """The mask embedding of a draft folder, by the rules that vLLM and SGLang have for it."""
    saved = torch.load(folder / "mask_embedding.pt", map_location="cpu", weights_only=True)
    token = json.loads((folder / "config.json").read_text())["dflash_config"]["mask_token_id"]
    assert saved.get("mask_token_id", token) == token
    return saved["embedding"].reshape(-1).float().numpy()


def test_servers_read_the_mask_embedding_of_an_export(tmp_path: Path) -> None:
    draft = tiny_draft(draft_config(own_mask_embedding=True, mask_token_id=151936))
    save_draft(draft, tmp_path / "draft", fingerprint=None)
    row = np.asarray(flat_params(draft)["mask_embedding"])
    np.testing.assert_array_equal(as_servers_read_it(tmp_path / "draft"), row.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("form", ["bare", "dict"])
def test_the_mask_embedding_of_another_trainer_is_read(form: str, tmp_path: Path) -> None:
    """Its config.json does not mention it."""
    folder = save_draft(tiny_draft(draft_config()), tmp_path / "draft", fingerprint=None)
    row = torch.arange(32) / 7
    torch.save(row[None] if form == "bare" else {"mask_token_id": 63, "embedding": row}, folder / "mask_embedding.pt")
    loaded = load_draft(folder, dtype=jnp.float32)
    assert loaded.config == draft_config(own_mask_embedding=True)
    np.testing.assert_array_equal(flat_params(loaded)["mask_embedding"], row.numpy())


def test_a_mask_embedding_belongs_to_its_folder(tmp_path: Path) -> None:
    """A draft written over another leaves none of that one's behind, and one that lacks its own is refused."""
    own = tiny_draft(draft_config(own_mask_embedding=True))
    folder = save_draft(own, tmp_path / "draft", fingerprint=None)
    config = (folder / "config.json").read_text()
    save_draft(tiny_draft(draft_config()), folder, fingerprint=None)
    assert load_draft(folder).config == draft_config()
    (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"mask_embedding.pt: no such file, though config.json"):
        load_draft(folder)


def test_draft_files_hold_the_tensors_of_the_format(tmp_path: Path) -> None:
    save_draft(tiny_draft(draft_config(num_hidden_layers=1)), tmp_path / "draft", fingerprint=None)
    held = tensors(tmp_path / "draft")
    layer = {
        "input_layernorm": (32,),
        "post_attention_layernorm": (32,),
        "self_attn.q_proj": (64, 32),
        "self_attn.k_proj": (32, 32),
        "self_attn.v_proj": (32, 32),
        "self_attn.o_proj": (32, 64),
        "self_attn.q_norm": (16,),
        "self_attn.k_norm": (16,),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    expected = {f"layers.0.{name}.weight": shape for name, shape in layer.items()}
    expected |= {"fc.weight": (32, 64), "hidden_norm.weight": (32,), "norm.weight": (32,)}
    assert {name: array.shape for name, array in held.items()} == expected
    assert {array.dtype for array in held.values()} == {np.dtype(ml_dtypes.bfloat16)}


def config_as_a_server_reads_it(folder: Path) -> DFlashConfig:
    """The shape of an exported draft from its raw config.json, by the format's own key names."""
    raw = json.loads((folder / "config.json").read_text())
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps "
        "max_position_embeddings vocab_size num_target_layers block_size sliding_window"
    )
    said = raw.get("is_causal", raw["dflash_config"].get("causal"))
    return DFlashConfig(
        **{name: raw[name] for name in names.split()},
        rope=RopeConfig(theta=raw["rope_theta"]),
        mask_token_id=raw["dflash_config"]["mask_token_id"],
        target_layer_ids=tuple(raw["dflash_config"]["target_layer_ids"]),
        layer_types=tuple(raw["layer_types"]),
        sliding_causal="sliding_attention" in raw["layer_types"] and said is not False,
    )


@pytest.mark.parametrize(
    "changes",
    [{}, MIXED, MIXED | {"sliding_causal": True}, MIXED | {"layer_types": ("sliding_attention",) * 2}],
    ids=["full", "mixed", "mixed causal", "sliding"],
)
def test_the_exported_draft_computes_the_same_in_torch(changes: dict[str, Any], tmp_path: Path) -> None:
    save_draft(tiny_draft(draft_config(**changes)), tmp_path / "draft", fingerprint=None)
    draft = load_draft(tmp_path / "draft", dtype=jnp.float32)
    reference = TorchDraft(config_as_a_server_reads_it(tmp_path / "draft"))
    weights = load_torch(tmp_path / "draft" / "model.safetensors")
    reference.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)

    rng = np.random.default_rng(0)
    taps = rng.standard_normal((2, 10, 64)).astype(np.float32)
    noise = rng.standard_normal((2, 3, 4, 32)).astype(np.float32)
    positions = np.tile(np.arange(10, dtype=np.int32), (2, 1))
    start = np.zeros((2, 3), np.int32)
    stop = np.array([[1, 5, 9], [2, 3, 10]], np.int32)
    with torch.no_grad():
        inputs = (torch.tensor(x) for x in (taps, positions, noise, start, stop))
        expected = reference(*inputs).numpy()
    with mesh_scope():
        context_kv = draft.context_kv(draft.context(put(taps, SPECS.act_btd)), put(positions, SPECS.act_bt))
        anchors = put(start, SPECS.act_bN), put(stop, SPECS.act_bN)
        actual = draft(put(noise, SPECS.act_bNBd), context_kv, *anchors)
    np.testing.assert_allclose(np.asarray(actual), expected, atol=1e-4)


def test_windows_and_causality_matter_in_that_comparison() -> None:
    """The comparison above could not pass by ignoring them."""
    rng = np.random.default_rng(0)
    taps, noise = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 10, 64), (1, 2, 4, 32)))
    positions = np.arange(10, dtype=np.int32)[None]
    start, stop = np.zeros((1, 2), np.int32), np.full((1, 2), 9, np.int32)
    outputs = []
    for changes in ({}, MIXED, MIXED | {"sliding_causal": True}):
        draft = tiny_draft(replace(draft_config(), **changes))
        with mesh_scope():
            kv = draft.context_kv(draft.context(put(taps, SPECS.act_btd)), put(positions, SPECS.act_bt))
            anchors = put(start, SPECS.act_bN), put(stop, SPECS.act_bN)
            outputs.append(np.asarray(draft(put(noise, SPECS.act_bNBd), kv, *anchors)))
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    assert np.abs(outputs[1] - outputs[2]).max() > 1e-3
