"""Hugging Face folders -> modules: weights stream into sharded arrays, one tensor at a time.

Each process reads only the slices its devices hold. Everything that headers can tell is checked before the first
weight is read, and reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from specjax.errors import InputError
from specjax.fetch import fetch
from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.sharding import SPECS, mesh_scope, put
from specjax.weights.config_fields import raise_problems, read_json
from specjax.weights.draft_config import MASK_EMBEDDING, OWN, draft_config_from_hf, is_draft_config
from specjax.weights.hf_config import decoder_config_from_hf
from specjax.weights.key_tables import DRAFT_KEYS, LM_HEAD, TARGET_KEYS, KeyTable, Transform
from specjax.weights.mask_embedding_file import MASK_EMBEDDING_FILE, read_mask_embedding
from specjax.weights.module_params import Module, abstract_module, flat_params, with_params
from specjax.weights.safetensors_files import DTYPE_NAMES, FLOAT_DTYPES, TensorFiles, model_folder, open_tensors

CONFIG_FILE = "config.json"
SHOWN_NAMES = 20  # names listed of one kind of problem; a wrong folder would otherwise print thousands
COMPARE_BYTES = 16 << 20

Plan = dict[str, tuple[str, Transform]]


def load_target(path_or_id: str | Path, *, dtype: Any = jnp.bfloat16, param_dtype: Any = None) -> Decoder:
    """The language model of a Hugging Face folder, a hub id, or `embedded`, on the mesh in force.

    dtype: compute dtype, also of the parameters unless `param_dtype` is given. bf16 and fp32 files are read exactly
    into fp32; into bf16, fp32 files are rounded.

    Raises:
        InputError: lists everything wrong with the folder: unsupported config fields; missing, unexpected,
            misshapen or quantised tensors; truncated or absent files; weights that are NaN or infinite.
    """
    folder = model_folder(path_or_id)
    config = read_target_config(folder)
    return _load(folder, TARGET_KEYS, partial(Decoder, config), dtype, param_dtype, tied=config.tie_word_embeddings)


def load_dflash_draft(folder: Path, *, dtype: Any = jnp.bfloat16, param_dtype: Any = None) -> DFlashDraft:
    """The DFlash draft of a z-lab folder, on the mesh in force; arguments and errors as `load_target`'s."""
    config = read_dflash_config(folder)
    own = {MASK_EMBEDDING: _own_mask_embedding(folder, config)} if config.own_mask_embedding else {}
    return _load(folder, DRAFT_KEYS, partial(DFlashDraft, config), dtype, param_dtype, tied=False, vectors=own)


def read_target_config(path_or_id: str | Path) -> DecoderConfig:
    """The architecture of a target folder or hub id, without its weights."""
    folder = model_folder(path_or_id, weights=False)
    raw = read_json(folder / CONFIG_FILE)
    if is_draft_config(raw):
        raise InputError(f"{folder}: holds a DFlash draft, not a target; give the model it was trained for")
    return decoder_config_from_hf(raw, str(folder / CONFIG_FILE))


def read_dflash_config(folder: Path) -> DFlashConfig:
    """The architecture of a DFlash draft's folder, without its weights.

    A mask embedding beside the weights is the draft's own whether or not config.json says so, as for servers.
    """
    raw = read_json(folder / CONFIG_FILE)
    if (folder / MASK_EMBEDDING_FILE).exists():
        raw["dflash_config"] = (raw.get("dflash_config") or {}) | {MASK_EMBEDDING: OWN}
    return draft_config_from_hf(raw, str(folder / CONFIG_FILE))


def _own_mask_embedding(folder: Path, config: DFlashConfig) -> np.ndarray:
    path = folder / MASK_EMBEDDING_FILE
    return read_mask_embedding(path, config.mask_token_id, config.hidden_size, said_in=CONFIG_FILE)


def weights_dtype(path_or_id: str | Path) -> np.dtype:
    """The widest dtype that arrays of a folder's tensors need: the files' own; fp32 where they mix or hold F64."""
    folder = model_folder(path_or_id)
    names = {info.dtype for info in open_tensors(folder).infos.values()}
    if (folder / MASK_EMBEDDING_FILE).exists():
        names.add(DTYPE_NAMES[_own_mask_embedding(folder, read_dflash_config(folder)).dtype])
    known = names & set(FLOAT_DTYPES)
    return FLOAT_DTYPES[known.pop()] if len(known) == 1 and known != {"F64"} else np.dtype(np.float32)


def _load(
    folder: Path,
    table: KeyTable,
    module: Callable[..., Module],
    dtype: Any,
    param_dtype: Any,
    *,
    tied: bool,
    vectors: Mapping[str, np.ndarray] | None = None,
) -> Module:
    """vectors: parameters [d] from elsewhere than the folder's tensors, by module path."""
    vectors = vectors or {}
    dtype = jnp.dtype(dtype)
    param_dtype = dtype if param_dtype is None else jnp.dtype(param_dtype)
    with mesh_scope():
        files = open_tensors(folder)
        abstract = abstract_module(lambda: module(rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype))
        params = {path: param for path, param in flat_params(abstract).items() if path not in vectors}
        plan, problems = plan_loading(files, table, params, tied=tied)
        raise_problems(str(folder), files.problems + problems)
        if tied and LM_HEAD in files.infos:
            _check_tied_head(folder, files, params["embed_tokens.weight"], plan["embed_tokens.weight"][0])
        arrays = read_planned(folder, files, plan, params)
        arrays |= {path: put(x.astype(param_dtype), SPECS.mask_embedding_d) for path, x in vectors.items()}
        return with_params(abstract, arrays)


def plan_loading(
    files: TensorFiles, table: KeyTable, params: Mapping[str, jax.Array], *, tied: bool
) -> tuple[Plan, list[str]]:
    """(module path -> (tensor, transform), problems). Reads no weights."""
    plan: Plan = {}
    unexpected, ambiguous, wrong = [], [], []
    for name, info in files.infos.items():
        matches = table.to_module(name)
        if table.is_ignored(name) or (tied and name == LM_HEAD):
            continue
        if len(matches) > 1 or (matches and matches[0][0] in plan):
            ambiguous.append(name)
        elif not matches or matches[0][0] not in params:
            unexpected.append(name)
        else:
            path, transform = matches[0]
            plan[path] = name, transform
            shape = tuple(params[path].shape)
            shape = shape[::-1] if transform == "transpose" else shape
            if info.shape != shape:
                wrong.append(f"{name}: shape {list(info.shape)} in {info.file.name}, the config makes it {list(shape)}")
            if info.dtype not in FLOAT_DTYPES:
                wrong.append(f"{name}: dtype {info.dtype} is not one of {', '.join(FLOAT_DTYPES)} (quantised weights?)")
    missing = [table.to_file(path)[0] for path in params if path not in plan]
    problems = [
        *_listed("missing tensor", missing),
        *_listed("unexpected tensor", unexpected),
        *_listed("tensor given twice", ambiguous),
    ]
    return plan, problems + wrong


def read_planned(folder: Path, files: TensorFiles, plan: Plan, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The tensors of a `plan` without problems, by module path, as the abstract `params` are.

    Raises:
        InputError: lists the tensors that hold NaN or infinity.
    """
    arrays = {path: _read_sharded(files, *plan[path], params[path]) for path in params}
    # One at a time: on CPU, many all-reduces in flight can take all threads and wait for each other for ever.
    totals = fetch({path: jax.block_until_ready(_total(array)) for path, array in arrays.items()})
    suspects = [path for path, total in totals.items() if not np.isfinite(total)]
    wrong = [plan[path][0] for path in suspects if not fetch(jnp.isfinite(arrays[path]).all())]
    raise_problems(str(folder), _listed("NaN or infinity in tensor", wrong))
    return arrays


def _listed(kind: str, names: list[str]) -> list[str]:
    lines = [f"{kind} {name}" for name in sorted(names)[:SHOWN_NAMES]]
    return lines + ([f"... and {len(names) - SHOWN_NAMES} more: {kind}"] if len(names) > SHOWN_NAMES else [])


def _read_sharded(files: TensorFiles, name: str, transform: Transform, param: jax.Array) -> jax.Array:
    """One tensor as an array with the shape, dtype and sharding of the abstract `param`, read slice by slice.

    It is read in the file's orientation, transposed and cast on the devices (NumPy would take several times as
    long), and waited for: queued copies would otherwise hold several tensors in memory at once.
    """
    info, sharding = files.infos[name], param.sharding
    assert isinstance(sharding, NamedSharding)
    spec = (*sharding.spec, *[None] * (len(info.shape) - len(sharding.spec)))
    if transform == "transpose":
        sharding = NamedSharding(sharding.mesh, P(*spec[::-1]))
    slices: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = repr(index)  # devices that hold copies of a slice share one read
        if key not in slices:
            slices[key] = files.read(name, index)
        return slices[key]

    dtype = jax.dtypes.canonicalize_dtype(FLOAT_DTYPES[info.dtype])
    array = jax.make_array_from_callback(info.shape, sharding, read, dtype=dtype)
    slices.clear()
    if transform == "transpose" or array.dtype != param.dtype:
        array = _place(array, transform=transform, dtype=param.dtype)
    return jax.block_until_ready(array)


@jax.jit
def _total(array: jax.Array) -> jax.Array:
    """Finite only if all elements are; on CPU ten times as fast as looking at each."""
    return jnp.sum(array, dtype=jnp.float32)


@partial(jax.jit, static_argnames=("transform", "dtype"))
def _place(array: jax.Array, *, transform: Transform, dtype: np.dtype) -> jax.Array:
    return (array.T if transform == "transpose" else array).astype(dtype)


def _check_tied_head(folder: Path, files: TensorFiles, embedding: jax.Array, embedding_name: str) -> None:
    """A tied model's file may repeat the embedding as `lm_head.weight`; a different one would be lost silently."""
    a, b = files.infos[embedding_name], files.infos[LM_HEAD]
    same = a.shape == b.shape and a.dtype == b.dtype
    if same:
        indices = embedding.sharding.addressable_devices_indices_map(a.shape).values()
        chunks = {
            repr(chunk): chunk for index in indices for chunk in _row_chunks(index or (slice(None),), a.shape, a.nbytes)
        }
        same = all(
            files.read(embedding_name, chunk).tobytes() == files.read(LM_HEAD, chunk).tobytes()
            for chunk in chunks.values()
        )
    if not same:
        raise InputError(
            f"{folder}: {LM_HEAD} differs from {embedding_name}, but tie_word_embeddings is true; "
            "set it to false in config.json to use the head"
        )


def _row_chunks(index: tuple[slice, ...], shape: tuple[int, ...], nbytes: int) -> Iterator[tuple[slice, ...]]:
    start, stop, _ = index[0].indices(shape[0])
    step = max(1, COMPARE_BYTES * shape[0] // nbytes)
    for row in range(start, stop, step):
        yield slice(row, min(row + step, stop)), *index[1:]
