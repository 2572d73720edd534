"""Reading a Hugging Face `config.json` with nothing left over: every field is used, ignorable by name, or refused.

The tables below are the contract. A field that is in none of them is refused by name, because a field that is
skipped silently changes a model's output without a trace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from specjax.errors import InputError
from specjax.models.layers import RopeConfig

REQUIRED: Any = object()

TRAINING_ONLY = "matters in training only"
GENERATION = "a default of text generation; the caller chooses it"
BOOKKEEPING = "bookkeeping of the file's writer"

# Field -> why the network's output does not depend on it.
IGNORED: dict[str, str] = {
    "_attn_implementation": "names a kernel, not a function",
    "_attn_implementation_autoset": "names a kernel, not a function",
    "_name_or_path": BOOKKEEPING,
    "attention_dropout": TRAINING_ONLY,
    "auto_map": "names a Python file of the folder; `architectures` says which network it is",
    "bad_words_ids": GENERATION,
    "begin_suppress_tokens": GENERATION,
    "bos_token_id": "belongs to the tokenizer",
    "chunk_size_feed_forward": "a memory setting",
    "decoder_start_token_id": GENERATION,
    "diversity_penalty": GENERATION,
    "do_sample": GENERATION,
    "dtype": "the loader's caller chooses the dtype",
    "early_stopping": GENERATION,
    "encoder_no_repeat_ngram_size": GENERATION,
    "eos_token_id": "belongs to the tokenizer",
    "exponential_decay_length_penalty": GENERATION,
    "finetuning_task": BOOKKEEPING,
    "forced_bos_token_id": GENERATION,
    "forced_eos_token_id": GENERATION,
    "id2label": "belongs to classification heads",
    "initializer_range": TRAINING_ONLY,
    "is_llama_config": BOOKKEEPING,
    "label2id": "belongs to classification heads",
    "length_penalty": GENERATION,
    "max_length": GENERATION,
    "min_length": GENERATION,
    "no_repeat_ngram_size": GENERATION,
    "num_beam_groups": GENERATION,
    "num_beams": GENERATION,
    "num_return_sequences": GENERATION,
    "output_attentions": "asks for extra outputs",
    "output_hidden_states": "asks for extra outputs",
    "output_scores": GENERATION,
    "pad_token_id": "belongs to the tokenizer",
    "prefix": GENERATION,
    "pretraining_tp": "splits products without changing them",
    "problem_type": "belongs to classification heads",
    "remove_invalid_values": GENERATION,
    "repetition_penalty": GENERATION,
    "return_dict": "shapes the return value",
    "return_dict_in_generate": GENERATION,
    "sep_token_id": "belongs to the tokenizer",
    "suppress_tokens": GENERATION,
    "task_specific_params": BOOKKEEPING,
    "temperature": GENERATION,
    "tf_legacy_loss": TRAINING_ONLY,
    "tokenizer_class": "belongs to the tokenizer",
    "top_k": GENERATION,
    "top_p": GENERATION,
    "torch_dtype": "the loader's caller chooses the dtype",
    "torchscript": "a PyTorch export setting",
    "transformers_version": BOOKKEEPING,
    "typical_p": GENERATION,
    "unsloth_fixed": BOOKKEEPING,
    "unsloth_version": BOOKKEEPING,
    "use_bfloat16": "the loader's caller chooses the dtype",
    "use_cache": "a PyTorch generation setting",
}

# Field -> the only values it may have (other values name a network that is not built here).
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "hidden_act": ("silu",),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False, None),
}

# Field -> what to do about it, where a bare "not supported" would leave the reader alone.
REFUSED: dict[str, str] = {
    "mrope_section": "multimodal rotary sections are not supported",
    "num_experts": "mixture-of-experts models are not supported",
    "quantization_config": "quantised weights are not supported; use the unquantised model",
    "speculators_model_type": "the speculators layout is not read; use the z-lab folder of the same draft",
    "text_config": "multimodal folders are not supported; save the language model on its own",
}

# rope_type -> (fields it needs, fields it may have).
ROPE_FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
}
ROPE_INTEGERS = frozenset({"original_max_position_embeddings"})
DEFAULT_ROPE_THETA = 10000.0


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model folder holds a config.json") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a JSON file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


@dataclass(frozen=True)
class FieldTables:
    """What a format says of fields that no reader takes: tables as IGNORED, FIXED and REFUSED are."""

    ignored: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]]
    refused: Mapping[str, str]


MODEL_FIELDS = FieldTables(IGNORED, FIXED, REFUSED)


class ConfigReader:
    """Takes fields out of a config one by one, gathers every problem, and refuses what nobody took."""

    def __init__(self, raw: Mapping[str, Any], source: str, tables: FieldTables = MODEL_FIELDS):
        self.raw = raw
        self.source = source
        self.tables = tables
        self.problems: list[str] = []
        self.used: set[str] = set()

    def problem(self, name: str, reason: str) -> None:
        shown = f" is {self.raw[name]!r}" if name in self.raw else ""
        self.problems.append(f"{name}{shown}: {reason}")

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return self.raw.get(name, default)

    def integer(self, name: str, default: Any = REQUIRED, *, minimum: int = 1) -> int:
        """A whole number >= `minimum`; null counts as absent."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self._not(name, f"a whole number of at least {minimum}", value)
            return minimum
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self._not(name, "a number above 0", value)
            return 1.0
        return float(value)

    def boolean(self, name: str, default: Any = REQUIRED) -> bool:
        value = self._present(name, default)
        if not isinstance(value, bool):
            self._not(name, "true or false", value)
            return False
        return value

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(isinstance(x, bool) or not isinstance(x, int) for x in value):
            self.problem(name, "must be a list of whole numbers")
            return None
        return tuple(value)

    def finish(self) -> None:
        """Raises InputError listing every problem, fields that nobody knows included."""
        fixed, refused = self.tables.fixed, self.tables.refused
        for name, value in self.raw.items():
            if name in self.used or name in self.tables.ignored or value in fixed.get(name, ()):
                continue
            if name in refused:
                self.problem(name, refused[name])
            elif name not in fixed:
                self.problem(name, "not a field known here; its effect would be lost")
            else:
                allowed = " or ".join(json.dumps(x) for x in fixed[name])
                self.problem(name, f"only {allowed} is supported")
        raise_problems(self.source, self.problems)

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name)
        return default if value is None else value

    def _not(self, name: str, wanted: str, value: Any) -> None:
        self.problem(name, f"the field is missing; it must be {wanted}" if value is REQUIRED else f"must be {wanted}")


def raise_problems(source: str, problems: list[str]) -> None:
    """Raises one InputError for all `problems`; does nothing when there are none."""
    if len(problems) == 1:
        raise InputError(f"{source}: {problems[0]}")
    if problems:
        raise InputError(f"{source}: {len(problems)} problems:\n" + "\n".join(f"  - {x}" for x in problems))


def read_rope(reader: ConfigReader, max_position_embeddings: int) -> RopeConfig:
    """Rotary settings in either spelling: `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`.

    A file with both must say the same in both.
    """
    new, old = (_rope_dict(reader, name) for name in ("rope_parameters", "rope_scaling"))
    thetas = {
        name: value
        for name, value in (
            ("rope_parameters.rope_theta", new.pop("rope_theta", None)),
            ("rope_scaling.rope_theta", old.pop("rope_theta", None)),
            ("rope_theta", reader.get("rope_theta")),
        )
        if value is not None
    }
    if len(set(thetas.values())) > 1:
        reader.problems.append(", ".join(f"{k} is {v!r}" for k, v in thetas.items()) + ": these must agree")
    if new and old and new != old:
        reader.problem("rope_scaling", f"disagrees with rope_parameters {new!r}; keep one of the two")
    theta = next(iter(thetas.values()), DEFAULT_ROPE_THETA)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 1:
        reader.problems.append(f"rope_theta is {theta!r}: must be a number above 1")
        theta = DEFAULT_ROPE_THETA
    name = "rope_parameters" if new else "rope_scaling"
    return RopeConfig(theta=float(theta), **_rope_fields(reader, name, new or old, max_position_embeddings))


def _rope_dict(reader: ConfigReader, name: str) -> dict[str, Any]:
    value = reader.get(name) or {}
    if not isinstance(value, dict):
        reader.problem(name, "must be an object or null")
        return {}
    value = dict(value)
    legacy = value.pop("type", None)
    if legacy is not None and value.setdefault("rope_type", legacy) != legacy:
        reader.problem(name, f"type {legacy!r} and rope_type {value['rope_type']!r} disagree")
    if value.pop("partial_rotary_factor", None) not in FIXED["partial_rotary_factor"]:
        reader.problem(name, "partial_rotary_factor must be 1")
    return value


def _rope_fields(
    reader: ConfigReader, name: str, value: dict[str, Any], max_position_embeddings: int
) -> dict[str, Any]:
    """RopeConfig's keyword arguments from one rope object, checked against ROPE_FIELDS."""
    rope_type = value.pop("rope_type", "default")
    if rope_type not in ROPE_FIELDS:
        reader.problem(name, f"rope_type {rope_type!r} is not one of {', '.join(ROPE_FIELDS)}")
        return {}
    needed, optional = ROPE_FIELDS[rope_type]
    for key in sorted(needed - set(value)):
        reader.problem(name, f"rope_type {rope_type!r} needs {key}")
    for key in sorted(set(value) - needed - optional):
        reader.problem(name, REFUSED.get(key, f"rope_type {rope_type!r} does not use {key}; remove it"))
    original = value.get("original_max_position_embeddings")
    if value.get("factor", 0) is None and isinstance(original, int):
        value["factor"] = max_position_embeddings / original
    result: dict[str, Any] = {"rope_type": rope_type}
    for key in sorted((needed | optional) & set(value)):
        number = value[key]
        if number is None and key in optional:
            continue
        wanted = bool if key == "truncate" else int if key in ROPE_INTEGERS else (int, float)
        is_bool = isinstance(number, bool)
        if not isinstance(number, wanted) or is_bool != (wanted is bool) or (not is_bool and number <= 0):
            kind = "true or false" if wanted is bool else "a number above 0"
            reader.problem(name, f"{key} {number!r} must be {kind}")
            continue
        result[key] = number if wanted in (bool, int) else float(number)
    return result


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """`rope` as transformers 5's `rope_parameters`, with the fields its type uses and no others."""
    needed, optional = ROPE_FIELDS[rope.rope_type]
    values = {f.name: getattr(rope, f.name) for f in fields(rope) if f.name in needed | optional}
    kept = {name: value for name, value in values.items() if value is not None}
    return {"rope_theta": rope.theta, "rope_type": rope.rope_type} | kept


def rope_to_hf_both(rope: RopeConfig) -> dict[str, Any]:
    """`rope` in both spellings: transformers 4 and most servers read the old one, transformers 5 writes the new."""
    parameters = rope_to_hf(rope)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.rope_type == "default" else scaling,
        "rope_parameters": parameters,
    }
