"""Generation from lists of token ids: validation, batching into static shapes, and the compiled decoder."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import PartitionSpec as P

from specjax.decoding.drafter import DFlashDrafter, Drafter
from specjax.decoding.loop import DecodeState, Limits, decode, prefill
from specjax.decoding.sampling import Sampling
from specjax.errors import InputError
from specjax.fetch import fetch
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft, target_mismatches
from specjax.models.precision import matmul_precision
from specjax.models.sharding import BATCH, SPECS, axis_size, mesh_scope, put

PROMPT_BUCKET = 64  # prompts are padded to a power of two times this
NEW_TOKENS_BUCKET = 64
STOPS_BUCKET = 4
MOST_TREE_NODES = 1024  # every node sees the others through a mask of nodes^2
LEAST_TEMPERATURE = 1e-5  # logits divided by less may overflow

Ids = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class Generation:
    """tokens: new tokens per prompt, a stop token included as the last. rounds: per prompt, matched drafts + 1 of each
    round before any cut (empty without a draft). prefill_seconds, decode_seconds: wall time of the two phases.
    """

    tokens: list[list[int]]
    rounds: list[list[int]]
    prefill_seconds: float
    decode_seconds: float


def generate(
    target: Decoder,
    prompts: Sequence[Ids] | npt.NDArray[np.integer],
    draft: DFlashDraft | Drafter | None = None,
    max_new_tokens: int | np.integer | Ids = 128,
    stop_token_ids: Ids | Sequence[Ids] = (),
    draft_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Ids = 0,
    tree_nodes: int | None = None,
) -> Generation:
    """Continues `prompts` (lists of token ids), speculatively if a draft is given; the output is the same.

    max_new_tokens, stop_token_ids: for all prompts, or one entry a prompt. draft_tokens: drafts verified a round, at
    most block size - 1 (the default). temperature: 0 is greedy; above, tokens are drawn from the target's softmax
    after temperature, top_k and top_p, in this order. seed: one entry a prompt, or that of the first, and the next
    prompt has the next. What is drawn depends on a prompt, its seed and these settings alone: neither the draft nor the
    rest of the batch changes it. tree_nodes: verify a tree of so many drafts a round, `draft_tokens` deep, in place of
    one chain. Prompts of one call run as one batch.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, prompts beyond the target's context, a bidirectional
            target, a draft of another target, or limits, tree size, seeds or sampling settings out of range.
    """
    check_sampling(temperature, top_k, top_p)
    drafter = DFlashDrafter(draft) if isinstance(draft, DFlashDraft) else draft
    width = _check_models(target, drafter, draft_tokens)
    _check_tree(target, width, tree_nodes)
    rows = [_integers(f"prompt {i}", prompt) for i, prompt in enumerate(prompts)]
    new_tokens, stops = _per_prompt(len(rows), max_new_tokens, stop_token_ids)
    seeds = _seeds(len(rows), seed)
    _check_limits(target, rows, new_tokens, stops)
    if not rows:
        return Generation([], [], 0.0, 0.0)
    with mesh_scope(), matmul_precision(target.dtype):
        batch = Batch.build(target, rows, new_tokens, stops, drafter.block_size if drafter else 1)
        if temperature > 0:
            batch = batch.sampled(temperature, top_k, top_p, seeds)
        started = time.perf_counter()
        state = jax.block_until_ready(batch.prefill(target, drafter))
        prefilled = time.perf_counter()
        drafts = {"draft_tokens": width, "tree_nodes": tree_nodes or 0}
        state = jax.block_until_ready(decode(target, drafter, state, batch.limits, batch.sampling, **drafts))
        finished = time.perf_counter()
    tokens, rounds = batch.outputs(state)
    return Generation(tokens, rounds if drafter else [[] for _ in rows], prefilled - started, finished - prefilled)


@dataclass(frozen=True)
class Batch:
    """Prompts padded to static shapes and placed on the mesh.

    Rows are padded with empty prompts to a multiple of the batch axes. capacity holds the prompt bucket, the bucket of
    new tokens and one block, because a round writes a whole block past the last committed token.
    """

    prompts: jax.Array
    prompt_length: jax.Array
    limits: Limits
    capacity: int
    max_rounds: int
    lengths: tuple[int, ...]
    sampling: Sampling | None = None

    @classmethod
    def build(
        cls,
        target: Decoder,
        prompts: Sequence[Sequence[int]],
        new_tokens: Sequence[int],
        stops: Sequence[Sequence[int]],
        block_size: int,
    ) -> Batch:
        rows = -(-len(prompts) // axis_size(*BATCH)) * axis_size(*BATCH)
        bucket = _bucket(max(map(len, prompts)), PROMPT_BUCKET)
        max_rounds = _bucket(max(new_tokens), NEW_TOKENS_BUCKET)
        ids = np.zeros((rows, bucket), np.int32)
        length, total = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        stop = np.full((rows, _bucket(max(1, *map(len, stops)), STOPS_BUCKET)), -1, np.int32)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
            length[i], total[i] = len(prompt), len(prompt) + new_tokens[i]
            stop[i, : len(stops[i])] = stops[i]
        limits = Limits(put(total, SPECS.act_b), put(stop, SPECS.act_bt))
        capacity = bucket + max_rounds + block_size
        lengths = tuple(map(len, prompts))
        return cls(put(ids, SPECS.act_bt), put(length, SPECS.act_b), limits, capacity, max_rounds, lengths)

    def sampled(self, temperature: float, top_k: int | None, top_p: float | None, seeds: Sequence[int]) -> Batch:
        """The same prompts, drawn and not chosen greedily."""
        padded = np.zeros(self.prompts.shape[0], np.uint32)
        padded[: len(seeds)] = seeds
        number = lambda value, dtype: None if value is None else put(np.asarray(value, dtype), P())  # noqa: E731
        # All of the softmax is no limit; its sum, rounded, would be one.
        settings = (number(top_k, np.int32), number(None if top_p == 1 else top_p, np.float32))
        sampling = Sampling(put(np.float32(temperature), P()), put(padded, SPECS.act_b), *settings)
        return replace(self, sampling=sampling)

    def prefill(self, target: Decoder, drafter: Drafter | None) -> DecodeState:
        return prefill(
            target,
            drafter,
            self.prompts,
            self.prompt_length,
            self.limits,
            self.sampling,
            capacity=self.capacity,
            max_rounds=self.max_rounds,
        )

    def outputs(self, state: DecodeState) -> tuple[list[list[int]], list[list[int]]]:
        """New tokens and rounds of every prompt: the call's one copy to the host."""
        tokens, length, rounds = fetch((state.tokens, state.length, state.rounds))
        new = [tokens[i, n : length[i] + 1].tolist() for i, n in enumerate(self.lengths)]
        return new, [row[row > 0].tolist() for row in rounds[: len(self.lengths)]]


def _bucket(size: int, smallest: int) -> int:
    """The least smallest * 2^k that holds `size`."""
    bucket = smallest
    while bucket < size:
        bucket *= 2
    return bucket


def _integers(name: str, values: object) -> list[int]:
    """A list, tuple or array of integers as Python's."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        array = np.empty((), object)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"{name} is {reprlib.repr(values)}; give a list of integers")
    ids: list[int] = array.tolist()
    return ids


def _per_prompt(
    count: int, max_new_tokens: int | np.integer | Ids, stop_token_ids: Ids | Sequence[Ids]
) -> tuple[list[int], list[list[int]]]:
    shared = np.ndim(max_new_tokens) == 0
    new_tokens = _integers("max_new_tokens", [max_new_tokens] * count if shared else max_new_tokens)
    if isinstance(stop_token_ids, str) or not isinstance(stop_token_ids, Sequence | np.ndarray):
        raise InputError(f"stop_token_ids is {stop_token_ids!r}; give a list of integers, or one such list a prompt")
    nested = len(stop_token_ids) > 0 and np.ndim(stop_token_ids[0]) > 0
    per_prompt = stop_token_ids if nested else [stop_token_ids] * count
    stops = [_integers("stop_token_ids", ids) for ids in per_prompt]
    for name, values in (("max_new_tokens", new_tokens), ("stop_token_ids", stops)):
        if len(values) != count:
            raise InputError(f"{name} has {len(values)} entries for {count} prompts; give one for all or one a prompt")
    return new_tokens, stops


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises InputError for a setting of `generate` that is out of range or would be ignored."""
    for name, value, kind in (("temperature", temperature, Real), ("top_k", top_k, Integral), ("top_p", top_p, Real)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            wanted = "an integer" if kind is Integral else "a number"
            raise InputError(f"{name} is {value!r}; give {wanted}")
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}; give 0 (greedy) or at least {LEAST_TEMPERATURE}")
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and temperature == 0:
            raise InputError(f"{name} is {value}, but temperature 0 is greedy; give a temperature, or leave {name} out")
    if top_k is not None and not 1 <= top_k < 2**31:
        raise InputError(f"top_k is {top_k}; give at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give a number above 0 and at most 1")


def _seeds(count: int, seed: int | Ids) -> list[int]:
    """One a prompt: prompt i of a call with one seed has that seed + i."""
    (first,) = _integers("seed", [seed]) if np.ndim(seed) == 0 else (None,)
    seeds = _integers("seed", seed) if first is None else [first + i for i in range(count)]
    if len(seeds) != count:
        raise InputError(f"seed has {len(seeds)} entries for {count} prompts; give one for all or one a prompt")
    for value in seeds:
        if not 0 <= value < 2**32:
            raise InputError(f"seed is {value}; give an integer from 0 to 2**32 - 1")
    return seeds


def _check_limits(
    target: Decoder, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], stops: Sequence[Sequence[int]]
) -> None:
    vocab_size, limit = target.config.vocab_size, target.config.max_position_embeddings
    for i, (prompt, new, stop) in enumerate(zip(prompts, new_tokens, stops, strict=True)):
        if not prompt:
            raise InputError(f"prompt {i} is empty; give at least one token")
        if new < 1:
            raise InputError(f"prompt {i}: max_new_tokens is {new}; give at least 1")
        for name, ids in (("token", prompt), ("stop token", stop)):
            bad = [t for t in ids if not 0 <= t < vocab_size]
            if bad:
                raise InputError(f"prompt {i}: {name} id {bad[0]} is outside the target's vocabulary of {vocab_size}")
        if len(prompt) + new > limit:
            raise InputError(
                f"prompt {i}: {len(prompt)} tokens and {new} new ones exceed the target's context of {limit}; "
                "shorten the prompt or lower max_new_tokens"
            )


def _check_models(target: Decoder, drafter: Drafter | None, draft_tokens: int | None) -> int:
    """Drafts to verify a round."""
    if not target.config.causal:
        raise InputError(
            "the target is bidirectional (causal=False) and cannot verify tokens; give an autoregressive one"
        )
    if drafter is None:
        if draft_tokens is not None:
            raise InputError(f"draft_tokens is {draft_tokens}, but there is no draft; give one or leave it out")
        return 0
    if isinstance(drafter, DFlashDrafter):
        problems = target_mismatches(drafter.model.config, target.config)
        if problems:
            wrong = "; ".join(problems)
            raise InputError(f"the draft does not fit the target: {wrong}; use the target it was trained for")
    most = drafter.block_size - 1
    width = most if draft_tokens is None else draft_tokens
    if not 1 <= width <= most:
        raise InputError(f"draft_tokens is {width}; this draft proposes 1 to {most}")
    return width


def _check_tree(target: Decoder, width: int, tree_nodes: int | None) -> None:
    if tree_nodes is None:
        return
    if not width:
        raise InputError(f"tree_nodes is {tree_nodes}, but there is no draft; give one or leave it out")
    most = min(MOST_TREE_NODES, target.config.vocab_size)
    if not isinstance(tree_nodes, Integral) or not width <= tree_nodes <= most:
        raise InputError(
            f"tree_nodes is {tree_nodes!r}; give {width} (the drafts of a round, which it holds) to {most}, "
            "or lower draft_tokens"
        )
