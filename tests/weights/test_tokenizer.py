"""The mask token: which row it is by default, and which rows are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from specjax.errors import InputError
from specjax.weights.tokenizer import resolve_mask_token_id


def tokenizer(mask: int | None = None, **special: int) -> Any:
    """Ids 0 to 5 and 7: the embedding's row 6 has no token, although there are seven of them."""
    ids = dict.fromkeys(("pad_token_id", "eos_token_id", "unk_token_id"))
    vocabulary = {f"token {i}": i for i in (0, 1, 2, 3, 4, 5, 7)}
    return SimpleNamespace(get_vocab=lambda: vocabulary, mask_token_id=mask, **ids | special)


def test_an_explicit_id_comes_before_the_tokenizers_and_that_before_a_free_row() -> None:
    assert resolve_mask_token_id(4, tokenizer(mask=3), 10) == 4
    assert resolve_mask_token_id(None, tokenizer(mask=3), 10) == 3
    assert resolve_mask_token_id(None, tokenizer(), 10) == 6
    assert resolve_mask_token_id(None, tokenizer(pad_token_id=1, eos_token_id=2, unk_token_id=0), 10) == 6
    assert resolve_mask_token_id(9, None, 10) == 9


def test_a_row_with_a_token_is_never_taken_for_a_free_one() -> None:
    full = tokenizer()
    full.get_vocab = lambda: {f"token {i}": i for i in (0, 2, 3, 4, 1)}
    assert resolve_mask_token_id(None, full, 6) == 5
    with pytest.raises(
        InputError, match="the first embedding row without a token is 5, outside the embedding's 5 rows"
    ):
        resolve_mask_token_id(None, full, 5)


@pytest.mark.parametrize(
    ("explicit", "found", "stops", "message"),
    [
        (10, tokenizer(), (), "draft.mask_token_id is 10, outside the embedding's 10 rows"),
        (5, tokenizer(), (5,), "draft.mask_token_id is 5, which is the stop token"),
        (2, tokenizer(eos_token_id=2), (), "draft.mask_token_id is 2, which is the eos token"),
        (1, tokenizer(pad_token_id=1), (), "which is the pad token"),
        (None, tokenizer(mask=0, unk_token_id=0), (), "the tokenizer's mask token is 0, which is the unk token"),
        (None, None, (), "the target has no tokenizer to take it from; set it"),
    ],
)
def test_other_rows_are_refused(explicit: int | None, found: Any, stops: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_mask_token_id(explicit, found, 10, stops)
