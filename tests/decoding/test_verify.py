"""The rules `rejection` and `block`: the target's law exactly, by enumeration, and through the decoder, by counting."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from specjax.decoding import Generation, generate
from specjax.decoding.drafter import Rows
from specjax.decoding.verify import acceptance
from specjax.models.decoder import Decoder
from specjax.models.sharding import SPECS, make_mesh, mesh_scope
from tests.decoding.oracle import Stateless
from tests.decoding.tiny import FULL, TARGET, next_logits, random_draft, random_prompts, random_target

Law = dict[tuple[int, ...], float]
V, N = 3, 3  # of the enumeration


def random_laws(seed: int, sampled: bool, zeros: bool) -> tuple[dict[tuple[int, ...], np.ndarray], np.ndarray]:
    """The target's law after every prefix, and the independent ones of the N drafts."""
    rng = np.random.default_rng(seed)

    def law() -> np.ndarray:
        weights = rng.exponential(size=V) ** 2
        weights[rng.permutation(V)[: int(zeros)]] = 0  # as top-k leaves them
        return weights / weights.sum()

    p = {prefix: law() for n in range(N + 1) for prefix in itertools.product(range(V), repeat=n)}
    q = np.stack([law() for _ in range(N)])
    return p, q if sampled else np.eye(V)[q.argmax(-1)]


def joint(p: dict[tuple[int, ...], np.ndarray]) -> Law:
    """The target's law of N + 1 tokens."""
    return {
        x: float(np.prod([p[x[:i]][x[i]] for i in range(N + 1)])) for x in itertools.product(range(V), repeat=N + 1)
    }


def emitted(rule: str, p: dict[tuple[int, ...], np.ndarray], q: np.ndarray) -> Law:
    """The law of N + 1 tokens: a round's, and then the target's own to fill up."""
    found: Law = dict.fromkeys(joint(p), 0.0)
    for drafts in itertools.product(range(V), repeat=N):
        probability = np.prod([q[i][d] for i, d in enumerate(drafts)])
        if not probability:
            continue
        rows = np.stack([p[drafts[:i]] for i in range(N + 1)]).astype(np.float32)
        passes, laws = (
            np.asarray(x, np.float64) for x in acceptance(rule, jnp.asarray(rows), jnp.float32(q), jnp.asarray(drafts))
        )
        for m in range(N + 1):
            if rule == "rejection":  # the first m pass, the next does not
                kept = np.prod(passes[:m]) * (1 - passes[m] if m < N else 1)
            else:  # draft m passes, none after it does
                kept = (passes[m - 1] if m else 1) * np.prod(1 - passes[m:])
            for token, share in enumerate(laws[m] / laws[m].sum()):
                known = (*drafts[:m], token)
                for rest in itertools.product(range(V), repeat=N - m):
                    x = known + rest
                    tail = np.prod([p[x[:i]][x[i]] for i in range(m + 1, N + 1)])
                    found[x] += probability * kept * share * tail
    return found


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_what_is_emitted_has_the_targets_law(rule: str, sampled: bool, zeros: bool) -> None:
    for seed in range(4):
        p, q = random_laws(seed, sampled, zeros)
        expected, found = joint(p), emitted(rule, p, q)
        assert sum(abs(found[x] - expected[x]) for x in expected) / 2 < 1e-6


def test_equal_laws_keep_every_draft() -> None:
    law = jnp.asarray([0.5, 0.25, 0.25])
    for rule in ("rejection", "block"):
        passes, _ = acceptance(rule, jnp.stack([law] * 4), jnp.stack([law] * 3), jnp.asarray([0, 1, 2]))
        np.testing.assert_array_equal(passes, 1)


def test_block_keeps_more_than_rejection() -> None:
    """The example of arXiv 2403.10444: p = (1/3, 2/3), q = (2/3, 1/3), two drafts: 11/9 tokens against 10/9."""
    p, q = jnp.asarray([[1 / 3, 2 / 3]] * 3), jnp.asarray([[2 / 3, 1 / 3]] * 2)
    expected = {"rejection": 10 / 9, "block": 11 / 9}
    for rule, kept in expected.items():
        mean = 0.0
        for drafts in itertools.product(range(2), repeat=2):
            a, b = np.asarray(acceptance(rule, p, q, jnp.asarray(drafts))[0], np.float64)
            mean += float(q[0][drafts[0]] * q[1][drafts[1]]) * (
                a + a * b if rule == "rejection" else 2 * b + (1 - b) * a
            )
        assert mean == pytest.approx(kept, abs=1e-6)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fixed(Stateless):
    """Drafts of the same laws in every row: logits [positions, v]."""

    logits: jax.Array
    block_size: int = field(metadata={"static": True})

    def draft_logits(self, state: None, target: Decoder, rows: Rows, draft_tokens: int) -> jax.Array:
        at = rows.length[:, None] + 1 + jnp.arange(draft_tokens)
        return jax.reshard(self.logits.at[at].get(out_sharding=SPECS.act_btd), SPECS.act_btv)


PROMPT, NEW = [5, 17, 3], 6
ALLOWED = np.isin(np.arange(TARGET.vocab_size), [3, 40, 77])  # so few tokens that all answers can be counted
HOT = {"temperature": 4.0, "logit_mask": ALLOWED}


def target_law(target: Decoder) -> Law:
    """The law of `NEW` tokens after PROMPT."""
    law: Law = {(): 1.0}
    for _ in range(NEW):
        longer: Law = {}
        for tokens, probability in law.items():
            logits = np.float64(next_logits(target, [*PROMPT, *tokens]))[ALLOWED]
            weights = np.exp((logits - logits.max()) / HOT["temperature"])
            for token, share in zip(np.flatnonzero(ALLOWED).tolist(), weights / weights.sum(), strict=True):
                longer[(*tokens, token)] = probability * share
        law = longer
    return law


def cells(law: Law, found: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Counts and their expectation; what is expected fewer than five times is one cell."""
    assert set(found) <= set(law)
    index = {x: i for i, x in enumerate(law)}
    counts = np.bincount([index[x] for x in found], minlength=len(law)).astype(float)
    expected = len(found) * np.array(list(law.values()))
    rare = expected < 5
    return np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())


@pytest.fixture(scope="module")
def small() -> tuple[Decoder, Law, Fixed]:
    """A target, the law of its next tokens, and drafts of other laws."""
    target = random_target(3)
    logits = np.random.default_rng(0).normal(scale=4.0, size=(32, TARGET.vocab_size)).astype(np.float32)
    with mesh_scope():
        return target, target_law(target), Fixed(jnp.asarray(logits), 4)


@pytest.fixture(scope="module")
def drawn(small: tuple[Decoder, Law, Fixed]) -> Callable[[str, str], Generation]:
    """8,000 samples of one prompt, by a rule and a choice of drafts."""
    target, _, drafter = small

    @cache
    def samples(rule: str, draft_choice: str) -> Generation:
        how = {"rule": rule, "draft_choice": draft_choice, "seed": 1, **HOT}
        with mesh_scope():
            return generate(target, [PROMPT], drafter, NEW, samples=8_000, **how)

    return samples


@pytest.mark.parametrize("draft_choice", ["argmax", "sample"])
@pytest.mark.parametrize("rule", ["match", "rejection", "block"])
def test_the_decoder_draws_by_the_targets_law(
    small: tuple[Decoder, Law, Fixed], drawn: Callable[[str, str], Generation], rule: str, draft_choice: str
) -> None:
    """Chi-square over the six tokens, in two rounds or more."""
    _, law, _ = small
    result = drawn(rule, draft_choice)
    counts, expected = cells(law, [tuple(tokens) for tokens in result.tokens])
    assert chisquare(counts, expected).pvalue > 0.01
    kept = np.concatenate(result.rounds) - 1
    assert kept.mean() > 0.15
    assert kept.max() == 3


def test_sampled_drafts_are_kept_as_the_rules_promise(drawn: Callable[[str, str], Generation]) -> None:
    """First rounds: `block` keeps the most; sharing the target's randomness, `match` comes close to `rejection`."""
    ways = ("match", "argmax"), ("match", "sample"), ("rejection", "sample"), ("block", "sample")
    kept = {way: np.mean([rounds[0] for rounds in drawn(*way).rounds]) for way in ways}
    assert kept["block", "sample"] > kept["rejection", "sample"] + 0.03
    assert kept["rejection", "sample"] > kept["match", "sample"] > kept["match", "argmax"] + 0.2


@pytest.mark.parametrize("shape", [(2, 1, 4)])
def test_a_mesh_keeps_the_same(shape: tuple[int, int, int]) -> None:
    prompts = random_prompts(3, 3)
    options = {"rule": "block", "draft_choice": "sample", "seed": 5, "temperature": 1.5}
    expected = generate(random_target(3), prompts, random_draft(0, FULL), 12, **options)
    with jax.set_mesh(make_mesh(*shape)):
        found = generate(random_target(3), prompts, random_draft(0, FULL), 12, **options)
    assert (found.tokens, found.rounds) == (expected.tokens, expected.rounds)
    assert max(map(max, expected.rounds)) > 1
