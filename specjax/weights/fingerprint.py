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
    "first_rows": "the target's weights differ",
    "chat_template": "the chat template differs",
    "thinking": "the thinking mode differs",
}


@dataclass(frozen=True)
class TargetFingerprint:
    """first_rows: hash of embedding rows in bf16; chat_template: hash of its text; thinking: mode of the chat.

    A field that is None was not known when the fingerprint was taken, and is not compared.
    """

    first_rows: str | None = None
    chat_template: str | None = None
    thinking: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {RECORDED: asdict(self)}

    def differs(self, other: TargetFingerprint) -> list[str]:
        """Names of the fields that are known of both, and differ."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [name for name, a, b in pairs if a is not None and b is not None and a != b]


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
    """The fingerprint recorded in a draft folder or training run; None where none is.

    What another version of specjax recorded besides is passed over.
    """
    path = Path(folder) / FINGERPRINT_FILE
    if not path.exists():
        return None
    recorded = read_json(path)
    value = recorded.get(RECORDED)
    if value is None and RECORDED in recorded:
        return None
    if isinstance(value, dict):
        known = {f.name: value.get(f.name) for f in fields(TargetFingerprint)}
        if all(entry is None or isinstance(entry, str) for entry in known.values()):
            return TargetFingerprint(**known)
    raise InputError(f"{path}: {RECORDED} is {value!r}; export the draft again, or set it to null")


def fingerprint_warning(recorded: TargetFingerprint | None, served: TargetFingerprint) -> str | None:
    """One sentence naming what differs between the target a draft was trained for and the one served, or None."""
    differing = [] if recorded is None else [MEANING[name] for name in recorded.differs(served)]
    if not differing:
        return None
    differences = "; ".join(differing)
    return f"the draft was trained for another target: {differences}. Output stays exact, but expect it slower."


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
