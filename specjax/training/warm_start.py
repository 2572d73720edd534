"""A draft that starts from another draft's weights, with more layers if wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from specjax.config_sections import DraftConfig
from specjax.errors import InputError
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.weights import flat_params, load_draft, load_run_draft, read_draft_config, with_params
from specjax.weights.config_fields import read_json
from specjax.weights.draft_config import draft_config_from_hf
from specjax.weights.orbax_checkpoint import RUN_DRAFT_CONFIG

RESIDUAL_OUTPUTS = ("self_attn.o_proj.", "mlp.down_proj.")  # zero, they make a layer the identity


def grown_config(settings: DraftConfig, fresh: DFlashConfig) -> DFlashConfig:
    """The architecture of a draft that starts from `settings.init`; `fresh` is what the settings alone would give.

    Shape, rope and the kinds of its layers are those of the draft it starts from; added layers are of the last kind.

    Raises:
        InputError: it belongs to another target, or the settings name other taps, another mask token, another window,
            or fewer layers.
    """
    assert settings.init is not None
    old = _config(settings.init)
    fixed = ("hidden_size", "vocab_size", "num_target_layers", "target_layer_ids", "mask_token_id")
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
        raise InputError(f"draft.init {settings.init} does not fit: {'; '.join(problems)}; set draft.* to its values")
    added = fresh.num_hidden_layers - old.num_hidden_layers
    return replace(
        old,
        num_hidden_layers=fresh.num_hidden_layers,
        layer_types=old.layer_types + old.layer_types[-1:] * added,
        block_size=fresh.block_size,
    )


def warm_started(draft: DFlashDraft, path: str) -> DFlashDraft:
    """`draft`, of a `grown_config`, with the weights of the draft at `path`; it computes what that one does.

    Layers that were added keep their random weights but for the outputs of attention and MLP, which are zero: they
    hand on what they get, and learn from the first step on.
    """
    old = load_run_draft(path) if _is_run(path) else load_draft(path, dtype=jnp.float32, param_dtype=jnp.float32)
    known = flat_params(old)

    def initial(name: str, value: jax.Array) -> jax.Array:
        if name in known:
            return known[name].astype(value.dtype)
        return jnp.zeros_like(value) if any(part in name for part in RESIDUAL_OUTPUTS) else value

    return with_params(draft, {name: initial(name, value) for name, value in flat_params(draft).items()})


def _is_run(path: str) -> bool:
    return (Path(path) / RUN_DRAFT_CONFIG).exists()


def _config(path: str) -> DFlashConfig:
    if not _is_run(path):
        try:
            return read_draft_config(path)
        except InputError as error:
            raise InputError(f"draft.init: {error}; give an exported draft's folder, a run, or a hub id") from None
    file = Path(path) / RUN_DRAFT_CONFIG
    return draft_config_from_hf(read_json(file), str(file))


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
