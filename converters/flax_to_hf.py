"""Orbax checkpoint or training run -> Hugging Face folder.

`python -m converters.flax_to_hf CHECKPOINT_OR_RUN OUT [--format zlab|peft|hf] [--step best|N] [--dtype DTYPE]`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specjax.errors import InputError, exit_on_input_error
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.models.lora_draft import LoRADraft
from specjax.weights import load_checkpoint, load_run_params, read_fingerprint, save_draft, save_target
from specjax.weights.config_fields import read_json
from specjax.weights.fingerprint import FINGERPRINT_FILE
from specjax.weights.load import CONFIG_FILE
from specjax.weights.orbax_checkpoint import CHECKPOINT, RUN_CHECKPOINTS, RUN_TARGET_CONFIG, checkpoint_dtype
from specjax.weights.side_files import copy_side_files, unshaping_fields

DTYPES = ("bfloat16", "float16", "float32")
FORMATS: dict[type, str] = {Decoder: "hf", DFlashDraft: "zlab", LoRADraft: "peft"}


def step_argument(text: str) -> str | int:
    if text == "best":
        return text
    if text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a step number nor 'best'")


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    """Exports a DFlash draft to the z-lab layout, a LoRA draft as a PEFT adapter, or a target for transformers."""
    parser = argparse.ArgumentParser(prog="python -m converters.flax_to_hf", description=__doc__)
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN", help="output of hf_to_flax, or a training run's folder")
    parser.add_argument("out", metavar="OUT", help="folder to write; other files in it stay")
    parser.add_argument(
        "--format", choices=FORMATS.values(), help="zlab for DFlash drafts, peft for LoRA drafts, hf for targets"
    )
    parser.add_argument("--step", type=step_argument, help="of a run: a step number, or best (default: the latest)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of --format hf (default: a checkpoint's own; bfloat16 of runs) and peft (default: float32)",
    )
    args = parser.parse_args(argv)
    source, out = Path(args.source), Path(args.out)
    module, dtype, extra_config = _read(source, args.step)
    expected = FORMATS[type(module)]
    if args.format not in (None, expected):
        raise InputError(f"{source}: holds a {type(module).__name__}; use --format {expected}, not {args.format}")
    if isinstance(module, Decoder):
        save_target(module, out, jnp.dtype(args.dtype) if args.dtype else dtype, extra_config=extra_config)
    elif isinstance(module, LoRADraft):
        if (out / RUN_CHECKPOINTS).is_dir():
            raise InputError(f"{out}: holds a training run, whose {FINGERPRINT_FILE} would be replaced; give another")
        dtype, name = jnp.dtype(args.dtype or "float32"), _target_name(source)
        save_draft(module, out, fingerprint=read_fingerprint(source), base_name=name, dtype=dtype)
    else:
        if args.dtype not in (None, "bfloat16"):
            raise InputError(f"--dtype {args.dtype}: the z-lab layout is bfloat16; leave --dtype out")
        save_draft(module, out, fingerprint=read_fingerprint(source))
    if jax.process_index() == 0:
        copy_side_files(source, out)
        print(f"{source} -> {out}")


def _read(source: Path, step: Any) -> tuple[Decoder | DFlashDraft | LoRADraft, Any, dict[str, Any]]:
    """(model, dtype to write, fields of its config.json to keep)."""
    if (source / RUN_CHECKPOINTS).is_dir():
        config = source / RUN_TARGET_CONFIG
        return load_run_params(source, step), jnp.bfloat16, unshaping_fields(config) if config.exists() else {}
    if not (source / CHECKPOINT).is_dir():
        raise InputError(f"{source}: neither a checkpoint of hf_to_flax ({CHECKPOINT}/) nor a run ({RUN_CHECKPOINTS}/)")
    if step is not None:
        raise InputError(f"--step {step}: {source} is a single checkpoint; leave --step out")
    dtype = checkpoint_dtype(source)
    return load_checkpoint(source, dtype=dtype), dtype, unshaping_fields(source / CONFIG_FILE)


def _target_name(run: Path) -> str | None:
    """The target of a run as PEFT finds it, by path or hub id; None where it cannot."""
    from specjax.training.run import METADATA_FILE, TARGET_NAME

    path = run / METADATA_FILE
    name = read_json(path).get(TARGET_NAME) if path.exists() else None
    return None if name is None or (Path(name).is_absolute() and not Path(name).is_dir()) else str(name)


if __name__ == "__main__":
    main()
