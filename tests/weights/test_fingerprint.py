from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.errors import InputError
from specjax.models.sharding import make_mesh
from specjax.weights import (
    fingerprint_warning,
    load_target,
    read_fingerprint,
    save_draft,
    save_target,
    target_fingerprint,
)
from specjax.weights.fingerprint import TargetFingerprint
from tests.weights.tiny import draft_config, raw_config, tiny_decoder, tiny_draft


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tiny_decoder(raw_config(), jnp.bfloat16), tmp_path_factory.mktemp("target") / "m")


def test_a_target_has_one_fingerprint_in_any_dtype_on_any_mesh(folder: Path) -> None:
    prints = {target_fingerprint(load_target(folder, dtype=dtype)) for dtype in (jnp.bfloat16, jnp.float32)}
    with jax.set_mesh(make_mesh(2, 2, 2)):
        prints.add(target_fingerprint(load_target(folder)))
    assert len(prints) == 1


def test_an_extended_target_is_the_one_it_was_as_far_as_its_rows_are(folder: Path) -> None:
    target, longer = load_target(folder), tiny_decoder(raw_config(vocab_size=80), jnp.bfloat16)
    longer.embed_tokens.weight[...] = jnp.pad(target.embed_tokens.weight[...], ((0, 16), (0, 0)))
    recorded = target_fingerprint(target)
    assert target_fingerprint(longer) == recorded
    longer.embed_tokens.weight[...] = -longer.embed_tokens.weight[...]
    assert target_fingerprint(longer) != recorded


def test_what_differs_is_named(folder: Path, tmp_path: Path) -> None:
    target = load_target(folder)
    trained = target_fingerprint(target, chat_template="{{ x }}", thinking="off")
    save_draft(tiny_draft(draft_config()), tmp_path / "draft", fingerprint=trained)
    recorded = read_fingerprint(tmp_path / "draft")
    assert recorded == trained
    assert fingerprint_warning(recorded, trained) is None
    assert fingerprint_warning(recorded, target_fingerprint(target)) is None  # unknown is not different
    assert fingerprint_warning(None, trained) is None

    def warning(**changes: str) -> str:
        served = target_fingerprint(target, **{"chat_template": "{{ x }}", "thinking": "off"} | changes)
        return fingerprint_warning(recorded, served) or ""

    assert "the chat template differs" in warning(chat_template="{{ y }}")
    assert "the thinking mode differs" in warning(thinking="on")
    weight = target.embed_tokens.weight
    weight[...] = weight[...] * np.where(np.arange(64) == 63, -1, 1).astype(jnp.bfloat16)[:, None]
    assert "the target's weights differ" in warning()


def test_what_another_version_recorded_is_not_compared(tmp_path: Path) -> None:
    assert read_fingerprint(tmp_path) is None
    old = {"embedding": "x", "chat_template": "y", "thinking": None}
    (tmp_path / "specjax.json").write_text(json.dumps({"target_fingerprint": old}))
    recorded = read_fingerprint(tmp_path)
    assert recorded == TargetFingerprint(None, "y")
    assert recorded.differs(TargetFingerprint("z", "y", "on")) == []
    assert recorded.differs(TargetFingerprint("z", "x", "on")) == ["chat_template"]


@pytest.mark.parametrize("value", [{"first_rows": 1}, ["first_rows"], "x"])
def test_a_damaged_record_is_an_error(tmp_path: Path, value: Any) -> None:
    (tmp_path / "specjax.json").write_text(json.dumps({"target_fingerprint": value}))
    with pytest.raises(InputError, match="target_fingerprint"):
        read_fingerprint(tmp_path)
