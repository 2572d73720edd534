"""Training on captured taps is training on the target, and an interrupted capture goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import specjax.training.capture as capture_module
from specjax.capture import main
from specjax.data.taps import shard_path
from specjax.models.decoder import Decoder
from tests.training.tiny import DRAFT_ONLY, edited, scalars, train, write_config, write_rows

PACKED = {"data.packing": True, "draft.num_layers": 2, "loss.objective": {"ce": 0.5, "kl": 0.5}}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "SHARD_BYTES", 8 * 24 * 384)  # one pass of 8 rows of 24 tokens


def captured(raw: dict[str, Any], out: Path) -> Path:
    main([str(write_config(raw)), str(out)])
    return out


@pytest.mark.usefixtures("small_shards")
def test_online_and_captured_runs_have_the_same_losses(raw: dict[str, Any], tmp_path: Path) -> None:
    online = edited(raw, PACKED)
    taps = captured(online, tmp_path / "taps")
    assert shard_path(taps, 1).exists()
    offline = edited(online, {"data.taps": str(taps), "output_dir": str(tmp_path / "offline")})
    ours, theirs = (scalars(train(config)) for config in (offline, online))
    for tag in ("train/loss", "train/grad_norm", "eval/loss", "eval/acceptance_length_tf"):
        assert list(ours[tag]) == list(theirs[tag])
        np.testing.assert_allclose(list(ours[tag].values()), list(theirs[tag].values()), rtol=1e-5)


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_capture_goes_on_and_gives_the_same_bytes(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = captured(raw, tmp_path / "whole")
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == 4
    write, written = capture_module.write_shard, []

    def fail_at_the_second(folder: Path, shard: int, *arrays: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(shard)
        write(folder, shard, *arrays)

    monkeypatch.setattr(capture_module, "write_shard", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        captured(raw, tmp_path / "parts")
    monkeypatch.setattr(capture_module, "write_shard", lambda *a: (written.append(a[1]), write(*a)))
    parts = captured(raw, tmp_path / "parts")
    captured(edited(raw, {"training.batch_size": 16}), tmp_path / "parts")  # the shards are the same, and all there
    assert written == sorted(set(written))
    assert sorted(path.name for path in parts.iterdir()) == names
    for name in names:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.usefixtures("small_shards")
def test_processes_that_share_a_capture_write_what_one_would(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = captured(raw, tmp_path / "whole"), tmp_path / "parts"
    config = str(write_config(raw))
    main([config, str(parts), "--num-processes", "2", "--process-id", "1"])
    assert [path.name for path in sorted(parts.iterdir())] == ["cache.json", "taps-00001.safetensors"]
    with pytest.raises(SystemExit, match="2"):
        train(edited(raw, {"data.taps": str(parts)}))
    assert "taps-00000.safetensors" in capsys.readouterr().err
    (parts / "taps-00002.safetensors.4.partial").touch()  # of the other process, which is at it
    main([config, str(parts), "--num-processes", "2", "--process-id", "1"])
    assert (parts / "taps-00002.safetensors.4.partial").exists()
    main([config, str(parts), "--num-processes", "2", "--process-id", "0"])
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert (parts / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main([config, str(parts), "--num-processes", "2", "--process-id", "2"])
    assert "--process-id is 2 of --num-processes 2; count from 0" in capsys.readouterr().err


def test_the_target_does_not_run_when_its_taps_are_there(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = edited(raw, {"data.validation": None, "evaluation": None})
    taps = captured(raw, tmp_path / "taps")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the target ran")

    monkeypatch.setattr(Decoder, "__call__", refuse)
    train(edited(raw, {"data.taps": str(taps), "training.steps": 1}))
    with pytest.raises(AssertionError, match="the target ran"):
        train(edited(raw, {"output_dir": str(tmp_path / "online")}))


def test_mistakes_exit_with_2_and_say_what_to_do(
    raw: dict[str, Any], target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_target = shutil.copytree(target_folder, tmp_path / "fine-tuned")
    tensors = load_file(other_target / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][-1] += 0.01
    save_file(tensors, other_target / "model.safetensors", {"format": "pt"})

    def error_of(call: Any, *args: Any) -> str:
        with pytest.raises(SystemExit) as exit_info:
            call(*args)
        assert exit_info.value.code == 2
        return capsys.readouterr().err

    taps = captured(raw, tmp_path / "taps")
    other = edited(raw, {"draft.target_layer_ids": [1, 2]})
    assert "target_layer_ids is [2, 0], now [1, 2]; restore these settings" in error_of(captured, other, taps)
    assert "target_layer_ids is [2, 0], now [1, 2]" in error_of(train, edited(other, {"data.taps": str(taps)}))
    params = edited(raw, {"target.path": str(other_target), "data.taps": str(taps)})
    assert "was captured for another run: target is" in error_of(train, params)
    other_config = shutil.copytree(target_folder, tmp_path / "other config")
    config = json.loads((other_config / "config.json").read_text())
    (other_config / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    params = edited(raw, {"target.path": str(other_config), "data.taps": str(taps)})
    assert "was captured for another run: target is" in error_of(train, params)
    changed = write_rows(tmp_path / "changed.jsonl", 20, seed=9)
    message = error_of(train, edited(raw, {"data.taps": str(taps), "data.train": [str(changed)]}))
    assert "has other tokens than when its taps were captured" in message
    lm = {"kind": "causal_lm", "draft": None, "loss": None} | dict.fromkeys(DRAFT_ONLY)
    assert "only a draft (dflash) is trained on taps" in error_of(captured, edited(raw, lm), tmp_path / "lm")
    message = error_of(train, edited(raw, lm | {"data.taps": str(taps)}))
    assert "kind causal_lm trains no draft and ignores data.taps" in message
