"""Which checkpoints stay, what they hold, and what is made of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from converters.flax_to_hf import main as flax_to_hf
from specjax.models.layers import RMSNorm
from specjax.models.sharding import mesh_scope
from specjax.training.checkpoints import Checkpoints
from specjax.training.state import TrainState
from specjax.weights import flat_params, load_draft, load_run_params, read_draft_config, read_fingerprint
from tests.training.conftest import FinishedRun
from tests.training.tiny import MASK_TOKEN, STEPS, scalars

OPTIMIZER = optax.adam(0.1)


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with mesh_scope():
        yield


def state_at(step: int) -> TrainState[RMSNorm]:
    """A state whose every array tells its step."""
    state = TrainState.create(RMSNorm(4, 1e-6, param_dtype=jnp.float32), OPTIMIZER)
    return jax.tree.map(lambda x: x * 0 + step, state)


def saved(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def fill(run: Path, scores: dict[int, float | None], **keep: int) -> list[int]:
    with Checkpoints(run, **keep) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(state_at(step), step, score)
            assert checkpoints.latest_step == step
    return saved(run)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: None, 4: 0.5, 5: 0.2, 6: None}
    assert fill(tmp_path / "a", scores, keep_last=1, keep_best=2) == [2, 4, 6]
    assert fill(tmp_path / "b", scores, keep_last=2, keep_best=1) == [2, 5, 6]
    assert fill(tmp_path / "c", scores, keep_last=2, keep_best=0) == [5, 6]


def test_the_best_of_an_earlier_process_is_kept(tmp_path: Path) -> None:
    fill(tmp_path, {1: 0.1, 2: 0.9}, keep_last=1, keep_best=1)
    assert fill(tmp_path, {3: 0.2, 4: 0.3, 5: None}, keep_last=1, keep_best=1) == [2, 5]


def test_a_state_comes_back_whole_and_may_be_donated_while_it_is_written(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=3, keep_best=0) as checkpoints:
        for step in (1, 2):
            state = state_at(step)
            checkpoints.save(state, step)
            jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 7, s), donate_argnums=0)(state))
        checkpoints.save(state_at(9), 2)  # a step that is saved already stays as it is
        checkpoints.wait()
        for wanted, step in ((2, None), (1, 1)):
            restored = checkpoints.restore(state_at(0), step)
            leaves, expected = jax.tree.leaves(restored), jax.tree.leaves(state_at(wanted))
            assert [(x.dtype, x.shape) for x in leaves] == [(x.dtype, x.shape) for x in expected]
            assert all((np.asarray(x) == wanted).all() for x in leaves)
            assert int(restored.step) == wanted


def test_what_a_killed_save_leaves_behind_does_not_count(tmp_path: Path) -> None:
    fill(tmp_path, {1: None, 2: None}, keep_last=2, keep_best=0)
    folder = tmp_path / "checkpoints"
    # Orbax writes into such a folder and renames it when everything is there.
    torn = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", torn)
    with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        assert checkpoints.latest_step == 2
        assert int(checkpoints.restore(state_at(0)).step) == 2
        checkpoints.save(state_at(3), 3)
    assert saved(tmp_path) == [2, 3]


def test_a_run_keeps_the_checkpoints_its_config_asks_for(finished_run: FinishedRun) -> None:
    scores = scalars(finished_run.folder)["eval/acceptance_length_tf"]
    assert set(scores) == {3, STEPS}
    best = max(scores, key=lambda step: (scores[step], step))
    assert set(saved(finished_run.folder)) == {4, STEPS, best}


def test_the_trained_parameters_are_what_is_loaded_and_exported(finished_run: FinishedRun, tmp_path: Path) -> None:
    loaded = flat_params(load_run_params(finished_run.folder))
    flax_to_hf([str(finished_run.folder), str(tmp_path / "hf"), "--format", "zlab"])
    exported = flat_params(load_draft(tmp_path / "hf", dtype=jnp.float32))
    assert list(loaded) == list(exported) == list(finished_run.params)
    for name, value in finished_run.params.items():
        assert np.array_equal(np.asarray(loaded[name]), value), name
        assert np.array_equal(np.asarray(exported[name]), value.astype(jnp.bfloat16).astype(np.float32)), name
    config = read_draft_config(tmp_path / "hf")
    assert (config.mask_token_id, config.target_layer_ids, config.block_size) == (MASK_TOKEN, (2, 0), 4)
    assert read_fingerprint(tmp_path / "hf") == read_fingerprint(finished_run.folder) is not None
