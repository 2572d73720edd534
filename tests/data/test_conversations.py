"""Reading JSONL: each layout, each way a line can be wrong, and random access by offset."""

import gzip
import json
import pickle

import numpy as np
import pytest

from specjax.data.conversations import Conversation, JsonlRecords, find_files, parse_record
from specjax.errors import InputError

TURNS = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yo"}]


def write(path, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_openai_and_sharegpt_records_are_the_same_conversation(tmp_path):
    sharegpt = {
        "id": "ignored",
        "conversations": [
            {"from": "system", "value": "be"},
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "yo"},
            {"from": "observation", "value": "42"},
        ],
    }
    named = {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yo"},
            {"role": "tool", "content": "42"},
        ]
    }
    first, second = JsonlRecords([write(tmp_path / "a.jsonl", sharegpt, named)])
    assert first.messages == second.messages == tuple(named["messages"])
    third = parse_record({"conversations": TURNS}, "here")
    assert third.messages == tuple(TURNS)


def test_other_fields_of_a_message_are_kept_and_nulls_dropped():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "f"}],
        "reasoning_content": "hm",
        "name": None,
    }
    record = parse_record({"messages": [TURNS[0], call], "tools": [{"name": "f"}]}, "here")
    assert record.messages[1] == {"role": "assistant", "tool_calls": [{"name": "f"}], "reasoning_content": "hm"}
    assert record.tools == ({"name": "f"},)


def test_tools_may_be_json_text():
    for tools, expected in ((json.dumps([{"name": "f"}]), ({"name": "f"},)), ("[]", ()), (" ", ()), (None, ())):
        assert parse_record({"messages": TURNS, "tools": tools}, "here").tools == expected
    for tools, message in (("f(x)", "tools is text but not JSON"), ('{"name": "f"}', "tools is an object")):
        with pytest.raises(InputError, match=f"here: field {message}"):
            parse_record({"messages": TURNS, "tools": tools}, "here")


def test_pretokenised_record():
    record = parse_record({"input_ids": [5, 0, 6], "loss_mask": [0, True, 1]}, "here", vocab_size=7)
    np.testing.assert_array_equal(record.input_ids, [5, 0, 6])
    np.testing.assert_array_equal(record.loss_mask, [False, True, True])
    assert record.input_ids.dtype == np.int32
    assert record.loss_mask.dtype == bool


def test_random_access_over_files_skips_blank_lines(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"é{i}"}]} for i in range(5)]
    write(tmp_path / "a.jsonl", records[0], "", records[1])
    (tmp_path / "b.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in records[2:4]) + b"\r\n\r\n"
    )
    write(tmp_path / "c.jsonl", "", "   ", records[4], "")
    data = JsonlRecords([tmp_path / "*.jsonl"])
    assert len(data) == 5
    for i in (3, 0, 4, 1, 2, -1):
        assert data[i].messages[0]["content"] == f"é{i % 5}"
    places = [("a", 1), ("a", 3), ("b", 1), ("b", 2), ("c", 3)]
    assert [record.origin for record in data] == [f"file {tmp_path}/{name}.jsonl, line {line}" for name, line in places]
    with pytest.raises(IndexError):
        data[5]


def test_only_offsets_are_held_and_they_pickle(tmp_path):
    path = write(
        tmp_path / "a.jsonl", *({"messages": [{"role": "user", "content": "x" * 5000 + str(i)}]} for i in range(50))
    )
    data = JsonlRecords([path])
    pickled = pickle.dumps(data)
    assert len(pickled) < path.stat().st_size / 50
    assert pickle.loads(pickled)[17] == data[17]


def test_a_packed_file_is_the_file_record_for_record(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"é{i}"}]} for i in range(5)]
    plain = write(tmp_path / "a.jsonl", *records[:2], "", *records[2:])
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    expected, data = JsonlRecords([plain]), JsonlRecords([packed])
    assert [record.messages for record in data] == [record.messages for record in expected]
    assert data[3].origin == f"file {packed}, line 5"
    assert pickle.loads(pickle.dumps(data))[4] == data[4]
    for content in (plain.read_bytes(), packed.read_bytes()[:-9]):
        packed.write_bytes(content)
        with pytest.raises(InputError, match=f"^file {packed}: cannot be unpacked .*; give a whole gzip file"):
            JsonlRecords([packed])


def test_find_files_keeps_the_order_given_and_reads_a_literal_name_first(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "[a].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [tmp_path / "sub", tmp_path / "[a].jsonl", tmp_path / "?.jsonl"]
    assert [p.name for p in find_files(names[1:])] == ["[a].jsonl", "a.jsonl", "b.jsonl"]
    assert [p.name for p in find_files([f"{tmp_path}/**/c.jsonl"])] == ["c.jsonl"]
    assert [p.name for p in find_files([names[1], names[1]])] == ["[a].jsonl", "[a].jsonl"]
    with pytest.raises(InputError, match=r"sub: no such file"):
        find_files(names[:1])
    with pytest.raises(InputError, match=r"none\*\.jsonl: no such file"):
        JsonlRecords([tmp_path / "none*.jsonl"])


@pytest.mark.parametrize("content", ["", "\n  \n\n"])
def test_a_data_set_without_records_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"a\.jsonl: no records"):
        JsonlRecords([tmp_path / "a.jsonl"])


BAD_RECORDS = {
    "not json": ('{"messages": [', "not JSON"),
    "not utf-8": (b'{"messages": "\xff"}', "not JSON"),
    "not an object": ([1], "this is a list"),
    "no known key": ({"text": "x", "id": 1}, r"exactly one of .* holds only \['id', 'text'\]"),
    "two known keys": ({"messages": TURNS, "conversations": TURNS}, "both messages and conversations"),
    "messages not a list": ({"messages": "hi"}, "field messages is a string"),
    "no messages": ({"messages": []}, "field messages is an empty list"),
    "message not an object": ({"messages": [TURNS[0], "hi"]}, r"messages\[1\] is a string"),
    "no role": ({"messages": [{"content": "hi"}]}, r"messages\[0\] has neither role nor from"),
    "unknown role": (
        {"conversations": [{"from": "robot", "value": "hi"}]},
        r"conversations\[0\]: field from is 'robot'",
    ),
    "role not a string": ({"messages": [{"role": ["user"], "content": "hi"}]}, "field role is .* unknown role"),
    "no content": ({"messages": [{"role": "user", "value": "hi"}]}, "field content is missing"),
    "content in parts": ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "field content is a list"),
    "value a number": ({"conversations": [{"from": "gpt", "value": 3}]}, "field value is a number"),
    "tools not objects": ({"messages": TURNS, "tools": ["f"]}, "field tools"),
    "no loss mask": ({"input_ids": [1]}, "input_ids without loss_mask"),
    "ids not a list": ({"input_ids": 3, "loss_mask": [1]}, "field input_ids is a number"),
    "ids strings": ({"input_ids": ["1"], "loss_mask": [1]}, "field input_ids does not hold a list of integers"),
    "ids floats": ({"input_ids": [1.0], "loss_mask": [1]}, "field input_ids does not hold a list of integers"),
    "ids booleans": ({"input_ids": [True], "loss_mask": [1]}, "field input_ids does not hold a list of integers"),
    "ids nested": ({"input_ids": [[1]], "loss_mask": [1]}, "field input_ids does not hold a list of integers"),
    "ids ragged": ({"input_ids": [[1], [1, 2]], "loss_mask": [1, 1]}, "field input_ids is nested"),
    "ids huge": ({"input_ids": [2**70], "loss_mask": [1]}, "field input_ids"),
    "mask not 0 or 1": ({"input_ids": [1, 1], "loss_mask": [0, 2]}, "field loss_mask holds 2"),
    "lengths differ": ({"input_ids": [1, 2], "loss_mask": [1]}, "input_ids has 2 entries and loss_mask 1"),
    "id negative": ({"input_ids": [1, -1], "loss_mask": [1, 1]}, "token 1 has id -1, outside the vocabulary of 10 ids"),
    "id too large": ({"input_ids": [10], "loss_mask": [1]}, "token 0 has id 10, outside the vocabulary of 10 ids"),
}


@pytest.mark.parametrize(("line", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", {"messages": TURNS}, "")
    with open(path, "ab") as file:
        file.write(
            b"\n"
            + (line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode())
        )
    data = JsonlRecords([path], vocab_size=10)
    assert isinstance(data[0], Conversation)
    with pytest.raises(InputError, match=rf"bad\.jsonl, line 3.*{message}"):
        data[1]
