"""What top-k and top-p keep: a float64 sort, the same alone and among others, and without the memory of all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from specjax.decoding import sampling as module
from specjax.decoding.sampling import Sampling, _masses, choose, greedy, processed
from specjax.decoding.verify import propose, verify
from specjax.models.sharding import SPECS, mesh_scope, put
from tests.decoding.test_sampling import sampling

V = 60
INF, LARGEST, TINY = np.inf, np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
JUST_BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))
RNG = np.random.default_rng(0)
ROWS = {
    "random": RNG.normal(scale=3, size=V),
    "flat": RNG.normal(scale=0.01, size=V),
    "peaked": RNG.normal(scale=40, size=V),
    "all equal": np.full(V, 2.5),
    "ties": RNG.integers(-2, 3, V),
    "halves": -np.log(2) * np.arange(V),
    "excluded": np.where(RNG.random(V) < 0.8, -INF, RNG.normal(size=V)),
    "one allowed": np.where(np.arange(V) == 7, -3.0, -INF),
    "huge": RNG.permutation(np.append([LARGEST, LARGEST / 2, -LARGEST], RNG.normal(scale=1e30, size=V - 3))),
    "far apart": np.append([0, -60, -87, -110, -200, -1e30], np.full(V - 6, -INF)),
    "zeros": RNG.permutation(np.append([0.0, -0.0] * 10, RNG.choice([-1.0, -2.0], V - 20))),
    "denormal": RNG.permutation(np.append(TINY * np.arange(-5, 5), np.full(V - 10, -2.0))),
}
LIMITS = [(1, None), (2, None), (11, None), (V, None), (2**31 - 1, None), (None, 1e-30), (None, 0.3), (None, 0.9)]
LIMITS += [(None, JUST_BELOW_1), (None, 1.0), (7, 0.8), (20, JUST_BELOW_1), (1, 1e-30), (500, 0.999), (500, 1.0)]


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with mesh_scope():
        yield


def expected(
    scores: npt.NDArray[np.float32], top_k: int | None, top_p: float | None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which of float32 scores [v] stay, by sorting them in float64, and where float32 may see it differently."""
    exact = np.where(np.abs(scores) < np.finfo(np.float32).tiny, 0, scores).astype(np.float64)  # as the CPU flushes
    stay, unsure = exact > -INF, np.zeros(len(exact), bool)
    if top_k is not None:
        stay &= exact >= np.sort(exact)[::-1][min(top_k, len(exact)) - 1]
    if top_p is None:
        return stay, unsure
    weights = np.exp(np.where(stay, exact, -INF) - exact.max())
    order = np.argsort(exact, kind="stable")
    up_to = np.cumsum(weights[order])[np.searchsorted(exact[order], exact, side="right") - 1] / weights.sum()
    spare = 1 - np.float64(np.float32(top_p))  # of the mass; a token goes where those up to it hold no more
    if spare:
        accuracy = 4e-6 * spare + len(exact) * 2.0**-31 * (1 + spare)
        unsure = stay & (np.abs(up_to - spare) <= accuracy) & (exact < exact.max())
        stay = stay & (up_to > spare) | (exact == exact.max())
    return stay, unsure


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("top_k", "top_p"), LIMITS)
def test_what_stays_is_what_a_sort_keeps(name: str, top_k: int | None, top_p: float | None) -> None:
    scores = ROWS[name].astype(np.float32)
    found = np.asarray(processed(jnp.asarray(scores), sampling(1.0, top_k, top_p)))
    stay, unsure = expected(scores, top_k, top_p)
    np.testing.assert_array_equal((found > -INF)[~unsure], stay[~unsure])
    np.testing.assert_allclose(found[found > -INF], scores[found > -INF], atol=1e-37, rtol=0)
    assert not unsure.any() or top_p == JUST_BELOW_1


def test_a_whole_vocabulary_is_cut_where_a_sort_cuts_it() -> None:
    rng = np.random.default_rng(1)
    for scale in (0.1, 1, 3, 10):
        scores = rng.normal(scale=scale, size=152_000).astype(np.float32)
        for limits in ((50, 0.95), (None, 0.5), (None, 0.95), (100_000, 0.999), (None, 1.0)):
            stay, unsure = expected(scores, *limits)
            found = np.asarray(processed(jnp.asarray(scores), sampling(1.0, *limits))) > -INF
            assert not (found != stay)[~unsure].any()
            assert unsure.mean() < 0.02


def masses(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """What decides, to the last bit, where top-p ends at a token."""
    return _masses(processed(logits, replace(sampling, top_k=None, top_p=None)))


@pytest.mark.parametrize("v", [97, 1003, 40_000])
@pytest.mark.parametrize("function", [processed, masses])
def test_a_position_keeps_the_same_alone_and_among_others(
    function: Callable[[jax.Array, Sampling], jax.Array], v: int
) -> None:
    logits = np.random.default_rng(v).normal(scale=3, size=(8, v)).astype(np.float32)
    each = jax.vmap(function, (0, None))
    among = {
        "row of one": lambda x, s: function(x[:1], s),
        "rows": function,
        "vmap": each,
        "vmap of rows": lambda x, s: each(x.reshape(2, 4, v), s).reshape(8, v),
        "loop over rows": lambda x, s: jax.lax.map(lambda row: function(row, s), x),
        "loop over pieces": lambda x, s: jax.lax.map(lambda row: function(row, s), x, batch_size=4),
    }
    limits = sampling(0.7, v // 2, 0.95)
    alone = jax.jit(function)
    single = np.stack([alone(jnp.asarray(row), limits) for row in logits]).view(np.int32)
    for name, others in among.items():
        found = np.asarray(jax.jit(others)(jnp.asarray(logits), limits)).view(np.int32)
        np.testing.assert_array_equal(found, single[: len(found)], err_msg=name)


@pytest.mark.parametrize("entries", [1, 2, 6, 15])
def test_pieces_draw_what_the_whole_draws(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one position, of two, of a row (three), and of several."""
    b, n, v = 6, 4, 96
    rng = np.random.default_rng(0)
    logits = put(rng.normal(scale=3, size=(b, n + 1, v)).astype(np.float32), SPECS.act_btv)
    draft_logits = put(rng.normal(scale=3, size=(b, n, v)).astype(np.float32), SPECS.act_btv)
    drafts = put(rng.integers(0, v, (b, n)).astype(np.int32), SPECS.act_bt)
    length = put(np.arange(b, dtype=np.int32), SPECS.act_b)
    s = replace(sampling(0.8, 40, 0.95, b), allowed=put(rng.random((b, v)) < 0.7, SPECS.act_bt))

    def draws() -> list[jax.Array]:
        positions = length[:, None] + jnp.arange(n + 1, dtype=jnp.int32)
        found = [choose(logits, positions, s), greedy(logits, s)]
        for rule in ("match", "rejection", "block"):
            found.append(propose(draft_logits, length, s, rule=rule, draft_choice="sample"))
            found += verify(logits, drafts, draft_logits, length, s, rule=rule)
            found += verify(logits, drafts, None, length, s, rule=rule)
        return found

    whole = jax.jit(draws)()
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * v * entries)
    pieces = jax.jit(lambda: draws())()  # another function, which compiles again
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one, other)


ROUNDS = [("match", 3, 300_000), ("match", 15, 152_000), ("rejection", 3, 300_000), ("block", 15, 152_000)]


@pytest.mark.parametrize(("rule", "n", "v"), ROUNDS)
def test_memory_does_not_grow_with_the_rows(rule: str, n: int, v: int) -> None:
    """Where three rows have the bytes of a piece, which do not divide the batch, and where one has."""

    def temporaries(b: int) -> int:
        shapes = {"logits": (b, n + 1, v), "drafts": (b, n), "draft_logits": (b, n, v), "length": (b,)}
        kinds = {"drafts": jnp.int32, "length": jnp.int32}
        x = {name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.float32)) for name, shape in shapes.items()}
        limits = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sampling(0.8, 50, 0.95, b))

        @jax.jit
        def run(x: dict[str, jax.Array], limits: Sampling) -> tuple[jax.Array, jax.Array]:
            specs = {"logits": SPECS.act_btv, "drafts": SPECS.act_bt, "length": SPECS.act_b}
            x = {name: jax.reshard(value, specs.get(name, SPECS.act_btv)) for name, value in x.items()}
            limits = replace(limits, seeds=jax.reshard(limits.seeds, SPECS.act_b))
            return verify(x["logits"], x["drafts"], x["draft_logits"], x["length"], limits, rule=rule)

        return run.lower(x, limits).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(8), temporaries(32)
    assert many < 1.1 * few
    assert few < 12 * module.PIECE_BYTES
