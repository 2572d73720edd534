"""Training runs of a LoRA draft: their checkpoints, their export to a PEFT folder, and what is refused in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from converters import flax_to_hf, hf_to_flax
from specjax.errors import InputError
from specjax.models.lora_draft import LoRADraft
from specjax.models.sharding import mesh_scope
from specjax.weights import (
    decoder_config_to_hf,
    draft_config_to_hf,
    flat_params,
    load_draft,
    load_run_draft,
    load_run_params,
    lora_draft_config_to_json,
    model_name,
    read_fingerprint,
    read_run_draft_config,
    save_adapters,
    save_draft,
)
from specjax.weights.orbax_checkpoint import RUN_LORA_BASE
from tests.refusals import refusal
from tests.weights.test_lora_draft_folder import BASE, FINGERPRINT, OWN, edit, tiny_lora_draft
from tests.weights.tiny import draft_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of a LoRA draft with two checkpoints, of which the first is the best; step s holds values + s."""
    folder = tmp_path_factory.mktemp("run")
    draft = tiny_lora_draft(OWN)
    files = {
        "draft_config.json": lora_draft_config_to_json(OWN),
        RUN_LORA_BASE: decoder_config_to_hf(BASE),
        "specjax.json": FINGERPRINT.to_json(),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    with mesh_scope(), ocp.training.Checkpointer(folder / "checkpoints") as checkpointer:
        for step, score in ((1, 2.5), (2, 1.5)):
            params = {path: array + step for path, array in flat_params(draft).items()}
            checkpointer.save_checkpointables(step, {"params": params}, metrics={"score": score})
    return folder


def expected(step: int) -> dict[str, np.ndarray]:
    return {path: np.asarray(array + step) for path, array in flat_params(tiny_lora_draft(OWN)).items()}


@pytest.mark.parametrize(("step", "added"), [(None, 2), ("best", 1), (1, 1)])
def test_runs_are_read_at_the_step_asked_for(run: Path, step: str | int | None, added: int) -> None:
    draft = load_run_draft(run, step, dtype=jnp.bfloat16)
    assert isinstance(draft, LoRADraft)
    assert draft.config == read_run_draft_config(run) == OWN
    params = flat_params(draft)
    assert list(params) == list(expected(added))
    for path, array in expected(added).items():
        assert params[path].dtype == jnp.float32
        np.testing.assert_array_equal(params[path], array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_are_exported(run: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    options = [] if dtype == "float32" else ["--dtype", dtype]
    flax_to_hf.main([str(run), str(out), "--step", "best", "--format", "peft", *options])
    draft = load_draft(out, base=BASE)
    assert draft.config == OWN
    for path, array in expected(1).items():
        rounded = array.astype(jnp.dtype(dtype)).astype(np.float32)
        np.testing.assert_array_equal(flat_params(draft)[path], rounded, err_msg=path)
    assert read_fingerprint(out) == FINGERPRINT


@pytest.mark.parametrize(
    ("recorded", "name"),
    [("OWNER/NAME", "OWNER/NAME"), ("FOLDER/target", "FOLDER/target"), ("FOLDER/gone", None), (None, None)],
)
def test_the_export_names_a_target_that_peft_finds(
    run: Path, tmp_path: Path, recorded: str | None, name: str | None
) -> None:
    (tmp_path / "target").mkdir()
    source = shutil.copytree(run, tmp_path / "run")
    metadata = {"target": recorded and recorded.replace("FOLDER", str(tmp_path))}
    (source / "metadata.json").write_text(json.dumps(metadata))
    flax_to_hf.main([str(source), str(tmp_path / "out")])
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert written == (name and name.replace("FOLDER", str(tmp_path)))


def test_a_target_has_its_name_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_name("runs/target") == str(tmp_path / "runs" / "target")
    assert model_name("OWNER/NAME") == "OWNER/NAME"
    assert model_name("embedded") is None


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no base": (
        lambda run: (run / RUN_LORA_BASE).unlink(),
        r"lora_base\.json: no such file; the run of a LoRA draft holds its target's",
    ),
    "another base": (
        lambda run: edit(run, lambda raw: raw.update(hidden_size=64), RUN_LORA_BASE),
        r"adapters\.layers\.0\.q_proj\.a: shape \[32, 3\], draft_config\.json makes it \[64, 3\]",
    ),
    "no mask embedding": (
        lambda run: edit(run, lambda raw: raw["draft"].update(own_mask_embedding=False), "draft_config.json"),
        "unexpected mask_embedding",
    ),
    "no adapter": (
        lambda run: edit(run, lambda raw: raw.update(adapter=None), "draft_config.json"),
        r"draft_config\.json: adapter is None; it must be an object",
    ),
    "no rank": (
        lambda run: edit(run, lambda raw: raw["adapter"].pop("r"), "draft_config.json"),
        r"draft_config\.json, adapter: r: the field is missing",
    ),
    "no draft": (
        lambda run: edit(run, lambda raw: raw.pop("draft"), "draft_config.json"),
        r"draft_config\.json: draft is None; it must be an object with block_size",
    ),
    "a DFlash draft": (
        lambda run: (run / "draft_config.json").write_text(json.dumps(draft_config_to_hf(draft_config()))),
        "is not a checkpoint of draft_config",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused(run: Path, tmp_path: Path, damage: str) -> None:
    source = shutil.copytree(run, tmp_path / "run")
    change, message = DAMAGES[damage]
    change(source)
    with pytest.raises(InputError, match=message):
        load_run_params(source)


def test_what_the_converters_do_not_do_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(flax_to_hf.main, [str(run), str(tmp_path / "out"), "--format", "zlab"], capsys)
    assert "holds a LoRADraft; use --format peft, not zlab" in error
    draft = save_draft(tiny_lora_draft(), tmp_path / "draft", fingerprint=None)
    adapter = save_adapters(tiny_lora_draft().adapters, tmp_path / "adapter", base_name=None)
    for folder in (draft, adapter):
        error = refusal(hf_to_flax.main, [str(folder), str(tmp_path / "out")], capsys)
        assert f"error: {folder}: holds an adapter, which is not converted" in error
    assert not (tmp_path / "out").exists()
