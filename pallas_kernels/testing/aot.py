"""Compiling for an H100 on a machine without a GPU: all of Mosaic, XLA and ptxas, to machine code.

Needs JAX with its CUDA plugin, nvcc's ptxas, and an environment that `scripts/aot.sh` prepares. XLA
then believes in the H100 described here; nothing can run, and nothing is tuned.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What XLA asks of a device (stream_executor's GpuTargetConfigProto), from the data sheet of the
# H100 SXM and CUDA's table of compute capability 9.0.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 patch: 1 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What ptxas says of a kernel.

    Attributes:
        kernel: its name.
        registers: a thread, at launch.
        spill_stores: bytes of registers that a thread puts into memory, counted once each time that
            they stand in the code.
        spill_loads: likewise, fetched back.
        serialized: products wait for each other for want of registers.
        smem: bytes of shared memory, barriers aside.
    """

    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    serialized: bool
    smem: int


AXIS = "device"
"""Of the mesh of all H100s."""


def h100s(count: int) -> list[Any]:
    """So many H100s of one host, which programs can be compiled for."""
    shape = f"1x1x{count}"
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=shape, target_config=H100, topology=shape
    )
    return list(topology.devices)


def compile_for_h100(function: Callable[..., Any], *args: Any, ranks: int = 1) -> Any:
    """Lowers and compiles for one H100, or for several of one host.

    Args:
        function: closed over everything static. For several it runs on each, inside `shard_map`
            over `AXIS`.
        *args: pytrees of shapes and types; for several, leading axes are split.
        ranks: how many.
    """
    mesh = Mesh(np.array(h100s(ranks)), (AXIS,))
    spec = PartitionSpec() if ranks == 1 else PartitionSpec(AXIS)
    if ranks > 1:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    where = NamedSharding(mesh, spec)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args)
    return jax.jit(function).trace(*placed).lower().compile()


def read_usage(folder: Path) -> list[Usage]:
    """The kernels whose compiler logs Mosaic has put into a folder, in the order they came."""
    logs = sorted(folder.glob("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return [_usage(log) for log in logs]


def _usage(log: Path) -> Usage:
    text, resources = log.read_text(), log.with_suffix(".resources.txt").read_text()

    def number(pattern: str, where: str = text) -> int:
        found = re.search(pattern, where)
        if found is None:
            raise ValueError(f"{log}: expected {pattern!r} in what ptxas or Mosaic wrote:\n{where}")
        return int(found[1])

    return Usage(
        kernel=log.stem.rpartition("_")[0],
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        serialized="instructions are serialized" in text,
        smem=number(r"smem_scratch_bytes=(\d+)", resources),
    )
