"""Acceptance and speed of a draft against autoregressive decoding of the same prompts."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.blockdiff.metrics import repeated_ngrams
from specjax.decoding.batch import Batch
from specjax.decoding.drafter import DFlashDrafter, Drafter
from specjax.decoding.generate import Generation, generate
from specjax.decoding.loop import DecodeState
from specjax.decoding.verify import propose
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.precision import matmul_precision
from specjax.models.sharding import SPECS, mesh_scope

STEP_REPEATS = 30
COSTS = ("ar_step_s", "draft_s", "verify_s")
Report = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """batch_size: prompts decoded together. runs: timed repetitions, each of them AR and speculative in turn."""

    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    batch_size: int = 1
    draft_tokens: int | None = None
    runs: int = 5


@dataclass(frozen=True)
class Measurement:
    """Both ways of decoding one data set: outputs of the untimed pass, and seconds of every timed one."""

    plain: list[Generation]
    drafted: list[Generation]
    passes: list[dict[str, float]]


def benchmark_decoding(
    target: Decoder,
    draft: DFlashDraft,
    data_sets: Mapping[str, Sequence[Sequence[int]]],
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Report]:
    """Decodes the prompts of every data set with and without the draft; one report a data set, and one of "all".

    One untimed pass compiles and checks that the outputs are equal; then `runs` timed passes alternate between the
    two. Times are of whole passes; a speedup is the ratio within one run, reported as median, least and greatest.
    """
    measured = {}
    for name, prompts in data_sets.items():
        progress(name)
        measured[name] = _measure(target, draft, prompts, settings)
    prompts = next(iter(data_sets.values()))[: settings.batch_size]
    costs = _step_costs(target, DFlashDrafter(draft), prompts, settings)
    if len(measured) > 1:
        measured["all"] = _pool(list(measured.values()))
    return {name: _report(draft, measurement, settings, costs) for name, measurement in measured.items()}


def _measure(target: Decoder, draft: DFlashDraft, prompts: Sequence[Sequence[int]], settings: Settings) -> Measurement:
    batches = [prompts[i : i + settings.batch_size] for i in range(0, len(prompts), settings.batch_size)]

    def decode(batch: Sequence[Sequence[int]], with_draft: bool) -> Generation:
        limits = settings.max_new_tokens, settings.stop_token_ids
        if with_draft:
            return generate(target, batch, draft, *limits, settings.draft_tokens)
        return generate(target, batch, None, *limits)

    plain = [decode(batch, False) for batch in batches]
    drafted = [decode(batch, True) for batch in batches]
    passes = [_timed_pass(batches, decode, speculative_first=bool(run % 2)) for run in range(settings.runs)]
    return Measurement(plain, drafted, passes)


def _pool(measurements: Sequence[Measurement]) -> Measurement:
    passes = [
        {name: sum(p[name] for p in run) for name in run[0]}
        for run in zip(*(m.passes for m in measurements), strict=True)
    ]
    return Measurement([g for m in measurements for g in m.plain], [g for m in measurements for g in m.drafted], passes)


def _report(draft: DFlashDraft, measured: Measurement, settings: Settings, costs: dict[str, float]) -> Report:
    outputs = [tokens for generation in measured.plain for tokens in generation.tokens]
    width = _width(draft, settings)
    report = acceptance(measured.drafted, width)
    report |= {
        "prompts": len(outputs),
        "tokens": sum(map(len, outputs)),
        "batch_size": settings.batch_size,
        "block_size": draft.config.block_size,
        "draft_tokens": width,
        "max_new_tokens": settings.max_new_tokens,
        "runs": settings.runs,
        "repeated_4gram_fraction": repeated_ngrams(outputs),
    }
    report |= _equality(measured.plain, measured.drafted)
    report |= _speeds(measured.passes, report["tokens"], len(outputs))
    report["outputs"] = outputs
    return report | costs | {"predicted_speedup_decode": _predicted(measured, costs)}


def acceptance(generations: Sequence[Generation], draft_tokens: int) -> Report:
    """Acceptance length, rate and by position (share of rounds that matched at least k drafts, k = 1..).

    None and no positions where there was no round: every answer ended with the prefill's token.
    """
    rounds = np.array([r for generation in generations for row in generation.rounds for r in row], np.int64)
    if not rounds.size:
        return {"rounds": 0, "acceptance_length": None, "acceptance_rate": None, "acceptance_by_position": []}
    matched = rounds - 1
    return {
        "rounds": int(rounds.size),
        "acceptance_length": float(rounds.mean()),
        "acceptance_rate": float(matched.sum() / (rounds.size * draft_tokens)),
        "acceptance_by_position": [float((matched >= k).mean()) for k in range(1, draft_tokens + 1)],
    }


def _timed_pass(
    batches: Sequence[Any], decode: Callable[[Any, bool], Generation], speculative_first: bool
) -> dict[str, float]:
    """Seconds of one pass over all batches; each batch is decoded both ways before the next one."""
    seconds = dict.fromkeys(("ar_decode", "ar_total", "speculative_decode", "speculative_total"), 0.0)
    for batch in batches:
        for with_draft in (speculative_first, not speculative_first):
            started = time.perf_counter()
            generation = decode(batch, with_draft)
            name = "speculative" if with_draft else "ar"
            seconds[f"{name}_total"] += time.perf_counter() - started
            seconds[f"{name}_decode"] += generation.decode_seconds
    return seconds


def _speeds(passes: Sequence[dict[str, float]], tokens: int, prompts: int) -> Report:
    """Decode-only tokens/s leave out the first token of every answer: it is the prefill's."""
    decoded_tokens = tokens - prompts
    decode = [p["ar_decode"] / p["speculative_decode"] for p in passes]
    total = [p["ar_total"] / p["speculative_total"] for p in passes]
    return {
        "ar_tokens_per_s": decoded_tokens / statistics.median(p["ar_decode"] for p in passes),
        "speculative_tokens_per_s": decoded_tokens / statistics.median(p["speculative_decode"] for p in passes),
        "ar_end_to_end_tokens_per_s": tokens / statistics.median(p["ar_total"] for p in passes),
        "speedup_decode": statistics.median(decode),
        "speedup_decode_range": [min(decode), max(decode)],
        "speedup_end_to_end": statistics.median(total),
        "speedup_end_to_end_range": [min(total), max(total)],
    }


def _equality(plain: Sequence[Generation], drafted: Sequence[Generation]) -> Report:
    """Whether every output is the same, and where the first one is not."""
    pairs = [
        (p, d)
        for first, second in zip(plain, drafted, strict=True)
        for p, d in zip(first.tokens, second.tokens, strict=True)
    ]
    different = [i for i, (p, d) in enumerate(pairs) if p != d]
    report: Report = {"identical": not different, "different_prompts": len(different)}
    if different:
        p, d = pairs[different[0]]
        shared = zip(p, d, strict=False)
        position = next((i for i, (a, b) in enumerate(shared) if a != b), min(len(p), len(d)))
        report["first_difference"] = {"prompt": different[0], "position": position}
    return report


def _step_costs(
    target: Decoder, drafter: DFlashDrafter, prompts: Sequence[Sequence[int]], settings: Settings
) -> dict[str, float]:
    """Seconds of an AR step, of a draft (with the context's keys and values) and of a verify pass."""
    width = _width(drafter.model, settings)
    with mesh_scope(), matmul_precision(target.dtype):
        new = [settings.max_new_tokens] * len(prompts)
        batch = Batch.build(target, prompts, new, [list(settings.stop_token_ids)] * len(prompts), drafter.block_size)
        return {
            "ar_step_s": _step_seconds(_verify_step(1), target, drafter, batch),
            "draft_s": _step_seconds(_draft_step(width), target, drafter, batch),
            "verify_s": _step_seconds(_verify_step(width + 1), target, drafter, batch),
        }


def _predicted(measured: Measurement, costs: dict[str, float]) -> float | None:
    """The speedup that the steps' costs allow: AR steps * ar_step / (rounds * (draft + verify)).

    Steps and rounds are those of the slowest row of each batch; for batch 1 this is acceptance length *
    ar_step / (draft + verify), up to the cuts of the last rounds. None where there was no round.
    """
    steps = sum(max(len(tokens) - 1 for tokens in generation.tokens) for generation in measured.plain)
    rounds = sum(max(map(len, generation.rounds)) for generation in measured.drafted)
    round_seconds = rounds * (costs["draft_s"] + costs["verify_s"])
    return steps * costs["ar_step_s"] / round_seconds if rounds else None


Step = Callable[[Decoder, Drafter, DecodeState], DecodeState]


def _verify_step(tokens: int) -> Step:
    """The target's pass over `tokens` tokens of every row, with its choices fed back so that nothing is skipped."""

    def step(target: Decoder, drafter: Drafter, state: DecodeState) -> DecodeState:
        block = state.tokens[:, :tokens]
        positions = state.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        output = target(block, positions, cache=state.cache)
        choices = jnp.argmax(target.logits(output.hidden), axis=-1).astype(jnp.int32)
        assert output.cache is not None
        return dataclasses.replace(state, tokens=_replace(state.tokens, choices), cache=output.cache)

    return step


def _draft_step(draft_tokens: int) -> Step:
    """A draft and the context's keys and values of a block's worth of taps."""

    def step(target: Decoder, drafter: Drafter, state: DecodeState) -> DecodeState:
        logits = drafter.draft_logits(state.drafter, target, state.tokens[:, 0], state.length, draft_tokens)
        drafts = propose(logits, state.length, None, rule="match", draft_choice="argmax")
        rows, width = state.tokens.shape[0], len(drafter.tap_ids) * target.config.hidden_size
        positions = state.length[:, None] + jnp.arange(draft_tokens + 1, dtype=jnp.int32)
        taps = jnp.zeros((rows, draft_tokens + 1, width), target.dtype, out_sharding=SPECS.act_btd)
        taps = taps + drafts[:, :1, None].astype(target.dtype)
        context = drafter.observe(state.drafter, taps, positions, positions)
        return dataclasses.replace(state, tokens=_replace(state.tokens, drafts), drafter=context)

    return step


def _replace(tokens_bt: jax.Array, first: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, new: row.at[: new.shape[0]].set(new))(tokens_bt, first)


def _step_seconds(step: Step, target: Decoder, drafter: Drafter, batch: Batch) -> float:
    """Median seconds of one `step`, `STEP_REPEATS` of them in one compiled loop."""

    def repeat(target: Decoder, drafter: Drafter, state: DecodeState) -> DecodeState:
        return jax.lax.fori_loop(0, STEP_REPEATS, lambda _, s: step(target, drafter, s), state)

    compiled = jax.jit(repeat, donate_argnums=2)
    seconds = []
    for _ in range(6):
        state = jax.block_until_ready(batch.prefill(target, drafter))
        started = time.perf_counter()
        jax.block_until_ready(compiled(target, drafter, state))
        seconds.append((time.perf_counter() - started) / STEP_REPEATS)
    return statistics.median(seconds[1:])


def _width(draft: DFlashDraft, settings: Settings) -> int:
    return settings.draft_tokens or draft.config.block_size - 1


def table(reports: Mapping[str, Report]) -> Iterator[tuple[str, ...]]:
    """Reports as rows for people: the measure, then its value for every data set."""
    for name, show in _ROWS:
        yield name, *(show(report) for report in reports.values())


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def _with_range(report: Report, name: str) -> str:
    low, high = report[f"{name}_range"]
    return f"{report[name]:.2f}x ({low:.2f} to {high:.2f})"


_ROWS: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("prompts / new tokens", lambda r: f"{r['prompts']} / {r['tokens']}"),
    ("batch size / block size / drafts", lambda r: f"{r['batch_size']} / {r['block_size']} / {r['draft_tokens']}"),
    ("acceptance length (tokens a round)", lambda r: _number(r["acceptance_length"], ".2f")),
    ("acceptance rate", lambda r: _number(r["acceptance_rate"], ".3f")),
    ("acceptance by position", lambda r: " ".join(f"{x:.2f}" for x in r["acceptance_by_position"])),
    ("repeated 4-grams", lambda r: f"{r['repeated_4gram_fraction']:.3f}"),
    ("AR tokens/s, decode only", lambda r: f"{r['ar_tokens_per_s']:.0f}"),
    ("speculative tokens/s, decode only", lambda r: f"{r['speculative_tokens_per_s']:.0f}"),
    ("AR tokens/s, end to end", lambda r: f"{r['ar_end_to_end_tokens_per_s']:.0f}"),
    ("speedup, decode only", lambda r: _with_range(r, "speedup_decode")),
    ("speedup, end to end", lambda r: _with_range(r, "speedup_end_to_end")),
    ("AR step / draft / verify, ms", lambda r: " / ".join(f"{1e3 * r[k]:.2f}" for k in COSTS)),
    ("speedup these allow", lambda r: _number(r["predicted_speedup_decode"], ".2f", "x")),
    ("outputs identical", lambda r: "yes" if r["identical"] else f"NO ({r['different_prompts']} prompts differ)"),
)
