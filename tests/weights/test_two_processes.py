"""Loading, fingerprinting and saving by two processes with two devices each, as on a pod."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp

from specjax.weights import load_checkpoint, load_target, save_target, target_fingerprint
from tests.weights.tiny import assert_same_params, raw_config, tiny_decoder

WORKER = """
import json, sys
import jax

port, index, folder = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))

from specjax.errors import InputError
from specjax.models.sharding import make_mesh
from specjax.weights import (
    decoder_config_to_hf, load_checkpoint, load_target, save_checkpoint, save_target, target_fingerprint
)
from specjax.weights.safetensors_files import TensorFiles

elements, read = {}, TensorFiles.read

def counting(self, name, index):
    out = read(self, name, index)
    elements[name] = elements.get(name, 0) + out.size
    return out

TensorFiles.read = counting
with jax.set_mesh(make_mesh(1, 4, 1, devices=jax.devices())):
    target = load_target(f"{folder}/source")
    fingerprint = target_fingerprint(target)
    save_target(target, f"{folder}/saved")
    save_checkpoint(target, f"{folder}/checkpoint", decoder_config_to_hf(target.config))
    save_target(load_checkpoint(f"{folder}/checkpoint"), f"{folder}/restored")
    try:
        save_checkpoint(target, f"{folder}/checkpoint", {})
    except InputError as error:
        refused = str(error)
print(json.dumps({"elements": elements, "first_rows": fingerprint.first_rows, "refused": refused}))
"""


def run_two(folder: Path) -> list[dict[str, object]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(index), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


def test_each_process_reads_its_half_and_together_they_write_the_whole(tmp_path: Path) -> None:
    decoder = tiny_decoder(raw_config(), jnp.bfloat16)
    save_target(decoder, tmp_path / "source")
    results = run_two(tmp_path)
    up = "model.layers.0.mlp.up_proj.weight"
    for result in results:
        # [48, 32], its inputs split over four devices, two of them here; norms are replicated and read whole.
        assert result["elements"][up] == 48 * 32 // 2
        assert result["elements"]["model.norm.weight"] == 32
        assert result["first_rows"] == target_fingerprint(decoder).first_rows
        assert "exists; give a new folder" in result["refused"]
    for name in ("saved", "restored"):
        assert_same_params(load_target(tmp_path / name), decoder)
    assert_same_params(load_checkpoint(tmp_path / "checkpoint"), decoder)
