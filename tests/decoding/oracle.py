"""A drafter that knows the answers, and decoding with it in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding import DFlashDrafter
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache
from specjax.models.sharding import SPECS, put


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Oracle:
    """Proposes `table` [b, positions]: row r's token at every absolute position, right or wrong. Keeps no state."""

    table: jax.Array
    block_size: int = field(metadata={"static": True})

    @property
    def tap_ids(self) -> tuple[int, ...]:
        return ()

    def init(self, rows: int, capacity: int) -> None:
        return None

    def observe(self, state: None, taps_btm: jax.Array | None, positions_bt: jax.Array, slots_bt: jax.Array) -> None:
        return None

    def draft(
        self, state: None, target: Decoder, last_token_b: jax.Array, length_b: jax.Array, draft_tokens: int
    ) -> jax.Array:
        return jax.nn.one_hot(self.at(length_b, draft_tokens), target.config.vocab_size)

    def at(self, length_b: jax.Array, draft_tokens: int) -> jax.Array:
        positions = length_b[:, None] + 1 + jnp.arange(draft_tokens)
        return jax.vmap(lambda row, at: row[at])(self.table, positions)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixture:
    """A drafter's own proposals, but the oracle's where `known` [b, positions]: so that many are accepted."""

    inner: DFlashDrafter
    oracle: Oracle
    known: jax.Array

    @property
    def block_size(self) -> int:
        return self.oracle.block_size

    @property
    def tap_ids(self) -> tuple[int, ...]:
        return self.inner.tap_ids

    def init(self, rows: int, capacity: int) -> KVCache:
        return self.inner.init(rows, capacity)

    def observe(
        self, state: KVCache, taps_btm: jax.Array | None, positions_bt: jax.Array, slots_bt: jax.Array
    ) -> KVCache:
        return self.inner.observe(state, taps_btm, positions_bt, slots_bt)

    def draft(
        self, state: KVCache, target: Decoder, last_token_b: jax.Array, length_b: jax.Array, draft_tokens: int
    ) -> jax.Array:
        own = self.inner.draft(state, target, last_token_b, length_b, draft_tokens)
        known = Oracle(self.known, self.block_size).at(length_b, draft_tokens)
        return jnp.where(known[..., None], self.oracle.draft(None, target, last_token_b, length_b, draft_tokens), own)


def proposals(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    error_rate: float,
    seed: int,
    vocab_size: int,
    rows: int | None = None,
) -> np.ndarray:
    """An oracle's table [rows, positions] int32: the answers, wrong at `error_rate` of the positions."""
    rng = np.random.default_rng([seed, round(100 * error_rate)])
    table = np.zeros((rows or len(prompts), 192), np.int32)
    for row, prompt, answer in zip(table, prompts, answers, strict=False):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    wrong = rng.random(table.shape) < error_rate
    return np.where(wrong, (table + rng.integers(1, vocab_size, table.shape)) % vocab_size, table).astype(np.int32)


def oracle(table: np.ndarray, block_size: int) -> Oracle:
    return Oracle(put(table, SPECS.act_bt), block_size)


def simulate(
    prompt_length: int,
    answer: Sequence[int],
    table: np.ndarray,
    draft_tokens: int,
    max_new_tokens: int,
    stops: Sequence[int],
) -> tuple[list[int], list[int]]:
    """New tokens and rounds of one row; `answer` goes on past every limit, `table` is the row's proposals."""
    tokens, rounds = [answer[0]], []
    while tokens[-1] not in stops and len(tokens) < max_new_tokens:
        drafted = table[prompt_length + len(tokens) :][:draft_tokens]
        matched = 0
        while matched < draft_tokens and drafted[matched] == answer[len(tokens) + matched]:
            matched += 1
        rounds.append(matched + 1)
        for token in answer[len(tokens) : len(tokens) + matched + 1]:
            if tokens[-1] not in stops and len(tokens) < max_new_tokens:
                tokens.append(token)
    return tokens, rounds
