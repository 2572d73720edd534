"""What a model folder says about text: its tokenizer, the tokens that stop an answer, and the mask token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from specjax.errors import InputError
from specjax.weights.config_fields import read_json
from specjax.weights.safetensors_files import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder or hub id; None where the folder holds none.

    Raises:
        InputError: the tokenizer's files are broken.
    """
    folder = model_folder(path_or_id)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}: the tokenizer cannot be read: {error}") from error


def stop_token_ids(path_or_id: str | Path) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, else of config.json, else none."""
    folder = model_folder(path_or_id)
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = read_json(path).get("eos_token_id") if path.exists() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise InputError(f"{path}: eos_token_id is {value!r}; give a token id or a list of them")
            return tuple(ids)
    return ()


def resolve_mask_token_id(
    explicit: int | None, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, stop_ids: tuple[int, ...] = ()
) -> int:
    """The id of MASK: `explicit`, else the tokenizer's mask token, else the first embedding row without a token.

    Raises:
        InputError: there is none, it is outside the embedding, or it is a pad, eos or unk token (a mask that occurs
            in ordinary text teaches the draft nothing and has been shipped as such).
    """
    if explicit is not None:
        mask, origin = explicit, "draft.mask_token_id"
    elif tokenizer is None:
        raise InputError("draft.mask_token_id: the target has no tokenizer to take it from; set it")
    elif tokenizer.mask_token_id is not None:
        mask, origin = tokenizer.mask_token_id, "the tokenizer's mask token"
    else:
        taken_ids = set(tokenizer.get_vocab().values())
        unused = (i for i in range(vocab_size) if i not in taken_ids)
        mask, origin = next(unused, vocab_size), "the first embedding row without a token"
    if not 0 <= mask < vocab_size:
        raise InputError(f"{origin} is {mask}, outside the embedding's {vocab_size} rows; set draft.mask_token_id")
    taken = {"stop": set(stop_ids)}
    if tokenizer is not None:
        taken |= {name: {getattr(tokenizer, f"{name}_token_id")} for name in ("pad", "eos", "unk")}
    for name, ids in taken.items():
        if mask in ids:
            raise InputError(f"{origin} is {mask}, which is the {name} token; set draft.mask_token_id to an unused row")
    return mask
