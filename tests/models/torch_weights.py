"""Random PyTorch weights and their way into the JAX modules, independent of `specjax.weights`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor

from specjax.models.layers import Linear, RMSNorm
from specjax.models.sharding import put

M = TypeVar("M", bound=nnx.Module)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew, norms around one and biases wide, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * drawn)
            else:
                parameter.copy_(0.5 * drawn if parameter.ndim == 1 else drawn / parameter.shape[-1] ** 0.5)


def filled(make: Callable[[], M], state: Mapping[str, Tensor]) -> M:
    """The module of `make` on the mesh in force with the tensors of a PyTorch state dict: kernels are transposed."""
    module = nnx.eval_shape(make)
    for name, tensor in state.items():
        *path, leaf = name.removeprefix("model.").split(".")
        owner: Any = module
        for part in path:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        if owner is None:  # a tied head, which PyTorch lists a second time
            continue
        array = tensor.detach().numpy()
        if isinstance(owner, Linear) and leaf == "weight":
            leaf, array = "kernel", np.ascontiguousarray(array.T)
        elif isinstance(owner, RMSNorm):
            leaf = "scale"
        abstract = getattr(owner, leaf)
        assert abstract.shape == array.shape, name
        setattr(owner, leaf, nnx.Param(put(array, abstract.get_value().sharding.spec)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(module)), "a parameter was not filled"
    return module
