"""Model folders as a user has them: a tiny target with a tokenizer, and a draft made for it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from transformers import AutoTokenizer

from specjax.data.embedded import train_tokenizer, word_problems
from specjax.weights import load_target, read_target_config, save_draft, save_target, target_fingerprint
from tests.weights.tiny import draft_config, raw_config, tiny_decoder, tiny_draft

LAYERS, POSITIONS, MASK_TOKEN, STOP_TOKEN = 4, 512, 3, 2


def save_target_with_tokenizer(folder: Path, *, scale: float = 1.0) -> Path:
    """A random Qwen3 of 4 layers in float32, and the embedded target's tokenizer trained on a few word problems.

    scale: of every weight; another scale makes another target.
    """
    train_tokenizer(word_problems(60, 0, "train"), folder)
    vocabulary = -(-len(AutoTokenizer.from_pretrained(folder)) // 8) * 8
    raw = raw_config(vocab_size=vocabulary, num_hidden_layers=LAYERS, max_position_embeddings=POSITIONS)
    target = jax.tree.map(lambda x: scale * x, tiny_decoder(raw))
    return save_target(target, folder, jnp.float32, extra_config={"eos_token_id": STOP_TOKEN})


def save_draft_for(target: Path, folder: Path, *, hidden_size: int = 32) -> Path:
    """A random draft of block size 4 for `target`, with its fingerprint."""
    config = draft_config(
        hidden_size=hidden_size,
        vocab_size=read_target_config(target).vocab_size,
        num_target_layers=LAYERS,
        mask_token_id=MASK_TOKEN,
        max_position_embeddings=POSITIONS,
    )
    template = target / "chat_template.jinja"
    fingerprint = target_fingerprint(
        load_target(target, dtype=jnp.float32),
        chat_template=template.read_text() if template.exists() else None,
        thinking="{}",
    )
    return save_draft(tiny_draft(config), folder, fingerprint=fingerprint)


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
