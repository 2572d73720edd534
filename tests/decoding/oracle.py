"""A drafter that knows the answers, and decoding with it in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding.drafter import Ahead, Drafter, OnePassDrafter, Rows, Seen, one_pass_drafter
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache
from specjax.models.one_pass import OnePass
from specjax.models.sharding import SPECS, put
from tests.decoding.trees import best_first, chain, follow


class Stateless:
    """What a drafter needs that takes nothing in."""

    @property
    def tap_ids(self) -> tuple[int, ...]:
        return ()

    def init(self, target: Decoder, rows: int, capacity: int) -> None:
        return None

    def observe(self, state: None, target: Decoder, seen: Seen) -> None:
        return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Oracle(Stateless):
    """Proposes `table`: row r's token at every absolute position, right or wrong.

    table: tokens [b, positions], or logits [b, positions, v].
    """

    table: jax.Array
    block_size: int = field(metadata={"static": True})

    def upcoming(self, length_b: jax.Array, draft_tokens: int) -> jax.Array:
        """The table's entries for the proposals of a block."""
        positions = length_b[:, None] + 1 + jnp.arange(draft_tokens)
        return jax.vmap(lambda row, at: row[at])(self.table, positions)

    def draft_logits(self, state: None, target: Decoder, rows: Rows, draft_tokens: int) -> jax.Array:
        return self.logits(target, rows.length, draft_tokens)

    def logits(self, target: Decoder, length_b: jax.Array, draft_tokens: int) -> jax.Array:
        upcoming = self.upcoming(length_b, draft_tokens)
        logits = upcoming if upcoming.ndim == 3 else jax.nn.one_hot(upcoming, target.config.vocab_size)
        return jax.reshard(logits, SPECS.act_btv)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixture:
    """A drafter's own proposals, but the oracle's where `known` [b, positions]: so that many are accepted."""

    inner: Drafter
    oracle: Oracle
    known: jax.Array

    @property
    def block_size(self) -> int:
        return self.oracle.block_size

    @property
    def tap_ids(self) -> tuple[int, ...]:
        return self.inner.tap_ids

    def init(self, target: Decoder, rows: int, capacity: int) -> Any:
        return self.inner.init(target, rows, capacity)

    def observe(self, state: Any, target: Decoder, seen: Seen) -> Any:
        return self.inner.observe(state, target, seen)

    @property
    def drafts_ahead(self) -> bool:
        return one_pass_drafter(self.inner) is not None

    def draft_ahead(self, target: Decoder, cache: KVCache, length_b: jax.Array) -> Ahead:
        return self._ahead.draft_ahead(target, cache, length_b)

    def run_one_pass(
        self, target: Decoder, tokens_bt: jax.Array, length_b: jax.Array, slots_bt: jax.Array, cache: KVCache
    ) -> OnePass:
        return self._ahead.run_one_pass(target, tokens_bt, length_b, slots_bt, cache)

    def ahead_logits(self, state: Ahead, target: Decoder, draft_tokens: int) -> jax.Array:
        own = self._ahead.ahead_logits(state, target, draft_tokens)
        return self._mixed(own, target, state.length, draft_tokens)

    @property
    def _ahead(self) -> OnePassDrafter:
        inner = one_pass_drafter(self.inner)
        assert inner is not None
        return inner

    def draft_logits(self, state: Any, target: Decoder, rows: Rows, draft_tokens: int) -> jax.Array:
        own = self.inner.draft_logits(state, target, rows, draft_tokens)
        return self._mixed(own, target, rows.length, draft_tokens)

    def _mixed(self, own: jax.Array, target: Decoder, length_b: jax.Array, draft_tokens: int) -> jax.Array:
        known = Oracle(self.known, self.block_size).upcoming(length_b, draft_tokens)
        return jnp.where(known[..., None], self.oracle.logits(target, length_b, draft_tokens), own)


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


def preferences(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    seed: int,
    vocab_size: int,
    rows: int | None = None,
) -> np.ndarray:
    """An oracle's logits [rows, positions, v]: the answer's token is the best, the second or a later choice."""
    rng = np.random.default_rng(seed)
    table = proposals(prompts, answers, 0.0, seed, vocab_size, rows)
    logits = rng.standard_normal((*table.shape, vocab_size)).astype(np.float32)
    logits *= rng.choice([1.0, 3.0, 6.0], table.shape)[..., None].astype(np.float32)
    rank = rng.choice([0, 1, 2, 4, 20], table.shape, p=[0.5, 0.2, 0.15, 0.1, 0.05])[..., None]
    right, there = table[..., None], np.take_along_axis(np.argsort(-logits, axis=-1), rank, axis=-1)
    swapped = np.take_along_axis(logits, there, -1), np.take_along_axis(logits, right, -1)
    np.put_along_axis(logits, right, swapped[0], -1)
    np.put_along_axis(logits, there, swapped[1], -1)
    return logits


def oracle(table: np.ndarray, block_size: int) -> Oracle:
    return Oracle(put(table, SPECS.act_bt if table.ndim == 2 else SPECS.act_btd), block_size)


def simulate(
    prompt_length: int,
    answer: Sequence[int],
    table: np.ndarray,
    draft_tokens: int,
    max_new_tokens: int,
    stops: Sequence[int],
    tree_nodes: int = 0,
) -> tuple[list[int], list[int]]:
    """New tokens and rounds of one row; `answer` goes on past every limit, `table` is the row's proposals."""
    tokens, rounds = [answer[0]], []
    while tokens[-1] not in stops and len(tokens) < max_new_tokens:
        drafted = table[prompt_length + len(tokens) :][:draft_tokens]
        upcoming = answer[len(tokens) :][:draft_tokens]
        paths = best_first(drafted, tree_nodes) if tree_nodes else chain(drafted.tolist())
        matched = follow(paths, upcoming)
        rounds.append(matched + 1)
        for token in answer[len(tokens) : len(tokens) + matched + 1]:
            if tokens[-1] not in stops and len(tokens) < max_new_tokens:
                tokens.append(token)
    return tokens, rounds
