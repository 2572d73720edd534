"""Runs the frozen target over the training data once and writes its hidden states for `data.taps`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from specjax.config import RunConfig
from specjax.data.packing import RowPlan, pack
from specjax.data.pipeline import Examples
from specjax.data.taps import start_cache, write_shard
from specjax.errors import InputError
from specjax.fetch import fetch
from specjax.models.decoder import Decoder
from specjax.models.precision import matmul_precision
from specjax.models.sharding import SPECS, put
from specjax.training.data import examples_of, open_data
from specjax.training.objectives import run_target
from specjax.training.run import check_batch_size, mesh_of, tap_recipe
from specjax.training.step import Batch
from specjax.training.tasks import compute_dtype
from specjax.weights import load_target, read_target_config

SHARD_BYTES = 256 * 2**20  # of states, about


def capture(
    config: RunConfig,
    out: str | Path,
    say: Callable[[str], None] = lambda text: None,
    *,
    num_processes: int = 1,
    process_id: int = 0,
) -> Path:
    """Writes the taps and final hidden state of every training example of `config` to the folder `out` and returns it.

    An example that an epoch repeats is captured once.
    Examples are packed into rows of `data.max_length` tokens, as many rows a pass as a micro-batch has. What an earlier
    call wrote is kept.

    num_processes, process_id: this call writes every num_processes-th shard, from the process_id-th on. The processes
    know nothing of each other, and each has the target on its own devices.

    Raises:
        InputError: anything wrong with config, target or data; a cache of something else in `out`.
    """
    if config.kind != "dflash":
        raise InputError(f"kind is {config.kind}; only a draft (dflash) is trained on taps")
    if jax.process_count() > 1:
        raise InputError("capture shares its work among processes of their own; give --num-processes and --process-id")
    out = Path(out)
    with mesh_of(config), matmul_precision(compute_dtype(config)):
        check_batch_size(config)
        examples = examples_of(config, open_data(config).train.distinct()[0])
        recipe = tap_recipe(config, len(examples))
        lengths, digest = _read_through(examples, recipe.max_length)
        plan = pack(lengths, recipe.max_length, seed=0)
        width = (len(recipe.target_layer_ids) + 1) * read_target_config(config.target.path).hidden_size
        token_bytes = width * jnp.dtype(recipe.dtype).itemsize
        rows = config.training.batch_size // config.training.accumulation_steps
        # Of the bytes alone: a capture may be continued with another batch size.
        shard_rows = max(1, SHARD_BYTES // (recipe.max_length * token_bytes))
        shards = [range(i, min(i + shard_rows, len(plan))) for i in range(0, len(plan), shard_rows)]
        missing = [s for s in start_cache(out, recipe, digest, len(shards)) if s % num_processes == process_id]
        say(f"{out}: {lengths.sum():,} tokens of {token_bytes:,} bytes; {len(missing)} shards to write here")
        if missing:
            target = load_target(config.target.path, dtype=compute_dtype(config))
            run = partial(_states, target, tap_ids=recipe.target_layer_ids, query_chunk=config.training.attention_chunk)
            for shard in track(missing, description="capturing taps"):
                write_shard(out, shard, *_captured(run, examples, plan, shards[shard], rows, recipe.max_length))
    return out


def _read_through(examples: Examples, max_length: int) -> tuple[np.ndarray, str]:
    """Length int64 [examples] of every example, cut to `max_length`, and a digest of their tokens."""
    lengths, digest = np.zeros(len(examples), np.int64), hashlib.sha256()
    for i in range(len(examples)):
        tokens = examples[i][0][:max_length].astype(np.int32)
        lengths[i] = len(tokens)
        digest.update(lengths[i].tobytes() + tokens.tobytes())
    return lengths, digest.hexdigest()


def _captured(
    run: Callable[[Batch], jax.Array], examples: Examples, plan: RowPlan, rows: Sequence[int], size: int, length: int
) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Indices, tokens [t] and states [t, m + d] of the examples in the `rows` of the plan, `size` rows a pass."""
    ids: list[int] = []
    tokens: list[np.ndarray] = []
    states: list[np.ndarray] = []
    for start in range(0, len(rows), size):
        batch = {name: np.zeros((size, length), np.int32) for name in ("input_ids", "document_ids")}
        placed: list[tuple[int, slice]] = []
        for i, row in enumerate(rows[start : start + size]):
            begin = 0
            for document, sample in enumerate(plan[row].tolist(), start=1):
                sample_tokens = examples[sample][0][:length]
                where = slice(begin, begin + len(sample_tokens))
                batch["input_ids"][i, where], batch["document_ids"][i, where] = sample_tokens, document
                placed.append((i, where))
                ids.append(sample)
                begin = where.stop
        passed = fetch(run({name: put(x, SPECS.act_bt) for name, x in batch.items()}))
        tokens += [batch["input_ids"][place] for place in placed]
        states += [passed[place] for place in placed]
    return ids, tokens, states


@partial(jax.jit, static_argnames=("tap_ids", "query_chunk"))
def _states(target: Decoder, batch: Batch, *, tap_ids: tuple[int, ...], query_chunk: int) -> jax.Array:
    output = run_target(target, batch, tap_ids, query_chunk)
    assert output.taps is not None
    return jnp.concatenate([output.taps, output.hidden], axis=-1)
