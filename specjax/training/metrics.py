"""From a step's sums to the numbers people read, and where they are written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from specjax.blockdiff.metrics import accuracy_by_position, teacher_forced_acceptance_length

Metrics = dict[str, float]


class Evaluation(NamedTuple):
    """score: higher for a better model. sample: an answer in Markdown, accepted drafts bold; None without one."""

    metrics: Metrics
    score: float
    sample: str | None = None


ADDITIVE = ("correct", "supervised", "prefix", "expected", "blocks", "covered", "coverable", "weight", "loss_sum")


def readable(sums: Mapping[str, np.ndarray]) -> Metrics:
    """Loss (nats a token), perplexity or acc@k and acceptance length from additive sums.

    coverage: share of the answers' tokens that a block supervised.
    """
    metrics = {"loss": _ratio(sums["loss_sum"], sums["weight"])}
    if "prefix" not in sums:
        metrics["accuracy"] = _ratio(sums["correct"], sums["supervised"])
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
        return metrics
    accuracies = accuracy_by_position(sums["correct"], sums["supervised"])
    metrics |= {f"acc@{k}": float(accuracies[k]) for k in range(1, len(accuracies))}
    metrics["acceptance_length_tf"] = teacher_forced_acceptance_length(float(sums["prefix"]), float(sums["blocks"]))
    if float(sums["expected"]):
        metrics["acceptance_length_sampled_tf"] = teacher_forced_acceptance_length(
            float(sums["expected"]), float(sums["blocks"])
        )
    metrics["supervised_tokens"] = float(np.sum(sums["supervised"]))
    if "coverable" in sums:
        metrics["coverage"] = _ratio(sums["covered"], sums["coverable"])
    return metrics


def add(total: dict[str, np.ndarray], step: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the additive entries of a step's metrics (float64)."""
    return {k: total.get(k, 0.0) + np.asarray(step[k], np.float64) for k in ADDITIVE if k in step}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    return float(numerator) / float(denominator) if float(denominator) else float("nan")


class MetricsWriter:
    """Writes TensorBoard events, one line a log step on stdout, and a progress bar on a terminal.

    Only the first process writes; the others stay silent.
    """

    def __init__(self, folder: Path, *, total_steps: int, first_step: int, tensorboard: bool, active: bool):
        self._events = EventFileWriter(str(folder / "tensorboard")) if tensorboard and active else None
        self._console = Console(soft_wrap=True, highlight=False, quiet=not active)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (active and self._console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=first_step)
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def write(self, prefix: str, step: int, metrics: Mapping[str, float], line: tuple[str, ...] = ()) -> None:
        """Records `prefix/name` for every metric; prints those named by `line` that exist."""
        if self._events is not None:
            values = [Summary.Value(tag=f"{prefix}/{name}", simple_value=value) for name, value in metrics.items()]
            self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        shown = "  ".join(f"{name} {_format(metrics[name])}" for name in line if name in metrics)
        if shown:
            self.say(f"{prefix} step {step}  {shown}")

    def write_text(self, name: str, step: int, markdown: str) -> None:
        """Records a text that TensorBoard shows as Markdown."""
        if self._events is not None:
            metadata = create_summary_metadata(name, "")
            tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()])
            value = Summary.Value(tag=name, metadata=metadata, tensor=tensor)
            self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def close(self) -> None:
        self._progress.stop()
        if self._events is not None:
            self._events.close()


def _format(value: float) -> str:
    return f"{value:.3e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e6) else f"{value:.4g}"
