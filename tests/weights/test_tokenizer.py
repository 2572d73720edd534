"""The mask token: which id it is by default, and which are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from specjax.errors import InputError
from specjax.weights.tokenizer import mask_token_warning, resolve_mask_token_id
from tests.model_folders import MASK_TOKEN, save_target_with_tokenizer


def tokenizer(mask: int | None = None, **special: int) -> Any:
    """Ids 0 to 5 and 7: the embedding's row 6 has no token, although there are seven of them; 7 is a special one."""
    ids = dict.fromkeys(("pad_token_id", "eos_token_id", "unk_token_id"))
    vocabulary = {f"token {i}": i for i in (0, 1, 2, 3, 4, 5, 7)}
    added = {5: SimpleNamespace(special=False), 7: SimpleNamespace(special=True)}
    return SimpleNamespace(
        get_vocab=lambda: vocabulary, added_tokens_decoder=added, mask_token_id=mask, **ids | special
    )


def test_an_explicit_id_comes_before_the_tokenizers_and_that_before_a_free_row() -> None:
    assert resolve_mask_token_id(7, tokenizer(mask=3), 10) == 7
    assert resolve_mask_token_id(8, tokenizer(mask=3), 10) == 8
    assert resolve_mask_token_id(None, tokenizer(mask=3), 10) == 3
    assert resolve_mask_token_id(None, tokenizer(), 10) == 6
    assert resolve_mask_token_id(None, tokenizer(pad_token_id=1, eos_token_id=2, unk_token_id=0), 10) == 6
    assert resolve_mask_token_id(9, None, 10) == 9


def test_a_row_with_a_token_is_never_taken_for_a_free_one() -> None:
    full = tokenizer()
    full.get_vocab = lambda: {f"token {i}": i for i in (0, 2, 3, 4, 1)}
    assert resolve_mask_token_id(None, full, 6) == 5
    with pytest.raises(
        InputError,
        match=r"the first embedding row without a token is 5, outside the embedding's 5 rows; .* "
        r"or draft.mask_embedding to own",
    ):
        resolve_mask_token_id(None, full, 5)


def test_a_mask_with_an_embedding_of_its_own_needs_no_row() -> None:
    """The order is the same, and where no row is free comes the first id that is neither a row nor a token."""
    assert resolve_mask_token_id(40, tokenizer(mask=3), 10, own=True) == 40
    assert resolve_mask_token_id(None, tokenizer(mask=3), 10, own=True) == 3
    assert resolve_mask_token_id(None, tokenizer(), 10, own=True) == 6
    assert resolve_mask_token_id(None, None, 10, own=True) == 10
    full = tokenizer()
    full.get_vocab = lambda: {f"token {i}": i for i in (0, 2, 3, 4, 1, 6)}
    assert resolve_mask_token_id(None, full, 5, own=True) == 5
    full.get_vocab = lambda: {f"token {i}": i for i in (0, 2, 3, 4, 1, 5)}
    assert resolve_mask_token_id(None, full, 5, own=True) == 6


@pytest.mark.parametrize(
    ("explicit", "found", "stops", "message"),
    [
        (10, tokenizer(), (), "draft.mask_token_id is 10, outside the embedding's 10 rows"),
        (5, tokenizer(), (5,), "draft.mask_token_id is 5, which is the stop token"),
        (4, tokenizer(), (), "draft.mask_token_id is 4, which is the token 'token 4'; .* draft.mask_embedding to own"),
        (5, tokenizer(), (), "draft.mask_token_id is 5, which is the token 'token 5'"),
        (2, tokenizer(eos_token_id=2), (), "draft.mask_token_id is 2, which is the eos token"),
        (1, tokenizer(pad_token_id=1), (), "which is the pad token"),
        (None, tokenizer(mask=0, unk_token_id=0), (), "the tokenizer's mask token is 0, which is the unk token"),
        (None, None, (), "the target has no tokenizer to take it from; set it"),
    ],
)
def test_other_rows_are_refused(explicit: int | None, found: Any, stops: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_mask_token_id(explicit, found, 10, stops)


@pytest.mark.parametrize(
    ("explicit", "found", "stops", "message"),
    [
        (12, tokenizer(), (12,), "draft.mask_token_id is 12, which is the stop token; set draft.mask_token_id to"),
        (2, tokenizer(eos_token_id=2), (), "draft.mask_token_id is 2, which is the eos token"),
        (4, tokenizer(), (), "draft.mask_token_id is 4, which is the token 'token 4'; set draft.mask_token_id to"),
    ],
)
def test_a_token_is_no_mask_with_an_embedding_of_its_own_either(
    explicit: int, found: Any, stops: tuple[int, ...], message: str
) -> None:
    """At an anchor that holds this token, the draft would take it for MASK."""
    with pytest.raises(InputError, match=message):
        resolve_mask_token_id(explicit, found, 10, stops, own=True)


def test_a_real_tokenizer_tells_its_special_tokens_from_those_of_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_target_with_tokenizer(tmp_path))
    rows = len(tokenizer)
    assert resolve_mask_token_id(None, tokenizer, rows) == resolve_mask_token_id(MASK_TOKEN, tokenizer, rows)
    assert mask_token_warning(MASK_TOKEN, tokenizer) is None
    assert mask_token_warning(rows, tokenizer) is None
    tokenizer.add_tokens(["<i0>"])
    assert f"mask token {rows} is the target's token '<i0>'" in (mask_token_warning(rows, tokenizer) or "")
    with pytest.raises(InputError, match=f"draft.mask_token_id is {rows}, which is the token '<i0>'"):
        resolve_mask_token_id(rows, tokenizer, rows + 8)
    tokenizer.add_tokens(["<|reserved|>"], special_tokens=True)
    assert resolve_mask_token_id(rows + 1, tokenizer, rows + 8) == rows + 1
