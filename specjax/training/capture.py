"""Runs the frozen target over the training data once and writes its taps for `data.taps`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from specjax.blockdiff.masks import document_starts
from specjax.config import RunConfig
from specjax.data.packing import RowPlan, pack
from specjax.data.pipeline import Examples, sample_lengths
from specjax.data.taps import TapRecipe, start_cache, write_shard
from specjax.errors import InputError
from specjax.fetch import fetch
from specjax.models.decoder import Decoder
from specjax.models.precision import matmul_precision
from specjax.models.sharding import SPECS, put
from specjax.training.run import check_batch_size, compute_dtype, examples_of, mesh_of, tap_recipe
from specjax.weights import load_target

SHARD_BYTES = 256 * 2**20  # of taps, about


def capture(config: RunConfig, out: str | Path) -> Path:
    """Writes the taps of every training example of `config` to the folder `out` and returns it.

    Examples are packed into rows of `data.max_length` tokens, `training.batch_size` rows a pass. What an earlier call
    wrote is kept.

    Raises:
        InputError: anything wrong with config, target or data; several processes; a cache of something else in `out`.
    """
    if config.kind != "dflash":
        raise InputError(f"kind is {config.kind}; only a draft (dflash) is trained on taps")
    if jax.process_count() > 1:
        raise InputError("capture runs in one process; run it on one host of the pod, with that host's devices")
    out = Path(out)
    with mesh_of(config), matmul_precision(compute_dtype(config)):
        check_batch_size(config)
        target = load_target(config.target.path, dtype=compute_dtype(config))
        examples = examples_of(config, config.data.train)
        recipe = tap_recipe(config, target, len(examples))
        lengths = np.minimum(sample_lengths(examples), config.data.max_length)
        plan = pack(lengths, config.data.max_length, seed=0)
        width = len(recipe.target_layer_ids) * target.config.hidden_size * jnp.dtype(target.dtype).itemsize
        rows_a_shard = max(1, SHARD_BYTES // (width * config.data.max_length))
        shards = [range(i, min(i + rows_a_shard, len(plan))) for i in range(0, len(plan), rows_a_shard)]
        missing = start_cache(out, recipe, len(shards))
        print(f"{out}: {lengths.sum():,} tokens of {width:,} bytes, {len(missing)} of {len(shards)} shards to write")
        for shard in track(missing, description="capturing taps"):
            ids: list[int] = []
            tokens: list[np.ndarray] = []
            taps: list[np.ndarray] = []
            for sample, input_ids, states in _captured(config, target, recipe, examples, plan, shards[shard]):
                ids.append(sample)
                tokens.append(input_ids)
                taps.append(states)
            write_shard(out, shard, ids, tokens, taps)
    return out


def _captured(
    config: RunConfig, target: Decoder, recipe: TapRecipe, examples: Examples, plan: RowPlan, rows: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(index, tokens [t], taps [t, m]) of every example of the plan's `rows`."""
    size, length = config.training.batch_size, recipe.max_length
    for start in range(0, len(rows), size):
        input_ids = np.zeros((size, length), np.int32)
        documents = np.zeros((size, length), np.int32)
        placed: list[tuple[int, int, slice]] = []
        for i, row in enumerate(rows[start : start + size]):
            begin = 0
            for document, sample in enumerate(plan[row].tolist(), start=1):
                tokens = examples[sample][0][:length]
                where = slice(begin, begin + len(tokens))
                input_ids[i, where], documents[i, where] = tokens, document
                placed.append((sample, i, where))
                begin = where.stop
        chunk, ids = config.training.attention_chunk, recipe.target_layer_ids
        taps = fetch(_taps(target, put(input_ids, SPECS.act_bt), put(documents, SPECS.act_bt), ids, chunk))
        for sample, i, where in placed:
            yield sample, input_ids[i, where], np.ascontiguousarray(taps[i, where])


def _run_target(
    target: Decoder, input_ids: jax.Array, documents: jax.Array, tap_ids: tuple[int, ...], query_chunk: int
) -> jax.Array:
    taps = target(
        input_ids, document_start_bt=document_starts(documents), tap_ids=tap_ids, query_chunk=query_chunk
    ).taps
    assert taps is not None
    return taps


_taps = jax.jit(_run_target, static_argnums=(3, 4))
