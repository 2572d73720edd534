"""What the decoder asks of a drafter, and the drafts as such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import jax
import jax.numpy as jnp

from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.kv_cache import KVCache
from specjax.models.lora_draft import LoRADraft
from specjax.models.one_pass import OnePass, run_one_pass
from specjax.models.sharding import SPECS


class Rows(NamedTuple):
    """Where b rows stand before a round.

    token: [b] int32, the last one known. length: [b] int32, its position. done: [b] bool, rows for which nothing is
    kept. cache: the target's, with the tokens before.
    """

    token: jax.Array
    length: jax.Array
    done: jax.Array
    cache: KVCache


class Seen(NamedTuple):
    """What the target has run: tokens [b, t] int32, its taps of them [b, t, m] (None without `tap_ids`), their
    positions [b, t], and the slots [b, t] to keep them in; a slot outside the capacity is not kept."""

    tokens: jax.Array
    taps: jax.Array | None
    positions: jax.Array
    slots: jax.Array


class Drafter(Protocol):
    """A pytree that proposes the tokens after a row's last one. Its functions are pure and run inside jit."""

    @property
    def block_size(self) -> int:
        """Slots of a block: the known token and the proposals."""

    @property
    def tap_ids(self) -> tuple[int, ...]:
        """Target layers whose outputs `observe` receives."""

    def init(self, target: Decoder, rows: int, capacity: int) -> Any:
        """The state of `rows` rows of at most `capacity` tokens, before any token."""

    def observe(self, state: Any, target: Decoder, seen: Seen) -> Any:
        """Takes in what the target has run.

        Rejected tokens come too; those of the next round replace them, and `draft_logits` may not look past the row's
        length.
        """

    def draft_logits(self, state: Any, target: Decoder, rows: Rows, draft_tokens: int) -> jax.Array:
        """Logits [b, draft_tokens, v], float32, of the tokens after the known one.

        At most block_size - 1 tokens; of fewer the logits are the same.
        """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ahead:
    """Blocks that were drafted before their first token was known; the state of a drafter that can do so.

    hidden: [b, B, d], after the final norm. length: [b] int32, the position of the first slot; -1: there is no block.
    """

    hidden: jax.Array
    length: jax.Array


@runtime_checkable
class OnePassDrafter(Drafter, Protocol):
    """A drafter that may draft the next block in the target's own pass; its state is an `Ahead`."""

    @property
    def drafts_ahead(self) -> bool:
        """Whether this one can."""

    def draft_ahead(self, target: Decoder, cache: KVCache, length_b: jax.Array) -> Ahead:
        """Blocks from position `length_b` on, in a pass of their own."""

    def run_one_pass(
        self, target: Decoder, tokens_bt: jax.Array, length_b: jax.Array, slots_bt: jax.Array, cache: KVCache
    ) -> OnePass:
        """The target's pass over tokens, and such a block after each; see `one_pass.run_one_pass`."""

    def ahead_logits(self, state: Ahead, target: Decoder, draft_tokens: int) -> jax.Array:
        """Logits as those of `draft_logits`, of the blocks of `state`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DFlashDrafter:
    """The DFlash draft; its state is the K/V cache of the context, filled as the target's taps arrive."""

    model: DFlashDraft

    @property
    def block_size(self) -> int:
        return self.model.config.block_size

    @property
    def tap_ids(self) -> tuple[int, ...]:
        return self.model.config.target_layer_ids

    def init(self, target: Decoder, rows: int, capacity: int) -> KVCache:
        config = self.model.config
        return KVCache.create(
            config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim, self.model.dtype
        )

    def observe(self, state: KVCache, target: Decoder, seen: Seen) -> KVCache:
        assert seen.taps is not None
        context_kv = self.model.context_kv(self.model.context(seen.taps), seen.positions)
        for layer, (keys, values) in enumerate(context_kv):
            state = state.write(layer, keys, values, seen.slots)
        return state

    def draft_logits(self, state: KVCache, target: Decoder, rows: Rows, draft_tokens: int) -> jax.Array:
        """Context is strictly before the known token, whose own hidden state the target has not computed yet."""
        config = self.model.config
        noise = self.model.embed_noise(target, _block(rows.token, config.block_size, config.mask_token_id))
        context_kv = tuple(zip(state.keys, state.values, strict=True))
        stop = rows.length[:, None]
        hidden = self.model(noise, context_kv, jnp.zeros_like(stop), stop)[:, 0, 1 : draft_tokens + 1]
        return target.logits(hidden)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRADrafter:
    """The LoRA draft over the target's own cache; its state is an `Ahead` where it was trained to draft ahead, else
    nothing. With `adapt_context` its context is its own, and the state its K/V cache."""

    model: LoRADraft

    @property
    def block_size(self) -> int:
        return self.model.config.block_size

    @property
    def tap_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def drafts_ahead(self) -> bool:
        return self.model.config.masked_anchor > 0

    def init(self, target: Decoder, rows: int, capacity: int) -> KVCache | Ahead | None:
        if self.model.config.adapt_context:
            return target.empty_cache(rows, capacity)
        if not self.drafts_ahead:
            return None
        shape = rows, self.block_size, target.config.hidden_size
        nowhere = jnp.full((rows,), -1, jnp.int32, out_sharding=SPECS.act_b)
        return Ahead(jnp.zeros(shape, target.dtype, out_sharding=SPECS.act_btd), nowhere)

    def observe(self, state: KVCache | Ahead | None, target: Decoder, seen: Seen) -> KVCache | Ahead | None:
        if not isinstance(state, KVCache):
            return state
        adapters = self.model.adapters
        return target(seen.tokens, seen.positions, cache=state, slots_bt=seen.slots, adapters=adapters).cache

    def draft_logits(self, state: KVCache | Ahead | None, target: Decoder, rows: Rows, draft_tokens: int) -> jax.Array:
        config = self.model.config
        if config.masked_anchor == 1:  # it has never seen a known one
            noise = self.model.unknown_blocks(target, len(rows.length), 1)
        else:
            noise = self.model.embed_noise(target, _block(rows.token, config.block_size, config.mask_token_id))
        context = state if isinstance(state, KVCache) else rows.cache
        return target.logits(self._hidden(target, noise, context, rows.length)[:, 1 : draft_tokens + 1])

    def draft_ahead(self, target: Decoder, cache: KVCache, length_b: jax.Array) -> Ahead:
        noise = self.model.unknown_blocks(target, len(length_b), 1)
        return Ahead(self._hidden(target, noise, cache, length_b), length_b)

    def run_one_pass(
        self, target: Decoder, tokens_bt: jax.Array, length_b: jax.Array, slots_bt: jax.Array, cache: KVCache
    ) -> OnePass:
        return run_one_pass(target, self.model, tokens_bt, length_b, slots_bt, cache)

    def ahead_logits(self, state: Ahead, target: Decoder, draft_tokens: int) -> jax.Array:
        return target.logits(state.hidden[:, 1 : draft_tokens + 1])

    def _hidden(self, target: Decoder, noise_bNBd: jax.Array, context: KVCache, length_b: jax.Array) -> jax.Array:
        """Of one block a row, [b, B, d]."""
        context_kv = tuple(zip(context.keys, context.values, strict=True))
        stop = length_b[:, None]
        hidden = self.model(target, noise_bNBd, context_kv, jnp.zeros_like(stop), stop)[:, 0]
        return jax.reshard(hidden, SPECS.act_btd)  # of a single row, reshapes have lost it


@overload
def drafter_of(draft: DFlashDraft | LoRADraft | Drafter) -> Drafter: ...
@overload
def drafter_of(draft: None) -> None: ...
def drafter_of(draft: DFlashDraft | LoRADraft | Drafter | None) -> Drafter | None:
    """A draft as a drafter; a drafter is one already."""
    if isinstance(draft, DFlashDraft):
        return DFlashDrafter(draft)
    return LoRADrafter(draft) if isinstance(draft, LoRADraft) else draft


def one_pass_drafter(drafter: Drafter | None) -> OnePassDrafter | None:
    """The drafter, if it can draft in the target's own pass."""
    return drafter if isinstance(drafter, OnePassDrafter) and drafter.drafts_ahead else None


def _block(token_b: jax.Array, size: int, mask_token_id: int) -> jax.Array:
    """[b, 1, B]: the known token, then MASK."""
    masks = jnp.full((token_b.shape[0], size - 1), mask_token_id, jnp.int32)
    return jnp.concatenate([token_b[:, None], jax.reshard(masks, SPECS.act_bt)], axis=1)[:, None]
