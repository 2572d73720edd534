"""The data settings of a run: what it trains on, what it records, and which caches and runs it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from safetensors.numpy import load_file

from specjax.capture import main as capture
from specjax.data.taps import shard_path
from specjax.training.data import open_data
from tests.training.tiny import edited, parsed, scalars, train, write_config, write_rows

FAST = {"training.steps": 2, "evaluation.every_steps": 2}


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def error_of(capsys: pytest.CaptureFixture[str], raw: dict[str, Any], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        train(raw, *arguments)
    return capsys.readouterr().err


def test_a_run_on_parquet_has_the_losses_of_one_on_jsonl_and_refuses_changed_files(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = edited(raw, FAST)
    lines = Path(raw["data"]["train"][0]).read_text().splitlines()
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list([json.loads(line) for line in lines]).to_parquet(path)
    parquet = edited(raw, {"data.train": [str(path)], "output_dir": str(tmp_path / "parquet")})
    ours, theirs = (scalars(train(config)) for config in (parquet, raw))
    for tag in ("train/loss", "eval/loss"):
        assert ours[tag] == theirs[tag]
    recorded = json.loads((tmp_path / "parquet" / "data.json").read_text())
    assert recorded["train"] == [path.stat().st_size]
    datasets.Dataset.from_list([json.loads(line) for line in lines[1:]]).to_parquet(path)
    assert "made with other files of data.train or data.validation" in error_of(capsys, parquet, "--resume")


def test_answers_of_another_target_are_trained_on_with_a_warning(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "answers-00000.jsonl", 8, seed=5)
    (tmp_path / "recipe.json").write_text(json.dumps({"target": "another", "chat_template_kwargs": {}}))
    train(edited(raw, {"data.train": [str(path)], "data.validation": [], "training.steps": 1}))
    assert f"warning: {tmp_path}: its answers are of another target" in capsys.readouterr().out


def test_a_held_out_fraction_is_evaluated_and_not_trained(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    raw = edited(raw, FAST | {"data.validation": None, "data.validation_fraction": 0.3})
    records = open_data(parsed(raw))
    assert records.validation is not None
    first, second = ({record.origin for record in side} for side in (records.train, records.validation))
    assert (len(first | second), len(first & second)) == (20, 0)
    run = train(raw)
    assert scalars(run)["eval/loss"]
    assert json.loads((run / "data.json").read_text())["validation"] == []
    changed = edited(raw, {"data.validation_fraction": 0.4})
    assert "the run to resume has other settings: data." in error_of(capsys, changed, "--resume")


def test_a_record_of_any_weight_is_captured_once_and_trains_as_online(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_rows(tmp_path / "more.jsonl", 8, seed=5)
    weights = {"data.train": [raw["data"]["train"][0], {"path": str(more), "weight": 2.5}], "data.packing": True}
    raw = edited(raw, FAST | weights)
    taps = tmp_path / "taps"
    capture([str(write_config(raw)), str(taps)])
    assert sorted(load_file(shard_path(taps, 0))["example"].tolist()) == list(range(28))
    offline = edited(raw, {"data.taps": str(taps), "output_dir": str(tmp_path / "offline")})
    ours, theirs = (scalars(train(config)) for config in (offline, raw))
    for tag in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(list(ours[tag].values()), list(theirs[tag].values()), rtol=1e-5)
    for change, difference in (
        ({"data.reasoning": "hide"}, "reasoning is 'keep', now 'hide'"),
        ({"data.validation": None, "data.validation_fraction": 0.2}, "validation_fraction is None, now 0.2"),
        (
            {"data.train": [raw["data"]["train"][0], {"path": str(more), "weight": 0.5}]},
            "examples is 28, now 24",
        ),
    ):
        stale = edited(offline, change | {"output_dir": str(tmp_path / "stale")})
        assert difference in error_of(capsys, stale)
