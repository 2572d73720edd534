"""A loss summed over chunks, its gradient computed beside its value: no chunk is ever run again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

ChunkLoss = Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]]
"""(a chunk's hidden states, head, its own constants, those of all) -> (losses of rows [b], statistics [b, ...])."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_chunks(
    chunk_loss: ChunkLoss, hidden_chunks: jax.Array, head: jax.Array, own: Any, shared: Any
) -> tuple[jax.Array, Any]:
    """Sums (loss, statistics) of `chunk_loss` over the chunks on the leading axis and over rows.

    A loss that is a sum has the gradient of each chunk times one number, the sum's cotangent. So the forward pass
    takes it while the chunk's logits are at hand and keeps only what has the shape of `hidden_chunks` and `head`; a
    checkpoint would compute all logits twice. Differentiable in hidden states and head, by the loss alone; the head's
    gradient is summed in float32, and computed only where it is asked for.

    Args:
        chunk_loss: closes over no arrays.
        hidden_chunks: [chunks, b, ...]. own: constants of the chunks, [chunks, ...]. shared: whole for every chunk, as
            the head is.
    """
    per_row = jax.lax.map(lambda chunk: chunk_loss(chunk[0], head, chunk[1], shared), (hidden_chunks, own))
    return jax.tree.map(lambda x: x.sum((0, 1)), per_row)


def _forward(
    chunk_loss: ChunkLoss, hidden_chunks: Any, head_primal: Any, *constants: Any
) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, jax.Array | None]]:
    head, trains_head = head_primal.value, head_primal.perturbed
    own, shared = jax.tree.map(lambda x: x.value, constants)

    def step(head_gradient: jax.Array | None, chunk: tuple[jax.Array, Any]) -> tuple[jax.Array | None, Any]:
        hidden, rest = chunk
        run = lambda hidden, head: chunk_loss(hidden, head, rest, shared)  # noqa: E731
        if head_gradient is None:
            losses, pull, statistics = jax.vjp(lambda hidden: run(hidden, head), hidden, has_aux=True)
            (gradient,) = pull(jnp.ones_like(losses))
        else:
            losses, pull, statistics = jax.vjp(run, hidden, head, has_aux=True)
            gradient, of_head = pull(jnp.ones_like(losses))
            head_gradient = head_gradient + of_head
        return head_gradient, ((losses, statistics), gradient)

    accumulator = jnp.result_type(head, jnp.float32)
    zeros = jnp.zeros_like(head, accumulator) if trains_head else None
    head_gradient, (per_row, gradients) = jax.lax.scan(step, zeros, (hidden_chunks.value, own))
    head_gradient = None if head_gradient is None else head_gradient.astype(head.dtype)
    return jax.tree.map(lambda x: x.sum((0, 1)), per_row), (gradients, head_gradient)


def _backward(
    chunk_loss: ChunkLoss, residuals: tuple[jax.Array, jax.Array | None], cotangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array | None, None, None]:
    gradients, head_gradient = residuals
    loss_ct = 0.0 if isinstance(cotangents[0], SymbolicZero) else cotangents[0]
    scale = lambda x: (loss_ct * x).astype(x.dtype)  # noqa: E731
    return scale(gradients), None if head_gradient is None else scale(head_gradient), None, None


sum_over_chunks.defvjp(_forward, _backward, symbolic_zeros=True)
