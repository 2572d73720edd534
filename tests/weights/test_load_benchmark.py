from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from specjax.errors import InputError
from specjax.models.decoder import Decoder
from specjax.weights import load_target, orbax_checkpoint, save_checkpoint, save_target
from specjax.weights.load_benchmark import (
    BENCHMARK_CONFIG,
    STATUS,
    AnonymousMemory,
    measure_load,
    measured_load,
    write_random_model,
)
from specjax.weights.module_params import flat_params

SMALL = replace(
    BENCHMARK_CONFIG,
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    layer_types=(),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def test_random_models_load_and_are_measured(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "m", SMALL)
    assert all(0 < np.asarray(x, np.float32).std() < 0.05 for x in flat_params(load_target(folder)).values())
    result = measure_load(folder, repeats=2)
    assert result["files_bytes"] == (folder / "model.safetensors").stat().st_size
    assert result["largest_tensor_bytes"] == 64 * 32 * 2
    assert len(result["read_all_seconds"]) == len(result["load_all_seconds"]) == 2
    assert result["ratio"] == result["load_seconds"] / result["read_seconds"]


def test_damaged_folders_are_refused_before_anything_is_timed(tmp_path: Path) -> None:
    file = write_random_model(tmp_path / "m", SMALL) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated or corrupt"):
        measure_load(tmp_path / "m")
    file.write_bytes(whole.replace(b'"BF16","shape":[32]', b'"I16" ,"shape":[32]'))
    with pytest.raises(InputError, match="dtype I16 is not one of BF16, F16, F32, F64; use the unquantised model"):
        measure_load(tmp_path / "m")


@pytest.mark.skipif(not STATUS.exists(), reason="the system reports no anonymous memory")
def test_anonymous_memory_sees_an_allocation_that_is_gone_again() -> None:
    with AnonymousMemory() as memory:
        array = np.ones(1 << 27, np.uint8)  # beyond what an allocator serves from memory it holds
        memory.sample()
        del array
    assert memory.growth is not None
    assert memory.growth >= 0.9 * (1 << 27)


SHAPE = {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
LARGEST = 32768 * 512 * 2  # bytes of the largest tensors, the embedding and the head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_random_model(tmp_path / "m", replace(SMALL, **SHAPE, layer_types=()))
    assert (folder / "model.safetensors").stat().st_size > 3 * LARGEST
    return folder


@pytest.mark.skipif(not STATUS.exists(), reason="the system reports no anonymous memory")
def test_loading_takes_less_than_two_of_the_largest_tensors_beside_the_model(folder: Path) -> None:
    # Once: a second load would be given the memory that the first one has freed, and show less.
    _, extra = measured_load(folder, np.dtype(ml_dtypes.bfloat16))
    assert extra is not None
    assert extra < 2 * LARGEST


def save_orbax(model: Decoder, folder: Path) -> None:
    save_checkpoint(model, folder, {})


@pytest.mark.skipif(not STATUS.exists(), reason="the system reports no anonymous memory")
@pytest.mark.parametrize("save", [save_target, save_orbax])
def test_saving_takes_less_than_two_of_the_largest_tensors_beside_the_model(
    save: Callable[[Decoder, Path], object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax_checkpoint, "WRITE_BYTES", 0)  # so that one tensor at a time is written
    model = load_target(folder)
    with AnonymousMemory() as memory:
        save(model, tmp_path / "saved")
    assert memory.growth is not None
    assert memory.growth < 2 * LARGEST
