"""The HTML page of a run: one file without scripts or anything from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from specjax.errors import InputError
from specjax.reporting.charts import number
from specjax.reporting.curves import position_charts, training_charts
from specjax.reporting.run_folder import Benchmark, Run
from specjax.reporting.samples import Sample

TEMPLATE = "page.html.jinja"
STYLE = "style.css"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Table:
    """Rows of a measure and its value in every column."""

    title: str
    columns: list[str]
    rows: Sequence[tuple[str, ...]]


def render(run: Run, samples: Sequence[Sample] | None, made: datetime) -> str:
    """The page.

    samples: decoded answers; None where none were asked for. made: when the page is.

    Raises:
        InputError: a benchmark file lacks a field.
    """
    tables = [benchmark_table(benchmark) for benchmark in run.benchmarks]  # first: it refuses what lacks a field
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        name=run.folder.resolve().name,
        style=(folder / STYLE).read_text(encoding="utf-8"),
        run=run,
        facts=facts(run),
        figures=figures(run),
        different=[benchmark.path.name for benchmark in run.benchmarks if _differs(benchmark)],
        training=training_charts(run),
        metrics=metrics(run),
        positions=position_charts(run),
        benchmarks=tables,
        samples=samples,
        made=_time(made.timestamp()),
    )


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run is and what it was made with."""
    config, metadata = run.config, run.metadata
    found = [("kind", config.kind), ("target", config.target.path)]
    if config.kind == "dflash":
        draft = config.draft
        found.append(("draft", f"{draft.num_layers} layers, blocks of {draft.block_size}"))
    if config.kind == "lora":
        rank = config.lora.peft_config or f"rank {config.lora.r}"
        found.append(("draft", f"adapters ({rank}), blocks of {config.draft.block_size}"))
    length = f"{config.training.steps} steps" if config.training.steps else f"{config.training.epochs:g} epochs"
    saved = "no checkpoint yet" if run.saved_step is None else f"latest checkpoint at step {run.saved_step}"
    times = [point.wall_time for points in run.curves.values() for point in points]
    devices = metadata.get("devices") or {}
    return [
        *found,
        ("step", f"{saved}; planned {length}"),
        ("logged", f"{_time(min(times))} to {_time(max(times))}" if times else "no events"),
        ("devices", _devices(devices) if devices else UNKNOWN),
        ("specjax", f"{metadata.get('specjax', UNKNOWN)}, git revision {metadata.get('git_revision') or UNKNOWN}"),
        ("python", f"{metadata.get('python', UNKNOWN)} on {metadata.get('platform', UNKNOWN)}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in metadata.get("packages", {}).items())),
    ]


def _devices(devices: dict[str, Any]) -> str:
    kind, backend = devices.get("kind", UNKNOWN), devices.get("backend", UNKNOWN)
    named = kind if kind == backend else f"{kind} ({backend})"
    return f"{devices.get('count', '?')} x {named}, processes: {devices.get('processes', '?')}"


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def figures(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers to see first: (value, what it is, where it is from)."""
    found = []
    for metric, meaning in (
        ("eval/loss", "evaluation loss"),
        ("eval/perplexity", "evaluation perplexity"),
        ("eval/acceptance_length", "acceptance length, held-out prompts decoded"),
        ("eval/acceptance_length_tf", "acceptance length, teacher-forced"),
    ):
        if metric in run.curves:
            last = run.curves[metric][-1]
            found.append((number(last.value), meaning, f"step {last.step}"))
    for benchmark in run.benchmarks:
        name = "all" if "all" in benchmark.reports else next(iter(benchmark.reports), None)
        report = benchmark.reports.get(name, {}) if name is not None else {}
        where = f"{benchmark.path.name}, {name}"
        if report.get("acceptance_length") is not None:
            repeated = report.get("repeated_4gram_fraction")
            beside = "" if repeated is None else f"; repeated 4-grams {repeated:.3f}"
            found.append((f"{report['acceptance_length']:.2f}", "acceptance length, decoding", where + beside))
        if report.get("speedup_decode") is not None:
            found.append((f"{report['speedup_decode']:.2f}x", "speedup, decode only", where))
    return found


def _differs(benchmark: Benchmark) -> bool:
    return any(report.get("identical") is False for report in benchmark.reports.values())


def metrics(run: Run) -> Table:
    """Every tag's last, least and greatest value."""
    rows = []
    for tag, points in sorted(run.curves.items()):
        values = [point.value for point in points if point.value == point.value]  # without NaN, which has no order
        least, greatest = (number(min(values)), number(max(values))) if values else ("-", "-")
        rows.append((tag, number(points[-1].value), str(points[-1].step), least, greatest))
    return Table("Every metric", ["last", "at step", "least", "greatest"], rows)


def benchmark_table(benchmark: Benchmark) -> Table:
    """The rows that `python -m specjax.benchmark decode` prints.

    Raises:
        InputError: a report lacks a field, or holds one of another type.
    """
    from specjax.decoding.benchmark_tables import table

    try:
        rows = list(table(benchmark.reports))
    except (KeyError, TypeError, ValueError) as error:
        problem = f"has no field {error}" if isinstance(error, KeyError) else f"holds an unexpected value ({error})"
        raise InputError(
            f"{benchmark.path}: a report {problem}; measure again with python -m specjax.benchmark decode, or move it"
        ) from error
    devices = benchmark.metadata.get("devices")
    title = f"{benchmark.path.name} ({_devices(devices)})" if devices else benchmark.path.name
    return Table(title, list(benchmark.reports), rows)
