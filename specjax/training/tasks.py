"""What a run trains: a draft beside its frozen target, or a decoder, with loss, evaluation and run files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.blockdiff.terms import needs_teacher
from specjax.config import RunConfig
from specjax.config_sections import DraftConfig
from specjax.errors import InputError
from specjax.models.decoder import Decoder, DecoderConfig, check_mesh_fits
from specjax.models.dflash import DFlashConfig, DFlashDraft, default_target_layer_ids
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig
from specjax.models.sharding import BATCH, axis_size
from specjax.training import flops
from specjax.training.evaluation import Answers, causal_lm_evaluator, draft_evaluator
from specjax.training.metrics import Evaluation
from specjax.training.objectives import BlockDiffusionLoss, CausalLMLoss
from specjax.training.step import LossFunction
from specjax.training.warm_start import check_adapters_continue, grown_config, initial_config, warm_started
from specjax.weights import (
    adapter_config_from_peft,
    decoder_config_to_hf,
    draft_config_to_hf,
    load_target,
    lora_draft_config_to_json,
    model_folder,
    read_target_config,
    target_digest,
    target_fingerprint,
)
from specjax.weights.config_fields import read_json
from specjax.weights.fingerprint import FINGERPRINT_FILE
from specjax.weights.load import CONFIG_FILE as MODEL_CONFIG_FILE
from specjax.weights.orbax_checkpoint import RUN_DRAFT_CONFIG, RUN_LORA_BASE, RUN_TARGET_CONFIG
from specjax.weights.peft import ADAPTER_CONFIG_FILE
from specjax.weights.side_files import unshaping_fields
from specjax.weights.tokenizer import load_tokenizer, resolve_mask_token_id, stop_token_ids

TARGET_FILE = "target.json"
LOGITS_BYTES = 2**28
PEFT_WORDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")  # of the section lora


@dataclass(frozen=True)
class Task:
    """What differs between training a draft and training a decoder."""

    model: nnx.Module
    loss: LossFunction[Any]
    frozen: Any
    evaluator: Callable[[list[Any], Answers | None], Callable[[Any], Evaluation]]
    flops_per_step: float
    flops_formula: str
    num_anchors: int | None
    files: dict[str, Any]
    dropout_seed: int | None = None


def draft_task(config: RunConfig) -> Task:
    """A fresh draft on the mesh in force, with the frozen target that teaches it, and the files that record both."""
    check_mesh(read_target_config(config.target.path))
    target = load_target(config.target.path, dtype=compute_dtype(config))
    task = draft_task_of(config, target)
    tokenizer = load_tokenizer(config.target.path)
    fingerprint = target_fingerprint(
        target,
        chat_template=None if tokenizer is None else tokenizer.get_chat_template() if tokenizer.chat_template else None,
        thinking=json.dumps(config.data.chat_template_kwargs, sort_keys=True),
    )
    files = {FINGERPRINT_FILE: fingerprint.to_json(), TARGET_FILE: {"digest": target_digest(config.target.path)}}
    if isinstance(task.model, LoRADraft):
        files[RUN_DRAFT_CONFIG] = lora_draft_config_to_json(task.model.config)
        files[RUN_LORA_BASE] = decoder_config_to_hf(target.config)
    else:
        files[RUN_DRAFT_CONFIG] = draft_config_to_hf(draft_config_of(config))
    return replace(task, files=files)


def draft_task_of(config: RunConfig, target: Decoder, *, load_init: bool = True) -> Task:
    """A fresh draft for `target`, which may have any weights of the config's target's shape; no files.

    load_init: give the draft the weights of `draft.init`, where that is set, and not only its shape.
    """
    loss = BlockDiffusionLoss(
        objective=config.loss.objective,
        weighting=config.loss.weighting,
        gamma=config.gamma,
        alpha=config.loss.alpha,
        cumulative_mask=config.loss.cumulative_mask,
        chunk_blocks=config.loss.chunk_blocks or _chunk_blocks(config, target.config.vocab_size),
        query_chunk=config.training.attention_chunk,
        remat=config.training.remat,
    )
    teacher, shape = needs_teacher(config.loss.objective), _shape(config)
    model: DFlashDraft | LoRADraft
    if config.kind == "lora":
        lora = lora_draft_config_of(config)
        model = random_lora_draft(lora, target, config.seed)
        if config.draft.init and load_init:
            model = warm_started(model, target, config.draft.init)
        step_flops, formula = flops.lora_step_flops(target.config, lora, shape, teacher=teacher), flops.LORA_FORMULA
    else:
        dflash, runs_target = draft_config_of(config), config.data.taps is None
        model = random_draft(dflash, target, config.seed, compute_dtype(config))
        if config.draft.init and load_init:
            model = warm_started(model, target, config.draft.init)
        step_flops = flops.dflash_step_flops(target.config, dflash, shape, runs_target=runs_target, teacher=teacher)
        formula = flops.DFLASH_FORMULA
    return Task(
        model=model,
        loss=loss,
        frozen=target,
        evaluator=lambda batches, answers: draft_evaluator(loss, target, batches, answers),
        flops_per_step=step_flops,
        flops_formula=formula,
        num_anchors=config.data.num_anchors,
        files={},
        dropout_seed=config.seed if isinstance(model, LoRADraft) and model.config.lora.dropout else None,
    )


def _chunk_blocks(config: RunConfig, vocab_size: int) -> int:
    """The blocks of an even share of a row whose logits, on one device, take `LOGITS_BYTES` at most."""
    rows = config.training.batch_size // (config.training.accumulation_steps * axis_size(*BATCH))
    block = 4 * rows * (config.draft.block_size - 1) * vocab_size // axis_size("tensor")
    chunks = -(-config.data.num_anchors // max(1, LOGITS_BYTES // block))
    return -(-config.data.num_anchors // chunks)


def random_draft(config: DFlashConfig, target: Decoder, seed: int, dtype: Any) -> DFlashDraft:
    """A draft of random float32 parameters; a mask embedding of its own starts as the mean of `target`'s rows."""

    @jax.jit
    def make(target: Decoder) -> DFlashDraft:
        draft = DFlashDraft(config, rngs=nnx.Rngs(seed), dtype=dtype)
        if draft.mask_embedding is not None:
            draft.mask_embedding[...] = target.embed_tokens.mean()
        return draft

    return make(target)


def random_lora_draft(config: LoRADraftConfig, target: Decoder, seed: int) -> LoRADraft:
    """Adapters without effect; a mask embedding of the draft's own starts as the mean of `target`'s rows."""

    @jax.jit
    def make(target: Decoder) -> LoRADraft:
        draft = LoRADraft(config, target.config, rngs=nnx.Rngs(seed))
        if draft.mask_embedding is not None:
            draft.mask_embedding[...] = target.embed_tokens.mean()
        return draft

    return make(target)


def lora_draft_config_of(config: RunConfig) -> LoRADraftConfig:
    """The LoRA draft of a run: the section's settings, or the PEFT file that it names, for the config's target."""
    target, draft, section = read_target_config(config.target.path), config.draft, config.lora
    old = None if draft.init is None else initial_config(draft.init, LoRADraftConfig, target)
    own = _own_mask_embedding(draft, old)
    if section.peft_config is None:
        source, words = "lora", section.model_dump(mode="json", include={*PEFT_WORDS})
        raw = words | {"peft_type": "LORA"}
    else:
        path = Path(section.peft_config)
        path = path / ADAPTER_CONFIG_FILE if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"lora.peft_config {path}: no such file; give an {ADAPTER_CONFIG_FILE}, or its folder")
        source, raw = str(path), read_json(path)
    adapters = adapter_config_from_peft(raw, source, target)
    try:
        fresh = LoRADraftConfig(
            adapters,
            block_size=draft.block_size,
            mask_token_id=_mask_token(config, target, own=own),
            own_mask_embedding=own,
            masked_anchor=section.masked_anchor,
            adapt_context=section.adapt_context,
        )
    except ValueError as error:
        raise InputError(f"draft: {error}") from error
    if old is not None:
        check_adapters_continue(draft, old, fresh)
    return fresh


def _own_mask_embedding(settings: DraftConfig, old: DFlashConfig | LoRADraftConfig | None) -> bool:
    if settings.mask_embedding is None:
        return old is not None and old.own_mask_embedding
    return settings.mask_embedding == "own"


def _mask_token(config: RunConfig, target: DecoderConfig, *, own: bool) -> int:
    """Raises ValueError where there is none."""
    path = config.target.path
    tokenizer, stops = load_tokenizer(path), stop_token_ids(path)
    return resolve_mask_token_id(config.draft.mask_token_id, tokenizer, target.vocab_size, stops, own=own)


def draft_config_of(config: RunConfig) -> DFlashConfig:
    """The draft's architecture: the config's settings, completed from the target's and from that of `draft.init`."""
    target = read_target_config(config.target.path)
    draft = config.draft
    old = None if draft.init is None else initial_config(draft.init, DFlashConfig, target)
    own = _own_mask_embedding(draft, old)
    try:
        taps = draft.target_layer_ids or default_target_layer_ids(target.num_hidden_layers, draft.num_taps or 0)
        fresh = DFlashConfig.for_target(
            target,
            num_layers=draft.num_layers,
            block_size=draft.block_size,
            mask_token_id=_mask_token(config, target, own=own),
            target_layer_ids=tuple(taps),
            sliding_window=draft.sliding_window,
            own_mask_embedding=own,
        )
    except ValueError as error:
        raise InputError(f"draft: {error}") from error
    return fresh if old is None else grown_config(draft, old, fresh)


def causal_lm_task(config: RunConfig) -> Task:
    """The target itself, random or with its weights, on the mesh in force."""
    dtype = compute_dtype(config)
    folder = model_folder(config.target.path)
    target_config = read_target_config(folder)
    check_mesh(target_config)
    files = {RUN_TARGET_CONFIG: decoder_config_to_hf(target_config) | unshaping_fields(folder / MODEL_CONFIG_FILE)}
    if config.target.init == "random":
        model = jax.jit(lambda: Decoder(target_config, rngs=nnx.Rngs(config.seed), dtype=dtype))()
    else:
        model = load_target(config.target.path, dtype=dtype, param_dtype=jnp.float32)
        files[TARGET_FILE] = {"digest": target_digest(config.target.path)}
    loss = CausalLMLoss(query_chunk=config.training.attention_chunk, remat=config.training.remat)
    return Task(
        model=model,
        loss=loss,
        frozen=None,
        evaluator=lambda batches, _: causal_lm_evaluator(loss, batches),
        flops_per_step=flops.causal_lm_step_flops(target_config, _shape(config)),
        flops_formula=flops.CAUSAL_LM_FORMULA,
        num_anchors=None,
        files=files,
    )


def check_mesh(target: DecoderConfig) -> None:
    """Raises InputError where the mesh in force does not divide the target's dimensions."""
    try:
        check_mesh_fits(target)
    except ValueError as error:
        raise InputError(f"mesh: {error}") from error


def _shape(config: RunConfig) -> flops.StepShape:
    return flops.StepShape(config.training.batch_size, config.data.max_length, config.data.num_anchors)


def compute_dtype(config: RunConfig) -> Any:
    """`target.dtype`, with auto resolved: bfloat16 on accelerators, float32 on CPU."""
    if config.target.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.target.dtype)
