"""How a kernel reaches the memory of other ranks: that of other GPUs, or, so that the kernel can be
interpreted on a CPU, that of its own one.
"""

import abc
import dataclasses
from typing import Any, cast, override

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transport(abc.ABC):
    """Ranks as a kernel sees them.

    Attributes:
        ranks: how many.
    """

    ranks: int

    @property
    @abc.abstractmethod
    def grid(self) -> dict[str, int]:
        """Sizes of axes that the launch needs for ranks, by name."""

    @abc.abstractmethod
    def me(self) -> jax.Array:
        """i32 [], this rank."""

    @abc.abstractmethod
    def own(self, ref: Any) -> Any:
        """This rank's part of an argument of the launch."""

    @abc.abstractmethod
    def remote(self, ref: Any, rank: jax.Array) -> Any:
        """Another rank's part."""

    @abc.abstractmethod
    def meet(self, rank: jax.Array, shard: jax.Array, shards: int) -> None:
        """Tells thread block (this rank, shard) of `rank` that what this one wrote there has
        arrived, and waits until it says the same. All copies out of this one must have ended.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peers(Transport):
    """The GPUs along an axis of a mesh, through NVLink and without its multicast.

    Attributes:
        axis: of the mesh.
    """

    axis: str

    @property
    @override
    def grid(self) -> dict[str, int]:
        return {}

    @override
    def me(self) -> jax.Array:
        return lax.axis_index(self.axis)

    @override
    def own(self, ref: Any) -> Any:
        return ref

    @override
    def remote(self, ref: Any, rank: jax.Array) -> Any:
        return plgpu.remote_ref(ref, cast(Any, {self.axis: rank}))

    @override
    def meet(self, rank: jax.Array, shard: jax.Array, shards: int) -> None:
        semaphores: Any = plgpu.SemaphoreType.REGULAR
        arrived: Any = pl.get_global(semaphores((self.ranks, shards)))
        # A release and an acquire at the scope of the system.
        plgpu.semaphore_signal(arrived.at[self.me(), shard], device_id={self.axis: rank})
        plgpu.semaphore_wait(arrived.at[rank, shard])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneDevice(Transport):
    """All ranks in one launch: arguments have a leading axis of ranks. The end of the launch is
    when all has arrived, so that thread blocks need not run at once.
    """

    @property
    @override
    def grid(self) -> dict[str, int]:
        return {"rank": self.ranks}

    @override
    def me(self) -> jax.Array:
        return lax.axis_index("rank")

    @override
    def own(self, ref: Any) -> Any:
        return ref.at[self.me()]

    @override
    def remote(self, ref: Any, rank: jax.Array) -> Any:
        return ref.at[rank]

    @override
    def meet(self, rank: jax.Array, shard: jax.Array, shards: int) -> None:
        pass
