"""Where training records come from, how often an epoch passes over each source, and which records are held out.

A source is a path: JSONL (also .gz) or Parquet files or globs, a folder of `Dataset.save_to_disk`, or `hf://owner/name?split=...`.

Held out are records whose content, as a number in [0, 1), lies below a fraction. So copies of a record are on one
side, whatever their order, file or file format, and a larger fraction holds out the same records and more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from specjax.data.arrow import COLUMNS, HUB_SCHEME, drop_nulls, open_hub, open_parquet, open_saved
from specjax.data.conversations import Conversation, JsonlRecords, Record, find_files
from specjax.errors import InputError


class Source(Protocol):
    """Random access to the records of one source. `token_counts` int64 [records]: tokens as far as they are known
    without reading, else -1. `identity`: JSON values that differ where the source was changed. `fields`: a record as
    it is written, before it is parsed, and where it stands."""

    token_counts: np.ndarray
    identity: list[int | str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    def fields(self, index: int, /) -> tuple[object, str]: ...


class MixedRecords:
    """Records of several sources in any order and number: sample i is record `indices[i]`, counted over all sources.

    indices: int64 [samples]. Picklable and thread-safe if the sources are.
    """

    def __init__(self, sources: Sequence[Source], indices: np.ndarray) -> None:
        self.sources = list(sources)
        self.indices = indices
        self._first = np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, sample: int) -> Record:
        index = int(self.indices[sample])
        source = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.sources[source][index - int(self._first[source])]

    @property
    def token_counts(self) -> np.ndarray:
        """Tokens of every sample as far as they are known without reading it, else -1; int64 [samples]."""
        counts = [source.token_counts for source in self.sources]
        return np.concatenate([np.zeros(0, np.int64), *counts])[self.indices]

    @property
    def identity(self) -> list[int | str]:
        """That of every source, one after another."""
        return [value for source in self.sources for value in source.identity]

    def distinct(self) -> tuple[MixedRecords, np.ndarray]:
        """Every record that occurs, once, and int64 [samples]: which of them each sample is."""
        indices, where = np.unique(self.indices, return_inverse=True)
        return MixedRecords(self.sources, indices), where


def open_source(path: str | os.PathLike[str], columns: Sequence[str] = COLUMNS) -> Source:
    """The records of one path; see the module for the kinds. Of a table's columns only `columns` are read.

    Raises InputError naming what cannot be read.
    """
    name = os.fspath(path)
    if name.startswith(HUB_SCHEME):
        return open_hub(name, columns)
    if os.path.isdir(name):
        return open_saved(Path(name), columns)
    files = find_files([path])
    parquet = [file for file in files if file.suffix == ".parquet"]
    if not parquet:
        return JsonlRecords([path])
    if len(parquet) < len(files):
        raise InputError(f"data {name}: matches Parquet and other files; give a pattern for each kind")
    return open_parquet(parquet, columns)


def read_sources(
    entries: Iterable[tuple[str | os.PathLike[str], float]], validation_fraction: float | None = None
) -> tuple[MixedRecords, MixedRecords | None]:
    """The samples of an epoch of training, source after source, and the held-out records (None without a fraction).

    entries: (path, weight). An epoch passes `weight` times over the source's training records; the fraction of a pass
    is a fixed subset, the same in every epoch and for every seed.
    validation_fraction: in (0, 1); all records are read once, one at a time. A record that occurs several times is
    held out once.

    Raises:
        InputError: a source cannot be read, a weight leaves none of its records, either side is empty.
    """
    entries = list(entries)
    sources = [open_source(path) for path, _ in entries]
    first = np.cumsum([0, *map(len, sources)])
    held, validation = np.zeros(first[-1], bool), None
    if validation_fraction is not None:
        hashes = np.concatenate([[content_hash(source[i]) for i in range(len(source))] for source in sources])
        held = hashes < np.uint64(int(validation_fraction * 2**64))
        _check_sides(held, validation_fraction)
        _, once = np.unique(hashes[held], return_index=True)
        validation = MixedRecords(sources, np.flatnonzero(held)[np.sort(once)])
    kept = np.flatnonzero(~held)
    by_source = np.split(kept, np.searchsorted(kept, first[1:-1]))
    samples = [_passes(own, weight, path) for own, (path, weight) in zip(by_source, entries, strict=True)]
    return MixedRecords(sources, np.concatenate(samples)), validation


def _check_sides(held: np.ndarray, fraction: float) -> None:
    if held.all() or not held.any():
        side, remedy = ("all", "lower") if held.all() else ("none", "raise")
        raise InputError(
            f"data.validation_fraction {fraction:g}: holds out {side} of the {len(held)} records; {remedy} it"
        )


def content_hash(record: Record) -> np.uint64:
    """A number in [0, 2^64) of what training reads of a record; keys without a value and their order do not count."""
    if isinstance(record, Conversation):
        content = drop_nulls({"messages": list(record.messages), "tools": list(record.tools)})
        data = json.dumps(content, sort_keys=True, default=str).encode()
    else:
        data = record.input_ids.astype("<i4").tobytes() + b"|" + np.packbits(record.loss_mask).tobytes()
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))


def _passes(records: np.ndarray, weight: float, path: str | os.PathLike[str]) -> np.ndarray:
    """`records` int64 [n] as often as whole passes go into `weight`, and round(n * the rest) of them once more.

    These are the records whose position hashes lowest, so that a larger weight keeps what a smaller one took.
    """
    whole = int(weight)
    extra = round((weight - whole) * len(records))
    if len(records) and not whole and not extra:
        raise InputError(
            f"data.train {os.fspath(path)}: weight {weight:g} takes none of {len(records)} records; raise it"
        )
    chosen = np.sort(np.argsort(_mixed(np.arange(len(records), dtype=np.uint64)), kind="stable")[:extra])
    return np.concatenate([np.tile(records, whole), records[chosen]])


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64 [n] -> uint64 [n], without an order in common with `numbers`: the finaliser of splitmix64."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
