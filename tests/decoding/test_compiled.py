"""The compiled decoder: compiled once, fed and fetched once, without callbacks or copies of a cache."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from specjax import fetch
from specjax.decoding import DFlashDrafter, generate
from specjax.decoding.batch import Batch
from specjax.decoding.drafting import PLAIN, Drafting
from specjax.decoding.loop import decode, prefill
from specjax.models.decoder import Decoder
from specjax.models.sharding import make_mesh, mesh_scope
from tests.decoding.tiny import FULL, SLIDING, TARGET, random_draft, random_target

DraftedBatch = tuple[Decoder, DFlashDrafter, Batch]
BATCH = 2


def compiled_programs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling ")]


def random_request(seed: int, longest: int, most_new: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    lengths = [int(rng.integers(1, longest)), longest]
    return {
        "prompts": [rng.integers(0, TARGET.vocab_size, n).tolist() for n in lengths],
        "max_new_tokens": [int(rng.integers(1, most_new)), most_new],
        "stop_token_ids": rng.integers(0, TARGET.vocab_size, (BATCH, int(rng.integers(0, 5)))).tolist(),
    }


@pytest.mark.parametrize("drafted", [False, True])
def test_a_bucket_is_compiled_once(drafted: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Other prompts, lengths, limits, stops and weights compile nothing at all; another bucket compiles once."""
    for function in (prefill, decode):
        function.clear_cache()  # other tests decode these shapes too: what is counted here is compiled here

    def models(seed: int) -> dict[str, Any]:
        return {"target": random_target(seed), "draft": random_draft(seed, FULL) if drafted else None}

    first, second = models(0), models(1)
    before = prefill._cache_size(), decode._cache_size()
    with jax.log_compiles():
        generate(**first, **random_request(0, 20, 30))
        assert {m.split()[1] for m in compiled_programs(caplog)} >= {"jit(prefill)", "jit(decode)"}
        caplog.clear()
        for seed in range(1, 6):
            generate(**(first if seed % 2 else second), **random_request(seed, (3, 64)[seed % 2], (64, 2)[seed % 2]))
        assert compiled_programs(caplog) == []
    assert (prefill._cache_size(), decode._cache_size()) == (before[0] + 1, before[1] + 1)
    for _ in range(2):
        generate(**first, **random_request(9, 20, 65))
    assert (prefill._cache_size(), decode._cache_size()) == (before[0] + 2, before[1] + 2)


@pytest.mark.parametrize("drafted", [False, True])
def test_one_copy_to_the_host_and_none_to_the_device(drafted: bool) -> None:
    """Arguments are placed explicitly; neither program is given anything else."""
    target, draft = random_target(0), random_draft(0, FULL) if drafted else None
    generate(target, draft=draft, **random_request(0, 20, 30))
    before = fetch.count
    with jax.transfer_guard_host_to_device("disallow"):
        generate(target, draft=draft, **random_request(1, 30, 40))
    assert fetch.count == before + 1


@pytest.fixture(scope="module")
def drafted_batch() -> DraftedBatch:
    with mesh_scope():
        target, drafter = random_target(0), DFlashDrafter(random_draft(0, SLIDING))
        prompts = [[1, 2, 3], [4, 5]]
        return target, drafter, Batch.build(target, prompts, [40, 40], [[], []], drafter.block_size)


def test_the_state_is_donated(drafted_batch: DraftedBatch) -> None:
    target, drafter, batch = drafted_batch
    with mesh_scope():
        state = batch.prefill(target, drafter)
        result = decode(target, drafter, state, batch.limits, drafting=Drafting(7))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((result, target, drafter, batch.limits)))


@pytest.mark.parametrize("tree_nodes", [0, 24])
def test_the_program_calls_nothing_back_and_copies_no_cache(drafted_batch: DraftedBatch, tree_nodes: int) -> None:
    target, drafter, batch = drafted_batch
    with mesh_scope():
        state = batch.prefill(target, drafter)
        caches = jax.tree.leaves((state.cache, state.drafter))
        prefill_arguments = target, drafter, batch.prompts, batch.prompt_length, batch.limits
        lowered = (
            prefill.lower(*prefill_arguments, capacity=batch.capacity, max_rounds=batch.max_rounds, chunk=64),
            decode.lower(target, drafter, state, batch.limits, drafting=Drafting(7, tree_nodes)),
        )
        programs = [program.compile() for program in lowered]
    for program in programs:
        assert not re.search(r"callback|infeed|outfeed|\bsend\(|\brecv\(", program.as_text())
    text = programs[1].as_text()
    assert len(caches) == 2 * (TARGET.num_hidden_layers + SLIDING.num_hidden_layers)
    (shape,) = {",".join(map(str, cache.shape)) for cache in caches}
    writes = re.findall(rf"= f32\[{shape}\]\S* (?:scatter|dynamic-update-slice)\(", text)
    assert len(writes) == len(caches)
    assert not re.search(rf"f32\[{shape}\]\S* (copy|transpose|select|concatenate|pad|add|convert)\(", text)
    memory = programs[1].memory_analysis()
    assert memory.alias_size_in_bytes >= sum(cache.nbytes for cache in caches)


def test_the_baseline_of_one_row_copies_no_cache() -> None:
    """One slot of one row is the shape for which XLA would replace the in-place write by copies of the cache."""
    with mesh_scope():
        target = random_target(0)
        batch = Batch.build(target, [[1, 2, 3]], [40], [[]], 1)
        state = batch.prefill(target, None)
        text = decode.lower(target, None, state, batch.limits, drafting=PLAIN).compile().as_text()
    shape = ",".join(map(str, state.cache.keys[0].shape))
    assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)


def test_a_tree_sends_only_the_likeliest_tokens_of_every_vocabulary_shard() -> None:
    """And gathers nothing else that a chain does not: neither rows, nor logits, nor keys."""
    kinds = "all-gather|all-to-all|collective-permute"

    def gathered(tree_nodes: int) -> set[str]:
        compiled = decode.lower(target, drafter, state, batch.limits, drafting=Drafting(3, tree_nodes)).compile()
        return set(re.findall(rf"= (\w+\[[\d,]*\])\S* (?:{kinds})\(", compiled.as_text()))

    with jax.set_mesh(make_mesh(2, 2, 2)):
        target, drafter = random_target(0), DFlashDrafter(random_draft(0, FULL))
        batch = Batch.build(target, [[1, 2, 3]] * 4, [40] * 4, [[]] * 4, drafter.block_size)
        state = batch.prefill(target, drafter)
        chain, tree = gathered(0), gathered(9)
    likeliest = {f"{kind}[1,3,{2 * 7}]" for kind in ("f32", "s32")}  # of 3 slots and 2 shards, 9 - 3 + 1 each
    choices = {f"{kind}[1,10,2]" for kind in ("f32", "s32")}  # the argmax of 10 nodes
    assert tree - chain == likeliest | choices
