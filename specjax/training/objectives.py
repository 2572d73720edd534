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
from specjax.models.lora_draft import LoRADraft
from specjax.training.step import Batch, LossSums

LM_CHUNK = 64  # tokens of a row whose logits exist at a time

Draft = DFlashDraft | LoRADraft


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

    def __call__(self, draft: Draft, target: Decoder, batch: Batch) -> tuple[jax.Array, LossSums]:
        """The objective on the data's tokens: (sum of weighted losses, sums).

        The batch's `states` spare a DFlash draft the target's pass; a `dropout_key` drops out what adapters see.
        """
        noise_ids, labels, supervised = self.blocks(draft, batch)
        output = _captured(draft, batch["states"]) if "states" in batch else self.run_target(draft, target, batch)
        teacher = Teacher(output.hidden, batch["anchors"]) if needs_teacher(self.objective) else None
        hidden = self.block_hidden(draft, target, batch, output, noise_ids)
        sums = self.of_hidden(hidden, target, labels, supervised, teacher)
        covered = covered_tokens(supervised, batch["anchors"], batch["loss_mask"].shape[1])
        counts = {"covered": covered.sum(dtype=jnp.float32), "coverable": batch["loss_mask"].sum(dtype=jnp.float32)}
        return sums.loss_sum, LossSums(sums.weight_sum, statistics(sums) | counts)

    def against_target(self, draft: Draft, target: Decoder, batch: Batch) -> BlockLoss:
        """The same sums with the target's own greedy choice at every slot as the label (teacher forcing)."""
        noise_ids, _, supervised = self.blocks(draft, batch)
        output = self.run_target(draft, target, batch)
        labels = greedy_labels(target, output.hidden, batch["anchors"], draft.config.block_size, self.chunk_blocks)
        hidden = self.block_hidden(draft, target, batch, output, noise_ids)
        return self.of_hidden(hidden, target, labels, supervised, Teacher(output.hidden, batch["anchors"]))

    def blocks(self, draft: Draft, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Noise ids, labels and supervised slots, each [b, N, B]."""
        config = draft.config
        supervised = slot_mask(
            batch["loss_mask"],
            batch["document_ids"],
            batch["anchors"],
            batch["anchor_valid"],
            config.block_size,
            cumulative=self.cumulative_mask,
        )
        shown = batch.get("shown")
        if shown is None and isinstance(draft, LoRADraft) and draft.config.masked_anchor == 1:
            shown = jnp.zeros_like(supervised)  # it was never shown one
        if shown is not None:
            shown, supervised = reveal(supervised, shown)
        ids = block_inputs(batch["input_ids"], batch["anchors"], config.block_size, config.mask_token_id, shown)
        return *ids, supervised

    def run_target(self, draft: Draft, target: Decoder, batch: Batch) -> DecoderOutput:
        """What the draft's context is made of, and what its teacher says."""
        if isinstance(draft, DFlashDraft):
            return run_target(target, batch, draft.config.target_layer_ids, self.query_chunk)
        return run_target(target, batch, (), self.query_chunk, keep_keys=True)

    def block_hidden(
        self, draft: Draft, target: Decoder, batch: Batch, output: DecoderOutput, noise_ids: jax.Array
    ) -> jax.Array:
        """The draft's final hidden states [b, N, B, d]; `output` is of `run_target`."""
        documents = batch["document_ids"]
        ranges = context_ranges(documents, batch["anchors"])
        noise = draft.embed_noise(target, noise_ids)
        how: Any = {"remat": self.remat, "query_chunk": self.query_chunk}
        if isinstance(draft, DFlashDraft):
            assert output.taps is not None
            positions = jnp.arange(documents.shape[1], dtype=jnp.int32) - document_starts(documents)
            context_kv = draft.context_kv(draft.context(jax.lax.stop_gradient(output.taps)), positions)
            return draft(noise, context_kv, *ranges, **how)
        key = batch.get("dropout_key")
        of_context, of_blocks = (None, None) if key is None else jax.random.split(key)
        if draft.config.adapt_context:
            output = target(
                batch["input_ids"],
                document_start_bt=document_starts(documents),
                adapters=draft.adapters,
                dropout_key=of_context,
                keep_keys=True,
                **how,
            )
        assert output.cache is not None
        context_kv = tuple(zip(output.cache.keys, output.cache.values, strict=True))
        return draft(target, noise, context_kv, *ranges, dropout_key=of_blocks, **how)

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


def run_target(
    target: Decoder, batch: Batch, tap_ids: tuple[int, ...], query_chunk: int, *, keep_keys: bool = False
) -> DecoderOutput:
    """The target over packed rows, none of whose documents sees another."""
    starts = document_starts(batch["document_ids"])
    return target(
        batch["input_ids"], document_start_bt=starts, tap_ids=tap_ids, keep_keys=keep_keys, query_chunk=query_chunk
    )


def _captured(draft: Draft, states: jax.Array) -> DecoderOutput:
    """The target's output from `states` [b, t, m + d]."""
    assert isinstance(draft, DFlashDraft)
    taps, final = jnp.split(states, [len(draft.config.target_layer_ids) * draft.config.hidden_size], -1)
    return DecoderOutput(final, taps, None)


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
