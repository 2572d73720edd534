"""The names at the top of the package."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import specjax
from specjax import weights
from specjax.config import RunConfig, dump_config, parse_config
from specjax.errors import InputError
from tests.weights.tiny import draft_config, raw_config, tiny_decoder, tiny_draft

MINIMAL: dict[str, Any] = {
    "target": {"path": "embedded"},
    "draft": {"num_layers": 1, "block_size": 4, "mask_token_id": 63},
    "data": {"train": ["train.jsonl"]},
    "loss": {"gamma": 2.0},
}
NAMES = {"generate", "load_draft", "load_target", "train"}


def test_importing_specjax_imports_no_jax() -> None:
    program = (
        "import sys, specjax\n"
        "assert {'generate', 'load_target', 'train'} <= set(dir(specjax))\n"
        "heavy = {'jax', 'flax', 'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "specjax.generate\n"
        "assert 'jax' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_names_are_functions_beside_entry_points_of_the_same_name() -> None:
    import specjax.generate
    import specjax.train
    from specjax.generate import main

    assert set(specjax.__all__) == NAMES
    assert all(inspect.isfunction(getattr(specjax, name)) for name in NAMES)
    assert specjax.generate.__module__ == "specjax.decoding.generate"
    assert inspect.isfunction(main)
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        specjax.generat  # noqa: B018


def test_models_load_and_decode_without_a_mesh(tmp_path: Path) -> None:
    target = weights.save_target(tiny_decoder(raw_config(num_hidden_layers=4)), tmp_path / "target", jnp.float32)
    draft = weights.save_draft(tiny_draft(draft_config()), tmp_path / "draft", fingerprint=None)
    assert jax.sharding.get_abstract_mesh().empty
    models = specjax.load_target(target, dtype=jnp.float32), specjax.load_draft(draft, dtype=jnp.float32)
    plain = specjax.generate(models[0], [[1, 2, 3]], max_new_tokens=6)
    drafted = specjax.generate(models[0], [[1, 2, 3]], models[1], max_new_tokens=6)
    assert plain.tokens == drafted.tokens
    assert len(plain.tokens[0]) == 6


def test_train_takes_a_config_or_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"output_dir": str(tmp_path / "run"), **MINIMAL}, "test")
    calls: list[tuple[RunConfig, object, bool]] = []

    def run(config: RunConfig, *, generate: object = None, resume: bool = False) -> Path:
        calls.append((config, generate, resume))
        return Path(config.output_dir)

    monkeypatch.setattr("specjax.training.run.train", run)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    for given in (config, path, str(path)):
        assert specjax.train(given, resume=True) == tmp_path / "run"
    assert calls == [(config, specjax.generate, True)] * 3
    with pytest.raises(InputError, match=r"absent\.yaml"):
        specjax.train(tmp_path / "absent.yaml")
