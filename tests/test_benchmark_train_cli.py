"""`python -m specjax.benchmark train` and `memory`: their JSON and tables, and the mistakes they name."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from jax.experimental import topologies

from specjax.benchmark import main
from specjax.config import load_config
from specjax.training import tasks
from specjax.training.benchmark import _compiled, _with_target, synthetic_batch, updated, with_mask_token
from specjax.training.memory import step_memory
from specjax.training.run import mesh_of
from specjax.training.tasks import draft_config_of, draft_task_of
from specjax.weights import draft_config_to_hf
from tests import refusals
from tests.training.tiny import LENGTH, edited, raw_run
from tests.weights.tiny import raw_config

ROWS, ANCHORS = 8, 4
SPREAD = {"median", "min", "max"}


def write_config(folder: Path, changes: dict[str, Any] | None = None) -> str:
    """A run on a target folder with only config.json, and on data that does not exist."""
    target = folder / "target"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(raw_config(num_hidden_layers=4)))
    raw = edited(raw_run(target, folder / "nowhere", folder / "run"), changes or {})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def measure(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "report.json"
    main(["train", *arguments, "--random-target", "--steps", "2", "--warmup", "1", "--json", str(out)])
    written: dict[str, Any] = json.loads(out.read_text())
    assert set(written) == {"train", "metadata"}
    report: dict[str, Any] = written["train"]
    return report


def test_a_step_is_measured_whole_and_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, {"draft.mask_token_id": None})
    overrides = ("logging.peak_tflops=0.001", "training.accumulation_steps=2", "training.batch_size=16", "mesh.fsdp=2")
    report = measure(tmp_path, config, *overrides)
    assert not (tmp_path / "run").exists()
    assert set(report["step_s"]) == SPREAD
    assert len(report["step_all_s"]) == 2
    median = report["step_s"]["median"]
    assert report["tokens_per_s"] == pytest.approx(16 * LENGTH / median)
    assert report["anchors_per_s"] == pytest.approx(16 * ANCHORS / median)
    assert report["mfu"] == pytest.approx(report["flops_per_step"] / median / (8 * 1e9))
    assert report["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert report["target_runs"]
    assert report["memory_peak_bytes"] == report["memory_arguments_bytes"] + report["memory_temporaries_bytes"]
    assert min(report["trace_s"], report["compile_s"], report["memory_arguments_bytes"]) > 0
    assert "device_memory" in report
    assert list(report["parts_s"]) == [
        "target_forward",
        "draft_attention",
        "draft_projections_mlp",
        "head_loss",
        "optimizer",
    ]
    assert report["parts_sum_s"] == pytest.approx(sum(report["parts_s"].values()))
    printed = capsys.readouterr().out
    for words in ("context tokens/s", "anchors/s", "MFU", "recompute excluded", "temporaries", "target forward"):
        assert words in printed


LORA = {"kind": "lora", "draft.num_layers": None, "draft.target_layer_ids": None, "lora.lora_dropout": 0.1}


def test_a_step_of_adapters_is_measured_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, LORA)
    report = measure(tmp_path, config)
    assert report["draft"] == "adapters"
    assert not {"parts_s", "context_scores"} & set(report)
    assert "6*N_adapters" in report["flops_formula"]
    assert "adapters, float32, target runs" in capsys.readouterr().out
    message = "kind lora needs the target's keys, not captured states"
    for argument in (["--captured"], ["--compare", "torch"]):
        assert message in refusal([config, *argument], capsys)


def test_a_comparison_trains_alike_on_captured_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measure(tmp_path, write_config(tmp_path, {"training.remat": False}), "--compare", "torch")
    assert not report["target_runs"]
    assert "target_forward" not in report["parts_s"]
    assert (report["mfu"], report["peak_flops"]) == (None, None)
    ours = report["torch"]["specjax"]
    for variant in ("ranges", "dense"):
        theirs = report["torch"][variant]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert theirs["ratio"] == pytest.approx(theirs["step_s"]["median"] / ours["step_s"]["median"])
        assert str(theirs["threads"]) in theirs["by_threads_s"]
        assert set(theirs["cpu_s"]) == set(ours["cpu_s"]) == SPREAD
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed
    assert "PyTorch, dense mask" in printed


COMPARE = ["--compare", "torch"]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["loss.objective=kl", *COMPARE], "run.yaml: --compare torch: PyTorch's step has only plain settings: "),
        ({}, ["loss.objective=kl", *COMPARE], "loss.objective is kl; give ce"),
        ({}, ["optimizer.name=muon", *COMPARE], "optimizer.name is muon; give adamw"),
        ({}, ["training.accumulation_steps=2", *COMPARE], "training.accumulation_steps is 2; give 1"),
        ({}, ["draft.sliding_window=9", *COMPARE], "draft.sliding_window is 9; give null"),
        ({}, ["draft.mask_embedding=own", *COMPARE], "draft.mask_embedding is own; give target"),
        ({}, ["--steps", "0"], "--steps is 0; give at least 1"),
        ({}, ["--warmup", "-1"], "--warmup is -1; give at least 0"),
        ({}, ["training.batch_size=3"], "training.batch_size is 3: not a multiple of 8"),
        ({"target.path": "./nowhere"}, ["--random-target"], "nowhere: no such folder"),
        ({}, [], "holds no weights"),
    ],
)
def test_a_mistake_is_named(
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refusal([write_config(tmp_path, changes), *arguments], capsys)


def test_a_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"kind": "causal_lm", "draft": None, "loss": None, "data.num_anchors": None, "evaluation.prompts": None}
    config = write_config(tmp_path, settings)
    assert "run.yaml: kind is causal_lm; the benchmark times the training of drafts" in refusal([config], capsys)


def test_a_folder_without_a_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    (tmp_path / "target" / "config.json").unlink()
    assert "target/config.json" in refusal([config, "--random-target"], capsys)


def test_a_comparison_needs_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without_torch(name: str, *args: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return original(name, *args)

    config = write_config(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert "--compare torch needs PyTorch; install the test extra" in refusal([config, *COMPARE], capsys)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], command: str = "train") -> str:
    said = refusals.refusal(main, [command, *arguments], capsys)
    assert said.startswith("error: ")
    return said


def memory(folder: Path, *arguments: str) -> dict[str, dict[str, int]]:
    out = folder / "memory.json"
    main(["memory", *arguments, "--json", str(out)])
    report: dict[str, dict[str, int]] = json.loads(out.read_text())["memory"]
    return report


def test_memory_without_arrays_is_that_of_the_real_step(tmp_path: Path) -> None:
    """Compiled from shapes alone, and from the arrays of a run: with a teacher, Muon, an average, and a mesh."""
    config = write_config(tmp_path, {"draft.mask_token_id": None, "data.taps": "nowhere", "mesh": {"fsdp": 2}})
    config_of = lambda: load_config(config, ["loss.objective=kl", "optimizer.ema_decay=0.9"])  # noqa: E731
    with mesh_of(config_of()):
        run, target = _with_target(config_of(), random=True)
        _, batch = synthetic_batch(run, target)
        _, real = _compiled(run, draft_task_of(run, target), batch)
    found = step_memory(config_of())
    assert found["arguments"] == real["memory_arguments_bytes"]
    assert found["temporaries"] == pytest.approx(real["memory_temporaries_bytes"], rel=0.01)
    assert found["peak"] == found["arguments"] + found["temporaries"]


def test_memory_of_what_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read, a slice computes in bfloat16, and a step that does not fit is told from one that does."""
    old = tmp_path / "old"
    draft = {"draft.init": str(old), "draft.mask_token_id": None}
    config = load_config(write_config(tmp_path, draft), [])
    old.mkdir()
    fresh = draft_config_of(with_mask_token(updated(config, "draft", init=None), 64))
    (old / "config.json").write_text(json.dumps(draft_config_to_hf(fresh)))
    here = step_memory(config, vocab_size=1024)
    there = step_memory(config, vocab_size=1024, devices=jax.devices())
    assert there["arguments"] < here["arguments"]  # the target's, in half the bytes

    def exhausted(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ran out of memory in memory space hbm")

    monkeypatch.setattr(jax.stages.Lowered, "compile", exhausted)
    assert step_memory(config) == {}


def test_memory_grows_linearly_with_anchors_and_rows_and_not_with_the_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "LOGITS_BYTES", 2**14)
    settings = {"data.max_length": 64, "data.num_anchors": 16, "training.batch_size": 8, "training.attention_chunk": 8}
    config = write_config(tmp_path, settings | {"loss": {"gamma": 2.0}})
    varied = ["--vary", "data.num_anchors", "32", "48", "--vary", "training.batch_size", "16"]
    report = memory(tmp_path, config, *varied, "--vocab-size", "1024")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("as configured", "data.num_anchors=48", "vocabulary of 1024"))
    base, larger = report["as configured"], report["vocabulary of 1024"]
    second, third = (report[f"data.num_anchors={anchors}"]["temporaries"] for anchors in (32, 48))
    assert second > base["temporaries"]
    assert third - second == pytest.approx(second - base["temporaries"], rel=0.2)
    assert base["temporaries"] < report["training.batch_size=16"]["temporaries"] < 2.2 * base["temporaries"]
    assert larger["arguments"] > base["arguments"]  # the target's own embedding and head
    assert larger["temporaries"] - base["temporaries"] < 8 * 2**14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "data.num_anchors"], "--vary data.num_anchors: give values after it"),
        (["--vary", "data.anchors", "1"], "data.anchors"),
        (["--vocab-size", "100", "1"], "--vocab-size is 1; give at least 2"),
        (["training.batch_size=3"], "training.batch_size is 3: not a multiple of 8"),
        (["mesh.fsdp=3"], "mesh data=-1 fsdp=3 tensor=1: does not divide the 8 devices"),
        (["--topology", "v5e:9x9"], "--topology v5e:9x9: no such slice; give one such as v5e:4x4, with libtpu"),
    ],
)
def test_a_mistake_of_memory_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(**_: Any) -> None:
        raise RuntimeError("no such slice")

    monkeypatch.setattr(topologies, "get_topology_desc", unknown)
    assert message in refusal([write_config(tmp_path), *arguments], capsys, "memory")
