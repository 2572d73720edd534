"""Run folders as training leaves them, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specjax.config import dump_config, parse_config
from specjax.metadata import run_metadata
from specjax.training.metrics import MetricsWriter

TRAINED = {
    "loss": 0.51234,
    "acc@1": 0.75,
    "acc@2": 0.625,
    "acceptance_length_tf": 2.375,
    "learning_rate": 1.2345e-5,
    "grad_norm": 0.9876,
    "tokens_per_s": 54321.0,
    "step_time_s": 0.25,
}
EVALUATED = {"loss": 0.61234, "acc@1": 0.7, "acc@2": 0.6, "acceptance_length_tf": 2.25, "coverage": 0.875}


def write_run(folder: Path, *, step: int | None = 20, logged: bool = True, **changes: Any) -> Path:
    """A run folder of 20 steps, evaluated at 20. changes: of the config's sections."""
    raw: dict[str, Any] = {
        "output_dir": str(folder),
        "target": {"path": "embedded"},
        "draft": {"num_layers": 2, "block_size": 8},
        "data": {"train": ["train.jsonl"]},
        "training": {"steps": 20},
    }
    folder.mkdir(parents=True)
    config = parse_config({name: value for name, value in (raw | changes).items() if value is not None}, "test")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "metadata.json").write_text(json.dumps(run_metadata()), encoding="utf-8")
    if step is not None:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    if logged:
        write_events(folder, TRAINED, EVALUATED)
    return folder


def write_events(folder: Path, trained: dict[str, float], evaluated: dict[str, float]) -> None:
    """Events at steps 10 and 20, the first of them with doubled values, and an evaluation at 20."""
    writer = MetricsWriter(folder, total_steps=20, first_step=0, tensorboard=True, active=True)
    writer.write("train", 10, {name: 2 * value for name, value in trained.items()})
    writer.write("train", 20, trained)
    writer.write("eval", 20, evaluated)
    writer.close()


def report(**changes: Any) -> dict[str, Any]:
    """A report of `specjax.decoding.benchmark`."""
    return {
        "rounds": 483,
        "rounds_without_drafts": 0.0,
        "acceptance_length": 2.75,
        "acceptance_rate": 0.25,
        "acceptance_by_position": [0.875, 0.5, 0.375],
        "data_set": "code",
        "prompts": 20,
        "tokens": 832,
        "ar_tokens": 832,
        "temperature": 0.0,
        "batch_size": 1,
        "block_size": 8,
        "draft_tokens": 3,
        "tree_nodes": 0,
        "rule": "match",
        "draft_choice": "argmax",
        "one_pass": False,
        "max_new_tokens": 128,
        "runs": 2,
        "repeated_4gram_fraction": 0.125,
        "identical": True,
        "different_prompts": 0,
        "differences": [],
        "ar_tokens_per_s": 325.0,
        "speculative_tokens_per_s": 650.0,
        "speculative_end_to_end_tokens_per_s": 510.0,
        "ar_end_to_end_tokens_per_s": 285.0,
        "speedup_decode": 1.96,
        "speedup_decode_range": [1.9, 2.1],
        "speedup_end_to_end": 1.8,
        "speedup_end_to_end_range": [1.7, 1.9],
        "ar_step_s": 0.003,
        "draft_s": 0.001,
        "verify_s": 0.005,
        "round_s": 0.0065,
        "speedup_bound": 2.0,
        "share_of_bound": 0.98,
    } | changes


def write_benchmark(path: Path, field: str, reports: dict[str, Any]) -> None:
    path.write_text(json.dumps({field: reports, "metadata": run_metadata()}), encoding="utf-8")
