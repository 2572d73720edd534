"""Settings of a run against what it records and what its first step computes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.sharding import mesh_scope
from specjax.training.tasks import draft_task
from specjax.weights import flat_params, load_draft, load_run_draft, read_target_config, save_draft
from specjax.weights.key_tables import DRAFT_KEYS
from specjax.weights.orbax_checkpoint import RUN_DRAFT_CONFIG
from tests.blockdiff.reference import reference_loss
from tests.model_folders import MASK_TOKEN as CHAT_MASK_TOKEN
from tests.model_folders import save_target_with_tokenizer
from tests.torch_draft import TorchDraft
from tests.training.tiny import LENGTH, MASK_TOKEN, edited, parsed, scalars, train, write_rows

BLOCK, WINDOW, ALPHA = 4, 3, 0.2
EVERY_CANDIDATE = 2 * LENGTH  # anchors asked for: more than any row can give
BATCH = 8


class WindowedRun(NamedTuple):
    """folder: the run's; rows: its whole batch, a list of (tokens, loss mask)."""

    folder: Path
    rows: list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def windowed_run(raw: dict[str, Any], tmp_path: Path) -> WindowedRun:
    """Two steps with a sliding-window draft, D-PACE weights and answers that are supervised in parts."""
    path = write_rows(tmp_path / "rows.jsonl", BATCH, seed=0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["loss_mask"] = [learnt and i % 5 != 0 for i, learnt in enumerate(record["loss_mask"])]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {
        "draft.sliding_window": WINDOW,
        "loss.weighting": "dpace",
        "loss.gamma": None,
        "loss.alpha": ALPHA,
        "loss.cumulative_mask": False,
        "data.train": [str(path)],
        "data.validation": [],
        "data.num_anchors": EVERY_CANDIDATE,
        "training.steps": 2,
        "training.batch_size": BATCH,
    }
    rows = [(np.array(r["input_ids"])[:LENGTH], np.array(r["loss_mask"])[:LENGTH]) for r in records]
    return WindowedRun(train(edited(raw, changes)), rows)


def initial_draft(config: DFlashConfig, seed: int) -> TorchDraft:
    with mesh_scope():
        params = flat_params(DFlashDraft(config, rngs=nnx.Rngs(seed), dtype=jnp.float32))
    state = {}
    for path, value in params.items():
        name, transform = DRAFT_KEYS.to_file(path)
        state[name] = torch.tensor(np.asarray(value.T if transform == "transpose" else value))
    draft = TorchDraft(config)
    draft.load_state_dict(state)
    return draft


def reference_first_loss(run: WindowedRun, config: DFlashConfig, target: Path, seed: int) -> float:
    model, draft = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), initial_draft(config, seed)
    head = model.lm_head.weight.detach().numpy().T
    loss, weight = 0.0, 0.0
    for tokens, learnt in run.rows:
        anchors = np.flatnonzero(learnt[:-1] & learnt[1:])
        positions = anchors[:, None] + np.arange(BLOCK)
        inside = positions < len(tokens)
        labels = tokens[np.where(inside, positions, 0)]
        noise = np.where(np.arange(BLOCK) == 0, labels, MASK_TOKEN)
        with torch.no_grad():
            states = model(torch.tensor(tokens)[None], output_hidden_states=True).hidden_states
            hidden = draft(
                torch.cat([states[layer + 1] for layer in config.target_layer_ids], -1),
                torch.arange(len(tokens))[None],
                model.get_input_embeddings()(torch.tensor(noise))[None],
                torch.zeros(1, len(anchors), dtype=torch.int),
                torch.tensor(anchors)[None],
            ).numpy()
        mask = inside & learnt[np.where(inside, positions, 0)]
        sums = reference_loss(hidden, head, labels[None], mask[None], "dpace", ALPHA)
        loss, weight = loss + sums.loss_sum, weight + sums.weight_sum
    return loss / weight


def test_window_dpace_alpha_and_mask_rule_reach_the_recorded_draft_and_the_loss(
    windowed_run: WindowedRun, raw: dict[str, Any], target_folder: Path, tmp_path: Path
) -> None:
    config = DFlashConfig.for_target(
        read_target_config(target_folder),
        num_layers=1,
        block_size=BLOCK,
        mask_token_id=MASK_TOKEN,
        target_layer_ids=(2, 0),
        sliding_window=WINDOW,
    )
    recorded = json.loads((windowed_run.folder / RUN_DRAFT_CONFIG).read_text())
    assert (recorded["sliding_window"], recorded["layer_types"]) == (WINDOW, ["sliding_attention"])
    exported = save_draft(load_run_draft(windowed_run.folder), tmp_path / "draft", fingerprint=None)
    assert load_draft(exported).config == config
    first = scalars(windowed_run.folder)["train/loss"][1]
    assert first == pytest.approx(reference_first_loss(windowed_run, config, target_folder, raw["seed"]), rel=1e-5)


def test_chat_template_and_thinking_mode_are_recorded_with_the_draft(raw: dict[str, Any], tmp_path: Path) -> None:
    """A draft served with another template or mode is slow, and nothing but this record would show why."""
    target = save_target_with_tokenizer(tmp_path / "target")
    chat = {"target.path": str(target), "draft.mask_token_id": CHAT_MASK_TOKEN}
    chat |= {"data.chat_template_kwargs": {"enable_thinking": False, "date": "2024-07-26"}}
    with mesh_scope():
        recorded = draft_task(parsed(edited(raw, chat))).files["specjax.json"]["target_fingerprint"]
    template = (target / "chat_template.jinja").read_bytes()
    assert recorded["chat_template"] == hashlib.sha256(template).hexdigest()
    assert json.loads(recorded["thinking"]) == {"date": "2024-07-26", "enable_thinking": False}
