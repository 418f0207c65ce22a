"""How the warpgroups of the Hopper kernels of `grouped_matmul` hand on what one of them loads.

Shared memory is a ring of stages, each with two barriers in `refs`:

    full    the copies of a load have arrived
    empty   both warpgroups that multiply are through with it, in all thread blocks of a cluster

Loads are counted from 0 on for all items of a thread block; load n goes to stage n modulo their
number.
"""

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.products import order_before_copies, wait_for_warps
from pallas_kernels.grouped_matmul.tiles import Tiles

CLUSTER = "cluster"
"""Axis of the thread blocks of a cluster."""


def barriers(tiles: Tiles, *, copies: int) -> dict[str, Any]:
    """Scratch; `copies` is how many a load consists of."""
    full = plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=copies)
    if tiles.cluster == 1:
        return {"full": full, "empty": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=2)}
    shared = functools.partial(plgpu.ClusterBarrier, collective_axes=(CLUSTER,), num_arrivals=2)
    return {"full": full, "empty": shared(num_barriers=tiles.stages), "done": shared()}


def release(refs: SimpleNamespace, slot: Any, *, tiles: Tiles, interpret: Any) -> None:
    """Says that this warpgroup is through with a slot."""
    if tiles.cluster > 1:
        wait_for_warps(interpret)  # one thread speaks for all
    plgpu.barrier_arrive(refs.empty.at[slot])


def leave_together(refs: SimpleNamespace, *, tiles: Tiles) -> None:
    """What warpgroups that multiply do last: shared memory lives until others in the cluster have
    arrived at its barriers and copied into it.
    """
    if tiles.cluster > 1:
        plgpu.barrier_arrive(refs.done)
        plgpu.barrier_wait(refs.done)


def load_in_one_warp(load: Callable[[], None], *, tiles: Tiles, interpret: Any) -> None:
    """What the warpgroup that loads does: `load`, in one warp of it."""
    if tiles.registers:
        plgpu.set_max_registers(tiles.registers[0], action="decrease")
    if interpret:
        load()
        return

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        pl.when(warp == 0)(load)


def load_item(
    refs: SimpleNamespace,
    first: Any,
    loads: Any,
    copy: Callable[[jax.Array, jax.Array], None],
    *,
    stages: int,
    interpret: Any,
) -> None:
    """Starts the copies of an item as stages become empty.

    Args:
        refs: with the barriers.
        first: the item's first load.
        loads: of the item.
        copy: called with a slot and a load of the item, from 0 on; its copies arrive at `full`.
        stages: of the ring.
        interpret: on a CPU.
    """

    def load(index: jax.Array, _: Any) -> Any:
        count = first + index
        slot = lax.rem(count, stages)

        @pl.when(count >= stages)
        def _() -> None:
            plgpu.barrier_wait(refs.empty.at[slot])
            order_before_copies(interpret)

        copy(slot, index)
        return 0

    lax.fori_loop(0, loads, load, 0)


def wait_until_empty(refs: SimpleNamespace, loads: Any, *, stages: int, interpret: Any) -> None:
    """After the last load; only the interpreter wants each phase of a barrier to be waited for."""
    if interpret:
        for slot in range(stages):
            wait = lambda slot=slot: plgpu.barrier_wait(refs.empty.at[slot])  # noqa: E731
            pl.when(loads > slot)(wait)


class Phase(NamedTuple):
    """Loads of an item that are treated alike.

    Attributes:
        end: the load after its last; it begins where the phase before it ends.
        prepare: called with a slot and a load before the product, or None.
    """

    end: Any
    prepare: Callable[[jax.Array, jax.Array], None] | None = None


def sum_products(
    refs: SimpleNamespace,
    first: Any,
    phases: Sequence[Phase],
    operands: Callable[[jax.Array], tuple[Any, Any]],
    *,
    columns: int,
    stages: int,
) -> jax.Array:
    """A warpgroup's sum of products over the loads of an item, fp32 [64, columns].

    Args:
        refs: with the barriers.
        first: the item's first load.
        phases: in order.
        operands: left [64, n] and right [n, columns] in a slot.
        columns: of the result.
        stages: of the ring.
    """
    loads = phases[-1].end

    def run(sums: Any) -> jax.Array:
        begin: Any = 0
        for phase in phases:
            step = lambda load, _, phase=phase: multiply(sums, load, phase)  # noqa: E731
            lax.fori_loop(begin, phase.end, step, 0)
            begin = phase.end
        result = sums[...]
        pl.when(loads > 0)(lambda: release(loads - 1))
        return result

    def multiply(sums: Any, load: jax.Array, phase: Phase) -> int:
        slot = lax.rem(first + load, stages)
        plgpu.barrier_wait(refs.full.at[slot])
        if phase.prepare:
            phase.prepare(slot, load)
        plgpu.wgmma(sums, *operands(slot))
        plgpu.wgmma_wait(1)  # so the product before this one has ended
        pl.when(load > 0)(lambda: release(load - 1))
        return 0

    def release(load: Any) -> None:
        plgpu.barrier_arrive(refs.empty.at[lax.rem(first + load, stages)])

    return pl.run_scoped(run, hopper.accumulator(64, columns))
