"""Our decoder against PyTorch on the same weights, prompts and cores: autoregressive and speculative."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from specjax.decoding.generate import generate
from specjax.errors import InputError
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.lora_draft import LoRADraftConfig
from specjax.pytorch import thread_counts, with_threads

Report = dict[str, Any]
Prompts = Sequence[Sequence[int]]
WAYS = {"ar": "transformers generate", "speculative": "PyTorch, host-driven DFlash loop"}
TRIED_PROMPTS = 2  # on every number of threads, to find the best one


@dataclass(frozen=True)
class Task:
    """How both sides decode, greedily. draft_tokens: drafts verified a round. runs: timed passes over the prompts."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    draft_tokens: int
    runs: int


Answer = tuple[list[int], list[int]]
"""(new tokens, matched drafts + 1 of every round) of one prompt."""
Decode = Callable[[Sequence[int]], Answer]


def check_comparable(draft: DFlashConfig | LoRADraftConfig, dtype: str) -> None:
    """Raises InputError, naming everything that PyTorch's loop does not have."""
    if isinstance(draft, LoRADraftConfig):
        raise InputError("--compare hf: PyTorch's loop runs DFlash drafts, and the draft is a LoRA draft; leave it out")
    backend = jax.default_backend()
    wrong = [
        f"{name} is {value}; {remedy}"
        for name, value, plain, remedy in (
            ("the draft's rope scaling", draft.rope.rope_type, "default", "give a draft without"),
            ("the draft's sliding_window", draft.sliding_window, None, "give a draft with full attention"),
            ("the draft's own mask embedding", draft.own_mask_embedding, False, "give a draft with the target's"),
            ("--dtype", dtype, "float32", "give float32"),
            ("JAX's backend", backend, "cpu", "set JAX_PLATFORMS=cpu"),
        )
        if value != plain
    ]
    if wrong:
        raise InputError(f"--compare hf: PyTorch's loop runs plain drafts in float32 on CPU: {'; '.join(wrong)}")


def compare_with_torch(
    folder: Path, target: Decoder, draft: DFlashDraft, data_sets: Mapping[str, Prompts], task: Task
) -> dict[str, Report]:
    """End-to-end tokens/s of both sides on every data set, at PyTorch's better number of threads; and their answers.

    folder: the target's, which transformers loads in float32. A run times each of the four ways of decoding on all
    prompts in turn. For each of `WAYS`: `tokens_per_s`, `ours_tokens_per_s` (medians), `ratio`, the median of ours /
    theirs within a run, `ratio_range`, `threads`, `by_threads`, `equal_outputs` and `equal_rounds` (prompts).
    """
    longest = max(len(prompt) for prompts in data_sets.values() for prompt in prompts)
    ours, theirs = _our_ways(target, draft, task), _torch_ways(folder, draft, task, longest)
    return {name: _compare(ours, theirs, prompts, task.runs) for name, prompts in data_sets.items()}


def _compare(ours: dict[str, Decode], theirs: dict[str, Decode], prompts: Prompts, runs: int) -> Report:
    report: Report = {}
    for way in WAYS:
        tried = _pass(theirs[way], prompts[:TRIED_PROMPTS])
        tried()
        rates = {threads: _rate(with_threads(threads, tried)) for threads in thread_counts()}
        report[way] = {"threads": max(rates, key=lambda n: rates[n]), "by_threads": rates}
    sides = {("ours", way): _pass(ours[way], prompts) for way in WAYS}
    sides |= {("theirs", way): with_threads(report[way]["threads"], _pass(theirs[way], prompts)) for way in WAYS}
    answers = {side: run() for side, run in sides.items()}  # compiles
    seconds: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - started)
    for way in WAYS:
        mine, other = answers["ours", way], answers["theirs", way]
        report[way] |= _figures(mine, other, seconds["ours", way], seconds["theirs", way])
    return report


def _figures(ours: list[Answer], theirs: list[Answer], our_s: list[float], their_s: list[float]) -> Report:
    ratios = [b * _tokens(ours) / (a * _tokens(theirs)) for a, b in zip(our_s, their_s, strict=True)]
    return {
        "tokens_per_s": _tokens(theirs) / statistics.median(their_s),
        "ours_tokens_per_s": _tokens(ours) / statistics.median(our_s),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "equal_outputs": sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)),
        "equal_rounds": sum(a[1] == b[1] for a, b in zip(ours, theirs, strict=True)),
    }


def _our_ways(target: Decoder, draft: DFlashDraft, task: Task) -> dict[str, Decode]:
    def decode(prompt: Sequence[int], draft: DFlashDraft | None, draft_tokens: int | None) -> Answer:
        limits = task.max_new_tokens, task.stop_token_ids
        generation = generate(target, [prompt], draft, *limits, draft_tokens)
        return generation.tokens[0], generation.rounds[0]

    return {
        "ar": lambda prompt: decode(prompt, None, None),
        "speculative": lambda prompt: decode(prompt, draft, task.draft_tokens),
    }


def _torch_ways(folder: Path, draft: DFlashDraft, task: Task, longest_prompt: int) -> dict[str, Decode]:
    import torch
    from transformers import AutoModelForCausalLM

    from specjax.decoding.torch_baseline import CachedDraft, speculate, transformers_generate
    from specjax.weights.torch_draft import draft_weights

    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    capacity = longest_prompt + task.max_new_tokens + draft.config.block_size
    cached = CachedDraft(draft.config, capacity).eval()
    cached.load_state_dict(draft_weights(draft))
    limits = task.max_new_tokens, task.stop_token_ids
    return {
        "ar": lambda prompt: (transformers_generate(target, prompt, *limits), []),
        "speculative": lambda prompt: speculate(target, cached, prompt, *limits, task.draft_tokens),
    }


def _pass(decode: Decode, prompts: Prompts) -> Callable[[], list[Answer]]:
    return lambda: [decode(prompt) for prompt in prompts]


def _rate(run: Callable[[], list[Answer]]) -> float:
    started = time.perf_counter()
    answers = run()
    return _tokens(answers) / (time.perf_counter() - started)


def _tokens(answers: list[Answer]) -> int:
    return sum(len(tokens) for tokens, _ in answers)
