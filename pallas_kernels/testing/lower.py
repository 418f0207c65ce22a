"""Lowering kernels for an H100 on a machine without a GPU, as far as XLA's input."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

_H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lower_for_h100(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The StableHLO of a function, kernels included.

    Args:
        function: closed over everything static.
        *args: pytrees of arrays, or of shapes and types.
        **kwargs: likewise.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=_H100)):
        traced = jax.jit(function).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
