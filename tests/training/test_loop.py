"""The loop: how often it waits for the devices, what it does about a number that is not one, and when it compiles."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from specjax import fetch
from specjax.data.pipeline import TrainingData
from specjax.training import loop
from specjax.training.metrics import MetricsWriter
from specjax.training.step import make_train_step
from tests.training.tiny import STEPS, edited, scalars, train

COMPILED = "/jax/core/compile/backend_compile_duration"


class Watch(MetricsWriter):
    """Notes, whenever a step was handed to the devices, how many fetches and compilations there were before."""

    fetches: list[int]
    compilations: list[int]

    def advance(self, step: int) -> None:
        super().advance(step)
        self.fetches.append(fetch.count)
        self.compilations.append(sum(compilations))


compilations: list[int] = []


class OnDevice:
    """A metric that `fetch` may wait for, and nothing else."""

    fetching = False

    def __init__(self, value: jax.Array):
        self.value = value

    def copy_to_host_async(self) -> None:
        self.value.copy_to_host_async()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.block_until_ready()
        return np.asarray(self.value)

    def block_until_ready(self) -> None:
        assert OnDevice.fetching, "the loop waits for a metric outside fetch"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Watch]]:
    monkeypatch.setattr("specjax.training.run.MetricsWriter", Watch)
    monkeypatch.setattr(Watch, "fetches", [], raising=False)
    monkeypatch.setattr(Watch, "compilations", [], raising=False)

    def listen(event: str, seconds: float, **_: Any) -> None:
        compilations.append(event == COMPILED)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield Watch
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_step_is_fetched_once_and_one_step_late_and_nothing_is_compiled_after_the_first(
    raw: dict[str, Any], watch: type[Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def guarded(*args: Any) -> Any:
        step = make_train_step(*args)

        def run(*inputs: Any) -> Any:
            with jax.transfer_guard_host_to_device("disallow"):
                state, metrics = step(*inputs)
            return state, jax.tree.map(OnDevice, metrics)

        return run

    def fetched(tree: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(OnDevice, "fetching", True)
            return fetch.fetch(tree)

    monkeypatch.setattr("specjax.training.run.make_train_step", guarded)
    monkeypatch.setattr(loop, "fetch", fetched)
    before = fetch.count + 1  # whether the target's weights are finite
    train(edited(raw, {"data.validation": [], "checkpoint.every_steps": 1000}))
    # When step k has been handed over, the metrics of steps 1 .. k - 1 have been waited for, each once.
    assert [count - before for count in watch.fetches] == list(range(STEPS))
    assert fetch.count - before == STEPS
    assert watch.compilations[0] > 0
    assert watch.compilations[1:] == watch.compilations[:1] * (STEPS - 1)


def poisoned_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every batch from `step` (counted from 1) on one whose loss is not a number."""

    def poison(*args: Any) -> Any:
        run = make_train_step(*args)
        done = 0

        def poisoned(state: Any, frozen: Any, batch: Any) -> Any:
            nonlocal done
            done += 1
            state, metrics = run(state, frozen, batch)
            return state, metrics | ({"grad_norm": metrics["grad_norm"] * np.nan} if done >= step else {})

        return poisoned

    monkeypatch.setattr("specjax.training.run.make_train_step", poison)


@pytest.mark.parametrize(("step", "kept"), [(1, None), (3, 2), (4, 2), (5, 4)])
def test_a_loss_that_is_not_a_number_ends_the_run_before_it_is_saved(
    step: int,
    kept: int | None,
    raw: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poisoned_from(step, monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        train(edited(raw, {"data.validation": []}))
    error = capsys.readouterr().err
    assert f"step {step}: grad_norm is nan" in error
    assert ("of step" in error) == (kept is not None)
    checkpoints = Path(raw["output_dir"]) / "checkpoints"
    assert max((int(path.name) for path in checkpoints.iterdir()), default=None) == kept


def test_a_target_that_overflows_is_noticed(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate far too high, without a patched step."""
    with pytest.raises(SystemExit, match="2"):
        train(edited(raw, {"optimizer.learning_rate": 1e30, "optimizer.warmup_ratio": 0, "data.validation": []}))
    assert "Lower optimizer.learning_rate" in capsys.readouterr().err


def test_the_loop_resumes_at_the_position_in_the_data_that_follows(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    batches = TrainingData.batches

    def record(self: TrainingData, start_step: int = 0) -> Iterator[Any]:
        asked.append(start_step)
        return batches(self, start_step)

    monkeypatch.setattr(TrainingData, "batches", record)
    raw = edited(raw, {"data.validation": []})
    with monkeypatch.context() as patch:
        patch.setattr(loop.Interrupt, "agreed", lambda self: True)
        train(raw)
    run = train(raw, "--resume")
    assert asked == [0, 1]
    assert list(scalars(run)["train/loss"]) == list(range(1, STEPS + 1))


def test_signals_are_ours_only_during_the_loop() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with loop.Interrupt().installed() as interrupt:
        assert not interrupt.agreed()
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.agreed()
        assert {number: signal.getsignal(number) for number in handlers} == handlers  # a second one ends the process
    assert {number: signal.getsignal(number) for number in handlers} == handlers
