"""Every objective against formulas in NumPy float64: values, gradients, chunks, meshes, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax.config_sections
from specjax.blockdiff.losses import BlockLoss, Teacher, block_loss
from specjax.blockdiff.terms import STREAK_TERMS, TERMS
from specjax.models.sharding import SPECS, make_mesh, put
from tests.blockdiff.reference import slot_weights, softmax

ROWS, LENGTH, N, B, D, V = 8, 19, 5, 6, 16, 32
ALPHA, GAMMA = 0.3, 3.0
OBJECTIVES: dict[str, tuple[Mapping[str, float], str | None]] = {
    **{name: ({name: 1.0}, None if name in STREAK_TERMS else "exp") for name in TERMS},
    "half ce, half kl": ({"ce": 0.5, "kl": 0.5}, "dpace"),
    "0.1 ce, 1.8 tv": ({"ce": 0.1, "tv": 1.8}, "uniform"),
}
SPECS_IN_ORDER = (SPECS.act_bNBd, SPECS.head_dv, SPECS.act_btd, SPECS.act_bN, SPECS.act_bNB, SPECS.act_bNB)
Inputs = tuple[np.ndarray, ...]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """A draft that is near its teacher; masks cut short, with holes, empty; a block that reaches past the row's end."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(D, V)).astype(np.float32)
    final = (0.6 * rng.normal(size=(ROWS, LENGTH, D))).astype(np.float32)
    anchors = np.sort(rng.integers(0, LENGTH - 2, (ROWS, N)), axis=1).astype(np.int32)
    before = np.clip(anchors[..., None] + np.arange(B) - 1, 0, LENGTH - 1)
    hidden = np.take_along_axis(final[:, None], before[..., None], axis=2)
    hidden = (hidden + 0.3 * rng.normal(size=hidden.shape)).astype(np.float32)
    labels = rng.integers(0, V, (ROWS, N, B)).astype(np.int32)
    likely = (hidden @ head).argmax(-1)
    labels = np.where(rng.random(labels.shape) < 0.6, likely, labels).astype(np.int32)
    mask = (np.arange(B) <= rng.integers(0, B, (ROWS, N, 1))) & (np.arange(B) > 0)
    mask[0] = rng.random((N, B)) < 0.6
    mask[2] = False
    mask &= anchors[..., None] + np.arange(B) < LENGTH
    return hidden, head, final, anchors, labels, mask


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with jax.set_mesh(make_mesh()):
        yield


def slot_term(name: str, q: np.ndarray, p: np.ndarray, label: int) -> tuple[float, np.ndarray]:
    """A term of one slot and its gradient in the draft's logits, whose softmax is q; p is the teacher's."""
    one_hot = np.eye(V)
    if name == "ce":
        return -np.log(q[label]), q - one_hot[label]
    if name == "ce_argmax":
        return -np.log(q[p.argmax()]), q - one_hot[p.argmax()]
    kl, tv = float((p * np.log(p / q)).sum()), 1 - float(np.minimum(p, q).sum())
    smaller = (q < p) * q
    kl_grad, tv_grad = q - p, -(smaller - q * smaller.sum())
    if name == "kl":
        return kl, kl_grad
    if name == "tv":
        return tv, tv_grad
    lam = np.exp(-3 * (1 - tv))
    return lam * kl + (1 - lam) * tv, lam * kl_grad + (1 - lam) * tv_grad


def streak(name: str, laws: list[np.ndarray], labels: list[int]) -> tuple[float, list[np.ndarray]]:
    """The loss of one block's supervised slots, and its gradients in their logits."""
    q = [law[label] for law, label in zip(laws, labels, strict=True)]
    reached = np.cumprod(q)
    step = [np.eye(V)[label] - law for law, label in zip(laws, labels, strict=True)]  # of log q
    if name == "streak":
        return -float(reached.sum()), [-reached[i:].sum() * step[i] for i in range(len(q))]
    before = reached / q
    return -float((before * np.log(q)).sum()), [-before[i] * step[i] for i in range(len(q))]


def reference(inputs: Inputs, objective: Mapping[str, float], weighting: str | None) -> dict[str, np.ndarray]:
    hidden, head, final = (x.astype(np.float64) for x in inputs[:3])
    anchors, labels, mask = inputs[3:]
    out = {name: np.zeros(()) for name in ("loss_sum", "weight_sum", "expected_sum")}
    out |= {"hidden_grad": np.zeros_like(hidden), "head_grad": np.zeros_like(head)}
    for i, j in np.argwhere(mask[..., 1:].any(-1)):
        slots = [k for k in range(1, B) if mask[i, j, k]]
        laws = [softmax(hidden[i, j, k] @ head) for k in slots]
        taught = [softmax(final[i, anchors[i, j] + k - 1] @ head) for k in slots]
        wanted = [int(labels[i, j, k]) for k in slots]
        overlap = {k: np.minimum(p, q).sum() for k, p, q in zip(slots, taught, laws, strict=True)}
        out["expected_sum"] += 1 + np.cumprod([overlap.get(k, 0.0) for k in range(min(overlap), B)]).sum()
        if weighting is None:
            (name,) = objective
            value, grads = streak(name, laws, wanted)
            out["loss_sum"] += value
            out["weight_sum"] += 1
        else:
            q = [float(law[label]) for law, label in zip(laws, wanted, strict=True)]
            weights = slot_weights(weighting, q, slots, GAMMA if weighting == "exp" else ALPHA)
            grads = []
            for law, teacher, label, w in zip(laws, taught, wanted, weights, strict=True):
                terms = {name: slot_term(name, law, teacher, label) for name in objective}
                out["loss_sum"] += w * sum(objective[name] * value for name, (value, _) in terms.items())
                out["weight_sum"] += w
                grads.append(w * sum(objective[name] * grad for name, (_, grad) in terms.items()))
        for k, grad in zip(slots, grads, strict=True):
            out["hidden_grad"][i, j, k] = head @ grad
            out["head_grad"] += np.outer(hidden[i, j, k], grad)
    return out


def settings(weighting: str | None) -> dict[str, float]:
    return {"exp": {"gamma": GAMMA}, "dpace": {"alpha": ALPHA}}.get(weighting or "", {})


def ours(inputs: Inputs, objective: Mapping[str, float], weighting: str | None, chunk: int) -> dict[str, jax.Array]:
    def loss_sum(hidden: jax.Array, head: jax.Array, *rest: jax.Array) -> tuple[jax.Array, BlockLoss]:
        final, anchors, labels, mask = rest
        out = block_loss(
            hidden,
            head,
            labels,
            mask,
            objective=objective,
            teacher=Teacher(final, anchors),
            weighting=weighting,
            chunk_blocks=chunk,
            **settings(weighting),
        )
        return out.loss_sum, out

    arguments = [put(x, spec) for x, spec in zip(inputs, SPECS_IN_ORDER, strict=True)]
    (_, out), grads = jax.jit(jax.value_and_grad(loss_sum, (0, 1), has_aux=True))(*arguments)
    return vars(out) | dict(zip(("hidden_grad", "head_grad"), grads, strict=True))


def assert_equal(found: dict[str, jax.Array], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in expected.items():
        atol = 0 if name.endswith("sum") else tolerance * (1 + np.abs(value).max())
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", OBJECTIVES)
def test_values_and_gradients_equal_float64_formulas(inputs: Inputs, case: str) -> None:
    expected = reference(inputs, *OBJECTIVES[case])
    assert_equal(ours(inputs, *OBJECTIVES[case], chunk=2), expected, 2e-6)


@pytest.mark.parametrize("case", ["lk", "ce_streak", "half ce, half kl"])
def test_the_normalised_loss_does_not_depend_on_the_chunks(inputs: Inputs, case: str) -> None:
    with jax.enable_x64(True):
        double = tuple(x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs)
        results = [ours(double, *OBJECTIVES[case], chunk=chunk) for chunk in (1, 3, 64)]
        losses = [float(r["loss_sum"] / r["weight_sum"]) for r in results]
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_every_mesh_gives_the_same_values(inputs: Inputs, shape: tuple[int, int, int]) -> None:
    for case in ("lk", "streak"):
        with jax.set_mesh(make_mesh(*shape)):
            found = ours(inputs, *OBJECTIVES[case], chunk=2)
        assert_equal(found, reference(inputs, *OBJECTIVES[case]), 1e-5)


def test_neither_distribution_exists_for_all_blocks() -> None:
    b, n, block_size, d, v, chunk = 2, 64, 8, 32, 4096, 4
    shapes = ((b, n, block_size, d), (d, v), (b, 256, d), (b, n), (b, n, block_size), (b, n, block_size))
    dtypes = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.int32, jnp.bool)
    arguments = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]

    def loss_sum(hidden: jax.Array, head: jax.Array, *rest: jax.Array) -> jax.Array:
        final, anchors, labels, mask = rest
        teacher = Teacher(final, anchors)
        settings = {"weighting": "dpace", "chunk_blocks": chunk}
        return block_loss(hidden, head, labels, mask, objective={"lk": 1.0}, teacher=teacher, **settings).loss_sum

    memory = jax.jit(jax.grad(loss_sum)).lower(*arguments).compile().memory_analysis()
    every_logit = 4 * b * n * block_size * v
    assert memory.temp_size_in_bytes < every_logit / 2
    assert memory.temp_size_in_bytes < 6 * every_logit * chunk // n + 2**20


def test_the_config_names_the_same_terms() -> None:
    assert specjax.config_sections.TERMS == TERMS


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ({}, {}, "objective is empty"),
        ({"mse": 1.0}, {}, "objective has the term 'mse': give one of ce, ce_argmax, kl"),
        ({"ce": 0.0}, {}, "objective gives ce the weight 0.0"),
        ({"ce": 1.0, "streak": 1.0}, {}, "objective adds streak to other terms"),
        ({"streak": 1.0}, {"weighting": "exp"}, "weighting is 'exp', but streak weighs its slots itself"),
        ({"streak": 1.0}, {"alpha": 0.5}, "alpha is 0.5, but streak weighs its slots itself"),
        ({"ce": 1.0}, {}, "weighting is None, but the objective ce needs one"),
        ({"kl": 1.0}, {"weighting": "uniform"}, "objective kl compares with the target: give its final hidden states"),
    ],
)
def test_objectives_that_cannot_be_meant_are_refused(
    inputs: Inputs, objective: dict[str, float], settings: dict[str, object], message: str
) -> None:
    hidden, head, _, _, labels, mask = map(jnp.asarray, inputs)
    with pytest.raises(ValueError, match=message):
        block_loss(hidden, head, labels, mask, objective=objective, chunk_blocks=2, **{"weighting": None, **settings})
