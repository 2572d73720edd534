"""Batches of many prompts: what shares a batch, and how few shapes there are."""

from __future__ import annotations

import pytest

from specjax.decoding import by_length
from specjax.decoding.by_length import generate_by_length
from specjax.decoding.generate import Generation, generate
from specjax.models.decoder import Decoder
from tests.decoding.tiny import random_target

PROMPTS = [[5] * length for length in (9, 2, 7, 3, 8, 2, 1)]


@pytest.fixture(scope="module")
def target() -> Decoder:
    return random_target(0)


def test_prompts_of_similar_length_meet_in_batches_of_one_size(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def recording(target: Decoder, prompts: list[list[int]], *args: object, **options: object) -> Generation:
        batches.append(([len(prompt) for prompt in prompts], options["max_new_tokens"]))
        return generate(target, prompts, *args, **options)

    monkeypatch.setattr(by_length, "generate", recording)
    order = [i for i, _ in generate_by_length(target, PROMPTS, batch_size=3, max_new_tokens=4, stop_token_ids=[])]
    assert order == [6, 1, 5, 3, 2, 4, 0]
    assert batches == [([1, 2, 2], [4, 4, 4]), ([3, 7, 8], [4, 4, 4]), ([9, 1, 1], [4, 1, 1])]


def test_answers_are_those_of_each_prompt_alone(target: Decoder) -> None:
    prompts = [[*prompt[:-1], i] for i, prompt in enumerate(PROMPTS)]
    answers = dict(generate_by_length(target, prompts, batch_size=3, max_new_tokens=6, stop_token_ids=[7, 8, 9]))
    assert [answers[i] for i in range(len(prompts))] == [
        generate(target, [prompt], max_new_tokens=6, stop_token_ids=[7, 8, 9]).tokens[0] for prompt in prompts
    ]


def test_no_prompts_are_no_batches(target: Decoder) -> None:
    assert list(generate_by_length(target, [], batch_size=3, max_new_tokens=4, stop_token_ids=[])) == []
