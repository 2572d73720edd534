"""The report of `specjax.training.benchmark` as tables to print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = tuple[str, ...]
Table = tuple[str, list[str], list[Row]]
"""(title, columns after the first, rows)."""

SIDES = {"specjax": "specjax", "ranges": "PyTorch, two ranges", "dense": "PyTorch, dense mask"}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The step, its parts where they were timed, and the comparison with PyTorch where there is one."""
    printed: list[Table] = [("training step", ["value"], _step_rows(report))]
    printed += [_parts(report)] if "parts_s" in report else []
    return printed if "torch" not in report else [*printed, _torch(report["torch"])]


def _step_rows(report: Mapping[str, Any]) -> list[Row]:
    states = "target runs" if report["target_runs"] else "captured states"
    shape = (
        f"{report['batch_size']} rows of {report['max_length']} tokens, {report['num_anchors']} anchors, block "
        f"{report['block_size']}, {report['draft']}, {report['dtype']}, {states}"
    )
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    rows: list[Row] = [
        ("shape", shape),
        ("mesh", mesh),
        ("trained parameters", f"{report['trained_parameters']:,}"),
        ("trace / compile", f"{report['trace_s']:.2f} / {report['compile_s']:.2f} s"),
        ("step", _milliseconds(report["step_s"])),
        ("context tokens/s", f"{report['tokens_per_s']:.0f}"),
        ("anchors/s", f"{report['anchors_per_s']:.0f}"),
        ("achieved", f"{report['tflops_per_s']:.3f} TFLOP/s"),
    ]
    if report["mfu"] is not None:
        rows.append(("MFU", f"{report['mfu']:.3f} of {report['peak_flops'] / 1e12:.0f} TFLOP/s"))
    if "context_scores" in report:
        scores = report["context_scores"]
        computed = f"{scores['scored']:.0%} of slots x keys computed, {scores['visible']:.0%} visible"
        rows.append(("context scores", computed))
    rows.append(("FLOPs a step", f"{report['flops_per_step']:.3e} = {report['flops_formula']}"))
    if "memory_peak_bytes" in report:
        arguments, temporaries, peak = (
            report[f"memory_{name}_bytes"] / 2**20 for name in ("arguments", "temporaries", "peak")
        )
        memory = f"{peak:.0f} MiB a device ({arguments:.0f} arguments + {temporaries:.0f} temporaries)"
        rows.append(("memory, compiler's", memory))
    device = report["device_memory"]
    if device is not None:
        peak = device.get("peak_bytes_in_use", device["bytes_in_use"]) / 2**20
        rows.append(("memory, device's peak", f"{peak:.0f} MiB"))
    return rows


def _parts(report: Mapping[str, Any]) -> Table:
    total = report["parts_sum_s"]
    rows: list[Row] = [
        (name.replace("_", " "), f"{1e3 * seconds:.1f} ms", f"{seconds / total:.0%}")
        for name, seconds in report["parts_s"].items()
    ]
    rows.append(("sum of the parts", f"{1e3 * total:.1f} ms", "100%"))
    rows.append(("the whole step", f"{1e3 * report['step_s']['median']:.1f} ms", ""))
    return "parts of the step, each compiled and timed alone (forward and backward)", ["time", "share of the sum"], rows


def _torch(compared: Mapping[str, Any]) -> Table:
    rows: list[Row] = []
    for name, title in SIDES.items():
        side = compared[name]
        threads = "all" if "threads" not in side else f"{side['threads']}"
        ratio = "1" if "ratio" not in side else f"{side['ratio']:.2f}"
        cpu = f"{1e3 * side['cpu_s']['median']:.1f} ms"
        rows.append((title, _milliseconds(side["step_s"]), ratio, cpu, threads, f"{side['loss']:.4f}"))
    return "against PyTorch, interleaved", ["step", "ratio to specjax", "CPU time", "threads", "first loss"], rows


def _milliseconds(spread: Mapping[str, float]) -> str:
    median, least, most = (1e3 * spread[name] for name in ("median", "min", "max"))
    return f"{median:.1f} ms ({least:.1f} to {most:.1f})"
