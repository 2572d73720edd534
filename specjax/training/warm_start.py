"""A draft that starts from another draft's weights; a DFlash draft with more layers if wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from specjax.config_sections import DraftConfig
from specjax.errors import InputError
from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.lora_draft import LoRADraft, LoRADraftConfig, lora_target_mismatches
from specjax.models.sharding import BATCH, SPECS, axis_size, put
from specjax.weights import flat_params, load_draft, load_run_draft, read_draft_config, with_params
from specjax.weights.draft_config import MASK_EMBEDDING
from specjax.weights.orbax_checkpoint import RUN_DRAFT_CONFIG, read_run_draft_config
from specjax.weights.peft import adapter_config_to_peft

D = TypeVar("D", DFlashDraft, LoRADraft)
C = TypeVar("C", DFlashConfig, LoRADraftConfig)

RESIDUAL_OUTPUTS = ("self_attn.o_proj.", "mlp.down_proj.")  # zero, they make a layer the identity


def grown_config(settings: DraftConfig, old: DFlashConfig, fresh: DFlashConfig) -> DFlashConfig:
    """The architecture of a draft that starts from `old`; `fresh` is what the settings alone would give.

    Shape, rope and the kinds of its layers are those of the draft it starts from; added layers are of the last kind.
    The target may have got more embedding rows since; another mask token needs a mask embedding of the draft's own.

    Raises:
        InputError: it belongs to another target, or the settings name other taps, another mask token, another window,
            or fewer layers.
    """
    fixed = ["hidden_size", "num_target_layers", "target_layer_ids"]
    if not (old.own_mask_embedding or fresh.own_mask_embedding):
        fixed.append("mask_token_id")
    problems = [
        f"{name} is {_shown(getattr(old, name))}, here {_shown(getattr(fresh, name))}"
        for name in fixed
        if getattr(old, name) != getattr(fresh, name)
    ]
    if settings.sliding_window not in (None, old.sliding_window):
        problems.append(f"sliding_window is {old.sliding_window}, here {settings.sliding_window}")
    if fresh.num_hidden_layers < old.num_hidden_layers:
        problems.append(f"num_layers is {old.num_hidden_layers}, here {fresh.num_hidden_layers}; it can only grow")
    if problems:
        remedy = "set draft.* to its values"
        if "mask_token_id" in fixed and old.mask_token_id != fresh.mask_token_id:
            remedy += ", or draft.mask_embedding to own for another mask token"
        raise InputError(f"draft.init {settings.init} does not fit: {'; '.join(problems)}; {remedy}")
    added = fresh.num_hidden_layers - old.num_hidden_layers
    return replace(
        old,
        num_hidden_layers=fresh.num_hidden_layers,
        layer_types=old.layer_types + old.layer_types[-1:] * added,
        block_size=fresh.block_size,
        vocab_size=fresh.vocab_size,
        mask_token_id=fresh.mask_token_id,
        own_mask_embedding=fresh.own_mask_embedding,
    )


def check_adapters_continue(settings: DraftConfig, old: LoRADraftConfig, fresh: LoRADraftConfig) -> None:
    """Raises InputError unless a LoRA draft of config `fresh` can start from one of config `old`.

    Block size, dropout, the share of masked anchors and what the adapters act on may differ; what says how an adapter's
    weights are applied may not, and another mask token needs a mask embedding of the draft's own.
    """
    theirs, ours = (adapter_config_to_peft(config.lora, None) for config in (old, fresh))
    pairs = [(name, theirs[name], ours[name]) for name in ("r", "lora_alpha", "use_rslora", "target_modules")]
    if not (old.own_mask_embedding or fresh.own_mask_embedding):
        pairs.append(("mask_token_id", old.mask_token_id, fresh.mask_token_id))
    problems = [f"{name} is {there}, here {here}" for name, there, here in pairs if there != here]
    if problems:
        remedy = "set lora.* to its values"
        if problems[-1].startswith("mask_token_id"):
            remedy += ", draft.mask_token_id too, or draft.mask_embedding to own"
        raise InputError(f"draft.init {settings.init} does not fit: {'; '.join(problems)}; {remedy}")


def warm_started(draft: D, target: Decoder, path: str) -> D:
    """`draft`, of a config that `path`'s draft fits, with the weights of that draft; it computes what that one does.

    A mask embedding that the other does not have starts as the row of `target` that the other uses instead. Layers
    that were added keep their random weights but for the outputs of attention and MLP, which are zero: they hand on
    what they get, and learn from the first step on.
    """
    old = _load(path, target.config)
    assert type(old) is type(draft)  # `initial_config` has refused any other
    if isinstance(old, LoRADraft) and (problems := lora_target_mismatches(old, target.config)):
        raise InputError(f"draft.init {path} is of another target: {'; '.join(problems)}")
    known = flat_params(old)
    if old.mask_embedding is None and old.config.mask_token_id < target.config.vocab_size:
        known[MASK_EMBEDDING] = _embedding_row(target, old.config.mask_token_id)

    def initial(name: str, value: jax.Array) -> jax.Array:
        if name in known:
            return known[name].astype(value.dtype)
        return jnp.zeros_like(value) if any(part in name for part in RESIDUAL_OUTPUTS) else value

    return with_params(draft, {name: initial(name, value) for name, value in flat_params(draft).items()})


def _load(path: str, base: DecoderConfig) -> DFlashDraft | LoRADraft:
    if _is_run(path):
        return load_run_draft(path)
    return load_draft(path, dtype=jnp.float32, param_dtype=jnp.float32, base=base)


def _embedding_row(target: Decoder, token: int) -> jax.Array:
    """[d], the same on every device."""
    row_per_shard = put(np.full((axis_size(*BATCH), 1), token, np.int32), SPECS.act_bt)
    return jax.reshard(target.embed(row_per_shard), P(None, None, None))[0, 0]


def _is_run(path: str) -> bool:
    return (Path(path) / RUN_DRAFT_CONFIG).exists()


def initial_config(path: str, kind: type[C], target: DecoderConfig) -> C:
    """The configuration, of `kind`, of the draft at `draft.init`: a folder, a hub id or a run.

    Raises:
        InputError: there is none, or one of the other kind.
    """
    if _is_run(path):
        config = read_run_draft_config(path)
    else:
        try:
            config = read_draft_config(path, target)
        except InputError as error:
            raise InputError(f"draft.init: {error}; give an exported draft's folder, a run, or a hub id") from None
    if not isinstance(config, kind):
        found, wanted = ("LoRA", "dflash") if kind is DFlashConfig else ("DFlash", "lora")
        raise InputError(f"draft.init {path}: is a {found} draft, from which a run of kind {wanted} cannot start")
    return config


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
