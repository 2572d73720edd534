"""`python -m specjax.regenerate`: whose answers they are, what a kill leaves, and what is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from specjax.config import parse_config
from specjax.data.pipeline import read_examples
from specjax.data.prompts import chat_prompt
from specjax.decoding import by_length, generate
from specjax.training.data import answer_warnings, open_data
from specjax.weights import load_target
from tests.model_folders import POSITIONS, save_target_with_tokenizer, write_jsonl
from tests.regenerate.runs import ANSWERED, FAILED, NEW, PLACES, PROMPTS, SHARD, TOKENS, call, contents, told

Turns = list[list[tuple[list[int], list[int]]]]


def answers(out: Path) -> list[dict[str, Any]]:
    paths = sorted(out.glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def counts(out: Path) -> dict[str, int]:
    return json.loads((out / "counts.json").read_text())


def turns(record: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """(everything before it, it) of each supervised run of a record."""
    ids, start = record["input_ids"], 0
    for supervised, run in groupby(record["loss_mask"]):
        stop = start + len(list(run))
        if supervised:
            yield ids[:start], ids[start:stop]
        start = stop


@pytest.fixture(scope="module")
def expected(folder: Path, stops: list[int]) -> Turns:
    return decoded(folder, stops)


def decoded(folder: Path, stops: list[int], seed: int = 0, **sampling: float) -> Turns:
    """(prompt, answer) of every turn of every prompt that can be answered, decoded one by one."""
    tokenizer, target = (
        AutoTokenizer.from_pretrained(folder / "target"),
        load_target(folder / "target", dtype=jnp.float32),
    )
    dialogues = []
    for place, messages in zip(PLACES, ANSWERED, strict=True):
        pairs: list[tuple[list[int], list[int]]] = []
        history: list[dict[str, str]] = []
        for message in [None] if messages is TOKENS else [m for m in messages if m["role"] != "assistant"]:
            history += [] if message is None else [message]
            if message is not None and message["role"] == "system":
                continue
            prompt = TOKENS if message is None else chat_prompt(history, tokenizer, "here")
            drawn = np.random.SeedSequence([seed, place, len(pairs)]).generate_state(1).tolist() if sampling else 0
            answer = generate(target, [prompt], None, NEW, stops, seed=drawn, **sampling).tokens[0]
            pairs.append((prompt, answer))
            if answer[-1] not in stops:
                break
            history.append(told(tokenizer.decode(answer[:-1], skip_special_tokens=True)))
        dialogues.append(pairs)
    return dialogues


def test_every_supervised_turn_is_what_the_target_answers_to_what_precedes_it(finished: Path, expected: Turns) -> None:
    assert [pair for record in answers(finished) for pair in turns(record)] == [p for pairs in expected for p in pairs]
    assert max(map(len, expected)) > 1  # some conversation went on to a second turn


def test_counts_add_up_and_failures_are_named(finished: Path, folder: Path, stops: list[int], expected: Turns) -> None:
    total = counts(finished)
    unfinished = sum(pairs[-1][1][-1] not in stops for pairs in expected)
    assert 0 < unfinished < len(expected)
    records = answers(finished)
    assert total == {
        "prompts": PROMPTS,
        "done": PROMPTS - FAILED - unfinished,
        "unfinished": unfinished,
        "failed": FAILED,
        "records": len(records),
        "supervised_tokens": sum(len(answer) for pairs in expected for _, answer in pairs),
    }
    reports = [json.loads(path.read_text()) for path in sorted((finished / "reports").iterdir())]
    assert [sum(r["counts"][name] for name in ("done", "unfinished", "failed")) for r in reports] == [3, 3, 3, 2]
    failures = [failure for report in reports for failure in report["failures"]]
    assert [(Path(f["file"]), f["line"]) for f in failures] == [
        (folder / "a.jsonl", 4),
        (folder / "b.jsonl", 2),
        (folder / "b.jsonl", 4),
    ]
    reasons = "message is empty", f"{POSITIONS - NEW + 1} tokens and {NEW} new ones exceed", "no message of a user"
    assert all(part in failure["reason"] for part, failure in zip(reasons, failures, strict=True))


def test_the_trainer_reads_the_answers(finished: Path) -> None:
    examples = read_examples([finished / "*.jsonl"], None)
    assert [
        {"input_ids": ids.tolist(), "loss_mask": mask.astype(int).tolist()}
        for ids, mask in map(examples.__getitem__, range(len(examples)))
    ] == answers(finished)


def test_the_trainer_knows_who_answered_and_in_which_mode(folder: Path, finished: Path, tmp_path: Path) -> None:
    def warnings(target: Path, **data: Any) -> list[str]:
        raw = {"output_dir": "out", "target": {"path": str(target)}, "data": {"train": [f"{finished}/*.jsonl"]} | data}
        config = parse_config(raw, "test")
        return answer_warnings(config, open_data(config))

    assert warnings(folder / "target") == []
    (tmp_path / "quickstart").mkdir()
    rows = write_jsonl(tmp_path / "quickstart" / "train.jsonl", {"input_ids": [1, 2], "loss_mask": [0, 1]})
    rows.with_name("recipe.json").write_text('{"target": "of the quickstart", "train_prompts": 1}')
    assert warnings(folder / "target", train=[str(rows)]) == []
    other = save_target_with_tokenizer(tmp_path / "other", scale=0.5)
    (wrong_target,) = warnings(other)
    assert wrong_target == f"{finished}: its answers are of another target than target.path {other}"
    thinking = {"enable_thinking": False}
    for data in (
        {"chat_template_kwargs": thinking},
        {"chat_template_kwargs": thinking, "train": [str(folder / "a.jsonl")], "validation": [f"{finished}/*.jsonl"]},
    ):
        (wrong_mode,) = warnings(folder / "target", **data)
        assert f"written with the chat template kwargs {{}}, but data.chat_template_kwargs is {thinking}" in wrong_mode


def test_a_draft_and_the_batch_change_nothing(folder: Path, finished: Path, tmp_path: Path) -> None:
    call(folder, tmp_path / "out", "--draft", str(folder / "draft"), "--draft-tokens", "2", batch_size=5)
    assert contents(tmp_path / "out") == contents(finished)


def test_drawn_answers_are_those_of_each_prompts_own_seed(
    folder: Path, finished: Path, stops: list[int], tmp_path: Path
) -> None:
    """Whatever draft, batch and processes wrote them."""
    sampling = ("--temperature", "0.8", "--top-p", "0.9", "--seed", "11")
    expected = decoded(folder, stops, 11, temperature=0.8, top_p=0.9)
    call(folder, tmp_path / "out", *sampling, "--draft", str(folder / "draft"), batch_size=5)
    found = [pair for record in answers(tmp_path / "out") for pair in turns(record)]
    assert found == [pair for pairs in expected for pair in pairs]
    assert found != [pair for record in answers(finished) for pair in turns(record)]
    for process in (1, 0):
        call(folder, tmp_path / "parts", *sampling, num_processes=2, process_id=process)
    assert contents(tmp_path / "parts") == contents(tmp_path / "out")


def test_two_processes_write_what_one_writes(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = contents(finished), tmp_path / "out"
    call(folder, out, num_processes=2, process_id=1)
    assert {path.name for path in out.glob("*.jsonl")} == {"answers-00001.jsonl", "answers-00003.jsonl"}
    assert not (out / "counts.json").exists()
    assert f"{SHARD + SHARD} skipped" in capsys.readouterr().out
    call(folder, out, num_processes=2, process_id=0)
    assert contents(out) == whole
    assert f"complete: {counts(out)['done']} done" in capsys.readouterr().out


class Killed(BaseException):
    """Nothing in specjax handles it, as nothing handles SIGKILL."""


def kill_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> None:
    """The `calls`-th call (from 0) of a function ends the process instead."""
    left, original = [calls], getattr(module, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)


@pytest.mark.parametrize(
    ("where", "calls", "shards"),
    [
        ((by_length, "generate"), 0, 0),  # before anything was answered
        ((by_length, "generate"), 1, 0),  # in the middle of the first shard
        ((by_length, "generate"), 3, 1),  # between two shards
        ((by_length, "generate"), 6, 3),  # between two turns of a conversation in the last
        ((os, "replace"), 0, 0),  # before the recipe
        ((os, "replace"), 3, 1),  # between the first shard and the report of the second
        ((os, "replace"), 4, 1),  # between the report and the answers of the second
        ((os, "replace"), 9, 4),  # before the counts
    ],
)
def test_what_a_kill_interrupts_is_done_again_and_nothing_else(
    where: tuple[Any, str], calls: int, shards: int, folder: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, *where, calls)
        with pytest.raises(Killed):
            call(folder, out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    assert len(kept) == shards
    call(folder, out, batch_size=5)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    shared = "recipe.json.", "counts.json."  # processes that start or end together must not remove each other's
    assert {name: text for name, text in contents(out).items() if not name.startswith(shared)} == contents(finished)


def test_a_finished_folder_is_left_alone(
    folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    monkeypatch.setattr("specjax.regenerate.load_models", None)
    call(folder, finished)
    assert contents(finished) == before
    assert f"{PROMPTS} prompts: 0 done, 0 unfinished, 0 failed, {PROMPTS} skipped" in capsys.readouterr().out


def test_unfinished_answers_can_be_dropped(folder: Path, finished: Path, stops: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(folder, out, unfinished="drop")
    pairs = [pair for record in answers(out) for pair in turns(record)]
    assert pairs == [p for record in answers(finished) for p in turns(record) if p[1][-1] in stops]
    assert {name: counts(out)[name] for name in ("done", "unfinished", "failed")} == {
        name: counts(finished)[name] for name in ("done", "unfinished", "failed")
    }


def test_the_limit_takes_the_first_prompts(folder: Path, finished: Path, tmp_path: Path) -> None:
    call(folder, tmp_path / "out", limit=4)
    assert counts(tmp_path / "out")["prompts"] == 4
    first = (tmp_path / "out" / "answers-00000.jsonl").read_bytes()
    assert first == (finished / "answers-00000.jsonl").read_bytes()


def test_the_module_is_a_command() -> None:
    called = subprocess.run([sys.executable, "-m", "specjax.regenerate", "--help"], capture_output=True, text=True)
    assert called.returncode == 0
    assert "--unfinished" in called.stdout
