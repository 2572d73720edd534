"""What a benchmark reports: figures worked out by hand, and a whole report of tiny models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

import pytest

from specjax.decoding.benchmark import (
    COSTS,
    Measurement,
    Settings,
    _equality,
    _pool,
    _predicted,
    _report,
    _speeds,
    _timed_pass,
    acceptance,
    benchmark_decoding,
    table,
)
from specjax.decoding.generate import Generation, generate
from tests.decoding.tiny import FULL, random_draft, random_prompts, random_target


def generation(tokens: Sequence[Sequence[int]], rounds: Sequence[Sequence[int]] = ()) -> Generation:
    return Generation([list(t) for t in tokens], [list(r) for r in rounds], 0.5, 2.0)


def test_acceptance_pools_the_rounds_of_all_prompts() -> None:
    report = acceptance([generation([], [[1, 4], [3]]), generation([], [[2]])], 3)
    assert report == {
        "rounds": 4,
        "acceptance_length": 10 / 4,
        "acceptance_rate": (0 + 3 + 2 + 1) / (4 * 3),
        "acceptance_by_position": [3 / 4, 2 / 4, 1 / 4],
    }


@pytest.mark.parametrize(
    ("drafted", "difference"),
    [
        ([[[1, 2], [3]], [[4, 5, 6]]], None),
        ([[[1, 2], [9]], [[4, 9, 6]]], (2, {"prompt": 1, "position": 0})),
        ([[[1, 2], [3]], [[4, 5, 7]]], (1, {"prompt": 2, "position": 2})),
        ([[[1, 2], [3]], [[4, 5]]], (1, {"prompt": 2, "position": 2})),
    ],
)
def test_equality_counts_prompts_over_batches(drafted: list[list[list[int]]], difference: tuple | None) -> None:
    plain = [generation([[1, 2], [3]]), generation([[4, 5, 6]])]
    report = _equality(plain, [generation(tokens) for tokens in drafted])
    expected = {"identical": difference is None, "different_prompts": difference[0] if difference else 0}
    assert report == expected | ({"first_difference": difference[1]} if difference else {})


def test_the_predicted_speedup_counts_the_slowest_row_of_each_batch() -> None:
    plain = [generation([[0] * 5, [0] * 9]), generation([[0] * 3])]  # 8 + 2 steps
    drafted = [generation([], [[1, 1, 2], [4, 1, 1, 2]]), generation([], [[2]])]  # 4 + 1 rounds
    costs = {"ar_step_s": 3.0, "draft_s": 1.0, "verify_s": 3.0}
    assert _predicted(Measurement(plain, drafted, []), costs) == 10 * 3 / (5 * (1 + 3))


PASSES = [
    {"ar_decode": 8.0, "ar_total": 10.0, "speculative_decode": 2.0, "speculative_total": 5.0},
    {"ar_decode": 10.0, "ar_total": 12.0, "speculative_decode": 5.0, "speculative_total": 4.0},
    {"ar_decode": 9.0, "ar_total": 11.0, "speculative_decode": 3.0, "speculative_total": 11.0},
]


def test_speeds_are_medians_and_ratios_are_taken_within_a_run() -> None:
    assert _speeds(PASSES, tokens=94, prompts=4) == {
        "ar_tokens_per_s": 90 / 9,
        "speculative_tokens_per_s": 90 / 3,
        "ar_end_to_end_tokens_per_s": 94 / 11,
        "speedup_decode": 3.0,
        "speedup_decode_range": [2.0, 4.0],
        "speedup_end_to_end": 2.0,
        "speedup_end_to_end_range": [1.0, 3.0],
    }


def test_pooling_adds_the_times_of_each_run() -> None:
    a = Measurement([generation([[1]])], [generation([[2]])], PASSES[:2])
    b = Measurement([generation([[3]])], [generation([[4]])], PASSES[1:])
    pooled = _pool([a, b])
    assert [g.tokens for g in pooled.plain + pooled.drafted] == [[[1]], [[3]], [[2]], [[4]]]
    assert [p["ar_decode"] for p in pooled.passes] == [18.0, 19.0]
    assert [p["speculative_total"] for p in pooled.passes] == [9.0, 15.0]


@pytest.mark.parametrize("speculative_first", [False, True])
def test_a_timed_pass_decodes_each_batch_both_ways_in_turn(speculative_first: bool) -> None:
    calls = []

    def decode(batch: str, with_draft: bool) -> Generation:
        calls.append((batch, with_draft))
        return Generation([], [], 0.0, 1.0 if with_draft else 3.0)

    seconds = _timed_pass(["a", "b"], decode, speculative_first)
    assert calls == [(batch, way ^ speculative_first) for batch in "ab" for way in (False, True)]
    assert (seconds["ar_decode"], seconds["speculative_decode"]) == (6.0, 2.0)
    assert seconds["ar_total"] >= 0 <= seconds["speculative_total"]


def test_a_report_without_rounds_is_shown_and_is_json() -> None:
    """Every answer was one token, which the prefill yields."""
    measured = Measurement([generation([[7], [7]])], [generation([[7], [7]], [[], []])], PASSES)
    report = _report(random_draft(0, FULL), measured, Settings(max_new_tokens=1), dict.fromkeys(COSTS, 1.0))
    assert (report["rounds"], report["acceptance_length"], report["predicted_speedup_decode"]) == (0, None, None)
    json.dumps(report, allow_nan=False)
    assert dict(table({"x": report}))["acceptance length (tokens a round)"] == "-"


def test_two_data_sets_and_their_total() -> None:
    target, draft = random_target(0), random_draft(0, FULL)
    prompts = random_prompts(3, 5)
    data_sets = {"first": prompts[:3], "second": prompts[3:]}
    seen: list[str] = []
    settings = Settings(max_new_tokens=12, stop_token_ids=(5,), batch_size=2, draft_tokens=2, runs=2)
    reports = benchmark_decoding(target, draft, data_sets, settings, seen.append)

    assert list(reports) == ["first", "second", "all"]
    assert seen == ["first", "second"]
    expected = generate(target, prompts, None, 12, (5,)).tokens
    assert reports["all"]["outputs"] == reports["first"]["outputs"] + reports["second"]["outputs"] == expected
    for name, report in reports.items():
        sizes = len(expected) if name == "all" else len(data_sets[name])
        assert (report["prompts"], report["tokens"]) == (sizes, sum(map(len, report["outputs"])))
        assert (report["identical"], report["different_prompts"]) == (True, 0)
        assert (report["batch_size"], report["block_size"], report["draft_tokens"]) == (2, 4, 2)
        assert len(report["acceptance_by_position"]) == 2
        assert all(report[name] > 0 for name in COSTS)
        low, high = report["speedup_decode_range"]
        assert low <= report["speedup_decode"] <= high
    assert reports["all"]["rounds"] == reports["first"]["rounds"] + reports["second"]["rounds"]
    drafted = [generate(target, batch, draft, 12, (5,), 2) for batch in (prompts[:2], prompts[2:3])]
    rounds = [r for g in drafted for row in g.rounds for r in row]
    assert reports["first"]["acceptance_length"] == pytest.approx(statistics.mean(rounds))
    json.dumps(reports, allow_nan=False)
    for _, *cells in table(reports):
        assert len(cells) == 3
