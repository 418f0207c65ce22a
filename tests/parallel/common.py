"""Ranks on simulated devices, and what an exchange means, in NumPy."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

needs_8 = pytest.mark.devices(8)
AXIS = "ep"


@functools.cache
def ranks(count: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (count,), (AXIS,), devices=jax.devices()[:count], axis_types=(AxisType.Auto,)
    )


def on_ranks(run, count: int):
    """`run` jitted on every rank; leading axes of arguments and results are split."""
    split = PartitionSpec(AXIS)
    return jax.jit(
        jax.shard_map(run, mesh=ranks(count), in_specs=split, out_specs=split, check_vma=False)
    )


def choices(rng, shape: tuple[int, int], experts: int, *, hot: bool = False, idle: float = 0.0):
    """int32 [T, K]: distinct experts of each row; -1 for a share `idle` of rows and choices."""
    rows, top_k = shape
    chosen = np.argsort(rng.random((1 if hot else rows, experts)), axis=1)[:, :top_k]
    chosen = np.broadcast_to(chosen, shape).astype(np.int32)
    absent = (rng.random((rows, 1)) < idle) | (rng.random(shape) < idle / 4)
    return np.where(absent, -1, chosen)


def expected_rows(experts_rtk: np.ndarray, per_rank: int, me: int):
    """(source rank, row) of what rank `me` receives, in order; capacity does not limit it."""
    found = []
    for source, experts_tk in enumerate(experts_rtk):
        for row, chosen in enumerate(experts_tk):
            if any(e >= 0 and e // per_rank == me for e in chosen):
                found.append((source, row))
    return found
