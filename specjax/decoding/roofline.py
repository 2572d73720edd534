"""The least that a round of decoding can take on a device: its passes by the roofline model.

A pass takes as long as its matrix products at the device's peak, or as reading what it needs from memory once,
whichever is longer (Williams et al., doi:10.1145/1498765.1498785). Nothing else takes time: real passes are slower, and
the more so the smaller they are. Weights and caches are bfloat16, adapters float32; everything is on one device, and
what is written is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from specjax.devices import Peak
from specjax.models.decoder import BlockConfig, DecoderConfig
from specjax.models.dflash import DFlashConfig
from specjax.models.lora import LoRAConfig, matrix_parameters
from specjax.models.lora_draft import LoRADraftConfig

BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Workload:
    """rows: decoded together. context: tokens of a row in the cache. draft_tokens: verified a round."""

    rows: int
    context: int
    draft_tokens: int


@dataclass(frozen=True)
class Pass:
    """FLOPs of one pass over a model's weights, and bytes that it reads."""

    flops: float
    bytes: float

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Pass) -> Pass:
        return Pass(self.flops - other.flops, self.bytes - other.bytes)

    def seconds(self, peak: Peak) -> float:
        return max(self.flops / (peak.tflops * 1e12), self.bytes / (peak.gb_s * 1e9))


def seconds(passes: Iterable[Pass], peak: Peak) -> float:
    """Of passes one after the other."""
    return sum(each.seconds(peak) for each in passes)


def autoregressive(target: DecoderConfig, work: Workload) -> tuple[Pass, ...]:
    """A step of all rows."""
    return (_target_pass(target, work, 1),)


def speculative(target: DecoderConfig, draft: DFlashConfig | LoRADraftConfig, work: Workload) -> dict[str, list[Pass]]:
    """The passes of a round, by way of drafting: a DFlash draft has one way, a LoRA draft two if it drafts ahead.

    Raises:
        ValueError: the draft proposes fewer tokens than the workload verifies.
    """
    if not 1 <= work.draft_tokens < draft.block_size:
        raise ValueError(f"{work.draft_tokens} drafts of a block of {draft.block_size}")
    verify = _target_pass(target, work, work.draft_tokens + 1)
    if isinstance(draft, DFlashConfig):
        return {"draft, then verify": [_dflash_pass(target, draft, work), verify]}
    size, outcomes = draft.block_size, work.draft_tokens + 1
    head = _head(target, work, work.draft_tokens)
    drafted = _target_layers(target, work, size, size, draft.lora) + head
    if draft.adapt_context:
        own_cache = _target_layers(target, work, outcomes, _causal(outcomes), draft.lora)
        return {"two passes, and one for the adapted context": [drafted, verify, own_cache]}
    ways = {"two passes": [drafted, verify]}
    if draft.masked_anchor:
        # A block for every outcome, which sees the tokens up to its own: weights and context are read once for all.
        blocks = _target_layers(target, work, outcomes * size, size + _causal(outcomes), draft.lora)
        again = Pass(0.0, _layer_bytes(target) + _cache_bytes(target.block, target.windows, work))
        adapters = target.num_hidden_layers * draft.lora.parameters(target.block)
        left_out = Pass(_matmul(adapters, outcomes * work.rows), 0.0)  # the adapters' products with the tokens
        ways["one pass"] = [verify + blocks + head + left_out - again]
    return ways


def _target_pass(target: DecoderConfig, work: Workload, tokens: int) -> Pass:
    """The target over so many tokens a row, with its head."""
    return _target_layers(target, work, tokens, _causal(tokens)) + _head(target, work, tokens)


def _causal(tokens: int) -> float:
    """Of so many tokens in a row, those that one of them sees on average."""
    return (tokens + 1) / 2


def _target_layers(
    target: DecoderConfig, work: Workload, tokens: int, own: float, lora: LoRAConfig | None = None
) -> Pass:
    """The target's layers over tokens of a row, each of which sees the context and `own` of the pass's tokens."""
    layers = target.num_hidden_layers
    flops = _matmul(layers * matrix_parameters(target.block), tokens * work.rows)
    flops += _attention_flops(target.block, target.windows, work, tokens, own)
    read = _layer_bytes(target) + _cache_bytes(target.block, target.windows, work)
    if lora is not None:
        adapters = layers * lora.parameters(target.block)
        flops += _matmul(adapters, tokens * work.rows)
        read += FP32 * adapters
    return Pass(flops, read)


def _dflash_pass(target: DecoderConfig, draft: DFlashConfig, work: Workload) -> Pass:
    """The draft over a block a row, the target's head over its drafts, and the context of what was verified before."""
    layers = draft.num_hidden_layers * matrix_parameters(draft.block)
    keys_values = draft.num_hidden_layers * 2 * draft.hidden_size * draft.num_key_value_heads * draft.head_dim
    context = len(draft.target_layer_ids) * draft.hidden_size**2 + keys_values
    windows = tuple(draft.sliding_window if kind == "sliding_attention" else None for kind in draft.layer_types)
    flops = _matmul(layers, draft.block_size * work.rows) + _matmul(context, (work.draft_tokens + 1) * work.rows)
    flops += _attention_flops(draft.block, windows, work, draft.block_size, draft.block_size)
    read = BF16 * (layers + context) + _cache_bytes(draft.block, windows, work)
    return Pass(flops, read) + _head(target, work, work.draft_tokens)


def _head(target: DecoderConfig, work: Workload, tokens: int) -> Pass:
    parameters = target.vocab_size * target.hidden_size
    return Pass(_matmul(parameters, tokens * work.rows), BF16 * parameters)


def _matmul(parameters: int, tokens: int) -> float:
    return 2.0 * parameters * tokens


def _layer_bytes(target: DecoderConfig) -> float:
    return BF16 * target.num_hidden_layers * matrix_parameters(target.block)


def _attention_flops(
    block: BlockConfig, windows: tuple[int | None, ...], work: Workload, tokens: int, own: float
) -> float:
    """Scores and their sums of tokens that each see the context and `own` others."""
    keys = sum(_visible(work, window) + own for window in windows)
    return 4.0 * work.rows * tokens * keys * block.num_attention_heads * block.head_dim


def _cache_bytes(block: BlockConfig, windows: tuple[int | None, ...], work: Workload) -> float:
    """Keys and values of the context."""
    keys = sum(_visible(work, window) for window in windows)
    return BF16 * 2.0 * work.rows * keys * block.num_key_value_heads * block.head_dim


def _visible(work: Workload, window: int | None) -> int:
    """Tokens of the context that the first token after it sees; a window counts that token, too."""
    return work.context if window is None else min(work.context, window - 1)
