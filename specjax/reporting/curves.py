"""Which charts a run gets: its curves over the steps, and its shares by position of a block."""

from __future__ import annotations

import re
from dataclasses import dataclass

from specjax.reporting.charts import Chart, Series
from specjax.reporting.run_folder import Report, Run

ACCURACY = re.compile(r"acc@(\d+)")
SHARES = (0.0, 1.0)


@dataclass(frozen=True)
class Curve:
    """A chart of `train/metric` and `eval/metric`, those of the two that the run has."""

    title: str
    metric: str
    note: str = ""
    may_be_log: bool = False
    from_zero: bool = False


CURVES = (
    Curve("Loss", "loss", "the objective, mean over its weights", may_be_log=True),
    Curve(
        "Acceptance length, teacher-forced",
        "acceptance_length_tf",
        "tokens a round; train: against the data's tokens, eval: against the target's own choices",
        from_zero=True,
    ),
    Curve("Acceptance length", "acceptance_length", "tokens a round, held-out prompts decoded", from_zero=True),
    Curve("Accuracy", "accuracy", "share of tokens predicted"),
    Curve("Perplexity", "perplexity", may_be_log=True),
    Curve("Learning rate", "learning_rate", from_zero=True),
    Curve("Gradient norm", "grad_norm", "before clipping", may_be_log=True),
    Curve("Tokens a second", "tokens_per_s", "of context, padding included", from_zero=True),
    Curve("MFU", "mfu", "model FLOPs over the device's peak", from_zero=True),
)
ACCURACY_TITLES = (
    ("train", "Accuracy by position, training"),
    ("eval", "Accuracy by position, evaluation"),
)


def training_charts(run: Run) -> list[Chart]:
    """The curves of training and evaluation that the run's events hold."""
    steps = (0.0, float(max((points[-1].step for points in run.curves.values()), default=1)))
    charts = []
    for curve in CURVES:
        tags = [(prefix, f"{prefix}/{curve.metric}") for prefix in ("train", "eval")]
        series = tuple(_series(run, prefix, tag) for prefix, tag in tags if tag in run.curves)
        if series:
            charts.append(
                Chart(
                    curve.title,
                    series,
                    note=curve.note,
                    may_be_log=curve.may_be_log,
                    from_zero=curve.from_zero,
                    x_range=steps,
                )
            )
    by_position = []
    for prefix, title in ACCURACY_TITLES:
        series = tuple(_series(run, f"acc@{k}", f"{prefix}/acc@{k}") for k in _positions(run, prefix))
        if series:
            note = "acc@k: share of slots k whose most probable token is the data's"
            by_position.append(Chart(title, series, note=note, ordered=True, x_range=steps, y_range=SHARES))
    first = [chart for chart in charts if chart.title.startswith(("Loss", "Acceptance"))]
    return [*first, *by_position, *charts[len(first) :]]


def _positions(run: Run, prefix: str) -> list[int]:
    matches = (ACCURACY.fullmatch(tag.removeprefix(f"{prefix}/")) for tag in run.curves)
    return sorted(int(match[1]) for match in matches if match)


def _series(run: Run, label: str, tag: str) -> Series:
    return Series(label, tuple((point.step, point.value) for point in run.curves[tag]))


def position_charts(run: Run) -> list[Chart]:
    """Shares by position of a block: of the newest evaluation, then of every benchmark."""
    charts = []
    if run.evaluation_step is not None:
        newest = {k: run.curves[f"eval/acc@{k}"][-1].value for k in _positions(run, "eval")}
        if newest:
            charts.append(
                Chart(
                    "Accuracy by position, newest evaluation",
                    (Series(f"step {run.evaluation_step}", tuple(newest.items())),),
                    x_label="draft position",
                    note="share of slots whose most probable token is the data's, whatever stands before them",
                    y_range=SHARES,
                )
            )
    charts += [_acceptance(benchmark.path.name, benchmark.reports) for benchmark in run.benchmarks]
    return [chart for chart in charts if chart.series]


def _acceptance(file: str, reports: dict[str, Report]) -> Chart:
    shares = {name: report.get("acceptance_by_position", ()) for name, report in reports.items()}
    return Chart(
        f"Acceptance by position, {file}",
        tuple(Series(name, tuple(enumerate(values, 1))) for name, values in shares.items() if values),
        x_label="draft position",
        note="share of decoding rounds that accept at least this many drafts",
        y_range=SHARES,
    )
