"""`mask_embedding.pt` against PyTorch, which writes it and reads it elsewhere."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from specjax.errors import InputError
from specjax.weights.mask_embedding_file import mask_embedding_bytes, read_mask_embedding

DTYPES = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_torch_reads_what_is_written(dtype: torch.dtype) -> None:
    expected = drawn(dtype, 32)
    values = expected.double().numpy().astype(DTYPES[dtype])
    content = mask_embedding_bytes(values, 151936)
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert set(loaded) == {"mask_token_id", "embedding"}
    assert loaded["mask_token_id"] == 151936
    assert (loaded["embedding"].dtype, loaded["embedding"].shape) == (dtype, (32,))
    assert torch.equal(loaded["embedding"], expected)
    assert mask_embedding_bytes(values, 151936) == content


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_what_torch_writes_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    table = drawn(dtype, 9, 32)
    row = table[5]  # whose file holds the whole table
    saved: list[Any] = [row, row[None], torch.nn.Parameter(row), {"embedding": row}]
    saved.append(OrderedDict(mask_token_id=151936, embedding=row.clone()))
    for i, value in enumerate(saved):
        torch.save(value, tmp_path / f"{i}.pt")
        read = read_mask_embedding(tmp_path / f"{i}.pt", 151936, 32, said_in="config.json")
        assert (read.dtype, read.shape) == (DTYPES[dtype], (32,))
        np.testing.assert_array_equal(read.astype(np.float64), row.double().numpy())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"mask_token_id": 7, "embedding": torch.zeros(32)}, "mask_token_id is 7, in config.json 151936"),
        (torch.zeros(33), r"embedding has shape \[33\]; hidden_size is 32"),
        ({"mask_token_id": 151936, "embedding": torch.zeros(3, 32)}, r"embedding has shape \[3, 32\]"),
        ({"mask_token_id": 151936}, r"is not a mask embedding \('embedding'\)"),
        ("text", "it holds a str, no tensor"),
        (torch.zeros(32, dtype=torch.int64), "it names torch.LongStorage, which describes no float tensor"),
        (torch.zeros(32, 2)[:, 0], "its values do not lie one after another"),
    ],
)
def test_another_content_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "mask_embedding.pt")
    with pytest.raises(InputError, match=message) as refused:
        read_mask_embedding(tmp_path / "mask_embedding.pt", 151936, 32, said_in="config.json")
    assert str(tmp_path / "mask_embedding.pt") in str(refused.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask_embedding.pt"
    torch.save(torch.zeros(32), path)
    whole = path.read_bytes()
    torch.save(torch.zeros(32), path, _use_new_zipfile_serialization=False)
    before_zip = path.read_bytes()
    short = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(short, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, content[:-1] if info.filename.endswith("data/0") else content)
    for content in (whole[:-40], b"", before_zip, short.getvalue()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is not a mask embedding .*; save it again with torch.save"):
            read_mask_embedding(path, 151936, 32, said_in="config.json")


class _Call:
    """Pickled, a call of `os.mkdir`."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_file_runs_no_code(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mask_embedding.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Call(tmp_path / "made")))
    with pytest.raises(InputError, match=r"it names \w+.mkdir, which describes no float tensor"):
        read_mask_embedding(tmp_path / "mask_embedding.pt", 151936, 32, said_in="config.json")
    assert not (tmp_path / "made").exists()
