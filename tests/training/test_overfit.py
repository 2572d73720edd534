"""The whole way on eight answers that a draft can learn by heart: what training promises, decoding delivers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.flax_to_hf import main as flax_to_hf
from specjax import generate, load_draft, load_target
from specjax.models.precision import matmul_precision
from specjax.weights import save_target
from tests.conftest import xla_flags
from tests.training.tiny import VOCABULARY, edited, write_config
from tests.weights.tiny import raw_config, tiny_decoder

BLOCK, ANSWERS, NEW_TOKENS = 8, 8, 128


def test_a_draft_learns_eight_answers_by_heart(raw: dict[str, Any], tmp_path: Path) -> None:
    decoder = tiny_decoder(raw_config(num_hidden_layers=4, max_position_embeddings=256))
    target_folder = save_target(decoder, tmp_path / "target", jnp.float32)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCABULARY - 4, (ANSWERS, 6)).tolist()
    with matmul_precision(jnp.float32):
        target = load_target(target_folder, dtype=jnp.float32)
        answers = generate(target, prompts, None, NEW_TOKENS).tokens
    rows = [{"input_ids": p + a, "loss_mask": [0] * 6 + [1] * len(a)} for p, a in zip(prompts, answers, strict=True)]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len({token for answer in answers for token in answer}) > VOCABULARY // 4  # not one token again and again
    changes = {
        "target.path": str(target_folder),
        "data.train": [str(data)],
        "data.validation": [],
        "data.max_length": 6 + NEW_TOKENS,
        "data.num_anchors": 16,
        "draft.block_size": BLOCK,
        "draft.num_layers": 1,
        "loss.gamma": None,
        "optimizer": {"name": "muon", "learning_rate": 5e-3},
        "training": {"steps": 400, "batch_size": 8, "remat": False},
        "checkpoint.every_steps": 400,
        "logging.every_steps": 50,
    }
    config = write_config(edited(raw, changes))
    # A process of its own with one device: eight of them on two cores take ten times as long.
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    subprocess.run([sys.executable, "-m", "specjax.train", str(config)], env=environment, check=True, timeout=600)
    flax_to_hf([raw["output_dir"], str(tmp_path / "draft")])
    with matmul_precision(jnp.float32):
        draft = load_draft(tmp_path / "draft", dtype=jnp.float32)
        found = generate(target, prompts, draft, NEW_TOKENS)
    assert found.tokens == answers
    whole = [n for rounds in found.rounds for n in rounds[:-1]]  # the limit cuts the last one
    assert np.mean(whole) > 0.95 * BLOCK
