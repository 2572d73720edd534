"""Two processes with a device each, against one process with eight."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from specjax import generate, load_target
from specjax.models.precision import matmul_precision
from specjax.weights import flat_params, load_run_draft, load_run_params
from tests.conftest import xla_flags
from tests.training.conftest import FinishedRun
from tests.training.tiny import STEPS, STOP_TOKEN, edited, scalars, train, write_config, write_rows

# The second process gets a SIGTERM during step 4 of the first run; the run after it exists already.
SCRIPT = """
import os, signal, sys
from specjax.train import main
from specjax.training.metrics import MetricsWriter

coordinator, process, rows, tensor, sparse = sys.argv[1:]
advance = MetricsWriter.advance

def stop(self, step):
    advance(self, step)
    if step == 4 and process == "1":
        os.kill(os.getpid(), signal.SIGTERM)

MetricsWriter.advance = stop
main([rows, "--coordinator", coordinator, "--num-processes", "2", "--process-id", process])
MetricsWriter.advance = advance
try:
    main([rows])
except SystemExit as refused:
    print("refused", refused.code)
main([tensor])
main([sparse])
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def half_without_anchors(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`raw` with a row for each of two devices a step; two of the four rows of the data supervise nothing."""
    path = write_rows(folder / "sparse.jsonl", 4, seed=2)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records[1::2]:
        record["loss_mask"] = [0] * len(record["loss_mask"])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return edited(raw, {"data.train": [str(path)], "training.batch_size": 2})


def assert_rows_without_anchors_weigh_nothing(sparse: dict[str, Any]) -> None:
    """No process waits for another and no number breaks where one of them, or both, have nothing to learn."""
    alone = edited(sparse, {"output_dir": sparse["output_dir"] + "-alone", "mesh.data": 2, "mesh.tensor": 4})
    ours, expected = scalars(Path(sparse["output_dir"])), scalars(train(alone))
    supervised = list(ours["train/supervised_tokens"].values())
    assert len(supervised) == STEPS
    assert 0 in supervised
    assert len(set(supervised)) >= 3  # nothing, one process's row, both
    for tag in ("train/supervised_tokens", "train/loss", "train/grad_norm"):
        assert ours[tag] == pytest.approx(expected[tag], rel=1e-5, nan_ok=True), tag
    assert [np.isnan(loss) for loss in ours["train/loss"].values()] == [n == 0 for n in supervised]


def test_two_processes_train_as_one(raw: dict[str, Any], tmp_path: Path, finished_run: FinishedRun) -> None:
    rows = edited(raw, {"output_dir": str(tmp_path / "rows"), "checkpoint.every_steps": 1000, "data.validation": []})
    tensor = {"output_dir": str(tmp_path / "tensor"), "mesh.tensor": 2, "training.accumulation_steps": 2}
    tensor = edited(raw, tensor | {"evaluation.prompts": 12, "evaluation.max_new_tokens": 9})
    sparse = half_without_anchors(edited(rows, {"output_dir": str(tmp_path / "sparse")}), tmp_path)
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    paths = [str(write_config(config)) for config in (rows, tensor, sparse)]
    commands = [[sys.executable, "-c", SCRIPT, address, str(process), *paths] for process in (0, 1)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(c, env=environment, stdout=pipe, stderr=pipe, text=True) for c in commands]
    (first, first_errors), (second, second_errors) = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], first_errors + second_errors

    assert "refused 2" in first
    assert "--resume" in first_errors
    assert "refused 2" in second
    assert "step" not in second  # the first process logs for both
    assert "process 0 refused the run" in second_errors

    expected = scalars(finished_run.folder)
    whole = scalars(tmp_path / "tensor")
    for tag in ("train/loss", "train/grad_norm", "train/acc@1", "train/supervised_tokens", "eval/loss"):
        assert whole[tag] == pytest.approx(expected[tag], rel=1e-5), tag
    draft = load_run_draft(tmp_path / "tensor")
    with matmul_precision(jnp.float32):
        target = load_target(raw["target"]["path"], dtype=jnp.float32)
        lines = Path(raw["data"]["validation"][0]).read_text().splitlines()
        answers = generate(target, [json.loads(line)["input_ids"][:5] for line in lines], draft, 9, (STOP_TOKEN,))
    assert whole["eval/acceptance_length"][STEPS] == pytest.approx(np.mean([n for row in answers.rounds for n in row]))
    # Both stopped after the step in which one of them got the signal; one process with eight devices goes on.
    assert [path.name for path in (tmp_path / "rows" / "checkpoints").iterdir()] == ["4"]
    assert list(scalars(tmp_path / "rows")["train/loss"]) == [1, 2, 3, 4]
    train(rows, "--resume")
    assert scalars(tmp_path / "rows")["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    params = flat_params(load_run_params(tmp_path / "rows"))
    for name, value in finished_run.params.items():
        np.testing.assert_allclose(np.asarray(params[name]), value, rtol=0, atol=1e-5 * np.abs(value).max())
    assert_rows_without_anchors_weigh_nothing(sparse)
