"""`python -m specjax.report`: the page of a run that was trained, its samples, and what a user may get wrong."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from specjax import generate
from specjax.cli import Models
from specjax.data import embedded
from specjax.data.embedded import stdlib_conversations
from specjax.decoding import Generation
from specjax.report import _prompts, main
from specjax.reporting.run_folder import read_run
from specjax.weights import load_run_draft, load_target
from specjax.weights.safetensors_files import EMBEDDED_FOLDER
from tests.model_folders import MASK_TOKEN, STOP_TOKEN, save_target_with_tokenizer, write_jsonl
from tests.refusals import refusal
from tests.reporting.parsed_page import ParsedPage
from tests.reporting.run_folders import write_run
from tests.training.tiny import STEPS, edited, raw_run, train, write_rows

NEW = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/, a draft trained for target/, and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("trained")
    save_target_with_tokenizer(folder / "target")
    for name in ("train", "validation"):
        write_rows(folder / f"{name}.jsonl", 9, seed=0)
    raw = raw_run(folder / "target", folder, folder / "run")
    train(edited(raw, {"draft.mask_token_id": MASK_TOKEN}))
    write_jsonl(folder / "prompts.jsonl", *({"prompt": f"What is {i} + <b>?"} for i in range(3)))
    return folder


def test_the_page_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(trained / "run")])
    assert capsys.readouterr().out == f"wrote {trained / 'run' / 'report.html'}\n"
    page = ParsedPage((trained / "run" / "report.html").read_text(encoding="utf-8"))
    assert f"latest checkpoint at step {STEPS}; planned {STEPS} steps" in page.text
    metrics = next(table for table in page.tables if table[0][0] == "tag")
    assert {"train/loss", "train/acc@3", "eval/acceptance_length_tf"} <= {row[0] for row in metrics}
    assert all(row[2] == str(STEPS) for row in metrics[1:])
    assert not page.answers


def test_samples_are_what_the_decoder_says(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    data = ["--data", str(trained / "prompts.jsonl"), "--samples", "2", "--max-new-tokens", str(NEW)]
    main([str(trained / "run"), "--out", str(out), *data])
    page = ParsedPage(out.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(trained / "target")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {i} + <b>?"}], add_generation_prompt=True, tokenize=False
        )
        for i in range(2)
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    models = load_target(trained / "target", dtype="float32"), load_run_draft(trained / "run")
    answer = generate(models[0], prompts, models[1], max_new_tokens=NEW, stop_token_ids=[STOP_TOKEN])
    assert ["".join(text for _, text in spans) for spans in page.answers] == tokenizer.batch_decode(answer.tokens)
    for text, rounds in zip(texts, answer.rounds, strict=True):
        assert text in page.text
        assert f"acceptance length {sum(rounds) / len(rounds):.2f}" in page.text


def test_accepted_drafts_are_marked(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft of a few steps is never right: the rounds are of a better one."""
    tokens = [40, 41, 42, 43, 44, 45, 46, 47]

    def decoded(
        target: object, prompts: list[list[int]], draft: object, *limits: int, **settings: object
    ) -> Generation:
        assert (limits, settings) == ((NEW,), {"stop_token_ids": (STOP_TOKEN,)})
        assert draft is not None
        return Generation([tokens] * len(prompts), [[3, 1, 9]] * len(prompts), 0.0, 0.0)

    monkeypatch.setattr("specjax.decoding.generate", decoded)
    out, data = tmp_path / "page.html", str(trained / "prompts.jsonl")
    main([str(trained / "run"), "--out", str(out), "--data", data, "--samples", "3", "--max-new-tokens", str(NEW)])
    page = ParsedPage(out.read_text(encoding="utf-8"))
    decode = AutoTokenizer.from_pretrained(trained / "target").decode
    cuts = [("target", 0, 1), ("draft", 1, 3), ("target", 3, 4), ("target", 4, 5), ("draft", 5, 8)]
    assert page.answers == [[(source, decode(tokens[a:b])) for source, a, b in cuts]] * 3
    assert page.text.count("acceptance length 4.33: 8 tokens in 3 rounds") == 3


@pytest.mark.parametrize("count", [1, 2, 5])
def test_held_out_prompts_for_the_embedded_target(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(Path(sysconfig.get_path("stdlib")) / "argparse.py", tmp_path)
    shutil.copy(Path(sysconfig.get_path("stdlib")) / "shutil.py", tmp_path)
    monkeypatch.setattr(embedded, "stdlib_conversations", partial(stdlib_conversations, root=tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    run = read_run(write_run(tmp_path / "run", logged=False))
    models = Models(None, None, tokenizer, ())  # type: ignore[arg-type]
    prompts = _prompts(argparse.Namespace(data=None, samples=count), run, models)
    assert len({tuple(ids) for ids in prompts.values()}) == count
    assert next(iter(prompts)) == "code, 1"
    assert count == 1 or list(prompts)[-1].startswith("word problems")


refused = partial(refusal, main)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remedy = "give the output_dir of a training run"
    assert f"{tmp_path}: has no config.yaml and no metadata.json; {remedy}" in refused([str(tmp_path)], capsys)
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.yaml").write_text("kind: dflash")
    assert f"{tmp_path}: has no metadata.json; {remedy}" in refused([str(tmp_path)], capsys)
    absent = tmp_path / "absent"
    assert f"{absent}: is no folder; {remedy}" in refused([str(absent)], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples is 0; give at least 1"),
        (["--samples", "1", "--max-new-tokens", "0"], "--max-new-tokens is 0; give at least 1"),
        (["--data", "x.jsonl"], "say how many with --samples N"),
        (["--out", "."], "--out . is a folder; give a file"),
        (["--out", "{run}/config.yaml/page.html"], "name another file with --out"),
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", logged=False)
    assert message in refused([str(run), *(a.format(run=run) for a in arguments)], capsys)


def test_samples_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, changes, message in (
        ("target", {"kind": "causal_lm", "draft": None}, "is of kind causal_lm; leave it out"),
        ("early", {"step": None}, "has saved no checkpoint yet; leave it out"),
        ("other", {"target": {"path": "some/model"}}, "for target some/model needs prompts; name them with --data"),
    ):
        run = write_run(tmp_path / name, logged=False, **changes)  # type: ignore[arg-type]
        assert message in refused([str(run), "--samples", "1"], capsys)


def test_a_broken_benchmark_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", logged=False)
    path = run / "benchmark.json"
    for content, message in (('{"decode": ', "not JSON"), ('{"decode": [1]}', "decode is not a table of reports")):
        path.write_text(content)
        error = refused([str(run)], capsys)
        assert str(path) in error
        assert message in error


def test_argument_errors_import_no_jax() -> None:
    program = (
        "import sys\n"
        "from specjax.report import main\n"
        "try:\n"
        "    main(['run', '--samples', '0'])\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 2\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
