"""What the runs of a comparison come to: a variant's figures over its seeds, as JSON and as a Markdown table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from specjax.recipes import BENCHMARK_FILE, Run, Spec

Spread = dict[str, float]
TOTAL = "all"


def comparison(spec: Spec, runs: Sequence[Run], failed: dict[str, str]) -> dict[str, Any]:
    """Figures of every variant over the seeds that are measured, the highest acceptance first.

    Spreads are over seeds: `mean`, `min` and `max`; None where nothing was measured. step_s: the median of a run.
    repeated_4grams: of the answers, which are the target's, so the same for all variants.
    """
    measured = [_figures(run) for run in runs if (run.folder / BENCHMARK_FILE).exists()]
    columns = _columns(measured)
    variants: list[dict[str, Any]] = []
    for variant in spec.variants:
        own = [figures for figures in measured if figures["variant"] == variant.name]
        variants.append(
            {
                "name": variant.name,
                "base": variant.base or spec.base,
                "steps": next(run.config.training.steps for run in runs if run.name == variant.name),
                "overrides": list(variant.overrides),
                "seeds": [figures["seed"] for figures in own],
                "acceptance_length": {c: spread([f["acceptance_length"][c] for f in own]) for c in columns},
                "speedup_decode": {c: spread([f["speedup_decode"][c] for f in own]) for c in columns},
                "step_s": spread([f["step_s"] for f in own]),
            }
        )
    variants.sort(key=lambda v: -_mean(v["acceptance_length"].get(columns[0]) if columns else None))
    return {
        "base": spec.base,
        "max_new_tokens": spec.max_new_tokens,
        "columns": columns,
        "prompts": measured[0]["prompts"] if measured else {},
        "repeated_4grams": measured[0]["repeated_4grams"] if measured else {},
        "variants": variants,
        "runs": measured,
        "not_identical": [f"{f['variant']}, seed {f['seed']}" for f in measured if not f["identical"]],
        "failed": failed,
    }


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean, least and greatest; None where a value is missing or there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known)}


def markdown(report: dict[str, Any]) -> str:
    """The comparison as a table, the spread of several seeds in brackets, and what holds for all its rows."""
    columns = report["columns"]
    head = ["variant", "seeds", *(f"acceptance length, {c}" for c in columns)]
    head += [*(f"speedup, decode only, {c}" for c in columns[:1]), "step, s"]
    steps = [variant["steps"] for variant in report["variants"]]
    if len(set(steps)) > 1:
        head += ["steps", "all steps, min"]
    lines = [_row(head), _row(["---"] * len(head))]
    for variant in report["variants"]:
        several = len(variant["seeds"]) > 1
        cells = [variant["name"], str(len(variant["seeds"]))]
        cells += [_shown(variant["acceptance_length"][c], ".2f", several) for c in columns]
        cells += [_shown(variant["speedup_decode"][c], ".2f", several) for c in columns[:1]]
        cells += [_shown(variant["step_s"], ".3f", several)]
        if len(set(steps)) > 1:
            minutes = variant["step_s"] and variant["step_s"]["mean"] * variant["steps"] / 60
            cells += [str(variant["steps"]), "-" if minutes is None else f"{minutes:.1f}"]
        lines.append(_row(cells))
    of_steps = f"{steps[0]} steps each; " if len(set(steps)) == 1 else ""
    lines += ["", f"{of_steps}at most {report['max_new_tokens']} new tokens."]
    if columns:
        shares = [f"{c} {report['prompts'][c]} / {report['repeated_4grams'][c]:.3f}" for c in columns]
        lines += [f"Prompts / repeated 4-grams of the answers, the same for every variant: {', '.join(shares)}."]
    if any(len(variant["seeds"]) > 1 for variant in report["variants"]):
        lines += ["Several seeds: mean (least to greatest)."]
    if report["not_identical"]:
        lines += [f"OUTPUTS DIFFER from autoregressive decoding: {'; '.join(report['not_identical'])}."]
    if report["failed"]:
        lines += [f"FAILED: {'; '.join(report['failed'])}."]
    return "\n".join(lines) + "\n"


def _figures(run: Run) -> dict[str, Any]:
    from specjax.reporting.scalars import read_scalars

    reports = json.loads((run.folder / BENCHMARK_FILE).read_text(encoding="utf-8"))["decode"]
    times = [point.value for point in read_scalars(run.folder / "tensorboard")["train/step_time_s"]]
    return {
        "variant": run.name,
        "seed": run.seed,
        "acceptance_length": _each(reports, "acceptance_length"),
        "speedup_decode": _each(reports, "speedup_decode"),
        "prompts": _each(reports, "prompts"),
        "repeated_4grams": _each(reports, "repeated_4gram_fraction"),
        "identical": all(report["identical"] for report in reports.values()),
        "step_s": statistics.median(times),
    }


def _each(reports: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: report[field] for name, report in reports.items()}


def _columns(measured: Sequence[dict[str, Any]]) -> list[str]:
    """The data sets, their total first."""
    names = list(measured[0]["prompts"]) if measured else []
    return sorted(names, key=lambda name: name != TOTAL)


def _mean(value: Spread | None) -> float:
    return float("-inf") if value is None else value["mean"]


def _shown(value: Spread | None, form: str, several: bool) -> str:
    if value is None:
        return "-"
    text = format(value["mean"], form)
    return f"{text} ({value['min']:{form}} to {value['max']:{form}})" if several else text


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
