"""The run config as a user meets it: files, overrides, and every mistake by name."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from specjax.config import RunConfig, dump_config, load_config, parse_config
from specjax.config_messages import ALIASES, SECTION_ALIASES, setting_names
from specjax.errors import InputError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MINIMAL = """
output_dir: runs/a
target:
  path: some/model
data:
  train: [train.jsonl]
"""


def load(folder: Path, text: str = MINIMAL, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refused(folder: Path, *overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(InputError) as info:
        load(folder, text, *overrides)
    return str(info.value)


def test_defaults_are_the_dflash_recipe(tmp_path):
    config = load(tmp_path)
    assert (config.draft.block_size, config.draft.num_layers, config.draft.num_taps) == (16, 5, 5)
    assert (config.data.num_anchors, config.data.max_length) == (512, 3072)
    assert (config.loss.objective, config.loss.weighting, config.gamma) == ({"ce": 1.0}, "exp", 7.0)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (6e-4, (0.9, 0.95), 0.0)
    assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.min_lr_ratio) == ("cosine", 0.04, None)
    assert (optimizer.clip_norm, config.training.epochs, config.training.steps) == (1.0, 6.0, None)
    assert config.loss.cumulative_mask


@pytest.mark.parametrize(("block_size", "gamma"), [(16, 7.0), (10, 5.0), (8, 4.0)])
def test_gamma_follows_the_block_size(tmp_path, block_size, gamma):
    assert load(tmp_path, MINIMAL, f"draft.block_size={block_size}").gamma == gamma


def test_given_gamma_rules_and_other_weightings_have_none(tmp_path):
    assert load(tmp_path, MINIMAL, "draft.block_size=12", "loss.gamma=6").gamma == 6.0
    assert load(tmp_path, MINIMAL, "draft.block_size=12", "loss.weighting=uniform").gamma is None


@pytest.mark.parametrize("number", ["6e-4", "6E-4", "6.e-4", ".6e-3", "+6e-4", "0.0006", "6.0e-04"])
def test_scientific_notation_is_a_number_in_files_and_overrides(tmp_path, number):
    assert load(tmp_path, MINIMAL + f"optimizer: {{learning_rate: {number}}}").optimizer.learning_rate == 6e-4
    assert load(tmp_path, MINIMAL, f"optimizer.learning_rate={number}").optimizer.learning_rate == 6e-4


def test_overrides_add_sections_replace_values_and_parse_yaml(tmp_path):
    config = load(
        tmp_path,
        MINIMAL + "training: {batch_size: 4}",
        "training.batch_size=16",
        "training.remat=false",
        "data.train=[a.jsonl, 'b*.jsonl']",
        "data.chat_template_kwargs.enable_thinking=false",
        "loss.gamma=null",
        "output_dir=runs/a=b",
    )
    assert (config.training.batch_size, config.training.remat) == (16, False)
    assert config.data.train == ("a.jsonl", "b*.jsonl")
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.output_dir == "runs/a=b"


def test_a_source_may_have_a_weight(tmp_path):
    config = load(tmp_path, MINIMAL, "data.train=[a.jsonl, {path: b.parquet, weight: 2}, {path: 'hf://c/d?split=x'}]")
    assert config.data.weighted_sources == [("a.jsonl", 1.0), ("b.parquet", 2.0), ("hf://c/d?split=x", 1.0)]


def test_overrides_fill_an_empty_section(tmp_path):
    assert load(tmp_path, MINIMAL + "mesh:\n", "mesh.fsdp=2").mesh.fsdp == 2


def test_a_date_stays_text(tmp_path):
    config = load(tmp_path, MINIMAL, "data.chat_template_kwargs.date_string=2024-07-26")
    assert config.data.chat_template_kwargs == {"date_string": "2024-07-26"}


def test_steps_take_the_place_of_the_default_epochs(tmp_path):
    assert load(tmp_path, MINIMAL, "training.steps=100").training.epochs is None
    config = load(tmp_path, MINIMAL + "training: {epochs: 2}", "training.epochs=null", "training.steps=100")
    assert (config.training.epochs, config.training.steps) == (None, 100)


def test_layer_ids_take_the_place_of_the_default_taps(tmp_path):
    draft = load(tmp_path, MINIMAL, "draft.target_layer_ids=[9, 1, 5]").draft
    assert (draft.num_taps, draft.target_layer_ids) == (None, (9, 1, 5))


BAD_OVERRIDES = [
    ("optimizer.learningrate=1e-3", "unknown key optimizer.learningrate; did you mean optimizer.learning_rate (at"),
    ("learning_rate=1e-3", "unknown key learning_rate; did you mean optimizer.learning_rate (at its peak"),
    (
        "optimizer.lr=1e-3",
        "unknown key optimizer.lr; did you mean optimizer.learning_rate (at its peak, after warm-up)?",
    ),
    ("lr=1e-3", "unknown key lr; did you mean optimizer.learning_rate (at"),
    ("optimiser.eps=1e-3", "unknown key optimiser; did you mean optimizer?"),
    ("train.lr=1e-3", "unknown key train; did you mean training?"),
    ("optim=adamw", "unknown key optim; did you mean optimizer?"),
    ("draft.batch_size=4", "unknown key draft.batch_size; did you mean training.batch_size (rows a step"),
    ("training.bs=4", "unknown key training.bs; did you mean training.batch_size (rows a step"),
    ("data.max_len=4", "unknown key data.max_len; did you mean data.max_length (tokens a row"),
    ("training.max_steps=4", "unknown key training.max_steps; did you mean training.steps (optimizer updates"),
    ("lora.alpha=8", "did you mean lora.lora_alpha (an adapter's output"),
    ("training.Gradient-Checkpointing=true", "did you mean training.remat (recompute"),
    ("training.gama=4", "unknown key training.gama; did you mean loss.gamma (exp only"),
    ("training.every_steps=4", "did you mean checkpoint.every_steps or evaluation.every_steps or logging.every_steps?"),
    ("mesh.zzz=4", "unknown key mesh.zzz; known keys: data, fsdp, tensor"),
    ("7=4", "unknown key 7; known keys: kind, output_dir,"),
    ("training.batch_size='8'", 'training.batch_size is "8"; give a whole number, without quotes or unit'),
    ("training.batch_size=8.5", "training.batch_size is 8.5; give a whole number"),
    ("training.batch_size=null", "training.batch_size is null; give a whole number"),
    ("training.batch_size={a: 1}", 'training.batch_size is {"a": 1}; give a whole number'),
    ("training.remat=1", "training.remat is 1; give true or false"),
    ("optimizer.learning_rate=fast", 'optimizer.learning_rate is "fast"; give a number'),
    ("optimizer.learning_rate=.inf", "optimizer.learning_rate is Infinity; give a finite number"),
    ("optimizer.learning_rate=0", "optimizer.learning_rate is 0; give more than 0"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 is 1.0; give less than 1"),
    ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; give a list of 2"),
    ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas is [0.9, 0.9, 0.9]; give a list of at most 2"),
    ("optimizer.min_lr_ratio=1.5", "optimizer.min_lr_ratio is 1.5; give at most 1"),
    ("loss.weighting=linear", 'loss.weighting is "linear"; give exp, uniform or dpace'),
    ("loss=null", "loss is null; give its settings, as {setting: value}"),
    ("output_dir=3", "output_dir is 3; give text, in quotes where YAML reads something else"),
    ("data.train=[]", "data.train is []; give a list of at least 1"),
    ("data.train=train.jsonl", 'data.train is "train.jsonl"; give a list, such as ["train.jsonl"]'),
    ("data.train=[3]", "data.train.0 is 3; give text"),
    ("data.train=[{path: a, wieght: 2}]", "unknown key data.train.0.wieght; did you mean data.train.0.weight?"),
    ("data.train=[{path: a, zzz: 2}]", "unknown key data.train.0.zzz; known keys: path, weight"),
    ("data.train=[b, {weight: 2}]", "data.train.1.path is missing; set data.train.1.path"),
    ("data.train=[{path: a, weight: 0}]", "data.train.0.weight is 0; give more than 0"),
    ("data.train=[{path: a, weight: 2x}]", 'data.train.0.weight is "2x"; give a number, without quotes or unit'),
    ("data.train={path: a}", 'data.train is {"path": "a"}; give a list'),
    ("data.validation=[{path: a}]", 'data.validation.0 is {"path": "a"}; give text'),
    ("data.validation_fraction=1", "data.validation_fraction is 1; give less than 1"),
    ("data.val_split=0.1", "unknown key data.val_split; did you mean data.validation_fraction (instead of"),
    ("data.supervise=first", 'data.supervise is "first"; give all or last'),
    ("data.reasoning=drop", 'data.reasoning is "drop"; give keep or hide'),
    ("data.chat_template_kwargs=3", "data.chat_template_kwargs is 3; give a mapping, such as {name: value}"),
    ("data.chat_template_kwargs={3: a}", "data.chat_template_kwargs has the key 3; put it in quotes"),
    ("seed=-1", "seed is -1; give at least 0"),
    ("draft.block_size=1", "draft.block_size is 1; give at least 2"),
    ("draft.num_layers=0", "draft.num_layers is 0; give at least 1"),
    ("draft.mask_embedding=learnt", 'draft.mask_embedding is "learnt"; give target or own'),
    ("draft.num_taps=null", "num_taps is null and target_layer_ids is null; give one of them"),
    ("draft.target_layer_ids=[]", "draft.target_layer_ids is []; give a list of at least 1"),
    ("draft.target_layer_ids=[1, -2]", "draft.target_layer_ids.1 is -2; give at least 0"),
    ("draft.target_layer_ids=[1, 4, 1]", "target_layer_ids [1, 4, 1] lists a layer twice"),
    ("draft.block_size=12", "loss.gamma has no default for draft.block_size 12 (known: 16: 7, 10: 5, 8: 4)"),
    ("target.init=random", "target.init random belongs to kind causal_lm"),
    ("optimizer.decay_ratio=0.5", "decay_ratio belongs to schedule 'wsd'"),
    ("noise.probability=0.5", "probability belongs to revealed geometric or random, not none"),
    ("noise.revealed=fraction", "revealed is fraction, which needs fraction"),
    ("noise.revealed=random", "revealed is random, which needs probability"),
    ("data.context_len=-1", "data.context_len is -1; give at least 0"),
    ("data.context_ratio=1", "data.context_ratio.0 is 1; give less than 1"),
    ("data.context_ratio=[0.5, 0.2]", "context_ratio [0.5, 0.2] must go up"),
    ("lora.r=0", "lora.r is 0; give at least 1"),
    ("lora.target_modules=3", "lora.target_modules is 3; give text"),
    ("lora.target_modules=[]", "lora.target_modules is []; give a list of at least 1"),
    ("noise.noise_ratio=0.7", "did you mean noise.probability (with which geometric shows"),
    ("lora.lora_dropout=1", "lora.lora_dropout is 1; give less than 1"),
    ("lora.masked_anchor=1.5", "lora.masked_anchor is 1.5; give at most 1"),
    ("lora={peft_config: a.json, r: 8}", "peft_config a.json says what r says too"),
    ("lora={masked_anchor: 0.5, adapt_context: true}", "masked_anchor is 0.5 and adapt_context true"),
    ("lora.r=8", "kind dflash has no adapters and ignores lora; drop it"),
    ("training.accumulation_steps=3", "batch_size 8 is not a multiple of accumulation_steps 3"),
    ("training.epochs=null", "epochs is null and steps is null; give one of them"),
    ("mesh.data=0", "data is 0; give -1"),
    ("mesh.fsdp=-1", "mesh.fsdp is -1; give at least 1"),
    ("loss.alpha=0.3", "alpha belongs to weighting 'dpace', not 'exp'"),
    ("kind=eagle", 'kind is "eagle"; give dflash, lora or causal_lm'),
    ("steps", "override 'steps': write section.key=value"),
    ("=3", "override '=3': write section.key=value"),
    ("seed.a=3", "override 'seed.a=3': seed is 0, not a section; write seed=value"),
    ("seed=[1", "override 'seed=[1': the value is not YAML"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES, ids=[override for override, _ in BAD_OVERRIDES])
def test_a_bad_setting_is_named_with_its_remedy(tmp_path, override, message):
    text = refused(tmp_path, override, text=MINIMAL + "seed: 0")
    assert message in text
    assert override in text


BAD_PAIRS = [
    (
        ("data.validation=[a.jsonl]", "data.validation_fraction=0.1"),
        'data: validation is ["a.jsonl"] and validation_fraction is 0.1; give one of them',
    ),
    (("loss.weighting=dpace", "loss.gamma=4"), "gamma belongs to weighting 'exp', not 'dpace'"),
    (("training.steps=10", "training.epochs=2"), "epochs is 2.0 and steps is 10"),
    (("draft.num_taps=2", "draft.target_layer_ids=[1, 2, 3]"), "num_taps is 2 and target_layer_ids is"),
    (("kind=lora", "draft.num_layers=2"), "kind lora has no layers of its own and ignores draft.num_layers"),
    (("kind=lora", "data.taps=a"), "data.taps holds hidden states, but kind lora needs the target's keys"),
    (("kind=causal_lm", "data.context_len=4"), "ignores data.context_len"),
    (("kind=causal_lm", "draft.num_layers=2"), "kind causal_lm trains no draft and ignores draft"),
    (("kind=causal_lm", "loss.gamma=2", "data.num_anchors=4"), "ignores loss, data.num_anchors"),
    (("kind=causal_lm", "noise.revealed=none"), "ignores noise"),
    (("kind=causal_lm", "evaluation.prompts=0"), "ignores evaluation.prompts"),
    (("optimizer.schedule=constant", "optimizer.min_lr_ratio=0.1"), "min_lr_ratio is set, but schedule 'constant'"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_PAIRS, ids=[" ".join(pair) for pair, _ in BAD_PAIRS])
def test_settings_that_exclude_each_other_are_refused(tmp_path, overrides, message):
    for override in overrides[1:]:
        assert message not in _message_of(tmp_path, override)
    assert message in refused(tmp_path, *overrides)


def _message_of(folder: Path, *overrides: str) -> str:
    try:
        load(folder, MINIMAL, *overrides)
    except InputError as error:
        return str(error)
    return ""


def test_every_mistake_is_reported_at_once_with_the_file(tmp_path):
    text = refused(tmp_path, text="output_dir: 3\nmesh: {fdsp: 2}\ndata: {}\n")
    assert text.startswith(f"{tmp_path / 'run.yaml'}: ")
    for part in (
        "output_dir is 3",
        "did you mean mesh.fsdp (",
        "target is missing; set target.path (Hugging Face folder",
        "data.train is missing; set data.train (JSONL or Parquet files",
    ):
        assert part in text


def test_a_mistake_is_reported_once(tmp_path):
    assert refused(tmp_path, "data.train=[3]").count("data.train") == 2  # the override is named beside the file
    assert refused(tmp_path, "optimizer.betas=[]").count("optimizer.betas is []; give a list of 2") == 1


def test_overrides_are_named_beside_the_file(tmp_path):
    assert refused(tmp_path, "mesh.fdsp=2").startswith(f"{tmp_path / 'run.yaml'} with mesh.fdsp=2: unknown key")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "run.yaml: is not YAML"),
        ("- a\n- b\n", "run.yaml: holds a list; give sections of settings"),
        ("", "run.yaml: is empty; give sections of settings"),
        (MINIMAL + "seed: 1\nseed: 2\n", "key 'seed' is given twice; drop one"),
        (MINIMAL + "mesh:\n  fsdp: 1\n  fsdp: 2\n", "key 'fsdp' is given twice; drop one"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    assert message in refused(tmp_path, text=text)


def test_an_absent_file_a_folder_and_bytes_are_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(InputError, match="cannot be read") as info:
            load_config(path)
        assert str(path) in str(info.value)


DUMPED = [
    (),
    ("training.steps=10",),
    ("data.train=[a, {path: b, weight: 0.5}]", "data.validation_fraction=0.01", "data.supervise=last"),
    ("draft.target_layer_ids=[1, 3]", "draft.block_size=10"),
    ("kind=lora", "lora.r=8", "lora.target_modules=all-linear", "draft.block_size=10", "data.context_ratio=0.5"),
    ("kind=lora", "lora={peft_config: a.json, masked_anchor: 0.5}", "noise={revealed: random, probability: 0.3}"),
    ("kind=causal_lm", "target.init=random", "optimizer.schedule=wsd", "optimizer.decay_ratio=0.1"),
    ("data.chat_template_kwargs={tools: [a, b], date_string: 2024-07-26}", "optimizer.eps=1e-12"),
]


@pytest.mark.parametrize("overrides", DUMPED, ids=" ".join)
def test_a_dumped_config_loads_equal(tmp_path, overrides):
    config = load(tmp_path, MINIMAL, *overrides)
    again = load(tmp_path, dump_config(config))
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_a_dumped_config_states_the_settings_in_force(tmp_path):
    given = dump_config(load(tmp_path, MINIMAL, "training.steps=10", "draft.target_layer_ids=[1, 3]"))
    default = dump_config(load(tmp_path))
    for name, in_given in (
        ("steps: 10", True),
        ("target_layer_ids", True),
        ("epochs: 6.0", False),
        ("num_taps: 5", False),
    ):
        assert (f"  {name}" in given) is in_given
        assert (f"  {name}" in default) is not in_given
    for word in ("epochs", "num_taps"):
        assert word not in given


def test_a_config_cannot_be_changed(tmp_path):
    with pytest.raises(ValidationError, match="frozen"):
        load(tmp_path).optimizer.learning_rate = 1.0  # type: ignore[misc]


def test_parse_config_takes_a_mapping_and_names_its_source():
    raw = {"output_dir": "a", "target": {"path": "b"}, "data": {"train": ["c"]}}
    assert parse_config(raw, "here").data.train == ("c",)
    with pytest.raises(InputError, match="here: data is missing"):
        parse_config({name: raw[name] for name in ("output_dir", "target")}, "here")


def test_every_setting_is_described():
    assert not [name for name, field in setting_names(RunConfig).items() if not field.description]


def test_names_in_other_trainers_stand_for_one_setting_and_hide_none():
    settings = setting_names(RunConfig)
    names = [name for aliases in ALIASES.values() for name in aliases.split()]
    assert set(ALIASES) <= set(settings)
    assert len(names) == len(set(names))
    for setting, aliases in ALIASES.items():  # a setting of another section may have the name
        section = setting.rpartition(".")[0]
        assert not {f"{section}.{name}".removeprefix(".") for name in aliases.split()} & set(settings)
    assert set(SECTION_ALIASES) <= set(RunConfig.model_fields)
    assert not set(" ".join(SECTION_ALIASES.values()).split()) & set(RunConfig.model_fields)


def test_reading_a_config_starts_no_jax(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL, encoding="utf-8")
    code = "import sys; from specjax.config import load_config; load_config('run.yaml'); print('jax' in sys.modules)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(CONFIGS.parent)!r}); {code}"]
    assert subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_state_only_what_differs(path):
    config = load_config(path)
    fields_of = config.model_fields_set - {"kind", "output_dir", "target", "data"}
    for name in fields_of:
        section = getattr(config, name)
        for key in section.model_fields_set - {"num_taps", "epochs"}:
            assert getattr(section, key) != type(section).model_fields[key].get_default(), (
                f"{name}.{key} is the default"
            )


def test_shipped_recipes():
    qwen, llama = (load_config(CONFIGS / f"{name}-dflash.yaml") for name in ("qwen3-8b", "llama3.1-8b"))
    assert (qwen.draft.mask_token_id, qwen.draft.block_size, qwen.gamma) == (151669, 16, 7.0)
    assert (llama.draft.mask_token_id, llama.draft.block_size, llama.gamma) == (128002, 10, 5.0)
    assert (
        qwen.optimizer == llama.optimizer == RunConfig.model_fields["optimizer"].get_default(call_default_factory=True)
    )
