"""What the entry points share: arguments of decoding and of sharing work, and the models that these name."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from specjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specjax.models.decoder import Decoder, DecoderConfig
    from specjax.models.dflash import DFlashConfig, DFlashDraft
    from specjax.models.lora_draft import LoRADraft, LoRADraftConfig


@dataclass(frozen=True)
class Models:
    """A target with what decoding it needs, and a draft."""

    target: Decoder
    draft: DFlashDraft | LoRADraft | None
    tokenizer: PreTrainedTokenizerBase | None
    stop_token_ids: tuple[int, ...]


def add_model_arguments(parser: argparse.ArgumentParser, *, draft_required: bool) -> None:
    """Adds --target, --draft, --chat-template-kwargs, --dtype and --tensor."""
    parser.add_argument("--target", required=True, help="Hugging Face folder or hub id of the target, or 'embedded'")
    parser.add_argument(
        "--draft", required=draft_required, help="folder or hub id of a DFlash or LoRA draft, or a training run"
    )
    parser.add_argument(
        "--chat-template-kwargs", type=_json_object, default={}, metavar="JSON", help='e.g. {"enable_thinking": false}'
    )
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype and --tensor."""
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share the models")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --temperature, --top-k, --top-p and --seed."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    add_draw_arguments(parser)


def add_draw_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --top-k, --top-p and --seed, which say how to draw at a temperature above 0."""
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up P only, after top-k")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `decoding.generate` takes of `add_sampling_arguments`, but for the seeds.

    Raises:
        InputError: a value out of range.
    """
    from specjax.decoding.inputs import check_sampling

    check_sampling(args.temperature, args.top_k, args.top_p)
    check_seed(args)
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}


def check_seed(args: argparse.Namespace) -> None:
    """Raises InputError for a --seed that is no seed."""
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed is {args.seed}; give an integer from 0 to 2**32 - 1")


def number_or_auto(text: str, option: str = "--draft-tokens") -> int | Literal["auto"]:
    """A word of an option.

    Raises:
        InputError: it is neither.
    """
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option} is {text!r}; give a number or auto") from None


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --num-processes and --process-id, of commands whose shards several processes write."""
    parser.add_argument("--num-processes", type=int, default=1, help="processes that share the work")
    parser.add_argument("--process-id", type=int, default=0, help="which of them this is, from 0")


def check_share(args: argparse.Namespace) -> None:
    """Raises InputError unless --process-id is one of --num-processes."""
    if args.num_processes < 1:
        raise InputError(f"--num-processes is {args.num_processes}; give at least 1")
    if not 0 <= args.process_id < args.num_processes:
        raise InputError(f"--process-id is {args.process_id} of --num-processes {args.num_processes}; count from 0")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


@contextlib.contextmanager
def decoding_mesh(args: argparse.Namespace) -> Iterator[None]:
    """The mesh and the precision of matrix products of a decoding command."""
    import jax

    from specjax.models.precision import matmul_precision
    from specjax.models.sharding import make_mesh

    if not 1 <= args.tensor <= jax.device_count():
        raise InputError(f"--tensor is {args.tensor}; there are {jax.device_count()} devices")
    with jax.set_mesh(make_mesh(tensor=args.tensor)), matmul_precision(dtype_name(args)):
        yield


def dtype_name(args: argparse.Namespace) -> str:
    """--dtype, with auto resolved: float32 on CPU, bfloat16 on accelerators."""
    import jax

    if args.dtype == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return str(args.dtype)


def read_draft_config(path_or_id: str, target: DecoderConfig) -> DFlashConfig | LoRADraftConfig:
    """The configuration of a draft for `target`, of a folder, hub id or training run, without its weights."""
    from pathlib import Path

    from specjax import weights
    from specjax.weights.orbax_checkpoint import RUN_DRAFT_CONFIG

    if (Path(path_or_id) / RUN_DRAFT_CONFIG).exists():
        return weights.read_run_draft_config(path_or_id)
    return weights.read_draft_config(path_or_id, target)


def load_models(args: argparse.Namespace) -> Models:
    """Loads target, draft and tokenizer; warns on stderr where a DFlash draft was trained for another target, or a
    draft with another chat template or thinking mode. Raises InputError for adapters that another base was given.
    """
    import jax.numpy as jnp

    from specjax import weights
    from specjax.models.decoder import check_mesh_fits
    from specjax.weights.tokenizer import load_tokenizer, stop_token_ids

    dtype = jnp.dtype(dtype_name(args))
    try:
        check_mesh_fits(weights.read_target_config(args.target))
    except ValueError as error:
        raise InputError(f"--tensor {args.tensor}: {error}") from error
    target = weights.load_target(args.target, dtype=dtype)
    tokenizer = load_tokenizer(args.target)
    draft = None if args.draft is None else _load_draft(args, target, tokenizer)
    return Models(target, draft, tokenizer, stop_token_ids(args.target))


def _load_draft(
    args: argparse.Namespace, target: Decoder, tokenizer: PreTrainedTokenizerBase | None
) -> DFlashDraft | LoRADraft:
    from pathlib import Path

    from specjax import weights
    from specjax.decoding.drafter import drafter_of
    from specjax.decoding.inputs import check_models
    from specjax.models.lora_draft import LoRADraft
    from specjax.weights.fingerprint import FINGERPRINT_FILE
    from specjax.weights.orbax_checkpoint import RUN_DRAFT_CONFIG
    from specjax.weights.tokenizer import mask_token_warning

    folder = Path(args.draft)
    draft: DFlashDraft | LoRADraft
    if (folder / RUN_DRAFT_CONFIG).exists():
        draft = weights.load_run_draft(folder, dtype=target.dtype)
    else:
        folder = weights.model_folder(args.draft)
        draft = weights.load_draft(folder, dtype=target.dtype, base=target.config)
    check_models(target, drafter_of(draft))
    template = tokenizer.get_chat_template() if tokenizer is not None and tokenizer.chat_template else None
    thinking = json.dumps(args.chat_template_kwargs, sort_keys=True)
    served = weights.target_fingerprint(target, chat_template=template, thinking=thinking)
    recorded = weights.read_fingerprint(folder)
    if isinstance(draft, LoRADraft) and recorded is not None and "first_rows" in recorded.differs(served):
        name = weights.adapter_base_name(folder)
        raise InputError(
            f"{args.draft}: its adapters were trained on another base{f' ({name})' if name else ''}: the weights of "
            f"--target {args.target} differ; give that base, or train adapters for this one. To draft with them all "
            f"the same, set target_fingerprint to null in {FINGERPRINT_FILE} of a copy"
        )
    for warning in (
        weights.fingerprint_warning(recorded, served),
        mask_token_warning(draft.config.mask_token_id, tokenizer),
    ):
        if warning:
            print(f"warning: {args.draft}: {warning}", file=sys.stderr)
    return draft
