"""Reading the events that training writes."""

from __future__ import annotations

from pathlib import Path

from specjax.reporting.scalars import read_scalars
from specjax.training.metrics import MetricsWriter


def write(run: Path, *entries: tuple[str, int, float]) -> None:
    writer = MetricsWriter(run, total_steps=100, first_step=0, tensorboard=True, active=True)
    for prefix, step, loss in entries:
        writer.write(prefix, step, {"loss": loss})
    writer.close()


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(p.step, p.value) for p in found] for tag, found in read_scalars(run / "tensorboard").items()}


def test_every_point_is_read_however_many_there_are(tmp_path: Path) -> None:
    write(tmp_path, *(("train", step, float(step)) for step in range(1, 10_501)))
    assert points(tmp_path) == {"train/loss": [(step, float(step)) for step in range(1, 10_501)]}


def test_steps_that_a_resumed_run_repeats_count_once(tmp_path: Path) -> None:
    """Killed after step 50, resumed from the checkpoint of step 20."""
    first = [("train", step, 1.0) for step in (10, 20, 30, 40)]
    write(tmp_path, *first[:2], ("eval", 20, 1.0), *first[2:], ("eval", 40, 1.0), ("train", 50, 1.0))
    write(tmp_path, ("train", 30, 2.0), ("train", 35, 2.0))
    assert points(tmp_path) == {
        "train/loss": [(10, 1.0), (20, 1.0), (30, 2.0), (35, 2.0)],
        "eval/loss": [(20, 1.0)],
    }


def test_no_events_are_no_curves(tmp_path: Path) -> None:
    assert read_scalars(tmp_path / "tensorboard") == {}
    (tmp_path / "tensorboard").mkdir()
    assert read_scalars(tmp_path / "tensorboard") == {}
