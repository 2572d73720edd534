"""The block loss and its gradients against NumPy float64, finite differences, and the compiler's memory figures."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.blockdiff.losses import BlockLoss, block_loss
from specjax.blockdiff.weightings import dpace_weights, position_weights
from specjax.models.sharding import SPECS, make_mesh, put
from tests.blockdiff.reference import ReferenceLoss, reference_loss

ROWS, N, B, D, V = 8, 5, 6, 16, 32
SETTINGS = {"exp": {"gamma": 3.0}, "uniform": {}, "dpace": {"alpha": 0.3}}
SPECS_IN_ORDER = (SPECS.act_bNBd, SPECS.head_dv, SPECS.act_bNB, SPECS.act_bNB)


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states that often predict the label; masks cut short, with holes, empty; exact ties for the argmax."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, (ROWS, N, B)).astype(np.int32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    hidden = (rng.normal(size=(ROWS, N, B, D)) + 0.35 * head.T[labels]).astype(np.float32)
    length = rng.integers(0, B, (ROWS, N, 1))
    mask = (np.arange(B) <= length) & (np.arange(B) > 0)
    mask[0] = rng.random((N, B)) < 0.6  # the non-cumulative rule leaves holes, and slot 0 must not count
    hidden[0] += 2 * head.T[labels[0]]  # right before and behind a hole
    mask[1, 0] = mask[1, 1] = True
    hidden[1, 0, 1:3] = hidden[1, 1, 1] = 0.0  # all logits equal: the lowest id is the argmax
    labels[1, 0, 1:3], labels[1, 1, 1] = 0, V - 1
    mask[2] = False
    return hidden, head, labels, mask


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with jax.set_mesh(make_mesh()):
        yield


def reference(inputs: tuple[np.ndarray, ...], weighting: str) -> ReferenceLoss:
    return reference_loss(*inputs, weighting, next(iter(SETTINGS[weighting].values()), None))


def loss_and_gradients(
    inputs: tuple[np.ndarray, ...], weighting: str, chunk_blocks: int
) -> tuple[BlockLoss, jax.Array, jax.Array]:
    def loss_sum(*arguments: jax.Array) -> tuple[jax.Array, BlockLoss]:
        out = block_loss(*arguments, weighting=weighting, chunk_blocks=chunk_blocks, **SETTINGS[weighting])
        return out.loss_sum, out

    arguments = [put(x, spec) for x, spec in zip(inputs, SPECS_IN_ORDER, strict=True)]
    (_, out), grads = jax.jit(jax.value_and_grad(loss_sum, (0, 1), has_aux=True))(*arguments)
    return out, *grads


def assert_equals_reference(
    result: tuple[BlockLoss, jax.Array, jax.Array], expected: ReferenceLoss, tolerance: float
) -> None:
    out, hidden_grad, head_grad = result
    for name in ("loss_sum", "weight_sum"):
        np.testing.assert_allclose(getattr(out, name), getattr(expected, name), rtol=tolerance)
    for name in ("correct_k", "supervised_k", "prefix_sum", "blocks"):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(hidden_grad, expected.hidden_grad, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(head_grad, expected.head_grad, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("weighting", SETTINGS)
def test_values_and_gradients_equal_float64_loops(inputs: tuple[np.ndarray, ...], weighting: str):
    expected = reference(inputs, weighting)
    # The data reach every case: right and wrong slots, unfinished and finished prefixes, empty blocks.
    assert 0 < expected.correct_k.sum() < expected.supervised_k.sum()
    assert expected.blocks < expected.prefix_sum < expected.blocks * B
    assert expected.blocks < ROWS * N
    assert_equals_reference(loss_and_gradients(inputs, weighting, chunk_blocks=2), expected, 1e-6)


@pytest.mark.parametrize("chunk_blocks", [1, 3, 5, 64])
def test_chunks_do_not_matter(inputs: tuple[np.ndarray, ...], chunk_blocks: int):
    assert_equals_reference(loss_and_gradients(inputs, "dpace", chunk_blocks), reference(inputs, "dpace"), 1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_every_mesh_gives_the_same_values(inputs: tuple[np.ndarray, ...], shape: tuple[int, int, int]):
    for weighting in ("dpace", "exp"):
        with jax.set_mesh(make_mesh(*shape)):
            result = loss_and_gradients(inputs, weighting, chunk_blocks=2)
        assert_equals_reference(result, reference(inputs, weighting), 1e-5)


def test_a_sharded_vocabulary_is_never_gathered(inputs: tuple[np.ndarray, ...]):
    def loss_sum(*arguments: jax.Array) -> jax.Array:
        return block_loss(*arguments, weighting="dpace", chunk_blocks=2).loss_sum

    with jax.set_mesh(make_mesh(1, 1, 8)):
        arguments = [put(x, spec) for x, spec in zip(inputs, SPECS_IN_ORDER, strict=True)]
        program = jax.jit(jax.grad(loss_sum)).lower(*arguments).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program


def test_bfloat16_inputs_give_float32_sums(inputs: tuple[np.ndarray, ...]):
    hidden, head, labels, mask = inputs
    rounded = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    out, hidden_grad, head_grad = loss_and_gradients((*rounded, labels, mask), "exp", chunk_blocks=1)
    expected = reference_loss(*(np.asarray(x, np.float64) for x in rounded), labels, mask, "exp", 3.0)
    assert out.loss_sum.dtype == jnp.float32
    assert hidden_grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.loss_sum, expected.loss_sum, rtol=1e-5)  # logits rounded to bf16 are off by 1e-3
    error = np.linalg.norm(head_grad.astype(jnp.float32) - expected.head_grad) / np.linalg.norm(expected.head_grad)
    assert error < 0.0025  # one rounding, not one a chunk


def central_difference(function: jax.stages.Wrapped, x: jax.Array, direction: jax.Array, step: float = 1e-5) -> float:
    return float((function(x + step * direction) - function(x - step * direction)) / (2 * step))


@pytest.mark.parametrize("weighting", ["exp", "uniform"])
def test_gradient_equals_finite_differences(inputs: tuple[np.ndarray, ...], weighting: str):
    with jax.enable_x64(True):
        hidden, head = (jnp.asarray(x, jnp.float64) for x in inputs[:2])

        @jax.jit
        def loss_sum(hidden: jax.Array) -> jax.Array:
            out = block_loss(hidden, head, *inputs[2:], weighting=weighting, chunk_blocks=2, **SETTINGS[weighting])
            return out.loss_sum

        direction = jax.random.normal(jax.random.key(0), hidden.shape, jnp.float64)
        slope = float((jax.grad(loss_sum)(hidden) * direction).sum())
        assert slope == pytest.approx(central_difference(loss_sum, hidden, direction), rel=1e-8)


def test_dpace_without_smoothing_climbs_the_expected_prefix_length(inputs: tuple[np.ndarray, ...]):
    """With alpha 0 the weights make the gradient that of -sum_j prod_{i<=j} q_i (arXiv 2605.18810)."""
    hidden, head, labels, mask = inputs
    with jax.enable_x64(True):
        hidden, head = jnp.asarray(hidden, jnp.float64), jnp.asarray(head, jnp.float64)
        supervised = jnp.asarray(mask[:, :, 1:])

        def loss_sum(hidden: jax.Array) -> jax.Array:
            return block_loss(hidden, head, labels, mask, weighting="dpace", alpha=0.0, chunk_blocks=2).loss_sum

        @jax.jit
        def negative_prefix_length(hidden: jax.Array) -> jax.Array:
            law = jax.nn.softmax(hidden[:, :, 1:] @ head, axis=-1)
            q = jnp.take_along_axis(law, labels[:, :, 1:, None], axis=-1)[..., 0]
            return -jnp.where(supervised, jnp.cumprod(jnp.where(supervised, q, 1.0), axis=-1), 0.0).sum()

        direction = jax.random.normal(jax.random.key(1), hidden.shape, jnp.float64)
        slope = float((jax.jit(jax.grad(loss_sum))(hidden) * direction).sum())
        assert slope == pytest.approx(central_difference(negative_prefix_length, hidden, direction), rel=1e-7)


@pytest.mark.parametrize("of_head", [False, True])
def test_logits_of_all_blocks_never_exist(of_head: bool):
    """Compiled memory stays near the chunk's, far below one [b, N * B, v] array, forward and backward."""
    b, n, block_size, d, v, chunk = 2, 64, 8, 32, 4096, 4
    shapes = (((b, n, block_size, d), jnp.float32), ((d, v), jnp.float32))
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    arguments += [jax.ShapeDtypeStruct((b, n, block_size), dtype) for dtype in (jnp.int32, jnp.bool)]

    def loss_sum(*arguments: jax.Array) -> jax.Array:
        return block_loss(*arguments, weighting="dpace", chunk_blocks=chunk).loss_sum

    argnums = (0, 1) if of_head else 0
    memory = jax.jit(jax.grad(loss_sum, argnums)).lower(*arguments).compile().memory_analysis()
    every_logit = 4 * b * n * block_size * v
    assert memory.temp_size_in_bytes < every_logit / 4
    chunk_logits = every_logit * chunk // n
    assert memory.temp_size_in_bytes < 3 * chunk_logits + 2 * of_head * 4 * d * v + 2**20


@pytest.mark.parametrize(("of_head", "products"), [(False, 2), (True, 3)])
def test_logits_are_computed_once(of_head: bool, products: int):
    """The compiler counts one product with the head for the value and one for each gradient that is asked for."""
    shapes = ((2, 8, 8, 64), jnp.float32), ((64, 2048), jnp.float32), ((2, 8, 8), jnp.int32), ((2, 8, 8), jnp.bool)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss_sum(*arguments: jax.Array) -> jax.Array:
        return block_loss(*arguments, weighting="uniform", chunk_blocks=8).loss_sum

    gradient = jax.jit(jax.value_and_grad(loss_sum, (0, 1) if of_head else 0)).lower(*arguments).compile()
    product = 2 * 64 * 2048 * 2 * 8 * 7
    assert gradient.cost_analysis()["flops"] == pytest.approx(products * product, rel=0.25)


def test_gradients_are_those_of_a_scaled_loss(inputs: tuple[np.ndarray, ...]):
    hidden, head, labels, mask = (jnp.asarray(x) for x in inputs)

    def loss_sum(hidden: jax.Array, head: jax.Array, scale: float) -> jax.Array:
        return scale * block_loss(hidden, head, labels, mask, weighting="uniform", chunk_blocks=2).loss_sum

    gradients = jax.jit(jax.grad(loss_sum, (0, 1)))
    for once, scaled in zip(gradients(hidden, head, 1.0), gradients(hidden, head, -3.0), strict=True):
        np.testing.assert_allclose(scaled, -3 * once, rtol=1e-5, atol=1e-5)


def test_position_weights():
    np.testing.assert_allclose(position_weights("exp", 4, 2.0), [0, 1, np.exp(-0.5), np.exp(-1.0)], rtol=1e-6)
    np.testing.assert_array_equal(position_weights("uniform", 4), [0, 1, 1, 1])


def test_dpace_weights_leave_out_unsupervised_slots():
    probability = jnp.array([0.5, 0.9, 0.25, 0.8])
    mask = jnp.array([True, False, True, False])
    s_1, s_3 = 0.75, 0.625  # a = 0.5
    np.testing.assert_allclose(dpace_weights(probability, mask), [s_1 + s_1 * s_3, 0, s_1 * s_3, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "dpace", "gamma": 4.0}, "gamma is 4.0, but weighting 'dpace' ignores it"),
        ({"weighting": "uniform", "gamma": 4.0}, "gamma is 4.0, but weighting 'uniform' ignores it"),
        ({"weighting": "uniform", "alpha": 0.5}, "alpha is 0.5, but weighting 'uniform' ignores it"),
        ({"weighting": "exp", "gamma": 4.0, "alpha": 0.5}, "alpha is 0.5, but weighting 'exp' ignores it"),
        ({"weighting": "exp"}, "gamma is None: give a number above 0"),
        ({"weighting": "exp", "gamma": 0.0}, "gamma is 0.0"),
        ({"weighting": "dpace", "alpha": 1.5}, "alpha is 1.5"),
        ({"weighting": "linear"}, "weighting is 'linear': give one of exp, uniform, dpace"),
        ({"weighting": "uniform", "chunk_blocks": 0}, "chunk_blocks is 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(inputs: tuple[np.ndarray, ...], settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        block_loss(*map(jnp.asarray, inputs), **{"chunk_blocks": 2, **settings})
