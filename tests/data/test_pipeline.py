"""The stream of batches: what a row holds, determinism, resume, processes, and data that cannot be trained on."""

import json

import numpy as np
import pytest

from specjax.blockdiff.anchors import PureContext, draw_anchors
from specjax.blockdiff.noise import BlockNoise, draw_shown
from specjax.data.chat_template import ChatTokenizer
from specjax.data.conversations import parse_record
from specjax.data.pipeline import TokenizedExamples, TrainingData, fixed_batches, read_examples
from specjax.errors import InputError

OPTIONS = {"batch_size": 4, "max_length": 12, "num_anchors": 3, "seed": 7, "epochs": 2}


def make_source(count, *, start=3):
    """Sample i holds 5 + i % 11 tokens 100 * i, 100 * i + 1, ..., supervised from `start` on."""
    lengths = [5 + i % 11 for i in range(count)]
    return [(100 * i + np.arange(length), np.arange(length) >= start) for i, length in enumerate(lengths)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def assert_same_stream(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def sample_ids(batch):
    """The sample of each row of a batch from `make_source`, told by its first token."""
    return (batch["input_ids"][:, 0] // 100).tolist()


def stream_ids(data, count):
    """The sample ids of the first `count` rows."""
    ids = [i for step in range(-(-count // 4)) for i in sample_ids(data.batch(step))]
    return ids[:count]


def test_a_row_is_the_truncated_padded_sample_with_its_anchors():
    source = make_source(11)
    for step, batch in enumerate(TrainingData(source, **OPTIONS).batches(0)):
        for name, dtype in {
            "input_ids": "int32",
            "loss_mask": "bool",
            "document_ids": "int32",
            "anchors": "int32",
        }.items():
            assert batch[name].dtype == dtype
            assert batch[name].shape == (4, 3 if name == "anchors" else 12)
        assert batch["anchor_valid"].dtype == bool
        for row, sample in enumerate(sample_ids(batch)):
            ids, mask = source[sample]
            length = min(len(ids), 12)
            padding = 12 - length
            np.testing.assert_array_equal(batch["input_ids"][row], np.pad(ids[:length], (0, padding)))
            np.testing.assert_array_equal(batch["loss_mask"][row], np.pad(mask[:length], (0, padding)))
            np.testing.assert_array_equal(batch["document_ids"][row], np.pad(np.ones(length), (0, padding)))
            anchors, valid = draw_anchors(
                batch["loss_mask"][row],
                batch["document_ids"][row],
                3,
                seed=7,
                epoch=(4 * step + row) // 11,
                sample_ids=[sample],
            )
            np.testing.assert_array_equal(batch["anchors"][row], anchors)
            np.testing.assert_array_equal(batch["anchor_valid"][row], valid)
            assert valid.any()


def test_without_anchors_a_batch_has_none():
    batch = TrainingData(make_source(4), **OPTIONS | {"num_anchors": None}).batch(0)
    assert sorted(batch) == ["document_ids", "input_ids", "loss_mask"]


def test_each_epoch_is_a_new_order_of_all_samples_without_a_seam():
    data = TrainingData(make_source(10), **OPTIONS)
    ids = stream_ids(data, 20)
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10] != ids[10:]
    assert ids[:10] != list(range(10))
    other = TrainingData(make_source(10), **OPTIONS | {"seed": 8})
    assert stream_ids(other, 10) != ids[:10]


def test_anchors_are_redrawn_each_epoch():
    source = [(np.arange(12), np.ones(12, bool))]
    stream = TrainingData(source, **OPTIONS | {"batch_size": 1, "epochs": 8}).batches(0)
    drawn = {tuple(batch["anchors"][0]) for batch in stream}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("count", "epochs", "steps_per_epoch", "num_steps"),
    [(10, 2, 3, 5), (8, 1, 2, 2), (3, 1, 1, 1), (10, 0.5, 3, 2), (10, None, 3, None)],
)
def test_length(count, epochs, steps_per_epoch, num_steps):
    data = TrainingData(make_source(count), **OPTIONS | {"epochs": epochs})
    assert (data.steps_per_epoch, data.num_steps) == (steps_per_epoch, num_steps)
    batches = data.batches(0)
    taken = [batch for batch, _ in zip(batches, range(num_steps or 9), strict=False)]
    assert len(taken) == (num_steps or 9)
    assert all(batch["input_ids"].shape == (4, 12) for batch in taken)
    assert (next(batches, None) is None) == (num_steps is not None)


def test_resuming_at_any_step_continues_the_stream():
    whole = list(TrainingData(make_source(10), **OPTIONS).batches(0))
    for step in range(len(whole) + 2):
        resumed = TrainingData(make_source(10), **OPTIONS)
        assert_same_stream(resumed.batches(step), whole[step:])
    assert_same(resumed.batch(3), whole[3])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_global_batch(process_count):
    whole = TrainingData(make_source(10), **OPTIONS).batches(0)
    parts = [
        TrainingData(make_source(10), **OPTIONS, process_index=p, process_count=process_count).batches(0)
        for p in range(process_count)
    ]
    merged = (
        # Row r of process p is row r * process_count + p of the global batch.
        {
            name: np.stack([part[name] for part in local], axis=1).reshape(whole_shape(local[0][name]))
            for name in local[0]
        }
        for local in zip(*parts, strict=True)
    )
    assert_same_stream(merged, whole)


def whole_shape(local):
    return (4, *local.shape[1:])


def test_samples_without_supervision_weigh_nothing():
    source = make_source(8)
    source[0] = (np.arange(6), np.zeros(6, bool))  # no answer
    source[1] = (np.arange(30), np.arange(30) >= 12)  # truncated to its prompt
    source[2] = (np.arange(6), np.arange(6) == 3)  # a single token holds no block
    source[3] = (np.arange(0), np.zeros(0, bool))
    batches = list(TrainingData(source, **OPTIONS | {"epochs": 1}).batches(0))
    valid = [(i, v.any()) for batch in batches for i, v in zip(sample_ids(batch), batch["anchor_valid"], strict=True)]
    # Samples 0 to 3 start with token 0.
    assert sorted(valid) == [(0, False)] * 4 + [(i, True) for i in range(4, 8)]


@pytest.mark.parametrize("num_anchors", [3, None])
@pytest.mark.parametrize(
    "sample",
    [(np.arange(6), np.zeros(6, bool)), (np.arange(30), np.arange(30) >= 12), (np.arange(6), np.arange(6) == 0)],
    ids=["no answer", "truncated away", "first token only"],
)
def test_data_without_any_supervision_is_refused(sample, num_anchors):
    options = OPTIONS | {"num_anchors": num_anchors}
    with pytest.raises(InputError, match="none of the first 5 rows has supervised tokens"):
        TrainingData([sample] * 5, **options)
    with pytest.raises(InputError, match="none of the first 5 rows has supervised tokens"):
        fixed_batches([sample] * 5, 9, batch_size=4, max_length=12, num_anchors=num_anchors)
    assert TrainingData([sample] * 4 + make_source(1), **options).batch(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size is 6; give a positive multiple of the 4 processes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"process_index": 1}, "process_index is 1 of 1 processes"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"max_length": 1}, "max_length is 1"),
        ({"source": []}, "no samples"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        TrainingData(**{"source": make_source(4)} | OPTIONS | change)


def test_fixed_batches_are_the_same_rows_each_time_and_pad_the_last():
    options = {"batch_size": 4, "max_length": 12, "num_anchors": 3}
    batches = fixed_batches(make_source(10), 6, **options)
    assert_same_stream(fixed_batches(make_source(10), 6, **options), batches)
    ids = sample_ids(batches[0]) + sample_ids(batches[1])
    assert len(set(ids[:6])) == 6
    assert sorted(ids[:6]) != list(range(6))  # a choice from the whole source
    assert not batches[1]["document_ids"][2:].any()
    assert not batches[1]["anchor_valid"][2:].any()
    assert batches[1]["anchor_valid"][:2].any(axis=1).all()
    assert [len(fixed_batches(make_source(3), count, **options)) for count in (1, 3, 50)] == [1, 1, 1]
    parts = [fixed_batches(make_source(10), 6, **options, process_index=p, process_count=2) for p in range(2)]
    for step, batch in enumerate(batches):
        for p in range(2):
            assert_same(parts[p][step], {name: values[p::2] for name, values in batch.items()})
    with pytest.raises(InputError, match="evaluation samples: 0"):
        fixed_batches(make_source(10), 0, **options)


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def pretokenized(source):
    return [{"input_ids": ids.tolist(), "loss_mask": mask.tolist()} for ids, mask in source]


def test_jsonl_of_conversations_and_token_ids_becomes_batches(tmp_path, make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}, *pretokenized(make_source(1))])
    examples = read_examples([path], tokenizer)
    data = TrainingData(examples, **OPTIONS | {"batch_size": 2, "max_length": 64})
    batch = data.batch(0)
    row = int(batch["document_ids"].sum(axis=1).argmax())
    supervised = batch["input_ids"][row][batch["loss_mask"][row]]
    assert tokenizer.decode(supervised) == "yo<|im_end|>"
    np.testing.assert_array_equal(batch["input_ids"][1 - row][:5], np.arange(5))


def test_token_ids_need_no_chat_template(tmp_path, make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    tokenizer.chat_template = None
    path = write_jsonl(tmp_path / "a.jsonl", pretokenized(make_source(3)))
    assert len(read_examples([path], tokenizer)) == 3
    behind = [{"id": i, **record} for i, record in enumerate(pretokenized(make_source(3)))]
    assert len(read_examples([write_jsonl(tmp_path / "behind.jsonl", behind)], tokenizer)) == 3
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write_jsonl(tmp_path / "b.jsonl", [*pretokenized(make_source(3)), {"messages": turns}])
    with pytest.raises(InputError, match="it has no chat template; add one to its folder or pre-tokenise"):
        read_examples([path], tokenizer)


def test_errors_of_a_sample_name_file_and_line(tmp_path, make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml.partition("{% if")[0])
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            *pretokenized(make_source(1)),
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        ],
    )
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: the chat template ignores"):
        TrainingData(read_examples([path], tokenizer), **OPTIONS)
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: a conversation needs a tokenizer"):
        TrainingData(read_examples([path], None), **OPTIONS)


def test_ids_beyond_the_vocabulary_are_refused_for_both_kinds_of_record(make_tokenizer, chatml):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    records = [
        parse_record({"messages": turns}, "line 1"),
        parse_record({"input_ids": [300], "loss_mask": [1]}, "line 2"),
    ]
    chat = ChatTokenizer(make_tokenizer(chatml))
    for vocab_size, refused in ((260, [0, 1]), (262, [1]), (301, [])):
        examples = TokenizedExamples(records, chat, vocab_size=vocab_size)
        for i in range(2):
            if i in refused:
                with pytest.raises(InputError, match=f"line {i + 1}: .* outside the vocabulary of {vocab_size} ids"):
                    examples[i]
            else:
                assert len(examples[i][0])


def test_a_bad_line_met_while_training_raises_from_the_stream(tmp_path):
    source = make_source(300)
    late = sample_ids(TrainingData(source, **OPTIONS).batch(70))[0]  # beyond the rows checked at the start
    records = pretokenized(source)
    records[late]["loss_mask"].append(True)
    path = write_jsonl(tmp_path / "a.jsonl", records)
    data = TrainingData(read_examples([path], None), **OPTIONS)
    batches = data.batches(69)
    next(batches)
    with pytest.raises(InputError, match=rf"a\.jsonl, line {late + 1}: input_ids has"):
        next(batches)


def test_noise_is_drawn_for_the_samples_of_a_row():
    noise = BlockNoise("geometric", 0.6, 8, 0.5)
    batches = list(TrainingData(make_source(11), **OPTIONS, noise=noise).batches(0))
    for step, batch in enumerate(batches):
        assert batch["shown"].dtype == bool
        for row, sample in enumerate(sample_ids(batch)):
            expected = draw_shown(
                noise,
                batch["anchors"][row],
                batch["document_ids"][row],
                seed=7,
                epoch=(4 * step + row) // 11,
                sample_ids=[sample],
            )
            np.testing.assert_array_equal(batch["shown"][row], expected)
    assert len({tuple(block) for batch in batches for row in batch["shown"] for block in row.tolist()}) > 4


def test_no_block_starts_in_the_pure_context():
    for batch in TrainingData(make_source(11), **OPTIONS, context=PureContext(length=6)).batches(0):
        assert (batch["anchors"][batch["anchor_valid"]] >= 6).all()
        assert not batch["anchor_valid"][batch["document_ids"].sum(1) <= 7].any()
        assert batch["loss_mask"][:, 3].any(), "it is learnt, where a block before it reaches there"
    with pytest.raises(InputError, match=r"none of the first 11 rows .*context_len"):
        TrainingData(make_source(11), **OPTIONS, context=PureContext(length=12))
