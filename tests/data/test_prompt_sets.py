"""Prompt sets by name: their wording, where their records come from, and the prompts of later turns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from specjax.data.conversations import PretokenizedExample
from specjax.data.prompt_sets import PROMPT_SETS, Entry, prompts_of_turns
from specjax.data.prompts import Question, Turns
from specjax.errors import InputError

pytestmark = pytest.mark.usefixtures("cache_of_its_own")
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
TWO_TURNS = {"question_id": 81, "category": "writing", "turns": ["Write {a} poem.", "Rewrite it."]}
ONE_TURN = {"question_id": 401, "category": "qa", "turns": ["Who wrote it?"]}
# set -> (a record in its shape on the hub or in its authors' file, the turns that it asks)
RECORDS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("gsm8k", {"question": "How many {eggs}?", "answer": "#### 2"}, ["How many {eggs}?" + BOXED]),
    ("math500", {"problem": "Find $\\frac{1}{2}$.", "answer": "3", "level": 2}, ["Find $\\frac{1}{2}$." + BOXED]),
    (
        "humaneval",
        {"task_id": "HumanEval/0", "prompt": 'def f():\n    """Nothing."""\n', "test": "assert"},
        [
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            '```python\ndef f():\n    """Nothing."""\n\n```'
        ],
    ),
    ("mbpp", {"task_id": 2, "prompt": "Write a function.", "test_list": ["assert f()"]}, ["Write a function."]),
    ("mbpp", {"task_id": 2, "text": "Write a function.", "test_list": ["assert f()"]}, ["Write a function."]),
    ("mt-bench", {"category": "writing", "prompt": ["One.", "Two."], "prompt_id": 8}, ["One.", "Two."]),
    ("mt-bench", TWO_TURNS, ["Write {a} poem.", "Rewrite it."]),
    ("alpaca", {"instruction": "Name a tree.", "input": "", "output": "Oak."}, ["Name a tree."]),
    ("alpaca", {"instruction": "Name a tree.", "input": " \n"}, ["Name a tree."]),
    ("alpaca", {"instruction": "Name a tree."}, ["Name a tree."]),
    ("alpaca", {"instruction": "Add.", "input": "2 and 3", "output": "5"}, ["Add.\n\nInput:\n2 and 3"]),
    ("spec-bench", TWO_TURNS, ["Write {a} poem.", "Rewrite it."]),
    ("spec-bench", ONE_TURN, ["Who wrote it?"]),
]


def written(path: Path, *records: Any) -> str:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def texts(questions: Sequence[Question]) -> list[list[str]]:
    """What the user says in every turn of every question; there is nobody else, and every turn is one message."""
    found = []
    for question in questions:
        assert isinstance(question, Turns)
        assert all(len(turn) == 1 and turn[0]["role"] == "user" for turn in question.turns)
        found.append([turn[0]["content"] for turn in question.turns])
    return found


@pytest.mark.parametrize(("name", "record", "turns"), RECORDS)
def test_a_record_is_asked_in_the_wording_of_its_set(
    name: str, record: dict[str, Any], turns: list[str], tmp_path: Path
) -> None:
    assert texts(Entry.parse(f"{name}={written(tmp_path / 'p.jsonl', record)}").read()) == [turns]


def test_every_set_has_a_record_here() -> None:
    assert {name for name, _, _ in RECORDS} == set(PROMPT_SETS)


def test_a_copy_may_be_packed_a_table_or_a_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [TWO_TURNS, ONE_TURN]
    (tmp_path / "owner" / "copy").mkdir(parents=True)
    for path in ("copy.parquet", "owner/copy/test.parquet"):
        datasets.Dataset.from_list(records).to_parquet(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "copy.jsonl", *records)
    written(tmp_path / "copy.jsonl.gz", *records)
    for source in ("copy.jsonl", "copy.jsonl.gz", "copy.parquet", "copy.p*", "hf://owner/copy?split=test"):
        entry = Entry.parse(f"spec-bench={source}")
        assert entry.column == "spec-bench"
        assert texts(entry.read()) == [TWO_TURNS["turns"], ONE_TURN["turns"]], source
        assert texts(Entry.parse(f"spec-bench:qa={source}").read()) == [ONE_TURN["turns"]], source


@pytest.mark.parametrize(
    ("name", "path", "config", "split"),
    [
        ("gsm8k", "openai/gsm8k", "main", "test"),
        ("math500", "HuggingFaceH4/MATH-500", None, "test"),
        ("humaneval", "openai/openai_humaneval", None, "test"),
        ("mbpp", "google-research-datasets/mbpp", "sanitized", "test"),
        ("mt-bench", "HuggingFaceH4/mt_bench_prompts", None, "train"),
        ("alpaca", "tatsu-lab/alpaca", None, "train"),
    ],
)
def test_a_name_alone_is_the_set_on_the_hub(
    name: str, path: str, config: str | None, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, turns = next((record, turns) for found, record, turns in RECORDS if found == name)
    asked = []

    def load_dataset(path: str, **settings: Any) -> datasets.Dataset:
        asked.append((path, settings))
        return datasets.Dataset.from_list([record])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(Entry.parse(name).read()) == [turns]
    assert asked == [(path, {"name": config, "split": split, "revision": None})]


def test_a_category_and_a_limit_take_the_first_of_their_kind(tmp_path: Path) -> None:
    others = [{"category": "qa", "turns": [f"Who is {i}?"]} for i in range(3)]
    path = written(tmp_path / "p.jsonl", TWO_TURNS, others[0], TWO_TURNS, *others[1:], {"turns": 5})
    entry = Entry.parse(f"spec-bench:qa={path}")
    assert entry.column == "spec-bench:qa"
    assert texts(entry.read(limit=2)) == [["Who is 0?"], ["Who is 1?"]]
    assert texts(entry.read()) == [[f"Who is {i}?"] for i in range(3)]
    assert texts(Entry.parse(f"spec-bench={path}").read(limit=3)) == [
        TWO_TURNS["turns"],
        ["Who is 0?"],
        TWO_TURNS["turns"],
    ]
    with pytest.raises(InputError, match=r"^data spec-bench:code: no record of that category; there are None, qa, wri"):
        Entry.parse(f"spec-bench:code={path}").read()


def test_other_sources_hold_prompts_whose_answers_stay(tmp_path: Path) -> None:
    user, told = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}
    tokens = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}
    path = written(tmp_path / "p.jsonl", {"prompt": "a"}, {"messages": [user, told, user, told]}, tokens)
    entry = Entry.parse(path)
    alone, conversation, ids = entry.read(vocab_size=8)
    assert entry.column == "p"
    assert isinstance(alone, Turns)
    assert alone.turns == (({"role": "user", "content": "a"},),)
    assert isinstance(conversation, Turns)
    assert conversation.turns == ((user, told, user),)
    assert isinstance(ids, PretokenizedExample)
    with pytest.raises(InputError, match=r"p\.jsonl, line 3: token 2 has id 7, outside the vocabulary of 7"):
        entry.read(vocab_size=7)


def test_columns_are_short_and_a_set_comes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k", "prompts", "x=y.jsonl"):
        written(tmp_path / name, {"prompt": "a"})
    columns = {
        "gsm8k": "gsm8k",
        "gsm8k=a/b.jsonl": "gsm8k",
        "mt-bench:math": "mt-bench:math",
        "./gsm8k": "gsm8k",
        "prompts": "prompts",
        "x=y.jsonl": "x=y",
        "a/code.jsonl.gz": "code",
        "a/code-*.parquet": "code-*",
        "hf://owner/chats?split=test": "chats",
    }
    entries = {text: Entry.parse(text) for text in columns}
    assert {text: entry.column for text, entry in entries.items()} == columns
    assert [text for text, entry in entries.items() if entry.prompt_set] == [
        "gsm8k",
        "gsm8k=a/b.jsonl",
        "mt-bench:math",
    ]
    assert entries["gsm8k=a/b.jsonl"].source == "a/b.jsonl"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gsm9k", "no such file or prompt set; did you mean gsm8k? the sets are gsm8k, math500, humaneval"),
        ("MATH-500", "did you mean math500?"),
        ("mt_bench=turns.jsonl", "did you mean mt-bench or spec-bench?"),
        ("xyz", "no such file or prompt set; the sets are gsm8k"),
        ("spec-bench", "is not on the hub; get data/spec_bench/question.jsonl of .* and write spec-bench=FILE"),
        ("spec-bench:qa", "is not on the hub; .* and write spec-bench:qa=FILE"),
        ("gsm8k:algebra", "gsm8k has no categories; leave out :algebra"),
    ],
)
def test_a_wrong_entry_is_refused_before_anything_is_read(entry: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^data {entry}: .*{message.replace('?', '[?]')}"):
        Entry.parse(entry)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("gsm8k", {"text": "a"}, r"has no field question, only \['text'\]; give a copy of the set"),
        ("mbpp", {"code": "a"}, "has no field prompt or text, only"),
        ("gsm8k", ["a"], r"a record is a JSON object, this is \['a'\]"),
        ("gsm8k", {"question": " \n"}, r"field question holds ' \\n'; give text, or drop the record"),
        ("gsm8k", {"question": 5}, "field question holds 5; give text"),
        ("mt-bench", {"turns": []}, r"field turns holds \[\]; give text"),
        ("mt-bench", {"turns": ["a", ""]}, "field turns holds ''; give text"),
        ("alpaca", {"instruction": "a", "input": 5}, "field input holds 5; give text"),
        ("alpaca", {"instruction": "", "input": "a"}, "field instruction holds ''; give text"),
    ],
)
def test_a_record_without_a_question_is_named(name: str, record: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", record)
    with pytest.raises(InputError, match=f"^file {path}, line 1: {message}"):
        Entry.parse(f"{name}={path}").read()


def test_a_row_of_a_table_is_named(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "", "answer": "b"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"p\.parquet, row 2: field question holds ''"):
        Entry.parse(f"gsm8k={tmp_path}/p.parquet").read()
    with pytest.raises(InputError, match=r"p\.parquet: a record is made of problem; the columns are \['question'"):
        Entry.parse(f"math500={tmp_path}/p.parquet").read()


def test_a_later_turn_follows_the_answers_to_the_ones_before_it() -> None:
    def turns(*texts: str) -> Turns:
        return Turns(tuple(({"role": "user", "content": text},) for text in texts))

    tokens = PretokenizedExample(np.array([7]), np.array([False]), "here")
    questions: list[Question] = [turns("a", "b", "c"), turns("d"), tokens, turns("e", "f")]
    shown: dict[int, str] = {}
    asked: list[list[str]] = []

    def render(question: Question, answers: Sequence[str]) -> list[int]:
        """An id of its own for the text of each prompt."""
        text = "ids"
        if isinstance(question, Turns):
            text = " ".join(message["content"] for message in question.messages(answers))
        shown[len(shown)] = text
        return [len(shown) - 1]

    def answer(prompts: Sequence[list[int]]) -> Iterator[tuple[int, str]]:
        asked.append([shown[prompt[0]] for prompt in prompts])
        for i in reversed(range(len(prompts))):
            yield i, f"<{asked[-1][i]}>"

    prompts = prompts_of_turns(questions, render, answer)
    assert [shown[prompt[0]] for prompt in prompts] == [
        "a",
        "a <a> b",
        "a <a> b <a <a> b> c",
        "d",
        "ids",
        "e",
        "e <e> f",
    ]
    assert asked == [["a", "e"], ["a <a> b"]]
