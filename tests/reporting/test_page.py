"""The page of a synthetic run: what it holds, that it needs nothing else, and that nothing in a run can break it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from specjax.errors import InputError
from specjax.reporting.charts import number
from specjax.reporting.page import render
from specjax.reporting.run_folder import read_run
from specjax.reporting.samples import Piece, Sample
from tests.reporting.parsed_page import ParsedPage
from tests.reporting.run_folders import EVALUATED, TRAINED, report, write_benchmark, write_events, write_run

MADE = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
HOSTILE = "</style></pre><script src='http://x/y.js'>alert(1)</script><img src=x onerror='alert(2)'>&amp;\""
CHARTS = [
    "Loss",
    "Acceptance length, teacher-forced",
    "Accuracy by position, training",
    "Accuracy by position, evaluation",
    "Learning rate",
    "Gradient norm",
    "Tokens a second",
]
ALLOWED_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "article", "footer"),
    *("h1", "h2", "h3", "p", "b", "small", "strong", "span", "pre", "ul", "li", "dl", "dt", "dd", "details", "summary"),
    *("div", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("svg", "line", "text", "polyline", "circle"),
}


def page(run: Path, samples: list[Sample] | None = None) -> ParsedPage:
    return ParsedPage(render(read_run(run), samples, MADE))


def table(page: ParsedPage, corner: str) -> list[list[str]]:
    (found,) = [table for table in page.tables if table[0][0] == corner]
    return found


def captions(page: ParsedPage) -> list[str]:
    return [value.split(":")[0] for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]


def test_every_metrics_last_value_is_there(tmp_path: Path) -> None:
    found = page(write_run(tmp_path / "run"))
    last = {f"train/{k}": v for k, v in TRAINED.items()} | {f"eval/{k}": v for k, v in EVALUATED.items()}
    rows = {row[0]: row[1:] for row in table(found, "tag")[1:]}
    assert {tag: row[:2] for tag, row in rows.items()} == {tag: [number(v), "20"] for tag, v in last.items()}
    assert rows["train/loss"][2:] == ["0.5123", "1.025"]
    assert captions(found)[: len(CHARTS)] == CHARTS
    assert ["20", "0.5123", "0.6123"] in found.tables[0]


def test_the_header_says_what_the_run_is(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "my run"))
    text = ParsedPage(render(run, None, MADE)).text
    for expected in (
        "my run: dflash run",
        "latest checkpoint at step 20; planned 20 steps",
        "2 layers, blocks of 8",
        f"jax {run.metadata['packages']['jax']}",
        f"git revision {run.metadata['git_revision'] or 'unknown'}",
        "8 x cpu, processes: 1",
        "learning_rate: 0.0006",
        "2026-01-02 03:04 UTC",
    ):
        assert expected in text


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_benchmark(run / "summary.json", "data_sets", {"all": report()})
    found = page(run, [Sample("p", "q", [Piece("draft", "t", "x")], [1], 1)])
    assert found.tags <= ALLOWED_TAGS
    assert not {name for _, name, _ in found.attributes} & {"src", "href", "xlink:href", "srcset", "data"}
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert "url(" not in found.style
    assert "@import" not in found.style


def test_nothing_in_a_run_becomes_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a<b>&c", target={"path": HOSTILE})
    write_events(run, TRAINED | {HOSTILE: 1.0}, EVALUATED)
    write_benchmark(run / "summary.json", "data_sets", {HOSTILE: report()})
    sample = Sample(HOSTILE, HOSTILE, [Piece("target", HOSTILE, HOSTILE), Piece("draft", "t", HOSTILE)], [2], 2)
    found = page(run, [sample])
    assert found.tags <= ALLOWED_TAGS
    assert found.answers == [[("target", HOSTILE), ("draft", HOSTILE)]]
    assert HOSTILE in table(found, "measure")[0]
    assert [f"train/{HOSTILE}", "1", "20", "1", "2"] in table(found, "tag")
    assert found.text.count("a<b>&c") >= 2
    assert ("span", "title", HOSTILE) in found.attributes


def test_benchmarks_of_both_kinds_have_tables_and_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_benchmark(run / "summary.json", "data_sets", {"code": report(acceptance_length=1.5), "all": report()})
    write_benchmark(run / "benchmark-heldout.json", "decode", {"chat": report(acceptance_length=3.25)})
    write_benchmark(run / "benchmark-load.json", "load", {"ratio": 1.0})
    found = page(run)
    first, second = [table for table in found.tables if table[0][0] == "measure"]
    assert [first[0], second[0]] == [["measure", "code", "all"], ["measure", "chat"]]
    assert ["acceptance length (tokens a round)", "1.50", "2.75"] in first
    assert ["acceptance length (tokens a round)", "3.25"] in second
    assert captions(found)[-3:] == [
        "Accuracy by position, newest evaluation",
        "Acceptance by position, summary.json",
        "Acceptance by position, benchmark-heldout.json",
    ]
    assert ["3", "0.375", "0.375"] in [row for table in found.tables for row in table]
    assert "benchmark-load.json" not in found.text
    assert "differ" not in found.text
    for figure in (
        "2.75",
        "summary.json, all; repeated 4-grams 0.125",
        "3.25",
        "benchmark-heldout.json, chat",
        "1.96x",
    ):
        assert figure in found.text


def test_outputs_that_differ_are_not_to_be_overlooked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    different = report(identical=False, different_prompts=1, differences=[{"relative_gap": 1e-6}])
    write_benchmark(run / "benchmark.json", "decode", {"code": different, "all": report()})
    assert "Outputs with and without the draft differ in benchmark.json" in page(run).text


def test_no_round_at_all_is_shown_as_such(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    nothing = report(acceptance_length=None, acceptance_rate=None, acceptance_by_position=[], rounds=0)
    write_benchmark(run / "benchmark.json", "decode", {"code": nothing | {"speedup_bound": None}})
    found = page(run)
    assert ["acceptance length (tokens a round)", "-"] in table(found, "measure")
    assert "Acceptance by position, benchmark.json" not in captions(found)


def test_a_run_without_events_or_checkpoints_says_so(tmp_path: Path) -> None:
    found = page(write_run(tmp_path / "run", step=None, logged=False))
    for expected in (
        "No TensorBoard events in this run folder",
        "No evaluation: the run has no data.validation",
        "No evaluation and no benchmark to show",
        "no checkpoint yet; planned 20 steps",
        "python -m specjax.benchmark decode with --json",
        "--samples N decodes some",
    ):
        assert expected in found.text
    assert not captions(found)


def test_a_run_that_trains_a_target_has_no_acceptance(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", kind="causal_lm", draft=None, logged=False)
    metrics = {"loss": 1.5, "accuracy": 0.5, "perplexity": 4.5, "learning_rate": 1e-3, "grad_norm": 1.0}
    write_events(run, metrics, {"loss": 1.75, "accuracy": 0.25, "perplexity": 5.75})
    found = page(run)
    assert captions(found) == ["Loss", "Accuracy", "Perplexity", "Learning rate", "Gradient norm"]
    assert "5.75" in found.text
    for absent in ("Acceptance", "Samples", "Benchmarks", "blocks of"):
        assert absent not in found.text


def test_metrics_that_are_no_numbers_do_not_stop_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", logged=False)
    write_events(run, {"loss": float("nan"), "grad_norm": float("inf")}, {})
    found = page(run)
    assert ["train/loss", "nan", "20", "-", "-"] in table(found, "tag")
    assert "no value is a number" in found.text


def test_a_sample_tells_its_rounds(tmp_path: Path) -> None:
    pieces = [Piece("target", "prefill", "\nI"), Piece("draft", "round 1", " am "), Piece("target", "round 1", "here")]
    found = page(
        write_run(tmp_path / "run"), [Sample("code, 1", "Who?", pieces, [3, 6], 5), Sample("x", "y", [], [], 1)]
    )
    assert found.answers == [[("target", "\nI"), ("draft", " am "), ("target", "here")], []]
    assert "acceptance length 4.50: 5 tokens in 2 rounds" in found.text
    assert "1 tokens in 0 rounds" in found.text
    assert "accepted draft tokens are underlined" in found.text


def test_a_report_that_lacks_a_field_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    old = report()
    del old["speedup_bound"]
    write_benchmark(run / "benchmark.json", "decode", {"code": old})
    with pytest.raises(InputError, match=r"benchmark\.json: a report has no field 'speedup_bound'"):
        page(run)
