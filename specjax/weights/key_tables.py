"""Which tensor of a file is which parameter: tables, and nothing else.

A row is (name in the file, path in the module, transform); `{i}` stands for a layer number. PyTorch stores a linear
layer's weight [out, in]; modules here hold [in, out], so such weights are transposed once, at loading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Transform = Literal["copy", "transpose"]

_NORM_ROWS: tuple[tuple[str, str], ...] = (
    ("input_layernorm.weight", "input_layernorm.scale"),
    ("post_attention_layernorm.weight", "post_attention_layernorm.scale"),
    ("self_attn.q_norm.weight", "self_attn.q_norm.scale"),
    ("self_attn.k_norm.weight", "self_attn.k_norm.scale"),
)
_LINEARS: tuple[str, ...] = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class KeyRule:
    """One row: templates of the file's name and the module's path, and what happens in between."""

    file_name: str
    module_path: str
    transform: Transform


@dataclass(frozen=True)
class KeyTable:
    """The rows of one format. `prefix` may precede every name but `lm_head`; it is written, and optional in reading.

    ignored: names (patterns) that carry nothing.
    """

    rules: tuple[KeyRule, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def to_module(self, name: str) -> list[tuple[str, Transform]]:
        """Every (module path, transform) whose row matches the file's `name`; a sound table gives one or none."""
        matches = ((pattern.fullmatch(name), rule) for pattern, rule in zip(self._patterns, self.rules, strict=True))
        return [(_fill(rule.module_path, match), rule.transform) for match, rule in matches if match]

    def to_file(self, path: str) -> tuple[str, Transform]:
        """(name in the file, transform) of a module's parameter.

        Raises:
            KeyError: the format has no place for it.
        """
        for rule in self.rules:
            if match := re.fullmatch(_regex(rule.module_path), path):
                return self._prefixed(_fill(rule.file_name, match)), rule.transform
        raise KeyError(path)

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        optional = f"(?:{re.escape(self.prefix)})?" if self.prefix else ""
        return tuple(
            re.compile(("" if rule.file_name == LM_HEAD else optional) + _regex(rule.file_name)) for rule in self.rules
        )

    def _prefixed(self, name: str) -> str:
        return name if name == LM_HEAD else self.prefix + name


def _regex(template: str) -> str:
    return re.escape(template).replace(r"\{i\}", r"(?P<i>0|[1-9]\d*)")


def _fill(template: str, match: re.Match[str]) -> str:
    return template.replace("{i}", match.groupdict().get("i") or "")


def _layer_rules(*, biases: bool) -> tuple[KeyRule, ...]:
    rules = [KeyRule(f"layers.{{i}}.{a}", f"layers.{{i}}.{b}", "copy") for a, b in _NORM_ROWS]
    for name in _LINEARS:
        rules.append(KeyRule(f"layers.{{i}}.{name}.weight", f"layers.{{i}}.{name}.kernel", "transpose"))
        if biases:
            rules.append(KeyRule(f"layers.{{i}}.{name}.bias", f"layers.{{i}}.{name}.bias", "copy"))
    return tuple(rules)


LM_HEAD = "lm_head.weight"
_INVERSE_FREQUENCIES = r"(.*\.)?rotary_emb\.inv_freq"  # old files store what the config already says

TARGET_KEYS = KeyTable(
    rules=(
        KeyRule("embed_tokens.weight", "embed_tokens.weight", "copy"),
        *_layer_rules(biases=True),
        KeyRule("norm.weight", "norm.scale", "copy"),
        KeyRule(LM_HEAD, "lm_head.kernel", "transpose"),
    ),
    prefix="model.",
    ignored=(_INVERSE_FREQUENCIES,),
)
# Names as PEFT writes them: those of the wrapped transformers model, without the adapter's own.
ADAPTER_KEYS = KeyTable(
    rules=tuple(
        KeyRule(
            f"layers.{{i}}.{name}.lora_{letter}.weight",
            f"layers.{{i}}.{name.partition('.')[2]}.{letter.lower()}",
            "transpose",
        )
        for name in _LINEARS
        for letter in "AB"
    ),
    prefix="base_model.model.model.",
)
DRAFT_KEYS = KeyTable(
    rules=(
        KeyRule("fc.weight", "fc.kernel", "transpose"),
        KeyRule("hidden_norm.weight", "hidden_norm.scale", "copy"),
        *_layer_rules(biases=False),
        KeyRule("norm.weight", "norm.scale", "copy"),
    ),
    ignored=(_INVERSE_FREQUENCIES,),
)
