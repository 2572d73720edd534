from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from specjax.training.loop import Loop
from specjax.weights import flat_params
from tests.training.tiny import raw_run, save_tiny_target, train, write_rows


class FinishedRun(NamedTuple):
    """folder: the run's; params: what it had in memory at the end."""

    folder: Path
    params: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", 20, seed=0)
    write_rows(folder / "validation.jsonl", 12, seed=1)
    return folder


@pytest.fixture
def raw(target_folder: Path, data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The config of a run of its own, under `tmp_path`."""
    return raw_run(target_folder, data_folder, tmp_path / "run")


@pytest.fixture(scope="session")
def finished_run(
    target_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FinishedRun]:
    """An uninterrupted run of the config `raw`. Tests read it and must leave it as it is."""
    params: dict[str, np.ndarray] = {}
    original = Loop.run

    def run(self: Loop[Any], *args: Any) -> Any:
        state = original(self, *args)
        params.update({name: np.array(x) for name, x in flat_params(state.model).items()})
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "run", run)
        folder = train(raw_run(target_folder, data_folder, tmp_path_factory.mktemp("finished") / "run"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    yield FinishedRun(folder, params)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
