"""Drawn tokens: transformers' warpers, the right law, and the same tokens with and without a draft."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specjax.decoding import generate
from specjax.decoding.loop import decode, prefill
from specjax.decoding.sampling import Sampling, choose, processed
from specjax.models.sharding import SPECS, make_mesh, mesh_scope, put
from tests.decoding.oracle import oracle, proposals, simulate
from tests.decoding.tiny import FULL, TARGET, next_logits, random_draft, random_prompts, random_target

HOT = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
SETTINGS = [(0.5, None, None), (1.0, 3, None), (1.7, None, 0.6), (0.8, 12, 0.7), (1.0, 1, 0.99), (1.0, 500, 1.0)]


def sampling(temperature: float, top_k: int | None, top_p: float | None, seeds: int = 1) -> Sampling:
    numbers = (None if x is None else jnp.asarray(x, kind) for x, kind in ((top_k, jnp.int32), (top_p, jnp.float32)))
    return Sampling(jnp.float32(temperature), put(np.arange(seeds, dtype=np.uint32), SPECS.act_b), *numbers)


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_are_processed_as_transformers_does(settings: tuple[float, int | None, float | None]) -> None:
    temperature, top_k, top_p = settings
    logits = np.random.default_rng(0).normal(scale=2.0, size=(6, 40)).astype(np.float32)
    expected = torch.tensor(logits)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    for warper in warpers:
        expected = warper(None, expected)
    with mesh_scope():
        ours = processed(jnp.asarray(logits), sampling(*settings))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def test_draws_follow_the_processed_softmax() -> None:
    """Chi-square over 20,000 draws: 50 rows with seeds of their own at 400 positions."""
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32)
    rows, count = 50, 400
    with mesh_scope():
        settings = sampling(0.7, 9, 0.95, rows)
        law = np.exp(np.float64(processed(jnp.asarray(logits), settings)))
        same = put(np.broadcast_to(logits, (rows, count, 12)), SPECS.act_btv)
        positions = put(np.broadcast_to(np.arange(count, dtype=np.int32), (rows, count)), SPECS.act_bt)
        drawn = np.asarray(jax.jit(choose)(same, positions, settings))
    found, law = np.bincount(drawn.ravel(), minlength=12), law / law.sum()
    assert not found[law == 0].any()
    assert chisquare(found[law > 0], drawn.size * law[law > 0]).pvalue > 0.01
    first, second = drawn[:, ::2].ravel(), drawn[:, 1::2].ravel()  # neighbouring positions are independent
    pairs = np.bincount(12 * first + second, minlength=144).reshape(12, 12)
    expected = first.size * np.outer(law, law)
    possible = expected > 0
    assert expected[possible].min() > 5
    assert chisquare(pairs[possible], expected[possible]).pvalue > 0.01


def plain_answers(target, prompts, count: int, seeds: list[int]) -> list[list[int]]:
    """Token by token without a cache, through `choose` of one row."""
    alone, answers = jax.jit(choose), []
    for prompt, seed in zip(prompts, seeds, strict=True):
        tokens = list(prompt)
        for _ in range(count):
            logits = put(np.asarray(next_logits(target, tokens), np.float32)[None, None], SPECS.act_btv)
            settings = replace(sampling(*HOT.values()), seeds=put(np.array([seed], np.uint32), SPECS.act_b))
            tokens.append(int(alone(logits, jnp.asarray([[len(tokens)]], jnp.int32), settings)[0, 0]))
        answers.append(tokens[len(prompt) :])
    return answers


def test_speculation_draws_what_autoregressive_decoding_draws() -> None:
    """With a random draft, and with an oracle that is right or wrong; alone, and in another order of the batch."""
    target, prompts, seeds = random_target(3), random_prompts(3, 4), [7, 7, 2**32 - 1, 0]
    alone = generate(target, prompts, max_new_tokens=40, seed=seeds, **HOT).tokens
    with mesh_scope():
        assert [answer[:12] for answer in alone] == plain_answers(target, prompts, 12, seeds)
    assert generate(target, prompts, max_new_tokens=40, **HOT).tokens != alone
    assert generate(target, prompts, max_new_tokens=40).tokens != alone
    drafted = generate(target, prompts, random_draft(0, FULL), 40, seed=seeds, **HOT)
    assert drafted.tokens == alone
    longer = generate(target, prompts, max_new_tokens=56, seed=seeds, **HOT).tokens
    assert [answer[:40] for answer in longer] == alone
    for rate in (0.0, 0.3):
        table = proposals(prompts, longer, rate, 0, TARGET.vocab_size)
        with mesh_scope():
            found = generate(target, prompts, oracle(table, 8), 40, seed=seeds, **HOT)
        expected = [simulate(len(p), a, row, 7, 40, []) for p, a, row in zip(prompts, longer, table, strict=True)]
        assert list(zip(found.tokens, found.rounds, strict=True)) == expected
    assert generate(target, prompts, max_new_tokens=40, seed=3, **HOT).tokens == (
        generate(target, prompts, max_new_tokens=40, seed=[3, 4, 5, 6], **HOT).tokens
    )
    backwards = generate(target, prompts[::-1], max_new_tokens=40, seed=seeds[::-1], **HOT).tokens
    assert backwards[::-1] == alone
    assert generate(target, prompts[2:3], max_new_tokens=40, seed=seeds[2], **HOT).tokens == alone[2:3]


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 8, 1)])
def test_a_mesh_draws_the_same(shape: tuple[int, int, int]) -> None:
    prompts = random_prompts(3, 3)
    expected = generate(random_target(3), prompts, max_new_tokens=20, seed=5, **HOT).tokens
    with jax.set_mesh(make_mesh(*shape)):
        target = random_target(3)
        assert generate(target, prompts, random_draft(0, FULL), 20, seed=5, **HOT).tokens == expected


def test_other_settings_do_not_compile_again() -> None:
    target, prompt = random_target(3), random_prompts(3, 1)
    generate(target, prompt, max_new_tokens=4, seed=1, **HOT)
    compiled = prefill._cache_size(), decode._cache_size()
    generate(target, prompt, max_new_tokens=5, seed=2, temperature=0.3, top_k=5, top_p=0.5)
    assert (prefill._cache_size(), decode._cache_size()) == compiled
