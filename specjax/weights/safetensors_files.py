"""Model folders on disk or on the hub, and their safetensors files: opening, slicing, and streaming writes."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from specjax.errors import InputError
from specjax.weights.config_fields import raise_problems, read_json

SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".index.json"
INDEX_FILE = SINGLE_FILE + INDEX_SUFFIX
EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "embedded_target"
ALIGNMENT = 64  # bytes; XLA copies host arrays that are aligned less
HEADER_LENGTH = struct.Struct("<Q")
METADATA = "__metadata__"
HUB_SMALL_FILES = "*.json", "*.jinja", "merges.txt", "*.model", "mask_embedding.pt"
HUB_WEIGHTS = "*.safetensors"

# The header's dtype names of weights that can be loaded. Integers and float8 are quantised formats with scales of
# their own: reading them as numbers would give garbage.
FLOAT_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def model_folder(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: a folder, `embedded`, or a hub id, which is downloaded into the hub's cache.

    weights: download them, too, and not only the small files beside them.

    Raises:
        InputError: there is no such folder and the hub cannot deliver a model of that name.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_id)
    if name == EMBEDDED:
        return EMBEDDED_FOLDER
    if path.exists():
        raise InputError(f"{path}: is a file; give the model folder that holds its config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise InputError(f"{path}: no such folder; give a model folder, a hub id (OWNER/NAME), or {EMBEDDED!r}")
    return _download(name, weights)


def model_name(path_or_id: str | Path) -> str | None:
    """By what a program in any folder finds a model: a folder's absolute path, or the hub id; None of `embedded`."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return str(path.resolve())
    return None if str(path_or_id) == EMBEDDED else str(path_or_id)


def _download(repo_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*HUB_SMALL_FILES, *([HUB_WEIGHTS] if weights else [])]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repo_id}: neither a local folder nor a model the hub can deliver ({reason}); "
            "give an existing folder or a hub id, and check the network"
        ) from None


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its file's header says of it; `dtype` is the header's name (BF16, I8, ...).

    start: offset of its first byte in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor; meaningful for the dtypes of FLOAT_DTYPES."""
        return int(np.prod(self.shape)) * FLOAT_DTYPES[self.dtype].itemsize


class TensorFiles:
    """The tensors of one folder: `infos` by name, and slices of them read on demand."""

    def __init__(self, infos: dict[str, TensorInfo], maps: dict[Path, mmap.mmap], problems: list[str]):
        self.infos = infos
        self.problems = problems
        self._maps = maps

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` of a tensor, in the file's dtype; only these bytes are read.

        The result is aligned as XLA wants it, so that on CPU a device array takes it over without another copy; and
        it is a copy, since an array over the mapped file would change with the file.
        """
        info = self.infos[name]
        dtype = FLOAT_DTYPES[info.dtype]
        mapped = self._maps[info.file]
        whole = np.frombuffer(mapped, dtype, int(np.prod(info.shape)), info.start).reshape(info.shape)
        view = whole[index]
        if view.flags.c_contiguous and view.nbytes:
            offset = view.ctypes.data - whole.ctypes.data + info.start
            page = offset - offset % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, page, offset - page + view.nbytes)
        out = _aligned(view.shape, dtype)
        np.copyto(out, view)
        return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def open_tensors(folder: Path, single: str = SINGLE_FILE) -> TensorFiles:
    """Opens `model.safetensors` or the shards of `model.safetensors.index.json`, reading headers only.

    single: the file's name, where it is another.

    Files that are absent, truncated or at odds with the index become `problems` of the result, so that a caller can
    report them with its own.

    Raises:
        InputError: the folder holds no weights at all.
    """
    files, indexed, problems = _files(folder, single)
    infos: dict[str, TensorInfo] = {}
    maps: dict[Path, mmap.mmap] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass  # checks the header, its offsets and the file's length
        except FileNotFoundError:
            problems.append(f"{file.name}: the shard is missing; fetch it again")
            continue
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: truncated or corrupt ({error}); fetch it again")
            continue
        with file.open("rb") as opened:
            maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        for info in _tensor_infos(file, maps[file]):
            if info.name in infos:
                problems.append(f"{info.name}: in both {infos[info.name].file.name} and {file.name}")
            infos[info.name] = info
    opened_names = {file.name for file in maps}
    for name, shard in indexed.items():
        if shard in opened_names and (name not in infos or infos[name].file.name != shard):
            problems.append(f"{name}: {single}{INDEX_SUFFIX} places it in {shard}, which does not hold it")
    return TensorFiles(infos, maps, problems)


def open_sound_tensors(folder: Path) -> TensorFiles:
    """`open_tensors`, refusing with one InputError whatever is missing, damaged or of a dtype that cannot be read."""
    files = open_tensors(folder)
    wrong = [
        f"{info.name}: dtype {info.dtype} is not one of {', '.join(FLOAT_DTYPES)}; use the unquantised model"
        for info in files.infos.values()
        if info.dtype not in FLOAT_DTYPES
    ]
    raise_problems(str(folder), [*files.problems, *wrong])
    return files


def _tensor_infos(file: Path, mapped: mmap.mmap) -> Iterator[TensorInfo]:
    (length,) = HEADER_LENGTH.unpack_from(mapped)
    header = json.loads(mapped[HEADER_LENGTH.size : HEADER_LENGTH.size + length])
    for name, entry in header.items():
        if name != METADATA:
            start = HEADER_LENGTH.size + length + entry["data_offsets"][0]
            yield TensorInfo(name, file, entry["dtype"], tuple(entry["shape"]), start)


def _files(folder: Path, single: str) -> tuple[list[Path], dict[str, str], list[str]]:
    """(files to open, the index's tensor -> shard map, problems)."""
    index = folder / (single + INDEX_SUFFIX)
    if not index.exists():
        if not (folder / single).exists():
            found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))[:3])
            hint = f"; {found} is a PyTorch file: save the model as safetensors" if found else ""
            raise InputError(f"{folder}: holds no weights ({single} or {index.name}){hint}")
        return [folder / single], {}, []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise InputError(f"{index}: weight_map is not an object of tensor names and file names; fetch the file again")
    outside = sorted({name for name in weight_map.values() if Path(name).name != name})
    problems = [f"{index.name}: shard {name!r} is not a file of the folder" for name in outside]
    return [folder / name for name in sorted(set(weight_map.values()) - set(outside))], weight_map, problems


def write_safetensors(
    path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Iterable[np.ndarray]
) -> None:
    """Writes one safetensors file, holding one array at a time.

    specs: name -> (dtype name, shape), in the order in which `arrays` yields them. Format: a little-endian 8-byte
    header length, the JSON header padded with spaces to 8 bytes, then the tensors one after another.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"}}  # transformers refuses a file without a format
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + int(np.prod(shape)) * FLOAT_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(HEADER_LENGTH.pack(len(text)) + text)
        for (name, (dtype, shape)), array in zip(specs.items(), arrays, strict=True):
            if array.shape != shape or array.dtype != FLOAT_DTYPES[dtype]:
                raise ValueError(f"{name}: is {array.dtype}{array.shape}, announced as {dtype}{shape}")
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
