"""A draft that embeds MASK itself: where its vector starts, that it learns, and that every file carries it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from converters import flax_to_hf
from specjax.models.sharding import make_mesh
from specjax.training.tasks import draft_task
from specjax.weights import flat_params, load_draft, load_run_draft
from tests.training.test_resume import assert_same_run
from tests.training.tiny import STEPS, VOCABULARY, edited, parsed, raw_run, train

OWN = {"draft.mask_embedding": "own", "draft.mask_token_id": None, "optimizer.ema_decay": 0.9}


@pytest.fixture(scope="module")
def run(target_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its target has no tokenizer, so that every row may be a token and MASK comes after them."""
    raw = raw_run(target_folder, data_folder, tmp_path_factory.mktemp("own") / "run")
    return train(edited(raw, OWN | {"data.validation": []}))


def mean_row(target: Path) -> np.ndarray:
    return load_file(target / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64).mean(0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_it_starts_as_the_mean_of_the_targets_rows(
    shape: tuple[int, int, int], raw: dict[str, Any], target_folder: Path
) -> None:
    with jax.set_mesh(make_mesh(*shape)):
        params = flat_params(draft_task(parsed(edited(raw, OWN))).model)
        assert params["mask_embedding"].dtype == jnp.float32
        np.testing.assert_allclose(params["mask_embedding"], mean_row(target_folder), rtol=1e-5, atol=1e-7)
        assert params["mask_embedding"].sharding.is_fully_replicated


def test_it_learns_with_the_rest_and_is_exported(run: Path, target_folder: Path, tmp_path: Path) -> None:
    draft = load_run_draft(run)
    assert draft.config.mask_token_id == VOCABULARY
    row = np.asarray(flat_params(draft)["mask_embedding"])
    moved = np.abs(row - mean_row(target_folder))
    assert moved.min() > 1e-5
    assert moved.max() < 6e-4 * STEPS
    flax_to_hf.main([str(run), str(tmp_path / "draft")])
    saved = torch.load(tmp_path / "draft" / "mask_embedding.pt", weights_only=True)
    assert saved["mask_token_id"] == VOCABULARY
    assert torch.equal(saved["embedding"], torch.tensor(row).bfloat16())
    exported = load_draft(tmp_path / "draft", dtype=jnp.float32)
    assert exported.config == draft.config
    np.testing.assert_array_equal(flat_params(exported)["mask_embedding"], saved["embedding"].float().numpy())


def test_a_resumed_run_goes_on_with_it(run: Path, raw: dict[str, Any]) -> None:
    """Its average too: the run is the uninterrupted one, bit for bit."""
    copied = Path(raw["output_dir"])
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "checkpoints" / str(STEPS))
    train(edited(raw, OWN | {"data.validation": []}), "--resume")
    assert_same_run(copied, {name: np.asarray(x) for name, x in flat_params(load_run_draft(run)).items()})
