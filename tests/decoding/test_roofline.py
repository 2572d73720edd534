"""Least times of rounds, against the parameters of real modules and a count token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from specjax.decoding.drafter import Rows, drafter_of
from specjax.decoding.drafting import Drafting, draft_and_verify
from specjax.decoding.roofline import Pass, Workload, autoregressive, seconds, speculative
from specjax.devices import Peak
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.lora import LoRAConfig
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import SPECS, mesh_scope
from specjax.weights.module_params import abstract_module, flat_params
from tests.decoding.tiny import FULL, OTHER_TARGETS, SLIDING, TARGET, random_draft, random_target

LORA = LoRADraftConfig(LoRAConfig(3, 3.0, target_modules=("q_proj", "down_proj")), 4, 95, masked_anchor=0.5)
WORK = Workload(rows=5, context=7, draft_tokens=2)


def matrices(build: Callable[[], Any], *, without: str = "embed_tokens") -> int:
    """Elements of a module's matrices."""
    with mesh_scope():
        params = flat_params(abstract_module(build)).items()
    return sum(value.size for path, value in params if value.ndim == 2 and without not in path)


def target_matrices() -> tuple[int, int]:
    """Of the layers, and of the head."""
    build = lambda: Decoder(TARGET, rngs=nnx.Rngs(0))  # noqa: E731
    layers = matrices(lambda: build().layers)
    return layers, matrices(build) - layers


def attention(tokens: int, keys: int, layers: int = TARGET.num_hidden_layers) -> int:
    """FLOPs of scores and sums: a multiply and an add of each, per token, key, head and dimension."""
    return sum(4 * keys * TARGET.num_attention_heads * TARGET.head_dim for _ in range(tokens * layers))


def cache_bytes(keys: int, layers: int = TARGET.num_hidden_layers) -> int:
    return 2 * 2 * keys * TARGET.num_key_value_heads * TARGET.head_dim * layers


def test_a_step_reads_the_weights_and_the_context_once() -> None:
    layers, head = target_matrices()
    (step,) = autoregressive(TARGET, WORK)
    assert step.flops == 5 * (2 * (layers + head) + attention(1, 7 + 1))
    assert step.bytes == 2 * (layers + head) + cache_bytes(5 * 7)


def test_a_dflash_round() -> None:
    target_layers, head = target_matrices()
    draft, verify = speculative(TARGET, FULL, WORK)["draft, then verify"]
    assert verify.flops == 5 * (3 * 2 * (target_layers + head) + sum(attention(1, 7 + i) for i in (1, 2, 3)))
    assert verify.bytes == 2 * (target_layers + head) + cache_bytes(5 * 7)
    build = lambda: DFlashDraft(FULL, rngs=nnx.Rngs(0))  # noqa: E731
    layers = matrices(lambda: build().layers)
    keys_values = sum(matrices(lambda p=name: getattr(build().layers[0].self_attn, p)) for name in ("k_proj", "v_proj"))
    fuse = matrices(build) - layers
    observed = 3 * 2 * (fuse + FULL.num_hidden_layers * keys_values)
    slots = 4 * 2 * layers + attention(4, 7 + 4, FULL.num_hidden_layers)
    assert draft.flops == 5 * (observed + slots + 2 * 2 * head)
    kept = FULL.num_hidden_layers * keys_values  # read again, for what was verified before
    assert draft.bytes == 2 * (fuse + kept + layers + head) + cache_bytes(5 * 7, FULL.num_hidden_layers)


def test_rounds_of_adapters() -> None:
    layers, head = target_matrices()
    adapters = matrices(lambda: LoRADraft(LORA, TARGET, rngs=nnx.Rngs(0)))
    ways = speculative(TARGET, LORA, WORK)
    drafted, verify = ways["two passes"]
    assert verify == speculative(TARGET, FULL, WORK)["draft, then verify"][1]
    assert drafted.flops == 5 * (4 * 2 * (layers + adapters) + attention(4, 7 + 4) + 2 * 2 * head)
    assert drafted.bytes == 2 * (layers + head) + 4 * adapters + cache_bytes(5 * 7)
    (one_pass,) = ways["one pass"]
    tokens = sum(2 * (layers + adapters + head) + attention(1, 7 + i) for i in (1, 2, 3))
    slots = sum(2 * (layers + adapters) + attention(1, 7 + i + 4) for i in (1, 2, 3) for _slot in range(4))
    assert one_pass.flops == 5 * (tokens + slots + 2 * 2 * head)
    assert one_pass.bytes == drafted.bytes + 2 * head
    known = dataclasses.replace(LORA, masked_anchor=0.0)
    assert speculative(TARGET, known, WORK) == {"two passes": ways["two passes"]}
    ((*same, third),) = speculative(TARGET, dataclasses.replace(known, adapt_context=True), WORK).values()
    assert same == ways["two passes"]
    assert third.flops == 5 * (3 * 2 * (layers + adapters) + sum(attention(1, 7 + i) for i in (1, 2, 3)))
    assert third.bytes == drafted.bytes - 2 * head


def matrix_flops(jaxpr: Any) -> int:
    """Of a program's products of tokens with matrices, in programs within it, too."""
    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("while", "scan") or not inner(equation), "how often, is not known"
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.ndim == 2:
            left, right = (x.aval for x in equation.invars)
            assert equation.params["dimension_numbers"] == (((left.ndim - 1,), (0,)), ((), ()))
            total += 2 * left.size * right.shape[1]
        total += inner(equation)
    return total


def inner(equation: Any) -> int:
    return sum(matrix_flops(jaxpr) for jaxpr in jax.core.jaxprs_in_params(equation.params))


@pytest.mark.parametrize("way", ["draft, then verify", "two passes", "one pass", "adapted"])
def test_the_products_are_those_that_the_decoder_runs(way: str) -> None:
    """In the traced program of a round: so many tokens through every layer, adapter and head."""
    config = dataclasses.replace(LORA, adapt_context=way == "adapted", masked_anchor=0.5 * (way == "one pass"))
    drafting = Drafting(WORK.draft_tokens, one_pass=way == "one pass")

    def round_of(target: Decoder, draft: DFlashDraft | LoRADraft) -> Any:
        drafter = drafter_of(draft)
        length = jnp.full((5,), 7, jnp.int32, out_sharding=SPECS.act_b)
        rows = Rows(length, length, length < 0, target.empty_cache(5, 16))
        verified = draft_and_verify(target, drafter, drafter.init(target, 5, 16), rows, None, drafting)
        state = drafter.init(target, 5, 16) if verified.ahead is None else verified.ahead
        return verified.tokens, drafter.observe(state, target, verified.seen)

    with mesh_scope():
        target = random_target(0)
        draft = random_draft(0, FULL) if way == "draft, then verify" else LoRADraft(config, TARGET, rngs=nnx.Rngs(0))
        traced = jax.make_jaxpr(round_of)(target, draft)
    ways = speculative(TARGET, FULL if way == "draft, then verify" else config, dataclasses.replace(WORK, context=0))
    passes = ways[way] if way in ways else next(iter(ways.values()))
    assert matrix_flops(traced.jaxpr) == sum(each.flops for each in passes) - own_attention(way)


def own_attention(way: str) -> int:
    """Of a round without a context."""
    chain = sum(attention(1, i) for i in (1, 2, 3))
    others = {
        "draft, then verify": attention(4, 4, FULL.num_hidden_layers),
        "two passes": attention(4, 4),
        "one pass": sum(attention(4, 4 + i) for i in (1, 2, 3)),
        "adapted": attention(4, 4) + chain,
    }
    return 5 * (chain + others[way])


def test_a_sliding_layer_sees_its_window_only() -> None:
    target, narrow = OTHER_TARGETS["sliding"], WORK
    (full,) = autoregressive(dataclasses.replace(target, layer_types=()), narrow)
    (sliding,) = autoregressive(target, narrow)
    assert full.flops - sliding.flops == 5 * attention(1, 7 - 5, layers=2)
    assert full.bytes - sliding.bytes == cache_bytes(5 * (7 - 5), layers=2)
    draft = dataclasses.replace(SLIDING, layer_types=("full_attention",) * 2)
    of_full, of_sliding = (speculative(target, each, narrow)["draft, then verify"][0] for each in (draft, SLIDING))
    assert of_full.flops - of_sliding.flops == 5 * attention(8, 7 - 4, layers=1)
    assert of_full.bytes - of_sliding.bytes == cache_bytes(5 * (7 - 4), layers=1)


def test_a_pass_takes_the_longer_of_computing_and_reading() -> None:
    peak = Peak(tflops=2.0, gb_s=4.0)
    assert Pass(6e12, 4e9).seconds(peak) == 3
    assert Pass(6e12, 20e9).seconds(peak) == 5
    assert seconds([Pass(6e12, 4e9), Pass(6e12, 20e9)], peak) == 8


def test_as_many_drafts_as_a_block_has() -> None:
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"{wrong} drafts of a block of 4"):
            speculative(TARGET, FULL, dataclasses.replace(WORK, draft_tokens=wrong))
