"""`mask_embedding.pt`: a draft's own mask embedding in the form that servers read, without PyTorch.

It is what `torch.save({"mask_token_id": id, "embedding": tensor})` writes, or a bare tensor: a zip of a pickle, which
describes the tensor, and of its bytes. A pickle may name any function to call; this reader knows the few that
describe a tensor and refuses the others, so a file can run no code.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.errors import InputError
from specjax.weights.safetensors_files import FLOAT_DTYPES

MASK_EMBEDDING_FILE = "mask_embedding.pt"
MOST_PICKLE_BYTES = 1 << 16  # the description of a tensor takes a few hundred
STORAGES = {"BFloat16Storage": "BF16", "HalfStorage": "F16", "FloatStorage": "F32", "DoubleStorage": "F64"}


class _Tensor(NamedTuple):
    """A tensor as its pickle describes it. storage: ("storage", dtype name, member of data/, device, elements)."""

    storage: tuple[Any, ...]
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, size, stride)


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


KNOWN = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": OrderedDict,
    **{f"torch.{storage}": name for storage, name in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no float tensor")
        return KNOWN[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        return pid


def mask_embedding_bytes(embedding: np.ndarray, mask_token_id: int) -> bytes:
    """The file of `embedding` [d], of one of the float dtypes; equal bytes for equal arguments."""
    (storage,) = (name for name, dtype in STORAGES.items() if FLOAT_DTYPES[dtype] == embedding.dtype)
    size = _integer(len(embedding))
    described = _tuple(_text("storage"), _name("torch", storage), _text("0"), _text("cpu"), size) + pickle.BINPERSID
    no_hooks = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = described, _integer(0), _tuple(size), _tuple(_integer(1)), pickle.NEWFALSE, no_hooks
    tensor = _name("torch._utils", "_rebuild_tensor_v2") + _tuple(*arguments) + pickle.REDUCE
    items = _text("mask_token_id") + _integer(mask_token_id) + _text("embedding") + tensor
    members = {
        "data.pkl": pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP,
        "byteorder": b"little",
        "data/0": embedding.tobytes(),
        "version": b"3\n",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"mask_embedding/{name}"), content)  # dated 1980
    return file.getvalue()


def _text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def _integer(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def read_mask_embedding(path: Path, mask_token_id: int, hidden_size: int, *, said_in: str) -> np.ndarray:
    """The embedding [d] in the file's dtype, of a draft with this mask token.

    said_in: the file that says so, for errors.

    Raises:
        InputError: there is no such file, it is damaged or holds something else, or the mask embedding of another
            size or token.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file, though {said_in} gives the draft a mask embedding of its own")
    try:
        with zipfile.ZipFile(path) as archive:
            saved, token, embedding = _read(archive)
    except Exception as error:  # what a damaged zip or pickle raises has no common base
        raise InputError(
            f"{path}: is not a mask embedding ({error}); save it again with "
            'torch.save({"mask_token_id": id, "embedding": tensor}, path)'
        ) from error
    if token not in (None, mask_token_id):
        raise InputError(f"{path}: mask_token_id is {token}, in {said_in} {mask_token_id}; these must agree")
    if math.prod(saved.size) != hidden_size:
        raise InputError(f"{path}: embedding has shape {list(saved.size)}; hidden_size is {hidden_size}")
    return embedding


def _read(archive: zipfile.ZipFile) -> tuple[_Tensor, int | None, np.ndarray]:
    """(the tensor's description, the token it is for where that is said, its values, flat)."""
    (pickled,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
    if pickled.file_size > MOST_PICKLE_BYTES:
        raise ValueError(f"its pickle has {pickled.file_size} bytes")
    root = pickled.filename.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its bytes are in big-endian order")
    value = _Unpickler(io.BytesIO(archive.read(pickled))).load()
    token = value.get("mask_token_id") if isinstance(value, dict) else None
    saved = value["embedding"] if isinstance(value, dict) else value
    if not isinstance(saved, _Tensor):
        raise ValueError(f"it holds a {type(saved).__name__}, no tensor")
    _, dtype_name, key, _, _ = saved.storage
    dtype = FLOAT_DTYPES[dtype_name]
    strides = [math.prod(saved.size[i + 1 :]) for i in range(len(saved.size))]
    if any(n > 1 and a != b for n, a, b in zip(saved.size, saved.stride, strides, strict=True)):
        raise ValueError("its values do not lie one after another")
    count = math.prod(saved.size)
    # The storage may be a whole table of which the tensor is one row.
    with archive.open(f"{root}data/{key}") as data:
        data.seek(saved.offset * dtype.itemsize)
        content = data.read(count * dtype.itemsize)
    return saved, token, np.frombuffer(content, dtype, count)
