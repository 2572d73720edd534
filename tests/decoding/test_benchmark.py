"""What a benchmark reports: figures worked out by hand, and whole reports of tiny models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from specjax.decoding import benchmark
from specjax.decoding.benchmark import (
    AR,
    COSTS_EVERY,
    Case,
    Measurement,
    Settings,
    _cost_model,
    _pool,
    _report,
    _speeds,
    _step_costs,
    _timed_pass,
    acceptance,
    benchmark_decoding,
    check_settings,
)
from specjax.decoding.benchmark_tables import table
from specjax.decoding.generate import Generation, generate
from specjax.errors import InputError
from tests.decoding.tiny import FULL, random_draft, random_prompts, random_target


def generation(tokens: Sequence[Sequence[int]], rounds: Sequence[Sequence[int]] = ()) -> Generation:
    return Generation([list(t) for t in tokens], [list(r) for r in rounds], 0.5, 2.0)


def seconds(decode: float, total: float, verify: float = 1.0, draft: float = 0.0) -> dict[str, float]:
    return {"decode": decode, "total": total, "verify": verify, "draft": draft}


def test_acceptance_pools_the_rounds_of_all_prompts() -> None:
    report = acceptance([generation([], [[1, 4], [3]]), generation([], [[2]])], 3)
    assert report == {
        "rounds": 4,
        "acceptance_length": 10 / 4,
        "acceptance_rate": (0 + 3 + 2 + 1) / (4 * 3),
        "acceptance_by_position": [3 / 4, 2 / 4, 1 / 4],
    }


PLAIN = [seconds(8.0, 10.0), seconds(10.0, 12.0), seconds(9.0, 11.0)]
DRAFTED = [seconds(2.0, 5.0), seconds(5.0, 4.0), seconds(3.0, 11.0)]


def test_speeds_are_medians_and_ratios_are_taken_within_a_run() -> None:
    assert _speeds(PLAIN, DRAFTED, tokens=94, prompts=4) == {
        "ar_tokens_per_s": 90 / 9,
        "ar_end_to_end_tokens_per_s": 94 / 11,
        "speculative_tokens_per_s": 90 / 3,
        "speculative_end_to_end_tokens_per_s": 94 / 5,
        "speedup_decode": 3.0,
        "speedup_decode_range": [2.0, 4.0],
        "speedup_end_to_end": 2.0,
        "speedup_end_to_end_range": [1.0, 3.0],
    }


def test_the_bound_and_the_share_of_it_are_taken_within_a_run() -> None:
    ar = [seconds(12.0, 0, verify=10.0), seconds(24.0, 0, verify=20.0), seconds(6.0, 0, verify=5.0)]
    drafted = [seconds(5.0, 0, 3.0, 1.0), seconds(9.0, 0, 6.0, 2.0), seconds(4.0, 0, 1.5, 1.0)]
    found = _cost_model(ar, drafted, steps=20, rounds=5)
    assert found == {
        "ar_step_s": 10 / 20,
        "draft_s": 1 / 5,
        "verify_s": 3 / 5,
        "round_s": 5 / 5,
        "speedup_bound": 10 / 4,  # of 10 / 4, 20 / 8 and 5 / 2.5
        "share_of_bound": pytest.approx(12 / 5 / (10 / 4)),  # of 0.96, 24 / 9 / 2.5 and 6 / 4 / 2
    }


def test_pooling_adds_the_times_of_each_run_and_counts_prompts_through() -> None:
    def measurement(token: int, runs: slice) -> Measurement:
        generations = {AR: [generation([[token], [token]])], 3: [generation([[token + 1], [token]])]}
        passes = [{AR: a, 3: b} for a, b in zip(PLAIN[runs], DRAFTED[runs], strict=True)]
        return Measurement(generations, passes, {3: [{"prompt": 0, "position": 0}]})

    pooled = _pool([measurement(1, slice(0, 2)), measurement(5, slice(1, 3))])
    assert [g.tokens for g in pooled.generations[AR] + pooled.generations[3]] == [
        [[1], [1]],
        [[5], [5]],
        [[2], [1]],
        [[6], [5]],
    ]
    assert [p[AR]["decode"] for p in pooled.passes] == [18.0, 19.0]
    assert [p[3]["total"] for p in pooled.passes] == [9.0, 15.0]
    assert pooled.differing == {3: [{"prompt": 0, "position": 0}, {"prompt": 2, "position": 0}]}


def test_a_timed_pass_decodes_each_batch_in_all_ways_and_measures_steps_beside_them() -> None:
    calls: list[tuple[int, int]] = []
    measured: list[int] = []

    def decode(first: int, width: int) -> Generation:
        calls.append((first, width))
        if width == AR:
            return Generation([[0] * 5, [0] * 9], [], 0.0, 3.0)  # 8 steps
        return Generation([], [[1, 1, 2], [4, 1, 1, 2]], 0.0, float(width))  # 4 rounds

    def costs(first: int) -> dict[int, dict[str, float]]:
        measured.append(first)
        return {width: {"verify": 1.0, "draft": 0.1 * width} for width in (AR, 2, 3)}

    shapes = [(2, 64)] * 2 + [(2, 128)] * 8
    batches = list(zip(range(0, 20, 2), shapes, strict=True))
    found = _timed_pass(batches, (AR, 2, 3), decode, costs, run=1)
    assert calls == [(first, width) for first in range(0, 20, 2) for width in (2, 3, AR)]
    assert COSTS_EVERY == 4
    assert measured == [0, 4, 8, 16]  # the first batch of either shape, and the fifth and ninth batch
    assert found[AR] | {"total": 0} == seconds(30.0, 0, verify=80.0, draft=0.0)
    assert found[3]["decode"] == 30.0
    assert (found[3]["verify"], found[3]["draft"]) == (pytest.approx(40.0), pytest.approx(0.1 * 3 * 40))


def test_a_report_without_rounds_is_shown_and_is_json() -> None:
    """Every answer was one token, which the prefill yields."""
    generations = {AR: [generation([[7], [7]])], 3: [generation([[7], [7]], [[], []])]}
    passes = [{AR: a, 3: b} for a, b in zip(PLAIN, DRAFTED, strict=True)]
    case = Case(Settings(max_new_tokens=1), 0.0, 2, (3,))
    report = _report(random_draft(0, FULL), Measurement(generations, passes, {3: []}), case, 3, "x")
    assert (report["rounds"], report["acceptance_length"], report["speedup_bound"]) == (0, None, None)
    json.dumps(report, allow_nan=False)
    assert dict(table({"x": report}))["acceptance length (tokens a round)"] == "-"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (1, 0)}, "batch size is 0; give at least 1"),
        ({"batch_sizes": (2, 1, 2)}, "batch_sizes: 2 is there twice"),
        ({"draft_tokens": (3, 4)}, "draft_tokens is 4; this draft proposes 1 to 3"),
        ({"draft_tokens": (0,)}, "draft_tokens is 0; this draft proposes 1 to 3"),
        ({"temperatures": (0.0, -1.0)}, "temperature is -1.0"),
        ({"top_p": 0.9}, "top_p is 0.9, but temperature 0 is greedy"),
        ({"temperatures": (0.0, 1.0), "top_k": 0}, "top_k is 0; give at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"runs": 0}, "runs is 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(Settings(**changes), block_size=4)


def test_a_grid_of_settings_over_two_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = random_target(0), random_draft(0, FULL)
    prompts = random_prompts(3, 6)
    data_sets = {"first": prompts[:4], "second": prompts[4:]}
    settings = Settings(12, (5,), (2,), (2, 3), (0.0, 1.0), top_k=20, seed=7, runs=2)
    decoded: list[tuple[Any, ...]] = []

    def counting(*args: Any, **kwargs: Any) -> Generation:
        decoded.append((kwargs["temperature"], kwargs.get("draft_tokens"), kwargs["seed"]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(benchmark, "generate", counting)
    monkeypatch.setattr(
        benchmark, "_step_costs", lambda *args: {width: {"verify": 2.0, "draft": 1.0} for width in (AR, 2, 3)}
    )
    reports = benchmark_decoding(target, draft, data_sets, settings)

    columns = [
        f"{name}, temperature {t}, {n} drafts" for name in ("first", "second", "all") for t in (0, 1) for n in (2, 3)
    ]
    assert list(reports) == columns
    # An untimed pass and two timed ones of three batches: autoregressive decoding once, not once a width.
    assert [decoded.count((t, n, 9)) for t in (0.0, 1.0) for n in (None, 2, 3)] == [3] * 6
    assert len(decoded) == 2 * 3 * 3 * 3
    json.dumps(reports, allow_nan=False)

    for temperature, drawing in ((0, {}), (1, {"temperature": 1.0, "top_k": 20})):
        answers = {
            name: generate(target, rows, None, 12, (5,), **drawing, seed=7).tokens for name, rows in data_sets.items()
        }
        for width in (2, 3):
            first, second, total = (
                reports[f"{name}, temperature {temperature}, {width} drafts"] for name in ("first", "second", "all")
            )
            assert (first["outputs"], second["outputs"]) == (answers["first"], answers["second"])
            assert total["outputs"] == first["outputs"] + second["outputs"]
            assert total["rounds"] == first["rounds"] + second["rounds"]
            for report in (first, second, total):
                assert (report["identical"], report["differences"]) == (True, [])
                assert (report["temperature"], report["batch_size"], report["draft_tokens"]) == (temperature, 2, width)
                assert len(report["acceptance_by_position"]) == width
                assert (report["ar_step_s"], report["draft_s"], report["verify_s"]) == (2, 1, 2)
            drafted = generate(target, data_sets["second"], draft, 12, (5,), width, **drawing, seed=7)
            assert second["acceptance_length"] == pytest.approx(
                statistics.mean(r for row in drafted.rounds for r in row)
            )


def test_steps_and_rounds_are_timed_at_the_shape_of_the_batch() -> None:
    target, draft = random_target(0), random_draft(0, FULL)
    case = Case(Settings(12, (5,)), 0.0, 2, (2,))
    costs = _step_costs(target, draft, random_prompts(0, 2), case, 0)
    assert set(costs) == {AR, 2}
    assert costs[AR]["verify"] > costs[AR]["draft"] == 0
    assert 0 < costs[2]["verify"] < 1
    assert costs[2]["verify"] + costs[2]["draft"] > 0
