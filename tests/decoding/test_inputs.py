"""What `generate` refuses, before anything is compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from specjax import generate
from specjax.decoding import AutoWidth
from specjax.decoding.batch import PREFILL_CHUNK, Batch
from specjax.decoding.loop import decode, prefill
from specjax.errors import InputError
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.sharding import make_mesh, mesh_scope
from tests.decoding.tiny import FULL, TARGET, random_draft, random_target

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def target() -> Decoder:
    return random_target(0)


@pytest.fixture(scope="module")
def draft() -> DFlashDraft:
    return random_draft(0, FULL)


def refused(caplog: pytest.LogCaptureFixture, message: str, *args: Any, **kwargs: Any) -> None:
    before = prefill._cache_size(), decode._cache_size()
    with jax.log_compiles(), pytest.raises(InputError, match=message):
        generate(*args, **kwargs)
    assert (prefill._cache_size(), decode._cache_size()) == before
    assert not [r for r in caplog.records if r.getMessage().startswith("Compiling ")]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([PROMPT, []], {}, "prompt 1 is empty; give at least one token"),
        ([PROMPT, [5, 96]], {}, "prompt 1: token id 96 is outside the target's vocabulary of 96"),
        ([[-1]], {}, "prompt 0: token id -1 is outside"),
        ([[2**70]], {}, r"prompt 0 is \[1180.*; give a list of integers"),
        ([[1.0, 2.0]], {}, r"prompt 0 is \[1.0, 2.0\]; give a list of integers"),
        ([[True]], {}, "give a list of integers"),
        (["hello"], {}, "prompt 0 is 'hello'; give a list of integers"),
        (PROMPT, {}, "prompt 0 is 1; give a list of integers"),
        ([[PROMPT, [1]]], {}, "prompt 0 is .*; give a list of integers"),
        (
            [[1] * 33],
            {"max_new_tokens": 128},
            "prompt 0: 33 tokens and 128 new ones exceed the target's context of 160",
        ),
        ([PROMPT], {"max_new_tokens": 0}, "prompt 0: max_new_tokens is 0; give at least 1"),
        ([PROMPT, PROMPT], {"max_new_tokens": [3, -1]}, "prompt 1: max_new_tokens is -1"),
        ([PROMPT], {"max_new_tokens": 2.5}, r"max_new_tokens is \[2.5\]; give a list of integers"),
        ([PROMPT, PROMPT], {"max_new_tokens": [3]}, "max_new_tokens has 1 entries for 2 prompts"),
        ([PROMPT], {"stop_token_ids": [96]}, "prompt 0: stop token id 96 is outside the target's vocabulary"),
        ([PROMPT, PROMPT], {"stop_token_ids": [[1], [-2]]}, "prompt 1: stop token id -2 is outside"),
        ([PROMPT, PROMPT], {"stop_token_ids": [[1]]}, "stop_token_ids has 1 entries for 2 prompts"),
        ([PROMPT], {"stop_token_ids": 3}, "stop_token_ids is 3; give a list of integers, or one such list a prompt"),
        ([PROMPT], {"stop_token_ids": "</s>"}, "stop_token_ids is '</s>'; give a list of integers"),
        ([PROMPT], {"temperature": -0.1}, r"temperature is -0.1; give 0 \(greedy\) or at least 1e-05"),
        ([PROMPT], {"temperature": 1e-38}, "temperature is 1e-38; give 0"),
        ([PROMPT], {"temperature": "1"}, "temperature is '1'; give a number"),
        ([PROMPT], {"temperature": 1, "top_k": 2.5}, "top_k is 2.5; give an integer"),
        ([PROMPT], {"temperature": 1, "top_k": 2**31}, "top_k is 2147483648"),
        ([PROMPT], {"temperature": float("nan")}, "temperature is nan"),
        ([PROMPT], {"top_k": 3}, "top_k is 3, but temperature 0 is greedy; give a temperature, or leave top_k out"),
        ([PROMPT], {"top_p": 0.9}, "top_p is 0.9, but temperature 0 is greedy"),
        ([PROMPT], {"temperature": 1.0, "top_k": 0}, "top_k is 0; give at least 1"),
        ([PROMPT], {"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1; give a number above 0 and at most 1"),
        ([PROMPT], {"temperature": 1.0, "seed": -1}, r"seed is -1; give an integer from 0 to 2\*\*32 - 1"),
        ([PROMPT], {"temperature": 1.0, "seed": [1, 2]}, "seed has 2 entries for 1 prompts"),
        ([PROMPT], {"draft_tokens": 2}, "draft_tokens is 2, but there is no draft"),
        ([PROMPT], {"draft_tokens": AutoWidth()}, "draft_tokens is auto, but there is no draft"),
        ([PROMPT], {"temperature": 1.0, "rule": "typical"}, "rule is 'typical'; give one of match, rejection, block"),
        ([PROMPT], {"temperature": 1.0, "draft_choice": "beam"}, "draft_choice is 'beam'; give one of argmax, sample"),
        ([PROMPT], {"rule": "block"}, "rule is block, but temperature 0 is greedy"),
        ([PROMPT], {"draft_choice": "sample"}, "draft_choice is sample, but temperature 0 is greedy"),
        (
            [PROMPT],
            {"temperature": 1.0, "rule": "block"},
            "rule is block, but there is no draft; give one or leave rule",
        ),
        ([PROMPT], {"temperature": 1.0, "draft_choice": "sample"}, "draft_choice is sample, but there is no draft"),
        ([PROMPT], {"samples": 2}, "samples is 2, but temperature 0 is greedy"),
        ([PROMPT], {"temperature": 1.0, "samples": 0}, "samples is 0; give at least 1"),
        ([PROMPT], {"temperature": 1.0, "samples": 1.5}, "samples is 1.5; give an integer"),
        ([PROMPT], {"temperature": 1.0, "samples": 2, "seed": [1]}, "seed has 1 entries for 2 samples"),
        ([PROMPT], {"logit_mask": [1] * 96}, r"logit_mask has dtype int64 and shape \(96,\); give booleans"),
        ([PROMPT], {"logit_mask": [True] * 95}, r"shape \(95,\); give booleans.* of shape \(96,\) or \(1, 96\)"),
        ([PROMPT], {"logit_mask": [False] * 96}, "prompt 0: logit_mask allows no token; allow at least one"),
        ([PROMPT], {"stop_strings": "end", "tokenizer": object()}, "stop_strings is 'end'; give a list of strings"),
        ([PROMPT], {"stop_strings": ["a", ""], "tokenizer": object()}, "stop_strings holds ''; give strings of at"),
        ([PROMPT], {"stop_strings": ["a"]}, "stop_strings are text, but there is no tokenizer"),
        ([PROMPT], {"tree_nodes": 9}, "tree_nodes is 9, but there is no draft; give one or leave it out"),
        ([PROMPT], {"tree_nodes": 9, "rule": "block", "temperature": 1.0}, "tree_nodes is 9, but there is no draft"),
    ],
)
def test_a_bad_request_is_refused(
    target: Decoder, caplog: pytest.LogCaptureFixture, prompts: Any, options: dict[str, Any], message: str
) -> None:
    refused(caplog, message, target, prompts, **options)


@pytest.mark.parametrize("draft_tokens", [0, -1, 4])
def test_draft_tokens_must_fit_the_block(
    target: Decoder, draft: DFlashDraft, caplog: pytest.LogCaptureFixture, draft_tokens: int
) -> None:
    message = f"draft_tokens is {draft_tokens}; this draft proposes 1 to 3"
    refused(caplog, message, target, [PROMPT], draft, draft_tokens=draft_tokens)


@pytest.mark.parametrize("draft_tokens", ["auto", 2.5, True])
def test_draft_tokens_are_an_integer(
    target: Decoder, draft: DFlashDraft, caplog: pytest.LogCaptureFixture, draft_tokens: Any
) -> None:
    message = f"draft_tokens is {draft_tokens!r}; give an integer or an AutoWidth"
    refused(caplog, message, target, [PROMPT], draft, draft_tokens=draft_tokens)


def test_a_width_chosen_by_time_may_not_change_what_is_drawn(
    target: Decoder, draft: DFlashDraft, caplog: pytest.LogCaptureFixture
) -> None:
    message = "rule is block, but draft_tokens is auto: .* give match, or a number of draft tokens"
    refused(caplog, message, target, [PROMPT], draft, draft_tokens=AutoWidth(), rule="block", temperature=1.0)
    drawn = {"draft_choice": "sample", "temperature": 1.0}
    message = "draft_choice is sample, but a tree needs argmax; leave it out, or trees"
    refused(caplog, message, target, [PROMPT], draft, draft_tokens=AutoWidth(trees=True), **drawn)
    refused(caplog, "the draft is 'runs/x'; load it first, with load_draft", target, [PROMPT], "runs/x")


@pytest.mark.parametrize("tree_nodes", [0, 1, 97, 2.5])
def test_a_tree_must_hold_the_drafts_of_a_round_and_have_a_size(
    target: Decoder, draft: DFlashDraft, caplog: pytest.LogCaptureFixture, tree_nodes: Any
) -> None:
    """At most a node for every token of the vocabulary."""
    message = f"tree_nodes is {tree_nodes}; give 2 .the drafts of a round, which it holds. to 96, or lower draft_tokens"
    refused(caplog, message, target, [PROMPT], draft, draft_tokens=2, tree_nodes=tree_nodes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "block", "temperature": 1.0}, "rule is block, but a tree needs match; leave rule or tree_nodes out"),
        ({"draft_choice": "sample", "temperature": 1.0}, "draft_choice is sample, but a tree needs argmax"),
        ({"draft_tokens": AutoWidth()}, "tree_nodes is 9, but draft_tokens is auto; give one of the two"),
    ],
)
def test_what_a_tree_does_not_go_with(
    target: Decoder, draft: DFlashDraft, caplog: pytest.LogCaptureFixture, options: dict[str, Any], message: str
) -> None:
    refused(caplog, message, target, [PROMPT], draft, tree_nodes=9, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "the draft does not fit the target: hidden_size is 64, the target's hidden_size is 32"),
        ({"vocab_size": 128, "mask_token_id": 96}, "mask_token_id is 96, the target's vocab_size is 96"),
        ({"num_target_layers": 6}, "num_target_layers is 6, the target's num_hidden_layers is 3; use the target"),
    ],
)
def test_a_draft_of_another_target_is_refused(
    target: Decoder, caplog: pytest.LogCaptureFixture, change: dict[str, int], message: str
) -> None:
    other = random_draft(0, dataclasses.replace(FULL, **change))
    refused(caplog, message, target, [PROMPT], other)
    refused(caplog, message, target, [], other)


def test_models_on_another_mesh_are_refused(
    target: Decoder, draft: DFlashDraft, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = r"data=1, fsdp=1, tensor=1 of devices \[0\]", r"data=1, fsdp=1, tensor=2 of devices \[0, 1\]"
    with jax.set_mesh(make_mesh(tensor=2)):
        sharded = random_target(0)
        remedy = "load target and draft and generate under the same jax.set_mesh"
        refused(caplog, f"the target is on the mesh {one}, but the mesh in force is {two}; {remedy}", target, [PROMPT])
        refused(caplog, f"the draft is on the mesh {one}, but the mesh in force is {two}", sharded, [PROMPT], draft)
    refused(caplog, f"the target is on the mesh {two}, but the mesh in force is {one}", sharded, [PROMPT])
    with jax.set_mesh(make_mesh(devices=jax.devices()[1:2])):
        refused(caplog, r"devices \[0\], but the mesh in force is .* of devices \[1\]", target, [PROMPT])


def test_a_bidirectional_target_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    other = random_target(0, dataclasses.replace(TARGET, causal=False))
    refused(caplog, "the target is bidirectional", other, [PROMPT])


def test_the_whole_context_may_be_used(target: Decoder) -> None:
    answer = generate(target, [np.arange(60)], max_new_tokens=100).tokens[0]
    assert len(answer) == 100


def test_caches_are_hardly_longer_than_the_context() -> None:
    """Long prompts and answers: in whole chunks of a prefill."""
    context = 5000
    config = dataclasses.replace(TARGET, max_position_embeddings=context)
    for prompt, new in ((1, 1), (64, 65), (1025, 2049), (3000, 1000), (4900, 100)):
        with mesh_scope():
            batch = Batch.build(random_target(0, config), [[1] * prompt], [new], [[]], 8)
        assert batch.prompts.shape[1] >= prompt
        assert batch.max_rounds >= new
        assert batch.prompts.shape[1] % min(batch.prompts.shape[1], PREFILL_CHUNK) == 0
        assert batch.capacity <= max(2 * (prompt + new) + 128, prompt + new + 3 * PREFILL_CHUNK)
        assert batch.prompts.shape[1] <= context + PREFILL_CHUNK
