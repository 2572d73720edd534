"""Sources of records: Parquet, saved and hub sets against JSONL, weights over an epoch, and the split by content."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest

from specjax.data.arrow import HubSource
from specjax.data.conversations import JsonlRecords, parse_record
from specjax.data.pipeline import TrainingData, tokenized
from specjax.data.sources import content_hash, open_source, read_sources
from specjax.errors import InputError

pytestmark = pytest.mark.usefixtures("cache_of_its_own")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "number"}}}}
CALL = {"function": {"name": "add", "arguments": {"x": 1}}}
OTHER_CALL = {"function": {"name": "say", "arguments": {"text": "hé"}}}
# Between them the messages have keys that not every message has, at two depths.
RECORDS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "reasoning_content": "?"}]},
    {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
    {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "tool_calls": [OTHER_CALL]}]},
    {"input_ids": [5, 0, 6], "loss_mask": [False, True, True]},
    {"input_ids": [], "loss_mask": []},
]


def table(records):
    """`records` as a table, tools as JSON text: their schemas have no type in common."""
    rows = [record | ({"tools": json.dumps(record["tools"])} if "tools" in record else {}) for record in records]
    names = sorted({name for row in rows for name in row})
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def write_jsonl(path, records):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_parquet(path, records):
    path.parent.mkdir(exist_ok=True, parents=True)
    table(records).to_parquet(path)
    return str(path)


def contents(records):
    """What records hold, without where they stand."""
    found = [records[i] for i in range(len(records))]
    return [
        (record.messages, record.tools)
        if hasattr(record, "messages")
        else (record.input_ids.tolist(), record.loss_mask.tolist(), record.input_ids.dtype, record.loss_mask.dtype)
        for record in found
    ]


def numbered(count, start=0):
    return [{"input_ids": [i, i + 1, i + 2], "loss_mask": [0, 1, 1]} for i in range(start, start + count)]


def numbers(records):
    """The first token of each record: its number."""
    return [int(records[i].input_ids[0]) for i in range(len(records))]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set `owner/name` of splits train and test, where `datasets` looks before it asks the hub."""
    write_parquet(tmp_path / "owner" / "name" / "train.parquet", RECORDS)
    write_parquet(tmp_path / "owner" / "name" / "test.parquet", RECORDS[3:])
    monkeypatch.chdir(tmp_path)


def test_parquet_saved_and_hub_sets_are_jsonl_record_for_record(tmp_path, hub):
    expected = contents(JsonlRecords([write_jsonl(tmp_path / "a.jsonl", RECORDS)]))
    table(RECORDS).save_to_disk(tmp_path / "saved")
    first, second = (write_parquet(tmp_path / "[p]" / f"{i}.parquet", RECORDS[3 * i : 3 * i + 3]) for i in range(2))
    for path in (str(tmp_path / "saved"), "hf://owner/name?split=train"):
        assert contents(open_source(path)) == expected, path
    assert contents(open_source(f"{tmp_path}/[[]p]/*.parquet")) == expected  # files of different columns
    assert contents(open_source(first)) + contents(open_source(second)) == expected
    assert contents(open_source("hf://owner/name?split=test")) == expected[3:]
    assert contents(open_source("hf://owner/name?split=train[1:2]&config=default")) == expected[1:2]


def test_a_row_is_named_by_its_place(tmp_path, hub):
    bad = {"input_ids": [1], "loss_mask": [2]}
    for name, records in (("a", numbered(3)), ("b", [*numbered(1), bad])):
        write_parquet(tmp_path / f"{name}.parquet", records)
    parquet = open_source(f"{tmp_path}/?.parquet")
    assert [parquet[i].origin for i in (0, 3)] == [
        f"file {tmp_path}/a.parquet, row 1",
        f"file {tmp_path}/b.parquet, row 1",
    ]
    assert parquet[-2].origin == parquet[3].origin
    with pytest.raises(InputError, match=r"b\.parquet, row 2: field loss_mask holds 2"):
        parquet[4]
    with pytest.raises(IndexError):
        parquet[5]
    assert open_source("hf://owner/name?split=test")[1].origin == "hf://owner/name?split=test, row 2"
    table(RECORDS).save_to_disk(tmp_path / "saved")
    assert open_source(tmp_path / "saved")[0].origin == f"folder {tmp_path}/saved, row 1"


def test_lengths_of_token_ids_are_known_and_of_conversations_are_not(tmp_path):
    assert open_source(write_parquet(tmp_path / "a.parquet", RECORDS)).token_counts.tolist() == [-1, -1, -1, 3, 0]
    assert open_source(write_parquet(tmp_path / "b.parquet", RECORDS[:3])).token_counts.tolist() == [-1, -1, -1]


def test_rows_stay_on_disk_and_are_read_from_threads_and_copies(tmp_path):
    records = [{"messages": [{"role": "user", "content": "x" * 5000 + str(i)}]} for i in range(200)]
    path = tmp_path / "a.parquet"
    data = open_source(write_parquet(path, records))
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, range(200))) == [data[i] for i in range(200)]
    assert data[17].messages[0]["content"].endswith("x17")


def test_identity_changes_with_the_data(tmp_path, hub):
    sizes = [len(record) for record in ("x", "yy")]
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "b.jsonl").write_text("yy")
    assert JsonlRecords([tmp_path / "?.jsonl"]).identity == sizes
    path = write_parquet(tmp_path / "a.parquet", RECORDS)
    assert open_source(path).identity == [(tmp_path / "a.parquet").stat().st_size]
    of_hub = [open_source(f"hf://owner/name?split={split}").identity for split in ("train", "train", "test")]
    assert of_hub[0] == of_hub[1] != of_hub[2]
    json.dumps(of_hub)


def test_the_hub_is_asked_for_what_the_entry_says(monkeypatch):
    asked = []

    def load_dataset(path, **settings):
        asked.append((path, settings))
        return table(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    open_source("hf://owner/name?split=train%5B:10%25%5D&config=en&revision=v1.0")
    open_source("hf://name?split=train[:10%]+test")
    assert asked == [
        ("owner/name", {"name": "en", "split": "train[:10%]", "revision": "v1.0"}),
        ("name", {"name": None, "split": "train[:10%]+test", "revision": None}),
    ]


BAD_URLS = {
    "hf://owner/name": "split is missing; write it as in hf://owner/name[?]split=train",
    "hf://owner/name?split=": "split is missing",
    "hf://owner/name?split=train&config=": "config is missing",
    "hf://owner/name?split=train&subset=en": "unknown setting subset; known are split, config, revision",
    "hf://owner/name?split=train&split=test": "gives a setting twice; drop one",
    "hf://datasets/owner/name?split=train": "is no data set of the hub",
    "hf://?split=train": "is no data set of the hub",
}


@pytest.mark.parametrize(("url", "message"), BAD_URLS.items(), ids=BAD_URLS.keys())
def test_a_wrong_hub_entry_is_refused(url, message):
    with pytest.raises(InputError, match=message) as info:
        HubSource.parse(url)
    assert str(info.value).startswith(f"data {url}: ")


def test_what_the_hub_does_not_have_or_give_is_refused_with_a_remedy(hub, monkeypatch):
    for url, reason in (
        ("hf://owner/name?split=dev", 'Unknown split "dev"'),
        ("hf://owner/name?split=train&config=en", "BuilderConfig 'en' not found"),
    ):
        with pytest.raises(InputError, match=f"cannot be loaded .*{reason}.*; check owner/name, split") as info:
            open_source(url)
        assert str(info.value).startswith(f"data {url}: ")
    # No network: as `datasets` reports a hub that does not answer.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf://owner/absent\?split=train: cannot be loaded .*download it and give"):
        open_source("hf://owner/absent?split=train")


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "bad.parquet").write_text("hello")
    (tmp_path / "folder").mkdir()
    datasets.DatasetDict(train=table(RECORDS), test=table(RECORDS)).save_to_disk(tmp_path / "splits")
    write_parquet(tmp_path / "mixed" / "a.parquet", RECORDS)
    write_jsonl(tmp_path / "mixed" / "a.jsonl", RECORDS)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    table(RECORDS).select([]).to_parquet(tmp_path / "empty.parquet")
    for name, message in {
        "bad.parquet": r"file .*bad\.parquet: cannot be loaded \(.*; give a Parquet file",
        "none*.parquet": r"none\*\.parquet: no such file",
        "folder": "folder .*folder: cannot be loaded .*; give the folder of a Dataset.save_to_disk, or files",
        "splits": "splits: holds several splits; give one of .*/splits/train, .*/splits/test",
        "mixed/*": r"mixed/\*: matches Parquet and other files; give a pattern for each kind",
        "text.parquet": r"text\.parquet: a record is made of .*; the columns are \['text'\]",
        "empty.parquet": r"empty\.parquet: cannot be loaded .* corresponds to no data.*; give a Parquet file with rows",
    }.items():
        with pytest.raises(InputError, match=message):
            open_source(tmp_path / name)


@pytest.fixture
def two_files(tmp_path):
    """JSONL of records 0 to 9 and Parquet of records 100 to 119."""
    return (
        write_jsonl(tmp_path / "a.jsonl", numbered(10)),
        write_parquet(tmp_path / "b.parquet", numbered(20, start=100)),
    )


def test_a_weight_is_the_passes_over_a_source_in_an_epoch(two_files):
    first, second = two_files
    train, validation = read_sources([(first, 2.3), (second, 0.25)])
    assert validation is None
    seen = numbers(train)
    counts = np.bincount(seen, minlength=120)
    assert sorted(counts[:10]) == [2] * 7 + [3] * 3
    assert sorted(counts[100:120]) == [0] * 15 + [1] * 5
    assert seen == numbers(read_sources([(first, 2.3), (second, 0.25)])[0])
    assert train.identity == [*open_source(first).identity, *open_source(second).identity]

    data = TrainingData(
        tokenized(train, None), batch_size=7, max_length=4, num_anchors=None, seed=0, epochs=2, packing=False
    )
    trained = np.concatenate([batch["input_ids"][:, 0] for batch in data.batches()])[: 2 * len(train)]
    for epoch in np.split(trained, 2):
        assert sorted(epoch.tolist()) == sorted(seen)


def test_a_larger_weight_adds_records_and_the_choice_is_no_pattern(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1000))
    small, large = (set(numbers(read_sources([(path, weight)])[0])) for weight in (0.3, 0.5))
    assert (len(small), len(large)) == (300, 500)
    assert small < large
    assert 200 < sum(i < 500 for i in large) < 300
    assert 200 < sum(i % 2 for i in large) < 300


def test_a_whole_weight_is_the_source_named_as_often(two_files):
    first, second = two_files
    once = [numbers(read_sources([(path, 1.0)])[0]) for path in two_files]
    assert numbers(read_sources([(first, 1.0), (second, 1.0)])[0]) == once[0] + once[1]
    weighted, _ = read_sources([(first, 3.0), (second, 1.0)])
    assert numbers(weighted) == numbers(read_sources([(first, 1.0)] * 3 + [(second, 1.0)])[0])
    assert weighted.token_counts.tolist() == [3] * 50
    captured, order = weighted.distinct()
    assert numbers(captured) == once[0] + once[1]
    assert [numbers(captured)[i] for i in order] == numbers(weighted)


def test_a_weight_that_takes_no_record_is_refused(two_files):
    with pytest.raises(InputError, match=r"a\.jsonl: weight 0\.01 takes none of 10 records; raise it"):
        read_sources([(two_files[1], 1.0), (two_files[0], 0.01)])


def sides(entries, fraction):
    train, validation = read_sources(entries, fraction)
    return numbers(train), numbers(validation)


def test_the_split_is_disjoint_complete_and_about_the_fraction(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(4000))
    train, validation = sides([(path, 1.0)], 0.1)
    assert sorted(train + validation) == list(range(4000))
    assert 340 < len(validation) < 460  # binomial: 400 and three standard deviations of 19
    assert set(validation) < set(sides([(path, 1.0)], 0.2)[1])
    assert validation == sorted(validation)


def test_a_record_keeps_its_side_in_any_order_file_and_format(tmp_path):
    records = numbered(300)
    whole = write_jsonl(tmp_path / "a.jsonl", records)
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(300)]
    first = write_jsonl(tmp_path / "b.jsonl", [{"id": i, **record} for i, record in enumerate(shuffled[:100])])
    second = write_parquet(tmp_path / "c.parquet", shuffled[100:])
    assert [set(side) for side in sides([(whole, 1.0)], 0.2)] == [
        set(side) for side in sides([(first, 1.0), (second, 1.0)], 0.2)
    ]


def test_copies_are_together_and_held_out_once(tmp_path):
    records = numbered(300)
    path = write_jsonl(tmp_path / "a.jsonl", [*records, *records[::-1]])
    copy = write_parquet(tmp_path / "b.parquet", records)
    train, validation = sides([(path, 2.0), (copy, 1.0)], 0.2)
    assert not set(train) & set(validation)
    assert len(validation) == len(set(validation))
    assert set(np.bincount(train, minlength=300)) == {0, 5}


def test_a_hash_is_of_what_is_trained_and_of_all_of_it():
    def of(fields):
        return content_hash(parse_record(fields, "here"))

    hashes = [of(record) for record in RECORDS]
    assert len(set(hashes)) == len(RECORDS)
    user, answer = RECORDS[0]["messages"]
    sharegpt = [{"value": "hi", "from": "human"}, {"from": "gpt", "reasoning_content": "?", "value": "yo"}]
    assert of({"conversations": sharegpt, "id": 7}) == hashes[0]
    assert of({"messages": [user, answer | {"tool_calls": [{"id": None}]}]}) == of(
        {"messages": [user, answer | {"tool_calls": [{}]}]}
    )
    for changed in (
        {"messages": [user, answer | {"content": "yo!"}]},
        {"messages": [user, answer], "tools": [TOOL]},
        {"input_ids": [5, 0, 6], "loss_mask": [True, True, True]},
        {"input_ids": [5, 0, 7], "loss_mask": [False, True, True]},
    ):
        assert of(changed) not in hashes
    assert int(hashes[3]) == HASH_OF_TOKENS
    assert int(hashes[0]) == HASH_OF_CONVERSATION


# A held-out set must not change from one version of specjax to the next.
HASH_OF_TOKENS = 768962451424636657
HASH_OF_CONVERSATION = 16407194313620282848


def test_a_fraction_that_leaves_a_side_empty_is_refused(two_files):
    for fraction, side in ((1e-9, "none of the 10 records; raise it"), (1 - 1e-9, "all of the 10 records; lower it")):
        with pytest.raises(InputError, match=f"data.validation_fraction .* holds out {side}"):
            read_sources([(two_files[0], 1.0)], fraction)
