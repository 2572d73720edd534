"""What is wrong with a run config, said plainly: the setting, its value, and what to give instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import pydantic
from pydantic import BaseModel
from pydantic.fields import FieldInfo

# Error type of pydantic -> remedy, filled from the error's context.
REMEDIES = {
    "bool_type": "give true or false",
    "dict_type": "give a mapping, such as {{name: value}}",
    "finite_number": "give a finite number",
    "float_type": "give a number",
    "greater_than": "give more than {gt:g}",
    "greater_than_equal": "give at least {ge:g}",
    "int_from_float": "give a whole number",
    "int_type": "give a whole number",
    "less_than": "give less than {lt:g}",
    "less_than_equal": "give at most {le:g}",
    "literal_error": "give {expected}",
    "model_type": "give its settings, as {{setting: value}}",
    "string_type": "give text, in quotes where YAML reads something else",
    "too_long": "give a list of at most {max_length}",
    "too_short": "give a list of at least {min_length}",
    "tuple_type": "give a list",
}
NUMBERS = ("float_type", "int_type")
# The forms that a setting may take: pydantic names the one it tried, which is no part of a setting's name.
AS_TEXT, AS_MAPPING, AS_LIST = "<text>", "<mapping>", "<list>"

# Setting -> what other trainers call it.
ALIASES = {
    "checkpoint.every_steps": "save_steps save_every save_interval save_freq checkpoint_every",
    "checkpoint.keep_last": "save_total_limit max_to_keep",
    "data.chat_template_kwargs": "chat_template template enable_thinking",
    "data.max_length": "max_len max_seq_len max_seq_length seq_len seq_length sequence_length context_length",
    "data.num_anchors": "anchors num_blocks n_anchors",
    "data.supervise": "train_on_turns mask_history last_turn_only assistant_only_loss train_on_last_turn",
    "data.train": "train_data train_file train_files train_data_path train_path dataset dataset_path",
    "data.validation_fraction": "val_split validation_split eval_split test_size val_size val_set_size split_ratio",
    "data.validation": "eval_data eval_file eval_data_path val_data validation_data validation_file",
    "draft.block_size": "block_len block_length draft_length num_speculative_tokens",
    "draft.mask_token_id": "mask_token mask_id",
    "draft.num_layers": "num_hidden_layers num_draft_layers n_layers draft_layers",
    "draft.target_layer_ids": "layer_ids tap_ids aux_hidden_state_layer_ids eagle_aux_hidden_state_layer_ids",
    "evaluation.every_steps": "eval_steps eval_every eval_interval eval_freq",
    "evaluation.samples": "eval_samples max_eval_samples num_eval_samples",
    "logging.every_steps": "logging_steps log_every log_steps log_interval log_freq",
    "logging.tensorboard": "report_to use_tensorboard",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.peft_config": "lora_config adapter_config",
    "lora.r": "rank lora_rank lora_r",
    "lora.target_modules": "modules lora_modules lora_target_modules",
    "lora.use_rslora": "rslora",
    "loss.gamma": "decay_gamma loss_decay_gamma",
    "loss.alpha": "dpace_alpha",
    "loss.weighting": "loss_type loss_decay",
    "noise.probability": "noise_ratio",
    "mesh.data": "dp dp_size data_parallel",
    "mesh.fsdp": "fsdp_size zero",
    "mesh.tensor": "tp tp_size tensor_parallel tensor_parallel_size",
    "optimizer.betas": "beta1 beta2 b1 b2 adam_beta1 adam_beta2",
    "optimizer.clip_norm": "max_grad_norm grad_clip gradient_clip gradient_clip_val clip_grad grad_norm",
    "optimizer.eps": "epsilon adam_eps adam_epsilon",
    "optimizer.learning_rate": "lr peak_lr max_lr peak_learning_rate",
    "optimizer.min_lr_ratio": "min_lr lr_min final_lr",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler decay_style",
    "optimizer.warmup_ratio": "warmup warmup_steps num_warmup_steps",
    "optimizer.weight_decay": "wd",
    "output_dir": "out_dir output out save_dir output_path",
    "seed": "random_seed",
    "target.dtype": "torch_dtype bf16 fp16 precision mixed_precision",
    "target.path": "model model_name model_path model_name_or_path target_model target_model_path",
    "training.accumulation_steps": "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches grad_accum",
    "training.batch_size": "bs batch train_batch_size global_batch_size per_device_train_batch_size micro_batch_size",
    "training.epochs": "num_epochs num_train_epochs max_epochs n_epochs",
    "training.remat": "gradient_checkpointing activation_checkpointing checkpoint_activations",
    "training.steps": "max_steps num_steps total_steps train_steps num_train_steps max_train_steps",
}
SECTION_ALIASES = {
    "checkpoint": "checkpoints checkpointing save saving",
    "data": "dataset datasets",
    "draft": "draft_model drafter dflash",
    "evaluation": "eval validation",
    "logging": "log logger tracking",
    "lora": "peft adapter adapters",
    "mesh": "parallel parallelism sharding distributed",
    "optimizer": "optim adamw",
    "target": "model target_model",
    "training": "train trainer",
}


def problems(error: pydantic.ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each mistake that validating a `model` (sections of settings) found."""
    return list(dict.fromkeys(_problems(error, model)))


def _problems(error: pydantic.ValidationError, model: type[BaseModel]) -> Iterator[str]:
    for problem in error.errors():
        location = tuple(str(part) for part in problem["loc"] if part not in (AS_TEXT, AS_MAPPING, AS_LIST))
        name, kind, value = ".".join(location), problem["type"], problem["input"]
        if kind == "too_short" and len(value) >= problem["ctx"]["min_length"]:
            continue  # pydantic counts the good entries; the bad ones have their own lines
        if kind in ("extra_forbidden", "invalid_key"):
            yield f"unknown key {name}{_suggestion(model, location, value)}"
        elif kind == "missing":
            yield _missing(model, location, value)
        elif kind == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{name}: {message}" if name else message
        elif location[-1] == "[key]":
            yield f"{'.'.join(location[:-2])} has the key {shown(value)}; put it in quotes"
        else:
            yield f"{name} is {shown(value)}; {_remedy(kind, problem.get('ctx', {}), value, problem['msg'])}"


def shown(value: Any) -> str:
    """A value in YAML's words: null, true, lists."""
    return json.dumps(value, default=str)


def setting_names(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every setting of `model` by its dotted name; sections are not settings."""
    names: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        section = _section_of(field)
        names |= {name: field} if section is None else {f"{name}.{k}": f for k, f in section.model_fields.items()}
    return names


def _remedy(kind: str, context: Mapping[str, Any], value: Any, fallback: str) -> str:
    remedy = REMEDIES[kind].format(**context).replace("'", "") if kind in REMEDIES else fallback
    if kind in NUMBERS and isinstance(value, str) and any(c.isdigit() for c in value):
        return f"{remedy}, without quotes or unit"
    if kind == "tuple_type" and isinstance(value, str | int | float):
        return f"{remedy}, such as [{shown(value)}]"
    return remedy


def _missing(model: type[BaseModel], location: tuple[str, ...], value: Any) -> str:
    settings, name = setting_names(model), ".".join(location)
    if location[-1].isdigit():
        name = name.rpartition(".")[0]
        return f"{name} is {shown(value)}; give a list of {len(get_args(settings[name].annotation))}"
    wanted = [k for k, field in settings.items() if field.is_required() and f"{k}.".startswith(f"{name}.")]
    return f"{name} is missing; set {_alternatives(model, wanted or [name])}"


def _suggestion(model: type[BaseModel], location: tuple[str, ...], value: Any) -> str:
    """What may have been meant by an unknown key, or else the keys known there."""
    *sections, name = location
    here = _fields(model, sections)
    prefix = "".join(f"{section}." for section in sections)
    for candidates in _candidates(model, prefix, name, here, isinstance(value, Mapping)):
        if candidates:
            return f"; did you mean {_alternatives(model, candidates)}?"
    return f"; known keys: {', '.join(here)}"


def _candidates(
    model: type[BaseModel], prefix: str, name: str, here: Mapping[str, FieldInfo], is_section: bool
) -> Iterator[list[str]]:
    """Dotted names that `name` may stand for, the likeliest group first."""
    if is_section and not prefix:
        sections = [key for key, field in model.model_fields.items() if _section_of(field)]
        yield _by_alias(SECTION_ALIASES, name) or difflib.get_close_matches(name, sections, n=1)
    by_last: dict[str, list[str]] = {}
    for setting in setting_names(model):
        by_last.setdefault(setting.rpartition(".")[2], []).append(setting)
    aliases = _by_alias(ALIASES, name)
    yield [setting for setting in aliases if prefix and setting.startswith(prefix)]
    yield by_last.get(name, [])
    yield aliases
    yield [prefix + close for close in difflib.get_close_matches(name, here, n=1)]
    yield [setting for close in difflib.get_close_matches(name, by_last, n=1) for setting in by_last[close]]


def _by_alias(aliases: Mapping[str, str], name: str) -> list[str]:
    return [setting for setting, names in aliases.items() if name.lower().replace("-", "_") in names.split()]


def _alternatives(model: type[BaseModel], names: Iterable[str]) -> str:
    """`a or b`; a single setting with what it is."""
    names, settings = list(names), setting_names(model)
    if len(names) == 1 and names[0] in settings and settings[names[0]].description:
        return f"{names[0]} ({settings[names[0]].description})"
    return " or ".join(names)


def _fields(model: type[BaseModel], sections: Iterable[str]) -> Mapping[str, FieldInfo]:
    for section in sections:
        if not section.isdigit():  # an entry of the list before it
            field = model.model_fields[section]
            model = _section_of(field) or _entry_of(field.annotation) or model
    return model.model_fields


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _entry_of(annotation: Any) -> type[BaseModel] | None:
    """The model that the entries of a list may be, as deep as it stands in the list's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_entry_of, get_args(annotation))), None)
