"""`python -m specjax.generate`: text in and out, JSON lines, and what a user may get wrong."""

from __future__ import annotations

import io
import json
import shutil
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer

from specjax import generate as decode
from specjax import weights
from specjax.data.prompts import chat_prompt
from specjax.decoding.text import StopStrings, TextStream
from specjax.generate import _draft_settings, _parser, main
from specjax.models.decoder import Decoder
from specjax.models.sharding import mesh_scope
from specjax.weights import flat_params, load_draft, load_target, read_target_config, save_target, with_params
from specjax.weights.mask_embedding_file import mask_embedding_bytes
from tests.model_folders import (
    MASK_TOKEN,
    POSITIONS,
    STOP_TOKEN,
    save_draft_for,
    save_target_with_tokenizer,
    write_jsonl,
)
from tests.refusals import refusal

NEW = 12
TEXTS = ("How many?", "Tom has 3 apples.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ with a tokenizer, draft/ made for it, bare/: the target without its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    save_draft_for(save_target_with_tokenizer(folder / "target"), folder / "draft")
    shutil.copytree(folder / "target", folder / "bare", ignore=shutil.ignore_patterns("token*", "chat*"))
    return folder


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    return [chat_prompt([{"role": "user", "content": text}], tokenizer, "here") for text in TEXTS]


@pytest.fixture(scope="module")
def answers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    target = load_target(folder / "target", dtype=jnp.float32)
    return [decode(target, [p], max_new_tokens=NEW, stop_token_ids=[STOP_TOKEN]).tokens[0] for p in prompts]


def call(folder: Path, *arguments: str, target: str = "target") -> None:
    batch = [] if "--stream" in arguments else ["--batch-size", "1"]
    main(["--target", str(folder / target), "--max-new-tokens", str(NEW), *batch, *arguments])


def user(*texts: str) -> list[str]:
    return [argument for text in texts for argument in ("--prompt", text)]


def test_one_prompt_prints_the_answer_alone(
    folder: Path, answers: list[list[int]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXTS[0]))
    call(folder, *user("-"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    printed = capsys.readouterr()
    assert printed.out == tokenizer.decode(answers[0], skip_special_tokens=True) + "\n"
    assert printed.err == ""


def test_several_prompts_are_numbered_and_a_draft_tells_its_rounds(
    folder: Path, answers: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    call(folder, *user(*TEXTS), "--draft", str(folder / "draft"))
    texts = AutoTokenizer.from_pretrained(folder / "target").batch_decode(answers, skip_special_tokens=True)
    printed = capsys.readouterr()
    assert printed.out == f"[1/2]\n{texts[0]}\n[2/2]\n{texts[1]}\n"
    lines = printed.err.splitlines()
    assert len(lines) == 2
    assert all(f"({NEW} tokens in " in line and "acceptance length" in line for line in lines)


def test_json_lines_hold_tokens_rounds_and_text(
    folder: Path, prompts: list[list[int]], answers: list[list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ids = {"input_ids": [*prompts[1], 5], "loss_mask": [0] * len(prompts[1]) + [1]}
    data = write_jsonl(tmp_path / "p.jsonl", {"prompt": TEXTS[0]}, ids)
    call(folder, "--data", str(data), "--draft", str(folder / "draft"), "--jsonl")
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    for line, prompt, answer in zip(lines, prompts, answers, strict=True):
        drafts = {"draft_tokens", "tree_nodes", "one_pass", "acceptance_length", "acceptance_rate"}
        assert set(line) == {"prompt", "sample", "prompt_tokens", "tokens", "rounds", "text"} | drafts
        assert (prompts[line["prompt"]], line["sample"]) == (prompt, 0)
        assert (line["prompt_tokens"], line["tokens"]) == (len(prompt), answer)
        assert line["draft_tokens"] == [line["draft_tokens"][0]] * len(line["rounds"])
        assert line["acceptance_rate"] == (sum(line["rounds"]) - len(line["rounds"])) / sum(line["draft_tokens"])
        assert line["text"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert line["acceptance_length"] == statistics.mean(line["rounds"])
    assert printed.err == ""


def test_a_tree_of_every_token_is_always_right(
    folder: Path, answers: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    every = str(read_target_config(folder / "target").vocab_size)
    tree = ("--draft-tokens", "1", "--tree-nodes", every)
    call(folder, *user(*TEXTS), "--draft", str(folder / "draft"), *tree, "--jsonl")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tokens"] for line in lines] == answers
    assert all(line["rounds"] == [2] * -(-(NEW - 1) // 2) for line in lines)


def test_drawn_answers_have_a_seed_for_every_prompt(
    folder: Path, prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ("--temperature", "0.7", "--top-k", "20", "--top-p", "0.9", "--seed", "5")
    call(folder, *user(*TEXTS), *drawn, "--draft", str(folder / "draft"), "--jsonl")
    target = load_target(folder / "target", dtype=jnp.float32)
    for i, line in enumerate(capsys.readouterr().out.splitlines()):
        settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5 + i}
        expected = decode(target, [prompts[i]], None, NEW, [STOP_TOKEN], **settings)
        assert json.loads(line)["tokens"] == expected.tokens[0]


@pytest.mark.parametrize("drafted", [False, True])
def test_a_stream_prints_the_same_text(
    folder: Path, answers: list[list[int]], drafted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the text ends at a string that begins in one token and ends in another."""
    draft = ["--draft", str(folder / "draft")] if drafted else []
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    call(folder, *user(*TEXTS), *draft, "--stream")
    printed = capsys.readouterr()
    assert printed.out == f"[1/2]\n{texts[0]}\n[2/2]\n{texts[1]}\n"
    assert len(printed.err.splitlines()) == 2 * drafted
    first, second = (tokenizer.decode(answers[0][i : i + 1]) for i in (5, 6))
    stop = first[-1:] + second[:1]
    cut = texts[0][: texts[0].index(stop)]
    for how in ("--stream", "--jsonl"):
        call(folder, *user(TEXTS[0]), *draft, "--stop", stop, "--stop", "never", how)
        out = capsys.readouterr().out
        assert (out if how == "--stream" else json.loads(out)["text"] + "\n") == cut + "\n"


def test_text_pieces_wait_for_whole_characters_and_stop_strings() -> None:
    """Bytes of one character in three tokens; a stop string that begins three times and comes once."""

    class Bytes:
        all_special_tokens = ()

        def decode(self, tokens: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            assert (skip_special_tokens, clean_up_tokenization_spaces) == (True, False)
            return bytes(tokens).decode("utf-8", errors="replace")

    stops = StopStrings.build(["stop", "STé"], Bytes())
    for text, shown in (
        ("a€b", "a€b"),
        ("ab STé x", "ab "),
        ("so st sto€ stop it", "so st sto€ "),
        ("st", "st"),
        ("", ""),
    ):
        stream = TextStream(Bytes(), [], stops)
        pieces = [stream.add([byte]) for byte in text.encode()]
        for i, piece in enumerate(pieces):
            assert "\ufffd" not in piece
            assert shown.startswith("".join(pieces[: i + 1]))
        assert "".join(pieces) + stream.add([], last=True) == shown
        assert "".join(pieces) == shown or text == "st"
    stream = TextStream(Bytes(), [], None)
    assert [stream.add([byte]) for byte in "x€".encode()] == ["x", "", "", "€"]


def test_a_chat_is_a_list_of_messages(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": t} for t in TEXTS]
    messages.insert(1, {"role": "assistant", "content": "Three."})
    prompt = chat_prompt(messages, AutoTokenizer.from_pretrained(folder / "target"), "here")
    expected = decode(load_target(folder / "target", dtype=jnp.float32), [prompt], None, NEW, [STOP_TOKEN])
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(messages)))
    for chat in (json.dumps(messages), "-"):
        call(folder, "--chat", chat, "--jsonl")
        assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens[0]


def test_samples_rules_masks_and_widths_reach_the_decoder(
    folder: Path, prompts: list[list[int]], answers: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target(folder / "target", dtype=jnp.float32)
    draft = load_draft(folder / "draft", dtype=jnp.float32)
    settings = {"temperature": 1.0, "rule": "block", "draft_choice": "sample", "samples": 2}
    flags = ["--temperature", "1", "--rule", "block", "--draft-choice", "sample", "--samples", "2", "--seed", "3"]
    call(folder, *user(*TEXTS), *flags, "--draft", str(folder / "draft"), "--jsonl")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for i, prompt in enumerate(prompts):
        expected = decode(target, [prompt], draft, NEW, [STOP_TOKEN], seed=3 + 2 * i, **settings)
        assert [line["tokens"] for line in lines[2 * i : 2 * i + 2]] == expected.tokens
    call(folder, *user(*TEXTS), "--temperature", "1", "--samples", "2")
    assert "[2/2, sample 1]" in capsys.readouterr().out
    suppressed = [str(t) for t in answers[0][:2]]
    call(folder, *user(TEXTS[0]), "--suppress-tokens", *suppressed, "--jsonl")
    assert not {*answers[0][:2]} & {*json.loads(capsys.readouterr().out)["tokens"]}
    call(folder, *user(*TEXTS), "--draft-tokens", "auto", "--draft", str(folder / "draft"), "--jsonl")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tokens"] for line in lines] == answers


@pytest.mark.parametrize("trees", [False, True])
def test_trees_are_chosen_from_where_they_are_asked_for(folder: Path, trees: bool) -> None:
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--prompt", "p"]
    options = ["--draft-tokens", "auto", *(["--tree-nodes", "auto"] if trees else [])]
    settings = _draft_settings(_parser().parse_args([*models, *options]))
    assert settings["draft_tokens"].trees == trees
    assert settings["tree_nodes"] is None


def test_without_a_tokenizer_token_ids_go_in_and_come_out(
    folder: Path, prompts: list[list[int]], answers: list[list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", {"input_ids": prompts[0], "loss_mask": [0] * len(prompts[0])})
    call(folder, "--data", str(data), target="bare")
    assert capsys.readouterr().out == " ".join(map(str, answers[0])) + "\n"
    call(folder, "--data", str(data), "--jsonl", target="bare")
    assert json.loads(capsys.readouterr().out) == {
        "prompt": 0,
        "sample": 0,
        "prompt_tokens": len(prompts[0]),
        "tokens": answers[0],
        "rounds": [],
    }


def test_a_draft_of_another_chat_is_used_with_a_warning(
    folder: Path, answers: list[list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = shutil.copytree(folder / "target", tmp_path / "target")
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "{# other #}")
    options = [*user(TEXTS[0]), "--draft", str(folder / "draft"), "--jsonl"]
    call(tmp_path, *options, "--chat-template-kwargs", '{"thinking": false}')
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tokens"] == answers[0]
    (line,) = printed.err.splitlines()
    assert line.startswith(f"warning: {folder / 'draft'}: the draft was trained for another target")
    assert "chat template differs" in line
    assert "thinking mode differs" in line
    assert "weights" not in line


def test_an_extended_target_is_decoded_and_a_mask_that_became_one_of_its_tokens_told(
    folder: Path, prompts: list[list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One draft embeds MASK itself and has it past the rows, which the extension fills; the other's is special."""
    target = load_target(folder / "target", dtype=jnp.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    params, rows = flat_params(target), target.config.vocab_size
    with mesh_scope():
        longer = Decoder(replace(target.config, vocab_size=rows + 8), rngs=nnx.Rngs(0), dtype=jnp.float32)
        params["embed_tokens.weight"] = jnp.pad(params["embed_tokens.weight"], ((0, 8), (0, 0)))
        params["lm_head.kernel"] = jnp.pad(params["lm_head.kernel"], ((0, 0), (0, 8)))
    save_target(with_params(longer, params), tmp_path / "target", jnp.float32)
    assert len(tokenizer) == rows
    tokenizer.add_tokens([f"<i{i}>" for i in range(8)])
    tokenizer.save_pretrained(tmp_path / "target")
    answer = decode(load_target(tmp_path / "target", dtype=jnp.float32), prompts[:1], max_new_tokens=NEW).tokens[0]
    for mask, told in ((MASK_TOKEN, False), (rows, True)):
        draft = shutil.copytree(folder / "draft", tmp_path / f"draft{mask}")
        raw = json.loads((draft / "config.json").read_text())
        raw["dflash_config"]["mask_token_id"] = mask
        (draft / "config.json").write_text(json.dumps(raw))
        if told:
            (draft / "mask_embedding.pt").write_bytes(mask_embedding_bytes(np.ones(32, np.float32), mask))
        call(tmp_path, *user(TEXTS[0]), "--draft", str(draft), "--jsonl")
        printed = capsys.readouterr()
        assert json.loads(printed.out)["tokens"] == answer
        expected = f"warning: {draft}: its mask token {rows} is the target's token '<i0>'."
        assert printed.err.startswith(expected) if told else printed.err == ""


refused = partial(refusal, main)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a top-p without a temperature": ({"top-p": 0.5}, "top_p is 0.5, but temperature 0 is greedy"),
    "no target": ({"target": "nowhere/at/all"}, "error: nowhere/at/all: no such folder"),
    "text without tokenizer": (
        {"target": "bare"},
        "error: --prompt 1: is text, but the target has no tokenizer with a chat template; give input_ids",
    ),
    "draft of another size": ({"draft": "wide"}, "hidden_size is 64, the target's hidden_size is 32"),
    "truncated draft": ({"draft": "cut"}, "model.safetensors: truncated or corrupt"),
    "draft without weights": ({"draft": "empty"}, "empty: holds no weights"),
    "a target as draft": ({"draft": "target"}, "is not a DFlash draft"),
    "a draft as target": ({"target": "draft"}, "error: FOLDER/draft: holds a DFlash draft, not a target"),
    "draft tokens beyond the block": ({"draft": "draft", "draft-tokens": 4}, "error: draft_tokens is 4"),
    "draft tokens without a draft": ({"draft-tokens": 2}, "error: draft_tokens is 2, but there is no draft"),
    "a tree without a draft": ({"tree-nodes": 9}, "error: tree_nodes is 9, but there is no draft"),
    "a tree too small for its drafts": ({"draft": "draft", "tree-nodes": 2}, "error: tree_nodes is 2; give 3"),
    "no tree": ({"draft": "draft", "tree-nodes": "some"}, "--tree-nodes is 'some'; give a number or auto"),
    "trees without widths": ({"draft": "draft", "tree-nodes": "auto"}, "give --draft-tokens auto with it"),
    "no new tokens": ({"max-new-tokens": 0}, "max_new_tokens is 0; give at least 1"),
    "no width": ({"draft": "draft", "draft-tokens": "all"}, "--draft-tokens is 'all'; give a number or auto"),
    "a width without a draft": ({"draft-tokens": "auto"}, "draft_tokens is auto, but there is no draft"),
    "no chat": ({"chat": '[{"content": "hi"}]'}, "error: --chat 1: messages[0]"),
    "no messages": ({"chat": "{}"}, "error: --chat 1: field messages is"),
    "one pass of another draft": (
        {"draft": "draft", "one-pass": None},
        "error: one_pass is set, but the draft was not trained with masked anchors",
    ),
    "one pass without a draft": ({"one-pass": None}, "error: one_pass is set, but there is no draft"),
    "no samples": ({"samples": 0}, "samples is 0; give at least 1"),
    "equal samples": ({"samples": 2}, "samples is 2, but temperature 0 is greedy"),
    "a rule for nothing": ({"rule": "block"}, "rule is block, but temperature 0 is greedy"),
    "a special stop": ({"stop": "<|im_end|>"}, "stop_strings holds '<|im_end|>', a special token"),
    "a rule without a draft": ({"rule": "block", "temperature": 1}, "rule is block, but there is no draft"),
    "an empty stop": ({"stop": ""}, "stop_strings holds ''; give strings of at least one character"),
    "no such token": ({"suppress-tokens": -1}, "--suppress-tokens: -1 is outside the target's vocabulary of"),
    "a tree by a rule": (
        {"draft": "draft", "tree-nodes": 9, "rule": "block", "temperature": 1},
        "error: rule is block, but a tree needs match",
    ),
    "a chosen width by a rule": (
        {"draft": "draft", "draft-tokens": "auto", "rule": "block", "temperature": 1},
        "error: rule is block, but draft_tokens is auto",
    ),
    "a batch of one stream": ({"stream": None, "batch-size": 2}, "error: --stream decodes one prompt after the other"),
    "no batch": ({"batch-size": 0}, "error: --batch-size is 0"),
    "too many devices": ({"tensor": 9}, "error: --tensor is 9; there are 8 devices"),
    "devices that do not divide": ({"tensor": 3}, "error: --tensor 3: tensor 3 does not divide"),
    "no JSON": ({"chat-template-kwargs": "{thinking}"}, "--chat-template-kwargs: '{thinking}' is not JSON"),
    "no JSON object": ({"chat-template-kwargs": "[1]"}, "'[1]' is not a JSON object"),
    "the renderer's own setting": ({"chat-template-kwargs": '{"tools": []}'}, "tools cannot be set"),
}


BEFORE_LOADING = {"draft-tokens", "tree-nodes", "rule", "samples", "batch-size", "stream", "one-pass"}


@pytest.fixture(scope="module")
def broken(folder: Path) -> Path:
    """The folder, with drafts that are not right beside the good ones."""
    save_draft_for(folder / "target", folder / "wide", hidden_size=64)
    for name in ("cut", "empty"):
        shutil.copytree(folder / "draft", folder / name)
    whole = folder / "cut" / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    (folder / "empty" / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(
    mistake: str, broken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = MISTAKES[mistake]
    options = {"target": "target"} | ({} if "chat" in changes else {"prompt": "hi"}) | changes
    folders = {name: str(broken / options[name]) for name in ("target", "draft") if name in options}
    if mistake == "no target":
        folders = {"target": options["target"]}
    if BEFORE_LOADING & changes.keys():
        monkeypatch.setattr(weights, "load_target", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    arguments = [
        part
        for name, value in (options | folders).items()
        for part in (f"--{name}", str(value))[: 1 if value is None else 2]
    ]
    assert message.replace("FOLDER", str(broken)) in refused(arguments, capsys)


def test_data_is_named_by_file_and_line_before_anything_is_decoded(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", {"prompt": "hi"}, {"input_ids": [1, 99999], "loss_mask": [0, 0]})
    error = refused(["--target", str(folder / "target"), "--data", str(data)], capsys)
    assert f"error: file {data}, line 2: token 1 has id 99999, outside the vocabulary" in error


def test_a_prompt_that_is_too_long_is_counted_over_batches(
    folder: Path, prompts: list[list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"input_ids": ids, "loss_mask": [0] * len(ids)} for ids in (prompts[0], [5] * POSITIONS)]
    arguments = ["--target", str(folder / "target"), "--data", str(write_jsonl(tmp_path / "p.jsonl", *rows))]
    error = refused([*arguments, "--max-new-tokens", str(NEW), "--batch-size", "1"], capsys)
    assert f"counted from prompt 1: prompt 0: {POSITIONS} tokens and {NEW} new ones exceed" in error
