"""What a model folder says about text: its tokenizer, the tokens that stop an answer, and the mask token."""

from __future__ import annotations

import itertools
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
    folder = model_folder(path_or_id, weights=False)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}: the tokenizer cannot be read: {error}") from error


def stop_token_ids(path_or_id: str | Path) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, else of config.json, else none."""
    folder = model_folder(path_or_id, weights=False)
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
    explicit: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    stop_ids: tuple[int, ...] = (),
    *,
    own: bool = False,
) -> int:
    """The id of MASK: `explicit`, else the tokenizer's mask token, else the first embedding row without a token.

    own: the draft embeds MASK itself, so that the id needs no embedding row; past the rows it may be the first id.

    Raises:
        InputError: there is none, it is outside the embedding, it is a pad, eos or unk token, or one of ordinary text
            (where text holds it, the draft takes it for MASK; such masks have been shipped).
    """
    if explicit is not None:
        mask, origin = explicit, "draft.mask_token_id"
    elif tokenizer is not None and tokenizer.mask_token_id is not None:
        mask, origin = tokenizer.mask_token_id, "the tokenizer's mask token"
    elif tokenizer is None and not own:
        raise InputError("draft.mask_token_id: the target has no tokenizer to take it from; set it")
    else:
        taken_ids = set(range(vocab_size) if tokenizer is None else tokenizer.get_vocab().values())
        mask = next(i for i in itertools.count() if i not in taken_ids)
        origin = "the first embedding row without a token"
    remedy = "set draft.mask_token_id to an id without a token"
    if not own:
        remedy = "set draft.mask_token_id to a row without a token, or draft.mask_embedding to own, which needs no row"
        if mask >= vocab_size:
            raise InputError(f"{origin} is {mask}, outside the embedding's {vocab_size} rows; {remedy}")
    taken = {"stop": set(stop_ids)}
    if tokenizer is not None:
        taken |= {name: {getattr(tokenizer, f"{name}_token_id")} for name in ("pad", "eos", "unk")}
    for name, ids in taken.items():
        if mask in ids:
            raise InputError(f"{origin} is {mask}, which is the {name} token; {remedy}")
    token = ordinary_token(tokenizer, mask)
    if token is not None:
        raise InputError(f"{origin} is {mask}, which is the token {token!r}; {remedy}")
    return mask


def ordinary_token(tokenizer: PreTrainedTokenizerBase | None, token_id: int) -> str | None:
    """The token of an id that text may hold; None for an id without a token or of a special one, such as a reserved."""
    if tokenizer is None or token_id == tokenizer.mask_token_id:
        return None
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is not None and added.special:
        return None
    return next((token for token, i in tokenizer.get_vocab().items() if i == token_id), None)


def mask_token_warning(mask_token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """One sentence where MASK of a draft is a token of the text that is served, as after an extension; or None."""
    token = ordinary_token(tokenizer, mask_token_id)
    if token is None:
        return None
    return (
        f"its mask token {mask_token_id} is the target's token {token!r}. Output stays exact, but expect it slower; "
        "train the draft on, with draft.init and draft.mask_embedding=own."
    )
