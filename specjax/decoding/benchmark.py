"""Acceptance and speed of a draft against autoregressive decoding of the same prompts."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specjax.blockdiff.metrics import repeated_ngrams
from specjax.decoding.auto_width import AutoWidth
from specjax.decoding.batch import Batch
from specjax.decoding.benchmark_settings import AR, AUTO, Settings, Way, check_settings
from specjax.decoding.differences import differences
from specjax.decoding.drafter import drafter_of
from specjax.decoding.drafting import Drafting
from specjax.decoding.generate import Generation, generate
from specjax.decoding.step_costs import ar_seconds, round_seconds
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.lora_draft import LoRADraft
from specjax.models.precision import matmul_precision
from specjax.models.sharding import mesh_scope

COSTS_EVERY = 4  # batches of a timed pass between two measurements of the steps' costs
TOTAL = "all"
Report = dict[str, Any]
Prompts = Sequence[Sequence[int]]
Seconds = dict[str, float]
Shape = tuple[int, int]
"""(rows, capacity) of a batch, which decide what its steps cost."""
Key = tuple[str, float, int, Way]
"""(data set, temperature, batch size, way)."""


@dataclass(frozen=True)
class Case:
    """Settings of one measurement: all that autoregressive decoding depends on, and the ways compared with it."""

    settings: Settings
    temperature: float
    batch_size: int
    ways: tuple[Way, ...]

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate` but for the seed."""
        limits = {"top_k": self.settings.top_k, "top_p": self.settings.top_p} if self.temperature else {}
        return {"temperature": self.temperature, "top_k": None, "top_p": None} | limits


@dataclass(frozen=True)
class Measurement:
    """One data set in one case: outputs of the untimed pass by way (`AR` without a draft), and timed passes.

    passes: of every run, for each way, seconds: `decode` and `total` of the calls, `verify` and `draft` what the
    networks' steps alone come to by their measured costs (0 where rounds have no one cost). differing: for each way,
    what `differences` says; nothing where others are drawn anyway.
    """

    generations: dict[Way, list[Generation]]
    passes: list[dict[Way, Seconds]]
    differing: dict[Way, list[Report]]


@dataclass(frozen=True)
class Counts:
    """Of a data set: prompts, and new tokens with and without the draft, of which the prefill yields every first."""

    prompts: int
    ar_tokens: int
    tokens: int

    @property
    def ar_decoded(self) -> int:
        return self.ar_tokens - self.prompts

    @property
    def decoded(self) -> int:
        return self.tokens - self.prompts


def benchmark_decoding(
    target: Decoder,
    draft: DFlashDraft | LoRADraft,
    data_sets: Mapping[str, Prompts],
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Report]:
    """Decodes the prompts of every data set with and without the draft; one report a data set, and one of "all".

    With several temperatures, batch sizes or ways of drafting there is one a combination, whose name says them.
    Autoregressive decoding is measured once a data set, temperature and batch size, in turn with all the ways that
    are compared with it: one untimed pass compiles and yields the outputs, then in each of `runs` timed passes every
    batch is decoded in all ways, and the costs of steps are measured. Times are of whole passes; a ratio is taken
    within one run, and reported as median, least and greatest. A width that is chosen while decoding is learned in the
    untimed pass, of which the acceptance is, and learned further in the timed ones. Speeds are tokens/s: a rule that
    draws other tokens than autoregressive decoding draws another number of them, too.

    Raises:
        InputError: as `check_settings` and `generate`.
    """
    check_settings(settings, draft.config, target.config.vocab_size)
    reports: dict[Key, Report] = {}
    for temperature, size in itertools.product(settings.temperatures, settings.batch_sizes):
        ways = settings.ways(draft.config.block_size, temperature)
        case = Case(settings, temperature, size, ways)
        measured = {}
        for name, prompts in data_sets.items():
            progress(f"{name}, temperature {temperature:g}, batch size {size}")
            measured[name] = _measure(target, draft, prompts, case)
        if len(measured) > 1:
            measured[TOTAL] = _pool(list(measured.values()))
        for name, measurement in measured.items():
            for way in ways:
                reports[name, temperature, size, way] = _report(draft, measurement, case, way, name)
    names = [*data_sets, TOTAL]
    ordered = sorted(reports, key=lambda key: names.index(key[0]))
    several_ways = len({way for *_, way in reports}) > 1
    return {_column(key, settings, several_ways): reports[key] for key in ordered}


def _column(key: Key, settings: Settings, several_ways: bool) -> str:
    """A combination's name: the data set's, and what differs between combinations."""
    name, temperature, size, way = key
    parts = [name]
    parts += [f"temperature {temperature:g}"] if len(settings.temperatures) > 1 else []
    parts += [f"batch {size}"] if len(settings.batch_sizes) > 1 else []
    parts += [way.label] if several_ways else []
    return ", ".join(parts)


def _measure(target: Decoder, draft: DFlashDraft | LoRADraft, prompts: Prompts, case: Case) -> Measurement:
    settings, size, ways = case.settings, case.batch_size, (AR, *case.ways)
    starts = range(0, len(prompts), size)
    autos = {way: AutoWidth(trees=way.tree_nodes == AUTO) for way in ways if way.draft_tokens == AUTO}

    def decode(first: int, way: Way) -> Generation:
        batch, seed = prompts[first : first + size], settings.seed + first
        limits = {"max_new_tokens": settings.max_new_tokens, "stop_token_ids": settings.stop_token_ids}
        drafting: dict[str, Any] = {}
        if way != AR:
            width = autos.get(way, way.draft_tokens)
            nodes = None if way in autos else way.tree_nodes or None
            drafting = {"draft": draft, "draft_tokens": width, "tree_nodes": nodes}
            drafting |= {"rule": way.rule, "draft_choice": way.draft_choice, "one_pass": way.one_pass}
        return generate(target, batch, **limits, **drafting, **case.sampling, seed=seed)  # type: ignore[arg-type]

    def costs(first: int) -> dict[Way, Seconds]:
        return _step_costs(target, draft, prompts[first : first + size], case, settings.seed + first)

    generations = {way: [decode(first, way) for first in starts] for way in ways}
    shapes = [_shape(target, prompts[first : first + size], case) for first in starts]
    for first in dict(zip(shapes, starts, strict=True)).values():
        costs(first)  # compiles
    batches = list(zip(starts, shapes, strict=True))
    passes = [_timed_pass(batches, ways, decode, costs, run) for run in range(settings.runs)]
    answers = {way: [tokens for g in generations[way] for tokens in g.tokens] for way in ways}
    drawn = case.sampling | {"seed": settings.seed} if case.temperature else None
    differing = {
        way: differences(target, prompts, answers[AR], answers[way], size, drawn) if way.same_draws else []
        for way in case.ways
    }
    return Measurement(generations, passes, differing)


def _timed_pass(
    batches: Sequence[tuple[int, Shape]],
    ways: Sequence[Way],
    decode: Callable[[int, Way], Generation],
    costs: Callable[[int], dict[Way, Seconds]],
    run: int,
) -> dict[Way, Seconds]:
    """Seconds of one pass over all batches, by way; each batch is decoded in all ways, in another order every run.

    batches: the first prompt's index and the shape of each. Costs of steps are measured beside the decoding that they
    are compared with, and for the same shape: a machine's speed drifts.
    """
    seconds = {way: dict.fromkeys(("decode", "total", "verify", "draft"), 0.0) for way in ways}
    turn = run % len(ways)
    measured: dict[Shape, dict[Way, Seconds]] = {}
    for i, (first, shape) in enumerate(batches):
        if i % COSTS_EVERY == 0 or shape not in measured:
            measured[shape] = costs(first)
        for way in (*ways[turn:], *ways[:turn]):
            started = time.perf_counter()
            generation = decode(first, way)
            seconds[way]["total"] += time.perf_counter() - started
            seconds[way]["decode"] += generation.decode_seconds
            for part, cost in measured[shape].get(way, {}).items():
                seconds[way][part] += cost * _passes_of_target(generation, way)
    return seconds


def _passes_of_target(generation: Generation, way: Way) -> int:
    """Steps or rounds of a batch's slowest row, without the prefill."""
    if way == AR:
        return max(len(tokens) - 1 for tokens in generation.tokens)
    return max(map(len, generation.rounds))


def _step_costs(
    target: Decoder, draft: DFlashDraft | LoRADraft, prompts: Prompts, case: Case, seed: int
) -> dict[Way, Seconds]:
    """Seconds of an autoregressive step (a verify pass without drafts) and of both parts of a round, by way.

    Rounds of a width that is chosen while decoding have no one cost.
    """
    drafter, seeds = drafter_of(draft), range(seed, seed + len(prompts))
    assert drafter is not None

    def batch(block_size: int) -> Batch:
        built = _batch(target, prompts, case, block_size)
        return built.with_sampling(**case.sampling, seeds=seeds) if case.temperature else built

    with mesh_scope(), matmul_precision(target.dtype):
        costs = {AR: {"verify": ar_seconds(target, batch(1), drafter.block_size), "draft": 0.0}}
        for way in case.ways:
            if way.draft_tokens != AUTO and way.tree_nodes != AUTO:
                drafting = Drafting(way.draft_tokens, way.tree_nodes, way.rule, way.draft_choice, way.one_pass)
                draft_s, verify_s = round_seconds(target, drafter, batch(drafter.block_size), drafting)
                costs[way] = {"verify": verify_s, "draft": draft_s}
    return costs


def _batch(target: Decoder, prompts: Prompts, case: Case, block_size: int) -> Batch:
    """The batch that `generate` makes of the prompts, greedy."""
    new, stops = [case.settings.max_new_tokens] * len(prompts), [case.settings.stop_token_ids] * len(prompts)
    return Batch.build(target, prompts, new, stops, block_size)


def _shape(target: Decoder, prompts: Prompts, case: Case) -> Shape:
    with mesh_scope():
        return len(prompts), _batch(target, prompts, case, 1).capacity


def _pool(measurements: Sequence[Measurement]) -> Measurement:
    """All data sets as one; its prompts are counted through."""
    ways = measurements[0].generations
    generations = {way: [g for m in measurements for g in m.generations[way]] for way in ways}
    passes = [
        {way: {part: sum(p[way][part] for p in run) for part in run[0][way]} for way in ways}
        for run in zip(*(m.passes for m in measurements), strict=True)
    ]
    sizes = [sum(len(g.tokens) for g in m.generations[AR]) for m in measurements]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    differing = {
        way: [
            entry | {"prompt": entry["prompt"] + offset}
            for m, offset in zip(measurements, offsets, strict=True)
            for entry in m.differing[way]
        ]
        for way in measurements[0].differing
    }
    return Measurement(generations, passes, differing)


def _report(draft: DFlashDraft | LoRADraft, measured: Measurement, case: Case, way: Way, name: str) -> Report:
    plain, drafted = measured.generations[AR], measured.generations[way]
    outputs = [tokens for generation in drafted for tokens in generation.tokens]
    counts = Counts(len(outputs), sum(len(tokens) for g in plain for tokens in g.tokens), sum(map(len, outputs)))
    report: Report = {
        "data_set": name,
        "prompts": counts.prompts,
        "tokens": counts.tokens,
        "ar_tokens": counts.ar_tokens,
        "temperature": case.temperature,
        "batch_size": case.batch_size,
        "block_size": draft.config.block_size,
        "draft_tokens": way.draft_tokens,
        "tree_nodes": way.tree_nodes,
        "rule": way.rule,
        "draft_choice": way.draft_choice,
        "one_pass": way.one_pass,
        "max_new_tokens": case.settings.max_new_tokens,
        "runs": case.settings.runs,
    }
    report |= acceptance(drafted)
    report["repeated_4gram_fraction"] = repeated_ngrams(outputs)
    differing = measured.differing[way]
    same = {"identical": not differing, "different_prompts": len(differing)}
    report |= same if way.same_draws else dict.fromkeys(same)
    report["differences"] = differing
    ar, speculative = ([p[each] for p in measured.passes] for each in (AR, way))
    report |= _speeds(ar, speculative, counts)
    steps = sum(_passes_of_target(generation, AR) for generation in plain)
    # Rounds of a chosen width have no one cost.
    rounds = 0 if way.draft_tokens == AUTO else sum(_passes_of_target(generation, way) for generation in drafted)
    return report | _cost_model(ar, speculative, steps, rounds, counts) | {"outputs": outputs}


def acceptance(generations: Sequence[Generation]) -> Report:
    """Acceptance length, rate and by position (share of rounds that matched at least k drafts, k = 1..).

    Of the rounds that had drafts; rounds_without_drafts is the share of the others. None, and no positions, where there
    was no round to take them from: every answer ended with the prefill's token, or no round had drafts.
    """
    rounds = np.array([r for g in generations for row in g.rounds for r in row], np.int64)
    drafts = np.array([n for g in generations for row in g.draft_tokens for n in row], np.int64)
    drafted = drafts > 0
    matched, verified = rounds[drafted] - 1, drafts[drafted]
    report: Report = {
        "rounds": rounds.size,
        "rounds_without_drafts": float(1 - drafted.mean()) if rounds.size else None,
        "acceptance_length": None,
        "acceptance_rate": None,
        "acceptance_by_position": [],
    }
    if matched.size:
        report["acceptance_length"] = float(1 + matched.mean())
        report["acceptance_rate"] = float(matched.sum() / verified.sum())
        report["acceptance_by_position"] = [float((matched >= k).mean()) for k in range(1, verified.max() + 1)]
    return report


def _speeds(ar: Sequence[Seconds], speculative: Sequence[Seconds], counts: Counts) -> Report:
    """Tokens/s and their ratio within a run; None of decoding alone where the prefill yielded every token."""
    report: Report = {}
    for part, infix, speedup, ar_tokens, tokens in (
        ("decode", "", "speedup_decode", counts.ar_decoded, counts.decoded),
        ("total", "_end_to_end", "speedup_end_to_end", counts.ar_tokens, counts.tokens),
    ):
        names = f"ar{infix}_tokens_per_s", f"speculative{infix}_tokens_per_s", speedup, f"{speedup}_range"
        report |= dict.fromkeys(names)
        if ar_tokens and tokens:
            ar_s, speculative_s = ([p[part] for p in passes] for passes in (ar, speculative))
            rates = ar_tokens / statistics.median(ar_s), tokens / statistics.median(speculative_s)
            ratios = [a / s * (tokens / ar_tokens) for a, s in zip(ar_s, speculative_s, strict=True)]
            spread = statistics.median(ratios), [min(ratios), max(ratios)]
            report |= dict(zip(names, (*rates, *spread), strict=True))
    return report


def _cost_model(
    ar: Sequence[Seconds], speculative: Sequence[Seconds], steps: int, rounds: int, counts: Counts
) -> Report:
    """Costs of steps, the speedup that they allow, and the share of it that was measured; None of no rounds.

    bound = steps * ar_step / (rounds * (draft + verify)), where steps and rounds are those of each batch's slowest
    row: for batch size 1 acceptance length * ar_step / (draft + verify), up to the cuts of the last rounds; times the
    ratio of the tokens that came of them. round_s is a whole round in the decoder's own loop.
    """
    if not rounds:
        names = ("ar_step_s", "draft_s", "verify_s", "round_s", "speedup_bound", "share_of_bound")
        return dict.fromkeys(names)
    gain = counts.decoded / counts.ar_decoded
    bounds = [a["verify"] / (s["draft"] + s["verify"]) * gain for a, s in zip(ar, speculative, strict=True)]
    shares = [a["decode"] / s["decode"] * gain / bound for a, s, bound in zip(ar, speculative, bounds, strict=True)]
    return {
        "ar_step_s": statistics.median(p["verify"] for p in ar) / steps,
        "draft_s": statistics.median(p["draft"] for p in speculative) / rounds,
        "verify_s": statistics.median(p["verify"] for p in speculative) / rounds,
        "round_s": statistics.median(p["decode"] for p in speculative) / rounds,
        "speedup_bound": statistics.median(bounds),
        "share_of_bound": statistics.median(shares),
    }
