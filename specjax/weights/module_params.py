"""A module's parameters as a flat dictionary: the one shape in which files, checkpoints and modules meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding

from specjax.errors import InputError

Module = TypeVar("Module", bound=nnx.Module)


def abstract_module(build: Callable[[], Module]) -> Module:
    """The module `build` would make, without arrays: every parameter is a shape, dtype and sharding on the mesh.

    Raises:
        InputError: the model cannot be split over the mesh in force.
    """
    try:
        return nnx.eval_shape(build)
    except ValueError as error:
        shape = dict(jax.sharding.get_abstract_mesh().shape)
        raise InputError(f"mesh {shape}: the model cannot be split so ({error}); choose axes that divide it") from None


def flat_params(module: nnx.Module) -> dict[str, jax.Array]:
    """Parameters by dotted path, such as `layers.0.mlp.up_proj.kernel`.

    Of an abstract module: their shapes, dtypes and shardings on the mesh in force.
    """
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {_name(path): _concrete_mesh(variable.get_value()) for path, variable in state}


def with_params(module: Module, arrays: Mapping[str, jax.Array]) -> Module:
    """A copy of `module` (abstract or not) that holds `arrays`, one for each of its parameters."""
    parts: tuple[Any, ...] = nnx.split(module, nnx.Param, ...)
    graphdef, params, rest = parts
    filled = [(path, variable.replace(arrays[_name(path)])) for path, variable in nnx.to_flat_state(params)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled), rest)


def _name(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))


def _concrete_mesh(value: jax.Array) -> jax.Array:
    if isinstance(value, jax.ShapeDtypeStruct):
        assert isinstance(value.sharding, NamedSharding)
        sharding = NamedSharding(jax.sharding.get_mesh(), value.sharding.spec)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)  # type: ignore[return-value]
    return value
