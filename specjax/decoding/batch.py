"""Prompts as the static shapes that the compiled decoder takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import PartitionSpec as P

from specjax.decoding.drafter import Drafter
from specjax.decoding.flat import Flat
from specjax.decoding.loop import DecodeState, Limits, prefill
from specjax.decoding.sampling import Sampling
from specjax.models.decoder import Decoder
from specjax.models.sharding import BATCH, SPECS, axis_size, put

PROMPT_BUCKET = 64  # prompts are padded to a power of two times this
NEW_TOKENS_BUCKET = 64
STOPS_BUCKET = 4
PREFILL_CHUNK = 1024  # a longer bucket runs in chunks of this


@dataclass(frozen=True)
class Batch:
    """Prompts padded to static shapes and placed on the mesh.

    Rows are padded with empty prompts to a multiple of the batch axes; every prompt becomes `samples` neighbouring
    rows. capacity holds the prompt bucket, the bucket of new tokens and one block, because a round writes a whole block
    past the last committed token. lengths: of the prompts, one a row.
    """

    prompts: jax.Array
    prompt_length: jax.Array
    limits: Limits
    capacity: int
    max_rounds: int
    lengths: tuple[int, ...]
    samples: int = 1
    sampling: Sampling | None = None

    @classmethod
    def build(
        cls,
        target: Decoder,
        prompts: Sequence[Sequence[int]],
        new_tokens: Sequence[int],
        stops: Sequence[Sequence[int]],
        block_size: int,
        samples: int = 1,
    ) -> Batch:
        padded = -(-len(prompts) // axis_size(*BATCH)) * axis_size(*BATCH)
        context = target.config.max_position_embeddings
        bucket = _bucket(max(map(len, prompts)), PROMPT_BUCKET, context)
        max_rounds = _bucket(max(new_tokens), NEW_TOKENS_BUCKET, context)
        ids = np.zeros((padded, bucket), np.int32)
        length, total = np.zeros(padded, np.int32), np.zeros(padded, np.int32)
        stop = np.full((padded, _bucket(max(1, *map(len, stops)), STOPS_BUCKET)), -1, np.int32)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
            length[i], total[i] = len(prompt), len(prompt) + new_tokens[i]
            stop[i, : len(stops[i])] = stops[i]
        limits = Limits(put(total.repeat(samples), SPECS.act_b), put(stop.repeat(samples, 0), SPECS.act_bt))
        capacity = bucket + max_rounds + block_size
        lengths = tuple(len(prompt) for prompt in prompts for _ in range(samples))
        return cls(put(ids, SPECS.act_bt), put(length, SPECS.act_b), limits, capacity, max_rounds, lengths, samples)

    @property
    def rows(self) -> int:
        """Rows of the decoder, padding included."""
        return self.prompts.shape[0] * self.samples

    def with_sampling(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seeds: Sequence[int],
        logit_mask: npt.NDArray[np.bool_] | None = None,
    ) -> Batch:
        """The same prompts with tokens drawn, or masked, or both. seeds: one a row. logit_mask: [prompts, v]."""
        if temperature == 0 and logit_mask is None:
            return self
        padded = np.zeros(self.rows, np.uint32)
        padded[: len(seeds)] = seeds
        number = lambda value, dtype: None if value is None else put(np.asarray(value, dtype), P())  # noqa: E731
        allowed = None
        if logit_mask is not None:
            mask = np.ones((self.rows, logit_mask.shape[1]), bool)
            mask[: len(self.lengths)] = logit_mask.repeat(self.samples, 0)
            allowed = put(mask, SPECS.act_bt)
        sampling = Sampling(
            number(temperature or None, np.float32),
            put(padded, SPECS.act_b),
            number(top_k, np.int32),
            number(None if top_p == 1 else top_p, np.float32),  # all of the softmax is no limit; its sum, rounded, is
            allowed,
        )
        return replace(self, sampling=sampling)

    def prefill(self, target: Decoder | Flat[Decoder], drafter: Drafter | Flat[Drafter | None] | None) -> DecodeState:
        return prefill(
            target,
            drafter,
            self.prompts,
            self.prompt_length,
            self.limits,
            self.sampling,
            capacity=self.capacity,
            max_rounds=self.max_rounds,
            chunk=PREFILL_CHUNK,
            samples=self.samples,
        )


def _bucket(size: int, smallest: int, most: int | None = None) -> int:
    """The least smallest * 2^k that holds `size`; beyond a chunk in whole chunks, also three quarters of such a size,
    and not more than `most` needs."""
    bucket = smallest
    while bucket < size:
        bucket *= 2
    if bucket <= PREFILL_CHUNK:
        return bucket
    sizes = [bucket // 4 * 3, bucket] + ([] if most is None else [most])
    chunks = (-(-n // PREFILL_CHUNK) * PREFILL_CHUNK for n in sizes)
    return min(n for n in chunks if n >= size)
