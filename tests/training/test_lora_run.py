"""Training runs of a LoRA draft: what they leave behind, resuming, meshes, memory, and settings that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from converters import flax_to_hf
from specjax import generate
from specjax.config import dump_config
from specjax.errors import InputError
from specjax.models.lora import merge
from specjax.models.lora_draft import LoRADraft
from specjax.models.sharding import make_mesh, mesh_scope
from specjax.training.memory import step_memory
from specjax.training.run import train as run_config
from specjax.training.tasks import draft_task
from specjax.weights import flat_params, load_draft, load_run_draft, load_target, read_target_config, save_target
from tests.training.test_resume import assert_same_run
from tests.training.tiny import STEPS, TARGET_SHAPE, VOCABULARY, edited, parsed, raw_run, scalars, train
from tests.weights.tiny import raw_config, tiny_decoder

LORA = {
    "kind": "lora",
    "draft.num_layers": None,
    "draft.target_layer_ids": None,
    "draft.mask_token_id": None,
    "draft.mask_embedding": "own",
    "lora.r": 4,
    "lora.lora_dropout": 0.1,
    "lora.masked_anchor": 0.5,
    "optimizer.learning_rate": 0.01,
    "evaluation.prompts": 4,
    "evaluation.max_new_tokens": 8,
    "training.remat": False,
}
OTHER = {name: value for name, value in LORA.items() if not name.startswith("lora.")}


@pytest.fixture(scope="module")
def run(target_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, on one axis of all devices."""
    return train(edited(raw_run(target_folder, data_folder, tmp_path_factory.mktemp("lora") / "run"), LORA))


def test_a_run_learns_and_its_adapters_alone_are_saved(run: Path, target_folder: Path) -> None:
    losses = scalars(run)["train/loss"]
    assert losses[STEPS] < 0.95 * losses[1]
    assert scalars(run)["eval/acceptance_length"].keys() == {3, 6}
    draft = load_run_draft(run)
    assert isinstance(draft, LoRADraft)
    assert (draft.config.block_size, draft.config.mask_token_id, draft.config.masked_anchor) == (4, VOCABULARY, 0.5)
    saved = flat_params(draft)
    layers = read_target_config(target_folder).num_hidden_layers
    assert len(saved) == 2 * 7 * layers + 1
    assert all(float(jnp.abs(x).max()) > 0 for x in saved.values()), "every b has moved away from zero"
    assert json.loads((run / "metadata.json").read_text())["target"] == str(target_folder.resolve())


def test_a_resumed_run_is_the_uninterrupted_run(run: Path, raw: dict[str, Any]) -> None:
    copied = Path(raw["output_dir"])
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "checkpoints" / str(STEPS))
    train(edited(raw, LORA), "--resume")
    assert_same_run(copied, {name: np.asarray(x) for name, x in flat_params(load_run_draft(run)).items()})


def test_a_run_starts_from_another(run: Path, raw: dict[str, Any]) -> None:
    """And from no run of another target."""
    started = edited(raw, LORA | {"draft.init": str(run), "lora.masked_anchor": 0.25})
    del started["draft"]["mask_embedding"]
    with mesh_scope():
        draft = draft_task(parsed(started)).model
    assert isinstance(draft, LoRADraft)
    assert draft.config.masked_anchor == 0.25
    known = flat_params(load_run_draft(run))
    for name, value in flat_params(draft).items():
        np.testing.assert_array_equal(value, known.pop(name), err_msg=name)
    assert not known
    wider = raw_config(**TARGET_SHAPE | {"intermediate_size": 80})
    with mesh_scope():
        other = save_target(tiny_decoder(wider), Path(raw["output_dir"]).parent / "wider", jnp.float32)
        with pytest.raises(InputError, match=r"draft.init .* is of another target: gate_proj.b has shape"):
            draft_task(parsed(edited(started, {"target.path": str(other)})))


def test_other_adapters_do_not_resume_a_run(run: Path, raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "adapter.json"
    words = {"peft_type": "LORA", "r": 4, "lora_alpha": 32.0, "lora_dropout": 0.1, "target_modules": "all-linear"}
    path.write_text(json.dumps(words | {"r": 8}), encoding="utf-8")
    copied = Path(raw["output_dir"])
    shutil.copytree(run, copied)
    filed = edited(raw, OTHER | {"lora.peft_config": str(path), "lora.masked_anchor": 0.5})
    (copied / "config.yaml").write_text(dump_config(parsed(filed)), encoding="utf-8")
    with pytest.raises(InputError, match=r"made with other adapters: adapter\.r is 4, now 8; restore them"):
        run_config(parsed(filed), resume=True)


def test_a_run_is_not_exported_into_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flax_to_hf.main([str(run), str(run)])
    assert "holds a training run, whose specjax.json would be replaced" in capsys.readouterr().err


def test_the_exported_folder_computes_the_same_in_peft(run: Path, target_folder: Path, tmp_path: Path) -> None:
    """And decodes to the target's own text."""
    folder = tmp_path / "draft"
    flax_to_hf.main([str(run), str(folder)])
    tokens = np.arange(7, 19)[None] % 60
    base = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    target = load_target(target_folder, dtype=jnp.float32)
    draft = load_draft(folder, dtype=jnp.float32, base=target.config)
    assert isinstance(draft, LoRADraft)
    assert draft.config == load_run_draft(run).config
    logits = jax.jit(lambda model, x: model.logits(model(x).hidden))
    with mesh_scope():
        ours = logits(merge(target, draft.adapters), jnp.asarray(tokens))
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5]]
    assert generate(target, prompts, draft, 12).tokens == generate(target, prompts, None, 12).tokens


def test_a_mesh_of_three_axes_trains_alike(run: Path, raw: dict[str, Any]) -> None:
    """Base and adapters are split over fsdp and tensor; the numbers that drop inputs do not depend on it."""
    other = train(edited(raw, LORA | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "data.validation": []}))
    for tag in ("train/loss", "train/grad_norm"):
        ours, theirs = scalars(other)[tag], scalars(run)[tag]
        for step, value in theirs.items():  # Adam's first steps turn rounding of tiny gradients into full updates
            np.testing.assert_allclose(ours[step], value, rtol=1e-4 if step < 3 else 1e-2, err_msg=f"{tag} {step}")


def test_beyond_the_base_only_adapters_their_moments_and_activations_take_memory(raw: dict[str, Any]) -> None:
    """No gradient, no copy: arguments are the base, three times the adapters, and the batch; and of a step over a base
    that has a hundred times the vocabulary, the arguments alone grow by it."""
    one_row = {"mesh.data": 1, "training.accumulation_steps": 8, "loss.chunk_blocks": 1}
    config = parsed(edited(raw, LORA | one_row | {"target.dtype": "float32"}))
    with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
        task = draft_task(config)
        base = sum(x.nbytes for x in jax.tree.leaves(task.frozen))
        adapters = sum(x.nbytes for x in jax.tree.leaves(task.model))
    found = step_memory(config, devices=jax.devices()[:1])
    batch = config.training.batch_size * 4 * (3 * config.data.max_length + 3 * config.data.num_anchors)
    assert 0 < found["arguments"] - base - 3 * adapters < batch + 1000
    assert base > 3 * adapters
    large = step_memory(config, vocab_size=101 * VOCABULARY, devices=jax.devices()[:1])
    grown = 2 * 64 * 100 * 4 * task.frozen.config.hidden_size  # embedding and head
    assert large["arguments"] - found["arguments"] == grown
    assert large["temporaries"] - found["temporaries"] < 0.75 * grown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora.target_modules": ["q_proj", "query"]},
            r"lora: target_modules.* the base has no query; supported are",
        ),
        ({"lora.target_modules": "lm_head"}, r"lora: target_modules"),
        ({"lora.peft_config": "BIASED"}, r"biased\.json: bias is 'all'"),
        ({"lora.peft_config": "absent.json"}, r"lora\.peft_config absent\.json: no such file; give an adapter_config"),
        ({"lora.peft_config": "FOLDER"}, r"adapter_config\.json: bias is 'all'"),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    changes: dict[str, Any], message: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    biased = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "all"}
    path = tmp_path / "biased.json"
    path.write_text(json.dumps(biased), encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text(json.dumps(biased), encoding="utf-8")
    named = {"BIASED": str(path), "FOLDER": str(tmp_path)}
    changes = {name: named.get(str(value), value) for name, value in changes.items()}
    with pytest.raises(InputError, match=message):
        run_config(parsed(edited(raw, OTHER | changes)))


def test_peft_words_from_a_file_are_the_sections(raw: dict[str, Any], tmp_path: Path) -> None:
    words = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["v_proj", "q_proj"]}
    path = tmp_path / "adapter.json"
    path.write_text(json.dumps(words | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}), encoding="utf-8")
    given = edited(raw, OTHER | {f"lora.{name}": value for name, value in words.items()})
    filed = edited(raw, OTHER | {"lora.peft_config": str(path)})
    with mesh_scope():
        first, second = (draft_task(parsed(each)).model for each in (given, filed))
    assert first.config == second.config
    assert first.config.lora.scale == 4.0
    assert first.config.lora.target_modules == ("q_proj", "v_proj")
