"""Where speculative and autoregressive answers part, and by how little the target preferred its own choice there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding.batch import Batch
from specjax.decoding.sampling import TARGET_DRAWS, Sampling, gumbel, processed
from specjax.fetch import fetch
from specjax.models.decoder import Decoder
from specjax.models.precision import matmul_precision
from specjax.models.sharding import mesh_scope

Tokens = Sequence[Sequence[int]]
Report = dict[str, Any]


def differences(
    target: Decoder,
    prompts: Tokens,
    plain: Tokens,
    drafted: Tokens,
    batch_size: int,
    sampling: dict[str, Any] | None = None,
) -> list[Report]:
    """One report for each prompt whose answers `plain` (autoregressive) and `drafted` differ.

    prompt, position: where (of the data set, of the answer, from 0). ar_token, speculative_token: None past an
    answer's end. top_tokens: the two that the target likes best after the shared tokens, in one pass without a cache.
    gap: how much better it scores the first. relative_gap: of the scores' range. A gap of rounding size is a tie, any
    other a bug; None where there is no second token. sampling: `Batch.with_sampling`'s arguments but for the seeds, and
    the first prompt's `seed`; scores are then those whose greatest is drawn, noise included. batch_size: rows a pass.
    """
    parting = [(i, _first_difference(a, b)) for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b]
    reports = []
    for first in range(0, len(parting), batch_size):
        chunk = parting[first : first + batch_size]
        shared = [[*prompts[i], *plain[i][:at]] for i, at in chunk]
        for (i, at), scores in zip(chunk, _scores(target, shared, [i for i, _ in chunk], sampling), strict=True):
            tokens = {"ar_token": _token(plain[i], at), "speculative_token": _token(drafted[i], at)}
            reports.append({"prompt": i, "position": at} | tokens | _top_two(scores))
    return reports


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    shared = min(len(a), len(b))
    return next((i for i in range(shared) if a[i] != b[i]), shared)


def _token(tokens: Sequence[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None


def _top_two(scores: np.ndarray) -> Report:
    second, first = (int(i) for i in np.argsort(scores, kind="stable")[-2:])
    finite = scores[np.isfinite(scores)]
    gap = float(scores[first] - scores[second])
    known = bool(np.isfinite(gap)) and finite.size > 1
    extent = float(finite.max() - finite.min())
    return {
        "top_tokens": [first, second],
        "gap": gap if known else None,
        "relative_gap": gap / extent if known and extent > 0 else None,
    }


def _scores(
    target: Decoder, rows: Tokens, indices: Sequence[int], sampling: dict[str, Any] | None
) -> Iterator[np.ndarray]:
    """Scores [v] of the token after each row, the greatest of which is the target's choice."""
    with mesh_scope(), matmul_precision(target.dtype):
        batch = Batch.build(target, rows, [1] * len(rows), [[]] * len(rows), 1)
        logits = np.asarray(fetch(_last_logits(target, batch.prompts, batch.prompt_length)))
        for row, index, scores in zip(rows, indices, logits, strict=False):
            yield scores if sampling is None else _perturbed(scores, len(row), index, **sampling)


def _perturbed(
    logits_v: np.ndarray,
    position: int,
    index: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> np.ndarray:
    seeds = np.array([seed + index], np.uint32)
    settings = Sampling(np.float32(temperature), seeds, top_k, top_p)  # type: ignore[arg-type]
    noise = gumbel(logits_v.size, TARGET_DRAWS, seeds[0], np.int32(position))  # type: ignore[arg-type]
    return np.asarray(processed(jnp.asarray(logits_v), settings) + noise)


@jax.jit
def _last_logits(target: Decoder, tokens_bt: jax.Array, length_b: jax.Array) -> jax.Array:
    hidden = target(tokens_bt).hidden
    last = jax.vmap(lambda rows, i: rows[i])(hidden, jnp.maximum(length_b - 1, 0))
    return target.logits(last[:, None])[:, 0]
