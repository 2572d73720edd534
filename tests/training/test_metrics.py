"""What people read: TensorBoard tags, log lines, rates, MFU and its FLOPs."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from converters.flax_to_hf import main as flax_to_hf
from specjax.devices import PEAKS, Peak
from specjax.models.decoder import DecoderConfig
from specjax.models.dflash import DFlashConfig
from specjax.models.layers import RopeConfig
from specjax.models.lora import LoRAConfig
from specjax.models.lora_draft import LoRADraftConfig
from specjax.models.sharding import make_mesh
from specjax.training import loop
from specjax.training.flops import StepShape, causal_lm_step_flops, dflash_step_flops, lora_step_flops, peak_flops
from specjax.training.metrics import add, readable
from specjax.weights import read_target_config
from specjax.weights.tokenizer import stop_token_ids
from tests.training.conftest import FinishedRun
from tests.training.tiny import DRAFT_ONLY, LENGTH, STEPS, STOP_TOKEN, edited, scalars, train

ACCURACIES = {"acc@1", "acc@2", "acc@3"}


def test_sums_are_added_before_they_are_divided() -> None:
    steps = [
        {
            "loss_sum": np.float32(loss),
            "weight": np.float32(weight),
            "correct": np.array([0, correct, 0], np.float32),
            "supervised": np.array([0, 4, 0], np.float32),
            "prefix": np.float32(prefix),
            "expected": np.float32(prefix / 2),
            "blocks": np.float32(2),
            "covered": np.float32(correct),
            "coverable": np.float32(8),
            "learning_rate": np.float32(7),
        }
        for loss, weight, correct, prefix in ((6, 1, 1, 3), (2, 3, 3, 5))
    ]
    metrics = readable(add(add({}, steps[0]), steps[1]))
    assert metrics["loss"] == 2.0
    assert metrics["acc@1"] == 0.5
    assert math.isnan(metrics["acc@2"])
    assert metrics["acceptance_length_tf"] == 2.0
    assert metrics["acceptance_length_sampled_tf"] == 1.0
    assert metrics["supervised_tokens"] == 8.0
    assert metrics["coverage"] == 0.25


def test_tags_of_a_draft_run(finished_run: FinishedRun) -> None:
    found = scalars(finished_run.folder)
    measures = {"loss", "acceptance_length_tf", "supervised_tokens", "coverage", *ACCURACIES}
    times = {"train/step_time_s", "train/tokens_per_s", "train/data_wait"}
    every_step = {f"train/{name}" for name in measures | {"learning_rate", "grad_norm"}}
    evaluated = measures | {"acceptance_length_sampled_tf"}
    assert set(found) == every_step | times | {f"eval/{name}" for name in evaluated}
    assert all(list(found[tag]) == list(range(1, STEPS + 1)) for tag in every_step)
    assert all(list(found[f"eval/{name}"]) == [3, STEPS] for name in evaluated)
    for step, seconds in found["train/step_time_s"].items():
        assert found["train/tokens_per_s"][step] == pytest.approx(8 * LENGTH / seconds, rel=1e-5)


def test_log_lines_and_mfu(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"logging.every_steps": 2, "logging.peak_tflops": 0.5, "training.steps": 5, "evaluation.every_steps": 4}
    run = train(edited(raw, changes))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if re.match("train|eval", line)] == [
        *("train step 2", "train step 4", "eval step 4", "train step 5", "eval step 5")
    ]
    found = scalars(run)
    line = next(line for line in lines if line.startswith("train step 4 "))
    for name in ("loss", "acc@1", "acceptance_length_tf", "learning_rate", "grad_norm", "tokens_per_s", "mfu"):
        shown = re.search(rf"  {name} (\S+)", line)
        assert shown is not None, name
        assert float(shown[1]) == pytest.approx(found[f"train/{name}"][4], rel=1e-3), name
    (stated,) = [float(line.split()[1]) for line in lines if line.startswith("mfu: ")]
    # 0.5 TFLOP/s is a device's; there are eight.
    expected = stated / found["train/step_time_s"][4] / (8 * 0.5e12)
    assert found["train/mfu"][4] == pytest.approx(expected, rel=1e-3)


def test_a_decoder_run_learns_and_is_exported(raw: dict[str, Any], target_folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(target_folder, tmp_path / "target")
    generation = {"do_sample": False, "eos_token_id": STOP_TOKEN}
    (target / "generation_config.json").write_text(json.dumps(generation))
    changes = {"kind": "causal_lm", "target.init": "random", "draft": None, "loss": None} | dict.fromkeys(DRAFT_ONLY)
    changes |= {"target.path": str(target)}
    changes |= {"optimizer.learning_rate": 1e-2, "training.steps": 20, "optimizer.weight_decay": 0.1}
    changes |= {"evaluation.every_steps": 20}
    run = train(edited(raw, changes))
    found = scalars(run)
    assert {"train/loss", "train/accuracy", "train/perplexity", "eval/loss", "eval/perplexity"} <= set(found)
    assert found["train/loss"][1] == pytest.approx(math.log(64), rel=0.05)
    assert found["eval/loss"][20] < 3.3
    assert found["eval/perplexity"][20] == pytest.approx(math.exp(found["eval/loss"][20]), rel=1e-5)
    out = tmp_path / "hf"
    flax_to_hf([str(run), str(out), "--step", "best"])
    assert read_target_config(out) == read_target_config(target_folder)
    assert stop_token_ids(out) == (STOP_TOKEN,) == stop_token_ids(target_folder)
    assert json.loads((out / "generation_config.json").read_text()) == generation


def test_the_peak_is_that_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.set_mesh(make_mesh(4, 1, 2)):
        assert peak_flops(None) is None
        assert peak_flops(0.5) == 8 * 0.5e12
        monkeypatch.setitem(PEAKS, "cpu", Peak(tflops=2.0, gb_s=1.0))
        assert (peak_flops(None), peak_flops(0.5)) == (8 * 2e12, 8 * 0.5e12)


def test_flops_of_a_step_by_hand() -> None:
    target = DecoderConfig(
        model_type="llama",
        vocab_size=1000,
        hidden_size=10,
        intermediate_size=30,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=5,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        rope=RopeConfig(),
    )
    draft = DFlashConfig.for_target(target, num_layers=2, block_size=4, mask_token_id=9, target_layer_ids=(1, 3))
    # A layer: q 10*20, k and v 10*10 each, o 20*10, three MLP matrices 10*30.
    layer = 200 + 100 + 100 + 200 + 3 * 300
    tokens, slots = 2 * 8, 2 * 3 * 4
    parts = {
        "target matrices, layers 0 to 3, forward": 2 * 4 * layer * tokens,
        "target attention, half of 8 * 8 pairs": 4 * 4 * (2 * 8 * 8 / 2) * 20,
        "draft matrices": 6 * 2 * layer * slots,
        "fc and the context's k and v": 6 * (20 * 10 + 2 * (100 + 100)) * tokens,
        "head, forward and backward to its input, three slots a block": 4 * 1000 * 10 * 2 * 3 * 3,
        "draft attention, 4 context keys and 4 own ones": 12 * 2 * (slots * (4 + 4)) * 20,
    }
    assert dflash_step_flops(target, draft, StepShape(2, 8, 3)) == sum(parts.values())
    captured = sum(value for name, value in parts.items() if not name.startswith("target"))
    assert dflash_step_flops(target, draft, StepShape(2, 8, 3), runs_target=False) == captured
    taught = dflash_step_flops(target, draft, StepShape(2, 8, 3), runs_target=False, teacher=True)
    assert taught == captured + 2 * 1000 * 10 * 2 * 3 * 3
    whole_target = 2 * 6 * layer * tokens + 4 * 6 * (2 * 8 * 8 / 2) * 20
    assert dflash_step_flops(target, draft, StepShape(2, 8, 3), teacher=True) == taught + whole_target
    lora = LoRADraftConfig(LoRAConfig(3, 1.0, target_modules=("k_proj", "down_proj")), block_size=4, mask_token_id=9)
    adapters = 3 * (10 + 10) + 3 * (30 + 10)
    parts = {
        "frozen matrices, forward and backward to their input": 4 * 6 * layer * slots,
        "adapters": 6 * 6 * adapters * slots,
        "attention of the blocks, 4 context keys without a gradient and 4 own ones": 6 * slots * (8 * 4 + 12 * 4) * 20,
        "head": 4 * 1000 * 10 * 2 * 3 * 3,
    }
    alone = sum(parts.values())
    assert lora_step_flops(target, lora, StepShape(2, 8, 3)) == alone + whole_target
    taught = alone + whole_target + 2 * 1000 * 10 * 2 * 3 * 3
    assert lora_step_flops(target, lora, StepShape(2, 8, 3), teacher=True) == taught
    adapted = replace(lora, adapt_context=True)
    context = (4 * 6 * layer + 6 * 6 * adapters) * tokens + 12 * 6 * (2 * 8 * 8 / 2) * 20
    context += 6 * slots * 4 * 4 * 20  # the context's keys have one now
    assert lora_step_flops(target, adapted, StepShape(2, 8, 3)) == alone + context
    assert lora_step_flops(target, adapted, StepShape(2, 8, 3), teacher=True) == taught + context
    expected = 6 * (6 * layer + 1000 * 10) * tokens + 12 * 6 * (2 * 8 * 8 / 2) * 20
    assert causal_lm_step_flops(target, StepShape(2, 8, 3)) == expected


def test_data_wait_is_the_share_of_a_step_that_the_next_batch_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def slow_batches(seconds: list[float]) -> Iterator[Any]:
        for wait in seconds:
            now[0] += wait
            yield {}

    one = np.ones(())
    sums = dict.fromkeys(("loss_sum", "weight", "correct", "supervised", "learning_rate", "grad_norm"), one)
    clock = loop._Clock(loop.Plan(5, 1, 1, 5, 5, 8, 1.0, None))
    shares = []
    for _ in clock.waits(slow_batches([50.0, 3.0, 3.0, 0.0])):  # the first step compiles and is not timed
        now[0] += 1
        clock.record(sums)
        shares.append(clock.summary().get("data_wait"))
    assert shares == [None, 0.75, 0.75, 0.0]
