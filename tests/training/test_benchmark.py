"""The train benchmark's core: synthetic rows, and PyTorch's step against ours on equal weights."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.config import RunConfig
from specjax.models.sharding import mesh_scope
from specjax.training.benchmark import synthetic_batch
from specjax.training.optimizer import make_optimizer
from specjax.training.state import TrainState
from specjax.training.step import make_train_step
from specjax.training.tasks import draft_config_of, draft_task_of
from specjax.training.torch_baseline import VARIANTS, Draft
from specjax.training.torch_comparison import torch_step
from specjax.weights import read_target_config
from tests.torch_draft import TorchDraft
from tests.training.tiny import LENGTH, edited, parsed, raw_run
from tests.weights.tiny import filled, raw_config, tiny_decoder

ROWS, ANCHORS, BLOCK = 2, 6, 4
TARGET = raw_config(num_hidden_layers=4)  # two query heads a key/value head


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A draft of two layers on captured states, for a target of which there is only config.json."""
    folder = tmp_path_factory.mktemp("target")
    (folder / "config.json").write_text(json.dumps(TARGET | {"architectures": ["Qwen3ForCausalLM"]}))
    changes = {
        "draft.num_layers": 2,
        "data.taps": "nowhere",
        "data.num_anchors": ANCHORS,
        "training.batch_size": ROWS,
        "training.remat": False,
        "optimizer.weight_decay": 0.1,
        "optimizer.learning_rate": 0.01,
    }
    return parsed(edited(raw_run(folder, folder, folder), changes))


@pytest.mark.parametrize("weighting", ["exp", "dpace"])
def test_torch_and_jax_train_alike(config: RunConfig, weighting: str) -> None:
    loss = {"weighting": weighting, "gamma": 2.0 if weighting == "exp" else None}
    config = config.model_copy(update={"loss": config.loss.model_copy(update=loss)})
    with mesh_scope():
        target = tiny_decoder(TARGET)
        task = draft_task_of(config, target)
        draft = filled(task.model)
        host, batch = synthetic_batch(config, target)
        rows = host | {"states": np.asarray(batch["states"])[0]}
        theirs = {variant: torch_step(config, draft, target, variant, rows) for variant in VARIANTS}
        schedule = lambda step: jnp.full((), config.optimizer.learning_rate)  # noqa: E731 (PyTorch's has none)
        optimizer = make_optimizer(config.optimizer, schedule)
        step = make_train_step(task.loss, optimizer, schedule)
        state, expected = TrainState.create(draft, optimizer), []
        for _ in range(3):  # the second and third show that the updates are equal too
            state, metrics = step(state, target, batch)
            expected.append((float(metrics["loss_sum"] / metrics["weight"]), float(metrics["grad_norm"])))
    assert expected[0][0] != pytest.approx(expected[1][0], rel=1e-2)
    for run in theirs.values():
        for loss_and_norm in expected:
            assert run() == pytest.approx(loss_and_norm, rel=1e-4)


def test_torch_parameters_have_the_names_of_a_draft_folder(config: RunConfig) -> None:
    shape = draft_config_of(config)
    names = {name: value.shape for name, value in TorchDraft(shape).state_dict().items()}
    assert {name: value.shape for name, value in Draft(shape, "ranges").state_dict().items()} == names


def test_synthetic_rows_are_full(config: RunConfig) -> None:
    with mesh_scope():
        host, batch = synthetic_batch(config, tiny_decoder(TARGET))
    assert read_target_config(config.target.path).vocab_size > host["input_ids"].max() > 32
    assert host["loss_mask"].all()
    assert (host["document_ids"] == 1).all()
    assert host["anchor_valid"].all()
    assert (np.diff(host["anchors"], axis=1) > 0).all()
    assert batch["states"].shape == (1, ROWS, LENGTH, 3 * TARGET["hidden_size"])
    assert batch["states"].dtype == jnp.float32
    assert jax.tree.map(lambda x: x.shape[:2], batch) == dict.fromkeys(batch, (1, ROWS))


def test_too_few_candidates_leave_anchors_unused(config: RunConfig) -> None:
    crowded = config.model_copy(update={"data": config.data.model_copy(update={"num_anchors": 2 * LENGTH})})
    with mesh_scope():
        host, _ = synthetic_batch(crowded, tiny_decoder(TARGET))
    assert (host["anchor_valid"].sum(1) == LENGTH - 1).all()
