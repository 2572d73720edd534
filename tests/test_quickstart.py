"""The quickstart, whole, at a toy size: answers, training, export, decoding, summary; and a second call."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from specjax import quickstart
from specjax.data import embedded
from specjax.data.embedded import stdlib_conversations, word_problems
from specjax.data.prompts import chat_prompt, read_prompts
from specjax.generate import main as generate_main
from specjax.models.lora_draft import LoRADraftConfig
from specjax.quickstart import SUMMARY_FIELDS, embedded_prompts, main, prompt_counts
from specjax.weights import load_draft, read_fingerprint, read_target_config
from specjax.weights.orbax_checkpoint import RUN_CHECKPOINTS
from specjax.weights.safetensors_files import EMBEDDED_FOLDER
from tests.model_folders import LAYERS, save_target_with_tokenizer
from tests.refusals import refusal

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
STEPS, TRAIN, HELDOUT, VALIDATION, NEW, NEW_CODE = 2, 9, 4, 6, 8, 3
LONGEST, DEFAULT_SETS = quickstart.MAX_PROMPT_TOKENS, (60, quickstart.VALIDATION_PROMPTS)
FIELDS = [  # that the quickstart promises
    *("acceptance_length", "acceptance_rate", "speedup_decode", "speedup_end_to_end"),
    *("ar_tokens_per_s", "speculative_tokens_per_s", "identical", "repeated_4gram_fraction", "prompts", "tokens"),
]


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A few files instead of the whole standard library; short answers, few validation prompts, long prompts too."""
    code = tmp_path_factory.mktemp("code")
    for name in ("argparse", "ast", "configparser", "inspect", "shutil", "statistics", "textwrap", "typing"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "stdlib_conversations", partial(stdlib_conversations, root=code))
        patch.setattr(quickstart, "VALIDATION_PROMPTS", VALIDATION)
        patch.setattr(quickstart, "TRAINING_ANSWER_TOKENS", {"code": NEW_CODE})
        patch.setattr(quickstart, "MAX_PROMPT_TOKENS", 400)
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target_with_tokenizer(tmp_path_factory.mktemp("target"))


def arguments(target: Path, out: Path, *overrides: str, **options: int) -> list[str]:
    sizes = {"train_prompts": TRAIN, "heldout_prompts": HELDOUT, "max_new_tokens": NEW, "runs": 1} | options
    settings = {
        "target.path": target,
        "output_dir": out,
        "data.train": f"[{out}/data/train.jsonl]",
        "data.validation": f"[{out}/data/validation.jsonl]",
        "data.max_length": 448,
        "data.num_anchors": 8,
        "draft.num_taps": "null",
        "draft.target_layer_ids": "[2, 0]",
        "training.steps": STEPS,
        "evaluation.samples": 8,
        "logging.every_steps": 1,
    }
    flags = [part for name, value in sizes.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [str(CONFIG), *(f"{name}={value}" for name, value in settings.items()), *overrides, *flags]


@pytest.fixture(scope="module")
def finished(small_corpus: None, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    main(arguments(target, out))
    return out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_summary_holds_what_is_promised(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert list(SUMMARY_FIELDS) == FIELDS
    assert set(summary) == {*FIELDS, "data_sets", "metadata"}
    assert list(summary["data_sets"]) == ["code", "word problems", "all"]
    assert {name: summary[name] for name in FIELDS} == {name: summary["data_sets"]["all"][name] for name in FIELDS}
    assert summary["identical"] is True
    assert summary["prompts"] == HELDOUT
    assert HELDOUT <= summary["tokens"] <= HELDOUT * NEW
    assert summary["acceptance_length"] >= 1
    assert all("outputs" not in report for report in summary["data_sets"].values())
    assert "git_revision" in summary["metadata"]


def test_plots_are_images(finished: Path) -> None:
    for name in ("loss", "acceptance_by_position"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_exported_draft_is_one_that_servers_load(finished: Path) -> None:
    assert {p.name for p in (finished / "draft").iterdir()} == {"config.json", "model.safetensors", "specjax.json"}
    config = load_draft(finished / "draft").config
    assert (config.block_size, config.num_hidden_layers, config.num_target_layers) == (8, 2, LAYERS)
    assert read_fingerprint(finished / "draft") == read_fingerprint(finished)


def test_answers_are_the_targets_to_prompts_of_both_domains(finished: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    for name, count in (("train", TRAIN), ("validation", VALIDATION)):
        records = rows(finished / "data" / f"{name}.jsonl")
        assert len(records) == count
        prompts, lengths = [], []
        for record in records:
            supervised = sum(record["loss_mask"])
            lengths.append(supervised)
            assert record["loss_mask"] == [0] * (len(record["input_ids"]) - supervised) + [1] * supervised
            prompts.append(tokenizer.decode(record["input_ids"][:-supervised]))
        assert all(text.startswith("<|im_start|>user\n") for text in prompts)
        assert all(text.endswith("<|im_start|>assistant\n") for text in prompts)
        of_code = [length for length, text in zip(lengths, prompts, strict=True) if "def " in text]
        assert len(of_code) == count // 3
        assert 1 <= max(of_code) <= NEW_CODE < max(lengths) <= NEW
    assert not list(finished.rglob("*.partial"))


def test_no_prompt_is_in_two_sets(finished: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    heldout = embedded_prompts(tokenizer, "heldout", prompt_counts(HELDOUT))
    sets = [{tuple(prompt) for prompts in heldout.values() for prompt in prompts}]
    for name in ("train", "validation"):
        records = rows(finished / "data" / f"{name}.jsonl")
        sets.append({tuple(r["input_ids"][: r["loss_mask"].index(1)]) for r in records})
    assert [len(prompts) for prompts in sets] == [HELDOUT, TRAIN, VALIDATION]
    assert len(set.union(*sets)) == HELDOUT + TRAIN + VALIDATION


def test_adapters_are_trained_exported_and_measured_on_the_same_data(
    finished: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lora"
    data = [f"data.{name}=[{finished}/data/{name}.jsonl]" for name in ("train", "validation")]
    given = [x for x in arguments(target, out) if not x.startswith(("draft.num_taps", "draft.target_layer_ids"))]
    main([str(CONFIG.with_name("quickstart-lora.yaml")), *given[1:], *data, "lora.r=2"])
    assert "held-out prompts" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["identical"] is True
    assert not (out / "taps").exists()
    base = read_target_config(target)
    config = load_draft(out / "draft", base=base).config
    assert isinstance(config, LoRADraftConfig)
    assert (config.lora.r, config.masked_anchor) == (2, 0.5)


def test_a_second_call_resumes_and_answers_nothing_again(
    finished: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "write_answers", None)
    folders = [finished / name for name in ("data", "taps", RUN_CHECKPOINTS)]
    kept = [path for folder in folders for path in folder.iterdir()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    (finished / "summary.json").unlink()
    main(arguments(target, finished))
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert sorted(kept) == sorted(path for folder in folders for path in folder.iterdir())
    assert (finished / "summary.json").exists()
    assert f"steps {STEPS} to {STEPS}" in capsys.readouterr().out


def test_the_data_alone_is_what_recipes_are_compared_on(
    finished: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specjax.training.run.train", None)
    main([*arguments(target, finished), "--data-only"])
    tokenizer, data = AutoTokenizer.from_pretrained(target), finished / "data"
    heldout = embedded_prompts(tokenizer, "heldout", prompt_counts(HELDOUT))
    assert [read_prompts([data / "heldout" / f"{name}.jsonl"], None) for name in ("code", "word_problems")] == [
        *heldout.values()
    ]
    pairs = [tuple(message["content"] for message in row["messages"]) for row in rows(data / "original.jsonl")]
    corpus = [*embedded.stdlib_conversations("train"), *word_problems(TRAIN, 0, "train")]
    assert set(pairs) <= {tuple(message["content"] for message in c["messages"]) for c in corpus}
    asked = [chat_prompt([{"role": "user", "content": prompt}], tokenizer, "x") for prompt, _ in pairs]
    answered = [row["input_ids"][: row["loss_mask"].index(1)] for row in rows(data / "train.jsonl")]
    assert sorted(asked) == sorted(answered)


def test_the_run_folder_is_itself_a_draft(finished: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_main(["--target", str(target), "--draft", str(finished), "--prompt", "hi", "--max-new-tokens", "8"])
    printed = capsys.readouterr()
    assert "acceptance length" in printed.err
    assert "warning" not in printed.err


refused = partial(refusal, main)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"train_prompts": TRAIN + 3}, "holds answers of other settings: train_prompts is {'code': 3,"),
        ([], {"heldout_prompts": HELDOUT + 1}, "holds answers of other settings: heldout_prompts is {'code': 1,"),
        ([], {"max_new_tokens": NEW + 1}, f"max_new_tokens is {NEW}, now {NEW + 1}; restore these settings, or delete"),
        (
            [f"training.steps={STEPS + 1}"],
            {},
            f"other settings: training.steps is {STEPS}, now {STEPS + 1};",
        ),
        ([], {"runs": 0}, "error: --runs is 0; give at least 1"),
        ([], {"heldout_prompts": 1}, "error: --heldout-prompts is 1; give at least 2"),
        ([], {"heldout_prompts": 999}, "heldout prompts of domain code are needed, and there are"),
        (["data.train=[a.jsonl, b.jsonl]"], {}, "data.train names 2 files"),
        (["data.validation=[]"], {}, "data.validation names 0 files"),
        (["logging.tensorboard=false"], {}, "logging.tensorboard is false"),
    ],
)
def test_changed_settings_are_refused(
    overrides: list[str],
    options: dict[str, int],
    message: str,
    finished: Path,
    target: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(arguments(target, finished, *overrides, **options), capsys)


def test_another_target_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_target_with_tokenizer(tmp_path / "target", scale=0.5)
    assert "holds answers of other settings: target is" in refused(arguments(other, finished), capsys)


def test_a_draft_that_does_not_fit_is_refused_before_answers_are_written(
    small_corpus: None, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(arguments(target, tmp_path / "run", "draft.target_layer_ids=[0, 3]"), capsys)
    assert "target_layer_ids [0, 3]" in error
    assert not (tmp_path / "run").exists()


def test_files_of_the_users_own_are_not_overwritten(
    small_corpus: None, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "run" / "data" / "train.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert f"error: {mine}: is there, but" in refused(arguments(target, tmp_path / "run"), capsys)
    assert mine.read_text() == "mine"


def test_a_run_that_was_stopped_early_is_not_evaluated(
    finished: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specjax.training.run.train", lambda config, **_: None)
    longer = arguments(target, finished, f"training.steps={STEPS + 3}")
    assert f"training stopped at step {STEPS}; continue with the same command" in refused(longer, capsys)


def test_overrides_may_come_without_a_config(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(quickstart, "DEFAULT_CONFIG", str(CONFIG))
    assert "unknown key training.stepz" in refused(["training.stepz=3", "training.steps=2"], capsys)


def test_the_standard_library_holds_enough_for_the_default_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one honest walk, with the embedded target's own tokenizer."""
    monkeypatch.setattr(embedded, "stdlib_conversations", stdlib_conversations)
    monkeypatch.setattr(quickstart, "MAX_PROMPT_TOKENS", LONGEST)
    held_out, validation = map(prompt_counts, DEFAULT_SETS)
    counts = {domain: count + validation[domain] for domain, count in held_out.items()}
    prompts = embedded_prompts(AutoTokenizer.from_pretrained(EMBEDDED_FOLDER), "heldout", counts)
    assert {domain: len(found) for domain, found in prompts.items()} == counts
    assert max(len(prompt) for found in prompts.values() for prompt in found) <= LONGEST
