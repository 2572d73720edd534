"""The command lines with a LoRA draft: a folder of random adapters, which changes the speed and never the answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from specjax import weights
from specjax.benchmark import main as benchmark
from specjax.generate import main as generate
from specjax.models.lora import LoRAConfig
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import mesh_scope
from specjax.regenerate import main as regenerate
from specjax.weights import (
    decoder_config_to_hf,
    flat_params,
    load_target,
    lora_draft_config_to_json,
    save_adapters,
    save_draft,
    save_target,
    target_fingerprint,
)
from tests.model_folders import MASK_TOKEN, save_target_with_tokenizer, write_jsonl
from tests.refusals import refusal
from tests.weights.tiny import filled, raw_config, tiny_decoder

NEW = "12"
TEXT = "How many?"
CONFIG = LoRADraftConfig(LoRAConfig(2, 4.0), block_size=4, mask_token_id=MASK_TOKEN)
BASE_NAME = "OWNER/NAME"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ with a tokenizer, lora/ and run/ for it, of one draft; prompts.jsonl."""
    folder = tmp_path_factory.mktemp("models")
    target = load_target(save_target_with_tokenizer(folder / "target"), dtype=jnp.float32)
    with mesh_scope():
        draft = filled(nnx.eval_shape(lambda: LoRADraft(CONFIG, target.config, rngs=nnx.Rngs(0))))
    template = (folder / "target" / "chat_template.jinja").read_text()
    fingerprint = target_fingerprint(target, chat_template=template, thinking="{}")
    save_draft(draft, folder / "lora", fingerprint=fingerprint, base_name=BASE_NAME)
    save_adapters(draft.adapters, folder / "adapter", base_name=None)
    (folder / "run").mkdir()
    for name, value in (
        ("draft_config.json", lora_draft_config_to_json(CONFIG)),
        ("lora_base.json", decoder_config_to_hf(target.config)),
        ("specjax.json", fingerprint.to_json()),
    ):
        (folder / "run" / name).write_text(json.dumps(value))
    with mesh_scope(), ocp.training.Checkpointer(folder / "run" / "checkpoints") as checkpointer:
        checkpointer.save_checkpointables(1, {"params": flat_params(draft)})
    write_jsonl(folder / "prompts.jsonl", {"prompt": TEXT})
    return folder


def answer(folder: Path, draft: str | None, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """What `generate` prints, on stdout and on stderr."""
    drafted = [] if draft is None else ["--draft", str(folder / draft), "--draft-tokens", "2"]
    asked = ["--prompt", TEXT, "--max-new-tokens", NEW, "--jsonl"]
    generate(["--target", str(folder / "target"), *drafted, *asked])
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_answers_are_the_targets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = answer(folder, None, capsys)
    rounds = []
    for draft in ("lora", "run"):
        drafted, warnings = answer(folder, draft, capsys)
        assert (drafted["tokens"], drafted["text"]) == (plain["tokens"], plain["text"])
        assert set(drafted["draft_tokens"]) == {2}
        assert warnings == ""
        rounds.append(drafted["rounds"])
    assert rounds[0] == rounds[1]


def test_another_chat_template_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = shutil.copytree(folder / "target", tmp_path / "target")
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "{# other #}")
    shutil.copytree(folder / "lora", tmp_path / "lora")
    _, warning = answer(tmp_path, "lora", capsys)
    assert warning == (
        f"warning: {tmp_path / 'lora'}: the draft was trained for another target: "
        "the chat template differs. Output stays exact, but expect it slower.\n"
    )


@pytest.mark.parametrize(("name", "known"), [("lora", f" ({BASE_NAME})"), ("run", "")])
def test_adapters_of_another_base_are_refused(
    name: str, known: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of the same shape, which only the recorded fingerprint tells; it can be set aside."""
    target = load_target(folder / "target", dtype=jnp.float32)
    weight = target.embed_tokens.weight
    weight[...] = -weight[...]
    save_target(target, shutil.copytree(folder / "target", tmp_path / "target"), jnp.float32)
    draft = shutil.copytree(folder / name, tmp_path / name)
    with pytest.raises(SystemExit, match="2"):
        answer(tmp_path, name, capsys)
    assert f"{draft}: its adapters were trained on another base{known}: the weights" in capsys.readouterr().err
    side = json.loads((draft / "specjax.json").read_text())
    (draft / "specjax.json").write_text(json.dumps(side | {"target_fingerprint": None}))
    plain, _ = answer(tmp_path, None, capsys)
    drafted, warnings = answer(tmp_path, name, capsys)
    assert (drafted["tokens"], warnings) == (plain["tokens"], "")


def test_training_answers_are_the_targets(folder: Path, tmp_path: Path) -> None:
    for name, draft in (("plain", []), ("drafted", ["--draft", str(folder / "lora")])):
        data = ["--data", str(folder / "prompts.jsonl"), "--out", str(tmp_path / name), "--batch-size", "1"]
        regenerate(["--target", str(folder / "target"), *draft, *data, "--max-new-tokens", NEW])
    plain, drafted = ((tmp_path / name / "answers-00000.jsonl").read_text() for name in ("plain", "drafted"))
    assert plain == drafted
    assert plain.count("input_ids") == 1


def benchmark_arguments(folder: Path, *more: str) -> list[str]:
    models = ["--target", str(folder / "target"), "--draft", str(folder / "lora")]
    return ["decode", *models, "--data", str(folder / "prompts.jsonl"), "--max-new-tokens", NEW, "--runs", "1", *more]


def test_it_is_measured_in_chains_and_trees(folder: Path, tmp_path: Path) -> None:
    benchmark(benchmark_arguments(folder, "--tree-nodes", "5", "--json", str(tmp_path / "report.json")))
    reports = json.loads((tmp_path / "report.json").read_text())["decode"]
    assert list(reports) == ["prompts, 3 drafts", "prompts, tree of 5 drafts"]
    for report in reports.values():
        assert report["identical"]
        assert report["block_size"] == CONFIG.block_size
        assert report["draft_s"] > 0


def generate_arguments(folder: Path, draft: Path, *more: str) -> list[str]:
    return ["--target", str(folder / "target"), "--draft", str(draft), "--prompt", TEXT, *more]


def test_what_it_cannot_do_is_said_before_anything_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load_target", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    for more, message in (
        (["--compare", "hf"], "--compare hf: PyTorch's loop runs DFlash drafts, and the draft is a LoRA draft"),
        (["--draft-tokens", "4"], "draft_tokens is 4; this draft proposes 1 to 3"),
        (["--tree-nodes", "9999"], "tree_nodes is 9999; give 3"),
    ):
        assert f"error: {message}" in refusal(benchmark, benchmark_arguments(folder, *more), capsys)
    error = refusal(generate, generate_arguments(folder, folder / "adapter"), capsys)
    assert f"error: {folder / 'adapter'}: holds an adapter, but no draft: specjax.json does not say" in error
    error = refusal(generate, generate_arguments(folder, folder / "lora", "--draft-tokens", "4"), capsys)
    assert "error: draft_tokens is 4; this draft proposes 1 to 3" in error


def test_a_draft_of_another_target_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = raw_config(vocab_size=4, num_hidden_layers=4, hidden_size=64)
    save_target(tiny_decoder(wide), tmp_path / "target", jnp.float32)
    error = refusal(generate, generate_arguments(tmp_path, folder / "lora"), capsys)
    assert "shape [2, 32] in adapter_model.safetensors, the config makes it [2, 64]" in error
    assert f"base_model_name_or_path is '{BASE_NAME}': give the base that the adapter was trained on" in error
    error = refusal(generate, generate_arguments(tmp_path, folder / "run"), capsys)
    assert "the draft does not fit the target: q_proj.a has shape [32, 2], of the target it would have [64, 2]" in error
    assert "warning" not in error  # not of speed, where there is none
    save_target(tiny_decoder(wide | {"vocab_size": 3, "hidden_size": 32}), tmp_path / "target", jnp.float32)
    error = refusal(generate, generate_arguments(tmp_path, folder / "lora"), capsys)
    assert f"the draft does not fit the target: mask_token_id is {MASK_TOKEN}, the target's vocab_size is 3" in error
