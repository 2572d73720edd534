"""A run that trains in seconds: a tiny target, a tiny data set, and the config that joins them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specjax.config import RunConfig, parse_config
from specjax.train import main
from specjax.weights import save_target
from tests.weights.tiny import raw_config, tiny_decoder

VOCABULARY, LENGTH, STEPS = 64, 24, 6
MASK_TOKEN, STOP_TOKEN = VOCABULARY - 1, 60
# Heads, width and vocabulary divide by 8; key/value heads do not, so a tensor axis of 8 copies them.
DRAFT_ONLY = ("data.num_anchors", "evaluation.prompts")  # which a run of another kind refuses
TARGET_SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 8, "intermediate_size": 64}


def save_tiny_target(folder: Path) -> Path:
    """A Qwen3 of 4 layers without a tokenizer; token 60 ends an answer."""
    decoder = tiny_decoder(raw_config(**TARGET_SHAPE))
    return save_target(decoder, folder, jnp.float32, extra_config={"eos_token_id": STOP_TOKEN})


def write_rows(path: Path, count: int, *, seed: int) -> Path:
    """Pre-tokenised rows that count upwards modulo 60, each by a stride of its own; the first 5 tokens are a prompt."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = int(rng.integers(12, LENGTH + 8))
            tokens = (rng.integers(0, 60) + rng.integers(1, 4) * np.arange(length)) % 60
            row = {"input_ids": tokens.tolist(), "loss_mask": [i >= 5 for i in range(length)]}
            file.write(json.dumps(row) + "\n")
    return path


def raw_run(target: Path, data: Path, out: Path) -> dict[str, Any]:
    """The sections of a run config; `data` holds train.jsonl and validation.jsonl."""
    return {
        "output_dir": str(out),
        "seed": 3,
        "target": {"path": str(target)},
        "draft": {"num_layers": 1, "target_layer_ids": [2, 0], "block_size": 4, "mask_token_id": MASK_TOKEN},
        "data": {
            "train": [str(data / "train.jsonl")],
            "validation": [str(data / "validation.jsonl")],
            "max_length": LENGTH,
            "num_anchors": 4,
        },
        "loss": {"gamma": 2.0, "chunk_blocks": 3},
        "training": {"steps": STEPS, "batch_size": 8},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 3, "samples": 12, "prompts": 0},
        "logging": {"every_steps": 1},
    }


def edited(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`raw` with `{"section.key": value}` set; None removes the key."""
    raw = json.loads(json.dumps(raw))
    for name, value in changes.items():
        *sections, key = name.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        if value is None:
            del place[key]
        else:
            place[key] = value
    return raw


def parsed(raw: dict[str, Any]) -> RunConfig:
    return parse_config(raw, "test")


def write_config(raw: dict[str, Any]) -> Path:
    """A YAML file beside the run's folder."""
    out = Path(raw["output_dir"])
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def train(raw: dict[str, Any], *arguments: str) -> Path:
    """Trains through the command line's entry point, in this process, and returns the run folder."""
    main([str(write_config(raw)), *arguments])
    return Path(raw["output_dir"])


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """TensorBoard scalars of a run: tag -> step -> value (float32), over all its event files."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
