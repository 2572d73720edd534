"""The run config: typed, strict, from YAML with `section.key=value` overrides.

Importing this module starts no JAX, so a mistake in a config is reported at once. Defaults are the DFlash recipe
(arXiv 2602.06036, section 5 and appendix); a config file states only what differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import Field, model_validator

from specjax.config_messages import problems, shown
from specjax.config_sections import (
    DEFAULT_NUM_TAPS,
    CheckpointConfig,
    DataConfig,
    DraftConfig,
    EvaluationConfig,
    LoggingConfig,
    LoRASection,
    LossConfig,
    MeshConfig,
    NoiseConfig,
    OptimizerConfig,
    Section,
    TargetConfig,
    TrainingConfig,
)
from specjax.errors import InputError

SectionType = TypeVar("SectionType", bound=Section)
DEFAULT_GAMMAS = {16: 7.0, 10: 5.0, 8: 4.0}  # by block size
# Of each pair only the one in force is written.
EXCLUSIVE = (("draft", "num_taps"), ("draft", "target_layer_ids"), ("training", "epochs"), ("training", "steps"))
DECODING = ("prompts", "max_new_tokens")  # settings of evaluation that are a draft's
BLOCKS = ("num_anchors", "context_len", "context_ratio")  # settings of data that are
OWN_LAYERS = ("num_layers", "num_taps", "target_layer_ids", "sliding_window")  # settings of draft: not LoRA's


class RunConfig(Section):
    """Everything that defines a run."""

    kind: Literal["dflash", "lora", "causal_lm"] = Field(
        "dflash", description="train a DFlash draft, adapters with which the target drafts itself, or the target"
    )
    output_dir: str = Field(description="folder of the run: checkpoints, logs, resolved config")
    seed: int = Field(0, ge=0, description="of initialisation, data order and anchors")
    target: TargetConfig
    draft: DraftConfig = Field(default_factory=DraftConfig)
    lora: LoRASection = Field(default_factory=LoRASection)
    data: DataConfig
    loss: LossConfig = Field(default_factory=LossConfig)
    noise: NoiseConfig = Field(default_factory=NoiseConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if ignored := self._ignored():
            what = {"dflash": "has no adapters", "lora": "has no layers of its own", "causal_lm": "trains no draft"}
            raise ValueError(f"kind {self.kind} {what[self.kind]} and ignores {', '.join(ignored)}; drop it")
        if self.kind == "causal_lm":
            return self
        if self.target.init == "random":
            raise ValueError("target.init random belongs to kind causal_lm; a draft needs a trained target")
        if self.kind == "lora" and self.data.taps is not None:
            raise ValueError("data.taps holds hidden states, but kind lora needs the target's keys; drop it")
        if self.loss.weighting == "exp" and self.loss.gamma is None and self.draft.block_size not in DEFAULT_GAMMAS:
            raise ValueError(
                f"loss.gamma has no default for draft.block_size {self.draft.block_size} "
                f"(known: {', '.join(f'{b}: {g:g}' for b, g in DEFAULT_GAMMAS.items())}); set loss.gamma"
            )
        return self

    def _ignored(self) -> list[str]:
        """Settings that were given and that this kind of run has no use for."""
        given = self.model_fields_set
        if self.kind == "lora":
            unset = {"num_taps"} if self.draft.num_taps == DEFAULT_NUM_TAPS else set()
            return [f"draft.{name}" for name in OWN_LAYERS if name in self.draft.model_fields_set - unset]
        if self.kind == "dflash":
            return sorted({"lora"} & given)
        ignored = sorted({"draft", "lora", "loss", "noise"} & given)
        ignored += [f"data.{name}" for name in BLOCKS if name in self.data.model_fields_set]
        ignored += ["data.taps"] if self.data.taps is not None else []
        return ignored + [f"evaluation.{name}" for name in DECODING if name in self.evaluation.model_fields_set]

    @property
    def gamma(self) -> float | None:
        """Decay of the `exp` weighting, resolved; None for the other weightings."""
        if self.loss.weighting != "exp":
            return None
        return self.loss.gamma or DEFAULT_GAMMAS[self.draft.block_size]


class _Loader(yaml.SafeLoader):
    """Reads 6e-4 as the number it is, not YAML 1.1's string, a date as text, and refuses a key given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for twice in sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} is given twice; drop one", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run config and applies `section.key=value` overrides (values are YAML).

    Raises:
        InputError: unreadable file, unknown key (with its nearest neighbour), wrong type or value.
    """
    raw = read_mapping(path, "a YAML run config, such as those in configs/")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, f"{path} with {' '.join(overrides)}" if overrides else str(path))


def read_mapping(path: str | Path, wanted: str) -> dict[str, Any]:
    """The settings of a YAML file. Raises InputError where it is none; `wanted` says what it should be."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give {wanted}") from error
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not YAML: {error}") from error
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds a {type(raw).__name__}"
        raise InputError(f"{path}: {found}; give sections of settings, as the files in configs/ do")
    return raw


def parse_config(raw: Mapping[str, Any], source: str) -> RunConfig:
    """Validates a mapping of sections; errors as `load_config`, with `source` as the file."""
    return validated(RunConfig, raw, source)


def validated(model: type[SectionType], raw: Mapping[str, Any], source: str) -> SectionType:
    """The settings `raw` as a `model`. Raises InputError with one line for each mistake; `source` names the file."""
    try:
        return model.model_validate(_tuples(raw))
    except pydantic.ValidationError as error:
        raise InputError(f"{source}: " + "\n  ".join(problems(error, model))) from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    raw = config.model_dump(mode="json")
    for section, name in EXCLUSIVE:
        if raw[section][name] is None:
            del raw[section][name]
    if config.kind != "lora":
        del raw["lora"]
    elif config.lora.peft_config is not None:
        raw["lora"] = {name: raw["lora"][name] for name in ("peft_config", "masked_anchor", "adapt_context")}
    if config.kind == "lora":
        raw["draft"] = {name: value for name, value in raw["draft"].items() if name not in OWN_LAYERS}
    if config.kind == "causal_lm":
        for name in ("draft", "loss", "noise"):
            del raw[name]
        for section, names in (("data", BLOCKS), ("evaluation", DECODING)):
            for name in names:
                del raw[section][name]
    return yaml.safe_dump(raw, sort_keys=False)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r}: write section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not YAML: {error}") from error
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, 1):
        inner = {} if raw.get(section) is None else raw[section]
        if not isinstance(inner, dict):
            setting = ".".join(sections[:depth])
            raise InputError(
                f"override {override!r}: {setting} is {shown(inner)}, not a section; write {setting}=value"
            )
        raw[section] = inner
        raw = inner
    raw[name] = value


def _tuples(value: Any) -> Any:
    """Lists as tuples, which strict models take."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
