"""The sections of a run config: every setting with its default, bounds and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from specjax.config_messages import AS_LIST, AS_MAPPING, AS_TEXT, shown

DEFAULT_NUM_TAPS = 5
DEFAULT_EPOCHS = 6.0
TERMS = ("ce", "ce_argmax", "kl", "tv", "lk", "streak", "ce_streak")

Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A strict, immutable group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TargetConfig(Section):
    path: str = Field(description="Hugging Face folder or hub id of the target, or 'embedded'")
    init: Literal["weights", "random"] = Field(
        "weights", description="causal_lm only; random: train from scratch, needs only config.json and tokenizer"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="compute dtype of target and draft; auto: bfloat16 on accelerators, float32 on CPU"
    )


class DraftConfig(Section):
    init: str | None = Field(
        None,
        description="folder, hub id or run of a draft (its latest checkpoint) to start from, of the same taps or "
        "adapters and, unless mask_embedding is own, mask token; the layers that num_layers adds to it change nothing "
        "at first; null: random",
    )
    num_layers: int = Field(5, ge=1, description="draft layers")
    num_taps: int | None = Field(
        None, ge=1, description="tapped target layers, spread evenly; 5 unless target_layer_ids lists them"
    )
    target_layer_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="tapped target layers, zero-based, in the order in which they are concatenated"
    )
    block_size: int = Field(16, ge=2, description="slots of a block: the anchor and block_size - 1 drafted tokens")
    mask_token_id: int | None = Field(
        None,
        ge=0,
        description="null: the tokenizer's mask token, else the first embedding row without a token, else, with "
        "mask_embedding own, the first id past the embedding",
    )
    mask_embedding: Literal["target", "own"] | None = Field(
        None,
        description="target: the target's embedding row mask_token_id; own: a vector that is trained with the draft; "
        "null: as in the draft to start from, else target",
    )
    sliding_window: int | None = Field(None, ge=1, description="tokens; null: full attention in every draft layer")

    @model_validator(mode="before")
    @classmethod
    def _default_taps(cls, given: Any) -> Any:
        return _default_unless(given, "num_taps", DEFAULT_NUM_TAPS, "target_layer_ids")

    @model_validator(mode="after")
    def _taps(self) -> DraftConfig:
        ids = self.target_layer_ids
        if (self.num_taps is None) == (ids is None):
            raise ValueError(
                f"num_taps is {shown(self.num_taps)} and target_layer_ids is {shown(ids)}; "
                "give one of them and set the other to null"
            )
        if ids is not None and len(set(ids)) != len(ids):
            raise ValueError(f"target_layer_ids {list(ids)} lists a layer twice; drop the duplicate")
        return self


def _form_of_modules(value: Any) -> str:
    return AS_LIST if isinstance(value, list | tuple) else AS_TEXT


TargetModules = Annotated[
    Annotated[str, Tag(AS_TEXT)] | Annotated[tuple[str, ...], Field(min_length=1), Tag(AS_LIST)],
    Discriminator(_form_of_modules),
]


class LoRASection(Section):
    """In PEFT's own words, and what a LoRA draft has beside its adapters."""

    peft_config: str | None = Field(
        None, description="adapter_config.json of PEFT to take the settings of the adapters from, instead of those here"
    )
    r: int = Field(32, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(32.0, gt=0, description="an adapter's output is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="probability with which an adapter's input is dropped")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")
    target_modules: TargetModules = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="projections that are adapted, as a list, a regular expression, or all-linear",
    )
    masked_anchor: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the blocks whose anchor is masked too, so that a block can be drafted before its anchor "
        "is known, in one pass a round; 1: only so",
    )
    adapt_context: bool = Field(
        False, description="the adapters act on the context too, which then has keys and values of its own"
    )

    @model_validator(mode="after")
    def _consistent(self) -> LoRASection:
        given = sorted({"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"} & self.model_fields_set)
        if self.peft_config is not None and given:
            raise ValueError(f"peft_config {self.peft_config} says what {', '.join(given)} says too; drop one of them")
        if self.adapt_context and self.masked_anchor:
            raise ValueError(
                f"masked_anchor is {self.masked_anchor:g} and adapt_context true: one pass a round needs the target's "
                "own keys and values; give one of them"
            )
        return self


class WeightedSource(Section):
    path: str = Field(description="JSONL or Parquet files or globs, or hf://owner/name?split=train")
    weight: Positive = Field(1.0, description="passes over this source's records in an epoch")


def _form_of_source(entry: Any) -> str:
    return AS_MAPPING if isinstance(entry, Mapping | WeightedSource) else AS_TEXT


Ratio = Annotated[float, Field(ge=0, lt=1)]


def _both_ends(ratio: Any) -> Any:
    return (ratio, ratio) if isinstance(ratio, int | float) and not isinstance(ratio, bool) else ratio


TrainingSource = Annotated[
    Annotated[str, Tag(AS_TEXT)] | Annotated[WeightedSource, Tag(AS_MAPPING)], Discriminator(_form_of_source)
]


class DataConfig(Section):
    train: tuple[TrainingSource, ...] = Field(
        min_length=1,
        description="JSONL or Parquet files or globs of conversations or token ids, or hf://owner/name?split=train; "
        "with a weight: {path: ..., weight: 2}",
    )
    validation: tuple[str, ...] = Field((), description="held out: files or globs or hf://, as in train")
    validation_fraction: float | None = Field(
        None, gt=0, lt=1, description="instead of validation: share of train's records held out, chosen by content"
    )
    supervise: Literal["all", "last"] = Field(
        "all", description="assistant turns of a conversation that are learnt; last: the last one only"
    )
    reasoning: Literal["keep", "hide"] = Field(
        "keep", description="hide: assistant messages lose reasoning_content and <think>...</think> before rendering"
    )
    max_length: int = Field(3072, ge=2, description="tokens a row; longer conversations are cut")
    taps: str | None = Field(None, description="folder of python -m specjax.capture: train without running the target")
    packing: bool = Field(False, description="fill rows with several conversations; they never see each other")
    num_anchors: int = Field(512, ge=1, description="training blocks a row of max_length tokens")
    context_len: int = Field(0, ge=0, description="first tokens of a conversation in which no block starts")
    context_ratio: Annotated[tuple[Ratio, Ratio], BeforeValidator(_both_ends)] = Field(
        (0.0, 0.0),
        description="share of a conversation, from its start, in which no block starts; of [low, high] every "
        "conversation draws its own between them",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="passed to the chat template, as the server will (e.g. enable_thinking)"
    )

    @model_validator(mode="after")
    def _one_validation_set(self) -> DataConfig:
        if self.validation and self.validation_fraction is not None:
            raise ValueError(
                f"validation is {shown(self.validation)} and validation_fraction is {self.validation_fraction}; "
                "give one of them"
            )
        if self.context_ratio[0] > self.context_ratio[1]:
            raise ValueError(f"context_ratio {list(self.context_ratio)} must go up; swap the two")
        return self

    @property
    def weighted_sources(self) -> list[tuple[str, float]]:
        """(path, passes over its records in an epoch) of every entry of `train`."""
        return [(entry, 1.0) if isinstance(entry, str) else (entry.path, entry.weight) for entry in self.train]


def _sum_of_one(objective: Any) -> Any:
    return {objective: 1.0} if isinstance(objective, str) else objective


def _has_streak(objective: Any) -> bool:
    return isinstance(objective, Mapping) and any("streak" in str(name) for name in objective)


class LossConfig(Section):
    objective: Annotated[dict[str, Positive], BeforeValidator(_sum_of_one)] = Field(
        {"ce": 1.0},
        description="one of or a sum of ce: cross-entropy with the data token; ce_argmax: with the target's choice; "
        "kl, tv, lk: distance from its distribution; or streak or ce_streak",
    )
    weighting: Literal["exp", "uniform", "dpace"] | None = Field(
        None,
        description="exp, uniform or dpace: weights of a block's positions; none with a streak, which has its own",
    )
    gamma: float | None = Field(None, gt=0, description="exp only; null: 7, 5, 4 for block size 16, 10, 8")
    alpha: float | None = Field(None, ge=0, le=1, description="dpace only; null: 0.5")
    cumulative_mask: bool = Field(True, description="stop a block's supervision at its first unsupervised token")
    chunk_blocks: int | None = Field(
        None,
        ge=1,
        description="blocks a row whose logits exist at a time; null: as many as one array of 256 MiB a device holds",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_weighting(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("weighting") is not None:
            return given
        return given if _has_streak(_sum_of_one(given.get("objective"))) else {**given, "weighting": "exp"}

    @model_validator(mode="after")
    def _objective_is_a_sum(self) -> LossConfig:
        unknown = sorted(self.objective.keys() - set(TERMS))
        if unknown or not self.objective:
            found = f"the term {shown(unknown[0])}" if unknown else "no term"
            raise ValueError(f"objective has {found}; give {', '.join(TERMS)}, or a sum such as {{ce: 0.5, kl: 0.5}}")
        if _has_streak(self.objective) and len(self.objective) > 1:
            raise ValueError("objective adds a streak to other terms, but a streak is no mean over slots; use it alone")
        if _has_streak(self.objective) and self.weighting is not None:
            raise ValueError(
                f"objective {next(iter(self.objective))} weighs a block's positions itself; drop weighting"
            )
        return self

    @model_validator(mode="after")
    def _no_ignored_setting(self) -> LossConfig:
        for name, weighting in (("gamma", "exp"), ("alpha", "dpace")):
            if getattr(self, name) is not None and self.weighting != weighting:
                raise ValueError(f"{name} belongs to weighting {weighting!r}, not {self.weighting!r}; drop it")
        return self


class NoiseConfig(Section):
    revealed: Literal["none", "fraction", "geometric", "random"] = Field(
        "none", description="tokens after a block's anchor that the draft is shown in training, and not asked for"
    )
    fraction: float | None = Field(
        None, gt=0, lt=1, description="fraction only: share of the block_size - 1 slots, rounded down"
    )
    probability: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="with which geometric shows each further token, and random each token (1 - the noise ratio)",
    )

    @model_validator(mode="after")
    def _settings_of_the_law(self) -> NoiseConfig:
        for name, laws in (("fraction", ("fraction",)), ("probability", ("geometric", "random"))):
            given = getattr(self, name) is not None
            if given and self.revealed not in laws:
                raise ValueError(f"{name} belongs to revealed {' or '.join(laws)}, not {self.revealed}; drop it")
            if not given and self.revealed in laws:
                raise ValueError(f"revealed is {self.revealed}, which needs {name}; set it")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = Field("adamw", description="muon: for hidden matrices, with Adam for the rest")
    learning_rate: float = Field(6e-4, gt=0, description="at its peak, after warm-up")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="decay of Adam's running moments")
    eps: float = Field(
        1e-8, gt=0, description="added to the root of Adam's second moment, and to the norm that Muon divides by"
    )
    weight_decay: float = Field(0.0, ge=0, description="on matrices; with muon on hidden ones only")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="after warm-up: cosine or linear decay, none, or none and then linear decay (wsd)"
    )
    warmup_ratio: float = Field(0.04, ge=0, lt=1, description="share of the steps")
    decay_ratio: float | None = Field(None, gt=0, le=1, description="wsd only; share of the steps; null: 0.2")
    min_lr_ratio: float | None = Field(
        None, ge=0, le=1, description="final learning rate over its peak, not with constant; null: 0.1"
    )
    clip_norm: float = Field(1.0, gt=0, description="global gradient norm")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of a running average of the parameters, which is then what is evaluated and exported; "
        "the first steps average less: min(ema_decay, (1 + step) / (10 + step)); null: none",
    )

    @model_validator(mode="after")
    def _no_ignored_setting(self) -> OptimizerConfig:
        if self.decay_ratio is not None and self.schedule != "wsd":
            raise ValueError("decay_ratio belongs to schedule 'wsd'; drop it")
        if self.min_lr_ratio is not None and self.schedule == "constant":
            raise ValueError("min_lr_ratio is set, but schedule 'constant' has no end; drop it")
        return self


class TrainingConfig(Section):
    epochs: float | None = Field(None, gt=0, description="passes over the data; 6 unless steps is given")
    steps: int | None = Field(None, ge=1, description="optimizer updates, instead of epochs")
    batch_size: int = Field(8, ge=1, description="rows a step, over all devices and micro-batches")
    accumulation_steps: int = Field(1, ge=1, description="micro-batches a step")
    attention_chunk: int = Field(
        1024, ge=1, description="queries, and keys up to 512, whose attention scores exist at a time"
    )
    remat: bool = Field(True, description="recompute layers in the backward pass instead of storing activations")

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, given: Any) -> Any:
        return _default_unless(given, "epochs", DEFAULT_EPOCHS, "steps")

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation_steps {self.accumulation_steps}"
            )
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"epochs is {shown(self.epochs)} and steps is {shown(self.steps)}; "
                "give one of them and set the other to null"
            )
        return self


class CheckpointConfig(Section):
    every_steps: int = Field(1000, ge=1, description="steps between checkpoints; the last step always writes one")
    keep_last: int = Field(2, ge=1, description="latest checkpoints that stay on disk")
    keep_best: int = Field(1, ge=0, description="checkpoints that stay on disk for their evaluation")


class EvaluationConfig(Section):
    every_steps: int = Field(500, ge=1, description="steps between evaluations; none without validation data")
    samples: int = Field(64, ge=1, description="validation rows, the same ones every time")
    prompts: int = Field(
        16,
        ge=0,
        description="validation prompts, the same ones every time, that are answered with the draft: the best "
        "checkpoint is that of the highest acceptance length; 0: teacher-forced measures alone",
    )
    max_new_tokens: int = Field(256, ge=2, description="of these answers")


class LoggingConfig(Section):
    every_steps: int = Field(10, ge=1, description="steps between log lines")
    tensorboard: bool = Field(True, description="write TensorBoard events into output_dir")
    peak_tflops: float | None = Field(
        None, gt=0, description="of one device in the compute dtype, for MFU; null: from a table of known devices"
    )


class MeshConfig(Section):
    data: int = Field(-1, ge=-1, description="groups that share the batch; -1: the devices that the other axes leave")
    fsdp: int = Field(1, ge=1, description="devices that share the batch and each hold a part of every parameter")
    tensor: int = Field(1, ge=1, description="devices that split heads, MLP and vocabulary")

    @model_validator(mode="after")
    def _not_zero(self) -> MeshConfig:
        if self.data == 0:
            raise ValueError("data is 0; give -1 (the rest of the devices) or at least 1")
        return self


def _default_unless(given: Any, name: str, default: Any, other: str) -> Any:
    """`given` with `name: default` added if it names neither that setting nor `other`, which takes its place."""
    if not isinstance(given, Mapping) or name in given or given.get(other) is not None:
        return given
    return {**given, name: default}
