"""Prompts out of records of every kind, and what is said of a record that holds none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from specjax.data.prompts import answer_text, chat_prompt, read_prompts
from specjax.errors import InputError

USER, ASSISTANT, MORE = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "more"},
)
FIRST = "<|im_start|>user\nhi<|im_end|>\n"
WHOLE = f"{FIRST}<|im_start|>assistant\nyes?<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
OPENING = "<|im_start|>assistant\n"
ECHO = "{{ tools | map(attribute='name') | join(',') if tools }}|{{ thinking }}|{{ messages[-1].content }}"
Make = Callable[[str | None], PreTrainedTokenizerBase]


@pytest.fixture
def tokenizer(make_tokenizer: Make, chatml: str) -> PreTrainedTokenizerBase:
    return make_tokenizer(chatml)


def written(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": [USER, ASSISTANT]}, FIRST + OPENING),
        ({"messages": [USER]}, FIRST + OPENING),
        ({"messages": [USER, ASSISTANT, MORE]}, WHOLE + OPENING),
        ({"messages": [USER, ASSISTANT, MORE, ASSISTANT]}, WHOLE + OPENING),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]}, FIRST + OPENING),
        ({"prompt": "hi"}, FIRST + OPENING),
        ({"prompt": "the first turn, repeated", "messages": [USER, ASSISTANT]}, FIRST + OPENING),
    ],
    ids=["answered", "open", "open after an answer", "two turns", "ShareGPT", "prompt", "prompt beside messages"],
)
def test_text_ends_where_an_answer_begins(
    record: dict[str, Any], text: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (prompt,) = read_prompts([written(tmp_path / "p.jsonl", record)], tokenizer)
    assert tokenizer.decode(prompt) == text
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_token_ids_end_before_the_first_supervised_one_and_need_no_tokenizer(tmp_path: Path) -> None:
    records = [
        {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 0]},
        {"input_ids": [5, 6], "loss_mask": [False, False]},
    ]
    assert read_prompts([written(tmp_path / "p.jsonl", *records)], None) == [[5, 6], [5, 6]]


def test_files_come_in_order_and_the_limit_stops_reading(tmp_path: Path) -> None:
    rows = [{"input_ids": [i, 9], "loss_mask": [0, 1]} for i in range(4)]
    first = written(tmp_path / "b.jsonl", rows[0], "", "   ", rows[1])
    second = written(tmp_path / "a.jsonl", rows[2], "{not read", rows[3])
    assert read_prompts([first, second], None, limit=3) == [[0], [1], [2]]
    assert read_prompts([first, second], None, limit=1) == [[0]]
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: not JSON"):
        read_prompts([first, second], None, limit=4)


@pytest.mark.usefixtures("cache_of_its_own")
def test_a_table_is_read_as_lines_are(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"prompt": "hi", "messages": None}, {"prompt": "left alone", "messages": [USER, ASSISTANT, MORE]}]
    lines = [{key: value for key, value in record.items() if value is not None} for record in records]
    Dataset.from_list(records).to_parquet(tmp_path / "p.parquet")
    prompts = read_prompts([tmp_path / "p.parquet"], tokenizer)
    assert [tokenizer.decode(prompt) for prompt in prompts] == [FIRST + OPENING, WHOLE + OPENING]
    assert prompts == read_prompts([written(tmp_path / "p.jsonl", *lines)], tokenizer)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input_ids": [1, 2], "loss_mask": [0, 1]}\n')
    assert read_prompts([path], None) == [[1]]


def test_tools_and_template_settings_reach_the_template(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(ECHO)
    tools = [{"name": "search"}, {"name": "add"}]
    path = written(tmp_path / "p.jsonl", {"messages": [USER, ASSISTANT], "tools": tools}, {"prompt": "x"})
    prompts = read_prompts([path], tokenizer, chat_template_kwargs={"thinking": "off"})
    assert [tokenizer.decode(prompt) for prompt in prompts] == ["search,add|off|hi", "|off|x"]


def test_an_answer_is_text_without_its_stop_token_and_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    a, b, special = tokenizer("ab<|stop|>", add_special_tokens=False)["input_ids"]
    for answer, text in (([a, b], "a"), ([a, b, a], "aba"), ([b, a, special, b], "ba"), ([b], ""), ([special], "")):
        assert answer_text(answer, [b], tokenizer) == text


FOREIGN = {"input_ids": [1, 64, 2], "loss_mask": [0, 0, 1]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{oops", "not JSON"),
        ("[1]", "a record is a JSON object, this is a list"),
        ({"text": "hi"}, "exactly one of messages, conversations, input_ids"),
        ({"prompt": 5}, "field prompt is 5; give a string"),
        ({"prompt": " "}, "the user's message is empty; give its text"),
        ({"prompt": ["hi"]}, r"field prompt is \['hi'\]; give a string"),
        ({"messages": []}, "field messages is an empty list"),
        ({"messages": [ASSISTANT]}, "nothing precedes the assistant's turn"),
        ({"input_ids": [1, 2]}, "input_ids without loss_mask"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1]}, "no token precedes the first supervised one"),
        ({"input_ids": [], "loss_mask": []}, "no token precedes the first supervised one"),
        (FOREIGN, "token 1 has id 64, outside the vocabulary of 64 ids"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(
    record: Any, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "good"}, "", record)
    with pytest.raises(InputError, match=rf"^file {path}, line 3: .*{message}"):
        read_prompts([path], tokenizer, vocab_size=64)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl, line 1: not JSON"):
        read_prompts([path], None)


def test_files_without_a_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"p\.jsonl: no records; give at least one"):
        read_prompts([written(tmp_path / "p.jsonl", "", "")], None)
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        read_prompts([tmp_path / "nowhere.jsonl"], None)


@pytest.mark.parametrize("template", [None, "no tokenizer"])
def test_text_needs_a_chat_template(template: str | None, make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = None if template else make_tokenizer(None)
    path = written(tmp_path / "p.jsonl", {"messages": [USER]})
    with pytest.raises(InputError, match=rf"{path}, line 1: is text, but the target has no tokenizer with a chat"):
        read_prompts([path], tokenizer)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ 1 + messages[0].content }}", "{{ messages[0].content.index('z') }}"],
)
def test_a_template_that_fails_is_reported(template: str, make_tokenizer: Make) -> None:
    with pytest.raises(InputError, match="here: the chat template refuses the conversation"):
        chat_prompt([USER], make_tokenizer(template), "here")


def test_settings_that_would_replace_the_renderers_own_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="chat template kwargs: tokenize, tools cannot be set"):
        chat_prompt([USER], tokenizer, "here", {"tools": [], "tokenize": True, "enable_thinking": False})
