"""What a benchmark makes of a LoRA draft: two passes a round, and one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from specjax.decoding import benchmark
from specjax.decoding.benchmark import benchmark_decoding
from specjax.decoding.benchmark_settings import AUTO, Settings, Way, check_settings
from specjax.errors import InputError
from tests.decoding.test_lora_drafter import random_lora_draft
from tests.decoding.test_one_pass import MASKED
from tests.decoding.tiny import FULL, random_prompts, random_target


def test_a_chain_of_every_width_but_a_chosen_one_has_both_ways() -> None:
    both = Settings(draft_tokens=(AUTO, 2), tree_nodes=(9,), one_pass=True)
    check_settings(both, MASKED, FULL.vocab_size)
    assert both.ways(4, 0.0) == (Way(AUTO), Way(2), Way(2, one_pass=True), Way(2, 9))


@pytest.mark.parametrize(
    ("config", "widths", "message"),
    [
        (FULL, (), "not trained with masked anchors"),
        (replace(MASKED, masked_anchor=0.0), (), "not trained with masked anchors"),
        (MASKED, (AUTO,), "which tries it by itself"),
    ],
)
def test_one_pass_of_no_use_is_refused(config: Any, widths: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(Settings(draft_tokens=widths, one_pass=True), config, FULL.vocab_size)


def test_a_lora_draft_is_measured_in_two_passes_and_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = random_target(0), random_lora_draft(0, MASKED)
    settings, seen = Settings(6, (5,), (2,), (2,), runs=1, one_pass=True), []
    monkeypatch.setattr(benchmark, "ar_seconds", lambda *args: 1.0)
    monkeypatch.setattr(benchmark, "round_seconds", lambda *args: (seen.append(args[-1].one_pass), (0.5, 1.5))[1])
    reports = benchmark_decoding(target, draft, {"x": random_prompts(3, 2)}, settings)
    assert list(reports) == ["x, 2 drafts", "x, 2 drafts (one pass)"]
    assert [(r["one_pass"], r["identical"], r["rounds"] > 0) for r in reports.values()] == [
        (False, True, True),
        (True, True, True),
    ]
    assert seen == [False, True] * 2
