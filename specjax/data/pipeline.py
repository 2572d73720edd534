"""Batches for training and evaluation, each a pure function of (seed, step).

The rows of epoch 0, 1, 2, ... follow each other in one endless stream, shuffled anew each epoch; batch `step` is its
positions [step * batch_size, (step + 1) * batch_size). Process p of P builds every P-th of them from p on. So a run
resumes at any step, and on any number of processes, by asking for that step; no iterator state is saved.

A row holds one sample, or several if packed: documents that never see each other, put together once, at the start.
A batch maps names to arrays, b = batch_size / process_count rows, S = max_length, N = num_anchors:
`input_ids` int32 [b, S], `loss_mask` bool [b, S], `document_ids` int32 [b, S] (1, 2, ... on the tokens of a row's
first, second, ... sample, 0 on padding) and, unless num_anchors is None, `anchors` int32 [b, N] and `anchor_valid`
bool [b, N]; with a `BlockNoise` also `shown` bool [b, N, B]; with a `TapCache` also `states` [b, S, m + d] in the
cache's dtype, 0 on padding.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import grain
import numpy as np

from specjax.blockdiff.anchors import NO_CONTEXT, PureContext, draw_anchors
from specjax.blockdiff.noise import BlockNoise, draw_shown
from specjax.data.chat_template import ChatTokenizer
from specjax.data.conversations import Conversation, Record, check_token_ids
from specjax.data.packing import RowPlan, one_sample_a_row, pack
from specjax.data.sources import MixedRecords, read_sources
from specjax.data.taps import TapCache
from specjax.data.turns import ALL_AS_WRITTEN, TurnRules
from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, np.ndarray]
# Rows that are built before training starts: a template that is refused, or data without any supervised token, must
# not wait for its turn in the shuffle.
CHECKED_ROWS = 256
# Whole batches built ahead, in threads: tokenisation releases the GIL, and a few batches hide a slow file.
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
TAPS_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)  # such batches can be gigabytes
# Passes over the data, more than any run makes. Grain's own endless stream overflows when it is cut into batches of 1.
ENDLESS_EPOCHS = 2**31
LENGTHS_PER_TASK = 256  # samples a thread reads at a time to find their lengths


class Records(Protocol):
    """Random access to records, such as `MixedRecords` or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


class Examples(Protocol):
    """Random access to (input_ids int [t], loss_mask bool [t]), such as `TokenizedExamples` or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class TokenizedExamples:
    """Records as (input_ids, loss_mask), tokenised when read. Picklable if `records` is.

    `chat` may be None if every record is pre-tokenised; `vocab_size` bounds the ids (the embedding's rows). `rules`
    are those of `chat`: a pre-tokenised record is refused unless it satisfies them as it is.
    Raises InputError, on access, naming where the record stands.
    """

    def __init__(
        self,
        records: Records,
        chat: ChatTokenizer | None,
        *,
        vocab_size: int | None = None,
        rules: TurnRules = ALL_AS_WRITTEN,
    ) -> None:
        self.records = records
        self.chat = chat
        self.vocab_size = vocab_size
        self.rules = rules

    def __len__(self) -> int:
        return len(self.records)

    @property
    def token_counts(self) -> np.ndarray | None:
        """Lengths int64 [examples] as far as they are known without reading the records, -1 elsewhere."""
        return self.records.token_counts if isinstance(self.records, MixedRecords) else None

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = self.records[index]
        if not isinstance(record, Conversation):
            if self.rules != ALL_AS_WRITTEN:
                raise InputError(
                    f"{record.origin}: data.supervise {self.rules.supervise} and data.reasoning "
                    f"{self.rules.reasoning} cannot be applied to input_ids; give conversations, or supervise all and "
                    "keep reasoning"
                )
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
    paths: Iterable[str | PathLike[str]],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stop_token_ids: Iterable[int] = (),
    vocab_size: int | None = None,
) -> TokenizedExamples:
    """The examples of sources, each read once; see `read_sources` and `tokenized` for arguments and errors."""
    return tokenized(
        read_sources([(path, 1.0) for path in paths])[0],
        tokenizer,
        chat_template_kwargs=chat_template_kwargs,
        stop_token_ids=stop_token_ids,
        vocab_size=vocab_size,
    )


def tokenized(
    records: MixedRecords,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stop_token_ids: Iterable[int] = (),
    vocab_size: int | None = None,
    rules: TurnRules = ALL_AS_WRITTEN,
) -> TokenizedExamples:
    """`records` read through a `ChatTokenizer`, made only if there is a conversation; see both for errors."""
    chat = None
    # Targets whose tokenizer cannot render a chat train on token ids alone.
    unknown = np.flatnonzero(records.token_counts < 0)
    if tokenizer is not None and any(isinstance(records[int(i)], Conversation) for i in unknown):
        chat = ChatTokenizer(
            tokenizer, chat_template_kwargs=chat_template_kwargs, stop_token_ids=stop_token_ids, rules=rules
        )
    return TokenizedExamples(records, chat, vocab_size=vocab_size, rules=rules)


class TrainingData:
    """Endless or `epochs` long stream of shuffled batches over `source`; see the module for what a batch holds.

    `batch_size` counts the rows of all processes. `num_anchors` None leaves anchors out (causal-LM training).
    `packing` puts several samples into a row, for which the length of every sample is found first: at once for JSONL
    lines that begin with `input_ids` and for a column of that name, by tokenising for conversations. `taps` adds the
    target's cached hidden states.
    Raises InputError for an empty source, a batch that the processes cannot share, a negative seed, and if none of the
    first 256 rows holds anything to train on; errors of the samples in them also surface here.
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
        packing: bool = False,
        taps: TapCache | None = None,
        noise: BlockNoise | None = None,
        context: PureContext = NO_CONTEXT,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        _check_arguments(source, max_length=max_length, seed=seed)
        local_size = _local_size(batch_size, process_index, process_count)
        if epochs is not None and epochs <= 0:
            raise InputError(f"epochs is {epochs}; give a positive number, or none for an endless stream")
        plan = pack(sample_lengths(source), max_length, seed=seed) if packing else one_sample_a_row(len(source))
        build = functools.partial(
            _rows, source, plan, max_length=max_length, num_anchors=num_anchors, seed=seed, context=context
        )
        _check_supervision(build(), min(len(plan), CHECKED_ROWS))
        rows = build(taps=taps, noise=noise)
        self.steps_per_epoch = math.ceil(len(plan) / batch_size)
        # The stream has no seam between epochs, so the last step borrows its missing rows from the next epoch.
        self.num_steps = None if epochs is None else math.ceil(epochs * len(plan) / batch_size)
        self._read_options = READ_OPTIONS if taps is None else TAPS_READ_OPTIONS
        self._batches = rows.slice(slice(process_index, None, process_count)).batch(local_size)

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`."""
        return self._batches[step]

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, `start_step + 1`, ... up to `num_steps` (for ever if that is None), built ahead."""
        return iter(self._batches.slice(slice(start_step, self.num_steps)).to_iter_dataset(self._read_options))


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

    They are a shuffled choice, one sample a row, with the anchors of epoch 0. Rows that fill up the last batch are
    padding: no tokens, no supervision. Raises InputError as `TrainingData` does.
    """
    _check_arguments(source, max_length=max_length, seed=seed)
    plan = one_sample_a_row(len(source))
    rows = _rows(source, plan, max_length=max_length, num_anchors=num_anchors, seed=seed)
    local_size = _local_size(batch_size, process_index, process_count)
    count = min(count, len(source))
    if count < 1:
        raise InputError(f"evaluation samples: {count}; give at least 1")
    _check_supervision(rows, min(count, CHECKED_ROWS))
    empty = _empty_row(max_length, num_anchors, None)
    batches = []
    for first in range(0, count, batch_size):
        positions = (first + process_index + process_count * j for j in range(local_size))
        local = [rows[i] if i < count else empty for i in positions]
        batches.append({name: np.stack([row[name] for row in local]) for name in empty})
    return batches


def fixed_prompts(source: Examples, count: int, *, longest: int, seed: int = 0) -> list[list[int]]:
    """The prompts, token ids before the first supervised one, of up to `count` of the samples of `fixed_batches`.

    Samples without a prompt, without an answer, or with a prompt of more than `longest` tokens are passed over.
    """
    prompts: list[list[int]] = []
    for index in grain.MapDataset.range(len(source)).seed(seed).shuffle():
        if len(prompts) == count:
            break
        input_ids, loss_mask = source[int(index)]
        length = int(np.argmax(loss_mask)) if loss_mask.any() else 0
        if 1 <= length <= longest:
            prompts.append(input_ids[:length].tolist())
    return prompts


def _check_arguments(source: Examples, *, max_length: int, seed: int) -> None:
    if not len(source):
        raise InputError("data set: no samples; give at least one")
    if seed < 0:
        raise InputError(f"seed is {seed}; give 0 or more")
    if max_length < 2:
        raise InputError(f"max_length is {max_length}; give at least 2 (a token is predicted from one before it)")


def sample_lengths(source: Examples) -> np.ndarray:
    """Tokens of every sample, int64 [samples]; those that no index knows are read, in threads."""
    known = source.token_counts if isinstance(source, TokenizedExamples) else None
    lengths = np.full(len(source), -1) if known is None else known.copy()
    unknown = np.flatnonzero(lengths < 0)

    def read(indices: np.ndarray) -> list[int]:
        return [len(source[int(i)][0]) for i in indices]

    tasks = np.split(unknown, range(LENGTHS_PER_TASK, len(unknown), LENGTHS_PER_TASK))
    with ThreadPoolExecutor() as pool:
        lengths[unknown] = [length for part in pool.map(read, tasks) for length in part]
    return lengths


def _rows(
    source: Examples,
    plan: RowPlan,
    *,
    max_length: int,
    num_anchors: int | None,
    seed: int,
    taps: TapCache | None = None,
    noise: BlockNoise | None = None,
    context: PureContext = NO_CONTEXT,
) -> grain.MapDataset:
    """The endless stream of rows in global order: row i is a pure function of (seed, i)."""
    # The shuffle keys on (seed, epoch) and so reorders each epoch of the repeated stream.
    order = grain.MapDataset.range(len(plan)).seed(seed).shuffle().repeat(ENDLESS_EPOCHS)
    build = functools.partial(_build_row, source, plan, max_length, num_anchors, seed, taps, noise, context)
    return order.map_with_index(build)


def _build_row(
    source: Examples,
    plan: RowPlan,
    max_length: int,
    num_anchors: int | None,
    seed: int,
    taps: TapCache | None,
    noise: BlockNoise | None,
    context: PureContext,
    position: int,
    row_id: int,
) -> Batch:
    """The row at `position` of the stream, the plan's `row_id`: samples truncated, padding, anchors drawn."""
    row = _empty_row(max_length, num_anchors, taps)
    sample_ids = plan[row_id].tolist()
    start = 0
    for document, sample_id in enumerate(sample_ids, start=1):
        input_ids, loss_mask = source[sample_id]
        length = min(len(input_ids), max_length)
        if length > max_length - start:
            raise InputError(
                f"sample {sample_id}: its {len(input_ids)} tokens no longer fit the row planned for them; "
                "leave the data set as it is while training runs"
            )
        stop = start + length
        row["input_ids"][start:stop] = input_ids[:length]
        row["loss_mask"][start:stop] = loss_mask[:length]
        row["document_ids"][start:stop] = document
        if taps is not None:
            row["states"][start:stop] = taps.read(sample_id, input_ids)
        start = stop
    if num_anchors is not None:
        drawn_for: Any = {"seed": seed, "epoch": position // len(plan), "sample_ids": sample_ids}
        anchors, row["anchor_valid"] = draw_anchors(
            row["loss_mask"], row["document_ids"], num_anchors, **drawn_for, context=context
        )
        row["anchors"] = anchors
        if noise is not None:
            row["shown"] = draw_shown(noise, anchors, row["document_ids"], **drawn_for)
    return row


def _empty_row(max_length: int, num_anchors: int | None, taps: TapCache | None) -> Batch:
    row = {
        "input_ids": np.zeros(max_length, np.int32),
        "loss_mask": np.zeros(max_length, bool),
        "document_ids": np.zeros(max_length, np.int32),
    }
    if taps is not None:
        row["states"] = np.zeros((max_length, taps.width), taps.dtype)
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
        # The first token of a document has no prediction; a block needs an anchor.
        predicted = row["loss_mask"][1:] & (row["document_ids"][1:] == row["document_ids"][:-1])
        supervised += bool(row.get("anchor_valid", predicted).any())
    if not supervised:
        raise InputError(
            f"data set: none of the first {count} rows has supervised tokens within max_length; check that there "
            "are assistant messages (or that loss_mask is set), the chat template, max_length, and that "
            "data.context_len and context_ratio leave some of them"
        )
