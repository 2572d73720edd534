"""In-training evaluation by answers: what it measures, which prompts it takes, what its sample shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specjax import generate, load_target
from specjax.blockdiff.metrics import repeated_ngrams
from specjax.data.pipeline import fixed_batches, fixed_prompts
from specjax.decoding.generate import Generation
from specjax.models.precision import matmul_precision
from specjax.training.data import open_data
from specjax.training.evaluation import Answers
from specjax.training.run import held_out_answers, mesh_of, read_data
from specjax.training.tasks import draft_task
from specjax.weights import load_run_draft
from specjax.weights.orbax_checkpoint import RUN_CHECKPOINTS, SCORE
from tests.training.tiny import LENGTH, STEPS, STOP_TOKEN, edited, parsed, scalars, train


def test_a_run_measures_real_decoding_on_held_out_prompts(
    raw: dict[str, Any], target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Answers.__call__
    monkeypatch.setattr(Answers, "__call__", lambda *arguments: measure(*arguments)._replace(score=7.5))
    rows = Path(raw["data"]["validation"][0]).read_text().splitlines()
    run = train(edited(raw, {"evaluation.prompts": len(rows), "evaluation.max_new_tokens": 9}))
    with matmul_precision(jnp.float32):
        target, draft = load_target(str(target_folder), dtype=jnp.float32), load_run_draft(run)
        prompts = [json.loads(row)["input_ids"][:5] for row in rows]
        expected = generate(target, prompts, draft, 9, (STOP_TOKEN,))
    measured = scalars(run)
    assert measured["eval/acceptance_length"][STEPS] == pytest.approx(
        np.mean([n for row in expected.rounds for n in row])
    )
    assert measured["eval/repeated_4grams"][STEPS] == pytest.approx(repeated_ngrams(expected.tokens))
    assert list(measured["eval/decode_tokens_per_s"]) == [STEPS]  # the evaluation before it compiled
    with ocp.training.Checkpointer((run / RUN_CHECKPOINTS).absolute()) as checkpointer:
        scores = {c.step: c.metrics[SCORE] for c in checkpointer.checkpoints if c.metrics}
    assert scores[STEPS] == 7.5  # by what decoding gave, and nothing teacher-forced, the best is chosen
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    (text,) = events.Tensors("eval/sample")[-1].tensor_proto.string_val
    assert any(" ".join(map(str, prompt)) in text.decode() for prompt in prompts)


def test_prompts_that_leave_no_room_are_refused(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(edited(raw, {"evaluation.prompts": 2, "evaluation.max_new_tokens": 10**6}))
    error = capsys.readouterr().err
    assert "validation data: no sample has a prompt" in error
    assert "evaluation.prompts=0" in error


def answers(generations: Sequence[Generation]) -> Answers:
    given = iter(generations)
    text = {1: "a", 2: "<b>", 3: "c\n", 4: "d"}
    return Answers(lambda *_: next(given), [[1, 1]], 4, (), lambda ids: "".join(text[i] for i in ids))


def test_the_score_is_the_acceptance_length_and_the_first_time_is_not_counted() -> None:
    measure = answers([Generation([[1, 2, 3, 4]], [[2, 1]], 0, 9.0), Generation([[4, 2, 4]], [[2]], 0, 0.5)])
    first, second = (measure(None, None) for _ in range(2))  # type: ignore[arg-type]
    assert first.metrics == {"repeated_4grams": 0, "acceptance_length": 1.5}
    assert second.metrics == {"repeated_4grams": 0, "acceptance_length": 2, "decode_tokens_per_s": 4}
    assert (first.score, second.score) == (1.5, 2)
    assert first.sample == "```\naa\n```\n\na<b>&lt;b&gt;</b>c<br>d"


def test_answers_without_a_round_have_no_acceptance_length() -> None:
    measured = answers([Generation([[1]], [[]], 0, 1.0)])(None, None)  # type: ignore[arg-type]
    assert measured.metrics == {"repeated_4grams": 0}
    assert measured.score == 0


def test_prompts_are_those_of_the_rows_that_evaluation_takes() -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 50, 12), np.arange(12) >= n) for n in (3, 4, 0, 12, 9, 2, 5)]
    rows.append((rows[0][0], np.zeros(12, bool)))  # no answer
    usable = [i for i, (_, mask) in enumerate(rows) if mask.any() and 1 <= np.argmax(mask) <= 5]
    prompts = fixed_prompts(rows, 10, longest=5)
    assert sorted(prompts) == sorted(rows[i][0][: np.argmax(rows[i][1])].tolist() for i in usable)
    (batch,) = fixed_batches(rows, 8, batch_size=8, max_length=12, num_anchors=1)
    taken = [ids[: np.argmax(mask)].tolist() for ids, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True)]
    assert [prompt for prompt in taken if prompt in prompts] == prompts
    assert fixed_prompts(rows, 2, longest=5) == prompts[:2]


def test_evaluation_takes_as_many_held_out_rows_and_prompts_as_the_config_says(raw: dict[str, Any]) -> None:
    held_out = [json.loads(line)["input_ids"] for line in Path(raw["data"]["validation"][0]).read_text().splitlines()]
    config = parsed(edited(raw, {"evaluation.samples": 5, "evaluation.prompts": 3, "evaluation.max_new_tokens": 9}))
    records = open_data(config)
    with mesh_of(config):
        _, batches = read_data(config, draft_task(config), records)
    rows = [ids[document > 0] for b in batches for ids, document in zip(b["input_ids"], b["document_ids"], strict=True)]
    taken = [row.tolist() for row in rows if row.size]
    assert len(taken) == 5
    assert all(row in [ids[:LENGTH] for ids in held_out] for row in taken)
    chosen = held_out_answers(config, records, lambda *_: Generation([], [], 0, 0))
    assert chosen is not None
    assert len(chosen.prompts) == 3
    assert all(prompt in [ids[:5] for ids in held_out] for prompt in chosen.prompts)
