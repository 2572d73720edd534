from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from orbax.checkpoint import v1 as ocp

from converters import flax_to_hf, hf_to_flax
from specjax.errors import InputError
from specjax.models.sharding import make_mesh, mesh_scope
from specjax.weights import (
    draft_config_to_hf,
    flat_params,
    load_checkpoint,
    load_draft,
    load_run_params,
    load_target,
    read_fingerprint,
    save_checkpoint,
    save_draft,
    save_target,
)
from specjax.weights.fingerprint import TargetFingerprint
from tests.weights.tiny import assert_same_params, draft_config, raw_config, tiny_decoder, tiny_draft


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of a draft with three checkpoints, of which the second is the best; step s holds values + s."""
    folder = tmp_path_factory.mktemp("run")
    draft = tiny_draft(draft_config())
    (folder / "draft_config.json").write_text(json.dumps(draft_config_to_hf(draft.config)))
    with mesh_scope(), ocp.training.Checkpointer(folder / "checkpoints") as checkpointer:
        for step, score in ((1, 1.5), (2, 2.5), (3, 2.0)):
            params = {path: array + step for path, array in flat_params(draft).items()}
            checkpointables = {"params": params, "state": {"step": jnp.asarray(step)}}
            checkpointer.save_checkpointables(step, checkpointables, metrics={"score": score})
    return folder


def test_checkpoints_restore_on_another_mesh(tmp_path: Path) -> None:
    decoder = tiny_decoder(raw_config("qwen2"), jnp.bfloat16)
    save_checkpoint(decoder, tmp_path / "ckpt", raw_config("qwen2"))
    assert_same_params(load_checkpoint(tmp_path / "ckpt"), decoder)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        sharded = load_checkpoint(tmp_path / "ckpt")
    up = flat_params(sharded)["layers.0.mlp.up_proj.kernel"]
    assert up.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert_same_params(sharded, decoder)
    with pytest.raises(InputError, match="exists"):
        save_checkpoint(decoder, tmp_path / "ckpt", {})


@pytest.mark.parametrize(("step", "added"), [(None, 3), ("best", 2), (1, 1)])
def test_runs_are_read_at_the_step_asked_for(run: Path, step: str | int | None, added: int) -> None:
    restored, base = flat_params(load_run_params(run, step)), flat_params(tiny_draft(draft_config()))
    for path, array in base.items():
        np.testing.assert_array_equal(np.asarray(restored[path]), np.asarray(array + added))


def test_absent_checkpoints_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint 7; saved steps: 1, 2, 3"):
        load_run_params(run, 7)
    with pytest.raises(InputError, match="no training run"):
        load_run_params(tmp_path)
    shutil.copy(run / "draft_config.json", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no latest checkpoint; saved steps: none"):
        load_run_params(tmp_path)


def test_a_config_of_another_shape_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = draft_config_to_hf(draft_config(intermediate_size=32))
    (tmp_path / "run" / "draft_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is not a checkpoint of draft_config"):
        load_run_params(tmp_path / "run")


def test_targets_convert_there_and_back(hf_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(hf_folder, source)
    raw = json.loads((source / "config.json").read_text()) | {"eos_token_id": [5, 6]}
    (source / "config.json").write_text(json.dumps(raw))
    (source / "tokenizer.json").write_text("{}")
    hf_to_flax.main([str(source), str(tmp_path / "ckpt")])
    flax_to_hf.main([str(tmp_path / "ckpt"), str(tmp_path / "back"), "--format", "hf"])
    assert_same_params(load_target(tmp_path / "back"), load_target(source))
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["eos_token_id"] == [5, 6]
    assert (tmp_path / "back" / "tokenizer.json").exists()


def test_fp32_targets_stay_fp32(tmp_path: Path) -> None:
    decoder = tiny_decoder(raw_config())
    save_target(decoder, tmp_path / "hf", jnp.float32)
    hf_to_flax.main([str(tmp_path / "hf"), str(tmp_path / "ckpt")])
    flax_to_hf.main([str(tmp_path / "ckpt"), str(tmp_path / "back")])
    assert_same_params(load_target(tmp_path / "back", dtype=jnp.float32), decoder)


@pytest.mark.parametrize("own", [False, True])
def test_drafts_convert_there_and_back(own: bool, tmp_path: Path) -> None:
    draft = tiny_draft(draft_config(own_mask_embedding=own), jnp.bfloat16)
    save_draft(draft, tmp_path / "zlab", fingerprint=TargetFingerprint("e", "c", "off"))
    hf_to_flax.main([str(tmp_path / "zlab"), str(tmp_path / "ckpt")])
    flax_to_hf.main([str(tmp_path / "ckpt"), str(tmp_path / "back"), "--format", "zlab"])
    for path in (tmp_path / "zlab").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name


def test_a_mask_embedding_converts_in_its_own_dtype(tmp_path: Path) -> None:
    """It may be wider than the weights beside it, and config.json need not mention it."""
    folder = save_draft(tiny_draft(draft_config()), tmp_path / "zlab", fingerprint=None)
    row = torch.arange(32) / 7
    torch.save(row, folder / "mask_embedding.pt")
    hf_to_flax.main([str(folder), str(tmp_path / "ckpt")])
    converted = load_checkpoint(tmp_path / "ckpt", dtype=jnp.float32)
    assert_same_params(converted, load_draft(folder, dtype=jnp.float32))
    np.testing.assert_array_equal(flat_params(converted)["mask_embedding"], row.numpy())


def test_runs_are_exported(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    fingerprint = TargetFingerprint("e", "c", "off")
    (source / "specjax.json").write_text(json.dumps(fingerprint.to_json()))
    flax_to_hf.main([str(source), str(tmp_path / "out"), "--step", "best"])
    expected = {path: np.asarray(x + 2) for path, x in flat_params(tiny_draft(draft_config())).items()}
    for path, array in flat_params(load_draft(tmp_path / "out")).items():
        np.testing.assert_array_equal(np.asarray(array), expected[path].astype(jnp.bfloat16))
    assert read_fingerprint(tmp_path / "out") == fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "OUT", "--format", "hf"], "use --format zlab, not hf"),
        (["RUN", "OUT", "--dtype", "float32"], "the z-lab layout is bfloat16"),
        (["RUN", "OUT", "--step", "9"], "no checkpoint 9"),
        (["OUT", "OUT2"], "neither a checkpoint of hf_to_flax"),
    ],
)
def test_bad_arguments_exit_with_status_2(
    run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(run), "OUT": str(tmp_path / "out"), "OUT2": str(tmp_path / "out2")}
    with pytest.raises(SystemExit) as caught:
        flax_to_hf.main([names.get(argument, argument) for argument in arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        flax_to_hf.main([names.get(argument, argument) for argument in arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_converters_are_modules_one_can_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "converters.hf_to_flax", str(tmp_path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'config.json'}: no such file")
