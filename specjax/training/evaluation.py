"""In-training evaluation on fixed held-out rows, anchors and prompts."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from specjax.blockdiff.metrics import repeated_ngrams
from specjax.fetch import fetch
from specjax.models.decoder import Decoder
from specjax.models.lora_draft import LoRADraft
from specjax.models.sharding import SPECS
from specjax.rounds import segments, texts
from specjax.training.loop import HostBatch, to_device
from specjax.training.metrics import Evaluation, Metrics, add, readable
from specjax.training.objectives import BlockDiffusionLoss, CausalLMLoss, Draft, statistics
from specjax.training.step import Batch

Sums = dict[str, jax.Array]


class Generation(Protocol):
    """What `decoding.generate` returns."""

    @property
    def tokens(self) -> list[list[int]]: ...
    @property
    def rounds(self) -> list[list[int]]: ...
    @property
    def decode_seconds(self) -> float: ...


class Generate(Protocol):
    """`decoding.generate`, which this package does not import."""

    def __call__(
        self,
        target: Decoder,
        prompts: Sequence[Sequence[int]],
        draft: Draft,
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
    ) -> Generation: ...


@dataclass
class Answers:
    """Answers held-out prompts with a draft, all in one batch, and measures how it went.

    to_text: token ids to text, for the sample.
    """

    generate: Generate
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop_token_ids: Sequence[int]
    to_text: Callable[[Sequence[int]], str]
    compiled: bool = False

    def __call__(self, target: Decoder, draft: Draft) -> Evaluation:
        """The score is the acceptance length; 0 where no prompt had a round. The first call's time is compilation."""
        found = self.generate(target, self.prompts, draft, self.max_new_tokens, self.stop_token_ids)
        rounds = [n for row in found.rounds for n in row]
        metrics = {"repeated_4grams": repeated_ngrams(found.tokens)}
        if rounds:
            metrics["acceptance_length"] = float(np.mean(rounds))
        if self.compiled:
            tokens = sum(map(len, found.tokens)) - len(found.tokens)  # the first of each is the prefill's
            metrics["decode_tokens_per_s"] = tokens / found.decode_seconds
        self.compiled = True
        sample = self._sample(self.prompts[0], found.tokens[0], found.rounds[0])
        return Evaluation(metrics, metrics.get("acceptance_length", 0.0), sample)

    def _sample(self, prompt: Sequence[int], tokens: Sequence[int], rounds: Sequence[int]) -> str:
        parts = segments(tokens, rounds)
        shown = [f"```\n{self.to_text(prompt)}\n```\n\n"]
        for part, text in zip(parts, texts(self.to_text, [part.tokens for part in parts]), strict=True):
            escaped = html.escape(text).replace("\n", "<br>")
            shown.append(f"<b>{escaped}</b>" if part.source == "draft" else escaped)
        return "".join(shown)


def draft_evaluator(
    loss: BlockDiffusionLoss, target: Decoder, batches: Sequence[HostBatch], answers: Answers | None = None
) -> Callable[[Draft], Evaluation]:
    """Measures a draft: loss and acc@k against the data, acceptance length against the target, answers with it.

    Of a draft that was trained with masked anchors, too, the teacher-forced measure is taken with these as well: what
    decoding in one pass a round begins with. The score is the acceptance length of the answers; without them the
    teacher-forced one: how many of the target's own greedy choices a block matches, plus one.
    """

    def sums(draft: Draft, target: Decoder, batch: Batch) -> tuple[Sums, ...]:
        loss_sum, data = loss(draft, target, batch)
        greedy = [loss.against_target(draft, target, batch)]
        if isinstance(draft, LoRADraft) and 0 < draft.config.masked_anchor < 1:
            nothing = jnp.zeros((*batch["anchors"].shape, draft.config.block_size), bool)
            greedy.append(loss.against_target(draft, target, batch | {"shown": jax.reshard(nothing, SPECS.act_bNB)}))
        against = ({"loss_sum": g.loss_sum, "weight": g.weight_sum, **statistics(g)} for g in greedy)
        return {"loss_sum": loss_sum, "weight": data.weight, **data.statistics}, *against

    jitted = jax.jit(sums)

    def evaluate(draft: Draft) -> Evaluation:
        data, greedy, *masked = _total(lambda batch: jitted(draft, target, batch), batches)
        against = readable(greedy)
        names = ("acceptance_length_tf", "acceptance_length_sampled_tf")
        metrics = readable(data) | {name: against[name] for name in names}
        if masked:
            metrics["acceptance_length_masked_anchor_tf"] = readable(masked[0])["acceptance_length_tf"]
        if answers is None:
            return Evaluation(metrics, metrics["acceptance_length_tf"])
        answered = answers(target, draft)
        return answered._replace(metrics=metrics | answered.metrics)

    return evaluate


def causal_lm_evaluator(loss: CausalLMLoss, batches: Sequence[HostBatch]) -> Callable[[Decoder], Evaluation]:
    """Measures a decoder's loss; the score is minus the loss."""

    def sums(model: Decoder, batch: Batch) -> tuple[Sums]:
        loss_sum, data = loss(model, None, batch)
        return ({"loss_sum": loss_sum, "weight": data.weight, **data.statistics},)

    jitted = jax.jit(sums)

    def evaluate(model: Decoder) -> Evaluation:
        (total,) = _total(lambda batch: jitted(model, batch), batches)
        metrics: Metrics = readable(total)
        return Evaluation(metrics, -metrics["loss"])

    return evaluate


def _total(run: Callable[[Batch], Any], batches: Sequence[HostBatch]) -> list[dict[str, np.ndarray]]:
    totals: list[dict[str, np.ndarray]] = []
    for host_batch in batches:
        batch = {name: x[0] for name, x in to_device(host_batch, 1).items()}
        parts = fetch(run(batch))
        totals = [add(total, part) for total, part in zip(totals or [{}] * len(parts), parts, strict=True)]
    return totals
