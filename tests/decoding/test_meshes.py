"""Decoding on meshes gives the tokens of one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from specjax.decoding import DFlashDrafter, generate
from specjax.models.sharding import SPECS, make_mesh, put
from tests.decoding.oracle import Mixture, oracle, proposals
from tests.decoding.tiny import FULL, TARGET, assert_same_tokens, random_draft, random_target

LIMITS = [40, 1, 24]


@pytest.mark.parametrize(("shape", "rows"), [((1, 1, 8), 3), ((2, 2, 2), 4)])
def test_three_prompts_decode_as_on_one_device(case, shape, rows) -> None:
    """The same models, laid out on a mesh; on 2x2x2 a row is added to divide them."""
    one_device, prompts, answers = case(0, 3)
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size, rows)
    stops = [[], [], [answers[2][20]]]
    end = next(i for i, token in enumerate(answers[2]) if token in stops[2]) + 1
    expected = [answers[0][:40], answers[1][:1], answers[2][: min(end, 24)]]
    with jax.set_mesh(make_mesh(*shape)):
        target, draft = random_target(0), random_draft(0, FULL)
        known = put(np.random.default_rng(1).random(table.shape) < 0.6, SPECS.act_bt)
        mixture = Mixture(DFlashDrafter(draft), oracle(table, FULL.block_size), known)
        plain = generate(target, prompts, None, LIMITS, stops)
        drafted = generate(target, prompts, mixture, LIMITS, stops)
    assert_same_tokens(one_device, prompts, plain.tokens, expected)
    assert_same_tokens(one_device, prompts, drafted.tokens, expected)
    assert set(drafted.rounds[0]) == {1, 2, 3, 4}
    assert drafted.rounds[1] == []
    assert sum(drafted.rounds[2]) >= len(expected[2]) - 1
