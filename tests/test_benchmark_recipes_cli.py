"""`python -m specjax.benchmark recipes`: runs that are trained, measured, tabled, kept, and refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from converters.flax_to_hf import main as export
from specjax.benchmark import main
from specjax.recipe_table import spread
from tests.model_folders import write_jsonl
from tests.refusals import refusal
from tests.training.tiny import STEPS, raw_run, save_tiny_target, train, write_rows

NEW = 6


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, data/, base.yaml, and the prompts near.jsonl and far.jsonl."""
    folder = tmp_path_factory.mktemp("recipes")
    save_tiny_target(folder / "target")
    (folder / "data").mkdir()
    for name, count, seed in (("train", 20, 0), ("validation", 12, 1)):
        write_rows(folder / "data" / f"{name}.jsonl", count, seed=seed)
    base = raw_run(folder / "target", folder / "data", folder / "base")
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    for name, start in (("near", 3), ("far", 40)):
        rows = [{"input_ids": [start + i, start + 2 * i, 7], "loss_mask": [0, 0, 0]} for i in range(2)]
        write_jsonl(folder / f"{name}.jsonl", *rows)
    return folder


def write_spec(sources: Path, path: Path, variants: list[Any], **changes: Any) -> Path:
    spec = {
        "base": str(sources / "base.yaml"),
        "prompts": [str(sources / "near.jsonl"), str(sources / "far.jsonl")],
        "max_new_tokens": NEW,
        "variants": variants,
    }
    path.write_text(yaml.safe_dump(spec | changes))
    return path


PLAIN = {"name": "plain", "seeds": [3]}
UNIFORM = {"name": "uniform", "overrides": ["loss.weighting=uniform", "loss.gamma=null"]}
BROKEN = {"name": "broken", "overrides": ["data.train=[nowhere.jsonl]"]}


@pytest.fixture(scope="module")
def compared(sources: Path) -> Path:
    """A comparison of which one run fails: the folder that it wrote."""
    out = sources / "out"
    spec = write_spec(sources, sources / "spec.yaml", [BROKEN, PLAIN, UNIFORM], capture=True)
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        main(["recipes", str(spec), "--out", str(out)])
    return out


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "recipes.json").read_text())
    return report


def test_a_variant_is_what_training_and_decoding_by_hand_give(compared: Path, sources: Path, tmp_path: Path) -> None:
    raw = raw_run(sources / "target", sources / "data", tmp_path / "run")
    run = train(raw)
    export([str(run), str(tmp_path / "draft"), "--step", "best"])
    prompts = [str(sources / "near.jsonl"), str(sources / "far.jsonl")]
    models = ["--target", str(sources / "target"), "--draft", str(tmp_path / "draft")]
    options = ["--max-new-tokens", str(NEW), "--runs", "1", "--json", str(tmp_path / "direct.json")]
    main(["decode", *models, "--data", *prompts, *options])
    direct = json.loads((tmp_path / "direct.json").read_text())["decode"]
    report = report_of(compared)
    (plain,) = [variant for variant in report["variants"] if variant["name"] == "plain"]
    assert report["columns"] == ["all", "near", "far"]
    for name, length in plain["acceptance_length"].items():
        assert length["mean"] == length["min"] == length["max"] == direct[name]["acceptance_length"]
        assert report["repeated_4grams"][name] == direct[name]["repeated_4gram_fraction"]
        assert report["prompts"][name] == direct[name]["prompts"]
    table = (compared / "recipes.md").read_text().splitlines()
    (row,) = [line for line in table if line.startswith("| plain |")]
    shown = [f"{direct[name]['acceptance_length']:.2f}" for name in report["columns"]]
    assert row.split(" | ")[1:5] == ["1", *shown]
