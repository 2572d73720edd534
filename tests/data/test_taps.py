"""The cache of taps: what was written comes back, and nothing else ever does."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from specjax.data.pipeline import TrainingData
from specjax.data.taps import TapCache, TapRecipe, shard_path, start_cache, write_shard
from specjax.errors import InputError

RECIPE = TapRecipe(target="abc", target_layer_ids=(1, 3), dtype="bfloat16", max_length=6, examples=3)
LENGTHS = (4, 9, 2)  # the second is cut to max_length
TOKENS = [np.arange(100 * i, 100 * i + n) for i, n in enumerate(LENGTHS)]
SHAPES = [(min(n, 6), 10) for n in LENGTHS]
STATES = [np.random.default_rng(i).normal(size=shape).astype(ml_dtypes.bfloat16) for i, shape in enumerate(SHAPES)]


@pytest.fixture
def folder(tmp_path):
    """Examples 2 and 0 in the first shard, 1 in the second."""
    out = tmp_path / "taps"
    assert start_cache(out, RECIPE, "data", 2) == [0, 1]
    write_shard(out, 0, [2, 0], [TOKENS[2], TOKENS[0]], [STATES[2], STATES[0]])
    assert start_cache(out, RECIPE, "data", 2) == [1]
    write_shard(out, 1, [1], [TOKENS[1][:6]], [STATES[1]])
    assert start_cache(out, RECIPE, "data", 2) == []
    return out


def test_every_example_comes_back_as_it_was(folder):
    cache = TapCache(folder, RECIPE)
    for i, (tokens, taps) in enumerate(zip(TOKENS, STATES, strict=True)):
        found = cache.read(i, tokens)
        assert found.dtype == taps.dtype
        np.testing.assert_array_equal(found, taps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "other"}, "target is 'abc', now 'other'"),
        ({"target_layer_ids": (1, 2)}, r"target_layer_ids is \[1, 3\], now \[1, 2\]"),
        ({"dtype": "float32"}, "dtype is 'bfloat16', now 'float32'"),
        ({"examples": 4}, "examples is 3, now 4"),
        ({"max_length": 5}, "max_length is 6, now 5"),
    ],
)
def test_a_cache_of_something_else_is_refused(folder, change, message):
    other = dataclasses.replace(RECIPE, **change)
    with pytest.raises(InputError, match=message):
        TapCache(folder, other)
    with pytest.raises(InputError, match=message):
        start_cache(folder, other, "data", 2)


def test_a_shard_removes_what_a_killed_process_left_of_it(folder):
    others = {"mine.partial", "taps-00001.safetensors.7.partial"}
    for name in (*others, "taps-00000.safetensors.7.partial"):
        (folder / name).touch()
    write_shard(folder, 0, [2, 0], [TOKENS[2], TOKENS[0]], [STATES[2], STATES[0]])
    assert {path.name for path in folder.glob("*.partial")} == others


def test_a_cache_of_other_tokens_or_another_version_is_not_continued(folder):
    with pytest.raises(InputError, match="data is 'data', now 'changed'; restore these settings, or capture into"):
        start_cache(folder, RECIPE, "changed", 2)
    index = folder / "cache.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format_version": 1}))
    with pytest.raises(InputError, match="format_version is 1, now 3"):
        TapCache(folder, RECIPE)


def test_an_example_without_tokens_weighs_nothing(tmp_path):
    recipe = dataclasses.replace(RECIPE, examples=2)
    start_cache(tmp_path / "taps", recipe, "data", 1)
    none = np.zeros(0, np.int64)
    write_shard(tmp_path / "taps", 0, [0, 1], [TOKENS[0], none], [STATES[0], STATES[0][:0]])
    source = [(TOKENS[0], np.ones(len(TOKENS[0]), bool)), (none, none.astype(bool))]
    sizes = {"batch_size": 2, "max_length": 6, "num_anchors": 2}
    data = TrainingData(source, **sizes, seed=0, epochs=None, taps=TapCache(tmp_path / "taps", recipe))
    states = data.batch(0)["states"]
    assert (states.shape, states.dtype) == ((2, 6, 10), STATES[0].dtype)
    assert sorted(np.abs(row).sum() > 0 for row in states.astype(np.float32)) == [False, True]


def test_changed_tokens_are_refused(folder):
    cache = TapCache(folder, RECIPE)
    with pytest.raises(InputError, match="sample 0 has other tokens than when its taps were captured"):
        cache.read(0, TOKENS[0] + 1)
    with pytest.raises(InputError, match="sample 0 has other tokens"):
        cache.read(0, TOKENS[0][:3])


def test_a_flipped_bit_is_found(folder):
    path = shard_path(folder, 1)
    data = bytearray(path.read_bytes())
    at = data.index(STATES[1].tobytes())
    data[at + 7] ^= 1
    path.write_bytes(data)
    cache = TapCache(folder, RECIPE)
    with pytest.raises(InputError, match=r"taps-00001\.safetensors: the taps of sample 1 are damaged"):
        cache.read(1, TOKENS[1])
    cache.read(0, TOKENS[0])


def test_incomplete_caches_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"no cache.json; write it with python -m specjax.capture"):
        TapCache(tmp_path / "nothing", RECIPE)
    path = shard_path(folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"taps-00001\.safetensors: truncated or corrupt"):
        TapCache(folder, RECIPE)
    path.unlink()
    with pytest.raises(InputError, match=r"taps-00001\.safetensors: is missing; finish the cache"):
        TapCache(folder, RECIPE)
    index = folder / "cache.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"shards": 1}))
    with pytest.raises(InputError, match="some examples have no taps"):
        TapCache(folder, RECIPE)
    index.write_text("")
    with pytest.raises(InputError, match=r"cache.json: not a JSON object .*; capture into another folder"):
        TapCache(folder, RECIPE)
