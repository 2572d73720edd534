"""Modules -> Hugging Face folders that transformers, SGLang and vLLM load as they are.

Tensors are fetched and written one at a time. A folder appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.sharding import mesh_scope
from specjax.weights.config_fields import IGNORED, raise_problems
from specjax.weights.draft_config import MASK_EMBEDDING, draft_config_to_hf
from specjax.weights.fingerprint import FINGERPRINT_FILE, TargetFingerprint
from specjax.weights.hf_config import decoder_config_to_hf
from specjax.weights.key_tables import DRAFT_KEYS, TARGET_KEYS, KeyTable, Transform
from specjax.weights.load import CONFIG_FILE
from specjax.weights.mask_embedding_file import MASK_EMBEDDING_FILE, mask_embedding_bytes
from specjax.weights.module_params import flat_params
from specjax.weights.safetensors_files import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, write_safetensors

SHARD_BYTES = 5_000_000_000  # what the hub recommends a file to stay under
# What a model's folder holds of a model: of an older one, those that are not written again are removed.
MODEL_FILES = ("model*.safetensors", INDEX_FILE, MASK_EMBEDDING_FILE)

Row = tuple[str, Transform, jax.Array]


def save_target(
    decoder: Decoder, folder: str | Path, dtype: Any = jnp.bfloat16, *, extra_config: Mapping[str, Any] | None = None
) -> Path:
    """Writes config.json and the weights of `decoder` in `dtype`; files already in `folder` (a tokenizer) stay.

    extra_config: fields of config.json that do not shape the network, such as `eos_token_id`.

    Raises:
        InputError: the family's format cannot carry the model, or `extra_config` names a field that shapes it.
    """
    extra = dict(extra_config or {})
    shaping = [f"extra_config field {name}: shapes the network" for name in sorted(set(extra) - set(IGNORED))]
    raise_problems(str(folder), shaping)
    config = decoder_config_to_hf(decoder.config) | extra | {"dtype": jnp.dtype(dtype).name}
    files = {CONFIG_FILE: json_text(config)}
    return _save(flat_params(decoder), Path(folder), TARGET_KEYS, jnp.dtype(dtype), files, SHARD_BYTES)


def save_dflash_draft(draft: DFlashDraft, folder: str | Path, *, fingerprint: TargetFingerprint | None) -> Path:
    """Writes `draft` in the z-lab layout: config.json, one bf16 model.safetensors, and the target's fingerprint.

    A mask embedding of the draft's own is a file too, `mask_embedding.pt`, in bf16. The fingerprint is `specjax.json`,
    which servers pass over; None where the target is unknown.
    """
    dtype = jnp.dtype(jnp.bfloat16)
    files = {CONFIG_FILE: json_text(draft_config_to_hf(draft.config))}
    if fingerprint is not None:
        files[FINGERPRINT_FILE] = json_text(fingerprint.to_json())
    params = flat_params(draft)
    mask_embedding = params.pop(MASK_EMBEDDING, None)
    if mask_embedding is not None:
        with mesh_scope():
            row = host_array(mask_embedding, "copy", dtype)
        files[MASK_EMBEDDING_FILE] = mask_embedding_bytes(row, draft.config.mask_token_id)
    return _save(params, Path(folder), DRAFT_KEYS, dtype, files, None)


def _save(
    params: Mapping[str, jax.Array],
    folder: Path,
    table: KeyTable,
    dtype: np.dtype,
    others: dict[str, bytes],
    limit: int | None,
) -> Path:
    """Writes `params` as safetensors, and `others` as they are."""
    with mesh_scope(), replacing(folder, MODEL_FILES, CONFIG_FILE) as new:
        shards = _shards(params, table, dtype, limit)
        count = len(shards)
        weight_map: dict[str, str] = {}
        for number, rows in enumerate(shards, 1):
            name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            weight_map |= {row[0]: name for row in rows}
            write_rows(None if new is None else new / name, rows, dtype)
        if count > 1:
            total = sum(array.size for rows in shards for _, _, array in rows) * dtype.itemsize
            others[INDEX_FILE] = json_text({"metadata": {"total_size": total}, "weight_map": weight_map})
        if new is not None:
            for name, content in others.items():
                (new / name).write_bytes(content)
    return folder


def _shards(params: Mapping[str, jax.Array], table: KeyTable, dtype: np.dtype, limit: int | None) -> list[list[Row]]:
    """A module's tensors under their file names, cut into files of at most `limit` bytes."""
    shards: list[list[Row]] = [[]]
    filled = 0
    for path, array in params.items():
        nbytes = array.size * dtype.itemsize
        if limit is not None and shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append((*table.to_file(path), array))
        filled += nbytes
    return shards


def write_rows(path: Path | None, rows: list[Row], dtype: np.dtype) -> None:
    """Writes one file; processes other than the first (path None) only take part in fetching."""
    arrays = (host_array(array, transform, dtype) for _, transform, array in rows)
    if path is None:
        for _ in arrays:
            pass
        return
    specs = {
        name: (DTYPE_NAMES[dtype], array.shape[::-1] if transform == "transpose" else array.shape)
        for name, transform, array in rows
    }
    write_safetensors(path, specs, arrays)


def host_array(array: jax.Array, transform: Transform, dtype: np.dtype) -> np.ndarray:
    """All of `array` in `dtype`, as a file holds it, on every process."""
    out = _orient(array, transform=transform, dtype=dtype)
    if out.is_fully_addressable:
        return np.asarray(out)
    return multihost_utils.process_allgather(out, tiled=True)


@partial(jax.jit, static_argnames=("transform", "dtype"))
def _orient(array: jax.Array, *, transform: Transform, dtype: np.dtype) -> jax.Array:
    return (array.T if transform == "transpose" else array).astype(dtype)


@contextmanager
def replacing(folder: Path, owned: tuple[str, ...], config_file: str) -> Iterator[Path | None]:
    """Yields a scratch folder that becomes `folder`, or moves into it, when the block succeeds.

    Only the first process writes; the others get None and wait until the folder is there. `owned`: patterns of the
    files that go when they are not written again; all other files of `folder` stay.
    """
    if jax.process_index() != 0:
        yield None
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
        new.mkdir()
        try:
            yield new
            _move(new, folder, owned, config_file)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _move(new: Path, folder: Path, owned: tuple[str, ...], config_file: str) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    written = {path.name for path in new.iterdir()}
    for name in sorted(written - {config_file}):
        os.replace(new / name, folder / name)
    for path in [path for pattern in owned for path in folder.glob(pattern)]:
        if path.name not in written:
            path.unlink(missing_ok=True)
    # The config goes last: until then an interrupted overwrite is at worst an old config beside new weights,
    # which the loader's shape checks see.
    os.replace(new / config_file, folder / config_file)


def json_text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
