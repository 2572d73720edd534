"""Mesh axes and the one table of PartitionSpecs.

Every array of the package is laid out by a field of `Specs`; field names carry the dimension letters used
throughout: b rows, t tokens, s key slots, d hidden, n query heads, k key/value heads, h head size, f MLP width,
v vocabulary, N blocks of a row, B slots of a block, q queries and j own keys of one, m concatenated taps,
i inputs, o outputs, r rank of a LoRA pair.
"""

# ruff: noqa: N815, RUF009 (names carry dimension letters; a PartitionSpec is immutable)

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, get_abstract_mesh
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


@dataclass(frozen=True)
class Specs:
    """PartitionSpecs by purpose and dimension letters."""

    # Parameters. Column-parallel kernels split their outputs over `tensor`, row-parallel ones their inputs. A LoRA
    # pair [i, r], [r, o] takes its inputs' axis and its outputs' axis from its kernel; the rank is never split.
    embed_vd: P = P("tensor", "fsdp")
    head_dv: P = P("fsdp", "tensor")
    column_io: P = P("fsdp", "tensor")
    row_io: P = P("tensor", "fsdp")
    shared_io: P = P("fsdp", None)
    column_bias_o: P = P("tensor")
    replicated_bias_o: P = P(None)
    norm_d: P = P(None)
    mask_embedding_d: P = P(None)
    # Activations.
    act_b: P = P(BATCH)
    act_bt: P = P(BATCH, None)
    act_bN: P = P(BATCH, None)
    act_bNB: P = P(BATCH, None, None)
    act_btd: P = P(BATCH, None, None)
    act_bNBd: P = P(BATCH, None, None, None)
    act_btr: P = P(BATCH, None, None)
    act_btf: P = P(BATCH, None, "tensor")
    act_btv: P = P(BATCH, None, "tensor")
    queries_bNqnh: P = P(BATCH, None, None, "tensor", None)
    keys_bksh: P = P(BATCH, "tensor", None, None)
    shared_keys_bksh: P = P(BATCH, None, None, None)
    own_keys_bNkjh: P = P(BATCH, None, "tensor", None, None)
    shared_own_keys_bNkjh: P = P(BATCH, None, None, None, None)
    mask_bNqj: P = P(BATCH, None, None, None)


SPECS = Specs()


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the (data, fsdp, tensor) mesh with explicit axes over `devices` (default: the first that fit).

    Raises:
        ValueError: the product of the axes is not the number of devices given, or exceeds those present.
    """
    size = data * fsdp * tensor
    if min(data, fsdp, tensor) < 1:
        raise ValueError(f"mesh {data}x{fsdp}x{tensor}: every axis must be at least 1")
    devices = jax.devices()[:size] if devices is None else devices
    if len(devices) != size:
        raise ValueError(f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {size} devices, there are {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


@contextlib.contextmanager
def mesh_scope() -> Iterator[None]:
    """Enters the 1x1x1 mesh on the first device, unless the caller has set a mesh."""
    if get_abstract_mesh().empty:
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            yield
    else:
        yield


def axis_size(*axes: str) -> int:
    """Product of the sizes of `axes` in the mesh in force."""
    shape = get_abstract_mesh().shape
    size = 1
    for axis in axes:
        size *= shape[axis]
    return size


def put(value: object, spec: P) -> jax.Array:
    """Places a host array on the mesh in force, laid out by `spec` (one transfer; every process passes the whole)."""
    return jax.device_put(value, NamedSharding(jax.sharding.get_mesh(), spec))
