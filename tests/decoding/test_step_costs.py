"""What is timed as a step or a round: the decoder's own pass, its rule and its draws, and how many of them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from specjax.decoding import drafting, step_costs
from specjax.decoding.batch import Batch
from specjax.decoding.drafter import DFlashDrafter, LoRADrafter
from specjax.decoding.drafting import Drafting
from specjax.decoding.target_pass import verify_chain, verify_tree
from specjax.models.lora import LoRAConfig
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import mesh_scope
from tests.decoding.tiny import FULL, TARGET, random_draft, random_prompts, random_target


def test_a_round_costs_what_its_rule_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced: both the pass alone and the pass after a draft run the rule, on the law of drawn drafts."""
    target, drafter = random_target(0), DFlashDrafter(random_draft(0, FULL))
    seen: list[tuple[Any, ...]] = []

    def watching(target: Any, rows: Any, drafts: Any, law: Any, sampling: Any, rule: str, **rest: Any) -> Any:
        seen.append((rule, drafts.shape, None if law is None else law.shape))
        return verify_chain(target, rows, drafts, law, sampling, rule, **rest)

    for module in (step_costs, drafting):
        monkeypatch.setattr(module, "verify_chain", watching)
    with mesh_scope():
        batch = Batch.build(target, random_prompts(0, 2), [12] * 2, [()] * 2, drafter.block_size)
        sampling = batch.with_sampling(1.0, None, None, [0, 1]).sampling
        state = batch.prefill(target, drafter)
        for rule, choice in (("block", "sample"), ("rejection", "argmax")):
            for step in (step_costs._verify, step_costs._draft_and_verify):
                run = partial(step, drafting=Drafting(2, 0, rule, choice))
                jax.eval_shape(run, target, drafter, state, sampling)
    assert seen == [("block", (2, 2), (2, 2, TARGET.vocab_size))] * 2 + [("rejection", (2, 2), None)] * 2


def test_one_pass_adds_its_blocks_to_the_pass_that_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced: the pass alone is the target's; a round is one pass with blocks, and no draft beside it."""
    config = LoRADraftConfig(LoRAConfig(r=2, alpha=2.0), block_size=4, mask_token_id=95, masked_anchor=0.5)
    target, seen = random_target(0), []

    def watching(target: Any, rows: Any, drafts: Any, *rest: Any, **named: Any) -> Any:
        seen.append((named.get("drafting_ahead") is not None, drafts.shape))
        return verify_chain(target, rows, drafts, *rest, **named)

    for module in (step_costs, drafting):
        monkeypatch.setattr(module, "verify_chain", watching)
    monkeypatch.setattr(LoRADrafter, "draft_logits", lambda *_: pytest.fail("a pass of the draft alone"))
    with mesh_scope():
        drafter = LoRADrafter(LoRADraft(config, TARGET, rngs=nnx.Rngs(0)))
        batch = Batch.build(target, random_prompts(0, 2), [12] * 2, [()] * 2, drafter.block_size)
        state = batch.prefill(target, drafter)
        for step in (step_costs._verify, step_costs._draft_and_verify):
            after = jax.eval_shape(partial(step, drafting=Drafting(2, one_pass=True)), target, drafter, state, None)
    assert seen == [(False, (2, 2)), (True, (2, 2))]
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_steps_are_as_many_as_a_rounds_tokens_and_every_one_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that repeat would be made once, before the loop."""
    target = random_target(0)

    def step(target: Any, drafter: None, state: Any, sampling: Any, drafting: Drafting) -> Any:
        tokens = state.tokens.at[:, state.round].set(sampling.seeds.astype(jnp.int32))
        return dataclasses.replace(state, tokens=tokens, round=state.round + 1)

    counted: list[int] = []
    original = step_costs._seconds

    def counting(*args: Any) -> Any:
        counted.append(args[-1])
        return original(*args)

    with mesh_scope():
        batch = Batch.build(target, random_prompts(0, 2), [12] * 2, [()] * 2, 4)
        sampling = batch.with_sampling(1.0, None, None, [3, 50]).sampling
        state = batch.prefill(target, None)
        _, state = original(step, target, None, state, sampling, Drafting(0), 5)
        monkeypatch.setattr(step_costs, "_seconds", counting)
        step_costs.ar_seconds(target, batch, 4)
        step_costs.round_seconds(target, DFlashDrafter(random_draft(0, FULL)), batch, Drafting(2))
    assert state.tokens[:, :5].tolist() == [[3, 4, 5, 6, 7], [50, 51, 52, 53, 54]]
    assert counted == [16 * 4, 16, 16]


def test_the_pass_over_a_tree_runs_as_many_tokens_as_it_has_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced: both the pass alone and the pass after a draft, whose tree is built in the loop."""
    target, drafter = random_target(0), DFlashDrafter(random_draft(0, FULL))
    seen: list[tuple[int, ...]] = []

    def watching(target: Any, rows: Any, tree: Any, *rest: Any, **named: Any) -> Any:
        seen.append((*tree.tokens.shape, tree.max_depth, len(named.get("tap_ids", ()))))
        return verify_tree(target, rows, tree, *rest, **named)

    for module in (step_costs, drafting):
        monkeypatch.setattr(module, "verify_tree", watching)
    with mesh_scope():
        batch = Batch.build(target, random_prompts(0, 2), [12] * 2, [()] * 2, drafter.block_size)
        state = batch.prefill(target, drafter)
        for step in (step_costs._verify, step_costs._draft_and_verify):
            jax.eval_shape(partial(step, drafting=Drafting(3, 8)), target, drafter, state, None)
    assert seen == [(2, 9, 3, 0), (2, 9, 3, 2)]
