"""Decoding on meshes gives the tokens of one device."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from specjax.decoding import DFlashDrafter, generate
from specjax.decoding.drafter import LoRADrafter
from specjax.models.sharding import SPECS, make_mesh, put
from specjax.weights import flat_params, with_params
from tests.decoding.oracle import Mixture, oracle, preferences, proposals
from tests.decoding.test_lora_drafter import random_lora_draft
from tests.decoding.test_one_pass import MASKED
from tests.decoding.tiny import FULL, OWN_MASK, TARGET, Cases, assert_same_tokens, random_draft, random_target

LIMITS = [40, 1, 24]


@pytest.mark.parametrize(("shape", "rows"), [((1, 1, 8), 3), ((2, 2, 2), 4)])
def test_three_prompts_decode_as_on_one_device(case: Cases, shape: tuple[int, int, int], rows: int) -> None:
    """The same models, laid out on a mesh; on 2x2x2 a row is added to divide them."""
    one_device, prompts, answers = case(0, 3)
    table = proposals(prompts, answers, 0.0, 0, TARGET.vocab_size, rows)
    stops = [[], [], [answers[2][20]]]
    end = next(i for i, token in enumerate(answers[2]) if token in stops[2]) + 1
    expected = [answers[0][:40], answers[1][:1], answers[2][: min(end, 24)]]
    with jax.set_mesh(make_mesh(*shape)):
        target, draft = random_target(0), random_draft(0, OWN_MASK)
        known = put(np.random.default_rng(1).random(table.shape) < 0.6, SPECS.act_bt)
        mixture = Mixture(DFlashDrafter(draft), oracle(table, FULL.block_size), known)
        plain = generate(target, prompts, None, LIMITS, stops)
        results = [generate(target, prompts, mixture, LIMITS, stops)]
        ranked = oracle(preferences(prompts, answers, 0, TARGET.vocab_size, rows), FULL.block_size)
        mixture = replace(mixture, oracle=ranked, known=known | True)
        results.append(generate(target, prompts, mixture, LIMITS, stops, tree_nodes=24))
        one_pass = replace(
            mixture, inner=LoRADrafter(random_lora_draft(0, MASKED)), oracle=oracle(table, 4), known=known
        )
        results.append(generate(target, prompts, one_pass, LIMITS, stops, one_pass=True))
    assert_same_tokens(one_device, prompts, plain.tokens, expected)
    for drafted in results:
        assert_same_tokens(one_device, prompts, drafted.tokens, expected)
        assert {2, 3, 4} <= set(drafted.rounds[0]) <= {1, 2, 3, 4}
        assert drafted.rounds[1] == []
        assert sum(drafted.rounds[2]) >= len(expected[2]) - 1


def test_ties_between_vocabulary_shards_go_to_the_lowest_id(case: Cases) -> None:
    """The upper half of the head repeats the lower half, so every choice is an exact tie."""
    _, prompts, _ = case(0, 3)
    half = TARGET.vocab_size // 2
    with jax.set_mesh(make_mesh(1, 1, 8)):
        target = random_target(0)
        params = flat_params(target)
        kernel = np.asarray(params["lm_head.kernel"])
        doubled = np.concatenate([kernel[:, :half], kernel[:, :half]], axis=1)
        params["lm_head.kernel"] = put(doubled, SPECS.head_dv)
        answers = generate(with_params(target, params), prompts, None, LIMITS, [[], [], []]).tokens
    assert [len(answer) for answer in answers] == LIMITS
    assert len(set(answers[0])) >= 4
    assert max(map(max, answers)) < half
