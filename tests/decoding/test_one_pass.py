"""Drafting in the pass that verifies: what it computes, that it is one pass, and that the answer stays the target's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from specjax.decoding import AutoWidth, Stream, generate
from specjax.decoding.batch import Batch
from specjax.decoding.drafter import LoRADrafter
from specjax.decoding.drafting import PLAIN, Drafting
from specjax.decoding.loop import decode
from specjax.errors import InputError
from specjax.models.decoder import DecoderConfig
from specjax.models.lora import merge
from specjax.models.lora_draft import LoRADraftConfig
from specjax.models.one_pass import run_one_pass
from specjax.models.sharding import SPECS, mesh_scope, put
from tests.decoding.oracle import Mixture, oracle, proposals
from tests.decoding.test_lora_drafter import CONFIG, filled_cache, merged_logits, random_lora_draft
from tests.decoding.tiny import (
    FULL,
    OTHER_TARGETS,
    TARGET,
    Cases,
    assert_same_tokens,
    random_draft,
    random_prompts,
    random_target,
)

MASKED = dataclasses.replace(CONFIG, masked_anchor=0.5)
ALWAYS_MASKED = dataclasses.replace(CONFIG, masked_anchor=1.0)
OWN_MASK = dataclasses.replace(MASKED, mask_token_id=100, own_mask_embedding=True)
SIZE = CONFIG.block_size
ONE_PASS = Drafting(SIZE - 1, one_pass=True)


def drafter_for(
    prompts: list[list[int]], answers: list[list[int]], config: LoRADraftConfig = MASKED, base: DecoderConfig = TARGET
) -> Mixture:
    """A random draft whose proposals are often replaced by right ones; enter a mesh to build it."""
    table = proposals(prompts, answers, 0.15, 0, TARGET.vocab_size)
    known = put(np.random.default_rng(0).random(table.shape) < 0.7, SPECS.act_bt)
    return Mixture(LoRADrafter(random_lora_draft(0, config, base)), oracle(table, SIZE), known)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_every_block_is_the_merged_models_after_its_token(kind: str) -> None:
    """And the tokens are the target's. The cache's slots from the tokens on hold others."""
    base = TARGET if kind == "full" else OTHER_TARGETS["sliding"]
    tokens = np.random.default_rng(0).integers(0, TARGET.vocab_size, (2, 24), dtype=np.int32)
    at = 13
    others = np.where(np.arange(24) < at, tokens, tokens[:, ::-1])
    with mesh_scope():
        target, draft = random_target(0, base), random_lora_draft(0, MASKED, base)
        merged, rows = merge(target, draft.adapters), put(tokens, SPECS.act_bt)
        masks = put(np.full((2, SIZE), MASKED.mask_token_id, np.int32), SPECS.act_bt)
        expected = [merged_logits(target, merged, rows, masks, at + j + 1) for j in range(SIZE)]
        own = jax.jit(lambda target, rows: target(rows).hidden)(target, rows)[:, at : at + SIZE]
        whole = filled_cache(target, rows)
        positions = at + np.arange(SIZE, dtype=np.int32) + np.zeros((2, 1), np.int32)
        found = jax.jit(run_one_pass)(
            target,
            draft,
            put(tokens[:, at : at + SIZE], SPECS.act_bt),
            put(positions[:, 0], SPECS.act_b),
            put(positions, SPECS.act_bt),
            filled_cache(target, put(np.ascontiguousarray(others), SPECS.act_bt)),
        )
        logits = [target.logits(found.blocks[:, j]) for j in range(SIZE)]
    np.testing.assert_allclose(found.hidden, own, atol=2e-4)
    np.testing.assert_allclose(np.stack(logits, 1), np.stack(expected, 1), atol=5e-4)
    for written, right in zip(jax.tree.leaves(found.cache), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(written[:, :, : at + SIZE], right[:, :, : at + SIZE], atol=1e-4)


@pytest.mark.parametrize("config", [MASKED, OWN_MASK], ids=["the target's row", "own mask embedding"])
def test_what_is_carried_is_a_draft_pass_where_rows_stand(config: LoRADraftConfig, case: Cases) -> None:
    """After every round, of rows that go on; rounds kept 0 to all drafts. A row that is done writes nothing."""
    target, prompts, answers = case(0, 3)
    kept = set()
    drafted = jax.jit(lambda drafter, *where: drafter.draft_ahead(*where))
    with mesh_scope():
        drafter = drafter_for(prompts, answers, config)
        if config.own_mask_embedding:
            drawn = np.random.default_rng(3).standard_normal(TARGET.hidden_size).astype(np.float32)
            drafter.inner.model.mask_embedding[...] = put(drawn, SPECS.mask_embedding_d)  # type: ignore[attr-defined]
        batch = Batch.build(target, prompts, [3, 30, 30], [[]] * 3, SIZE)
        state = batch.prefill(target, drafter)
        assert state.drafter.length.tolist() == [-1] * 3
        for i in range(12):
            done, before = np.asarray(state.done), jax.tree.map(np.array, state.cache)
            state = decode(target, drafter, state, batch.limits, until=put(np.int32(i + 1), jax.P()), drafting=ONE_PASS)
            going = ~np.asarray(state.done)
            kept |= set(np.asarray(state.rounds)[going, i].tolist())
            found, expected = state.drafter, drafted(drafter, target, state.cache, state.length)
            assert (np.asarray(found.length) == np.asarray(state.length))[going].all()
            np.testing.assert_allclose(np.asarray(found.hidden)[going], np.asarray(expected.hidden)[going], atol=1e-4)
            assert np.abs(expected.hidden).max() > 1
            for kept_now, kept_before in zip(jax.tree.leaves(state.cache), jax.tree.leaves(before), strict=True):
                np.testing.assert_array_equal(np.asarray(kept_now)[done], kept_before[done])
    assert done.any()
    assert kept == set(range(1, SIZE + 1))


HOW: list[dict[str, Any]] = [
    {},
    {"draft_tokens": 2},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "draft_choice": "sample"},
]


@pytest.mark.parametrize("how", HOW, ids=["greedy", "2 drafts", "top-p", "drawn drafts"])
def test_answers_are_the_targets(how: dict[str, Any], case: Cases) -> None:
    """With limits and stops, and as they stream."""
    target, prompts, _ = case(0, 3)
    drawn = {name: value for name, value in how.items() if name in ("temperature", "top_p")}
    endless = generate(target, prompts, None, 50, **drawn).tokens
    stops = [[], [endless[1][17]], []]
    limits = [50, 50, 33]
    plain = generate(target, prompts, None, limits, stops, **drawn)
    with mesh_scope():
        drafter = drafter_for(prompts, endless)
        found = generate(target, prompts, drafter, limits, stops, **how, one_pass=True)
        streamed = list(Stream(target, prompts, drafter, limits, stops, **how, one_pass=True))
    assert_same_tokens(target, prompts, found.tokens, plain.tokens)
    assert found.one_pass == [[True] * len(row) for row in found.rounds]
    assert {r for row in found.rounds for r in row} >= {1, 2, how.get("draft_tokens", SIZE - 1) + 1}
    assert [list(itertools.chain(*(step[row] for step in streamed))) for row in range(3)] == found.tokens


TREE = Drafting(SIZE - 1, tree_nodes=6)


@pytest.mark.parametrize(("rule", "others"), [("block", (PLAIN, TREE)), ("rejection", ())])
def test_drafts_are_those_of_two_passes_that_know_no_anchor(rule: str, others: tuple[Drafting, ...]) -> None:
    """By rules whose tokens follow the drafts' law: the same tokens in the same rounds, after other rounds, too.

    A draft that has seen known anchors does not draft these.
    """
    two = Drafting(SIZE - 1, 0, rule, "sample")
    one = dataclasses.replace(two, one_pass=True)

    def decoded(
        drafting: Drafting, config: LoRADraftConfig, others: tuple[Drafting, ...]
    ) -> tuple[list[list[int]], list[list[int]]]:
        drafter = LoRADrafter(random_lora_draft(0, config))
        state = batch.prefill(target, drafter)
        between = ((other, drafting) for other in (drafting, two, *others))
        for i, each in enumerate((drafting, *itertools.chain(*between))):
            until = put(np.int32(3 * i + 3), jax.P())
            state = decode(target, drafter, state, batch.limits, batch.sampling, until, drafting=each)
        return state.tokens.tolist(), state.rounds.tolist()

    with mesh_scope():
        target = random_target(0)
        batch = Batch.build(target, random_prompts(0, 3), [64] * 3, [[]] * 3, SIZE)
        batch = batch.with_sampling(3.0, None, None, [0, 1, 2])
        expected = decoded(two, ALWAYS_MASKED, others)
        assert decoded(one, ALWAYS_MASKED, others) == expected
        assert decoded(two, MASKED, ()) != decoded(two, ALWAYS_MASKED, ())
    assert {r for row in expected[1] for r in row} >= {1, 2, 3}


def bodies(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """Of the outermost loops."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            yield eqn.params["body_jaxpr"].jaxpr
        else:
            for inner in inside(eqn):
                yield from bodies(inner)


def inside(eqn: Any) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
        if isinstance(value, Jaxpr | ClosedJaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


def mlp_products(jaxpr: Jaxpr) -> int:
    """Products with the kernels of the MLPs' first halves."""
    shape = TARGET.hidden_size, TARGET.intermediate_size
    own = sum(e.primitive.name == "dot_general" and e.invars[1].aval.shape == shape for e in jaxpr.eqns)
    return own + sum(mlp_products(inner) for eqn in jaxpr.eqns for inner in inside(eqn))


def test_a_round_is_one_pass_of_the_target() -> None:
    with mesh_scope():
        target, drafter = random_target(0), LoRADrafter(random_lora_draft(0, MASKED))
        batch = Batch.build(target, random_prompts(0, 2), [12] * 2, [()] * 2, SIZE)
        state = jax.eval_shape(batch.prefill, target, drafter)

        def passes(drafting: Drafting) -> float:
            traced = jax.make_jaxpr(lambda state: decode(target, drafter, state, batch.limits, drafting=drafting))
            (body,) = bodies(traced(state).jaxpr)
            return mlp_products(body) / (2 * TARGET.num_hidden_layers)

        assert (passes(ONE_PASS), passes(Drafting(SIZE - 1))) == (1, 2)


def test_auto_has_both_ways(case: Cases) -> None:
    target, prompts, answers = case(0, 3)
    width = AutoWidth()
    found = generate(target, prompts, random_lora_draft(0, MASKED), 40, draft_tokens=width)
    assert found.tokens == [answer[:40] for answer in answers]
    (seconds,) = width.seconds.values()
    chains = [Drafting(n, one_pass=one_pass) for one_pass in (False, True) for n in (1, SIZE - 1)]
    assert list(seconds) == [PLAIN, *chains]


NOT_TRAINED = "not trained with masked anchors; train a LoRA draft with lora.masked_anchor above 0"


@pytest.mark.parametrize(
    ("draft", "how", "message"),
    [
        ("lora", {}, NOT_TRAINED),
        ("dflash", {}, NOT_TRAINED),
        ("masked", {"tree_nodes": 6}, "one_pass drafts a chain, but tree_nodes is 6"),
        ("masked", {"draft_tokens": AutoWidth()}, "draft_tokens is auto, which tries it by itself"),
        (None, {}, "there is no draft"),
    ],
)
def test_what_cannot_be_done_in_one_pass_is_refused(draft: str | None, how: dict[str, Any], message: str) -> None:
    drafts = {
        None: lambda: None,
        "lora": random_lora_draft,
        "dflash": lambda seed: random_draft(seed, FULL),
        "masked": lambda seed: random_lora_draft(seed, MASKED),
    }
    given = None if draft is None else drafts[draft](0)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        generate(random_target(0), random_prompts(0, 1), given, 4, **how, one_pass=True)
