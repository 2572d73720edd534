"""PEFT adapter folders against `peft` itself, in float32, and what is refused in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from specjax.errors import InputError
from specjax.models.decoder import Decoder
from specjax.models.lora import PROJECTIONS, LoRAAdapters, LoRAConfig, merge, unmerge
from specjax.models.sharding import make_mesh, mesh_scope
from specjax.weights import (
    adapter_config_from_peft,
    adapter_config_to_peft,
    decoder_config_from_hf,
    load_adapters,
    load_target,
    save_adapters,
    save_target,
)
from tests.weights.conftest import FAMILY_CHANGES, hf_model
from tests.weights.tiny import TOKENS, assert_same_params, filled, raw_config

PREFIX = "base_model.model.model.layers."
BASE = decoder_config_from_hf(raw_config("llama"), "config.json")
TOLERANCE = 1e-5
ROUNDING = 2.5e-7  # two units in the last place of weights from one to two

# What PEFT is told of each family: names, a pattern for everything, and a regular expression; both scales.
PEFT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["v_proj", "q_proj", "down_proj"], "r": 3, "lora_alpha": 5},
    "qwen2": {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1},
    "qwen3": {"target_modules": r".*\.(self_attn|mlp)\.[koqu]\w*_proj", "exclude_modules": ["up_proj"], "r": 2},
}
EXPECTED = {
    "llama": LoRAConfig(3, 5.0, target_modules=("q_proj", "v_proj", "down_proj")),
    "qwen2": LoRAConfig(4, 6.0, 0.1, rslora=True),
    "qwen3": LoRAConfig(2, 8.0, target_modules=("q_proj", "k_proj", "o_proj")),
}


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def our_logits(base: Decoder, adapters: LoRAAdapters | None = None) -> np.ndarray:
    @jax.jit
    def run(base: Decoder, adapters: LoRAAdapters | None, tokens: jax.Array) -> jax.Array:
        return base.logits(base(tokens, adapters=adapters).hidden)

    with mesh_scope():
        return np.asarray(run(base, adapters, jnp.asarray(TOKENS)))


def peft_model(family: str, arguments: dict[str, Any]) -> PeftModel:
    """A tiny model in float32 under adapters of which neither matrix is zero."""
    model = get_peft_model(hf_model(family), LoraConfig(task_type="CAUSAL_LM", **arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model


def tiny_adapters(config: LoRAConfig) -> LoRAAdapters:
    with mesh_scope():
        return filled(nnx.eval_shape(lambda: LoRAAdapters(config, BASE, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("family", FAMILY_CHANGES)
def test_adapters_compute_what_peft_computes_both_ways_and_merged(family: str, tmp_path: Path) -> None:
    theirs = peft_model(family, PEFT_ARGUMENTS[family])
    theirs.save_pretrained(tmp_path / "adapter")
    hf_model(family).save_pretrained(tmp_path / "base")
    expected, plain = torch_logits(theirs), torch_logits(hf_model(family))
    assert np.abs(expected - plain).max() > 0.01

    base = load_target(tmp_path / "base", dtype=jnp.float32)
    adapters = load_adapters(tmp_path / "adapter", base.config)
    assert adapters.config == EXPECTED[family]
    np.testing.assert_allclose(our_logits(base), plain, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(our_logits(base, adapters), expected, rtol=0, atol=TOLERANCE)

    save_adapters(adapters, tmp_path / "again", base_name=str(tmp_path / "base"))
    again = PeftModel.from_pretrained(hf_model(family), tmp_path / "again")
    np.testing.assert_array_equal(torch_logits(again), expected)
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path / "adapter").keys()

    merged = merge(base, adapters)
    save_target(merged, tmp_path / "merged", jnp.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for name, weight in theirs.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(ours[name], weight, rtol=0, atol=ROUNDING, err_msg=name)
    for x, y in zip(*(jax.tree.leaves(model) for model in (unmerge(merged, adapters), base)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=ROUNDING)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_survive_the_round_trip_bit_for_bit(dtype: Any, tmp_path: Path) -> None:
    adapters = tiny_adapters(LoRAConfig(3, 2.5, 0.05, rslora=True, target_modules=("o_proj", "gate_proj")))
    first = save_adapters(adapters, tmp_path / "a", base_name="OWNER/NAME", dtype=dtype)
    assert {path.name for path in first.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    stored = tensors(first)
    assert {x.dtype for x in stored.values()} == {jnp.dtype(dtype)}
    assert stored[f"{PREFIX}1.self_attn.o_proj.lora_A.weight"].shape == (3, 64)
    assert stored[f"{PREFIX}1.mlp.gate_proj.lora_B.weight"].shape == (48, 3)
    loaded = load_adapters(first, BASE)
    assert loaded.config == adapters.config
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    second = save_adapters(loaded, tmp_path / "b", base_name="OWNER/NAME", dtype=dtype)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    if dtype == jnp.float32:
        assert_same_params(loaded, adapters)


def test_meshes_load_and_save_the_same(tmp_path: Path) -> None:
    config = LoRAConfig(3, 3.0)
    one = save_adapters(tiny_adapters(config), tmp_path / "one", base_name=None)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        adapters = load_adapters(one, BASE)
        assert adapters.layers[0].down_proj.a[...].sharding.spec == jax.P("tensor", None)
        eight = save_adapters(adapters, tmp_path / "eight", base_name=None)
    assert (one / "adapter_model.safetensors").read_bytes() == (eight / "adapter_model.safetensors").read_bytes()


def test_saving_leaves_everything_but_an_older_adapter_alone(tmp_path: Path) -> None:
    adapters = tiny_adapters(LoRAConfig(3, 3.0))
    kept = ("model.safetensors", "config.json", "mask_embedding.pt")
    for name in (*kept, "adapter_model.bin"):
        (tmp_path / name).write_text("x")
    save_adapters(adapters, tmp_path, base_name=None)
    written = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, *written}


def test_adapters_do_not_slip_under_the_settings_of_a_draft(tmp_path: Path) -> None:
    (tmp_path / "specjax.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a draft, with specjax\.json"):
        save_adapters(tiny_adapters(LoRAConfig(3, 3.0)), tmp_path, base_name=None)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_config_is_written_in_pefts_words() -> None:
    raw = adapter_config_to_peft(LoRAConfig(4, 8.0, 0.1, rslora=True, target_modules=("q_proj",)), "OWNER/NAME")
    known = LoraConfig().to_dict()
    assert set(raw) <= set(known)
    theirs = LoraConfig(**raw)
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout, theirs.use_rslora) == (4, 8, 0.1, True)
    assert theirs.target_modules == {"q_proj"}
    assert theirs.base_model_name_or_path == "OWNER/NAME"
    assert (theirs.task_type, theirs.bias, theirs.inference_mode) == ("CAUSAL_LM", "none", True)
    unsaid = {name: value for name, value in theirs.to_dict().items() if name not in raw}
    assert unsaid == {name: value for name, value in known.items() if name not in raw}


def raw_adapter(**changes: Any) -> dict[str, Any]:
    """What this PEFT writes, with every field it knows."""
    theirs = LoraConfig(r=3, lora_alpha=3, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"]).to_dict()
    return json.loads(json.dumps(theirs, default=list)) | changes


def layer_paths(count: int, *names: str) -> list[str]:
    return [f"model.layers.{i}.{PROJECTIONS[name]}.{name}" for i in range(count) for name in names]


@pytest.mark.parametrize(
    ("changes", "modules"),
    [
        ({}, ("q_proj", "o_proj")),
        ({"target_modules": "ALL-LINEAR"}, tuple(PROJECTIONS)),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*|lm_head"}, tuple(PROJECTIONS)[:4]),
        ({"target_modules": ["mlp.up_proj"]}, ("up_proj",)),
        ({"target_modules": layer_paths(2, "v_proj", "k_proj")}, ("k_proj", "v_proj")),
        ({"target_modules": r"model\.layers\.[01]\..*(up|down)_proj"}, ("up_proj", "down_proj")),
    ],
)
def test_target_modules_are_resolved_as_in_peft(changes: dict[str, Any], modules: tuple[str, ...]) -> None:
    assert adapter_config_from_peft(raw_adapter(**changes), "x", BASE).target_modules == modules
    fields = {name: raw_adapter(**changes)[name] for name in ("target_modules", "exclude_modules")}
    theirs = get_peft_model(hf_model("llama"), LoraConfig(r=3, task_type="CAUSAL_LM", **fields | lower(fields)))
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert adapted == set(modules)


def lower(fields: dict[str, Any]) -> dict[str, Any]:
    """`all-linear` as every version of PEFT takes it."""
    is_all = str(fields["target_modules"]).lower() == "all-linear"
    return {"target_modules": "all-linear"} if is_all else {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type is 'LOHA'; only LORA adapters"),
        ({"task_type": "SEQ_CLS"}, r"task_type is 'SEQ_CLS': only \"CAUSAL_LM\" or null"),
        ({"r": 0}, "r is 0: must be a whole number of at least 1"),
        ({"r": None}, "r is None: the field is missing"),
        ({"lora_alpha": 0}, "lora_alpha is 0: must be a number above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan: must be finite"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0: must be a number of at least 0 and below 1"),
        ({"lora_dropout": True}, "lora_dropout is True"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes': must be true or false"),
        ({"use_dora": True}, "use_dora is True: DoRA is not supported; merge it"),
        ({"bias": "lora_only"}, "bias is 'lora_only': biases .* are not supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is .*: only one rank for all projections"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is .*: only one alpha"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*: modules trained beside"),
        ({"layers_to_transform": [0]}, "layers_to_transform is .*: only adapters of all layers"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True: only false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': this initialisation changes the base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is .*: only null"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is .*: only null"),
        ({"temperature": 1.0}, "temperature is 1.0: not a field known here"),  # a config.json may hold it
        ({"target_modules": None}, "target_modules is None: must be a list of module names"),
        ({"target_modules": []}, "picks nothing of the base"),
        ({"target_modules": ["q_proj", "c_attn"]}, "the base has no c_attn; supported are q_proj"),
        ({"target_modules": ["q_proj", "proj"]}, "the base has no proj;"),  # paths end in whole names
        ({"target_modules": ["q_proj", "lm_head"]}, "picks lm_head; supported"),
        ({"target_modules": ".*"}, "picks lm_head, model.embed_tokens; supported"),
        ({"target_modules": r".*\.0\..*q_proj"}, "picks q_proj in some of 2 layers"),
        ({"target_modules": layer_paths(3, "q_proj")}, r"the base has no model\.layers\.2\.self_attn\.q_proj"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"exclude_modules": 3}, "exclude_modules is 3: must be a list"),
    ],
)
def test_configs_that_cannot_be_built_are_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"folder/adapter_config\.json: .*{message}"):
        adapter_config_from_peft(raw_adapter(**changes), "folder/adapter_config.json", BASE)


def test_every_problem_of_a_config_is_told_at_once() -> None:
    with pytest.raises(InputError, match=r"2 problems:\n.*r is 0.*\n.*use_dora is True"):
        adapter_config_from_peft(raw_adapter(r=0, use_dora=True), "x", BASE)


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    stored = tensors(folder)
    edit(stored)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})


Q_A = f"{PREFIX}0.self_attn.q_proj.lora_A.weight"
EDITS: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "missing": (lambda x: x.pop(Q_A), rf"missing tensor {Q_A}"),
    "bias": (
        lambda x: x.update({Q_A.replace("A.weight", "B.bias"): np.zeros(64, np.float32)}),
        "unexpected tensor .*lora_B.bias",
    ),
    "third layer": (lambda x: x.update({Q_A.replace(".0.", ".2."): x[Q_A]}), r"unexpected tensor .*layers\.2\."),
    "trained embedding": (
        lambda x: x.update({"base_model.model.model.embed_tokens.weight": np.zeros((64, 32), np.float32)}),
        "unexpected tensor .*embed_tokens",
    ),
    "rank": (
        lambda x: x.update({Q_A: x[Q_A][:2].copy()}),
        r"shape \[2, 32\] in adapter_model.safetensors, .*\[3, 32\]",
    ),
    "quantised": (lambda x: x.update({Q_A: x[Q_A].astype(np.int8)}), "dtype I8 is not one of"),
}


@pytest.mark.parametrize("name", EDITS)
def test_tensors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    save_adapters(tiny_adapters(LoRAConfig(3, 3.0, target_modules=("q_proj",))), tmp_path, base_name="OWNER/NAME")
    edit, message = EDITS[name]
    change(tmp_path, edit)
    with pytest.raises(InputError, match=rf"(?s){message}.*base_model_name_or_path is 'OWNER/NAME': give the base"):
        load_adapters(tmp_path, BASE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    save_adapters(tiny_adapters(LoRAConfig(3, 3.0, target_modules=("q_proj",))), tmp_path, base_name=None)
    change(tmp_path, lambda x: x[Q_A].__setitem__((1, 2), value))
    with pytest.raises(InputError, match=f"NaN or infinity in tensor {Q_A}"):
        load_adapters(tmp_path, BASE)


def test_an_adapter_of_another_base_is_told_by_its_shapes_not_by_its_name(tmp_path: Path) -> None:
    save_adapters(tiny_adapters(LoRAConfig(3, 3.0)), tmp_path, base_name="/of/another/machine")
    load_adapters(tmp_path, BASE)
    wider = decoder_config_from_hf(raw_config("llama", hidden_size=64), "config.json")
    with pytest.raises(InputError, match=r"(?s)q_proj.lora_A.weight: shape \[3, 32\].*is '/of/another/machine': give"):
        load_adapters(tmp_path, wider)
    for layers, message in ((1, r"unexpected tensor .*layers\.1\."), (3, r"missing tensor .*layers\.2\.")):
        with pytest.raises(InputError, match=message):
            load_adapters(tmp_path, decoder_config_from_hf(raw_config("llama", num_hidden_layers=layers), "x"))


def test_folders_that_hold_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json: no such file; give a folder with an adapter"):
        load_adapters(tmp_path, BASE)
    save_adapters(tiny_adapters(LoRAConfig(3, 3.0)), tmp_path, base_name=None)
    weights = tmp_path / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: truncated or corrupt"):
        load_adapters(tmp_path, BASE)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        InputError, match=r"holds no weights \(adapter_model\.safetensors.*adapter_model\.bin is a PyTorch"
    ):
        load_adapters(tmp_path, BASE)
