"""`python -m specjax.benchmark roofline`: what it prints and writes, and the mistakes it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specjax.benchmark import main
from tests.refusals import refusal
from tests.test_benchmark_train_cli import write_config

H200 = ("--device", "NVIDIA H200")


def test_every_way_at_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, {"kind": "lora", "draft": {"block_size": 4}, "lora": {"masked_anchor": 0.5}})
    sizes = ("--batch-size", "1", "64", "--context", "16", "--draft-tokens", "2", "3", "--acceptance", "2", "3.5")
    main(["roofline", config, "--tflops", "1", "--gb-s", "1e3", *sizes, "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())["roofline"]
    assert (report["tflops"], report["gb_s"]) == (1, 1000)
    found = [(row["batch_size"], row["context"], row["draft_tokens"], row["way"]) for row in report["rows"]]
    ways = ("two passes", "one pass")
    assert found == [(rows, 16, drafts, way) for rows in (1, 64) for drafts in (2, 3) for way in ways]
    for row in report["rows"]:
        length = row["break_even_acceptance_length"]
        assert length == pytest.approx(row["round_s"] / row["autoregressive_step_s"])
        assert row["speedup"]["2"] == pytest.approx(2 / length)
        longer = None if row["draft_tokens"] < 3 else pytest.approx(3.5 / length)
        assert row["speedup"]["3.5"] == longer
    printed = capsys.readouterr().out
    assert "nothing was measured" in printed
    assert f"{report['rows'][0]['break_even_acceptance_length']:.2f}" in printed


def test_a_dflash_draft_on_a_known_device(tmp_path: Path) -> None:
    main(["roofline", write_config(tmp_path), *H200, "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())["roofline"]
    assert (report["tflops"], report["gb_s"]) == (989, 4800)
    (row,) = report["rows"]
    assert (row["batch_size"], row["context"], row["draft_tokens"]) == (1, 2048, 3)
    assert (row["way"], row["speedup"]) == ("draft, then verify", {})


def test_settings_may_follow_options(tmp_path: Path) -> None:
    reports = []
    for arguments in (("loss.gamma=2", "draft.block_size=3", *H200), ("loss.gamma=2", *H200, "draft.block_size=3")):
        main(["roofline", write_config(tmp_path), *arguments, "--json", str(tmp_path / "report.json")])
        reports.append(json.loads((tmp_path / "report.json").read_text())["roofline"])
    assert reports[0] == reports[1]
    assert reports[0]["rows"][0]["draft_tokens"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give --device, or both --tflops and --gb-s"),
        (("--tflops", "1"), "Give --device, or both --tflops and --gb-s"),
        (("--device", "abacus"), "--device abacus is not known; give --tflops and --gb-s, or one of TPU v4"),
        ((*H200, "--gb-s", "1"), "leave --tflops and --gb-s out, or --device"),
        (("--tflops", "nan", "--gb-s", "1"), "--tflops is nan and --gb-s is 1; both must be finite and above 0"),
        ((*H200, "--devise", "a=b"), "unrecognized arguments: --devise a=b"),
        ((*H200, "a=b"), "with a=b: unknown key a"),
        ((*H200, "--batch-size", "0"), "--batch-size is 0; give a number from 1 on"),
        ((*H200, "--acceptance", "0.5"), "--acceptance is 0.5; give a number from 1 on"),
        ((*H200, "--draft-tokens", "9"), "--draft-tokens is 9; draft.block_size is 4: give 1 to 3"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(main, ["roofline", write_config(tmp_path), *arguments], capsys)


def test_a_run_without_a_draft_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{kind: causal_lm, output_dir: out, target: {path: embedded}, data: {train: [rows.jsonl]}}")
    said = refusal(main, ["roofline", str(config), *H200], capsys)
    assert "kind is causal_lm; give the config of a draft" in said
