"""Reports of `specjax.decoding.benchmark` as figures; needs matplotlib, of the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax.decoding.benchmark_settings import AUTO, Way
from specjax.decoding.benchmark_tables import way_of

Report = dict[str, Any]


def write_plots(reports: Mapping[str, Report], folder: Path) -> list[Path]:
    """Writes speedup.png, acceptance_by_position.png and round.png; returns their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for name, draw in (("speedup", _speedup), ("acceptance_by_position", _positions), ("round", _round)):
        figure = Figure(figsize=(7, max(4.5, 0.25 * len(reports))), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(), reports)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def speedup_lines(reports: Mapping[str, Report]) -> dict[str, list[Report]]:
    """By data set, temperature and way of drafting, as a label, their reports by growing batch size."""
    lines: dict[str, list[Report]] = {}
    for report in sorted(reports.values(), key=lambda report: report["batch_size"]):
        label = f"{report['data_set']}, T {report['temperature']:g}, {way_of(report).label}"
        lines.setdefault(label, []).append(report)
    return lines


def widest(reports: Mapping[str, Report]) -> dict[str, Report]:
    """The longest plain chain of every data set and temperature, and each other way beside it.

    A shorter chain's acceptance by position is the beginning of a longer one's (not so of a tree, or by `block`), and
    which batch a prompt is in changes nothing.
    """
    found: dict[str, Report] = {}
    for report in reports.values():
        label = f"{report['data_set']}, T {report['temperature']:g}"
        if report["draft_tokens"] == AUTO or way_of(report) != Way(report["draft_tokens"]):
            label += f", {way_of(report).label}"
        positions = len(report["acceptance_by_position"])
        if label not in found or positions > len(found[label]["acceptance_by_position"]):
            found[label] = report
    return found


def round_parts(report: Report) -> dict[str, float]:
    """Milliseconds of a round of the decoder's loop; the rest is committing tokens and starting the program."""
    draft, verify = 1e3 * report["draft_s"], 1e3 * report["verify_s"]
    return {"draft": draft, "verify": verify, "rest": 1e3 * report["round_s"] - draft - verify}


def _speedup(axes: Any, reports: Mapping[str, Report]) -> None:
    measured = {name: report for name, report in reports.items() if report["speedup_decode"] is not None}
    for label, found in speedup_lines(measured).items():
        sizes, speedups = [r["batch_size"] for r in found], [r["speedup_decode"] for r in found]
        below = [r["speedup_decode"] - r["speedup_decode_range"][0] for r in found]
        above = [r["speedup_decode_range"][1] - r["speedup_decode"] for r in found]
        axes.errorbar(sizes, speedups, yerr=[below, above], marker="o", capsize=3, label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="batch size", ylabel="speedup, decode only", title="Speculative against autoregressive decoding")
    axes.set_xticks(sorted({report["batch_size"] for report in reports.values()}))
    axes.set_ylim(bottom=0)
    if measured:
        axes.legend(fontsize="small")


def _positions(axes: Any, reports: Mapping[str, Report]) -> None:
    for label, report in widest(reports).items():
        shares = report["acceptance_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
    axes.set(xlabel="draft position", ylabel="share of rounds that accept it", title="Acceptance by position")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")


def _round(axes: Any, reports: Mapping[str, Report]) -> None:
    """Bars of the last data set, which is their total where there are several."""
    last = list(reports.values())[-1]["data_set"]
    found = [r for r in reports.values() if r["data_set"] == last and r["round_s"] is not None]
    labels = [f"T {r['temperature']:g}, batch {r['batch_size']}, {way_of(r).label}" for r in found]
    left = [0.0] * len(found)
    for part in ("draft", "verify", "rest"):
        sizes = [round_parts(report)[part] for report in found]
        axes.barh(labels, sizes, left=left, height=0.6, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.plot([1e3 * r["ar_step_s"] for r in found], labels, "k|", markersize=14, label="autoregressive step")
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=f"A round of {last}")
    axes.figure.legend(loc="outside lower center", ncols=4, fontsize="small")
