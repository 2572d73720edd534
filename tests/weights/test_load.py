from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from specjax.errors import InputError
from specjax.models.sharding import make_mesh
from specjax.weights import load_draft, load_target, read_target_config, save_draft, weights_dtype
from specjax.weights.module_params import flat_params
from specjax.weights.safetensors_files import SINGLE_FILE, TensorFiles
from tests.weights.conftest import hf_model
from tests.weights.tiny import TOKENS, draft_config, logits, tiny_draft

UP = "model.layers.0.mlp.up_proj.weight"


def edited(folder: Path, out: Path, change: dict[str, np.ndarray | None]) -> Path:
    """A single-file copy of a model folder with tensors replaced, added, or (None) left out."""
    out.mkdir()
    tensors = {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()} | change
    save_file({name: array for name, array in tensors.items() if array is not None}, out / SINGLE_FILE)
    shutil.copy(folder / "config.json", out)
    return out


def test_loaded_models_compute_what_transformers_computes(hf_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits(load_target(hf_folder, dtype=jnp.float32)), expected, atol=1e-4)


def test_dtypes(hf_folder: Path) -> None:
    assert weights_dtype(hf_folder) == ml_dtypes.bfloat16
    assert {x.dtype for x in jax.tree.leaves(load_target(hf_folder))} == {jnp.dtype(jnp.bfloat16)}
    decoder = load_target(str(hf_folder), dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(decoder)} == {jnp.dtype(jnp.float32)}
    assert decoder.dtype == jnp.bfloat16


def test_float64_files_are_loaded_as_float32(hf_folder: Path, tmp_path: Path) -> None:
    tensors = {name: array for file in hf_folder.glob("*.safetensors") for name, array in load_file(file).items()}
    folder = edited(hf_folder, tmp_path / "double", {name: x.astype(np.float64) for name, x in tensors.items()})
    assert weights_dtype(folder) == np.float32
    doubles, singles = (flat_params(load_target(f, dtype=jnp.float32)) for f in (folder, hf_folder))
    for name, value in doubles.items():
        np.testing.assert_array_equal(value, singles[name])


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_sharded_loading_equals_loading_on_one_device(qwen3_folder: Path, axes: tuple[int, int, int]) -> None:
    single = flat_params(load_target(qwen3_folder))
    with jax.set_mesh(make_mesh(*axes)):
        sharded = flat_params(load_target(qwen3_folder))
    for path, array in sharded.items():
        assert len(array.sharding.device_set) == 8
        np.testing.assert_array_equal(np.asarray(array), np.asarray(single[path]))
    split = {path for path, array in sharded.items() if not array.is_fully_replicated}
    # Two key/value heads do not divide over eight tensor shards: every shard holds both.
    whole = ("scale", "k_proj.kernel", "v_proj.kernel") if axes[2] == 8 else ("scale",)
    assert split == {path for path in sharded if not path.endswith(whole)}


def test_each_slice_is_read_once_and_nothing_else(qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_elements: dict[str, int] = {}
    original = TensorFiles.read

    def counting(self: TensorFiles, name: str, index: tuple[slice, ...]) -> np.ndarray:
        out = original(self, name, index)
        read_elements.setdefault(name, 0)
        read_elements[name] += out.size
        shapes.setdefault(name, set()).add(out.shape)
        return out

    shapes: dict[str, set[tuple[int, ...]]] = {}
    monkeypatch.setattr(TensorFiles, "read", counting)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        load_target(qwen3_folder)
    # [48, 32] in the file: outputs split over tensor, inputs over fsdp, and the two data shards share their reads.
    assert (shapes[UP], read_elements[UP]) == ({(24, 16)}, 48 * 32)
    assert read_elements["model.norm.weight"] == 32


def test_all_problems_are_reported_together(qwen3_folder: Path, tmp_path: Path) -> None:
    folder = edited(
        qwen3_folder,
        tmp_path / "bad",
        {
            "model.norm.weight": None,
            "model.layers.1.self_attn.q_norm.weight": None,
            "model.layers.7.mlp.up_proj.weight": np.zeros((48, 32), np.float32),
            "model.layers.0.mlp.up_proj.bias": np.zeros(48, np.float32),
            UP: np.zeros((32, 48), np.float32),
            "model.layers.0.mlp.down_proj.weight": np.zeros((32, 48), np.int8),
            "embed_tokens.weight": np.zeros((64, 32), np.float32),
        },
    )
    with pytest.raises(InputError) as caught:
        load_target(folder)
    message = str(caught.value)
    for expected in (
        str(folder),
        "missing tensor model.norm.weight",
        "missing tensor model.layers.1.self_attn.q_norm.weight",
        "unexpected tensor model.layers.7.mlp.up_proj.weight",
        "unexpected tensor model.layers.0.mlp.up_proj.bias",
        f"{UP}: shape [32, 48] in model.safetensors, the config makes it [48, 32]",
        "model.layers.0.mlp.down_proj.weight: dtype I8",
        "tensor given twice",
    ):
        assert expected in message


def test_a_truncated_shard_is_reported_with_what_it_lacks(qwen3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(qwen3_folder, folder)
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    shards[1].unlink()
    with pytest.raises(InputError) as caught:
        load_target(folder)
    assert f"{shards[0].name}: truncated or corrupt" in str(caught.value)
    assert f"{shards[1].name}: the shard is missing" in str(caught.value)
    assert "missing tensor" in str(caught.value)


def test_weights_that_are_not_finite_are_named(qwen3_folder: Path, tmp_path: Path) -> None:
    names = UP, "model.norm.weight", UP.replace("up", "gate")
    tensors = {name: a.copy() for file in qwen3_folder.glob("*.safetensors") for name, a in load_file(file).items()}
    up, norm, gate = (tensors[name] for name in names)
    up[-1, -1], norm[0] = np.nan, -np.inf
    gate[:] = 3e38  # finite, and their sum is not
    folder = edited(qwen3_folder, tmp_path / "m", dict(zip(names, (up, norm, gate), strict=True)))
    with pytest.raises(InputError) as error, jax.set_mesh(make_mesh(1, 2, 2)):
        load_target(folder)
    for name in names[:2]:
        assert f"NaN or infinity in tensor {name}" in str(error.value)
    assert str(error.value).count("NaN") == 2


def test_long_lists_are_cut(qwen3_folder: Path, tmp_path: Path) -> None:
    extra = {f"extra.{i}": np.zeros(1, np.float32) for i in range(30)}
    with pytest.raises(InputError, match="and 10 more: unexpected tensor"):
        load_target(edited(qwen3_folder, tmp_path / "long", extra))


def test_a_tied_head_may_be_repeated_but_not_differ(tmp_path: Path) -> None:
    hf_model("qwen3").save_pretrained(tmp_path / "tied")
    embedding = load_file(tmp_path / "tied" / SINGLE_FILE)["model.embed_tokens.weight"]
    repeated = edited(tmp_path / "tied", tmp_path / "same", {"lm_head.weight": embedding})
    np.testing.assert_array_equal(*(logits(load_target(x, dtype=jnp.float32)) for x in (tmp_path / "tied", repeated)))
    head = embedding.copy()
    head[-1, -1] += 1
    with pytest.raises(InputError, match=r"lm_head.weight differs .* tie_word_embeddings"):
        load_target(edited(tmp_path / "tied", tmp_path / "differs", {"lm_head.weight": head}))


def test_an_untied_head_must_be_there(qwen3_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing tensor lm_head.weight"):
        load_target(edited(qwen3_folder, tmp_path / "headless", {"lm_head.weight": None}))


def test_inverse_frequencies_and_bare_names_load(qwen3_folder: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    folder = edited(qwen3_folder, tmp_path / "old", extra)
    tensors = {name.removeprefix("model."): array for name, array in load_file(folder / SINGLE_FILE).items()}
    save_file(tensors, folder / SINGLE_FILE)
    expected, actual = (logits(load_target(x, dtype=jnp.float32)) for x in (qwen3_folder, folder))
    np.testing.assert_array_equal(actual, expected)


def test_folders_of_the_wrong_kind_are_refused(qwen3_folder: Path, tmp_path: Path) -> None:
    save_draft(tiny_draft(draft_config()), tmp_path / "draft", fingerprint=None)
    with pytest.raises(InputError, match="holds a DFlash draft, not a target"):
        load_target(tmp_path / "draft")
    with pytest.raises(InputError, match="is not a DFlash draft"):
        load_draft(qwen3_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_target(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_target(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="JSON list"):
        load_target(tmp_path / "empty")
    shutil.copy(qwen3_folder / "config.json", tmp_path / "empty")
    assert read_target_config(tmp_path / "empty").model_type == "qwen3"
    with pytest.raises(InputError, match="holds no weights"):
        load_target(tmp_path / "empty")


def test_a_mesh_that_does_not_divide_the_model_is_refused(qwen3_folder: Path) -> None:
    with jax.set_mesh(make_mesh(1, 1, 3)), pytest.raises(InputError, match="'tensor': 3"):
        load_target(qwen3_folder)
