"""A LoRA draft that starts from another one: its weights, the embedding of MASK, and what does not fit.

That a run does, too, is a test of `test_lora_run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from specjax.errors import InputError
from specjax.models.dflash import DFlashDraft
from specjax.models.lora_draft import LoRADraft
from specjax.models.sharding import mesh_scope
from specjax.training.tasks import draft_config_of, draft_task, lora_draft_config_of
from specjax.weights import flat_params, save_draft, save_target
from tests.training.test_lora_run import LORA
from tests.training.tiny import MASK_TOKEN, TARGET_SHAPE, VOCABULARY, edited, parsed, raw_run
from tests.weights.tiny import raw_config, tiny_decoder

PLAIN = {name: value for name, value in LORA.items() if name != "draft.mask_embedding"}
PLAIN |= {"draft.mask_token_id": MASK_TOKEN, "lora.target_modules": ["q_proj", "up_proj"]}
OWN = {"draft.mask_embedding": "own", "draft.mask_token_id": None}


class Sources(NamedTuple):
    """Folders of drafts for one target, and of the LoRA drafts their parameters."""

    plain: Path
    own: Path
    dflash: Path
    params: dict[Path, dict[str, np.ndarray]]


def made(raw: dict[str, Any]) -> LoRADraft | DFlashDraft:
    with mesh_scope():
        model = draft_task(parsed(raw)).model
    assert isinstance(model, LoRADraft | DFlashDraft)
    return model


@pytest.fixture(scope="module")
def sources(target_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    raw, out = raw_run(target_folder, data_folder, Path("unused")), tmp_path_factory.mktemp("sources")
    params = {}
    for name, changes in (("plain", PLAIN), ("own", PLAIN | OWN)):
        draft = jax.tree.map(lambda x: x + 1 + jnp.arange(x.size).reshape(x.shape), made(edited(raw, changes)))
        folder = save_draft(draft, out / name, fingerprint=None)
        params[folder] = {name: np.asarray(x) for name, x in flat_params(draft).items()}
    return Sources(out / "plain", out / "own", save_draft(made(raw), out / "dflash", fingerprint=None), params)


def test_it_has_the_others_weights_for_other_blocks(sources: Sources, raw: dict[str, Any]) -> None:
    """A mask embedding of the draft's own is kept; where there was none it starts as the row that stood for it."""
    others = {"draft.block_size": 8, "loss.gamma": 3.0, "lora.masked_anchor": 0.0, "lora.lora_dropout": 0.0, "seed": 8}
    row = load_file(Path(raw["target"]["path"]) / "model.safetensors")["model.embed_tokens.weight"][MASK_TOKEN]
    for source, mask, changes in (
        (sources.plain, None, {}),
        (sources.plain, row, OWN),
        (sources.own, sources.params[sources.own]["mask_embedding"], {"draft.mask_token_id": None}),
        (sources.own, None, {"draft.mask_embedding": "target"}),
    ):
        draft = made(edited(raw, PLAIN | others | {"draft.init": str(source)} | changes))
        assert draft.config.block_size == 8
        known = {name: x for name, x in sources.params[source].items() if name != "mask_embedding"}
        found = flat_params(draft)
        assert found.keys() == known.keys() | (set() if mask is None else {"mask_embedding"})
        for name, expected in (known if mask is None else known | {"mask_embedding": mask}).items():
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_without_weights_only_the_settings_are_read(sources: Sources, raw: dict[str, Any]) -> None:
    changes = {"draft.init": str(sources.own), "draft.mask_token_id": None}
    assert lora_draft_config_of(parsed(edited(raw, PLAIN | changes))).own_mask_embedding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.r": 8}, r"does not fit: r is 4, here 8; set lora\.\* to its values$"),
        ({"lora.lora_alpha": 3.0}, r"does not fit: lora_alpha is 32, here 3;"),
        ({"lora.use_rslora": True}, r"does not fit: use_rslora is False, here True"),
        (
            {"lora.target_modules": ["q_proj"]},
            r"does not fit: target_modules is \['q_proj', 'up_proj'\], here \['q_proj'\]",
        ),
        (
            {"draft.mask_token_id": 61},
            rf"mask_token_id is {MASK_TOKEN}, here 61; .*, draft\.mask_token_id too, or draft\.mask_embedding to own",
        ),
        ({"draft.init": "DFLASH"}, r"is a DFlash draft, from which a run of kind lora cannot start"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, sources: Sources, raw: dict[str, Any]
) -> None:
    changes = {"draft.init": str(sources.plain)} | changes
    if changes["draft.init"] == "DFLASH":
        changes["draft.init"] = str(sources.dflash)
    with pytest.raises(InputError, match=message):
        lora_draft_config_of(parsed(edited(raw, PLAIN | changes)))


def test_a_dflash_draft_does_not_start_from_adapters(sources: Sources, raw: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is a LoRA draft, from which a run of kind dflash cannot start"):
        draft_config_of(parsed(edited(raw, {"draft.init": str(sources.plain)})))


def test_adapters_of_a_wider_target_are_refused(sources: Sources, raw: dict[str, Any], tmp_path: Path) -> None:
    wider = raw_config(**TARGET_SHAPE | {"intermediate_size": 80}, vocab_size=VOCABULARY)
    with mesh_scope():
        raw["target"]["path"] = str(save_target(tiny_decoder(wider), tmp_path / "wider", jnp.float32))
    with pytest.raises(InputError, match=r"up_proj.* shape .*80"):
        made(edited(raw, PLAIN | {"draft.init": str(sources.plain)}))
