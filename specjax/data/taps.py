"""A cache of the target's hidden states for a data set, so that training needs no forward pass of the target.

    cache.json               what was captured (`TapRecipe`) and how many shards belong to it
    taps-00000.safetensors   `states` [tokens, m + d] of some examples, one after another: the taps side by side, then
                             the hidden state after the final norm; `example` int64 [n], their indices in the data
                             set; `first` int64 [n + 1], where each begins; `tokens_crc`, `states_crc` uint32 [n] as
                             int64, CRC-32 of their token ids (int32) and of their states

A token takes (taps + 1) * hidden size * itemsize bytes: 48 KiB for five taps of Qwen3-8B in bfloat16. Shards are
written whole or not at all, so an interrupted capture goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specjax.data.recipe_file import check_recipe, write_recipe
from specjax.errors import InputError

CACHE_FILE = "cache.json"
FORMAT_VERSION = 3
OTHERWISE, REMEDY = "was captured for another run", "capture into another folder"


@dataclass(frozen=True)
class TapRecipe:
    """What decides the cache's contents; where any of it differs, the cache is refused.

    target: digest of the target's weights. max_length: tokens of an example that are kept. reasoning and
    validation_fraction: those settings of the data; the tokens of every example are compared besides.
    """

    target: str
    target_layer_ids: tuple[int, ...]
    dtype: str
    max_length: int
    examples: int
    reasoning: str = "keep"
    validation_fraction: float | None = None

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}))
        return value


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"taps-{shard:05d}.safetensors"


def start_cache(folder: Path, recipe: TapRecipe, data: str, shards: int) -> list[int]:
    """Makes `folder` a cache of `recipe` and returns the shards that are still missing.

    data: digest of the examples' tokens. Raises InputError where the folder holds a cache of something else.
    """
    path = folder / CACHE_FILE
    wanted = recipe.to_json() | {"data": data, "shards": shards}
    if path.exists():
        check_recipe(path, wanted, otherwise=OTHERWISE, remedy=REMEDY)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(path, wanted)
    return [shard for shard in range(shards) if not shard_path(folder, shard).exists()]


def write_shard(
    folder: Path, shard: int, examples: Sequence[int], tokens: Sequence[np.ndarray], states: Sequence[np.ndarray]
) -> None:
    """Writes the states [t, m + d] of `examples` with tokens [t]; the file appears complete or not at all."""
    first = np.cumsum([0, *map(len, tokens)])
    arrays = {
        "states": np.concatenate(states),
        "example": np.asarray(examples, np.int64),
        "first": first.astype(np.int64),
        "tokens_crc": np.array([_crc(x.astype(np.int32)) for x in tokens], np.int64),
        "states_crc": np.array([_crc(x) for x in states], np.int64),
    }
    path = shard_path(folder, shard)
    for left_over in folder.glob(f"{path.name}.*.partial"):  # of a process that was killed
        left_over.unlink()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(arrays, partial)
    os.replace(partial, path)


class TapCache:
    """Random access to the captured states [t, width] of `dtype`; safe to read from several threads.

    `order` int64 [samples] says which captured example each sample is, where samples repeat examples.
    Raises InputError where the cache is incomplete or damaged or was made with another recipe.
    """

    def __init__(self, folder: str | os.PathLike[str], recipe: TapRecipe, order: np.ndarray | None = None) -> None:
        self.folder = Path(folder)
        self.max_length = recipe.max_length
        self.width = 0  # m + d
        self.dtype = jnp.dtype(recipe.dtype)
        path = self.folder / CACHE_FILE
        if not path.exists():
            raise InputError(f"data.taps {self.folder}: no {CACHE_FILE}; write it with python -m specjax.capture")
        found = check_recipe(path, recipe.to_json(), otherwise=OTHERWISE, remedy=REMEDY)
        self._where = np.full((recipe.examples, 5), -1, np.int64)  # shard, first, stop, tokens_crc, states_crc
        self._files: list[Any] = []
        for shard in range(found["shards"]):
            self._open(shard)
        if (self._where[:, 0] < 0).any():
            raise InputError(f"{self.folder}: some examples have no taps; delete the folder and capture again")
        if order is not None:
            self._where = self._where[order]

    def _open(self, shard: int) -> None:
        path = shard_path(self.folder, shard)
        if not path.exists():
            raise InputError(f"{path}: is missing; finish the cache with python -m specjax.capture")
        try:
            file = safe_open(path, framework="numpy")
            file.__enter__()
            example, first, tokens_crc, states_crc = (
                file.get_tensor(name) for name in ("example", "first", "tokens_crc", "states_crc")
            )
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: truncated or corrupt ({error}); delete it and capture again") from error
        self._files.append(file)
        self.width = file.get_slice("states").get_shape()[1]
        columns = np.full(len(example), shard), first[:-1], first[1:], tokens_crc, states_crc
        self._where[example] = np.stack(columns, axis=1)

    def read(self, sample: int, input_ids: np.ndarray) -> np.ndarray:
        """The states [t, m + d] of the leading `input_ids` [t] of a sample.

        Raises:
            InputError: the sample's tokens are not those that were captured, or its states were damaged since.
        """
        shard, first, stop, tokens_crc, states_crc = self._where[sample].tolist()
        states = np.zeros((0, self.width), self.dtype)
        if stop > first:  # safetensors has no empty slices
            states = self._files[shard].get_slice("states")[first:stop]
        if _crc(states) != states_crc:
            path = shard_path(self.folder, shard)
            raise InputError(f"{path}: the taps of sample {sample} are damaged; delete the file and capture again")
        captured = input_ids[: self.max_length]
        if len(captured) != len(states) or _crc(captured.astype(np.int32)) != tokens_crc:
            raise InputError(
                f"{self.folder}: sample {sample} has other tokens than when its taps were captured; capture the "
                "changed data into another folder"
            )
        return states


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
