"""Stopped and resumed runs against one that was never stopped: bit for bit on the same mesh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specjax.training.metrics import MetricsWriter
from specjax.weights import flat_params, load_run_params
from tests.training.conftest import FinishedRun
from tests.training.tiny import STEPS, edited, scalars, train, write_config

TIMES = {"train/step_time_s", "train/tokens_per_s", "train/data_wait", "train/mfu"}


def measured(run: Path) -> dict[str, dict[int, float]]:
    """The scalars of a run but for those that a clock gives."""
    return {tag: values for tag, values in scalars(run).items() if tag not in TIMES}


def assert_same_run(run: Path, params: dict[str, np.ndarray]) -> None:
    ours = flat_params(load_run_params(run))
    assert list(ours) == list(params)
    for name, value in params.items():
        assert np.asarray(ours[name]).tobytes() == value.tobytes(), name


@pytest.fixture
def copied(finished_run: FinishedRun, raw: dict[str, Any]) -> Path:
    """A copy of the finished run at its last checkpoint but one, where `raw` puts its run."""
    run = Path(raw["output_dir"])
    shutil.copytree(finished_run.folder, run)
    shutil.rmtree(run / "tensorboard")
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    return run


def test_a_run_stopped_after_every_step_is_the_uninterrupted_run(
    raw: dict[str, Any],
    finished_run: FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    advance = MetricsWriter.advance

    def stop_after_one_step(self: MetricsWriter, step: int) -> None:
        advance(self, step)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "advance", stop_after_one_step)
    for step in range(1, STEPS + 1):
        run = train(edited(raw, {"checkpoint.every_steps": 1000}), "--resume")
        output = capsys.readouterr().out
        assert f"steps {step - 1} to {STEPS}" in output
        assert ("SIGTERM: saved" in output) == (step < STEPS)
    assert measured(run) == measured(finished_run.folder)
    assert_same_run(run, finished_run.params)


def test_a_run_survives_being_killed_and_then_terminated(raw: dict[str, Any]) -> None:
    """SIGKILL comes while checkpoints are being written, one a step; then SIGTERM ends the resumed process."""
    raw = edited(raw, {"training.steps": 40, "data.validation": []})
    path = write_config(edited(raw, {"checkpoint.every_steps": 1}))
    for number, after in ((signal.SIGKILL, 5), (signal.SIGTERM, 25)):
        command = [sys.executable, "-m", "specjax.train", str(path), "--resume"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(f"train step {after} "):
                    process.send_signal(number)
                    break
            rest = process.stdout.read()
        assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        assert ("SIGTERM: saved step" in rest) == (number == signal.SIGTERM)
        assert "train step 40 " not in rest
    uninterrupted = train(edited(raw, {"output_dir": raw["output_dir"] + "-reference"}))
    run = train(raw, "--resume")
    ours, expected = measured(run), measured(uninterrupted)
    assert max(ours["train/loss"]) == 40
    for tag, values in ours.items():
        assert values == {step: expected[tag][step] for step in values}, tag  # a killed writer may lose its last events
    params = {name: np.asarray(x) for name, x in flat_params(load_run_params(uninterrupted)).items()}
    assert_same_run(run, params)


def test_mesh_logging_and_chunks_may_change(copied: Path, raw: dict[str, Any], finished_run: FinishedRun) -> None:
    """And what another version of specjax recorded of the target is no obstacle."""
    side = copied / "specjax.json"
    written = side.read_text()
    side.write_text(json.dumps({"target_fingerprint": {"rows_hashed_otherwise": "x"}}))
    changes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "logging.every_steps": 2, "checkpoint.keep_last": 1}
    changes |= {"loss.chunk_blocks": 1, "training.attention_chunk": 8}  # several chunks, where the run had one
    train(edited(raw, changes), "--resume")
    assert side.read_text() == written
    ours, expected = measured(copied), measured(finished_run.folder)
    assert list(ours["train/loss"]) == [STEPS]
    assert ours["eval/loss"][STEPS] == pytest.approx(expected["eval/loss"][STEPS], rel=1e-5)
    params = flat_params(load_run_params(copied))
    for name, value in finished_run.params.items():
        np.testing.assert_allclose(np.asarray(params[name]), value, rtol=0, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("optimizer.learning_rate", 1e-3), ("training.steps", 8), ("data.max_length", 20), ("seed", 4)],
)
def test_what_shapes_the_updates_may_not_change(
    setting: str, value: Any, raw: dict[str, Any], finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(edited(raw, {setting: value, "output_dir": str(finished_run.folder)}), "--resume")
    error = capsys.readouterr().err
    assert f"the run to resume has other settings: {setting} is " in error
    assert f", now {value}; restore them" in error


def test_a_run_is_not_overwritten(
    raw: dict[str, Any], finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(edited(raw, {"output_dir": str(finished_run.folder)}))
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["draft_config.json", "specjax.json", "target.json"])
def test_another_mask_token_or_target_is_refused(
    name: str, copied: Path, raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The config may say `null` or a hub id, and what that stands for may have changed since."""
    recorded = json.loads((copied / name).read_text())
    if name == "draft_config.json":
        recorded["dflash_config"]["mask_token_id"] -= 1
    elif name == "target.json":
        recorded["digest"] = "0" * 64
    else:
        recorded["target_fingerprint"]["first_rows"] = "0" * 64
    (copied / name).write_text(json.dumps(recorded))
    with pytest.raises(SystemExit, match="2"):
        train(raw, "--resume")
    assert f"{copied / name}: the run to resume was made with another" in capsys.readouterr().err
    assert json.loads((copied / name).read_text()) == recorded


def test_data_that_grew_is_refused(copied: Path, raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    recorded = json.loads((copied / "data.json").read_text())
    assert recorded["train"] == [Path(raw["data"]["train"][0]).stat().st_size]
    (copied / "data.json").write_text(json.dumps(recorded | {"train": [recorded["train"][0] - 1]}))
    with pytest.raises(SystemExit, match="2"):
        train(raw, "--resume")
    assert "made with other files of data.train or data.validation than there are now" in capsys.readouterr().err


def test_a_run_that_never_saved_a_step_is_started_anew(raw: dict[str, Any]) -> None:
    """As after a first step that ran out of memory: nothing is lost, and the settings that failed can be changed."""
    folder = Path(raw["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "data.json", "draft_config.json", "metadata.json"):
        (folder / name).write_text("{}")
    run = train(edited(raw, {"training.steps": 1}))
    assert "steps: 1" in (run / "config.yaml").read_text()
    assert json.loads((run / "data.json").read_text())["train"]


def test_a_config_of_the_users_own_is_not_replaced(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    mine = Path(raw["output_dir"]) / "config.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# my settings")
    for flags in ((), ("--resume",)):
        with pytest.raises(SystemExit, match="2"):
            train(raw, *flags)
        assert "config.yaml in it is not of a run; choose another folder" in capsys.readouterr().err
    assert mine.read_text() == "# my settings"


def test_a_checkpoint_without_its_config_is_not_continued(
    copied: Path, raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "config.yaml").unlink()
    with pytest.raises(SystemExit, match="2"):
        train(raw)
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path(raw["output_dir"]).parent.mkdir(parents=True, exist_ok=True)
    Path(raw["output_dir"]).write_text("a file")
    with pytest.raises(SystemExit, match="2"):
        train(raw)
    assert f"output_dir {raw['output_dir']}: cannot be written" in capsys.readouterr().err


def test_a_resumed_average_is_that_of_the_uninterrupted_run(
    raw: dict[str, Any], finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = edited(raw, {"optimizer.ema_decay": 0.6})
    reference = train(edited(raw, {"output_dir": raw["output_dir"] + "-reference"}))
    # The updates are those of the run without an average, which is what checkpoints hold as the parameters.
    assert measured(reference)["train/loss"] == measured(finished_run.folder)["train/loss"]
    assert measured(reference)["eval/loss"] != measured(finished_run.folder)["eval/loss"]
    params = {name: np.asarray(x) for name, x in flat_params(load_run_params(reference)).items()}
    assert any((value != finished_run.params[name]).any() for name, value in params.items())

    with monkeypatch.context() as patch:
        advance = MetricsWriter.advance

        def stop_after_two_steps(self: MetricsWriter, step: int) -> None:
            advance(self, step)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(MetricsWriter, "advance", stop_after_two_steps)
        train(raw)
    run = train(raw, "--resume")
    assert measured(run)["eval/loss"] == measured(reference)["eval/loss"]
    assert_same_run(run, params)
