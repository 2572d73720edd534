"""The parts of a draft's train step, each compiled and timed alone on the step's shapes.

Alone they cannot overlap or fuse as they do in the step, so their sum is not the step: it says where the time goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from specjax.blockdiff.losses import Teacher
from specjax.blockdiff.masks import context_ranges
from specjax.blockdiff.terms import needs_teacher
from specjax.config import RunConfig
from specjax.models.attention import KeySegment, attention, scored_pairs
from specjax.models.decoder import Decoder, DecoderLayer
from specjax.models.dflash import DFlashDraft
from specjax.models.sharding import SPECS
from specjax.training.objectives import BlockDiffusionLoss
from specjax.training.optimizer import learning_rate_schedule, make_optimizer
from specjax.training.state import TrainState
from specjax.training.step import Batch
from specjax.training.stopwatch import seconds_of, spread

Part = Callable[[], Any]


def measure_parts(
    config: RunConfig,
    loss: BlockDiffusionLoss,
    state: TrainState[DFlashDraft],
    target: Decoder,
    batch: Batch,
    steps: int,
    warmup: int,
) -> dict[str, float]:
    """Median seconds a step of every part, forward and backward, over all micro-batches; `state` is used up.

    target_forward is absent where the batch has states. Draft attention is scores, softmax and combination; its
    projections count with the MLP's.
    """
    micro = {name: x[0] for name, x in batch.items()}
    times = {}
    for name, part in _micro_parts(loss, state.model, target, micro).items():
        times[name] = config.training.accumulation_steps * _median(part, steps, warmup)
    times["optimizer"] = _median(_optimizer(config, state), steps, warmup)
    return times


def context_scores(loss: BlockDiffusionLoss, draft: DFlashDraft, batch: Batch) -> dict[str, float]:
    """Shares of the pairs of a slot and a context key in a micro-batch: visible, and given a score by the attention."""
    documents, anchors = batch["document_ids"][0], batch["anchors"][0]
    start, stop = context_ranges(documents, anchors)
    (b, blocks), keys, size = anchors.shape, documents.shape[1], draft.config.block_size
    every_pair = b * blocks * size * keys * len(draft.layers)
    visible = scored = 0
    for kind in draft.config.layer_types:
        first, last = (x.reshape(b, -1) for x in draft.visible(kind, start, stop, size)[:2])
        visible += int(np.asarray(jnp.maximum(last - first, 0)).sum(dtype=np.int64))
        scored += scored_pairs(first, last, keys, loss.query_chunk)
    return {"visible": visible / every_pair, "scored": scored / every_pair}


def _median(part: Part, steps: int, warmup: int) -> float:
    for _ in range(max(1, warmup)):
        jax.block_until_ready(part())
    return spread([seconds_of(part) for _ in range(steps)])["median"]


def _micro_parts(loss: BlockDiffusionLoss, draft: DFlashDraft, target: Decoder, batch: Batch) -> dict[str, Part]:
    teacher = needs_teacher(loss.objective)
    parts: dict[str, Part] = {}
    if "states" not in batch:

        @jax.jit
        def target_forward(target: Decoder, batch: Batch) -> Any:
            output = loss.run_target(draft, target, batch)
            return (output.taps, output.hidden) if teacher else output.taps

        parts["target_forward"] = lambda: target_forward(target, batch)
    b, t = batch["input_ids"].shape
    size, d = draft.config.block_size, draft.config.hidden_size
    slots = batch["anchors"].shape[1] * size
    hidden = _random((b, t, d), draft.dtype)
    taps = _random((b, t, d * len(draft.config.target_layer_ids)), draft.dtype)
    noise = _random((b, slots, d), draft.dtype)
    attend = jax.jit(_with_gradient(_attention(loss, draft)))
    arguments = _attention_inputs(draft, b, t, slots // size), batch["document_ids"], batch["anchors"]
    project = jax.jit(_with_gradient(lambda *inputs: _projections(loss, *inputs)))
    head = jax.jit(jax.value_and_grad(lambda x, *rest: _head_loss(loss, draft, x, *rest)))
    parts["draft_attention"] = lambda: attend(*arguments)
    parts["draft_projections_mlp"] = lambda: project(draft, taps, noise)
    blocks = noise.reshape(b, slots // size, size, d)
    parts["head_loss"] = lambda: head(blocks, target, batch, hidden if teacher else None)
    return parts


def _random(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Standard normal, its first axis split over the batch axes."""
    spec = jax.sharding.PartitionSpec(SPECS.act_btd[0])
    return jax.jit(lambda: jax.reshard(jax.random.normal(jax.random.key(0), shape, dtype), spec))()


def _with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` and its gradient in the first argument, from a cotangent that no compiler can simplify: the output."""

    def run(x: Any, *rest: Any) -> Any:
        output, pull = jax.vjp(lambda x: function(x, *rest), x)
        return output, pull(output)

    return run


def _attention(loss: BlockDiffusionLoss, draft: DFlashDraft) -> Callable[..., Any]:
    """((queries, context kv, own kv), document ids, anchors) -> attended, one per layer, over its visible ranges."""
    config = draft.config

    def run(inputs: tuple[Any, ...], documents: jax.Array, anchors: jax.Array) -> list[jax.Array]:
        start, stop = (jax.reshard(x, SPECS.act_bN) for x in context_ranges(documents, anchors))

        def layer(queries: jax.Array, context: Any, own: Any, ranges: tuple[jax.Array, ...]) -> jax.Array:
            segments = [KeySegment(*context, *ranges[:2]), KeySegment(*own, *ranges[2:])]
            return attention(queries, segments, scale=config.head_dim**-0.5, query_chunk=loss.query_chunk)

        step = jax.checkpoint(layer) if loss.remat else layer
        queries, context, own = inputs
        # Scaled by the layer, or equal products of the layers would be computed once.
        return [
            step(queries * (i + 1), context, own, draft.visible(kind, start, stop, config.block_size))
            for i, kind in enumerate(config.layer_types)
        ]

    return run


def _attention_inputs(draft: DFlashDraft, b: int, t: int, blocks: int) -> tuple[Any, ...]:
    config = draft.config
    heads, size = (config.num_attention_heads, config.num_key_value_heads, config.head_dim), config.block_size
    queries = _random((b, blocks, size, heads[0], heads[2]), draft.dtype)
    context = _random((b, heads[1], t, heads[2]), draft.dtype)
    own = _random((b, blocks, heads[1], size, heads[2]), draft.dtype)
    return queries, (context, 0.5 * context), (own, 0.5 * own)


def _projections(loss: BlockDiffusionLoss, draft: DFlashDraft, taps: jax.Array, noise: jax.Array) -> Any:
    """The draft without attention: queries take its place, and keys and values are results of their own."""
    position = jnp.arange(noise.shape[1], dtype=jnp.int32)
    length = jnp.arange(taps.shape[1], dtype=jnp.int32)
    context = draft.context(taps)
    context_kv = draft.context_kv(context, jnp.broadcast_to(length, taps.shape[:2]))
    rotary = draft.rotary(jnp.broadcast_to(position, noise.shape[:2]))

    def step(layer: DecoderLayer, x: jax.Array) -> tuple[jax.Array, Any]:
        normed = layer.input_layernorm(x)
        queries = layer.self_attn.queries(normed, rotary)
        return layer.residual(x, queries), layer.self_attn.keys_values(normed, rotary)

    own_kv = []
    for layer in draft.layers:
        noise, own = (jax.checkpoint(step) if loss.remat else step)(layer, noise)
        own_kv.append(own)
    return draft.norm(noise), context_kv, own_kv


def _head_loss(
    loss: BlockDiffusionLoss,
    draft: DFlashDraft,
    hidden: jax.Array,
    target: Decoder,
    batch: Batch,
    final: jax.Array | None,
) -> jax.Array:
    """The loss from the draft's hidden states [b, N, B, d] and, for a teacher, the target's [b, t, d]."""
    _, labels, supervised = loss.blocks(draft, batch)
    teacher = None if final is None else Teacher(final, batch["anchors"])
    return loss.of_hidden(hidden, target, labels, supervised, teacher).loss_sum


def _optimizer(config: RunConfig, state: TrainState[DFlashDraft]) -> Part:
    """An update of the whole draft by `config.optimizer`; the gradient is the draft itself."""
    optimizer = make_optimizer(config.optimizer, learning_rate_schedule(config.optimizer, 1000))

    def update(model: Any, opt_state: Any, gradient: Any) -> Any:
        updates, opt_state = optimizer.update(gradient, opt_state, model)
        return optax.apply_updates(model, updates), opt_state

    step = jax.jit(update, donate_argnums=(0, 1))
    gradient = jax.tree.map(jnp.copy, state.model)
    held = [(state.model, state.opt_state)]

    def run() -> Any:
        held[0] = step(*held[0], gradient)
        return held[0]

    return run
