"""Reports as tables, Markdown and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specjax.decoding.benchmark_plots import round_parts, speedup_lines, widest, write_plots
from specjax.decoding.benchmark_tables import markdown, tables
from tests.reporting.run_folders import report


def grid() -> dict[str, dict[str, Any]]:
    def one(name: str, size: int, width: int) -> dict[str, Any]:
        speedup = size + width / 10
        spread = {"speedup_decode": speedup, "speedup_decode_range": [speedup - 0.5, speedup + 1]}
        return report(data_set=name, batch_size=size, draft_tokens=width, **spread)

    keys = [(name, size, width) for name in ("code", "all") for size in (4, 1) for width in (3, 7)]
    return {f"{name}, batch {size}, {width} drafts": one(name, size, width) for name, size, width in keys}


def test_one_combination_is_a_table_of_data_sets() -> None:
    ((_, columns, rows),) = tables({"code": report(data_set="code"), "all": report(data_set="all", tokens=1)})
    assert columns == ["measure", "code", "all"]
    assert rows[0] == ("prompts / new tokens", "20 / 832", "20 / 1")
    shown = {name: cell for name, cell, _ in rows}
    assert shown["AR step, ms"] == "3.00"
    assert shown["draft / verify / whole round, ms"] == "1.00 / 5.00 / 6.50"
    assert shown["speedup these allow / share reached"] == "2.00x / 0.98"
    assert shown["outputs identical"] == "yes"


def test_several_combinations_are_rows() -> None:
    (_, shares, accepted), (_, speeds, fast), (_, costs, slow) = tables(grid())
    assert shares[:4] == speeds[:4] == costs[:4] == ["data set", "T", "batch", "way"]
    expected = [(name, "0", size, f"{n} drafts") for name in ("code", "all") for size in "41" for n in "37"]
    assert [row[:4] for row in accepted] == [row[:4] for row in fast] == [row[:4] for row in slow] == expected
    assert accepted[0][shares.index("acceptance by position")] == "0.88 0.50 0.38"
    assert slow[0][costs.index("AR step, ms")] == "3.00"
    assert fast[1][speeds.index("speedup, decode only")] == "4.70x (4.20 to 5.70)"


def test_a_difference_is_told_with_its_margin() -> None:
    def shown(*gaps: float | None) -> str:
        differing = {"identical": False, "different_prompts": 2, "differences": [{"relative_gap": gap} for gap in gaps]}
        ((_, _, rows),) = tables({"code": report(**differing)})
        return dict(rows)["outputs identical"]

    assert shown(2e-6, 1.5e-3) == "NO (2 prompts differ; gaps up to 1.5e-03 of the scores' range)"
    assert shown(2e-6, None) == "NO (2 prompts differ; gaps unknown)"


def test_other_draws_are_neither_identical_nor_different() -> None:
    ((_, _, rows),) = tables({"code": report(rule="block", identical=None, different_prompts=None)})
    assert dict(rows)["outputs identical"] == "not the same draws"


def test_the_comparison_with_pytorch_is_a_table_of_its_own() -> None:
    figures = {"threads": 1, "tokens_per_s": 90.4, "ours_tokens_per_s": 250.0, "ratio": 2.77, "ratio_range": [2.5, 3.0]}
    compared = report(hf={"ar": figures | {"equal_outputs": 19}, "speculative": figures | {"equal_outputs": 20}})
    _, (_, columns, rows) = tables({"code": compared})
    assert len(columns) == len(rows[0])
    assert rows[0] == ("code", "transformers generate (1 threads)", "90", "250", "2.77x (2.50 to 3.00)", "19 of 20")
    assert rows[1][1].startswith("PyTorch, host-driven")


def test_markdown_has_a_line_for_every_row_and_escapes_bars() -> None:
    text = markdown([("one", ["a", "b"], [("x|y", "1"), ("z", "2")]), ("two", ["c"], [("3",)])])
    assert text == "**one**\n\n| a | b |\n| --- | --- |\n| x\\|y | 1 |\n| z | 2 |\n\n**two**\n\n| c |\n| --- |\n| 3 |\n"


def test_lines_of_speedup_go_over_batch_sizes() -> None:
    found = [(label, [r["batch_size"] for r in line]) for label, line in speedup_lines(grid()).items()]
    assert found == [(f"{name}, T 0, {width} drafts", [1, 4]) for name in ("code", "all") for width in (3, 7)]


def test_ways_are_told_apart() -> None:
    """A tree from the chain of its depth, a chosen width, and rules from one another."""
    ways = {
        "3 drafts": {},
        "auto drafts": {"draft_tokens": "auto"},
        "tree of 9 drafts": {"tree_nodes": 9},
        "3 drafts (sample)": {"draft_choice": "sample"},
        "3 drafts (block)": {"rule": "block"},
        "3 drafts (block, sample)": {"rule": "block", "draft_choice": "sample"},
        "3 drafts (one pass)": {"one_pass": True},
    }
    reports = {f"code, {label}": report(temperature=1.0, **changes) for label, changes in ways.items()}
    (_, columns, rows), *_ = tables(reports)
    assert [row[columns.index("way")] for row in rows] == list(ways)
    assert list(speedup_lines(reports)) == [f"code, T 1, {label}" for label in ways]
    assert tables({"code": reports["code, 3 drafts (block)"]})[0][2][1][1] == "1 / 1 / 8 / 3 drafts (block)"
    shorter = report(draft_tokens=2, acceptance_by_position=[0.875, 0.5], temperature=1.0)
    others = {f"code, T 1, {label}": reports[f"code, {label}"] for label in ways if label != "3 drafts"}
    assert widest({"shorter": shorter, **reports}) == {"code, T 1": reports["code, 3 drafts"]} | others


def test_the_parts_of_a_round_add_up_to_it() -> None:
    parts = round_parts(report())
    assert list(parts) == ["draft", "verify", "rest"]
    assert parts["rest"] == pytest.approx(0.5)
    assert sum(parts.values()) == pytest.approx(6.5)


def test_figures_are_written_also_where_there_was_no_round(tmp_path: Path) -> None:
    costs = dict.fromkeys(("ar_step_s", "draft_s", "verify_s", "round_s", "speedup_bound", "share_of_bound"))
    speeds = dict.fromkeys(
        ("ar_tokens_per_s", "speculative_tokens_per_s", "speedup_decode", "speedup_decode_range"),
    )
    missing = costs | speeds | {"acceptance_length": None, "acceptance_by_position": []}
    nothing = report(rounds=0, data_set="all", **missing)
    ((_, _, rows),) = tables({"all": nothing})
    assert [cell for name, cell in rows if "decode only" in name] == ["-", "-", "-"]
    for reports in (grid(), {"all": nothing}):
        written = write_plots(reports, tmp_path)
        assert [path.name for path in written] == ["speedup.png", "acceptance_by_position.png", "round.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
