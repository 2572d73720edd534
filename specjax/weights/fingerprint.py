"""Which target a draft was trained for: recorded at export, compared at decoding.

A draft beside the wrong target, chat template or thinking mode decodes correctly and slowly, and nothing else shows
it: the output is the target's own.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from specjax.errors import InputError
from specjax.models.decoder import Decoder
from specjax.models.sharding import BATCH, SPECS, axis_size, mesh_scope, put
from specjax.weights.config_fields import read_json
from specjax.weights.load import read_target_config
from specjax.weights.safetensors_files import model_folder, open_sound_tensors

FINGERPRINT_FILE = "specjax.json"
RECORDED = "target_fingerprint"
UNKNOWN: dict[str, Any] = {RECORDED: None}  # where the file says other things of the draft
ROWS = 64  # the first ones: common tokens, which a target that gets more rows keeps where they are

MEANING = {
    "embedding": "the target's weights differ",
    "chat_template": "the chat template differs",
    "thinking": "the thinking mode differs",
}


@dataclass(frozen=True)
class TargetFingerprint:
    """embedding: hash of the first embedding rows in bf16; chat_template: hash of its text; thinking: mode of the chat.

    A field that is None was not known when the fingerprint was taken, and is not compared.
    """

    embedding: str
    chat_template: str | None = None
    thinking: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {RECORDED: asdict(self)}


def target_fingerprint(
    target: Decoder, *, chat_template: str | None = None, thinking: str | None = None
) -> TargetFingerprint:
    """The fingerprint of `target` as it is served; equal whether it was loaded in bf16 or fp32, on any mesh.

    A target that has since got more embedding rows, and kept its own, has the same.
    """
    rows = np.arange(min(ROWS, target.config.vocab_size), dtype=np.int32)
    with mesh_scope():
        copies = np.tile(rows, (axis_size(*BATCH), 1))
        embedded = _embedded(target, put(copies, SPECS.act_bt))
        values = np.asarray(jax.block_until_ready(embedded).addressable_shards[0].data)[0]
    template = None if chat_template is None else _hash(chat_template.encode())
    return TargetFingerprint(_hash(values.astype(ml_dtypes.bfloat16).tobytes()), template, thinking)


@jax.jit
def _embedded(target: Decoder, tokens_bt: jax.Array) -> jax.Array:
    return target.embed(tokens_bt).astype(jnp.bfloat16)


def target_digest(path_or_id: str | Path) -> str:
    """Hash of a target's folder or hub id: its architecture, and names, shapes, first and last rows of its tensors.

    Unlike the fingerprint it tells fine-tunes of one model apart, and depends on how the file stores them.
    """
    files = open_sound_tensors(model_folder(path_or_id))
    digest = hashlib.sha256(repr(read_target_config(path_or_id)).encode())
    for name, info in sorted(files.infos.items()):
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        for row in (slice(0, 1), slice(-1, None)) if len(info.shape) > 1 else (slice(None),):
            digest.update(files.read(name, (row,)).tobytes())
    return digest.hexdigest()


def read_fingerprint(folder: str | Path) -> TargetFingerprint | None:
    """The fingerprint recorded in a draft folder or training run; None where none is."""
    path = Path(folder) / FINGERPRINT_FILE
    if not path.exists():
        return None
    recorded = read_json(path)
    value = recorded.get(RECORDED)
    if value is None and RECORDED in recorded:
        return None
    if not isinstance(value, dict) or set(value) != {f.name for f in fields(TargetFingerprint)}:
        raise InputError(f"{path}: {RECORDED} is {value!r}; export the draft again, or set it to null")
    return TargetFingerprint(**value)


def fingerprint_warning(recorded: TargetFingerprint | None, served: TargetFingerprint) -> str | None:
    """One sentence naming what differs between the target a draft was trained for and the one served, or None."""
    if recorded is None:
        return None
    pairs = ((f.name, getattr(recorded, f.name), getattr(served, f.name)) for f in fields(TargetFingerprint))
    differing = [MEANING[name] for name, a, b in pairs if a is not None and b is not None and a != b]
    if not differing:
        return None
    return (
        f"the draft was trained for another target: {'; '.join(differing)}. Output stays exact, but expect it slower."
    )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
