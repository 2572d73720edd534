from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.models.sharding import mesh_scope
from specjax.training.loop import Loop
from specjax.weights import flat_params, save_target
from tests.training.block_reference import Case, make_case
from tests.training.tiny import TARGET_SHAPE, VOCABULARY, raw_run, save_tiny_target, train, write_rows
from tests.weights.tiny import raw_config, tiny_decoder


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


@pytest.fixture(scope="module")
def one_device_mesh() -> Iterator[None]:
    with mesh_scope():
        yield


@pytest.fixture(scope="session")
def few_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that mostly says one of four tokens: a random draft is then right often enough to be measured."""
    with mesh_scope():
        decoder = tiny_decoder(raw_config(**TARGET_SHAPE))
        decoder.lm_head.kernel[...] *= jnp.where(jnp.arange(VOCABULARY) < 4, 4.0, 1.0)
        return save_target(decoder, tmp_path_factory.mktemp("few_words"), jnp.float32)


@pytest.fixture(scope="session")
def rows_case(few_words: Path) -> Case:
    """A random draft for `few_words`, and the rows of `block_reference`."""
    with mesh_scope():
        return make_case(few_words)
