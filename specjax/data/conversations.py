"""Training records: conversations, or token ids with their loss mask. Here from JSONL, read one line at a time.

A record is a JSON object that holds exactly one of
`messages`       `[{"role": ..., "content": ...}, ...]` (OpenAI),
`conversations`  the same, or `[{"from": ..., "value": ...}, ...]` (ShareGPT),
`input_ids`      token ids, beside `loss_mask` (same length, true where a token is supervised).
A conversation may also hold `tools`, handed to the chat template: a list of schemas, or the JSON text of one. Other
keys are left alone.
"""

import glob
import gzip
import io
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from specjax.errors import InputError

# Names that data sets use for a role -> the name that chat templates know.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
RECORD_KEYS = ("messages", "conversations", "input_ids")
# The start of a pre-tokenised line, after which its tokens can be counted without decoding them.
_TOKENS_FIRST = re.compile(rb'\s*\{\s*"input_ids"\s*:\s*\[')
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages with OpenAI roles, `content` a string (absent only beside `tool_calls`); `origin` says where."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    origin: str


@dataclass(frozen=True)
class PretokenizedExample:
    """Token ids int32 [t] and their loss mask bool [t]; `origin` says where they stand."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    origin: str


Record = Conversation | PretokenizedExample


def parse_record(fields: object, origin: str, vocab_size: int | None = None) -> Record:
    """The record that a decoded JSON value states.

    `origin` (such as `file F, line 3`) opens every message. With `vocab_size`, token ids must lie in [0, vocab_size).
    Raises InputError for anything that is not exactly one well-typed record.
    """
    if not isinstance(fields, dict):
        raise InputError(f"{origin}: a record is a JSON object, this is {_json_type(fields)}")
    keys = [key for key in RECORD_KEYS if key in fields]
    if len(keys) != 1:
        found = f"both {' and '.join(keys)}" if keys else f"only {sorted(fields)}"
        raise InputError(f"{origin}: a record holds exactly one of {', '.join(RECORD_KEYS)}; this one holds {found}")
    if keys[0] == "input_ids":
        return _pretokenized(fields, origin, vocab_size)
    turns = fields[keys[0]]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if isinstance(turns, list) else _json_type(turns)
        raise InputError(f"{origin}: field {keys[0]} is {found}; give a list of messages")
    messages = tuple(_message(turn, f"{origin}: {keys[0]}[{i}]") for i, turn in enumerate(turns))
    return Conversation(messages, _tools(fields.get("tools"), origin), origin)


def _tools(tools: object, origin: str) -> tuple[dict[str, Any], ...]:
    """Tool schemas; as JSON text too, since a column of a table cannot hold schemas of different shapes."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except ValueError as error:
            raise InputError(f"{origin}: field tools is text but not JSON ({error}); give a list of schemas") from error
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{origin}: field tools is {_json_type(tools)}; give a list of tool schemas (objects)")
    return tuple(tools)


def _message(turn: object, origin: str) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{origin} is {_json_type(turn)}; give an object with role and content (or from and value)")
    role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    if role_key not in turn:
        raise InputError(f"{origin} has neither role nor from; it holds {sorted(turn)}")
    name = turn[role_key]
    if not isinstance(name, str) or name not in ROLES:
        raise InputError(f"{origin}: field {role_key} is {name!r}, an unknown role; known are {', '.join(ROLES)}")
    content = turn.get(content_key)
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        found = _json_type(content) if content_key in turn else "missing"
        raise InputError(f"{origin}: field {content_key} is {found}; give a string (text is all that is supported)")
    # A key whose value is null is dropped: templates test for the presence of a key.
    extra = {k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
    return {"role": ROLES[name]} | ({} if content is None else {"content": content}) | extra


def _pretokenized(fields: dict[str, Any], origin: str, vocab_size: int | None) -> PretokenizedExample:
    if "loss_mask" not in fields:
        raise InputError(f"{origin}: input_ids without loss_mask; give one true or false a token")
    input_ids = _flat_array(fields["input_ids"], "iu", f"{origin}: field input_ids", "a list of integers")
    loss_mask = _flat_array(fields["loss_mask"], "iub", f"{origin}: field loss_mask", "a list of true/false or 1/0")
    if len(input_ids) != len(loss_mask):
        raise InputError(
            f"{origin}: input_ids has {len(input_ids)} entries and loss_mask {len(loss_mask)}; they must agree"
        )
    if not np.isin(loss_mask, (0, 1)).all():
        raise InputError(f"{origin}: field loss_mask holds {loss_mask.max()}; give true/false or 1/0")
    check_token_ids(input_ids, vocab_size, origin)
    return PretokenizedExample(input_ids.astype(np.int32), loss_mask.astype(bool), origin)


def check_token_ids(input_ids: np.ndarray, vocab_size: int | None, origin: str) -> None:
    """Raises InputError, opened by `origin`, unless every id lies in [0, vocab_size) (int32 when that is None)."""
    limit = 2**31 if vocab_size is None else vocab_size
    wrong = np.flatnonzero((input_ids < 0) | (input_ids >= limit))
    if wrong.size:
        raise InputError(
            f"{origin}: token {wrong[0]} has id {input_ids[wrong[0]]}, outside the vocabulary of {limit} ids; "
            "tokenise with the target's own tokenizer"
        )


def _flat_array(value: object, kinds: str, field: str, wanted: str) -> np.ndarray:
    if not isinstance(value, list):
        raise InputError(f"{field} is {_json_type(value)}; give {wanted}")
    if not value:
        return np.zeros(0, np.int64)
    try:
        found = np.asarray(value)
    except ValueError as error:  # nested lists of unequal lengths
        raise InputError(f"{field} is nested; give {wanted}") from error
    if found.ndim != 1 or found.dtype.kind not in kinds:
        raise InputError(f"{field} does not hold {wanted} only")
    return found


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def find_files(patterns: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths and glob patterns (`**` included) name, in the order given, each pattern's matches sorted.

    A file named k times is listed k times, so that its samples weigh k times as much. Raises InputError for a pattern
    that matches no file.
    """
    found: list[Path] = []
    for path in patterns:
        pattern = os.fspath(path)
        # A literal path comes first: a file name may hold characters that glob reads as a pattern.
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files = [Path(name) for name in names if os.path.isfile(name)]
        if not files:
            raise InputError(f"data {pattern}: no such file; give data files or a glob pattern that matches some")
        found.extend(files)
    return found


class JsonlRecords:
    """Random access to the records of JSONL files: only byte offsets are held in memory, and files that end in .gz.

    Blank lines are skipped. Picklable; safe to read from several threads, because each read opens its file.
    `parse` makes a record of a decoded line, as `parse_record` does.
    `token_counts` int64 [records] are the tokens of the records whose line begins with `input_ids`, -1 for the others;
    `identity` holds the bytes of each file: one that was edited or extended rarely keeps its size.
    Raises InputError for a pattern without a file, for files without a single record, and, on access, for a bad line.
    """

    def __init__(
        self,
        patterns: Iterable[str | os.PathLike[str]],
        *,
        vocab_size: int | None = None,
        parse: Callable[[object, str, int | None], Record] = parse_record,
    ) -> None:
        self.paths = find_files(patterns)
        self.vocab_size = vocab_size
        self.parse = parse
        self.identity: list[int | str] = [path.stat().st_size for path in self.paths]
        self._unpacked = {path: _unpacked(path) for path in self.paths if path.suffix == ".gz"}
        lines = [self._index_lines(path) for path in self.paths]
        self._lines = np.concatenate(lines) if lines else np.zeros((0, 4), np.int64)
        self.token_counts = self._lines[:, 3]
        self._first = np.cumsum([0] + [len(index) for index in lines])
        if not len(self):
            raise InputError(f"data set {', '.join(map(str, self.paths))}: no records; give at least one JSONL line")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        return self.parse(*self.fields(index), self.vocab_size)

    def fields(self, index: int) -> tuple[object, str]:
        """A line's JSON value and where it stands, `file F, line N`. Raises InputError for what is no JSON."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        path, number = self.place(index)
        _, start, stop, _ = map(int, self._lines[index])
        origin = f"file {path}, line {number}"
        with self._open(path) as file:
            file.seek(start)
            line = file.read(stop - start)
        try:
            return json.loads(line.decode("utf-8-sig")), origin
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise InputError(f"{origin}: not JSON ({error}); JSONL holds one JSON object a line") from error

    def place(self, index: int) -> tuple[Path, int]:
        """File and one-based line number of a record."""
        index %= len(self)
        return self.paths[int(np.searchsorted(self._first, index, side="right")) - 1], int(self._lines[index, 0])

    def _open(self, path: Path) -> BinaryIO:
        return io.BytesIO(self._unpacked[path]) if path in self._unpacked else open(path, "rb")

    def _index_lines(self, path: Path) -> np.ndarray:
        """int64 [lines, 4] of the non-blank lines: one-based line number, first byte, byte after the last, tokens."""
        index = array("q")
        start = 0
        with self._open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    index.extend((number, start, start + len(line), _count_tokens(line)))
                start += len(line)
        return np.frombuffer(index.tobytes(), np.int64).reshape(-1, 4)


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"file {path}: cannot be unpacked ({error}); give a whole gzip file") from error


def _count_tokens(line: bytes) -> int:
    """The length of `input_ids` where the line begins with it, else -1. Commas are counted far faster than parsed."""
    opening = _TOKENS_FIRST.match(line)
    if opening is None:
        return -1
    first, stop = opening.end(), line.find(b"]", opening.end())
    return line.count(b",", first, stop) + 1 if line[first:stop].strip() else 0
