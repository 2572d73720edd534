"""`python -m specjax.benchmark`: the table, the JSON beside it, transformers as a baseline, and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specjax.benchmark import main
from specjax.weights.load_benchmark import write_random_model
from tests.model_folders import LAYERS, save_draft_for, write_jsonl
from tests.weights.test_load_benchmark import SMALL
from tests.weights.tiny import raw_config

STOP, NEW = 60, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, written by transformers, draft/ for it, and the prompts code.jsonl and chat.jsonl."""
    folder = tmp_path_factory.mktemp("models")
    # Wide weights, so that greedy answers wander and no choice is a tie.
    raw = raw_config(num_hidden_layers=LAYERS, initializer_range=0.4, eos_token_id=STOP)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).save_pretrained(folder / "target")
    # A folder's own sampling settings change nothing: both sides decode greedily.
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 5.0, "eos_token_id": STOP}
    (folder / "target" / "generation_config.json").write_text(json.dumps(sampling))
    save_draft_for(folder / "target", folder / "draft")
    rows = [{"input_ids": [5 + i, 6, 7 + i], "loss_mask": [0, 0, 0]} for i in range(4)]
    write_jsonl(folder / "code.jsonl", *rows[:1])
    write_jsonl(folder / "chat.jsonl", *rows[1:])
    return folder


def decode(folder: Path, *arguments: str) -> list[str]:
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft")]
    return ["decode", *models, "--max-new-tokens", str(NEW), "--runs", "1", *arguments]


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, Any]:
    out = folder / "new" / "report.json"
    data = [str(folder / "code.jsonl"), str(folder / "chat.jsonl")]
    main(decode(folder, "--data", *data, "--limit", "2", "--compare-hf", "--json", str(out)))
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_the_report_holds_every_data_set_and_their_total(measured: dict[str, Any]) -> None:
    assert set(measured) == {"decode", "metadata"}
    assert {"specjax", "git_revision", "packages", "devices"} <= set(measured["metadata"])
    reports = measured["decode"]
    assert {name: report["prompts"] for name, report in reports.items()} == {"code": 1, "chat": 2, "all": 3}
    for report in reports.values():
        assert report["identical"]
        assert (report["block_size"], report["draft_tokens"], report["batch_size"], report["runs"]) == (4, 3, 1, 1)
        assert {"ar_step_s", "draft_s", "verify_s", "predicted_speedup_decode", "repeated_4gram_fraction"} <= set(
            report
        )


def test_transformers_gives_the_same_greedy_answers(measured: dict[str, Any]) -> None:
    for name in ("code", "chat"):
        report = measured["decode"][name]
        theirs = report["transformers"]
        assert theirs["equal_outputs"] == report["prompts"]
        assert theirs["tokens_per_s"] == max(theirs["by_threads"].values())
        assert theirs["by_threads"][str(theirs["threads"])] == theirs["tokens_per_s"]
        assert theirs["ratio"] == report["ar_end_to_end_tokens_per_s"] / theirs["tokens_per_s"]
        assert "outputs" not in theirs
    assert "transformers" not in measured["decode"]["all"]
    assert len({tuple(answer) for answer in measured["decode"]["all"]["outputs"]}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs is 0; give at least 1"),
        (["--limit", "0"], "--limit is 0; give at least 1"),
        (["--batch-size", "0"], "--batch-size is 0; give at least 1"),
        (["--compare-hf", "--batch-size", "2"], "--compare-hf decodes one prompt at a time; --batch-size is 2"),
        (["--json", "."], "--json . is a folder"),
        (["--draft-tokens", "4"], "draft_tokens is 4; this draft proposes 1 to 3"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--data", "nowhere.jsonl"], "data nowhere.jsonl: no such file"),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(decode(folder, "--data", str(folder / "code.jsonl"), *arguments))
    assert stopped.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.replace("prompt 0: ", "")


def test_loading_is_measured_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, out = write_random_model(tmp_path / "model", SMALL), tmp_path / "load.json"
    main(["load", "--target", str(target), "--runs", "1", "--json", str(out)])
    report = json.loads(out.read_text())
    assert set(report) == {"load", "metadata"}
    assert report["load"]["files_bytes"] == (target / "model.safetensors").stat().st_size
    assert (report["load"]["dtype"], len(report["load"]["load_all_seconds"])) == ("bfloat16", 1)
    printed = capsys.readouterr().out
    for row in ("reading the files", "loading the model", "ratio", "peak extra anonymous memory"):
        assert row in printed


def test_loading_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["load", "--target", "./nowhere"])
    assert "error: nowhere: no such folder" in capsys.readouterr().err
