"""The script that makes the embedded target, whole, on a few files of Python and a handful of word problems."""

import dataclasses
import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from specjax.weights import flat_params, load_run_params, load_target
from specjax.weights.tokenizer import stop_token_ids

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "train_embedded_target.py"
STEPS, PROBLEMS = 2, 120
END_OF_TURN = 2


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_embedded_target", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MODEL = dataclasses.replace(
        module.MODEL, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8, layer_types=()
    )
    module.REPORT_SAMPLES = module.SAMPLE_TOKENS = 8
    return module


@pytest.fixture(scope="module")
def made(script, tmp_path_factory):
    """(arguments, work folder, out folder) of a finished run."""
    folder = tmp_path_factory.mktemp("embedded")
    code = folder / "code"
    code.mkdir()
    for name in ("argparse", "ast", "configparser", "inspect", "shutil", "statistics", "textwrap"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", code)
    work, out = folder / "work", folder / "out"
    arguments = ["--steps", str(STEPS), "--problems", str(PROBLEMS), "--code", str(code)]
    arguments += ["--work", str(work), "--out", str(out)]
    script.main(arguments)
    return arguments, work, out


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_exported_folder_is_the_trained_model_with_its_tokenizer(made, script):
    _, work, out = made
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    exported = load_target(out, dtype=jnp.bfloat16)
    assert exported.config == script.MODEL
    trained = flat_params(load_run_params(work / "run", STEPS))
    for name, value in flat_params(exported).items():
        np.testing.assert_array_equal(value, trained[name].astype(jnp.bfloat16), err_msg=name)
    assert stop_token_ids(out) == (END_OF_TURN,)
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["dtype"]) == (END_OF_TURN, 0, "bfloat16")


def test_the_corpus_learns_code_whole_and_answers_of_problems(made):
    _, work, out = made
    tokenizer = AutoTokenizer.from_pretrained(out)
    for domain, learnt_whole in (("code", True), ("problems", False), ("heldout-code", False)):
        for record in records(work / "corpus" / f"{domain}.jsonl"):
            ids, mask = np.array(record["input_ids"]), np.array(record["loss_mask"], bool)
            assert 2 < len(ids) <= 512
            assert mask.all() == learnt_whole
            text = tokenizer.decode(ids)
            prompt, answer = text.split("<|im_start|>assistant\n")
            assert prompt.startswith("<|im_start|>user\n")
            if not learnt_whole:
                assert tokenizer.decode(ids[mask]) == answer.removesuffix("\n")
                assert ids[mask][-1] == END_OF_TURN
    assert len(records(work / "corpus" / "problems.jsonl")) == PROBLEMS
    assert not (work / "corpus.partial").exists()


def test_the_config_moves_with_the_work_folder_and_repeats_the_code(script):
    config = script.run_config(Path("w"), 7, 3)
    assert (config.output_dir, config.target.path) == ("w/run", "w/corpus/model")
    assert config.data.train == (*["w/corpus/code.jsonl"] * 2, "w/corpus/problems.jsonl")
    assert config.data.validation == ("w/corpus/heldout-code.jsonl", "w/corpus/heldout-problems.jsonl")
    assert (config.training.steps, config.seed, config.data.packing) == (7, 3, True)
    assert script.run_config(script.CONFIG_WORK, None, 0) == script.load_config(script.CONFIG)


def test_an_existing_work_folder_is_only_resumed(made, script, capsys):
    arguments, work, out = made
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert f"{work} exists; continue it with --resume" in capsys.readouterr().err

    weights, corpus = (out / "model.safetensors").read_bytes(), (work / "corpus" / "code.jsonl").stat()
    (out / "model.safetensors").unlink()
    script.main([*arguments, "--resume"])
    assert (work / "corpus" / "code.jsonl").stat() == corpus
    assert (out / "model.safetensors").read_bytes() == weights
    printed = capsys.readouterr().out
    for domain in ("code", "problems"):
        assert f"held-out {domain}, answers: loss" in printed


def test_an_interrupted_run_is_not_exported(made, script, capsys, monkeypatch, tmp_path):
    _, work, _ = made
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.setattr(script, "train", lambda config, resume: Path(config.output_dir))  # stopped before its last step
    arguments = ["--steps", str(STEPS + 1), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        script.main([*arguments, "--resume"])
    assert f"has no checkpoint {STEPS + 1}; saved steps: {STEPS}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
