from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specjax.errors import InputError
from specjax.weights import read_target_config
from specjax.weights.safetensors_files import (
    ALIGNMENT,
    EMBEDDED_FOLDER,
    INDEX_FILE,
    SINGLE_FILE,
    model_folder,
    open_tensors,
    write_safetensors,
)
from specjax.weights.tokenizer import load_tokenizer, stop_token_ids
from tests.weights.tiny import raw_config

WHOLE = (slice(None), slice(None))


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 5), np.float32).astype(ml_dtypes.bfloat16),
        "b": rng.standard_normal((7, 9), np.float32),
        "c": rng.standard_normal((4,)).astype(np.float16),
    }


def test_written_files_are_what_safetensors_reads(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    specs = {"a": ("BF16", (3, 5)), "b": ("F32", (7, 9)), "c": ("F16", (4,))}
    write_safetensors(tmp_path / SINGLE_FILE, specs, arrays.values())
    read = load_file(tmp_path / SINGLE_FILE)
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].tobytes()) == (array.dtype, array.tobytes())
    with pytest.raises(ValueError, match="announced as"):
        write_safetensors(tmp_path / "other", specs, [array.T for array in arrays.values()])


def test_slices_are_the_tensors_slices(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file(arrays, tmp_path / SINGLE_FILE)
    files = open_tensors(tmp_path)
    assert files.problems == []
    for index in (WHOLE, (slice(2, 6), slice(None)), (slice(1, 5), slice(3, 8))):
        read = files.read("b", index)
        np.testing.assert_array_equal(read, arrays["b"][index])
        assert read.ctypes.data % ALIGNMENT == 0
        assert read.flags.owndata or read.base is not None
    np.testing.assert_array_equal(files.read("c", (slice(1, 3),)), arrays["c"][1:3])
    assert files.read("a", WHOLE).dtype == ml_dtypes.bfloat16


def test_what_was_read_does_not_change_with_the_file(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file(arrays, tmp_path / SINGLE_FILE)
    read = open_tensors(tmp_path).read("b", WHOLE)
    with (tmp_path / SINGLE_FILE).open("r+b") as file:
        file.write(b"\0" * (tmp_path / SINGLE_FILE).stat().st_size)
    np.testing.assert_array_equal(read, arrays["b"])


def test_truncated_and_corrupt_files_are_problems(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file(arrays, tmp_path / SINGLE_FILE)
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    for broken in (whole[:-1], whole[:4], b"", b"\xff" * 100):
        (tmp_path / SINGLE_FILE).write_bytes(broken)
        (problem,) = open_tensors(tmp_path).problems
        assert problem.startswith("model.safetensors: truncated or corrupt")


def test_index_and_shards_must_agree(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file({"a": arrays["a"]}, tmp_path / "one.safetensors")
    save_file({"b": arrays["b"]}, tmp_path / "two.safetensors")

    def problems(**weight_map: str) -> list[str]:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        return open_tensors(tmp_path).problems

    assert problems(a="one.safetensors", b="two.safetensors") == []
    assert "two.safetensors, which does not hold it" in problems(a="two.safetensors", b="two.safetensors")[0]
    assert problems(a="one.safetensors", b="gone.safetensors") == [
        "gone.safetensors: the shard is missing; fetch it again"
    ]
    assert "not a file of the folder" in problems(a="../one.safetensors")[0]
    shutil.copy(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert "in both" in problems(a="one.safetensors", b="two.safetensors")[0]
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(InputError, match="weight_map"):
        open_tensors(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no weights"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="save the model as safetensors"):
        open_tensors(tmp_path)


def test_model_folders_are_found_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder(tmp_path) == tmp_path
    assert model_folder("embedded") == EMBEDDED_FOLDER
    (tmp_path / "embedded").mkdir()
    assert model_folder("embedded") == Path("embedded")
    (tmp_path / "file").write_text("")
    for name, message in (("./nowhere", "no such folder"), ("a/b/c", "no such folder"), ("file", "is a file")):
        with pytest.raises(InputError, match=message):
            model_folder(name)


def test_hub_ids_are_downloaded_and_failures_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    names = "config.json", "tokenizer.model", "model-00001-of-00002.safetensors", "pytorch_model.bin"

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        taken = [name for name in names if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        asked.append((repo_id, taken))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder("owner/name") == tmp_path
    assert asked == [("owner/name", [*names[:3]])]
    (tmp_path / "config.json").write_text(json.dumps(raw_config()))
    for small in (read_target_config, load_tokenizer, stop_token_ids):
        asked.clear()
        small("owner/name")
        assert asked == [("owner/name", [*names[:2]])], small

    def fail(repo_id: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        InputError, match=r"owner/name: neither a local folder nor a model the hub can deliver \(offline"
    ):
        model_folder("owner/name")
