"""How long loading a model folder takes, and how much memory, against merely reading its files."""

from __future__ import annotations

import gc
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.layers import RopeConfig
from specjax.models.sharding import mesh_scope
from specjax.weights.hf_config import decoder_config_to_hf
from specjax.weights.key_tables import TARGET_KEYS
from specjax.weights.load import CONFIG_FILE, load_target, weights_dtype
from specjax.weights.module_params import abstract_module, flat_params
from specjax.weights.safetensors_files import SINGLE_FILE, model_folder, open_sound_tensors, write_safetensors

STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.001
RANDOM_BLOCK = 1 << 22

# Qwen3-0.6B's shape with an untied head: 1.5 GB in bf16, its two largest tensors 311 MB each, one of them transposed.
BENCHMARK_CONFIG = DecoderConfig(
    model_type="qwen3",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    rope=RopeConfig(theta=1e6),
    qk_norm=True,
)


def measure_load(folder: str | Path, *, repeats: int = 3) -> dict[str, Any]:
    """Times of reading the folder's files and of `load_target` at their dtype, in seconds, and peak memory in bytes.

    Cold: once each, first, after the files were dropped from the page cache (the load includes compilation).
    Warm: `repeats` interleaved pairs, medians. Extra memory is the peak of anonymous memory during a load, less what
    was there before and less the loaded model itself; None where the system does not report it.
    """
    folder = model_folder(folder)
    files = sorted(folder.glob("*.safetensors"))
    dtype = weights_dtype(folder)
    largest = max(info.nbytes for info in open_sound_tensors(folder).infos.values())
    times: dict[str, list[float]] = {"read": [], "load": []}
    extras: list[int | None] = []
    for i in range(repeats + 1):
        for name in ("read", "load"):
            if i == 0:
                _drop_from_page_cache(files)
            gc.collect()
            if name == "read":
                times[name].append(_timed(lambda: [file.read_bytes() for file in files])[0])
            else:
                seconds, extra = measured_load(folder, dtype)
                times[name].append(seconds)
                extras.append(extra)
    read, load = (statistics.median(times[name][1:]) for name in ("read", "load"))
    peak = max((x for x in extras if x is not None), default=None)
    return {
        "files_bytes": sum(file.stat().st_size for file in files),
        "dtype": dtype.name,
        "largest_tensor_bytes": largest,
        "read_cold_seconds": times["read"][0],
        "load_cold_seconds": times["load"][0],
        "read_seconds": read,
        "load_seconds": load,
        "read_all_seconds": times["read"][1:],
        "load_all_seconds": times["load"][1:],
        "ratio": load / read,
        "ratio_cold": times["load"][0] / times["read"][0],
        "peak_extra_bytes": peak,
        "peak_extra_in_largest_tensors": None if peak is None else peak / largest,
    }


def write_random_model(folder: str | Path, config: DecoderConfig = BENCHMARK_CONFIG, *, seed: int = 0) -> Path:
    """Writes a bf16 model folder with random weights of the shape of `config`, a tensor at a time."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    with mesh_scope():
        params = flat_params(abstract_module(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    specs = {}
    for path, param in params.items():
        name, transform = TARGET_KEYS.to_file(path)
        specs[name] = "BF16", tuple(param.shape[::-1] if transform == "transpose" else param.shape)
    noise = np.random.default_rng(seed).standard_normal(RANDOM_BLOCK, np.float32) * 0.02
    noise = noise.astype(ml_dtypes.bfloat16)
    write_safetensors(folder / SINGLE_FILE, specs, (np.resize(noise, shape) for _, shape in specs.values()))
    (folder / CONFIG_FILE).write_text(json.dumps(decoder_config_to_hf(config) | {"dtype": "bfloat16"}, indent=2))
    return folder


def measured_load(folder: Path, dtype: np.dtype) -> tuple[float, int | None]:
    """Seconds of `load_target`, and the peak of anonymous memory beside the loaded model, in bytes."""
    with AnonymousMemory() as memory:
        seconds, model = _timed(lambda: jax.block_until_ready(load_target(folder, dtype=dtype)))
    held = sum(shard.data.nbytes for x in jax.tree.leaves(model) for shard in x.addressable_shards)
    on_host = jax.devices()[0].platform == "cpu"
    if memory.growth is None:
        return seconds, None
    return seconds, memory.growth - (held if on_host else 0)


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _drop_from_page_cache(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):  # not on macOS, where the cold times are then warm ones
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class AnonymousMemory:
    """Samples this process's anonymous memory (RssAnon) while the block runs; `growth` is peak less start, in bytes.

    Memory-mapped files are not counted: the kernel can drop them at any time.
    """

    growth: int | None = None

    def __enter__(self) -> AnonymousMemory:
        self._stop = threading.Event()
        self._start = self._peak = self._read()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._start is not None and self._peak is not None:
            self.growth = self._peak - self._start

    def sample(self) -> None:
        """Takes the present value into account."""
        self._peak = max(self._peak or 0, self._read() or 0)

    def _sample(self) -> None:
        while self._start is not None and not self._stop.wait(SAMPLE_SECONDS):
            self.sample()

    @staticmethod
    def _read() -> int | None:
        if not STATUS.exists():
            return None
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024
