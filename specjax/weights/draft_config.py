"""A z-lab draft's `config.json` <-> `DFlashConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specjax.errors import InputError
from specjax.models.decoder import LAYER_TYPES
from specjax.models.dflash import (
    TOKEN_ID_LIMIT,
    DFlashConfig,
    check_target_layer_ids,
    default_target_layer_ids,
)
from specjax.weights.config_fields import REFUSED, ConfigReader, read_rope, rope_to_hf_both
from specjax.weights.hf_config import (
    DEFAULT_RMS_NORM_EPS,
    DEFAULT_SLIDING_WINDOW,
    FAMILIES,
    check_heads,
    layer_types_to_hf,
    listed_layer_types,
    read_layer_types,
)

ARCHITECTURE = "DFlashDraftModel"
MODEL_TYPE = "qwen3"

# Fields of `dflash_config` that extend the method, and the values at which they do nothing.
EXTENSIONS: dict[str, tuple[Any, ...]] = {
    "attention_mode": ("gqa", None),
    "attention_sink_bias": (False, None),
    "input_embedding_scale": (1, None),
    "projector_type": ("dflash", None),
    "use_swa": (False, None),
}
SHARED_FIELDS = ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers")
# The draft's parameter, and the key of `dflash_config` that says it has one (servers go by `mask_embedding.pt` alone).
MASK_EMBEDDING, OWN = "mask_embedding", "own"


def is_draft_config(raw: Mapping[str, Any]) -> bool:
    """Whether a folder's `config.json` describes a DFlash draft rather than a target."""
    return "dflash_config" in raw or ARCHITECTURE in (raw.get("architectures") or ())


def draft_config_from_hf(raw: Mapping[str, Any], source: str) -> DFlashConfig:
    """The DFlashConfig a z-lab draft's `config.json` describes; `source` names the file in errors.

    Raises:
        InputError: lists every field that is missing, malformed, unknown, or names something not built here.
    """
    _check_architecture(raw, source)
    flat, problems = _flattened(raw)
    reader = ConfigReader(flat, source)
    reader.problems += problems
    reader.used |= {"architectures", "model_type", "dflash_config"}
    family = FAMILIES[MODEL_TYPE]
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    layers = reader.integer("num_hidden_layers")
    positions = reader.integer("max_position_embeddings", family.max_position_embeddings)
    layer_types, window = _layer_types(reader, layers)
    values: dict[str, Any] = {
        "intermediate_size": reader.integer("intermediate_size"),
        "num_key_value_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": reader.integer("head_dim", hidden // heads if "head_dim" in raw else family.head_dim),
        "rms_norm_eps": reader.number("rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        "vocab_size": reader.integer("vocab_size"),
        "rope": read_rope(reader, positions),
        "block_size": reader.integer("block_size", minimum=2),
        "mask_token_id": reader.integer("mask_token_id", minimum=0),
        "sliding_causal": _sliding_causal(reader, layer_types),
    }
    values["target_layer_ids"], values["num_target_layers"] = _taps(reader, layers)
    values["own_mask_embedding"] = _own_mask_embedding(reader)
    if values["mask_token_id"] >= (TOKEN_ID_LIMIT if values["own_mask_embedding"] else values["vocab_size"]):
        reader.problem("mask_token_id", f"outside the vocabulary of {values['vocab_size']} rows")
    if reader.get("attention_bias"):
        reader.problem("attention_bias", "a draft has no biases; it must be false")
    reader.get("tie_word_embeddings")  # says nothing: a draft has no head, and released ones hold either value
    check_heads(reader, heads, values["num_key_value_heads"], values["head_dim"])
    reader.finish()
    return DFlashConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        layer_types=layer_types,
        sliding_window=window,
        **values,
    )


def draft_config_to_hf(config: DFlashConfig) -> dict[str, Any]:
    """The draft's `config.json` object, as SGLang and vLLM read it (no `auto_map`: both have the class built in)."""
    same = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps max_position_embeddings vocab_size num_target_layers block_size"
    )
    dflash: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "block_size": config.block_size,
    }
    if config.own_mask_embedding:
        dflash[MASK_EMBEDDING] = OWN
    result: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
    result |= {name: getattr(config, name) for name in same.split()}
    result |= {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "bfloat16",
    }
    result |= rope_to_hf_both(config.rope) | layer_types_to_hf(config.layer_types, config.sliding_window)
    if LAYER_TYPES[1] in config.layer_types and not config.sliding_causal:
        # Servers take either key as an override of every layer, so a causal sliding draft writes neither.
        result["is_causal"] = dflash["causal"] = False
    return result | {"dflash_config": dflash}


def _check_architecture(raw: Mapping[str, Any], source: str) -> None:
    architectures = raw.get("architectures") or [ARCHITECTURE]
    hints = "".join(f" ({REFUSED[name]})" for name in REFUSED if name in raw)
    if not is_draft_config(raw) or architectures != [ARCHITECTURE] or raw.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        named = ", ".join(map(str, architectures)) if raw.get("architectures") else "unnamed"
        raise InputError(
            f"{source}: architecture {named} with model_type {raw.get('model_type')!r} is not a DFlash draft{hints}; "
            f"supported is {ARCHITECTURE} with model_type {MODEL_TYPE!r}"
        )


def _flattened(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(`raw` with the fields of `dflash_config` at the top level, where some writers put them; problems found)."""
    inner = raw.get("dflash_config") or {}
    problems = []
    flat = dict(raw)
    for name, value in inner.items():
        if name in ("causal", MASK_EMBEDDING):
            flat[f"dflash_config.{name}"] = value
        elif name in EXTENSIONS:
            if value not in EXTENSIONS[name]:
                problems.append(f"dflash_config.{name} is {value!r}: this extension of DFlash is not supported")
        elif name not in SHARED_FIELDS:
            problems.append(f"dflash_config.{name} is {value!r}: not a field known here; its effect would be lost")
        elif raw.get(name, value) != value:
            problems.append(f"{name} is {raw[name]!r}, dflash_config.{name} is {value!r}: these must agree")
        else:
            flat[name] = value
    return flat, problems


def _layer_types(reader: ConfigReader, num_layers: int) -> tuple[tuple[str, ...], int | None]:
    """As Qwen3's, except that listed sliding layers do not need `use_sliding_window` (servers do not read it)."""
    listed = listed_layer_types(reader, num_layers)
    if listed is None or "use_sliding_window" in reader.raw:
        return read_layer_types(reader, num_layers)
    reader.used |= {"max_window_layers", "sliding_window"}
    window = reader.integer("sliding_window", DEFAULT_SLIDING_WINDOW) if LAYER_TYPES[1] in listed else None
    return listed, window


def _sliding_causal(reader: ConfigReader, layer_types: tuple[str, ...]) -> bool:
    """Causality of the sliding layers; unsaid, sliding layers are causal and full layers are not."""
    said = [(name, value) for name in ("is_causal", "dflash_config.causal") if (value := reader.get(name)) is not None]
    if len({value for _, value in said}) > 1:
        reader.problem("is_causal", "disagrees with dflash_config.causal")
    if any(value is not False for _, value in said) and LAYER_TYPES[0] in layer_types:
        reader.problem(said[0][0], "would make full-attention layers causal, which is not supported")
    slides = LAYER_TYPES[1] in layer_types
    return slides if not said else slides and bool(said[0][1])


def _own_mask_embedding(reader: ConfigReader) -> bool:
    said = reader.get(f"dflash_config.{MASK_EMBEDDING}")
    if said not in (None, OWN):
        reader.problem(f"dflash_config.{MASK_EMBEDDING}", f"must be {OWN!r} or absent")
    return said is not None


def _taps(reader: ConfigReader, num_layers: int) -> tuple[tuple[int, ...], int]:
    """(target_layer_ids, num_target_layers); unnamed taps are the default ones, one for each draft layer."""
    before = len(reader.problems)
    depth = reader.integer("num_target_layers")
    ids = reader.integers("target_layer_ids")
    if len(reader.problems) > before:
        return (0,), 2
    try:
        ids = default_target_layer_ids(depth, num_layers) if ids is None else ids
        check_target_layer_ids(ids, depth)
    except ValueError as error:
        reader.problems.append(str(error))
        return (0,), 2
    return ids, depth
