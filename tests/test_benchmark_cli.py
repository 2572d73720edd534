"""`python -m specjax.benchmark decode` and `load`: tables, what they write, PyTorch as a baseline, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specjax import weights
from specjax.benchmark import main
from specjax.benchmark_decode import write_decode_folder
from specjax.weights.load_benchmark import write_random_model
from tests.model_folders import LAYERS, save_draft_for, write_jsonl
from tests.refusals import refusal
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
    main(decode(folder, "--data", *data, "--limit", "2", "--compare", "hf", "--json", str(out)))
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_the_report_holds_every_data_set_and_their_total(measured: dict[str, Any]) -> None:
    assert set(measured) == {"decode", "metadata"}
    assert {"specjax", "git_revision", "packages", "devices"} <= set(measured["metadata"])
    assert measured["metadata"]["command"].startswith("python -m specjax.benchmark decode --target")
    reports = measured["decode"]
    assert {name: report["prompts"] for name, report in reports.items()} == {"code": 1, "chat": 2, "all": 3}
    for report in reports.values():
        assert report["identical"]
        assert (report["block_size"], report["draft_tokens"], report["batch_size"], report["runs"]) == (4, 3, 1, 1)
        assert report["differences"] == []
        assert report["share_of_bound"] > 0


def test_pytorch_gives_the_same_greedy_answers_in_the_same_rounds(measured: dict[str, Any]) -> None:
    for name in ("code", "chat"):
        report = measured["decode"][name]
        assert set(report["hf"]) == {"ar", "speculative"}
        for figures in report["hf"].values():
            assert figures["equal_outputs"] == figures["equal_rounds"] == report["prompts"]
            assert figures["by_threads"][str(figures["threads"])] == max(figures["by_threads"].values())
            assert figures["ratio_range"][0] <= figures["ratio"] <= figures["ratio_range"][1]
            # One run: the ratio is that of the rates.
            assert figures["ratio"] == pytest.approx(figures["ours_tokens_per_s"] / figures["tokens_per_s"])
    assert "hf" not in measured["decode"]["all"]
    assert len({tuple(answer) for answer in measured["decode"]["all"]["outputs"]}) == 3


def test_a_folder_holds_the_reports_as_json_markdown_and_figures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ["--batch-size", "1", "2", "--draft-tokens", "3", "auto", "--tree-nodes", "5"]
    main(decode(folder, "--data", str(folder / "code.jsonl"), *grid, "--out", str(tmp_path)))
    content = json.loads((tmp_path / "benchmark.json").read_text())
    combinations = [(size, drafts) for size in "12" for drafts in ("3 drafts", "auto drafts", "tree of 5 drafts")]
    assert list(content["decode"]) == [f"code, batch {size}, {drafts}" for size, drafts in combinations]
    assert all(report["identical"] for report in content["decode"].values())
    text = (tmp_path / "benchmark.md").read_text()
    assert text.startswith(f"    {content['metadata']['command']}\n")
    assert f"specjax {content['metadata']['specjax']}" in text
    rows = [line.split(" | ")[:4] for line in text.splitlines() if line.startswith("| code")]
    # acceptance, speed, cost of steps
    assert rows == [["| code", "0", size, drafts] for size, drafts in combinations] * 3
    assert {path.name for path in tmp_path.glob("*.png")} == {"speedup.png", "acceptance_by_position.png", "round.png"}

    for figure in tmp_path.glob("*.png"):
        figure.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    write_decode_folder(tmp_path, content)
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out
    assert list(tmp_path.glob("*.png")) == []


def test_rules_and_choices_are_ways_beside_each_other(folder: Path, tmp_path: Path) -> None:
    grid = ["--temperature", "1", "--rule", "match", "block", "--draft-choice", "sample"]
    main(decode(folder, "--data", str(folder / "code.jsonl"), *grid, "--json", str(tmp_path / "report.json")))
    reports = json.loads((tmp_path / "report.json").read_text())["decode"]
    assert list(reports) == ["code, 3 drafts (sample)", "code, 3 drafts (block, sample)"]
    assert [report["identical"] for report in reports.values()] == [True, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs is 0; give at least 1"),
        (["--limit", "0"], "--limit is 0; give at least 1"),
        (["--batch-size", "1", "0"], "batch size is 0; give at least 1"),
        (["--batch-size", "2", "2"], "batch_sizes: 2 is there twice"),
        (
            ["--compare", "hf", "--batch-size", "2"],
            "--compare hf decodes prompt by prompt, greedily: --batch-size is 2",
        ),
        (
            ["--compare", "hf", "--temperature", "0", "1"],
            "--compare hf decodes prompt by prompt, greedily: --temperature",
        ),
        (["--compare", "hf", "--draft-tokens", "1", "2"], "--compare hf compares one number of draft tokens"),
        (["--compare", "hf", "--draft-tokens", "auto"], "--compare hf compares one number of draft tokens"),
        (["--compare", "hf", "--tree-nodes", "9"], "--compare hf compares one number of draft tokens"),
        (["--compare", "hf", "--rule", "match", "block"], "--compare hf decodes prompt by prompt, greedily: --rule"),
        (["--compare", "hf", "--draft-choice", "sample"], "--compare hf decodes prompt by prompt, greedily: --draft"),
        (["--one-pass"], "one_pass is set, but the draft was not trained with masked anchors"),
        (["--rule", "match", "block"], "rule is block, but temperature 0 is greedy; give a temperature, or leave rule"),
        (["--temperature", "1", "--rule", "typical"], "rule is 'typical'; give one of match, rejection, block"),
        (["--draft-tokens", "3", "most"], "--draft-tokens is 'most'; give a number or auto"),
        (["--draft-tokens", "auto", "1", "auto"], "draft_tokens: auto is there twice"),
        (["--tree-nodes", "2"], "tree_nodes is 2; give 3 (the drafts of a round, which it holds)"),
        (["--tree-nodes", "9", "2000"], "tree_nodes is 2000; give 3"),
        (["--tree-nodes", "9", "9"], "tree_nodes: 9 is there twice"),
        (["--compare", "hf", "--dtype", "bfloat16"], "--compare hf: PyTorch's loop runs plain drafts"),
        (["--temperature", "0", "--top-k", "5"], "top_k is 5, but temperature 0 is greedy"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", __file__], f"--out {__file__} is a file"),
        (["--json", "."], "--json . is a folder"),
        (["--draft-tokens", "4"], "draft_tokens is 4; this draft proposes 1 to 3"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "load_target", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    assert f"error: {message}" in refusal(
        main, decode(folder, "--data", str(folder / "code.jsonl"), *arguments), capsys
    )


def test_prompts_that_are_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: data nowhere.jsonl: no such file" in refusal(main, decode(folder, "--data", "nowhere.jsonl"), capsys)


def test_the_comparison_without_pytorch(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    error = refusal(main, decode(folder, "--data", str(folder / "code.jsonl"), "--compare", "hf"), capsys)
    assert "--compare hf needs PyTorch; install the test extra" in error


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
