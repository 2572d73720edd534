"""Where two answers part, and the target's margin there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specjax.decoding import generate
from specjax.decoding.differences import differences
from tests.decoding.tiny import Case, Cases, next_logits, random_prompts, random_target


@pytest.fixture(scope="module")
def answered(case: Cases) -> Case:
    return case(0, 4)


def changed(answers: list[list[int]], prompt: int, position: int, token: int) -> list[list[int]]:
    copy = [list(answer) for answer in answers]
    copy[prompt][position] = token
    return copy


def test_equal_answers_have_no_differences_and_run_nothing(answered: Case) -> None:
    _, prompts, answers = answered
    assert differences(None, prompts, answers, answers, 2) == []  # type: ignore[arg-type]


def test_the_margin_is_that_of_the_logits_after_the_shared_tokens(answered: Case) -> None:
    target, prompts, answers = answered
    drafted = changed(changed(answers, 1, 5, 90), 3, 0, 91)
    drafted[2] = drafted[2][:9]
    found = differences(target, prompts, answers, drafted, 2)
    assert [(d["prompt"], d["position"]) for d in found] == [(1, 5), (2, 9), (3, 0)]
    assert [d["ar_token"] for d in found] == [answers[1][5], answers[2][9], answers[3][0]]
    assert [d["speculative_token"] for d in found] == [90, None, 91]
    for entry in found:
        logits = next_logits(target, [*prompts[entry["prompt"]], *answers[entry["prompt"]][: entry["position"]]])
        second, first = np.argsort(logits)[-2:]
        assert entry["top_tokens"] == [first, second]
        assert entry["ar_token"] == first
        gap = logits[first] - logits[second]
        assert entry["gap"] == pytest.approx(gap, rel=1e-3, abs=1e-5)
        assert entry["relative_gap"] == pytest.approx(gap / (logits.max() - logits.min()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("limits", [{"top_k": None, "top_p": None}, {"top_k": 8, "top_p": 0.9}])
def test_drawn_tokens_are_the_best_of_the_perturbed_scores(limits: dict[str, Any]) -> None:
    """Only with the prompt's own seed, the token's position and the same limits is the drawn token the best."""
    target, prompts = random_target(0), random_prompts(0, 4)
    sampling = {"temperature": 1.5, **limits}
    answers = generate(target, prompts, max_new_tokens=64, **sampling, seed=11).tokens
    drafted = [[*answer[:at], 95] for answer, at in zip(answers, (3, 20, 40, 60), strict=True)]
    found = differences(target, prompts, answers, drafted, 4, sampling | {"seed": 11})
    assert [d["position"] for d in found] == [3, 20, 40, 60]
    for entry in found:
        assert entry["top_tokens"][0] == entry["ar_token"]
        assert 0 < entry["relative_gap"] < 1


def test_a_token_without_a_rival_has_no_margin() -> None:
    target, prompts = random_target(0), random_prompts(0, 1)
    sampling = {"temperature": 1.0, "top_k": 1, "top_p": None, "seed": 0}
    (entry,) = differences(target, prompts, [[1]], [[2]], 1, sampling)
    assert (entry["gap"], entry["relative_gap"]) == (None, None)
