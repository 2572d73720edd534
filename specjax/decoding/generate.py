"""Generation from lists of token ids: a call's batch, decoded a few rounds of the compiled loop at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import PartitionSpec as P

from specjax.decoding.auto_width import AutoWidth, Choice, Measured
from specjax.decoding.batch import Batch
from specjax.decoding.drafter import Drafter, drafter_of, one_pass_drafter
from specjax.decoding.drafting import PLAIN, Drafting
from specjax.decoding.flat import Flat
from specjax.decoding.inputs import (
    Ids,
    check_draft_tokens,
    check_limits,
    check_logit_mask,
    check_meshes,
    check_models,
    check_one_pass,
    check_rule,
    check_sampling,
    check_seeds,
    check_tree,
    integers,
    per_prompt,
)
from specjax.decoding.loop import TAPS_BUFFER, DecodeState, Limits, decode
from specjax.decoding.text import StopStrings
from specjax.errors import InputError
from specjax.fetch import fetch
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.lora_draft import LoRADraft
from specjax.models.precision import matmul_precision
from specjax.models.sharding import SPECS, mesh_scope, put

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED_ROUNDS = 4
STRING_ROUNDS = 16  # between two looks for stop strings
NEVER = 2**30  # tokens, or rounds


@dataclass(frozen=True)
class Generation:
    """What was generated; one entry a prompt, or with several samples of each one a sample, a prompt's together.

    tokens: new tokens, a stop token included as the last. rounds: matched drafts + 1 of each round before any cut
    (empty without a draft). draft_tokens, tree_nodes, one_pass: of each of these rounds the drafts of the chain, or the
    depth and the drafts of the tree (0 nodes: a chain), and whether they came from the pass that verified the round
    before; rounds with 0 draft_tokens were decoded without.
    prefill_seconds, decode_seconds: wall time of the two phases.
    """

    tokens: list[list[int]]
    rounds: list[list[int]]
    prefill_seconds: float
    decode_seconds: float
    draft_tokens: list[list[int]] = field(default_factory=list)
    tree_nodes: list[list[int]] = field(default_factory=list)
    one_pass: list[list[bool]] = field(default_factory=list)


def generate(
    target: Decoder,
    prompts: Sequence[Ids] | npt.NDArray[np.integer],
    draft: DFlashDraft | LoRADraft | Drafter | None = None,
    max_new_tokens: int | np.integer | Ids = 128,
    stop_token_ids: Ids | Sequence[Ids] = (),
    draft_tokens: int | AutoWidth | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Ids = 0,
    *,
    rule: str = "match",
    draft_choice: str = "argmax",
    tree_nodes: int | None = None,
    one_pass: bool = False,
    samples: int = 1,
    logit_mask: npt.ArrayLike | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Generation:
    """Continues `prompts` (lists of token ids), speculatively if a draft is given; the output is the same.

    max_new_tokens, stop_token_ids: for all prompts, or one entry a prompt. stop_strings: an answer ends with the token
    that completes one of them in the text of `tokenizer`. draft_tokens: drafts verified a round, at most block size - 1
    (the default), or an `AutoWidth`, which chooses. tree_nodes: verify a tree of so many drafts a round, `draft_tokens`
    deep, by `match`. one_pass: draft in the target's own pass, with a LoRA draft trained with masked anchors; an
    `AutoWidth` chooses that by itself. logit_mask: booleans [vocab_size] or [prompts, vocab_size], true where a token
    may come.

    temperature: 0 is greedy; above, tokens are drawn from the target's softmax after mask, temperature, top_k and
    top_p, in this order. seed: one entry a prompt, or that of the first, and the next prompt has the next. What is
    drawn depends on a prompt, its seed and these settings alone: neither the draft nor the rest of the batch changes
    it. rule: `match`, or `rejection` or `block`, which draw from the same law, but other tokens with every draft and
    `draft_tokens` (see `verify`). draft_choice: drafts are the draft's likeliest tokens (`argmax`) or drawn (`sample`).
    samples: answers a prompt, which share its prefill. Prompts of one call run as one batch.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, prompts beyond the target's context, a bidirectional
            target, a draft of another target, models on another mesh, or limits, seeds or sampling settings out of
            range; a target whose hidden states are not finite.
    """
    stream = Stream(
        target,
        prompts,
        draft,
        max_new_tokens,
        stop_token_ids,
        draft_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        rule=rule,
        draft_choice=draft_choice,
        tree_nodes=tree_nodes,
        one_pass=one_pass,
        samples=samples,
        logit_mask=logit_mask,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    return stream.result()


class Stream:
    """A call of `generate` (same arguments and errors) whose tokens come as they are committed.

    Iterating gives, after the prefill and after every `rounds_a_step` rounds of the compiled loop, the new tokens of
    every row: lists that are empty for rows that are done. `result` decodes what is left, and returns everything.
    """

    def __init__(
        self,
        target: Decoder,
        prompts: Sequence[Ids] | npt.NDArray[np.integer],
        draft: DFlashDraft | LoRADraft | Drafter | None = None,
        max_new_tokens: int | np.integer | Ids = 128,
        stop_token_ids: Ids | Sequence[Ids] = (),
        draft_tokens: int | AutoWidth | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Ids = 0,
        *,
        rule: str = "match",
        draft_choice: str = "argmax",
        tree_nodes: int | None = None,
        one_pass: bool = False,
        samples: int = 1,
        logit_mask: npt.ArrayLike | None = None,
        stop_strings: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        rounds_a_step: int = 1,
    ) -> None:
        check_sampling(temperature, top_k, top_p, rule, draft_choice, samples)
        self._drafter = drafter_of(draft)
        check_models(target, self._drafter)
        width = check_draft_tokens(self._drafter, draft_tokens)
        check_tree(target.config.vocab_size, width, tree_nodes, rule, draft_choice)
        check_rule(width, rule, draft_choice)
        check_one_pass(self._drafter, width, tree_nodes, one_pass)
        rows = [integers(f"prompt {i}", prompt) for i, prompt in enumerate(prompts)]
        new_tokens, stops = per_prompt(len(rows), max_new_tokens, stop_token_ids)
        seeds = check_seeds(len(rows), samples, seed)
        check_limits(target, rows, new_tokens, stops)
        mask = check_logit_mask(len(rows), target.config.vocab_size, logit_mask)
        self._strings = StopStrings.build(stop_strings, tokenizer)
        if rounds_a_step < 1:
            raise InputError(f"rounds_a_step is {rounds_a_step}; give at least 1")
        self._target = target
        self._flat = Flat.of(target), Flat.of(self._drafter)
        check_meshes(*self._flat)
        self._rounds_a_step = rounds_a_step
        self._auto = width if isinstance(width, AutoWidth) else None
        self._drafting = PLAIN
        if not isinstance(width, AutoWidth):
            self._drafting = Drafting(width, tree_nodes or 0, rule, draft_choice, one_pass)
        self._progress: _Progress | None = None
        self._round = 0
        self._drafted: list[Drafting] = []  # of every round of the loop
        self._prefill_seconds = self._decode_seconds = 0.0
        self._shown = [0] * (len(rows) * samples)  # tokens that iterating has given
        with mesh_scope(), matmul_precision(target.dtype):
            self._mesh = jax.sharding.get_mesh()
            if not rows:
                self._progress = _Progress.nothing()
                return
            block_size = self._drafter.block_size if self._drafter else 1
            batch = Batch.build(target, rows, new_tokens, stops, block_size, samples)
            self._batch = batch.with_sampling(temperature, top_k, top_p, seeds, mask)
            self._ends: list[int | None] = [None] * len(batch.lengths)  # by stop strings
            self._searched = [0] * len(batch.lengths)  # tokens without one
            self._choice = None if self._auto is None else self._start(self._auto, block_size, draft_choice)
            started = time.perf_counter()
            self._state = jax.block_until_ready(self._batch.prefill(*self._flat))
            self._prefill_seconds = time.perf_counter() - started

    def __iter__(self) -> Iterator[list[list[int]]]:
        if self._progress is None:
            self._look()
        while True:
            rows, shown = self._rows(), self._shown
            self._shown = [len(row) for row in rows]
            yield [row[n:] for row, n in zip(rows, shown, strict=True)]
            if self._finished():
                return
            self._step(self._rounds_a_step)

    def result(self) -> Generation:
        """Decodes to the end."""
        while not self._finished():
            self._step(STRING_ROUNDS if self._strings else NEVER)
        assert self._progress is not None
        tokens = self._rows()
        rounds: list[list[int]] = []
        drafted: list[list[Drafting]] = []
        for row, count in zip(self._progress.rounds, map(len, tokens), strict=True):
            had = np.flatnonzero(row)
            before = np.cumsum(row[had]) - row[had] + 1  # tokens before each round: a stop string may end it earlier
            had = had[before < count]
            rounds.append(row[had].tolist() if self._drafter else [])
            drafted.append([self._drafted[i] for i in had] if self._drafter else [])
        draft_tokens = [[each.draft_tokens for each in row] for row in drafted]
        tree_nodes = [[each.tree_nodes for each in row] for row in drafted]
        one_pass = [[each.one_pass for each in row] for row in drafted]
        seconds = self._prefill_seconds, self._decode_seconds
        return Generation(tokens, rounds, *seconds, draft_tokens, tree_nodes, one_pass)

    def _finished(self) -> bool:
        if self._progress is None:
            return False
        return bool(self._progress.done.all())

    def _rows(self) -> list[list[int]]:
        """New tokens so far."""
        assert self._progress is not None
        if not len(self._progress.tokens):
            return []
        progress, lengths = self._progress, self._batch.lengths
        rows = [progress.tokens[i, n : progress.length[i] + 1].tolist() for i, n in enumerate(lengths)]
        return [row[:end] for row, end in zip(rows, self._ends, strict=True)]

    def _step(self, rounds: int) -> None:
        """At most so many rounds; fewer where the width is to be chosen again."""
        started, drafting = time.perf_counter(), self._drafting
        with jax.set_mesh(self._mesh), matmul_precision(self._target.dtype):
            if self._choice is not None:
                drafting, rounds = self._choice.next(rounds)
            self._state = self._run(self._state, self._batch, drafting, self._round + rounds)
            first = self._round
            self._look()
        self._drafted += [drafting] * (self._round - first)
        if self._auto is not None and self._progress is not None:
            self._auto.saw(drafting, self._progress.rounds[:, first : self._round])
        self._decode_seconds += time.perf_counter() - started

    def _run(self, state: DecodeState, batch: Batch, drafting: Drafting, until: int) -> DecodeState:
        limit = put(np.int32(min(until, NEVER)), P())
        arguments = *self._flat, state, batch.limits, batch.sampling, limit
        return jax.block_until_ready(decode(*arguments, drafting=drafting))

    def _look(self) -> None:
        """Copies what there is to the host, and ends rows that have a stop string."""
        state, count = self._state, len(self._batch.lengths)
        found = _Progress(*fetch((state.tokens, state.length, state.done, state.rounds, state.finite, state.round)))
        self._round = int(found.round)
        self._progress = found.of(count)
        if not self._progress.finite.all():
            row = int(np.flatnonzero(~self._progress.finite)[0]) // self._batch.samples
            raise InputError(
                f"prompt {row}: the target's hidden states are not finite (NaN or infinity); check its weights, and "
                f"whether {self._target.dtype} can hold its activations"
            )
        if self._strings is not None:
            self._end_at_strings(self._strings)
        if self._finished():
            del self._state  # the caches

    def _end_at_strings(self, strings: StopStrings) -> None:
        assert self._progress is not None
        ended = np.zeros(self._batch.rows, bool)
        for i, row in enumerate(self._rows()):
            if self._ends[i] is None:
                self._ends[i] = strings.end(row, self._searched[i])
                self._searched[i] = len(row)
                ended[i] = self._ends[i] is not None
        if ended.any():
            with jax.set_mesh(self._mesh):
                self._state = replace(self._state, done=self._state.done | put(ended, SPECS.act_b))
            self._progress = replace(self._progress, done=self._progress.done | ended[: len(self._progress.done)])

    def _start(self, auto: AutoWidth, block_size: int, draft_choice: str) -> Choice:
        """The choices of this call, whose times are measured first unless an equal call was."""
        one_pass = one_pass_drafter(self._drafter) is not None
        options = auto.options(block_size, self._target.config.vocab_size, draft_choice, one_pass)
        structures = [flat.structure for flat in self._flat] + [jax.tree.structure(self._batch.sampling)]
        setting = self._batch.rows, self._batch.capacity, self._mesh, *structures  # but for the drafts
        return auto.start(auto.times(options, setting, self._measure))

    def _measure(self, drafting: Drafting) -> Measured:
        """The first rounds after the prompts, on rows that do not end."""
        limits = self._batch.limits
        endless = Limits(jnp.full_like(limits.total, NEVER), jnp.full_like(limits.stops, -1))
        batch, count = replace(self._batch, limits=endless), MEASURED_ROUNDS if drafting.draft_tokens else TAPS_BUFFER
        state = self._run(batch.prefill(*self._flat), batch, drafting, 0)  # compiles, runs nothing
        started = time.perf_counter()
        state = self._run(state, batch, drafting, count)
        return Measured((time.perf_counter() - started) / count, fetch(state.rounds)[:, :count])


@dataclass(frozen=True)
class _Progress:
    """The part of a `DecodeState` that the host looks at."""

    tokens: npt.NDArray[np.int32]
    length: npt.NDArray[np.int32]
    done: npt.NDArray[np.bool_]
    rounds: npt.NDArray[np.int32]
    finite: npt.NDArray[np.bool_]
    round: npt.NDArray[np.int32]

    @classmethod
    def nothing(cls) -> _Progress:
        none = np.zeros(0, np.int32)
        return cls(none[:, None], none, none == 1, none[:, None], none == 0, np.int32(0))  # type: ignore[arg-type]

    def of(self, count: int) -> _Progress:
        """Of the first rows: the others are padding."""
        rows = {name: getattr(self, name)[:count] for name in ("tokens", "length", "done", "rounds", "finite")}
        return replace(self, **rows)
