"""Prompts of `specjax.benchmark decode`: sets by name, and turns that follow the target's own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from transformers import AutoTokenizer

from specjax import generate
from specjax.benchmark import main
from specjax.benchmark_prompts import named_entries, read_data_sets
from specjax.cli import Models
from specjax.decoding import by_length
from specjax.errors import InputError
from specjax.weights import load_target
from tests.model_folders import POSITIONS, STOP_TOKEN, save_draft_for, save_target_with_tokenizer, write_jsonl
from tests.refusals import refusal

NEW = 12
QUESTIONS = [["Tom has 3 apples.", "How many?", "Why?"], ["How many are left?"], ["A box holds 5 kg.", "And two?"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ with a tokenizer, draft/ made for it, and prompt sets."""
    folder = tmp_path_factory.mktemp("models")
    # Large weights, so that answers are no repetition of one token.
    save_draft_for(save_target_with_tokenizer(folder / "target", scale=2.0), folder / "draft")
    write_jsonl(folder / "turns.jsonl", *({"category": "x", "turns": turns} for turns in QUESTIONS))
    write_jsonl(folder / "sums.jsonl", *({"question": f"What is {i} and {i}?"} for i in range(3)))
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    target = load_target(folder / "target", dtype=jnp.float32)
    return Models(target, None, AutoTokenizer.from_pretrained(folder / "target"), (STOP_TOKEN,))


def rendered(models: Models, messages: list[dict[str, Any]]) -> list[int]:
    assert models.tokenizer is not None
    text = models.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(models.tokenizer(text, add_special_tokens=False)["input_ids"])


def played(models: Models) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and greedy answers of QUESTIONS, one prompt at a time, as a client of a server would ask them."""
    assert models.tokenizer is not None
    prompts, answers = [], []
    for turns in QUESTIONS:
        messages: list[dict[str, Any]] = []
        for text in turns:
            messages.append({"role": "user", "content": text})
            prompts.append(rendered(models, messages))
            generation = generate(models.target, [prompts[-1]], max_new_tokens=NEW, stop_token_ids=[STOP_TOKEN])
            answers.append(generation.tokens[0])
            content = models.tokenizer.decode(answers[-1], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": content})
    return prompts, answers


def read(models: Models, entries: list[str], **settings: Any) -> dict[str, list[list[int]]]:
    settings = {"chat_template_kwargs": {}, "max_new_tokens": NEW} | settings
    return read_data_sets(named_entries(entries), models, **settings)


def test_every_turn_is_a_prompt_after_the_targets_own_answers(folder: Path, models: Models) -> None:
    prompts, answers = played(models)
    assert len({tuple(answer) for answer in answers}) == len(answers) == 6
    out = folder / "report.json"
    arguments = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--runs", "1"]
    data = [f"mt-bench={folder}/turns.jsonl", f"gsm8k={folder}/sums.jsonl"]
    main(["decode", *arguments, "--max-new-tokens", str(NEW), "--data", *data, "--json", str(out)])
    report = json.loads(out.read_text())["decode"]
    assert {name: column["prompts"] for name, column in report.items()} == {"mt-bench": 6, "gsm8k": 3, "all": 9}
    assert report["mt-bench"]["outputs"] == answers
    assert report["all"]["identical"]
    assert read(models, data)["mt-bench"] == prompts


def test_the_limit_is_of_examples_and_not_of_turns(folder: Path, models: Models) -> None:
    assert len(read(models, [f"mt-bench={folder}/turns.jsonl"], limit=1)["mt-bench"]) == len(QUESTIONS[0])


def test_single_turns_decode_nothing(folder: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(by_length, "generate_by_length", refuse)
    (prompts,) = read(models, [f"gsm8k={folder}/sums.jsonl"], limit=2).values()
    wording = "What is {0} and {0}?\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    assert prompts == [rendered(models, [{"role": "user", "content": wording.format(i)}]) for i in range(2)]
    with pytest.raises(AssertionError, match="decoded"):
        read(models, [f"mt-bench={folder}/turns.jsonl"])


def test_a_prompt_that_leaves_no_room_is_named(folder: Path, models: Models) -> None:
    place = rf"^file {folder}/turns\.jsonl, line 1, turn "
    too_many = POSITIONS - len(rendered(models, [{"role": "user", "content": QUESTIONS[0][0]}])) + 1
    for new, turn in ((too_many, 1), (too_many - 1, 2)):
        with pytest.raises(InputError, match=rf"{place}{turn}: \d+ tokens and {new} new ones exceed the target's cont"):
            read(models, [f"mt-bench={folder}/turns.jsonl"], limit=1, max_new_tokens=new)


def test_columns_have_short_names_where_these_differ() -> None:
    assert {name: entry.source for name, entry in named_entries(["a/code.jsonl", "gsm8k=b.jsonl"]).items()} == {
        "code": "a/code.jsonl",
        "gsm8k": "b.jsonl",
    }
    clashing = ["a/x.jsonl", "b/x.jsonl", "all.jsonl", "gsm8k=b.jsonl", "gsm8k=c.jsonl"]
    assert list(named_entries(clashing)) == clashing


def test_a_wrong_name_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["decode", "--target", "nowhere", "--draft", "nowhere", "--data", "gsm9k"]
    assert "data gsm9k: no such file or prompt set; did you mean gsm8k?" in refusal(main, arguments, capsys)


def test_text_needs_a_chat_template(folder: Path, models: Models) -> None:
    bare = Models(models.target, None, None, models.stop_token_ids)
    with pytest.raises(InputError, match=r"sums\.jsonl, line 1: is text, but the target has no tokenizer with a chat"):
        read(bare, [f"gsm8k={folder}/sums.jsonl"])
