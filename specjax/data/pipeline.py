"""Batches for training and evaluation, each a pure function of (seed, step).

The examples of epoch 0, 1, 2, ... follow each other in one endless stream, shuffled anew each epoch; batch `step` is
its positions [step * batch_size, (step + 1) * batch_size). Process p of P builds every P-th of them from p on. So a
run resumes at any step, and on any number of processes, by asking for that step; no iterator state is saved.

A batch maps names to arrays, b = batch_size / process_count rows, S = max_length, N = num_anchors:
`input_ids` int32 [b, S], `loss_mask` bool [b, S], `document_ids` int32 [b, S] (1 on tokens, 0 on padding),
`sample_id` and `epoch` int32 [b], and, unless num_anchors is None, `anchors` int32 [b, N], `anchor_valid` bool [b, N].
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import grain
import numpy as np

from specjax.blockdiff.anchors import draw_anchors
from specjax.data.chat_template import ChatTokenizer
from specjax.data.conversations import Conversation, JsonlRecords, Record, check_token_ids
from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, np.ndarray]
# Samples that are tokenised before training starts: a template that is refused, or data without any supervised token,
# must not wait for its turn in the shuffle.
CHECKED_SAMPLES = 256
# Whole batches built ahead, in threads: tokenisation releases the GIL, and a few batches hide a slow file.
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class Records(Protocol):
    """Random access to records, such as `JsonlRecords` or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


class Examples(Protocol):
    """Random access to (input_ids int [t], loss_mask bool [t]), such as `TokenizedExamples` or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class TokenizedExamples:
    """Records as (input_ids, loss_mask), tokenised when read. Picklable if `records` is.

    `chat` may be None if every record is pre-tokenised; `vocab_size` bounds the ids (the embedding's rows).
    Raises InputError, on access, naming where the record stands.
    """

    def __init__(self, records: Records, chat: ChatTokenizer | None, *, vocab_size: int | None = None) -> None:
        self.records = records
        self.chat = chat
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = self.records[index]
        if not isinstance(record, Conversation):
            input_ids, loss_mask = record.input_ids, record.loss_mask
        elif self.chat is None:
            raise InputError(f"{record.origin}: a conversation needs a tokenizer; give one, or input_ids and loss_mask")
        else:
            try:
                input_ids, loss_mask = self.chat(record)
            except InputError as error:
                raise InputError(f"{record.origin}: {error}") from error
        check_token_ids(input_ids, self.vocab_size, record.origin)
        return input_ids, loss_mask


def read_examples(
    patterns: Iterable[str | PathLike[str]],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stop_token_ids: Iterable[int] = (),
    vocab_size: int | None = None,
) -> TokenizedExamples:
    """The examples of JSONL files: `JsonlRecords` read through a `ChatTokenizer`; see both for arguments, errors."""
    chat = None
    if tokenizer is not None:
        chat = ChatTokenizer(tokenizer, chat_template_kwargs=chat_template_kwargs, stop_token_ids=stop_token_ids)
    return TokenizedExamples(JsonlRecords(patterns), chat, vocab_size=vocab_size)


class TrainingData:
    """Endless or `epochs` long stream of shuffled batches over `source`; see the module for what a batch holds.

    `batch_size` counts the rows of all processes. `num_anchors` None leaves anchors out (causal-LM training).
    Raises InputError for an empty source, a batch that the processes cannot share, a negative seed, and if none of the
    first 256 samples holds anything to train on; errors of those samples themselves also surface here.
    """

    def __init__(
        self,
        source: Examples,
        *,
        batch_size: int,
        max_length: int,
        num_anchors: int | None,
        seed: int,
        epochs: float | None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        rows = _rows(source, max_length=max_length, num_anchors=num_anchors, seed=seed)
        local_size = _local_size(batch_size, process_index, process_count)
        if epochs is not None and epochs <= 0:
            raise InputError(f"epochs is {epochs}; give a positive number, or none for an endless stream")
        _check_supervision(rows, min(len(source), CHECKED_SAMPLES))
        self.steps_per_epoch = math.ceil(len(source) / batch_size)
        # The stream has no seam between epochs, so the last step borrows its missing rows from the next epoch.
        self.num_steps = None if epochs is None else math.ceil(epochs * len(source) / batch_size)
        self._batches = rows.slice(slice(process_index, None, process_count)).batch(local_size)

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`."""
        return self._batches[step]

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, `start_step + 1`, ... up to `num_steps` (for ever if that is None), built ahead."""
        return iter(self._batches.slice(slice(start_step, self.num_steps)).to_iter_dataset(READ_OPTIONS))


def fixed_batches(
    source: Examples,
    count: int,
    *,
    batch_size: int,
    max_length: int,
    num_anchors: int | None,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """`count` samples of `source` (all if it has fewer), for evaluation: the same rows and anchors at every call.

    They are a shuffled choice with epoch 0. Rows that fill up the last batch are padding: no tokens, no supervision,
    sample_id -1. Raises InputError as `TrainingData` does.
    """
    rows = _rows(source, max_length=max_length, num_anchors=num_anchors, seed=seed)
    local_size = _local_size(batch_size, process_index, process_count)
    count = min(count, len(source))
    if count < 1:
        raise InputError(f"evaluation samples: {count}; give at least 1")
    _check_supervision(rows, min(count, CHECKED_SAMPLES))
    empty = _empty_row(max_length, num_anchors)
    batches = []
    for first in range(0, count, batch_size):
        positions = (first + process_index + process_count * j for j in range(local_size))
        local = [rows[i] if i < count else empty for i in positions]
        batches.append({name: np.stack([row[name] for row in local]) for name in empty})
    return batches


def _rows(source: Examples, *, max_length: int, num_anchors: int | None, seed: int) -> grain.MapDataset:
    """The endless stream of rows in global order: row i is a pure function of (seed, i)."""
    if not len(source):
        raise InputError("data set: no samples; give at least one")
    if seed < 0:
        raise InputError(f"seed is {seed}; give 0 or more")
    if max_length < 2:
        raise InputError(f"max_length is {max_length}; give at least 2 (a token is predicted from one before it)")
    # The shuffle keys on (seed, epoch) and so reorders each epoch of the repeated stream.
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    build = functools.partial(_build_row, source, max_length, num_anchors, seed)
    return order.map_with_index(build)


def _build_row(
    source: Examples, max_length: int, num_anchors: int | None, seed: int, position: int, sample_id: int
) -> Batch:
    """The row at `position` of the stream, which holds sample `sample_id`: truncated, padded, anchors drawn."""
    input_ids, loss_mask = source[sample_id]
    length = min(len(input_ids), max_length)
    row = _empty_row(max_length, num_anchors)
    row["input_ids"][:length] = input_ids[:length]
    row["loss_mask"][:length] = loss_mask[:length]
    row["document_ids"][:length] = 1
    epoch = position // len(source)
    row["sample_id"], row["epoch"] = np.asarray(sample_id, np.int32), np.asarray(epoch, np.int32)
    if num_anchors is not None:
        row["anchors"], row["anchor_valid"] = draw_anchors(
            row["loss_mask"], row["document_ids"], num_anchors, seed=seed, epoch=epoch, sample_ids=[sample_id]
        )
    return row


def _empty_row(max_length: int, num_anchors: int | None) -> Batch:
    row = {
        "input_ids": np.zeros(max_length, np.int32),
        "loss_mask": np.zeros(max_length, bool),
        "document_ids": np.zeros(max_length, np.int32),
        "sample_id": np.asarray(-1, np.int32),
        "epoch": np.asarray(0, np.int32),
    }
    if num_anchors is not None:
        row |= {"anchors": np.zeros(num_anchors, np.int32), "anchor_valid": np.zeros(num_anchors, bool)}
    return row


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index is {process_index} of {process_count} processes; count from 0")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size is {batch_size}; give a positive multiple of the {process_count} processes")
    return batch_size // process_count


def _check_supervision(rows: grain.MapDataset, count: int) -> None:
    """Raises InputError if none of the first `count` rows teaches anything; builds them all, so that bad ones show."""
    supervised = 0
    for i in range(count):
        row = rows[i]
        # The first token of a row has no prediction; a block needs an anchor.
        supervised += bool(row["anchor_valid"].any() if "anchor_valid" in row else row["loss_mask"][1:].any())
    if not supervised:
        raise InputError(
            f"data set: none of the first {count} samples has supervised tokens within max_length; check that there "
            "are assistant messages (or that loss_mask is set), the chat template, and max_length"
        )
