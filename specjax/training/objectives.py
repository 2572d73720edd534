"""Losses of a micro-batch: the block-diffusion loss of a draft, and next-token loss of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from specjax.blockdiff.losses import BlockLoss, Teacher, block_loss
from specjax.blockdiff.masks import context_ranges, covered_tokens, document_starts, reveal, slot_mask
from specjax.blockdiff.noise import block_inputs
from specjax.blockdiff.terms import needs_teacher
from specjax.models.decoder import Decoder, DecoderOutput
from specjax.models.dflash import DFlashDraft
from specjax.training.step import Batch, LossSums

LM_CHUNK = 64  # tokens of a row whose logits exist at a time


@dataclass(frozen=True, eq=False)  # hashed as an object: a mapping has no hash
class BlockDiffusionLoss:
    """Settings of the draft's loss; see `blockdiff.losses.block_loss`."""

    objective: Mapping[str, float]
    weighting: str | None
    gamma: float | None
    alpha: float | None
    cumulative_mask: bool
    chunk_blocks: int
    query_chunk: int
    remat: bool

    def __call__(self, draft: DFlashDraft, target: Decoder, batch: Batch) -> tuple[jax.Array, LossSums]:
        """The objective on the data's tokens: (sum of weighted losses, sums). The batch's `states` spare the target."""
        noise_ids, labels = self.blocks(draft, batch)
        taps: jax.Array | None
        if "states" in batch:
            taps, final = jnp.split(
                batch["states"], [len(draft.config.target_layer_ids) * draft.config.hidden_size], -1
            )
        else:
            output = self.run_target(draft, target, batch)
            taps, final = output.taps, output.hidden
        teacher = Teacher(final, batch["anchors"]) if needs_teacher(self.objective) else None
        sums = self._sums(draft, target, batch, taps, noise_ids, labels, teacher)
        covered = covered_tokens(self.slots(draft, batch), batch["anchors"], batch["loss_mask"].shape[1])
        counts = {"covered": covered.sum(dtype=jnp.float32), "coverable": batch["loss_mask"].sum(dtype=jnp.float32)}
        return sums.loss_sum, LossSums(sums.weight_sum, statistics(sums) | counts)

    def against_target(self, draft: DFlashDraft, target: Decoder, batch: Batch) -> BlockLoss:
        """The same sums with the target's own greedy choice at every slot as the label (teacher forcing)."""
        noise_ids, _ = self.blocks(draft, batch)
        output = self.run_target(draft, target, batch)
        labels = greedy_labels(target, output.hidden, batch["anchors"], draft.config.block_size, self.chunk_blocks)
        teacher = Teacher(output.hidden, batch["anchors"])
        return self._sums(draft, target, batch, output.taps, noise_ids, labels, teacher)

    def blocks(self, draft: DFlashDraft, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Noise ids and labels, [b, N, B]."""
        config = draft.config
        shown, _ = self._shown_and_supervised(draft, batch)
        return block_inputs(batch["input_ids"], batch["anchors"], config.block_size, config.mask_token_id, shown)

    def slots(self, draft: DFlashDraft, batch: Batch) -> jax.Array:
        """The supervised slots, bool [b, N, B]."""
        return self._shown_and_supervised(draft, batch)[1]

    def _shown_and_supervised(self, draft: DFlashDraft, batch: Batch) -> tuple[jax.Array | None, jax.Array]:
        mask = slot_mask(
            batch["loss_mask"],
            batch["document_ids"],
            batch["anchors"],
            batch["anchor_valid"],
            draft.config.block_size,
            cumulative=self.cumulative_mask,
        )
        return reveal(mask, batch["revealed"]) if "revealed" in batch else (None, mask)

    def run_target(self, draft: DFlashDraft, target: Decoder, batch: Batch) -> DecoderOutput:
        return run_target(target, batch, draft.config.target_layer_ids, self.query_chunk)

    def _sums(
        self,
        draft: DFlashDraft,
        target: Decoder,
        batch: Batch,
        taps: jax.Array | None,
        noise_ids: jax.Array,
        labels: jax.Array,
        teacher: Teacher | None,
    ) -> BlockLoss:
        documents, anchors = batch["document_ids"], batch["anchors"]
        assert taps is not None
        positions = jnp.arange(documents.shape[1], dtype=jnp.int32) - document_starts(documents)
        context_kv = draft.context_kv(draft.context(jax.lax.stop_gradient(taps)), positions)
        start, stop = context_ranges(documents, anchors)
        noise = draft.embed_noise(target, noise_ids)
        hidden = draft(noise, context_kv, start, stop, remat=self.remat, query_chunk=self.query_chunk)
        return self.of_hidden(hidden, target, labels, self.slots(draft, batch), teacher)

    def of_hidden(
        self, hidden: jax.Array, target: Decoder, labels: jax.Array, slots: jax.Array, teacher: Teacher | None
    ) -> BlockLoss:
        """The loss's sums from the draft's final hidden states [b, N, B, d], by the target's head."""
        return block_loss(
            hidden,
            target.head_kernel(),
            labels,
            slots,
            objective=self.objective,
            teacher=teacher,
            weighting=self.weighting,
            gamma=self.gamma,
            alpha=self.alpha,
            chunk_blocks=self.chunk_blocks,
        )


def run_target(target: Decoder, batch: Batch, tap_ids: tuple[int, ...], query_chunk: int) -> DecoderOutput:
    """The target over packed rows, none of whose documents sees another."""
    starts = document_starts(batch["document_ids"])
    return target(batch["input_ids"], document_start_bt=starts, tap_ids=tap_ids, query_chunk=query_chunk)


def statistics(sums: BlockLoss) -> dict[str, jax.Array]:
    """The counts that accuracy and acceptance metrics are made of."""
    return {
        "correct": sums.correct_k,
        "supervised": sums.supervised_k,
        "prefix": sums.prefix_sum,
        "expected": sums.expected_sum,
        "blocks": sums.blocks,
    }


def greedy_labels(
    target: Decoder, hidden_btd: jax.Array, anchors_bN: jax.Array, block_size: int, chunk_blocks: int
) -> jax.Array:
    """The target's argmax [b, N, B] at every slot: slot k holds its choice after token p + k - 1 (slot 0: unused).

    Logits exist for `chunk_blocks` blocks a row at a time; ties go to the lowest id.
    """
    b, blocks = anchors_bN.shape
    last = hidden_btd.shape[1] - 1
    chunks = -(-blocks // chunk_blocks)
    padded = jnp.pad(anchors_bN, ((0, 0), (0, chunks * chunk_blocks - blocks)))
    slots = jnp.clip(padded[..., None] + jnp.arange(block_size) - 1, 0, last)
    rows = slots.reshape(b, -1).reshape(b, chunks, chunk_blocks * block_size).swapaxes(0, 1)

    def chosen(index: jax.Array) -> jax.Array:
        logits = target.logits(jax.vmap(lambda hidden, i: hidden[i])(hidden_btd, index))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    labels = jax.lax.map(chosen, rows).swapaxes(0, 1)
    return labels.reshape(b, -1).reshape(b, chunks * chunk_blocks, block_size)[:, :blocks]


@dataclass(frozen=True)
class CausalLMLoss:
    """Next-token cross-entropy over supervised tokens, in chunks of `LM_CHUNK` tokens."""

    query_chunk: int
    remat: bool

    def __call__(self, model: Decoder, frozen: Any, batch: Batch) -> tuple[jax.Array, LossSums]:
        tokens, documents = batch["input_ids"], batch["document_ids"]
        starts = document_starts(documents)
        output = model(tokens, document_start_bt=starts, query_chunk=self.query_chunk, remat=self.remat)
        first = jnp.arange(tokens.shape[1]) == starts
        supervised = batch["loss_mask"] & (documents > 0) & ~first
        previous = jnp.pad(output.hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
        # Chunks of a row are blocks whose slot 0, which the block loss leaves out, is padding.
        hidden, labels, mask = (_blocks(x) for x in (previous, tokens, supervised))
        head = model.head_kernel()
        sums = block_loss(hidden, head, labels, mask, weighting="uniform", chunk_blocks=1)
        correct = sums.correct_k.sum()
        return sums.loss_sum, LossSums(sums.weight_sum, {"correct": correct, "supervised": sums.supervised_k.sum()})


def _blocks(x: jax.Array) -> jax.Array:
    """[b, t, ...] -> [b, ceil(t / LM_CHUNK), 1 + LM_CHUNK, ...], padded with zeros at slot 0 and at the end."""
    b, t = x.shape[:2]
    blocks = -(-t // LM_CHUNK)
    tail = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, blocks * LM_CHUNK - t), *tail])
    return jnp.pad(x.reshape(b, blocks, LM_CHUNK, *x.shape[2:]), [(0, 0), (0, 0), (1, 0), *tail])
