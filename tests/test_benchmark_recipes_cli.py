"""`python -m specjax.benchmark recipes`: what is trained and measured, tabled, kept from call to call, and refused.

But for the tests of `run_command` itself, the commands run in this process, where starting costs nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from converters.flax_to_hf import main as export
from specjax import recipes
from specjax.benchmark import main
from specjax.config import load_config
from specjax.recipes import CommandError, load_spec, planned_runs, run_command
from specjax.weights.orbax_checkpoint import latest_step
from specjax.weights.safetensors_files import SINGLE_FILE
from tests.model_folders import write_jsonl
from tests.refusals import refusal
from tests.training.tiny import STEPS, raw_run, save_tiny_target, train, write_rows

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "recipes" / "quickstart.yaml"
NEW, SEED, ADDED = 6, 3, 5
PLAIN = {"name": "plain", "seeds": [SEED]}
UNIFORM = {"name": "uniform", "overrides": ["loss.weighting=uniform", "loss.gamma=null"]}
BROKEN = {"name": "broken", "overrides": ["data.train=[nowhere.jsonl]"]}

Commands = list[list[str]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, data/, base.yaml, decoder.yaml of another kind, and the prompts near.jsonl and far.jsonl."""
    folder = tmp_path_factory.mktemp("recipes")
    save_tiny_target(folder / "target")
    (folder / "data").mkdir()
    for name, count, seed in (("train", 20, 0), ("validation", 12, 1)):
        write_rows(folder / "data" / f"{name}.jsonl", count, seed=seed)
    base = raw_run(folder / "target", folder / "data", folder / "base")
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    decoder = {"kind": "causal_lm", "data": {"train": base["data"]["train"]}, "training": {"steps": STEPS}}
    (folder / "decoder.yaml").write_text(yaml.safe_dump({k: base[k] for k in ("output_dir", "target")} | decoder))
    for name, start in (("near", 3), ("far", 40)):
        rows = [{"input_ids": [start + i, start + 2 * i, 7], "loss_mask": [0, 0, 0]} for i in range(2)]
        write_jsonl(folder / f"{name}.jsonl", *rows)
    return folder


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    """The commands that were run, in this process."""
    ran: Commands = []

    def here(command: list[str], log: Path, say: Any) -> None:
        ran.append(command)
        try:
            importlib.import_module(command[0]).main(command[1:])
        except SystemExit as error:
            raise CommandError(f"status {error.code} of {command[0]}") from None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "run_command", here)
        yield ran


def write_spec(sources: Path, *variants: dict[str, Any], base: str = "base.yaml", **changes: Any) -> str:
    spec = {
        "base": str(sources / base),
        "prompts": [str(sources / "near.jsonl"), str(sources / "far.jsonl")],
        "max_new_tokens": NEW,
        "capture": True,
        "variants": list(variants),
    }
    path = sources / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return str(path)


@pytest.fixture(scope="module")
def compared(sources: Path, commands: Commands) -> Path:
    """A comparison of which one run fails: the folder that it wrote."""
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        main(["recipes", write_spec(sources, BROKEN, PLAIN, UNIFORM), "--out", str(sources / "out")])
    return sources / "out"


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "recipes.json").read_text())
    return report


def cells(out: Path, variant: str) -> list[str]:
    (row,) = [line for line in (out / "recipes.md").read_text().splitlines() if line.startswith(f"| {variant} |")]
    return row.strip("| ").split(" | ")


def test_a_run_is_what_training_and_decoding_by_hand_give(compared: Path, sources: Path, tmp_path: Path) -> None:
    run = train(raw_run(sources / "target", sources / "data", tmp_path / "run"))
    export([str(run), str(tmp_path / "draft"), "--step", "best"])
    prompts = [str(sources / "near.jsonl"), str(sources / "far.jsonl")]
    models = ["--target", str(sources / "target"), "--draft", str(tmp_path / "draft")]
    options = ["--max-new-tokens", str(NEW), "--runs", "1", "--json", str(tmp_path / "direct.json")]
    main(["decode", *models, "--data", *prompts, *options])
    kept = compared / "runs" / "plain" / f"seed-{SEED}"
    assert (kept / "draft" / SINGLE_FILE).read_bytes() == (tmp_path / "draft" / SINGLE_FILE).read_bytes()
    direct = json.loads((tmp_path / "direct.json").read_text())["decode"]
    report = report_of(compared)
    (plain,) = [run for run in report["runs"] if (run["variant"], run["seed"]) == ("plain", SEED)]
    assert report["columns"] == ["all", "near", "far"]
    for column in report["columns"]:
        assert plain["acceptance_length"][column] == direct[column]["acceptance_length"]
        assert report["repeated_4grams"][column] == direct[column]["repeated_4gram_fraction"]
        assert report["prompts"][column] == direct[column]["prompts"]


def test_the_other_runs_of_a_failed_one_are_kept(compared: Path) -> None:
    report = report_of(compared)
    assert report["failed"] == {"broken, seed 0": "status 2 of specjax.capture"}
    assert "FAILED: broken, seed 0." in (compared / "recipes.md").read_text()
    assert cells(compared, "broken")[1:] == ["0", *["-"] * 5]
    assert [(run["variant"], run["seed"]) for run in report["runs"]] == [("plain", SEED), ("uniform", 0)]


def test_runs_on_the_same_data_share_its_states_and_the_best_checkpoint_is_measured(
    compared: Path, commands: Commands
) -> None:
    (taps,) = (compared / "taps").iterdir()
    by_name = {name: [c for c in commands if c[0] == name] for name in ("specjax.train", "converters.flax_to_hf")}
    assert all(f"data.taps={taps}" in command for command in by_name["specjax.train"])
    assert all(command[-2:] == ["--step", "best"] for command in by_name["converters.flax_to_hf"])
    assert [len(ran) for ran in by_name.values()] == [2, 2]


def test_a_call_that_was_stopped_is_continued_with_what_is_missing(
    compared: Path, sources: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = report_of(compared)["runs"]
    here = recipes.run_command

    def stopped(command: list[str], *rest: Any) -> None:
        if command[0] == "converters.flax_to_hf":
            raise KeyboardInterrupt
        here(command, *rest)

    call = ["recipes", write_spec(sources, PLAIN, UNIFORM | {"seeds": [0, ADDED]}), "--out", str(compared)]
    monkeypatch.setattr(recipes, "run_command", stopped)
    with pytest.raises(SystemExit, match="stopped; the same command continues"):
        main(call)
    added = compared / "runs" / "uniform" / f"seed-{ADDED}"
    assert latest_step(added) == STEPS
    saved = {path: path.stat().st_mtime_ns for path in (added / "checkpoints").rglob("*")}
    commands.clear()
    monkeypatch.setattr(recipes, "run_command", here)
    main(call)
    assert all(any(added.name in part for part in command) for command in commands)
    assert {path: path.stat().st_mtime_ns for path in (added / "checkpoints").rglob("*")} == saved
    after = report_of(compared)["runs"]
    assert [run for run in after if run["seed"] != ADDED] == before
    assert len(after) == 3


def test_a_training_that_stops_early_is_not_measured(
    sources: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "run_command", lambda *_: None)
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        main(["recipes", write_spec(sources, UNIFORM), "--out", str(tmp_path)])
    assert "training stopped at step None" in report_of(tmp_path)["failed"]["uniform, seed 0"]


refused = partial(refusal, main)


@pytest.mark.parametrize(
    ("variants", "changes", "message"),
    [
        ([PLAIN | {"override": []}], {}, "unknown key variants.0.override; did you mean variants.0.overrides"),
        ([PLAIN], {"variant": []}, "unknown key variant; did you mean variants"),
        ([{"overrides": []}], {}, "variants.0.name is missing; set"),
        ([PLAIN | {"name": "a/b"}], {}, 'variants.0.name is "a/b"'),
        ([], {}, "variants is []; give a list of at least 1"),
        ([PLAIN, PLAIN], {}, "variants has two of the name 'plain'"),
        ([PLAIN | {"seeds": [1, 1]}], {}, "variant plain: seeds [1, 1] lists one twice"),
        ([PLAIN | {"overrides": ["seed=4"]}], {}, "variant plain: overrides sets seed"),
        ([PLAIN | {"overrides": ["loss.weight=dpace"]}], {}, "unknown key loss.weight; did you mean loss.weighting"),
        (
            [UNIFORM, PLAIN | {"overrides": ["training.steps=7"]}],
            {},
            "plain trains 7 steps and uniform 6;",
        ),
        ([PLAIN | {"overrides": ["training.steps=null"]}], {}, "variant plain: training.epochs is set"),
        ([PLAIN | {"overrides": ["data.validation=[]"]}], {}, "variant plain: no validation data"),
        ([PLAIN | {"overrides": ["logging.tensorboard=false"]}], {}, "variant plain: logging.tensorboard is false"),
        ([PLAIN | {"overrides": ["data.taps=x"]}], {}, "variant plain: data.taps is set"),
        ([PLAIN], {"base": "decoder.yaml"}, "variant plain: kind is causal_lm"),
        ([UNIFORM | {"seeds": [9]}], {"prompts": ["nowhere.jsonl"]}, "prompts nowhere.jsonl: cannot be read"),
        ([UNIFORM], {"max_new_tokens": NEW + 1}, f"made with other settings: max_new_tokens is {NEW}, now {NEW + 1}"),
        ([UNIFORM | {"overrides": []}], {}, "other settings: loss.weighting is 'uniform', now 'exp'"),
    ],
)
def test_a_mistake_is_named(
    variants: list[Any],
    changes: dict[str, Any],
    message: str,
    compared: Path,
    sources: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(["recipes", write_spec(sources, *variants, **changes), "--out", str(compared)], capsys)


def test_a_command_that_fails_is_shown_with_its_error(tmp_path: Path) -> None:
    log, said = tmp_path / "log", list[str]()
    with pytest.raises(CommandError, match="cannot be read") as failed:
        run_command(["specjax.train", "nowhere.yaml", "a.b=c d"], log, said.append)
    assert said == ["python -m specjax.train nowhere.yaml 'a.b=c d'"]
    assert "status 2" in str(failed.value)
    assert log.read_text() in str(failed.value).replace("\n  ", "\n")


def test_asked_to_stop_it_waits_for_the_command_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import signal, sys, time\n"
        "def save(*_): time.sleep(0.8); print('saved', flush=True); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"

    def ask() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    before = signal.getsignal(signal.SIGTERM)
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        run_command(["sleeper"], log, lambda text: None)
    asking.join()
    assert log.read_text() == "ready\nsaved\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_variant_may_have_another_base_and_other_steps(sources: Path) -> None:
    other = yaml.safe_load((sources / "base.yaml").read_text()) | {"kind": "lora", "draft": {"block_size": 4}}
    (sources / "lora.yaml").write_text(yaml.safe_dump(other))
    lora = {"name": "lora", "base": str(sources / "lora.yaml"), "overrides": ["training.steps=9"]}
    spec = load_spec(write_spec(sources, PLAIN, lora, equal_steps=False))
    runs = planned_runs(spec, "spec", Path("out"))
    assert [(run.base, run.config.kind, run.config.training.steps) for run in runs] == [
        (str(sources / "base.yaml"), "dflash", STEPS),
        (str(sources / "lora.yaml"), "lora", 9),
    ]


def test_the_quickstarts_recipes_are_one_comparison() -> None:
    spec = load_spec(CONFIG)
    runs = planned_runs(spec, str(CONFIG), Path("out"))
    base = load_config(spec.base)
    assert {run.config.training.steps for run in runs} == {base.training.steps}
    assert spec.embedded_data is not None
    assert {Path(path).parent.parent for path in spec.prompts} == {Path(base.data.weighted_sources[0][0]).parent}
