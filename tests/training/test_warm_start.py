"""A draft that starts from another draft computes what that one does, whatever layers were added, and then learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.errors import InputError
from specjax.models.dflash import DFlashDraft
from specjax.models.precision import matmul_precision
from specjax.models.sharding import make_mesh
from specjax.training.tasks import draft_config_of, draft_task
from specjax.weights import flat_params, load_draft, load_run_draft, save_draft
from tests.training.conftest import FinishedRun
from tests.training.tiny import LENGTH, MASK_TOKEN, edited, parsed, train


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with jax.set_mesh(make_mesh()), matmul_precision(jnp.float32):
        yield


@pytest.fixture
def exported(finished_run: FinishedRun, tmp_path: Path) -> Path:
    return save_draft(load_run_draft(finished_run.folder), tmp_path / "draft", fingerprint=None)


def hidden(draft: DFlashDraft, block_size: int) -> np.ndarray:
    """What the draft makes of a block of random noise after a random context."""
    taps, noise = (
        jax.random.normal(jax.random.key(i), (2, *shape))
        for i, shape in enumerate([(LENGTH, draft.fc.kernel.shape[0]), (1, block_size, draft.config.hidden_size)])
    )
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))
    start, stop = jnp.zeros((2, 1), jnp.int32), jnp.full((2, 1), 7, jnp.int32)
    return np.asarray(draft(noise, draft.context_kv(draft.context(taps), positions), start, stop))


@pytest.mark.parametrize(("layers", "block_size"), [(1, 4), (3, 4), (2, 6)])
def test_it_computes_what_it_started_from(
    layers: int, block_size: int, raw: dict[str, Any], exported: Path, finished_run: FinishedRun
) -> None:
    float32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    sources = {exported: load_draft(exported, **float32), finished_run.folder: load_run_draft(finished_run.folder)}
    for source, old in sources.items():
        changes = {"draft.init": str(source), "draft.num_layers": layers, "draft.block_size": block_size, "seed": 9}
        draft = draft_task(parsed(edited(raw, changes))).model
        assert isinstance(draft, DFlashDraft)
        assert (draft.config.num_hidden_layers, draft.config.block_size) == (layers, block_size)
        np.testing.assert_allclose(hidden(draft, block_size), hidden(old, block_size), rtol=1e-6, atol=1e-6)
        assert {x.dtype for x in jax.tree.leaves(draft)} == {jnp.dtype(jnp.float32)}


def test_added_layers_learn(raw: dict[str, Any], exported: Path) -> None:
    run = train(edited(raw, {"draft.init": str(exported), "draft.num_layers": 2, "data.validation": []}))
    params = flat_params(load_run_draft(run))
    for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", "mlp.up_proj"):
        assert np.abs(params[f"layers.1.{name}.kernel"]).max() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft.target_layer_ids": [0, 2]}, "target_layer_ids is [2, 0], here [0, 2]"),
        ({"draft.mask_token_id": MASK_TOKEN - 1}, f"mask_token_id is {MASK_TOKEN}, here {MASK_TOKEN - 1}"),
        ({"draft.sliding_window": 5}, "sliding_window is None, here 5"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, raw: dict[str, Any], exported: Path
) -> None:
    with pytest.raises(InputError) as refused:
        draft_config_of(parsed(edited(raw, {"draft.init": str(exported)} | changes)))
    assert str(refused.value).startswith(f"draft.init {exported} does not fit: {message}")


def test_a_folder_without_a_draft_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"draft.init: {tmp_path}/config.json: no such file.*a run, or a hub id"):
        draft_config_of(parsed(edited(raw, {"draft.init": str(tmp_path)})))


def test_layers_can_only_be_added(raw: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    two = parsed(edited(raw, {"draft.init": str(exported), "draft.num_layers": 2}))
    folder = save_draft(draft_task(two).model, tmp_path / "two", fingerprint=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_layers is 2, here 1; it can only grow"):
        draft_config_of(parsed(edited(raw, {"draft.init": str(folder)})))
