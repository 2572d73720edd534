"""Records from Parquet files, from sets that `datasets` saved, and from the Hugging Face hub.

`datasets` keeps each as Arrow files on disk (for Parquet and the hub in its cache, `HF_HOME`), which are mapped into
memory: a row is read when it is asked for.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from specjax.data.conversations import RECORD_KEYS, Record, parse_record
from specjax.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_SCHEME = "hf://"
HUB_EXAMPLE = "hf://owner/name?split=train"
HUB_SETTINGS = ("split", "config", "revision")
COLUMNS = (*RECORD_KEYS, "loss_mask", "tools")  # of a training record
ROWS_PER_COUNT = 10_000  # rows whose lengths are taken at a time


class ArrowRecords:
    """Random access to the rows of tables as records. Picklable; safe to read from several threads.

    Only `columns` are read: others may be images or take long to decode. `origins[i]` names table i in errors, before
    `, row N` (from 1). `token_counts` int64 [records] are the lengths of
    `input_ids`, -1 for conversations. `identity` tells these tables from changed ones.
    Raises InputError for a table without any of `columns`, for no rows at all, and, on access, for a bad row.
    """

    def __init__(
        self, tables: Sequence[Dataset], origins: Sequence[str], identity: Sequence[int | str], columns: Sequence[str]
    ) -> None:
        self._tables = [_select(table, origin, columns) for table, origin in zip(tables, origins, strict=True)]
        self._origins = list(origins)
        self._first = np.cumsum([0, *map(len, self._tables)])
        self.identity = list(identity)
        if not len(self):
            raise InputError(f"data set {', '.join(origins)}: no records; give at least one row")
        self.token_counts = np.concatenate([_token_counts(table) for table in self._tables])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Record:
        return parse_record(*self.fields(index))

    def fields(self, index: int) -> tuple[object, str]:
        """A row without its nulls and where it stands."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        table = int(np.searchsorted(self._first, index, side="right")) - 1
        row = index - int(self._first[table])
        return drop_nulls(self._tables[table][row]), f"{self._origins[table]}, row {row + 1}"


def open_parquet(paths: Sequence[Path], columns: Sequence[str]) -> ArrowRecords:
    """The rows of Parquet files, which need not have the same columns. Raises InputError naming an unreadable one."""
    from datasets import Dataset

    tables, sizes = [], []
    for path in paths:
        # from_parquet takes the name as a pattern.
        read = partial(Dataset.from_parquet, glob.escape(str(path)))
        tables.append(_load(read, f"file {path}", "give a Parquet file with rows"))
        sizes.append(path.stat().st_size)
    return ArrowRecords(tables, [f"file {path}" for path in paths], sizes, columns)


def open_saved(folder: Path, columns: Sequence[str]) -> ArrowRecords:
    """The rows of a folder written by `Dataset.save_to_disk`. Raises InputError for another folder."""
    import datasets

    kinds = [kind for kind in ("jsonl", "parquet") if any(folder.glob(f"*.{kind}"))]
    remedy = (
        f"give its files, {folder}/*.{kinds[0]}" if kinds else "give the folder of a Dataset.save_to_disk, or files"
    )
    table = _load(lambda: datasets.load_from_disk(str(folder)), f"folder {folder}", remedy)
    if isinstance(table, datasets.DatasetDict):
        splits = ", ".join(str(folder / name) for name in table)
        raise InputError(f"folder {folder}: holds several splits; give one of {splits}")
    sizes = [Path(file["filename"]).stat().st_size for file in table.cache_files]
    return ArrowRecords([table], [f"folder {folder}"], sizes, columns)


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the hub; `config` and `revision` None are the data set's defaults."""

    name: str
    split: str
    config: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, url: str) -> HubSource:
        """The source of `hf://owner/name?split=...[&config=...][&revision=...]`; InputError for anything else."""
        parts = urlsplit(url)
        name = f"{parts.netloc}{parts.path}".strip("/")
        if not parts.netloc or name.count("/") > 1 or parts.fragment:
            raise InputError(f"data {url}: is no data set of the hub; write {HUB_EXAMPLE}")
        # A plus sign joins splits (train+test) and is no space.
        pairs = parse_qsl(parts.query.replace("+", "%2B"), keep_blank_values=True)
        settings = dict(pairs)
        if len(settings) < len(pairs):
            raise InputError(f"data {url}: gives a setting twice; drop one, or join splits as in split=train+test")
        unknown = sorted(settings.keys() - set(HUB_SETTINGS))
        if unknown:
            raise InputError(f"data {url}: unknown setting {unknown[0]}; known are {', '.join(HUB_SETTINGS)}")
        empty = [key for key, value in settings.items() if not value]
        if empty or "split" not in settings:
            raise InputError(f"data {url}: {empty[0] if empty else 'split'} is missing; write it as in {HUB_EXAMPLE}")
        return cls(name, **settings)


def open_hub(url: str, columns: Sequence[str]) -> ArrowRecords:
    """The rows of a split of a hub data set, downloaded at first use; as `datasets` does, a local folder of that name
    comes first. Raises InputError for a wrong `url` and for what the hub does not have or does not give."""
    from datasets import load_dataset

    source = HubSource.parse(url)
    table = _load(
        lambda: load_dataset(source.name, name=source.config, split=source.split, revision=source.revision),
        f"data {url}",
        "check owner/name, split, config and revision, the network, and for a gated set `hf auth login`; or download "
        "it and give its Parquet files",
    )
    return ArrowRecords([table], [url], [len(table), table._fingerprint], columns)


def _load(load: Callable[[], Any], origin: str, remedy: str) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return load()
    # What datasets, pyarrow and the hub's client raise for absent, unreachable and malformed sets.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{origin}: cannot be loaded ({error.__cause__ or error}); {remedy}") from error


def _select(table: Dataset, origin: str, columns: Sequence[str]) -> Dataset:
    found = [name for name in columns if name in table.column_names]
    if not found:
        raise InputError(f"{origin}: a record is made of {', '.join(columns)}; the columns are {table.column_names}")
    return table.select_columns(found)


def _token_counts(table: Dataset) -> np.ndarray:
    """int64 [rows]: the lengths of `input_ids`, -1 where there are none; the ids themselves are not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    counts = np.full(len(table), -1, np.int64)
    if "input_ids" not in table.column_names:
        return counts
    column = table.select_columns(["input_ids"]).with_format("arrow")
    for start, part in zip(range(0, len(table), ROWS_PER_COUNT), column.iter(batch_size=ROWS_PER_COUNT), strict=True):
        ids = part["input_ids"]
        if pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type):
            counts[start : start + len(ids)] = pc.list_value_length(ids).fill_null(-1).to_numpy()
    return counts


def drop_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, at any depth.

    A table gives every row of a column all keys of all its rows; templates test for the presence of a key.
    """
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value
