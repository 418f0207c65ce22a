"""Running a Hopper kernel of `grouped_matmul`: its grid and its three warpgroups."""

import abc
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.ring import CLUSTER
from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.hopper import compiler_params


class Kernel(abc.ABC):
    """What the warpgroups of a thread block do."""

    clusters: ClassVar[bool] = False
    """Whether thread blocks may form clusters, see `Tiles`."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Of the kernel."""

    @abc.abstractmethod
    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers."""

    @abc.abstractmethod
    def run(self, refs: SimpleNamespace) -> None:
        """The kernel; every warpgroup calls it. `refs` has operands, scratch and `out`."""


def launch(
    kernel: Kernel,
    operands: dict[str, jax.Array],
    out: jax.ShapeDtypeStruct,
    *,
    tiles: Tiles,
    thread_blocks: int,
    interpret: Any,
) -> jax.Array:
    """Runs a kernel.

    Args:
        kernel: what it does.
        operands: what it reads, by their names in `refs`.
        out: what it writes.
        tiles: its choices.
        thread_blocks: of the grid, a multiple of `tiles.cluster`.
        interpret: parameters of Pallas' GPU interpreter; None on a GPU.

    Raises:
        ValueError: clusters of a kernel that has none.
    """
    if tiles.cluster > 1 and not kernel.clusters:
        raise ValueError(f"{kernel.name}: {tiles.cluster=} must be 1")

    def body(*refs: Any, **scratch: Any) -> None:
        named = dict(zip((*operands, "out"), refs, strict=True))
        kernel.run(SimpleNamespace(**named, **scratch))

    clusters: dict[str, Any] = {}
    if tiles.cluster > 1:
        clusters = {"cluster": (tiles.cluster,), "cluster_names": (CLUSTER,)}
    run = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=kernel.scratch(),
        grid=(thread_blocks // tiles.cluster,),
        grid_names=("block",),
        **clusters,
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=kernel.name,
        compiler_params=compiler_params(auto_barriers=tiles.auto_barriers),
        interpret=interpret,
    )
    return run(*operands.values())
