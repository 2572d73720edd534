"""Hugging Face folder -> Orbax checkpoint: `python -m converters.hf_to_flax HF_FOLDER OUT`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from specjax.errors import InputError, exit_on_input_error
from specjax.models.decoder import Decoder
from specjax.models.dflash import DFlashDraft
from specjax.weights import (
    draft_config_to_hf,
    is_draft_config,
    load_draft,
    load_target,
    model_folder,
    save_checkpoint,
    weights_dtype,
)
from specjax.weights.config_fields import read_json
from specjax.weights.fingerprint import FINGERPRINT_FILE
from specjax.weights.load import CONFIG_FILE
from specjax.weights.peft import ADAPTER_CONFIG_FILE
from specjax.weights.side_files import SIDE_FILES, copy_side_files


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    """Converts a target or z-lab draft, in the dtype of its files."""
    parser = argparse.ArgumentParser(prog="python -m converters.hf_to_flax", description=__doc__)
    parser.add_argument("hf_folder", metavar="HF_FOLDER", help="model folder or hub id, of a target or a z-lab draft")
    parser.add_argument("out", metavar="OUT", help="new folder for the Orbax checkpoint and config.json")
    args = parser.parse_args(argv)
    folder = model_folder(args.hf_folder)
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise InputError(
            f"{folder}: holds an adapter, which is not converted: generate and benchmark take a LoRA draft's folder as "
            "--draft; give a target or a z-lab draft"
        )
    config, dtype = read_json(folder / CONFIG_FILE), weights_dtype(folder)
    model: Decoder | DFlashDraft
    if is_draft_config(config):
        model = load_draft(folder, dtype=dtype)
        config = draft_config_to_hf(model.config)  # which also says what the folder says by its files
    else:
        model = load_target(folder, dtype=dtype)
    out = save_checkpoint(model, args.out, config)
    if jax.process_index() == 0:
        copy_side_files(folder, out, (FINGERPRINT_FILE, *SIDE_FILES))
        print(f"{folder} -> {out}")


if __name__ == "__main__":
    main()
