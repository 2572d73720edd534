"""LoRA draft folders: `peft` loads them, they come back as they were, and what is refused in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel

from specjax.errors import InputError
from specjax.models.lora import LoRAConfig
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import make_mesh, mesh_scope
from specjax.weights import (
    decoder_config_from_hf,
    flat_params,
    load_draft,
    load_target,
    lora_draft_config_from_json,
    lora_draft_config_to_json,
    read_draft_config,
    read_fingerprint,
    save_draft,
)
from specjax.weights.fingerprint import TargetFingerprint
from tests.weights.conftest import hf_model
from tests.weights.test_peft import our_logits, torch_logits
from tests.weights.tiny import assert_same_params, draft_config, filled, raw_config, tiny_draft

BASE = decoder_config_from_hf(raw_config("qwen3", tie_word_embeddings=True), "config.json")
LORA = LoRAConfig(3, 5.0, 0.1, target_modules=("q_proj", "v_proj", "down_proj"))
CONFIG = LoRADraftConfig(LORA, block_size=4, mask_token_id=63)
OWN = replace(CONFIG, mask_token_id=151936, own_mask_embedding=True, masked_anchor=0.25)
ADAPTED = replace(CONFIG, adapt_context=True)
CONFIGS = {"plain": CONFIG, "own mask": OWN, "adapted context": ADAPTED}
FINGERPRINT = TargetFingerprint("e", "c", "off")
FILES = {"adapter_config.json", "adapter_model.safetensors", "specjax.json"}


def tiny_lora_draft(config: LoRADraftConfig = CONFIG) -> LoRADraft:
    with mesh_scope():
        return filled(nnx.eval_shape(lambda: LoRADraft(config, BASE, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_draft_survives_the_round_trip_bit_for_bit(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    draft = tiny_lora_draft(config)
    first = save_draft(draft, tmp_path / "a", fingerprint=FINGERPRINT, base_name="OWNER/NAME")
    assert {path.name for path in first.iterdir()} == FILES | ({"mask_embedding.pt"} if kind == "own mask" else set())
    assert read_fingerprint(first) == FINGERPRINT
    loaded = load_draft(first, dtype=jnp.bfloat16, base=BASE)
    assert isinstance(loaded, LoRADraft)
    assert loaded.config == read_draft_config(first, BASE) == config
    assert_same_params(loaded, draft)  # float32, whatever the dtype
    second = save_draft(loaded, tmp_path / "b", fingerprint=FINGERPRINT, base_name="OWNER/NAME")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_every_parameter_is_rounded_to_another_dtype(tmp_path: Path) -> None:
    draft = tiny_lora_draft(OWN)
    save_draft(draft, tmp_path, fingerprint=None, dtype=jnp.bfloat16)
    assert torch.load(tmp_path / "mask_embedding.pt")["embedding"].dtype == torch.bfloat16
    for path, array in flat_params(load_draft(tmp_path, base=BASE)).items():
        expected = flat_params(draft)[path].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(array, expected, err_msg=path)
    assert read_fingerprint(tmp_path) is None


def test_meshes_load_and_save_the_same(tmp_path: Path) -> None:
    one = save_draft(tiny_lora_draft(OWN), tmp_path / "one", fingerprint=None)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        draft = load_draft(one, base=BASE)
        eight = save_draft(draft, tmp_path / "eight", fingerprint=None)
    for path in one.iterdir():
        assert path.read_bytes() == (eight / path.name).read_bytes(), path.name


def test_peft_loads_the_folder_and_computes_the_same(tmp_path: Path) -> None:
    hf_model("qwen3").save_pretrained(tmp_path / "base")
    base = load_target(tmp_path / "base", dtype=jnp.float32)
    assert base.config == BASE
    draft = tiny_lora_draft(OWN)
    folder = save_draft(draft, tmp_path / "draft", fingerprint=FINGERPRINT, base_name=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(hf_model("qwen3"), folder)
    expected = torch_logits(theirs)
    with theirs.disable_adapter():
        plain = torch_logits(theirs)
    assert np.abs(expected - plain).max() > 0.01
    loaded = load_draft(folder, base=base.config)
    assert isinstance(loaded, LoRADraft)
    np.testing.assert_allclose(our_logits(base, loaded.adapters), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(our_logits(base), plain, rtol=0, atol=1e-5)
    saved = torch.load(folder / "mask_embedding.pt")
    assert saved["mask_token_id"] == 151936
    np.testing.assert_array_equal(saved["embedding"], draft.mask_embedding[...])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_runs_json_says_everything_in_pefts_words_and_ours(kind: str) -> None:
    config = CONFIGS[kind]
    raw = json.loads(json.dumps(lora_draft_config_to_json(config)))
    assert lora_draft_config_from_json(raw, "draft_config.json", BASE) == config
    assert raw["draft"] == {f.name: getattr(config, f.name) for f in fields(config) if f.name != "lora"}
    theirs = LoraConfig(**raw["adapter"])
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout) == (3, 5, 0.1)
    assert theirs.target_modules == {"q_proj", "v_proj", "down_proj"}


WRONG: dict[str, list[tuple[Any, str]]] = {
    "block_size": [(1, "must be a whole number of at least 2"), (4.0, "must be a whole number"), ("4", "must be a")],
    "mask_token_id": [(-1, "must be a whole number of at least 0"), (2**31, "must be below 2147483648")],
    "own_mask_embedding": [("own", "must be true or false"), (1, "must be true or false")],
    "masked_anchor": [(1.5, "must be a number from 0 to 1"), (-0.1, "must be a number"), (True, "must be a number")],
    "adapt_context": [(0, "must be true or false")],
}


@pytest.mark.parametrize("where", ["side file", "run"])
@pytest.mark.parametrize("name", [f.name for f in fields(LoRADraftConfig) if f.name != "lora"])
def test_settings_that_are_missing_or_ill_typed_are_refused_by_name(name: str, where: str, tmp_path: Path) -> None:
    save_draft(tiny_lora_draft(), tmp_path, fingerprint=FINGERPRINT)
    side = tmp_path / "specjax.json"
    whole = json.loads(side.read_text())

    def read(settings: dict[str, Any]) -> None:
        if where == "run":
            lora_draft_config_from_json(lora_draft_config_to_json(CONFIG) | {"draft": settings}, str(side), BASE)
        side.write_text(json.dumps(whole | {"draft": settings}))
        load_draft(tmp_path, base=BASE)

    read(whole["draft"])
    without = {key: value for key, value in whole["draft"].items() if key != name}
    with pytest.raises(InputError, match=rf"specjax\.json, draft: {name}: the field is missing"):
        read(without)
    for value, message in WRONG[name]:
        with pytest.raises(InputError, match=rf"specjax\.json, draft: {name} is {value!r}: {message}"):
            read(without | {name: value})


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "specjax.json") -> None:
    raw = json.loads((folder / name).read_text())
    change(raw)
    (folder / name).write_text(json.dumps(raw))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no side file": (lambda f: (f / "specjax.json").unlink(), "an adapter, but no draft: specjax.json .*block_size"),
    "no settings": (lambda f: edit(f, lambda raw: raw.pop("draft")), "an adapter, but no draft"),
    "a list of settings": (
        lambda f: edit(f, lambda raw: raw.update(draft=[4])),
        r"draft is \[4\]; it must be an object",
    ),
    "an unknown setting": (
        lambda f: edit(f, lambda raw: raw["draft"].update(depth=2)),
        "depth is 2: not a field known",
    ),
    "settings at odds": (
        lambda f: edit(f, lambda raw: raw["draft"].update(adapt_context=True)),
        r"specjax\.json, draft: masked_anchor drafts while",
    ),
    "no JSON": (lambda f: (f / "specjax.json").write_text("{"), r"specjax\.json: not JSON"),
    "no record": (lambda f: edit(f, lambda raw: raw.pop("target_fingerprint")), "target_fingerprint is None; export"),
    "an adapter of a kind that is not read": (
        lambda f: edit(f, lambda raw: raw.update(use_dora=True), "adapter_config.json"),
        r"adapter_config\.json: use_dora is True",
    ),
    "no mask embedding": (
        lambda f: (f / "mask_embedding.pt").unlink(),
        r"mask_embedding\.pt: no such file, though specjax\.json gives the draft a mask embedding",
    ),
    "a mask embedding of another token": (
        lambda f: edit(f, lambda raw: raw["draft"].update(mask_token_id=7)),
        r"mask_embedding\.pt: mask_token_id is 151936, in specjax\.json 7",
    ),
    "a mask embedding too many": (
        lambda f: edit(f, lambda raw: raw["draft"].update(own_mask_embedding=False)),
        r"holds mask_embedding\.pt, but in specjax\.json own_mask_embedding is false",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage: str, tmp_path: Path) -> None:
    save_draft(tiny_lora_draft(OWN), tmp_path, fingerprint=FINGERPRINT)
    change, message = DAMAGES[damage]
    change(tmp_path)

    def read() -> None:
        read_fingerprint(tmp_path)
        load_draft(tmp_path, base=BASE)

    with pytest.raises(InputError, match=message):
        read()


def test_a_lora_draft_needs_its_own_target(tmp_path: Path) -> None:
    folder = save_draft(tiny_lora_draft(), tmp_path, fingerprint=None, base_name="OWNER/NAME")
    for read in (load_draft, read_draft_config):
        with pytest.raises(InputError, match=r"holds a LoRA draft, .*load it with base=target\.config"):
            read(folder)
    with pytest.raises(InputError, match=r"(?s)v_proj.lora_B.weight: shape \[32, 3\].*is 'OWNER/NAME': give the base"):
        load_draft(folder, base=decoder_config_from_hf(raw_config(num_key_value_heads=4), "x"))
    with pytest.raises(InputError, match=r"missing tensor .*layers\.2\."):
        load_draft(folder, base=decoder_config_from_hf(raw_config(num_hidden_layers=3), "x"))
    edit(folder, lambda raw: raw.update(r=4), "adapter_config.json")
    with pytest.raises(
        InputError, match=r"shape \[3, 32\] in adapter_model.safetensors, the config makes it \[4, 32\]"
    ):
        load_draft(folder, base=BASE)


def test_a_folder_is_of_one_kind_of_draft(tmp_path: Path) -> None:
    lora = save_draft(tiny_lora_draft(OWN), tmp_path / "lora", fingerprint=None)
    (lora / "notes.txt").write_text("x")
    save_draft(tiny_lora_draft(), lora, fingerprint=None)  # goes with the mask embedding of the older one
    assert {path.name for path in lora.iterdir()} == FILES | {"notes.txt"}
    dflash = save_draft(tiny_draft(draft_config()), tmp_path / "dflash", fingerprint=None)
    with pytest.raises(InputError, match=r"another kind of model, with config\.json; give a folder of its own"):
        save_draft(tiny_lora_draft(), dflash, fingerprint=None)
    with pytest.raises(InputError, match=r"another kind of model, with adapter_config\.json"):
        save_draft(tiny_draft(draft_config()), lora, fingerprint=None)
    for asked in ({"base_name": "OWNER/NAME"}, {"dtype": jnp.float32}):
        with pytest.raises(InputError, match="a DFlash draft is written in bfloat16, without a base_name"):
            save_draft(tiny_draft(draft_config()), tmp_path / "new", fingerprint=None, **asked)
