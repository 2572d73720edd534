"""A draft that starts from another draft computes what that one does, whatever layers were added, and then learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from specjax.errors import InputError
from specjax.models.dflash import DFlashDraft
from specjax.models.precision import matmul_precision
from specjax.models.sharding import SPECS, make_mesh, put
from specjax.training.tasks import draft_config_of, draft_task
from specjax.weights import (
    flat_params,
    load_draft,
    load_run_draft,
    load_target,
    save_draft,
    save_target,
    with_params,
)
from tests.training.conftest import FinishedRun
from tests.training.tiny import LENGTH, MASK_TOKEN, TARGET_SHAPE, VOCABULARY, edited, parsed, train
from tests.weights.tiny import raw_config, tiny_decoder


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with jax.set_mesh(make_mesh()), matmul_precision(jnp.float32):
        yield


@pytest.fixture
def exported(finished_run: FinishedRun, tmp_path: Path) -> Path:
    return save_draft(load_run_draft(finished_run.folder), tmp_path / "draft", fingerprint=None)


def hidden(draft: DFlashDraft, block_size: int) -> np.ndarray:
    """What the draft makes of a block of random noise after a random context."""
    taps, noise = (
        jax.random.normal(jax.random.key(i), (2, *shape))
        for i, shape in enumerate([(LENGTH, draft.fc.kernel.shape[0]), (1, block_size, draft.config.hidden_size)])
    )
    return np.asarray(_hidden(draft, taps, noise))


@jax.jit
def _hidden(draft: DFlashDraft, taps: jax.Array, noise: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))
    start, stop = jnp.zeros((2, 1), jnp.int32), jnp.full((2, 1), 7, jnp.int32)
    return draft(noise, draft.context_kv(draft.context(taps), positions), start, stop)


@pytest.mark.parametrize(("layers", "block_size"), [(1, 4), (3, 4), (2, 6)])
def test_it_computes_what_it_started_from(
    layers: int, block_size: int, raw: dict[str, Any], exported: Path, finished_run: FinishedRun
) -> None:
    float32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    sources = {exported: load_draft(exported, **float32), finished_run.folder: load_run_draft(finished_run.folder)}
    for source, old in sources.items():
        changes = {"draft.init": str(source), "draft.num_layers": layers, "draft.block_size": block_size, "seed": 9}
        draft = draft_task(parsed(edited(raw, changes))).model
        assert isinstance(draft, DFlashDraft)
        assert (draft.config.num_hidden_layers, draft.config.block_size) == (layers, block_size)
        np.testing.assert_allclose(hidden(draft, block_size), hidden(old, block_size), rtol=1e-6, atol=1e-6)
        assert {x.dtype for x in jax.tree.leaves(draft)} == {jnp.dtype(jnp.float32)}


def own_mask(draft: DFlashDraft, mask_token_id: int, row: np.ndarray) -> DFlashDraft:
    """The same draft with a mask embedding of its own."""
    config = replace(draft.config, mask_token_id=mask_token_id, own_mask_embedding=True)
    made = DFlashDraft(config, rngs=nnx.Rngs(0), dtype=draft.dtype)
    return with_params(made, flat_params(draft) | {"mask_embedding": put(row, SPECS.mask_embedding_d)})


def embedding(target: Path) -> np.ndarray:
    return load_file(target / "model.safetensors")["model.embed_tokens.weight"]


def started(raw: dict[str, Any], init: Path, **changes: Any) -> DFlashDraft:
    given = {"draft.init": str(init)} | {f"draft.{name}": value for name, value in changes.items()}
    draft = draft_task(parsed(edited(raw, given))).model
    assert isinstance(draft, DFlashDraft)
    return draft


def test_a_mask_embedding_starts_as_what_stood_for_it(raw: dict[str, Any], exported: Path, target_folder: Path) -> None:
    """The target's row where the draft had none of its own, under any mask token."""
    row = embedding(target_folder)[MASK_TOKEN]
    for changes in ({"mask_token_id": None}, {"mask_token_id": MASK_TOKEN}, {"mask_token_id": 500}):
        draft = started(raw, exported, mask_embedding="own", **changes)
        assert draft.config.mask_token_id == (changes["mask_token_id"] or VOCABULARY)
        np.testing.assert_array_equal(flat_params(draft)["mask_embedding"], row)


def test_a_mask_embedding_is_kept_unless_the_config_drops_it(
    raw: dict[str, Any], exported: Path, tmp_path: Path
) -> None:
    row = np.arange(32, dtype=np.float32)  # exact in bfloat16
    old = own_mask(load_draft(exported, dtype=jnp.float32), 500, row)
    folder = save_draft(old, tmp_path / "own", fingerprint=None)
    for setting in (None, "own"):
        draft = started(raw, folder, **({} if setting is None else {"mask_embedding": setting}))
        assert draft.config == replace(old.config, mask_token_id=MASK_TOKEN)
        np.testing.assert_array_equal(flat_params(draft)["mask_embedding"], row)
        np.testing.assert_allclose(hidden(draft, 4), hidden(old, 4), rtol=1e-6, atol=1e-6)
    dropped = started(raw, folder, mask_embedding="target")
    assert dropped.mask_embedding is None
    np.testing.assert_allclose(hidden(dropped, 4), hidden(old, 4), rtol=1e-6, atol=1e-6)


@pytest.fixture
def extended(target_folder: Path, tmp_path: Path) -> Path:
    """The target with eight more rows."""
    raw = json.loads((target_folder / "config.json").read_text())
    longer = tiny_decoder(raw_config(**TARGET_SHAPE, vocab_size=VOCABULARY + 8))
    params, old = flat_params(longer), flat_params(load_target(target_folder, dtype=jnp.float32))
    for name, value in old.items():
        new = np.array(params[name])
        new[tuple(slice(n) for n in value.shape)] = value
        params[name] = put(new, value.sharding.spec)
    folder = save_target(with_params(longer, params), tmp_path / "extended", jnp.float32)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == raw["vocab_size"] + 8
    return folder


def test_a_draft_starts_for_a_target_that_was_extended(raw: dict[str, Any], exported: Path, extended: Path) -> None:
    raw = edited(raw, {"target.path": str(extended)})
    old = load_draft(exported, dtype=jnp.float32)
    draft = started(raw, exported)
    assert draft.config == replace(old.config, vocab_size=VOCABULARY + 8)
    np.testing.assert_allclose(hidden(draft, 4), hidden(old, 4), rtol=1e-6, atol=1e-6)


def test_a_mask_token_that_became_a_token_of_the_target_needs_an_embedding_of_its_own(
    raw: dict[str, Any], exported: Path, extended: Path
) -> None:
    """The tokenizer of the extended target names every row; before, MASK's had none."""
    vocabulary = {f"t{i}": i for i in range(VOCABULARY + 8)} | {"[UNK]": VOCABULARY + 8}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(extended)
    raw = edited(raw, {"target.path": str(extended), "draft.init": str(exported)})
    with pytest.raises(InputError, match=rf"mask_token_id is {MASK_TOKEN}, which is the token 't{MASK_TOKEN}'; .* own"):
        draft_config_of(parsed(raw))
    with pytest.raises(InputError, match=r"without a token is 73, outside the embedding's 72 rows; .* own, which"):
        draft_config_of(parsed(edited(raw, {"draft.mask_token_id": None})))
    own = edited(raw, {"draft.mask_token_id": None, "draft.mask_embedding": "own"})
    draft = draft_task(parsed(own)).model
    assert isinstance(draft, DFlashDraft)
    assert (draft.config.mask_token_id, draft.config.vocab_size) == (VOCABULARY + 9, VOCABULARY + 8)
    np.testing.assert_array_equal(flat_params(draft)["mask_embedding"], embedding(extended)[MASK_TOKEN])


def test_a_target_without_the_masks_row_is_refused(raw: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    smaller = save_target(tiny_decoder(raw_config(**TARGET_SHAPE, vocab_size=56)), tmp_path / "smaller", jnp.float32)
    raw = edited(raw, {"target.path": str(smaller), "draft.init": str(exported)})
    with pytest.raises(InputError, match=f"draft.mask_token_id is {MASK_TOKEN}, outside the embedding's 56 rows"):
        draft_config_of(parsed(raw))
    own = draft_task(parsed(edited(raw, {"draft.mask_embedding": "own"}))).model  # its row is the mean: it has no other
    np.testing.assert_allclose(flat_params(own)["mask_embedding"], embedding(smaller).mean(0), rtol=1e-5, atol=1e-7)


def test_added_layers_learn(raw: dict[str, Any], exported: Path) -> None:
    run = train(edited(raw, {"draft.init": str(exported), "draft.num_layers": 2, "data.validation": []}))
    params = flat_params(load_run_draft(run))
    for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", "mlp.up_proj"):
        assert np.abs(params[f"layers.1.{name}.kernel"]).max() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft.target_layer_ids": [0, 2]}, "target_layer_ids is [2, 0], here [0, 2]"),
        (
            {"draft.mask_token_id": MASK_TOKEN - 1},
            f"mask_token_id is {MASK_TOKEN}, here {MASK_TOKEN - 1}; set draft.* to its values, or draft.mask_embedding",
        ),
        ({"draft.sliding_window": 5}, "sliding_window is None, here 5"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, raw: dict[str, Any], exported: Path
) -> None:
    with pytest.raises(InputError) as refused:
        draft_config_of(parsed(edited(raw, {"draft.init": str(exported)} | changes)))
    assert str(refused.value).startswith(f"draft.init {exported} does not fit: {message}")


def test_a_folder_without_a_draft_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"draft.init: {tmp_path}/config.json: no such file.*a run, or a hub id"):
        draft_config_of(parsed(edited(raw, {"draft.init": str(tmp_path)})))


def test_layers_can_only_be_added(raw: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    two = parsed(edited(raw, {"draft.init": str(exported), "draft.num_layers": 2}))
    folder = save_draft(draft_task(two).model, tmp_path / "two", fingerprint=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_layers is 2, here 1; it can only grow"):
        draft_config_of(parsed(edited(raw, {"draft.init": str(folder)})))
