"""`python -m specjax.regenerate`: whose answers they are, what a kill leaves, and what is counted and refused."""

from __future__ import annotations

import json
import os
import shutil
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
from specjax.data import answer_folder
from specjax.data.pipeline import read_examples
from specjax.data.prompts import chat_prompt
from specjax.decoding import by_length, generate
from specjax.regenerate import main
from specjax.training.data import answer_warnings, open_data
from specjax.weights import load_target
from tests.model_folders import POSITIONS, STOP_TOKEN, save_draft_for, save_target_with_tokenizer, write_jsonl

NEW, SHARD, PROMPTS, FAILED = 12, 3, 11, 3
TEXTS = ("How many?", "Tom has 3 apples.", "Why?", "A shelf holds 12 books, and 5 more come.", "He buys 7 pens.")
TOKENS = [7, 8, 9, 10]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def told(text: str = "from the data") -> dict[str, str]:
    return {"role": "assistant", "content": text}


# The messages of each prompt that can be answered, or its tokens: the conversations of both files, in order.
ANSWERED: list[Any] = [
    [user(TEXTS[0])],
    [user(TEXTS[1]), told()],
    [user(TEXTS[2]), told(), user(TEXTS[3]), told()],
    TOKENS,
    [{"role": "system", "content": "Count."}, *[m for text in TEXTS for m in (user(text), told())]],
    [user(TEXTS[3]), told()],
    [user(TEXTS[4]), told(), user(TEXTS[0])],
    [user(TEXTS[2])],
]
PLACES = (0, 1, 2, 4, 5, 7, 9, 10)  # of these in both files
Turns = list[list[tuple[list[int], list[int]]]]
SHAREGPT = {"human": "user", "gpt": "assistant"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ with many stop tokens, so that answers of a random model end; draft/ made for it; two data files."""
    folder = tmp_path_factory.mktemp("models")
    target = save_target_with_tokenizer(folder / "target")
    stops = [STOP_TOKEN, *range(5, json.loads((target / "config.json").read_text())["vocab_size"], 6)]
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    save_draft_for(target, folder / "draft")
    names = {role: name for name, role in SHAREGPT.items()}
    write_jsonl(
        folder / "a.jsonl",
        {"prompt": TEXTS[0]},
        {"messages": ANSWERED[1]},
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in ANSWERED[2]]},
        {"prompt": "  "},
        {"input_ids": [*TOKENS, 3, 4], "loss_mask": [0] * len(TOKENS) + [1, 1]},
    )
    write_jsonl(
        folder / "b.jsonl",
        {"messages": ANSWERED[4]},
        {"input_ids": [5] * (POSITIONS - NEW + 1), "loss_mask": [0] * (POSITIONS - NEW + 1)},
        {"messages": ANSWERED[5]},
        {"messages": [told("hello")]},
        {"messages": ANSWERED[6]},
        {"messages": ANSWERED[7]},
    )
    return folder


def call(folder: Path, out: Path, *arguments: str, **options: Any) -> None:
    given = {
        "target": folder / "target",
        "out": out,
        "max_new_tokens": NEW,
        "batch_size": 2,
        "shard_prompts": SHARD,
    } | options
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    main([*flags, "--data", str(folder / "a.jsonl"), str(folder / "[b].jsonl"), *arguments])


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


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
def stops(folder: Path) -> list[int]:
    return list(json.loads((folder / "target" / "generation_config.json").read_text())["eos_token_id"])


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "answers"
    call(folder, out)
    return out


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


def refused(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **options: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        call(folder, out, *arguments, **options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": NEW + 1}, "max_new_tokens is 12, now 13"),
        ({"unfinished": "drop"}, "unfinished is 'keep', now 'drop'"),
        ({"limit": 5}, "prompts is 11, now 5"),
        ({"temperature": 0.5}, "temperature is 0.0, now 0.5"),
        ({"seed": 4}, "seed is 0, now 4"),
        ({"shard_prompts": 4}, "shard_prompts is 3, now 4"),
        ({"dtype": "bfloat16"}, "dtype is 'float32', now 'bfloat16'"),
        ({"chat_template_kwargs": '{"thinking": false}'}, "chat_template_kwargs is {}, now {'thinking'"),
    ],
)
def test_changed_settings_are_refused_by_name(
    options: dict[str, Any], message: str, folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    error = refused(folder, finished, capsys, **options)
    assert f"{finished / 'recipe.json'}: holds answers of another recipe: {message}" in error
    assert contents(finished) == before


def test_another_target_template_or_data_is_refused_by_name(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    template = other / "target" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}")
    save_target_with_tokenizer(tmp_path / "scaled", scale=0.5)
    shutil.copy(tmp_path / "scaled" / "model.safetensors", other / "target")
    (other / "a.jsonl").write_text((other / "a.jsonl").read_text().replace("Tom", "Tim"))
    error = refused(other, finished, capsys)
    assert all(f"{name} is " in error for name in ("target", "chat_template", "data_files", "data_sha256"))
    assert all(f"{name} is " not in error for name in ("data_bytes", "stop_token_ids", "prompts"))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"batch_size": 0}, "error: --batch-size is 0; give at least 1"),
    "no prompts": ({"limit": 0}, "error: --limit is 0; give at least 1"),
    "a top-k without a temperature": ({"top_k": 3}, "top_k is 3, but temperature 0 is greedy"),
    "a seed too large": ({"seed": 2**32}, "--seed is 4294967296; give an integer from 0 to"),
    "a process too many": ({"num_processes": 2, "process_id": 2}, "--process-id is 2 of --num-processes 2; count"),
    "no room": ({"max_new_tokens": POSITIONS}, f"--max-new-tokens is {POSITIONS}, which leaves no prompt room"),
    "a reserved setting": ({"chat_template_kwargs": '{"tools": []}'}, "tools cannot be set"),
    "draft tokens without a draft": ({"draft_tokens": 2}, "draft_tokens is 2, but there is no draft"),
    "draft tokens beyond the block": (
        {"draft": "draft", "draft_tokens": 4},
        "draft_tokens is 4; this draft proposes 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = MISTAKES[mistake]
    folders = {name: folder / options[name] for name in ("draft",) if name in options}
    assert message in refused(folder, tmp_path / "out", capsys, **(options | folders))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ('{"text": "hi"}', "line 2: a record holds exactly one of"),
        ('{"input_ids": [1, 99999], "loss_mask": [0, 0]}', "line 2: token 1 has id 99999, outside the vocabulary"),
    ],
)
def test_what_is_no_record_is_refused_before_anything_is_written(
    line: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text(f'{{"prompt": "hi"}}\n{line}\n')
    error = refused(folder, tmp_path / "out", capsys, str(data))
    assert f"file {data}, {message}" in error
    assert not (tmp_path / "out").exists()


def test_text_needs_a_chat_template_and_token_ids_do_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(folder / "target", tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "chat*"))
    error = refused(folder, tmp_path / "out", capsys, target=bare)
    assert "a.jsonl, line 1: is text, but the target has no tokenizer with a chat template" in error
    (bare / "generation_config.json").unlink()
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert "names no eos_token_id, so --unfinished drop" in refused(
        folder, tmp_path / "out", capsys, target=bare, unfinished="drop"
    )


def test_files_of_the_users_own_are_not_mixed_with_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write_jsonl(tmp_path / "answers-00000.jsonl", {"prompt": "mine"})
    assert f"error: {mine}: is there, but" in refused(folder, tmp_path, capsys)
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]


def test_a_report_that_is_gone_is_named(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    (out / answer_folder.REPORTS / "answers-00001.json").unlink()
    error = refused(folder, out, capsys)
    assert "reports/answers-00001.json: unreadable" in error
    assert f"delete {out / 'answers-00001.jsonl'}" in error


def test_the_module_is_a_command() -> None:
    called = subprocess.run([sys.executable, "-m", "specjax.regenerate", "--help"], capture_output=True, text=True)
    assert called.returncode == 0
    assert "--unfinished" in called.stdout
