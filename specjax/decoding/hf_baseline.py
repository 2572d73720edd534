"""Greedy decoding by Hugging Face transformers on the same weights and prompts: what our own baseline has to beat."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specjax.errors import InputError

Report = dict[str, Any]


def measure_transformers(
    folder: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_token_ids: Sequence[int], runs: int
) -> Report:
    """Tokens/s, end to end, of `transformers` `generate` in float32, one prompt at a time, at the better of one thread
    and all cores; and its outputs.

    Raises:
        InputError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError("--compare-hf needs PyTorch; install the test extra: pip install 'specjax[test]'") from error
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "repetition_penalty": 1.0,  # some folders' generation_config.json has another, and greedy is not greedy then
        "eos_token_id": list(stop_token_ids) or None,
        "pad_token_id": 0,
    }

    def decode_all() -> list[list[int]]:
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            with torch.inference_mode():
                generated = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            outputs.append(generated[0, len(prompt) :].tolist())
        return outputs

    rates: dict[int, float] = {}
    outputs: list[list[int]] = []
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for threads in sorted({1, min(2, cores), cores}):
        torch.set_num_threads(threads)
        outputs = decode_all()
        seconds = []
        for _ in range(runs):
            started = time.perf_counter()
            decode_all()
            seconds.append(time.perf_counter() - started)
        rates[threads] = sum(map(len, outputs)) / statistics.median(seconds)
    torch.set_num_threads(before)
    best = max(rates, key=lambda threads: rates[threads])
    return {"tokens_per_s": rates[best], "threads": best, "by_threads": rates, "outputs": outputs}
