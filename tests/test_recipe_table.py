"""The figures of a comparison, from run folders with made-up measurements, against NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specjax.config import parse_config, validated
from specjax.recipe_table import comparison, markdown, spread
from specjax.recipes import Run, Spec
from tests.reporting.run_folders import TRAINED, report, write_benchmark, write_run

COLUMNS = ("code", "problems", "all")
SEEDS = {"one": [0], "three": [5, 6, 7], "none": [0]}
SPEC = validated(
    Spec,
    {"base": "x", "prompts": ["x"], "variants": [{"name": name, "seeds": seeds} for name, seeds in SEEDS.items()]},
    "test",
)
CONFIG = parse_config(
    {"output_dir": "x", "target": {"path": "x"}, "data": {"train": ["x"]}, "training": {"steps": 20}}, "test"
)


def lengths(seed: int) -> np.ndarray:
    """Acceptance lengths of the COLUMNS."""
    return 1 + np.random.default_rng(seed).uniform(size=len(COLUMNS)) + (seed > 0) * np.array([0, 0, 5])


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Of every variant and seed; those of "none" were never measured."""
    found = []
    for name, seeds in SEEDS.items():
        for seed in seeds:
            folder = tmp_path / name / f"seed-{seed}"
            if name != "none":
                write_run(folder)
                measured = {
                    column: report(
                        acceptance_length=length,
                        speedup_decode=length / 2,
                        prompts=10 * i,
                        repeated_4gram_fraction=i / 8,
                    )
                    for i, (column, length) in enumerate(zip(COLUMNS, lengths(seed).tolist(), strict=True))
                }
                write_benchmark(folder / "benchmark.json", "decode", measured)
            found.append(Run(name, seed, folder, "x", CONFIG, ()))
    return found


def shown(values: np.ndarray, digits: int) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def test_a_row_shows_means_and_ranges_over_seeds_the_best_first(runs: list[Run]) -> None:
    lines = markdown(comparison(SPEC, runs, {})).splitlines()
    assert [part.rpartition(", ")[2] for part in lines[0].strip("| ").split(" | ")[2:5]] == ["all", "code", "problems"]
    for line, name in zip(lines[2:4], ("three", "one"), strict=True):
        code, problems, total = np.array([lengths(seed) for seed in SEEDS[name]]).T
        expected = [shown(values, 2) for values in (total, code, problems, total / 2)]
        times = np.full(len(total), 1.5 * TRAINED["step_time_s"])  # the median of its two points
        assert line.strip("| ").split(" | ") == [name, str(len(total)), *expected, shown(times, 3)]
    assert lines[4] == "| none | 0 | - | - | - | - | - |"
    assert "all 20 / 0.250, code 0 / 0.000, problems 10 / 0.125." in lines[7]
    assert lines[6] == "20 steps each; at most 128 new tokens."


def test_other_steps_are_shown_with_their_time(runs: list[Run]) -> None:
    longer = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"steps": 70})})
    runs = [replace(run, config=longer) if run.name == "one" else run for run in runs]
    lines = markdown(comparison(SPEC, runs, {})).splitlines()
    assert lines[0].endswith("| step, s | steps | all steps, min |")
    seconds = 1.5 * TRAINED["step_time_s"]
    for line, steps in zip(lines[2:4], (20, 70), strict=True):
        assert line.strip("| ").split(" | ")[-3:] == [
            shown(np.full(1 if steps == 70 else 3, seconds), 3),
            str(steps),
            f"{steps * seconds / 60:.1f}",
        ]
    assert lines[4].endswith("| - | 20 | - |")
    assert lines[6] == "at most 128 new tokens."


def test_what_is_wrong_is_said(runs: list[Run]) -> None:
    different = {column: report(identical=column != "code") for column in COLUMNS}
    write_benchmark(runs[0].folder / "benchmark.json", "decode", different)
    table = markdown(comparison(SPEC, runs, {"none, seed 0": "status 2"}))
    assert "OUTPUTS DIFFER from autoregressive decoding: one, seed 0." in table
    assert "FAILED: none, seed 0." in table


def test_nothing_measured_is_an_empty_table(runs: list[Run]) -> None:
    for run in runs:
        (run.folder / "benchmark.json").unlink(missing_ok=True)
    lines = markdown(comparison(SPEC, runs, {})).splitlines()
    assert lines[2:] == ["| one | 0 | - |", "| three | 0 | - |", "| none | 0 | - |", "", lines[6]]


@pytest.mark.parametrize("values", [[3.25], [2.5, 3.75, 2.0]])
def test_a_spread_is_mean_least_and_greatest(values: list[float]) -> None:
    assert spread(values) == {"mean": np.mean(values), "min": np.min(values), "max": np.max(values)}


def test_a_spread_over_what_is_missing_is_none() -> None:
    assert spread([]) is None
    assert spread([2.0, None]) is None
