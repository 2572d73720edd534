"""What a run folder says about its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specjax.config import RunConfig, load_config
from specjax.errors import InputError
from specjax.reporting.scalars import Point, read_scalars

SUMMARY_FILE = "summary.json"  # of the quickstart
BENCHMARK_FILES = "benchmark*.json"  # of python -m specjax.benchmark decode --json
Report = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A file of decoding measurements: the reports by data set, and what they were made with."""

    path: Path
    reports: dict[str, Report]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    config_text: config.yaml as it is. saved_step: of the latest checkpoint, None before the first. curves: TensorBoard
    scalars by tag, empty without events.
    """

    folder: Path
    config: RunConfig
    config_text: str
    metadata: dict[str, Any]
    saved_step: int | None
    curves: dict[str, list[Point]]
    benchmarks: list[Benchmark]

    @property
    def evaluation_step(self) -> int | None:
        """The step of the newest evaluation, None where there was none."""
        steps = [points[-1].step for tag, points in self.curves.items() if tag.startswith("eval/")]
        return max(steps, default=None)


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        InputError: the folder is no run, or a file of it cannot be read.
    """
    from specjax.training.run import CONFIG_FILE, METADATA_FILE
    from specjax.weights.config_fields import read_json
    from specjax.weights.orbax_checkpoint import latest_step

    missing = [name for name in (CONFIG_FILE, METADATA_FILE) if not (folder / name).is_file()]
    if missing:
        found = f"has no {' and no '.join(missing)}" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder}: {found}; give the output_dir of a training run")
    return Run(
        folder=folder,
        config=load_config(folder / CONFIG_FILE),
        config_text=(folder / CONFIG_FILE).read_text(encoding="utf-8"),
        metadata=read_json(folder / METADATA_FILE),
        saved_step=latest_step(folder),
        curves=read_scalars(folder / "tensorboard"),
        benchmarks=list(_benchmarks(folder)),
    )


def _benchmarks(folder: Path) -> list[Benchmark]:
    from specjax.weights.config_fields import read_json

    found = []
    sources = [
        (folder / SUMMARY_FILE, "data_sets"),
        *((path, "decode") for path in sorted(folder.glob(BENCHMARK_FILES))),
    ]
    for path, field in sources:
        content = read_json(path) if path.is_file() else {}
        if field not in content:
            continue  # no file, or one of `benchmark load`, which does not measure the draft
        reports = content[field]
        if not isinstance(reports, dict) or not all(isinstance(report, dict) for report in reports.values()):
            raise InputError(f"{path}: {field} is not a table of reports by data set; measure again, or move the file")
        found.append(Benchmark(path, reports, content.get("metadata", {})))
    return found
