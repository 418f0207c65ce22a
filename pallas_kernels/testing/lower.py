"""Lowering kernels for an H100 on a machine without a GPU, as far as XLA's input."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

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


def lower_for_h100s(function: Callable[..., Any], *args: Any, ranks: int, axis: str) -> str:
    """The same of a function that runs on each of several GPUs, inside `shard_map`.

    Args:
        function: closed over everything static.
        *args: shapes and types on all ranks; leading axes are split.
        ranks: how many.
        axis: of the mesh.
    """
    mesh = AbstractMesh((ranks,), (axis,), axis_types=(AxisType.Auto,), abstract_device=_H100)
    split = PartitionSpec(axis)
    over = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(over).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
