"""What `python -m specjax.regenerate` refuses, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from specjax.data import answer_folder
from tests.model_folders import POSITIONS, save_target_with_tokenizer, write_jsonl
from tests.regenerate.runs import NEW, call, contents


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
