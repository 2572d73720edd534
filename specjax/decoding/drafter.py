"""What the decoder asks of a drafter, and the DFlash draft as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.kv_cache import KVCache
from specjax.models.sharding import SPECS


class Drafter(Protocol):
    """A pytree that proposes the tokens after a row's last one. Its functions are pure and run inside jit."""

    @property
    def block_size(self) -> int:
        """Slots of a block: the known token and the proposals."""

    @property
    def tap_ids(self) -> tuple[int, ...]:
        """Target layers whose outputs `observe` receives."""

    def init(self, rows: int, capacity: int) -> Any:
        """The state of `rows` rows of at most `capacity` tokens, before any token."""

    def observe(self, state: Any, taps_btm: jax.Array | None, positions_bt: jax.Array, slots_bt: jax.Array) -> Any:
        """Takes in the target's taps of tokens at `positions_bt`; a slot outside the capacity is not stored.

        The taps are None if `tap_ids` is empty. Taps of rejected tokens come too; those of the next round replace
        them, and `draft_logits` may not look past the row's length.
        """

    def draft_logits(
        self, state: Any, target: Decoder, last_token_b: jax.Array, length_b: jax.Array, draft_tokens: int
    ) -> jax.Array:
        """Logits [b, draft_tokens, v], float32, of the tokens at positions length + 1, ...

        `last_token_b` sits at position `length_b`. At most block_size - 1 tokens; of fewer the logits are the same.
        """


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

    def init(self, rows: int, capacity: int) -> KVCache:
        config = self.model.config
        return KVCache.create(
            config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim, self.model.dtype
        )

    def observe(
        self, state: KVCache, taps_btm: jax.Array | None, positions_bt: jax.Array, slots_bt: jax.Array
    ) -> KVCache:
        assert taps_btm is not None
        context_kv = self.model.context_kv(self.model.context(taps_btm), positions_bt)
        for layer, (keys, values) in enumerate(context_kv):
            state = state.write(layer, keys, values, slots_bt)
        return state

    def draft_logits(
        self, state: KVCache, target: Decoder, last_token_b: jax.Array, length_b: jax.Array, draft_tokens: int
    ) -> jax.Array:
        """Context is strictly before the last token, whose own hidden state the target has not computed yet."""
        config = self.model.config
        masks = jnp.full((last_token_b.shape[0], config.block_size - 1), config.mask_token_id, jnp.int32)
        block = jnp.concatenate([last_token_b[:, None], jax.reshard(masks, SPECS.act_bt)], axis=1)
        noise = self.model.embed_noise(target, block)[:, None]
        context_kv = tuple(zip(state.keys, state.values, strict=True))
        stop = length_b[:, None]
        hidden = self.model(noise, context_kv, jnp.zeros_like(stop), stop)[:, 0, 1 : draft_tokens + 1]
        return target.logits(hidden)
