"""Key/value cache with a length of its own for every row.

Slot s of a row holds the key and value of the token at position s. Nothing is ever rolled back: rejected
entries are overwritten before a query can see them, because a query at position p sees slots <= p only.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from specjax.models.sharding import SPECS, axis_size


def key_spec(num_key_value_heads: int) -> P:
    """Spec of keys [b, k, s, h]: heads over `tensor` where they divide it, else a copy on every tensor shard."""
    return SPECS.keys_bksh if num_key_value_heads % axis_size("tensor") == 0 else SPECS.shared_keys_bksh


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer: `keys[layer]` and `values[layer]` are [b, k, capacity, h]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @classmethod
    def create(
        cls, num_layers: int, batch: int, num_key_value_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype
    ) -> KVCache:
        """An empty cache (zeros) laid out on the mesh in force."""
        shape, spec = (batch, num_key_value_heads, capacity, head_dim), key_spec(num_key_value_heads)

        def zeros() -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(num_layers))

        return cls(zeros(), zeros())

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def write(self, layer: int, keys: jax.Array, values: jax.Array, slots: jax.Array) -> KVCache:
        """Stores keys and values [b, k, t, h] at `slots` [b, t]; a slot outside the capacity is not written."""
        new_keys, new_values = list(self.keys), list(self.values)
        new_keys[layer] = write_slots(self.keys[layer], keys, slots)
        new_values[layer] = write_slots(self.values[layer], values, slots)
        return KVCache(tuple(new_keys), tuple(new_values))


def write_slots(cache_bksh: jax.Array, new_bkth: jax.Array, slots_bt: jax.Array) -> jax.Array:
    """Keys or values of one layer with new ones at `slots_bt`; see `KVCache.write`."""
    # vmapped per row: compiles to no collective on any mesh, unlike an indexed update of the whole batch.
    # A negative slot is dropped like any other outside the cache, and does not count from the end.
    if slots_bt.shape[1] == 1:
        # XLA turns a scatter of one slot of one row into a read and an update of the cache, and copies the whole cache
        # for it, twice a layer and step. A second write that is dropped keeps it a scatter, done in place.
        new_bkth = jnp.concatenate([new_bkth, new_bkth], axis=2)
        slots_bt = jnp.concatenate([slots_bt, jnp.full_like(slots_bt, cache_bksh.shape[2])], axis=1)

    def write(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
        return cache.at[:, slots].set(new, mode="drop", wrap_negative_indices=False)

    return jax.vmap(write)(cache_bksh, new_bkth.astype(cache_bksh.dtype), slots_bt)
