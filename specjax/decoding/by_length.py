"""Answers to many prompts: batches of prompts of similar length, all with the same number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specjax.decoding.drafter import Drafter
from specjax.decoding.generate import generate
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.lora_draft import LoRADraft

PADDING_PROMPT = [0]  # fills up the last batch; it ends with the first token


def generate_by_length(
    target: Decoder,
    prompts: Sequence[Sequence[int]],
    draft: DFlashDraft | LoRADraft | Drafter | None = None,
    *,
    batch_size: int,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    draft_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (index of a prompt, its new tokens) as `generate` gives them, batch by batch, shortest prompts first.

    A batch waits for its longest prompt and answer, and every number of rows is a compilation of its own: so prompts
    are sorted by length, and the last batch is filled up to `batch_size`. seeds: one a prompt, of what it draws at a
    temperature above 0; neither order nor batch changes that.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        missing = batch_size - len(indices)
        generation = generate(
            target,
            [prompts[i] for i in indices] + [PADDING_PROMPT] * missing,
            draft,
            max_new_tokens=[max_new_tokens] * len(indices) + [1] * missing,
            stop_token_ids=stop_token_ids,
            draft_tokens=draft_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=0 if seeds is None else [*(seeds[i] for i in indices), *[0] * missing],
        )
        yield from zip(indices, generation.tokens[: len(indices)], strict=True)
