"""Hugging Face `config.json` <-> `DecoderConfig`, for the Llama, Qwen2 and Qwen3 families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from specjax.errors import InputError
from specjax.models.decoder import LAYER_TYPES, DecoderConfig
from specjax.weights.config_fields import REFUSED, ConfigReader, raise_problems, read_rope, rope_to_hf_both


@dataclass(frozen=True)
class Family:
    """What distinguishes one model type; defaults are those of its transformers configuration class.

    attention_bias, attention_output_bias: a fixed value, or None where the field `attention_bias` decides.
    head_dim: the default; None means hidden_size / num_attention_heads.
    """

    architecture: str
    attention_bias: bool | None
    attention_output_bias: bool | None
    has_mlp_bias: bool
    qk_norm: bool
    has_sliding_window: bool
    head_dim: int | None
    max_position_embeddings: int


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", None, None, True, False, False, None, 2048),
    "qwen2": Family("Qwen2ForCausalLM", True, False, False, False, True, None, 32768),
    "qwen3": Family("Qwen3ForCausalLM", None, None, False, True, True, 128, 32768),
}
DEFAULT_RMS_NORM_EPS = 1e-6
DEFAULT_SLIDING_WINDOW = 4096
DEFAULT_MAX_WINDOW_LAYERS = 28


def decoder_config_from_hf(raw: Mapping[str, Any], source: str) -> DecoderConfig:
    """The DecoderConfig a target's `config.json` describes; `source` names the file in errors.

    Raises:
        InputError: lists every field that is missing, malformed, unknown, or names something not built here.
    """
    reader = ConfigReader(raw, source)
    family = _family(reader)
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    layers = reader.integer("num_hidden_layers")
    positions = reader.integer("max_position_embeddings", family.max_position_embeddings)
    layer_types, window = read_layer_types(reader, layers) if family.has_sliding_window else ((), None)
    if not family.has_sliding_window:
        _refuse_windows(reader)
    values: dict[str, Any] = {
        "vocab_size": reader.integer("vocab_size"),
        "intermediate_size": reader.integer("intermediate_size"),
        "num_key_value_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": _head_dim(reader, family.head_dim, hidden, heads),
        "rms_norm_eps": reader.number("rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        "rope": read_rope(reader, positions),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "mlp_bias": _bias(reader, "mlp_bias", None if family.has_mlp_bias else False),
        "attention_bias": _bias(reader, "attention_bias", family.attention_bias),
    }
    output_bias = family.attention_output_bias
    values["attention_output_bias"] = values["attention_bias"] if output_bias is None else output_bias
    check_heads(reader, heads, values["num_key_value_heads"], values["head_dim"])
    reader.finish()
    return DecoderConfig(
        model_type=raw["model_type"],
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        qk_norm=family.qk_norm,
        layer_types=layer_types,
        sliding_window=window,
        **values,
    )


def decoder_config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` object of a target, in both rope spellings, as transformers 4 and 5 read it.

    Raises:
        InputError: the family's file format cannot carry this configuration.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(f"model_type {config.model_type!r} cannot be saved; supported: {', '.join(FAMILIES)}")
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    result: dict[str, Any] = {"architectures": [family.architecture], "model_type": config.model_type}
    result |= {name: getattr(config, name) for name in same.split()}
    result |= {name: getattr(config, name) for name in ("rms_norm_eps", "max_position_embeddings")}
    result |= {"hidden_act": "silu", "tie_word_embeddings": config.tie_word_embeddings}
    result |= rope_to_hf_both(config.rope)
    if family.attention_bias is None:
        result["attention_bias"] = config.attention_bias
    if family.has_mlp_bias:
        result["mlp_bias"] = config.mlp_bias
    if family.has_sliding_window:
        result |= layer_types_to_hf(config.layer_types, config.sliding_window)
    read, wanted = (asdict(c) for c in (decoder_config_from_hf(result, "config.json"), config))
    lost = [f"{name} is {value!r}" for name, value in wanted.items() if read[name] != value]
    raise_problems(f"a {config.model_type} config.json cannot carry this model", lost)
    return result


def _family(reader: ConfigReader) -> Family:
    """The model's family; an unknown one is refused at once, since every other message would be noise."""
    model_type, architectures = reader.get("model_type"), reader.get("architectures")
    named = [model_type] if not architectures else list(architectures)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (architectures and named != [family.architecture]):
        supported = ", ".join(f"{f.architecture} ({name})" for name, f in FAMILIES.items())
        hints = "".join(f" ({REFUSED[name]})" for name in REFUSED if name in reader.raw)
        raise InputError(
            f"{reader.source}: architecture {', '.join(map(str, named))} with model_type {model_type!r} "
            f"is not supported{hints}; supported are {supported}"
        )
    return family


def _head_dim(reader: ConfigReader, default: int | None, hidden: int, heads: int) -> int:
    if "head_dim" in reader.raw or default is None:
        default = hidden // heads
    return reader.integer("head_dim", default)


def _bias(reader: ConfigReader, name: str, fixed: bool | None) -> bool:
    if fixed is None:
        return reader.boolean(name, False)
    if reader.get(name, fixed) is not fixed:
        reader.problem(name, f"this family always has {fixed}")
    return fixed


def _refuse_windows(reader: ConfigReader) -> None:
    layer_types = reader.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        reader.problem("layer_types", "this family has full attention only")
    for name in ("sliding_window", "use_sliding_window"):
        if reader.get(name):
            reader.problem(name, "this family has no sliding window")


def check_heads(reader: ConfigReader, heads: int, kv_heads: int, head_dim: int) -> None:
    if heads % kv_heads:
        reader.problem("num_attention_heads", f"must be a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        reader.problem("head_dim", f"{head_dim} must be even, for the rotary embedding")


def read_layer_types(reader: ConfigReader, num_layers: int) -> tuple[tuple[str, ...], int | None]:
    """(layer types, sliding window or None) as Qwen's configuration classes derive them.

    The window counts only with `use_sliding_window`; layers from `max_window_layers` on slide, unless
    `layer_types` lists them one by one.
    """
    use_window = reader.boolean("use_sliding_window", False)
    window = reader.integer("sliding_window", DEFAULT_SLIDING_WINDOW) if use_window else None
    first = reader.integer("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
    reader.used.update({"sliding_window"})
    layer_types = listed_layer_types(reader, num_layers)
    if layer_types is None:
        sliding = [window is not None and i >= first for i in range(num_layers)]
        layer_types = tuple(LAYER_TYPES[s] for s in sliding)
    if LAYER_TYPES[1] not in layer_types:
        return layer_types, None
    if window is None:
        reader.problem("layer_types", "has sliding_attention, but use_sliding_window is not true")
        window = DEFAULT_SLIDING_WINDOW
    return layer_types, window


def listed_layer_types(reader: ConfigReader, num_layers: int) -> tuple[str, ...] | None:
    """The field `layer_types`, checked; None where the file does not list them."""
    value = reader.get("layer_types")
    if value is None:
        return None
    unknown = sorted({str(x) for x in value} - set(LAYER_TYPES)) if isinstance(value, list) else ["no list"]
    if unknown:
        reader.problem("layer_types", f"{', '.join(unknown)} is not one of {', '.join(LAYER_TYPES)}")
    elif len(value) != num_layers:
        reader.problem("layer_types", f"{len(value)} entries for num_hidden_layers {num_layers}")
    else:
        return tuple(value)
    return (LAYER_TYPES[0],) * num_layers


def layer_types_to_hf(layer_types: tuple[str, ...], window: int | None) -> dict[str, Any]:
    """The four window fields; transformers 5 drops `sliding_window` unless `use_sliding_window` is written too."""
    slides = LAYER_TYPES[1] in layer_types
    return {
        "layer_types": list(layer_types),
        "use_sliding_window": slides,
        "sliding_window": window if slides else None,
        "max_window_layers": layer_types.index(LAYER_TYPES[1]) if slides else len(layer_types),
    }
