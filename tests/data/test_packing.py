"""Packing: the plan against a plain loop, packed streams against unpacked ones, and the losses of both."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specjax.data.conversations import JsonlRecords
from specjax.data.packing import one_sample_a_row, pack
from specjax.data.pipeline import TrainingData, read_examples
from specjax.errors import InputError
from specjax.models.decoder import Decoder, DecoderConfig
from specjax.models.dflash import DFlashConfig, DFlashDraft
from specjax.models.layers import RopeConfig
from specjax.models.sharding import mesh_scope
from specjax.training.objectives import BlockDiffusionLoss, CausalLMLoss

ROW = 24
# With as many anchors as tokens, every document asks for all of its candidates.
OPTIONS = {"batch_size": 4, "max_length": ROW, "num_anchors": ROW, "seed": 7, "epochs": 2, "packing": True}
MANY = 40


def lengths_of(kind, count=400, seed=0):
    rng = np.random.default_rng(seed)
    drawn = {
        "conversations": rng.lognormal(np.log(300), 0.9, count).astype(int),
        "uniform": rng.integers(0, 700, count),
        "equal": np.full(count, 200),
        "whole rows": np.full(count, 512),
        "empty": np.zeros(count, int),
    }
    return drawn[kind]


def make_source(count=MANY):
    """Sample i holds 1 + 7 * i % 29 tokens 100 * i, ..., supervised from the third on; samples 3 and 8 are special."""
    lengths = [1 + 7 * i % 29 for i in range(count)]
    source = [(100 * i + np.arange(length), np.arange(length) >= 2) for i, length in enumerate(lengths)]
    source[3] = (np.arange(300, 304), np.zeros(4, bool))  # nothing to learn
    source[8] = (np.arange(0), np.zeros(0, bool))
    return source


def documents(batch):
    """(sample id, tokens, loss mask, anchors relative to the document) of every document of a batch, row by row."""
    found = []
    for row in range(len(batch["input_ids"])):
        ids = batch["document_ids"][row]
        anchors = batch["anchors"][row][batch["anchor_valid"][row]]
        for document in sorted(set(ids[ids > 0])):
            positions = np.flatnonzero(ids == document)
            tokens = batch["input_ids"][row][positions]
            own = anchors[ids[anchors] == document] - positions[0]
            found.append((tokens[0] // 100, tokens.tolist(), batch["loss_mask"][row][positions].tolist(), own.tolist()))
    return found


def assert_same_stream(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("kind", ["conversations", "uniform", "equal", "whole rows", "empty"])
def test_every_sample_is_in_exactly_one_row_that_holds_it(kind):
    lengths = np.minimum(lengths_of(kind), 512)
    plan = pack(lengths_of(kind), 512, seed=0)
    rows = [plan[r].tolist() for r in range(len(plan))]
    assert sorted(sample for row in rows for sample in row) == list(range(400))
    assert all(rows)
    assert max(lengths[row].sum() for row in rows) <= 512


@pytest.mark.parametrize("kind", ["conversations", "uniform"])
def test_rows_are_as_full_as_those_of_a_plain_best_fit_loop(kind):
    lengths = np.minimum(lengths_of(kind), 512)
    filled: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row, used in enumerate(filled) if used + length <= 512]
        if fitting:
            filled[max(fitting, key=lambda row: filled[row])] += length
        else:
            filled.append(length)
    plan = pack(lengths, 512, seed=3)
    assert sorted(lengths[plan[r]].sum() for r in range(len(plan))) == sorted(filled)


def test_rows_of_a_realistic_mix_are_nearly_full():
    lengths = lengths_of("conversations", 5000)
    plan = pack(lengths, 2048, seed=0)
    apart = np.minimum(lengths, 2048).sum() / (5000 * 2048)
    assert apart < 0.3
    assert np.minimum(lengths, 2048).sum() / (len(plan) * 2048) > 0.97


def test_the_seed_decides_which_samples_meet():
    lengths = lengths_of("conversations") // 50 * 50
    plans = [pack(lengths, 512, seed=seed) for seed in (0, 0, 1)]
    rows = [{tuple(sorted(plan[r].tolist())) for r in range(len(plan))} for plan in plans]
    np.testing.assert_array_equal(plans[0].samples, plans[1].samples)
    np.testing.assert_array_equal(plans[0].first, plans[1].first)
    assert len(rows[0] & rows[2]) < len(rows[0]) / 2


def test_a_sample_that_is_cut_fills_its_row():
    plan = pack(np.array([1, 9, 0, 8, 7]), 8, seed=0)
    rows = sorted(sorted(set(plan[r].tolist()) - {2}) for r in range(len(plan)))  # the empty sample goes anywhere
    assert rows == [[0, 4], [1], [3]]


def test_one_sample_a_row():
    plan = one_sample_a_row(3)
    assert [plan[r].tolist() for r in range(len(plan))] == [[0], [1], [2]]


def test_an_epoch_holds_every_sample_once_whole_and_padded_behind():
    source = make_source()
    data = TrainingData(source, **OPTIONS | {"batch_size": 1, "epochs": 1})
    batches = list(data.batches(0))
    assert data.num_steps == data.steps_per_epoch == len(batches) < MANY * 0.7
    seen = []
    for batch in batches:
        ids = batch["document_ids"][0]
        tokens = np.count_nonzero(ids)
        assert (np.diff(ids[:tokens]) >= 0).all()
        assert not ids[tokens:].any()
        assert not batch["input_ids"][0, tokens:].any()
        assert not batch["loss_mask"][0, tokens:].any()
        seen += documents(batch)
    assert max(batch["document_ids"].max() for batch in batches) > 2
    assert sorted(sample for sample, *_ in seen) == [i for i in range(MANY) if i != 8]
    for sample, found_ids, found_mask, _ in seen:
        ids, mask = source[sample]
        assert (found_ids, found_mask) == (ids[:ROW].tolist(), mask[:ROW].tolist())


def test_rows_stay_together_and_are_shuffled_each_epoch():
    data = TrainingData(make_source(), **OPTIONS | {"batch_size": 1})
    rows = [tuple(sample for sample, *_ in documents(batch)) for batch in data.batches(0)]
    first, second = rows[: data.steps_per_epoch], rows[data.steps_per_epoch :]
    assert sorted(first) == sorted(second)
    assert first != second
    other = TrainingData(make_source(), **OPTIONS | {"batch_size": 1, "epochs": 1, "seed": 8})
    assert {tuple(sample for sample, *_ in documents(batch)) for batch in other.batches(0)} != set(first)


@pytest.mark.parametrize("num_anchors", [ROW, ROW // 2])  # all candidates, and a drawn half of a document's tokens
def test_a_document_has_the_anchors_that_it_has_alone(num_anchors):
    options = OPTIONS | {"batch_size": 1, "num_anchors": num_anchors}
    packed, apart = (TrainingData(make_source(), **options | {"packing": packing}) for packing in (True, False))
    for epoch in range(2):
        drawn = [
            {
                sample: anchors
                for step in range(data.steps_per_epoch)
                for sample, _, _, anchors in documents(data.batch(epoch * data.steps_per_epoch + step))
            }
            for data in (packed, apart)
        ]
        assert drawn[0] == drawn[1]
        assert any(drawn[0].values())


@pytest.mark.parametrize("num_anchors", [1, 2, 5, 12])
def test_an_anchor_and_the_token_it_predicts_are_supervised_in_one_document(num_anchors):
    draws = {}
    for batch in TrainingData(make_source(), **OPTIONS | {"num_anchors": num_anchors}).batches(0):
        for row in range(4):
            anchors = batch["anchors"][row][batch["anchor_valid"][row]]
            assert len(set(anchors)) == len(anchors)
            for p in anchors:
                assert batch["loss_mask"][row, p : p + 2].all()
                assert batch["document_ids"][row, p] == batch["document_ids"][row, p + 1] > 0
        for sample, _, _, anchors in documents(batch):
            draws.setdefault(sample, set()).add(tuple(anchors))
    assert num_anchors == 12 or any(len(seen) > 1 for seen in draws.values())  # drawn anew each epoch


def test_resuming_at_any_step_continues_the_stream():
    whole = list(TrainingData(make_source(), **OPTIONS).batches(0))
    for step in range(len(whole) + 2):
        assert_same_stream(TrainingData(make_source(), **OPTIONS).batches(step), whole[step:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_global_batch(process_count):
    parts = [
        TrainingData(make_source(), **OPTIONS, process_index=p, process_count=process_count).batches(0)
        for p in range(process_count)
    ]
    for batch in TrainingData(make_source(), **OPTIONS).batches(0):
        for p, part in enumerate(parts):
            assert_same_stream([next(part)], [{name: x[p::process_count] for name, x in batch.items()}])
    assert all(next(part, None) is None for part in parts)


def test_samples_without_a_predicted_token_are_refused():
    source = [(np.arange(4), np.arange(4) == 0)] * 12  # the first token of a document, which nothing predicts
    for num_anchors in (None, 4):
        with pytest.raises(InputError, match="none of the first 2 rows has supervised tokens"):
            TrainingData(source, **OPTIONS | {"num_anchors": num_anchors})


def test_a_row_that_no_longer_fits_is_noticed():
    source = make_source()
    data = TrainingData(source, **OPTIONS | {"batch_size": 1})
    step, first, second = next(
        (step, *(sample for sample, *_ in found[:2]))
        for step, found in enumerate(map(documents, data.batches(0)))
        if len(found) > 1
    )
    source[first] = (np.arange(ROW), np.ones(ROW, bool))
    with pytest.raises(
        InputError, match=rf"sample {second}: its {len(source[second][0])} tokens no longer fit the row"
    ):
        data.batch(step)


def record(i):
    return {"input_ids": list(range(i)), "loss_mask": [True] * i}


def test_lengths_of_token_ids_are_known_without_parsing(tmp_path, monkeypatch):
    lines = [json.dumps(record(n)) for n in (5, 1, 0, 12)]
    lines += ['{ "input_ids" :[ 7 ,8 , 9 ] , "loss_mask": [1,1,1]}', '{"input_ids":[ ],"loss_mask":[]}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    records = JsonlRecords([path])
    assert records.token_counts.tolist() == [5, 1, 0, 12, 3, 0] == [len(r.input_ids) for r in records]

    read = []
    one_by_one = JsonlRecords.__getitem__
    monkeypatch.setattr(JsonlRecords, "__getitem__", lambda self, i: read.append(i) or one_by_one(self, i))
    data = TrainingData(read_examples([path], None), **OPTIONS | {"batch_size": 1})
    assert data.steps_per_epoch == 1
    assert sorted(read) == list(range(6))  # the row that is checked, and nothing before it


def test_other_lines_are_read_for_their_lengths(tmp_path, make_tokenizer, chatml):
    turns = [{"role": "user", "content": 'say "input_ids": [1, 2]'}, {"role": "assistant", "content": "yo"}]
    lines = [
        json.dumps({"messages": turns}),
        json.dumps({"loss_mask": [True, True, True], "input_ids": [1, 2, 3]}),
        json.dumps(record(6)),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    examples = read_examples([path], make_tokenizer(chatml))
    assert examples.token_counts.tolist() == [-1, -1, 6]
    total = sum(len(ids) for ids, _ in examples)
    for max_length, rows in ((total, 1), (total - 1, 2)):
        data = TrainingData(examples, **OPTIONS | {"batch_size": 1, "max_length": max_length})
        assert data.steps_per_epoch == rows
    assert np.count_nonzero(data.batch(0)["document_ids"]) + np.count_nonzero(data.batch(1)["document_ids"]) == total

    path.write_text("\n".join([*lines, '{"messages": []}']))
    with pytest.raises(InputError, match=re.escape("a.jsonl, line 4: field messages is an empty list")):
        TrainingData(read_examples([path], make_tokenizer(chatml)), **OPTIONS)


@pytest.fixture(scope="module")
def models():
    config = DecoderConfig(
        "qwen3", 64, 32, 48, 3, 4, 2, 8, 1e-6, 64, RopeConfig(), tie_word_embeddings=True, qk_norm=True
    )
    draft = DFlashConfig.for_target(config, num_layers=2, block_size=4, mask_token_id=63, target_layer_ids=(0, 1))
    with mesh_scope():
        yield (
            Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32),
            DFlashDraft(draft, rngs=nnx.Rngs(1), dtype=jnp.float32),
        )


@pytest.fixture(scope="module")
def packed_and_apart():
    """The same three documents in one row and in three, with the same anchors set by hand."""
    rng = np.random.default_rng(0)
    source = [(rng.integers(0, 60, n), np.arange(n) >= start) for n, start in ((10, 1), (8, 4), (5, 0))]
    chosen = [(1, 3, 8), (4, 6), (0, 1, 3)]
    batches = []
    for packing, rows in ((True, 1), (False, 3)):
        data = TrainingData(source, **OPTIONS | {"packing": packing, "batch_size": rows, "num_anchors": 8})
        batch = data.batch(0)
        assert len(batch["input_ids"]) == rows
        for row in range(rows):
            ids = batch["document_ids"][row]
            spans = [np.flatnonzero(ids == document) for document in range(1, ids.max() + 1)]
            # The three lengths differ, so that a document's length tells which sample it is.
            anchors = [
                s[0] + p for s in spans for i, ps in enumerate(chosen) if len(source[i][0]) == len(s) for p in ps
            ]
            batch["anchors"][row] = np.pad(anchors, (0, 8 - len(anchors)))
            batch["anchor_valid"][row] = np.arange(8) < len(anchors)
        batches.append({name: jnp.asarray(x) for name, x in batch.items()})
    return batches


@pytest.mark.parametrize("kind", ["dflash", "causal_lm"])
def test_a_packed_row_has_the_loss_of_its_documents_apart(models, packed_and_apart, kind):
    target, draft = models
    if kind == "dflash":
        objective = {"ce": 0.5, "kl": 0.5}
        settings = {"gamma": 4.0, "alpha": None, "cumulative_mask": True, "chunk_blocks": 8, "query_chunk": 64}
        loss = BlockDiffusionLoss(objective, "exp", **settings, remat=False)
        arguments = (draft, target)
    else:
        loss, arguments = CausalLMLoss(query_chunk=64, remat=False), (target, None)
    run = jax.jit(loss)
    (packed, packed_sums), (apart, apart_sums) = (run(*arguments, batch) for batch in packed_and_apart)
    assert float(apart) > 1
    np.testing.assert_allclose(packed, apart, rtol=1e-5)
    np.testing.assert_allclose(packed_sums.weight, apart_sums.weight, rtol=1e-6)
    for name, expected in apart_sums.statistics.items():
        tolerance = 1e-5 if name == "expected" else 0  # a sum of probabilities; the others are counts
        np.testing.assert_allclose(packed_sums.statistics[name], expected, rtol=tolerance, err_msg=name)
