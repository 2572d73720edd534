"""`python -m specjax.train`: what a user may get wrong is reported in one line, with exit status 2, before anything is
written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from specjax.config import load_config
from specjax.data import pipeline
from specjax.train import main
from specjax.weights.safetensors_files import SINGLE_FILE
from tests.refusals import refusal
from tests.training.tiny import STOP_TOKEN, edited, raw_run, save_tiny_target, write_config, write_rows

Break = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and a data set, to be copied and broken."""
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_target(folder / "target")
    (folder / "data").mkdir()
    for name in ("train", "validation"):
        write_rows(folder / "data" / f"{name}.jsonl", 9, seed=0)
    return folder


@pytest.fixture
def raw(sources: Path, tmp_path: Path) -> dict[str, Any]:
    for name in ("target", "data"):
        shutil.copytree(sources / name, tmp_path / name)
    return raw_run(tmp_path / "target", tmp_path / "data", tmp_path / "run")


refused = partial(refusal, main)


def setting(**changes: Any) -> Break:
    def change(raw: dict[str, Any]) -> None:
        raw.update(edited(raw, {name.replace("__", "."): value for name, value in changes.items()}))

    return change


def target_config(**changes: Any) -> Break:
    def change(raw: dict[str, Any]) -> None:
        path = Path(raw["target"]["path"]) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(broken: Callable[[Path], Any]) -> Break:
    return lambda raw: broken(Path(raw["target"]["path"]) / SINGLE_FILE)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def data(text: str) -> Break:
    return lambda raw: Path(raw["data"]["train"][0]).write_text(text) and None


def both(*breaks: Break) -> Break:
    def change(raw: dict[str, Any]) -> None:
        for apply in breaks:
            apply(raw)

    return change


ROW = '{"input_ids": [1, 2, 3, 4], "loss_mask": [0, 1, 1, 1]}\n'
MUTE = '{"input_ids": [1, 2, 3, 4], "loss_mask": [1, 0, 0, 1]}\n'
FOREIGN = '{"input_ids": [1, 2, 64, 4], "loss_mask": [0, 1, 1, 1]}\n'

MISTAKES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "unknown key": (
        setting(training__batchsize=8),
        ("unknown key training.batchsize; did you mean training.batch_size",),
    ),
    "block of one": (setting(draft__block_size=1), ("draft.block_size is 1",)),
    "no gamma for the block": (setting(loss__gamma=None, draft__block_size=5), ("loss.gamma",)),
    "draft settings of a decoder run": (setting(kind="causal_lm"), ("ignores draft, loss", "num_anchors")),
    "no such target": (setting(target__path="./nowhere"), ("nowhere: no such folder",)),
    "architecture": (target_config(model_type="gpt2"), ("target/config.json", "gpt2")),
    "no weights": (weights(Path.unlink), ("/target", "safetensors")),
    "truncated weights": (weights(truncate), (SINGLE_FILE,)),
    "shapes": (target_config(intermediate_size=56), ("mlp.up_proj.weight", "[64, 32]", "[56, 32]")),
    "mask outside": (setting(draft__mask_token_id=64), ("draft.mask_token_id is 64", "64 rows")),
    "mask is eos": (setting(draft__mask_token_id=STOP_TOKEN), ("draft.mask_token_id is 60", "the stop token")),
    "no mask": (setting(draft__mask_token_id=None), ("draft.mask_token_id", "no tokenizer")),
    "last layer tapped": (setting(draft__target_layer_ids=[0, 3]), ("target_layer_ids [0, 3]", "0 to 2")),
    "too shallow for taps": (
        setting(draft__target_layer_ids=None),
        ("4 layers has no 5 default taps", "target_layer_ids explicitly"),
    ),
    "no data file": (setting(data__train=["nowhere/*.jsonl"]), ("nowhere/*.jsonl: no such file",)),
    "empty data": (data(""), ("train.jsonl: no records",)),
    "not JSON": (data(ROW + "\n" + ROW + "{oops\n"), ("train.jsonl, line 4: not JSON",)),
    "foreign token": (data(ROW + FOREIGN), ("train.jsonl, line 2: token 2 has id 64",)),
    "nothing supervised": (data(MUTE * 3), ("has supervised tokens",)),
    "no tokenizer": (data('{"messages": [{"role": "user", "content": "x"}]}\n'), ("line 1", "needs a tokenizer")),
    "devices": (setting(mesh__data=3), ("mesh data=3 fsdp=1 tensor=1", "8 devices")),
    "devices of other axes": (setting(mesh__fsdp=3), ("fsdp=3", "8 devices")),
    "mesh and model": (
        both(target_config(intermediate_size=60), setting(mesh__tensor=8)),
        ("mesh: tensor 8 does not divide intermediate_size 60",),
    ),
    "batch and mesh": (setting(training__batch_size=4), ("training.batch_size is 4", "multiple of 8")),
    "batch and micro-batches": (
        setting(training__batch_size=24, training__accumulation_steps=2),
        ("training.batch_size is 24", "multiple of 16"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(
    mistake: str, raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    change, parts = MISTAKES[mistake]
    change(raw)
    error = refused([str(write_config(raw))], capsys)
    for part in parts:
        assert part in error
    assert not Path(raw["output_dir"]).exists()


def test_the_output_is_a_file(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path(raw["output_dir"]).write_text("mine")
    assert f"output_dir {raw['output_dir']}" in refused([str(write_config(raw))], capsys)
    assert Path(raw["output_dir"]).read_text() == "mine"


def test_a_bad_line_that_the_first_look_missed_is_named_when_it_is_read(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first samples are checked before training; this line comes up in a thread that builds batches ahead."""
    monkeypatch.setattr(pipeline, "CHECKED_ROWS", 1)
    rows = Path(raw["data"]["train"][0])
    rows.write_text(rows.read_text() * 3 + "{oops\n")
    raw = edited(raw, {"data.validation": [], "seed": 1})
    assert f"{rows}, line 28: not JSON" in refused([str(write_config(raw))], capsys)


def test_a_mistake_in_the_config_ends_the_process_with_2_before_jax_starts(raw: dict[str, Any]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "specjax.train", str(write_config(raw)), "training.stepz=4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = ended.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert ended.returncode == 2
    assert "specjax.config" in imported
    assert not {"jax", "flax", "transformers", "torch"} & imported
    (error,) = [line for line in lines if not line.startswith("import time:")]
    assert error.startswith(f"error: {raw['output_dir']}.yaml with training.stepz=4: unknown key training.stepz")
    assert ended.stdout == ""


def test_print_config_shows_what_would_run(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(raw)
    main([str(path), "training.steps=7", "--print-config", "optimizer.learning_rate=1e-3"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["training"]["steps"], shown["optimizer"]["learning_rate"]) == (7, 1e-3)
    path.write_text(yaml.safe_dump(shown))
    overrides = ["training.steps=7", "optimizer.learning_rate=1e-3"]
    assert load_config(path) == load_config(write_config(raw), overrides)
    assert not os.path.exists(raw["output_dir"])


def test_the_settings_of_a_process_go_together(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "give all three" in refused([str(write_config(raw)), "--process-id", "0"], capsys)
