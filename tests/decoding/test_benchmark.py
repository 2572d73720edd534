"""What a benchmark reports: figures worked out by hand, and whole reports of tiny models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from specjax.decoding import auto_width, benchmark
from specjax.decoding.auto_width import AutoWidth
from specjax.decoding.benchmark import (
    COSTS_EVERY,
    Case,
    Counts,
    Measurement,
    _cost_model,
    _pool,
    _report,
    _speeds,
    _step_costs,
    _timed_pass,
    acceptance,
    benchmark_decoding,
)
from specjax.decoding.benchmark_settings import AR, AUTO, Settings, Way, check_settings
from specjax.decoding.benchmark_tables import table
from specjax.decoding.generate import Generation, generate
from specjax.errors import InputError
from tests.decoding.tiny import FULL, random_draft, random_prompts, random_target


def generation(
    tokens: Sequence[Sequence[int]], rounds: Sequence[Sequence[int]] = (), drafts: Sequence[Sequence[int]] | None = None
) -> Generation:
    """Three drafts a round, unless told otherwise."""
    widths = [[3] * len(row) for row in rounds] if drafts is None else [list(d) for d in drafts]
    return Generation([list(t) for t in tokens], [list(r) for r in rounds], 0.5, 2.0, widths)


def seconds(decode: float, total: float, verify: float = 1.0, draft: float = 0.0) -> dict[str, float]:
    return {"decode": decode, "total": total, "verify": verify, "draft": draft}


def test_acceptance_pools_the_rounds_of_all_prompts() -> None:
    report = acceptance([generation([], [[1, 4], [3]]), generation([], [[2]])])
    assert report == {
        "rounds": 4,
        "rounds_without_drafts": 0,
        "acceptance_length": 10 / 4,
        "acceptance_rate": (0 + 3 + 2 + 1) / (4 * 3),
        "acceptance_by_position": [3 / 4, 2 / 4, 1 / 4],
    }


def test_acceptance_is_that_of_the_rounds_that_had_drafts() -> None:
    rounds, drafts = [[1, 1, 4, 2], [], [3, 1]], [[0, 7, 7, 3], [], [3, 0]]
    pairs = [pair for row in zip(rounds, drafts, strict=True) for pair in zip(*row, strict=True)]
    drafted = [(advance, width) for advance, width in pairs if width]
    assert acceptance([generation([], rounds[:1], drafts[:1]), generation([], rounds[1:], drafts[1:])]) == {
        "rounds": 6,
        "rounds_without_drafts": pytest.approx(2 / 6),
        "acceptance_length": statistics.mean(advance for advance, _ in drafted),
        "acceptance_rate": sum(advance - 1 for advance, _ in drafted) / sum(width for _, width in drafted),
        "acceptance_by_position": [sum(advance > k for advance, _ in drafted) / len(drafted) for k in range(1, 8)],
    }


def test_acceptance_where_no_round_had_drafts() -> None:
    nothing = {"acceptance_length": None, "acceptance_rate": None, "acceptance_by_position": []}
    assert acceptance([generation([], [[1, 1]], [[0, 0]])]) == {"rounds": 2, "rounds_without_drafts": 1} | nothing
    assert acceptance([generation([], [[], []])]) == {"rounds": 0, "rounds_without_drafts": None} | nothing


PLAIN = [seconds(8.0, 10.0), seconds(10.0, 12.0), seconds(9.0, 11.0)]
DRAFTED = [seconds(2.0, 5.0), seconds(5.0, 4.0), seconds(3.0, 11.0)]


def test_speeds_are_medians_and_ratios_are_taken_within_a_run() -> None:
    assert _speeds(PLAIN, DRAFTED, Counts(prompts=4, ar_tokens=94, tokens=94)) == {
        "ar_tokens_per_s": 90 / 9,
        "ar_end_to_end_tokens_per_s": 94 / 11,
        "speculative_tokens_per_s": 90 / 3,
        "speculative_end_to_end_tokens_per_s": 94 / 5,
        "speedup_decode": 3.0,
        "speedup_decode_range": [2.0, 4.0],
        "speedup_end_to_end": 2.0,
        "speedup_end_to_end_range": [1.0, 3.0],
    }


def test_speeds_of_other_draws_compare_tokens_a_second() -> None:
    """180 and 184 tokens in place of 90 and 94, in the same times."""
    found = _speeds(PLAIN, DRAFTED, Counts(prompts=4, ar_tokens=94, tokens=184))
    assert (found["ar_tokens_per_s"], found["speculative_tokens_per_s"]) == (90 / 9, 180 / 3)
    assert (found["speedup_decode"], found["speedup_decode_range"]) == (6.0, [4.0, 8.0])
    assert found["speedup_end_to_end"] == pytest.approx(2 * 184 / 94)
    bounds = [
        _cost_model(BOUND_AR, BOUND_DRAFTED, steps=20, rounds=5, counts=Counts(4, 94, tokens)) for tokens in (94, 184)
    ]
    assert bounds[1] == bounds[0] | {"speedup_bound": 2 * bounds[0]["speedup_bound"]}


def test_where_the_prefill_yields_every_token_decoding_has_no_speed() -> None:
    found = _speeds(PLAIN, DRAFTED, Counts(prompts=4, ar_tokens=4, tokens=4))
    of_decoding = ("ar_tokens_per_s", "speculative_tokens_per_s", "speedup_decode", "speedup_decode_range")
    assert [found[name] for name in of_decoding] == [None] * 4
    assert (found["ar_end_to_end_tokens_per_s"], found["speedup_end_to_end"]) == (4 / 11, 2.0)


BOUND_AR = [seconds(12.0, 0, verify=10.0), seconds(24.0, 0, verify=20.0), seconds(6.0, 0, verify=5.0)]
BOUND_DRAFTED = [seconds(5.0, 0, 3.0, 1.0), seconds(9.0, 0, 6.0, 2.0), seconds(4.0, 0, 1.5, 1.0)]


def test_the_bound_and_the_share_of_it_are_taken_within_a_run() -> None:
    found = _cost_model(BOUND_AR, BOUND_DRAFTED, steps=20, rounds=5, counts=Counts(4, 94, 94))
    assert found == {
        "ar_step_s": 10 / 20,
        "draft_s": 1 / 5,
        "verify_s": 3 / 5,
        "round_s": 5 / 5,
        "speedup_bound": 10 / 4,  # of 10 / 4, 20 / 8 and 5 / 2.5
        "share_of_bound": pytest.approx(12 / 5 / (10 / 4)),  # of 0.96, 24 / 9 / 2.5 and 6 / 4 / 2
    }


def test_pooling_adds_the_times_of_each_run_and_counts_prompts_through() -> None:
    way = Way(3)

    def measurement(token: int, runs: slice) -> Measurement:
        generations = {AR: [generation([[token], [token]])], way: [generation([[token + 1], [token]])]}
        passes = [{AR: a, way: b} for a, b in zip(PLAIN[runs], DRAFTED[runs], strict=True)]
        return Measurement(generations, passes, {way: [{"prompt": 0, "position": 0}]})

    pooled = _pool([measurement(1, slice(0, 2)), measurement(5, slice(1, 3))])
    assert [g.tokens for g in pooled.generations[AR] + pooled.generations[way]] == [
        [[1], [1]],
        [[5], [5]],
        [[2], [1]],
        [[6], [5]],
    ]
    assert [p[AR]["decode"] for p in pooled.passes] == [18.0, 19.0]
    assert [p[way]["total"] for p in pooled.passes] == [9.0, 15.0]
    assert pooled.differing == {way: [{"prompt": 0, "position": 0}, {"prompt": 2, "position": 0}]}


def test_a_timed_pass_decodes_each_batch_in_all_ways_and_measures_steps_beside_them() -> None:
    calls: list[tuple[int, Way]] = []
    measured: list[int] = []

    two, three, auto = Way(2), Way(3), Way(AUTO)

    def decode(first: int, way: Way) -> Generation:
        calls.append((first, way))
        if way == AR:
            return Generation([[0] * 5, [0] * 9], [], 0.0, 3.0)  # 8 steps
        return Generation([], [[1, 1, 2], [4, 1, 1, 2]], 0.0, 3.0 if way == three else 2.0)  # 4 rounds

    def costs(first: int) -> dict[Way, dict[str, float]]:
        measured.append(first)
        return {AR: {"verify": 1.0, "draft": 0.0}, three: {"verify": 1.0, "draft": 0.3}, two: {"verify": 0, "draft": 0}}

    shapes = [(2, 64)] * 2 + [(2, 128)] * 8
    batches = list(zip(range(0, 20, 2), shapes, strict=True))
    found = _timed_pass(batches, (AR, two, three, auto), decode, costs, run=1)
    assert calls == [(first, way) for first in range(0, 20, 2) for way in (two, three, auto, AR)]
    assert COSTS_EVERY == 4
    assert measured == [0, 4, 8, 16]  # the first batch of either shape, and the fifth and ninth batch
    assert found[AR] | {"total": 0} == seconds(30.0, 0, verify=80.0, draft=0.0)
    assert found[auto] | {"total": 0} == seconds(20.0, 0, verify=0.0, draft=0.0)  # rounds of no one cost
    assert found[three]["decode"] == 30.0
    assert (found[three]["verify"], found[three]["draft"]) == (pytest.approx(40.0), pytest.approx(0.3 * 40))


def test_a_report_without_rounds_is_shown_and_is_json() -> None:
    """Every answer was one token, which the prefill yields."""
    way = Way(3)
    generations = {AR: [generation([[7], [7]])], way: [generation([[7], [7]], [[], []])]}
    passes = [{AR: a, way: b} for a, b in zip(PLAIN, DRAFTED, strict=True)]
    case = Case(Settings(max_new_tokens=1), 0.0, 2, (way,))
    report = _report(random_draft(0, FULL), Measurement(generations, passes, {way: []}), case, way, "x")
    assert (report["rounds"], report["acceptance_length"], report["speedup_bound"]) == (0, None, None)
    assert report["speedup_decode"] is None
    json.dumps(report, allow_nan=False)
    shown = dict(table({"x": report}))
    assert shown["acceptance length (tokens a round)"] == shown["speedup, decode only"] == "-"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (1, 0)}, "batch size is 0; give at least 1"),
        ({"batch_sizes": (2, 1, 2)}, "batch_sizes: 2 is there twice"),
        ({"draft_tokens": (3, 4)}, "draft_tokens is 4; this draft proposes 1 to 3"),
        ({"draft_tokens": (0,)}, "draft_tokens is 0; this draft proposes 1 to 3"),
        ({"draft_tokens": (AUTO, 3, AUTO)}, "draft_tokens: auto is there twice"),
        ({"tree_nodes": (9, 9)}, "tree_nodes: 9 is there twice"),
        ({"tree_nodes": (9, 2)}, "tree_nodes is 2; give 3 "),
        ({"draft_tokens": (AUTO, 1, 2), "tree_nodes": (1,)}, "tree_nodes is 1; give 2 "),
        ({"tree_nodes": (FULL.vocab_size + 1,)}, "tree_nodes is 97; give 3 .* to 96"),
        ({"temperatures": (0.0, -1.0)}, "temperature is -1.0"),
        ({"top_p": 0.9}, "top_p is 0.9, but temperature 0 is greedy"),
        ({"temperatures": (0.0, 1.0), "top_k": 0}, "top_k is 0; give at least 1"),
        (
            {"rules": ("match", "block")},
            "rule is block, but temperature 0 is greedy; give a temperature, or leave rule",
        ),
        ({"draft_choices": ("sample",)}, "draft_choice is sample, but temperature 0 is greedy"),
        ({"temperatures": (0.0, 1.0), "rules": ("match", "typical")}, "rule is 'typical'; give one of match"),
        ({"temperatures": (1.0,), "rules": ("block", "match", "block")}, "rules: block is there twice"),
        ({"temperatures": (1.0,), "draft_choices": ("sample",) * 2}, "draft_choices: sample is there twice"),
        (
            {"temperatures": (0.0, 1.0), "rules": ("match", "block"), "draft_tokens": (3, AUTO)},
            "rule is block, but draft_tokens is auto",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"runs": 0}, "runs is 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(Settings(**changes), FULL, FULL.vocab_size)


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
        benchmark, "_step_costs", lambda *args: {way: {"verify": 2.0, "draft": 1.0} for way in (AR, Way(2), Way(3))}
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


def test_trees_and_chosen_widths_are_ways_beside_the_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = random_target(0), random_draft(0, FULL)
    prompts = random_prompts(3, 4)
    settings = Settings(12, (5,), (2,), (1, AUTO, 2), runs=2, tree_nodes=(6, AUTO))
    monkeypatch.setattr(auto_width, "TREE_SIZES", (2,))
    monkeypatch.setattr(auto_width, "TREE_DEPTHS", 1)
    autos: list[AutoWidth] = []

    def watching(*args: Any, **kwargs: Any) -> Generation:
        if isinstance(kwargs.get("draft_tokens"), AutoWidth):
            autos.append(kwargs["draft_tokens"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(benchmark, "generate", watching)
    reports = benchmark_decoding(target, draft, {"one": prompts[:2], "two": prompts[2:]}, settings)
    labels = ("1 drafts", "auto drafts", "2 drafts", "tree of 6 drafts", "auto drafts or trees")
    assert list(reports) == [f"{name}, {label}" for name in ("one", "two", "all") for label in labels]
    # One object a data set and way, over the untimed pass and two timed ones.
    each = list(dict.fromkeys(autos))
    assert [autos.count(auto) for auto in each] == [3] * 4
    assert [auto.trees for auto in each] == [False, True] * 2
    chosen_from = [{(d.draft_tokens, d.tree_nodes) for d in next(iter(auto.seconds.values()))} for auto in each[:2]]
    assert chosen_from == [{(0, 0), (1, 0), (3, 0)}, {(0, 0), (1, 0), (3, 0), (3, 6)}]
    json.dumps(reports, allow_nan=False)

    plain = generate(target, prompts, None, 12, (5,)).tokens
    of_all = [reports[f"all, {label}"] for label in labels]
    for report in of_all:
        assert (report["identical"], report["outputs"]) == (True, plain)
    ways = [(report["draft_tokens"], report["tree_nodes"]) for report in of_all]
    assert ways == [(1, 0), ("auto", 0), (2, 0), (2, 6), ("auto", "auto")]  # the tree is as deep as the widest chain
    one, auto, two, tree, _ = of_all

    rounds = [r for row in generate(target, prompts, draft, 12, (5,), 2, tree_nodes=6).rounds for r in row]
    assert tree["rounds"] == len(rounds) < two["rounds"]
    assert tree["acceptance_length"] == pytest.approx(statistics.mean(rounds))
    assert tree["acceptance_by_position"] == pytest.approx([statistics.mean(r > k for r in rounds) for k in (1, 2)])
    assert tree["verify_s"] > 0
    assert tree["speedup_bound"] > 0

    costs = ("ar_step_s", "draft_s", "verify_s", "round_s", "speedup_bound", "share_of_bound")
    assert [auto[name] for name in costs] == [None] * len(costs)
    assert 0 <= auto["rounds_without_drafts"] <= 1
    assert (one["rounds_without_drafts"], tree["rounds_without_drafts"]) == (0, 0)
    shown = dict(table({"x": auto}))
    assert shown["rounds without drafts"] == f"{auto['rounds_without_drafts']:.2f}"
    assert shown["draft / verify / whole round, ms"] == "- / - / -"


def test_ways_are_widths_by_rules_by_choices_and_then_trees() -> None:
    settings = Settings(
        temperatures=(0.0, 1.0),
        draft_tokens=(1, 3),
        tree_nodes=(9,),
        rules=("match", "block"),
        draft_choices=("argmax", "sample"),
    )
    check_settings(settings, FULL, FULL.vocab_size)
    hows = [(rule, choice) for rule in ("match", "block") for choice in ("argmax", "sample")]
    assert settings.ways(4, 1.0) == (*(Way(width, 0, *how) for width in (1, 3) for how in hows), Way(3, 9))
    assert settings.ways(4, 0.0) == (Way(1), Way(3), Way(3, 9))
    assert Settings(rules=("rejection",)).ways(4, 0.0) == (Way(3),)
    check_settings(
        Settings(temperatures=(1.0,), draft_tokens=(AUTO,), draft_choices=("sample",)), FULL, FULL.vocab_size
    )


def test_rules_are_measured_by_their_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily there is one rule; drawn, `block` gives other tokens than autoregressive decoding, and is not blamed."""
    target, draft = random_target(0), random_draft(0, FULL)
    prompts = random_prompts(3, 4)
    settings = Settings(
        12, (5,), (2,), (2,), (0.0, 1.0), seed=7, runs=1, rules=("match", "block"), draft_choices=("sample",)
    )
    costs = [Way(2), *(Way(2, 0, rule, "sample") for rule in ("match", "block"))]
    monkeypatch.setattr(
        benchmark, "_step_costs", lambda *args: {way: {"verify": 2.0, "draft": 1.0} for way in (AR, *costs)}
    )
    reports = benchmark_decoding(target, draft, {"x": prompts}, settings)
    greedy, match, block = reports.values()
    labels = "2 drafts", "2 drafts (sample)", "2 drafts (block, sample)"
    assert list(reports) == [f"x, temperature {t}, {label}" for t, label in zip((0, 1, 1), labels, strict=True)]
    json.dumps(reports, allow_nan=False)
    drawn = {"temperature": 1.0, "seed": [7, 8, 9, 10]}
    plain = generate(target, prompts, None, 12, (5,), **drawn).tokens
    drafted = generate(target, prompts, draft, 12, (5,), 2, rule="block", draft_choice="sample", **drawn)
    assert drafted.tokens != plain
    for report in (greedy, match):
        assert (report["identical"], report["different_prompts"], report["differences"]) == (True, 0, [])
    assert (block["identical"], block["different_prompts"], block["differences"]) == (None, None, [])
    assert (match["outputs"], block["outputs"]) == (plain, drafted.tokens)
    counts = [sum(map(len, rows)) for rows in (plain, drafted.tokens)]
    assert [block["ar_tokens"], block["tokens"]] == counts
    assert [(r["rule"], r["draft_choice"]) for r in (greedy, block)] == [("match", "argmax"), ("block", "sample")]
    assert block["acceptance_length"] == pytest.approx(statistics.mean(r for row in drafted.rounds for r in row))
    assert block["speedup_decode"] == pytest.approx(block["speculative_tokens_per_s"] / block["ar_tokens_per_s"])


def test_steps_and_rounds_are_timed_at_the_shape_of_the_batch() -> None:
    target, draft = random_target(0), random_draft(0, FULL)
    two, tree = Way(2), Way(2, 6)
    case = Case(Settings(12, (5,)), 0.0, 2, (two, Way(AUTO), tree))
    costs = _step_costs(target, draft, random_prompts(0, 2), case, 0)
    assert set(costs) == {AR, two, tree}
    assert costs[AR]["verify"] > costs[AR]["draft"] == 0
    for way in (two, tree):
        assert 0 < costs[way]["verify"] < 1
        assert costs[way]["verify"] + costs[way]["draft"] > 0
