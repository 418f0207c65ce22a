"""Several processes that compute as one: JAX's multi-controller, on one host or many.

Every process runs the same program and holds its own devices of one global mesh. Rules that keep
them together: arrays of the mesh are made by `put`, read by `fetch`, and whatever decides about the
next collective is decided from what `fetch` returned, never from a process's own state.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

COORDINATOR = "DSKJAX_COORDINATOR"
PROCESSES = "DSKJAX_PROCESSES"
PROCESS = "DSKJAX_PROCESS"
LOCAL_DEVICES = "DSKJAX_LOCAL_DEVICES"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """A process's place among those that compute together.

    Attributes:
        coordinator: HOST:PORT on which process 0 listens.
        processes: how many there are.
        process: index of this one.
        local_devices: indices of the host's GPUs that are this process's own; None: all.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator {self.coordinator!r} must be HOST:PORT")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process {self.process} must lie in 0..{self.processes - 1}")

    def environment(self) -> dict[str, str]:
        """Environment variables that tell a process its place."""
        told = {
            COORDINATOR: self.coordinator,
            PROCESSES: str(self.processes),
            PROCESS: str(self.process),
        }
        if self.local_devices is not None:
            told[LOCAL_DEVICES] = ",".join(map(str, self.local_devices))
        return told

    @classmethod
    def told(cls, environment: Mapping[str, str]) -> "Membership | None":
        """What `environment` made; None for a process on its own.

        Raises:
            ValueError: it says some of it, or something that is no number.
        """
        if COORDINATOR not in environment:
            return None
        found = {}
        for name in (PROCESSES, PROCESS):
            if not environment.get(name, "").isdigit():
                raise ValueError(
                    f"{COORDINATOR} is set, so {name} must be a number, not "
                    f"{environment.get(name)!r}"
                )
            found[name] = int(environment[name])
        local = environment.get(LOCAL_DEVICES)
        return cls(
            coordinator=environment[COORDINATOR],
            processes=found[PROCESSES],
            process=found[PROCESS],
            local_devices=None if local is None else tuple(map(int, local.split(","))),
        )

    def join(self) -> None:
        """Meets the other processes; returns when all are there. Before any use of a device."""
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            self.coordinator,
            num_processes=self.processes,
            process_id=self.process,
            local_device_ids=self.local_devices,
        )


def put(tree: Any, shardings: Any) -> Any:
    """Arrays of the mesh from equal values on every process.

    Args:
        tree: arrays that this process can read whole.
        shardings: one for each leaf.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, where: jax.sharding.Sharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def fetch(tree: Any) -> Any:
    """The whole values on the host, on every process; all of them must call."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def meet(name: str) -> None:
    """Waits until every process is here; all of them must call, with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
