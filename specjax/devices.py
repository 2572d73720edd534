"""What known devices can do at most, by the vendors' data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """Of one device: dense bf16 TFLOP/s, and GB/s from its memory."""

    tflops: float
    gb_s: float


# Keyed by `jax.Device.device_kind`. A chip of TPU7x is two devices.
PEAKS = {
    "TPU v4": Peak(275.0, 1228.0),
    "TPU v5 lite": Peak(197.0, 819.0),
    "TPU v5": Peak(459.0, 2765.0),
    "TPU v5p": Peak(459.0, 2765.0),
    "TPU v6 lite": Peak(918.0, 1638.0),
    "TPU v6e": Peak(918.0, 1638.0),
    "TPU7x": Peak(1153.5, 3690.0),
    "NVIDIA A100-SXM4-40GB": Peak(312.0, 1555.0),
    "NVIDIA A100-SXM4-80GB": Peak(312.0, 2039.0),
    "NVIDIA H100 80GB HBM3": Peak(989.0, 3350.0),
    "NVIDIA H100 PCIe": Peak(756.0, 2000.0),
    "NVIDIA H200": Peak(989.0, 4800.0),
    "NVIDIA B200": Peak(2250.0, 8000.0),
}
