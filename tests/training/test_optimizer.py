"""Learning-rate schedules, clipping and weight decay."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.config_sections import OptimizerConfig
from specjax.models.sharding import mesh_scope
from specjax.training.optimizer import learning_rate_schedule, make_optimizer

PEAK = 1e-3


def rates(total: int, **settings: Any) -> np.ndarray:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=PEAK, **settings), total)
    return np.array([float(schedule(step)) for step in range(total + 1)])


def test_cosine_rises_falls_and_ends_at_its_minimum() -> None:
    ours = rates(100, warmup_ratio=0.1, min_lr_ratio=0.2)
    rise = [PEAK * (step + 1) / 10 for step in range(10)]
    fall = [PEAK * (0.2 + 0.8 * (1 + math.cos(math.pi * x / 90)) / 2) for x in range(91)]
    np.testing.assert_allclose(ours, rise + fall, rtol=1e-5)


def test_wsd_stays_at_its_peak_and_falls_linearly_at_the_end() -> None:
    ours = rates(100, schedule="wsd", warmup_ratio=0.1, decay_ratio=0.3, min_lr_ratio=0.2)
    expected = [PEAK * min((s + 1) / 10, 1, 1 - 0.8 * (s - 70) / 30) for s in range(101)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert list(rates(100, schedule="wsd")) == list(rates(100, schedule="wsd", decay_ratio=0.2))


def test_linear_falls_from_the_end_of_warm_up_and_constant_does_not() -> None:
    expected = [PEAK * min((s + 1) / 10, 1 - 0.8 * (s - 10) / 90) for s in range(101)]
    np.testing.assert_allclose(rates(100, schedule="linear", warmup_ratio=0.1, min_lr_ratio=0.2), expected, rtol=1e-5)
    expected = [PEAK * min((s + 1) / 10, 1) for s in range(101)]
    np.testing.assert_allclose(rates(100, schedule="constant", warmup_ratio=0.1), expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_learn_at_every_step(schedule: str, total: int) -> None:
    ours = rates(total, schedule=schedule)[:total]
    assert ours[0] == pytest.approx(PEAK)
    assert (ours > 0).all()


def test_the_first_step_already_learns_and_warm_up_ends_at_the_peak() -> None:
    ours = rates(1000)
    assert ours[0] == pytest.approx(PEAK / 40, rel=1e-5)
    assert ours.argmax() in (39, 40)
    assert ours[39] == pytest.approx(PEAK)
    assert ours[-1] == pytest.approx(PEAK * 0.1)


def updates(config: OptimizerConfig, params: Any, gradients: list[Any]) -> Any:
    optimizer = make_optimizer(config, lambda _: config.learning_rate)
    state = optimizer.init(params)
    for grads in gradients:
        update, state = optimizer.update(grads, state, params)
    return update


def test_weight_decay_is_on_matrices_only() -> None:
    params = {"kernel": jnp.full((2, 2), 3.0), "scale": jnp.full((2,), 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    update = updates(OptimizerConfig(learning_rate=0.5, weight_decay=0.1), params, [zero])
    np.testing.assert_allclose(update["kernel"], -0.5 * 0.1 * 3.0, rtol=1e-6)
    assert not update["scale"].any()


def test_gradients_are_clipped_together_before_the_moments() -> None:
    """AdamW in NumPy, on two gradients of which the first is clipped to norm 1."""
    config = OptimizerConfig(learning_rate=0.1, betas=(0.8, 0.9), eps=1e-3)
    params = {"a": jnp.zeros((2, 1)), "b": jnp.zeros((1, 2))}
    first = np.array([3.0, 0.0, 4.0, 0.0])
    second = np.array([0.1, 0.2, 0.0, 0.4])
    trees = [{"a": jnp.asarray(g[:2, None]), "b": jnp.asarray(g[None, 2:])} for g in (first, second)]
    update = updates(config, params, trees)
    clipped = first / np.linalg.norm(first)
    mean = (0.8 * 0.2 * clipped + 0.2 * second) / (1 - 0.8**2)
    square = (0.9 * 0.1 * clipped**2 + 0.1 * second**2) / (1 - 0.9**2)
    expected = -0.1 * mean / (np.sqrt(square) + 1e-3)
    np.testing.assert_allclose(np.concatenate([update["a"].ravel(), update["b"].ravel()]), expected, rtol=1e-5)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five quintic iterations, in float64; singular values end between about 0.7 and 1.2."""
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix) / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_orthogonalises_hidden_matrices_and_leaves_the_rest_to_adam() -> None:
    settings = {"learning_rate": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.01, "clip_norm": 1e6}
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 4), "scale": (4,), "mask_embedding": (4,), "embed_tokens": (9, 4), "lm_head": (4, 9)}
    params, *grads = ({name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(3))
    with mesh_scope():
        trees = [jax.tree.map(jnp.float32, tree) for tree in (params, *grads)]
        ours = updates(OptimizerConfig(name="muon", **settings), trees[0], trees[1:])

    def nesterov(momentum: np.ndarray, last: np.ndarray, beta: float) -> np.ndarray:
        """Momentum after two steps, corrected for its start and one step ahead."""
        return beta * momentum / (1 - beta**3) + (1 - beta) * last / (1 - beta**2)

    for name, (first, second) in {n: tuple(g[n] for g in grads) for n in shapes}.items():
        beta = 0.95 if name == "kernel" else 0.8
        mean = nesterov((1 - beta) * (beta * first + second), second, beta)
        if name == "kernel":
            direction = 0.2 * np.sqrt(6) * newton_schulz(mean) + 0.01 * params[name]
        else:
            direction = mean / (np.sqrt(0.1 * (0.9 * first**2 + second**2) / (1 - 0.9**2)) + 1e-8)
        np.testing.assert_allclose(ours[name], -0.1 * direction, rtol=1e-4, atol=1e-6, err_msg=name)
