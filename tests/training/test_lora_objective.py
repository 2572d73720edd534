"""The loss of a LoRA draft against `peft`: one block at a time, after a context that runs without the adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import AutoModelForCausalLM

from specjax.models.decoder import Decoder
from specjax.models.lora import LoRAConfig
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import SPECS, put
from specjax.training.evaluation import draft_evaluator
from specjax.training.step import Batch
from specjax.weights import load_target, save_adapters
from tests.training import block_reference
from tests.training.block_reference import (
    ANCHORS,
    BLOCK,
    DOCUMENTS,
    GAMMA,
    LENGTH,
    LOSS,
    STARTS,
    VALID,
    assert_close,
    data_label,
    loss_sums,
    noise_ids,
    scattered,
    sums_of,
)
from tests.training.tiny import MASK_TOKEN

LORA = LoRAConfig(r=3, alpha=4.0, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


class Case(NamedTuple):
    target: Decoder
    draft: LoRADraft
    batch: Batch
    tokens: np.ndarray
    loss_mask: np.ndarray
    logits: np.ndarray
    peft: PeftModel


@jax.jit
def shaken(x: jax.Array) -> jax.Array:
    sharding = jax.typeof(x).sharding
    return x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape, out_sharding=sharding)


@pytest.fixture(scope="module")
def case(
    few_words: Path,
    rows_case: block_reference.Case,
    one_device_mesh: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    target = load_target(few_words, dtype=jnp.float32)
    config = LoRADraftConfig(LORA, block_size=BLOCK, mask_token_id=MASK_TOKEN)
    draft = LoRADraft(config, target.config, rngs=nnx.Rngs(0))
    draft = jax.tree.map(shaken, draft)  # b is zero at first
    folder = save_adapters(draft.adapters, tmp_path_factory.mktemp("adapters") / "lora", base_name=None)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(few_words, dtype=torch.float32), folder)
    known = rows_case
    return Case(target, draft, known.batch, known.tokens, known.loss_mask, known.logits, peft)


def block_logits(case: Case, ids: np.ndarray, *, adapt_context: bool = False) -> np.ndarray:
    """Logits [b, N, B, v] of blocks that hold `ids` [b, N, B], by `peft`."""
    found = np.zeros((*ids.shape, case.logits.shape[-1]))
    for row, j in np.argwhere(VALID):
        start, anchor = STARTS[row, ANCHORS[row, j]], ANCHORS[row, j]
        context = torch.tensor(case.tokens[row, start:anchor])[None]
        positions = torch.arange(anchor - start, anchor - start + BLOCK)[None]
        everything = torch.zeros(1, 1, BLOCK, int(anchor - start) + BLOCK)
        block: dict[str, Any] = {"position_ids": positions, "attention_mask": everything}
        with torch.no_grad():
            if anchor > start:
                if adapt_context:
                    past = case.peft(context, use_cache=True).past_key_values
                else:
                    with case.peft.disable_adapter():
                        past = case.peft(context, use_cache=True).past_key_values
                block["past_key_values"] = past
            found[row, j] = case.peft(torch.tensor(ids[row, j])[None], **block).logits[0].double().numpy()
    return found


def test_the_loss_is_that_of_the_plain_loop(case: Case) -> None:
    expected = sums_of(case, block_logits(case, noise_ids(case)), data_label(case)) | {"expected": np.zeros(())}
    assert expected["supervised"][BLOCK - 1] > 2
    assert_close(loss_sums(case), expected)


def test_adapters_may_act_on_the_context_too(case: Case) -> None:
    config = dataclasses.replace(case.draft.config, adapt_context=True)
    draft = jax.tree.map(lambda x: x, case.draft)
    draft.config = config
    logits = block_logits(case, noise_ids(case), adapt_context=True)
    expected = sums_of(case, logits, data_label(case)) | {"expected": np.zeros(())}
    other = sums_of(case, block_logits(case, noise_ids(case)), data_label(case))
    assert abs(expected["loss_sum"] / other["loss_sum"] - 1) > 1e-3
    assert_close(loss_sums(case._replace(draft=draft)), expected)


def test_anchors_may_be_masked_and_tokens_shown(case: Case) -> None:
    shown = scattered()
    logits = block_logits(case, noise_ids(case, shown))
    expected = sums_of(case, logits, data_label(case), shown) | {"expected": np.zeros(())}
    batch = case.batch | {"shown": put(shown, SPECS.act_bN)}
    assert_close(loss_sums(case._replace(batch=batch)), expected)


def test_a_draft_of_masked_anchors_alone_is_evaluated_with_these(case: Case) -> None:
    draft = jax.tree.map(lambda x: x, case.draft)
    draft.config = dataclasses.replace(draft.config, masked_anchor=1.0)
    none = np.zeros((*ANCHORS.shape, BLOCK), bool)
    logits = block_logits(case, noise_ids(case, none))
    assert_close(
        loss_sums(case._replace(draft=draft)), sums_of(case, logits, data_label(case)) | {"expected": np.zeros(())}
    )
    greedy = sums_of(case, logits, lambda row, x: int(case.logits[row, x - 1].argmax()))
    host = {name: np.asarray(x) for name, x in case.batch.items()}
    assert draft_evaluator(LOSS, case.target, [host])(draft).score == greedy["prefix"] / greedy["blocks"]
    draft.config = dataclasses.replace(draft.config, masked_anchor=0.5)
    both = draft_evaluator(LOSS, case.target, [host])(draft).metrics
    assert both["acceptance_length_masked_anchor_tf"] == greedy["prefix"] / greedy["blocks"]
    known = sums_of(case, block_logits(case, noise_ids(case)), data_label(case))
    unknown = sums_of(case, logits, data_label(case))
    losses = [float(sums["loss_sum"] / sums["weight"]) for sums in (known, unknown)]
    assert both["loss"] == pytest.approx(losses[0], rel=1e-5) != pytest.approx(losses[1], rel=1e-3)


def test_the_teacher_is_the_target_without_adapters(case: Case) -> None:
    """KL against the target's own next-token law at the token before each slot."""
    loss = dataclasses.replace(LOSS, objective={"kl": 1.0})
    ours, _ = jax.jit(lambda *args: loss(*args))(case.draft, case.target, case.batch)
    logits, total = block_logits(case, noise_ids(case)), 0.0
    for row, j in np.argwhere(VALID):
        for k in range(1, BLOCK):
            x = ANCHORS[row, j] + k
            if x >= LENGTH or DOCUMENTS[row, x] != DOCUMENTS[row, x - k] or not case.loss_mask[row, x]:
                break
            p, q = (scores - np.log(np.exp(scores).sum()) for scores in (case.logits[row, x - 1], logits[row, j, k]))
            total += np.exp(-(k - 1) / GAMMA) * (np.exp(p) * (p - q)).sum()
    np.testing.assert_allclose(ours, total, rtol=1e-5)


def test_only_adapters_have_a_gradient_and_dropout_is_a_function_of_its_key(case: Case) -> None:
    loss = jax.jit(lambda *args: LOSS(*args)[0])
    dropping = jax.tree.map(lambda x: x, case.draft)
    dropping.adapters.config = dataclasses.replace(LORA, dropout=0.3)
    keyed = [case.batch | {"dropout_key": jax.random.key(seed)} for seed in (0, 0, 1)]
    first, again, other = (float(loss(dropping, case.target, batch)) for batch in keyed)
    plain = float(loss(dropping, case.target, case.batch))
    assert first == again != other
    assert plain == float(loss(case.draft, case.target, keyed[0])) != first
    grads = jax.jit(jax.grad(lambda *args: LOSS(*args)[0]))(case.draft, case.target, case.batch)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(grads))
