"""The jitted step: what it computes, what it leaves alone, and what the compiled program holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.sharding import BATCH, make_mesh
from specjax.training.data import open_data
from specjax.training.loop import to_device
from specjax.training.objectives import BlockDiffusionLoss
from specjax.training.optimizer import learning_rate_schedule, make_optimizer
from specjax.training.run import read_data
from specjax.training.state import TrainState
from specjax.training.step import make_train_step
from specjax.training.tasks import draft_config_of, draft_task
from specjax.weights import decoder_config_from_hf, flat_params
from specjax.weights.module_params import abstract_module
from tests.training.tiny import TARGET_SHAPE, VOCABULARY, edited, parsed
from tests.weights.tiny import raw_config

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


class Trainer(NamedTuple):
    state: TrainState[Any]
    frozen: Decoder
    step: Any
    batches: list[dict[str, jax.Array]]


def trainer(raw: dict[str, Any], steps: int = 1, **changes: Any) -> Trainer:
    """What a run of `raw` trains with, on the mesh in force."""
    config = parsed(edited(raw, {name.replace("__", "."): value for name, value in changes.items()}))
    task = draft_task(config)
    data, _ = read_data(config, task, open_data(config))
    schedule = learning_rate_schedule(config.optimizer, 10)
    optimizer = make_optimizer(config.optimizer, schedule)
    batches = [to_device(data.batch(i), config.training.accumulation_steps) for i in range(steps)]
    decay = config.optimizer.ema_decay
    state = TrainState.create(task.model, optimizer, averages=decay is not None)
    return Trainer(state, task.frozen, make_train_step(task.loss, optimizer, schedule, decay), batches)


def run(given: Trainer) -> tuple[TrainState[Any], list[dict[str, np.ndarray]]]:
    state, metrics = given.state, []
    for batch in given.batches:
        state, step_metrics = given.step(state, given.frozen, batch)
        metrics.append(jax.device_get(step_metrics))
    return state, metrics


def host_params(state: TrainState[Any]) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in flat_params(state.model).items()}


@pytest.fixture
def one_device() -> Iterator[None]:
    with jax.set_mesh(make_mesh()):
        yield


@pytest.mark.usefixtures("one_device")
def test_a_step_does_not_depend_on_how_the_batch_is_split(raw: dict[str, Any]) -> None:
    results = []
    for count in (1, 2, 4):
        # Micro-batches of unequal weight, so that a mean of means would differ from the mean.
        state, (metrics, again) = run(trainer(raw, 2, training__accumulation_steps=count))
        results.append((metrics | {f"second {k}": v for k, v in again.items()}, host_params(state)))
    (metrics, params), *others = results
    assert metrics["grad_norm"] > 1.0  # clipping sees the norm of the whole batch
    for other_metrics, other_params in others:
        for name, value in metrics.items():
            np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)
        for name, value in params.items():
            np.testing.assert_allclose(other_params[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


@pytest.mark.usefixtures("one_device")
def test_masters_are_float32_and_every_one_moves_under_bfloat16_compute(raw: dict[str, Any]) -> None:
    """A bfloat16 norm scale at 1.0 cannot move at this learning rate: its neighbours are 2^-8 away."""
    given = trainer(raw, target__dtype="bfloat16", optimizer__learning_rate=1e-4)
    before, target_before = host_params(given.state), jax.device_get(jax.tree.leaves(given.frozen))
    inputs = given.state
    assert inputs.model.dtype == given.frozen.dtype == jnp.bfloat16
    state, (metrics,) = run(given)
    for name, value in flat_params(state.model).items():
        assert value.dtype == jnp.float32, name
        moved = np.abs(np.asarray(value) - before[name])
        assert 0 < moved.max() < 2e-4, name
    assert np.isfinite(metrics["loss_sum"])
    assert int(state.step) == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(inputs))  # donated
    target_after = jax.device_get(jax.tree.leaves(given.frozen))
    assert [x.tobytes() for x in target_after] == [x.tobytes() for x in target_before]
    size = sum(value.size for value in before.values())
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.float32)
    assert moments == 2 * size  # none of the target's


@pytest.mark.usefixtures("one_device")
def test_the_average_follows_the_parameters(raw: dict[str, Any]) -> None:
    given = trainer(raw, 3, optimizer__ema_decay=0.15)
    state, expected = given.state, host_params(given.state)
    for step, batch in enumerate(given.batches):
        state, _ = given.step(state, given.frozen, batch)
        decay = min(0.15, (1 + step) / (10 + step))  # 0.1, then 0.15
        expected = {name: decay * expected[name] + (1 - decay) * x for name, x in host_params(state).items()}
    assert state.average is state.result
    for name, value in flat_params(state.average).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("one_device")
def test_a_batch_without_supervision_has_no_gradient(raw: dict[str, Any]) -> None:
    given = trainer(raw)
    before = host_params(given.state)
    batch = given.batches[0] | {"loss_mask": jnp.zeros_like(given.batches[0]["loss_mask"])}
    state, (metrics,) = run(given._replace(batches=[batch]))
    assert metrics["weight"] == metrics["grad_norm"] == 0
    assert all(np.array_equal(value, before[name]) for name, value in host_params(state).items())


@pytest.fixture(scope="module")
def one_device_losses() -> dict[str, np.ndarray]:
    return {}


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_ten_steps_give_the_same_losses_on_every_mesh(
    shape: tuple[int, int, int], raw: dict[str, Any], one_device_losses: dict[str, np.ndarray]
) -> None:
    def losses() -> np.ndarray:
        given = trainer(raw, 10, draft__mask_embedding="own", draft__mask_token_id=VOCABULARY + 9)
        return np.array([m["loss_sum"] / m["weight"] for m in run(given)[1]])

    if not one_device_losses:
        with jax.set_mesh(make_mesh()):
            one_device_losses["losses"] = losses()
    with jax.set_mesh(make_mesh(*shape)):
        np.testing.assert_allclose(losses(), one_device_losses["losses"], rtol=1e-5)


def test_muon_gives_the_same_losses_on_a_mesh(raw: dict[str, Any]) -> None:
    settings = {"optimizer__name": "muon", "optimizer__learning_rate": 6e-4}
    losses = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])):
            given = trainer(raw, 3, **settings)
            before = [jax.typeof(x).sharding for x in jax.tree.leaves(given.state)]
            state, metrics = run(given)
            assert [jax.typeof(x).sharding for x in jax.tree.leaves(state)] == before
        losses.append([m["loss_sum"] / m["weight"] for m in metrics])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_moment_is_sharded_like_its_parameter(optimizer: str, raw: dict[str, Any]) -> None:
    with jax.set_mesh(make_mesh(2, 2, 2)):
        state = trainer(raw, optimizer__name=optimizer).state
    params = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.model)}
    moments: dict[str, int] = dict.fromkeys(params, 0)
    for path, moment in jax.tree_util.tree_leaves_with_path(state.opt_state):
        if moment.ndim and "ns_coeffs" not in jax.tree_util.keystr(path):
            name = max((name for name in params if jax.tree_util.keystr(path).endswith(name)), key=len)
            assert moment.shape == params[name].shape, name
            assert moment.sharding.is_equivalent_to(params[name].sharding, moment.ndim), name
            moments[name] += 1
    assert set(moments.values()) == ({2} if optimizer == "adamw" else {1, 2})


def test_a_step_compiles_once_and_takes_nothing_from_the_host(raw: dict[str, Any]) -> None:
    with jax.set_mesh(make_mesh(2, 2, 2)):
        given = trainer(raw, 3)
        with jax.transfer_guard_host_to_device("disallow"):
            state, _ = run(given)
        assert given.step._cache_size() == 1
        text = given.step.lower(state, given.frozen, given.batches[0]).compile().as_text()
        assert "all-reduce" in text
        assert "callback" not in text


def compiled_step_bytes(raw: dict[str, Any], chunk_blocks: int) -> int:
    """Temporary bytes of a compiled step whose target has 32768 words; nothing of it is allocated."""
    config = parsed(edited(raw, {"loss.chunk_blocks": chunk_blocks}))
    target_config = decoder_config_from_hf(raw_config(**TARGET_SHAPE, vocab_size=BIG_VOCABULARY), "big")
    draft_config = draft_config_of(config)
    loss = BlockDiffusionLoss({"ce": 1.0}, "uniform", None, None, True, chunk_blocks, query_chunk=64, remat=True)
    optimizer = make_optimizer(config.optimizer, lambda count: 1e-3 * count)

    def state() -> TrainState[DFlashDraft]:
        return TrainState.create(DFlashDraft(draft_config, rngs=nnx.Rngs(0), dtype=jnp.float32), optimizer)

    with jax.set_mesh(make_mesh()):
        target = abstract_module(lambda: Decoder(target_config, rngs=nnx.Rngs(0), dtype=jnp.float32))
        rows = NamedSharding(jax.sharding.get_mesh(), P(None, BATCH))
        integers = jax.ShapeDtypeStruct((1, 2, BLOCKS), jnp.int32, sharding=rows)
        flags = jax.ShapeDtypeStruct((1, 2, BLOCKS), jnp.bool, sharding=rows)
        batch = dict.fromkeys(("input_ids", "document_ids", "anchors"), integers)
        batch |= dict.fromkeys(("loss_mask", "anchor_valid"), flags)
        step = make_train_step(loss, optimizer, lambda count: 1e-3 * count)
        return step.lower(nnx.eval_shape(state), target, batch).compile().memory_analysis().temp_size_in_bytes


BIG_VOCABULARY, BLOCKS = 32768, 64


def test_the_logits_of_all_blocks_never_exist_together(raw: dict[str, Any]) -> None:
    all_logits = 2 * BLOCKS * 3 * BIG_VOCABULARY * 4
    assert compiled_step_bytes(raw, BLOCKS) > all_logits  # what the other line would see
    assert compiled_step_bytes(raw, 4) < all_logits / 2
