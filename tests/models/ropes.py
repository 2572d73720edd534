"""Rotary settings under test, as arguments of RopeConfig, and the same in the words of transformers."""

from __future__ import annotations

from typing import Any

ROPES: dict[str, dict[str, Any]] = {
    "default": {"theta": 10000.0},
    "linear": {"theta": 500.0, "rope_type": "linear", "factor": 3.0},
    "llama3": {
        "theta": 500.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"theta": 500.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_all": {
        "theta": 500.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn_factor": {
        "theta": 500.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
    },
}


def hf_rope(rope: dict[str, Any]) -> dict[str, Any]:
    names = {"theta": "rope_theta"}
    return {"rope_type": "default"} | {names.get(name, name): value for name, value in rope.items()}
