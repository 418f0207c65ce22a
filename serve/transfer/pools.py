"""What a transfer touches of an engine's device state: the pool of one rank and its hidden states.

An engine with ranks holds the pools of all of them as one array. A rank's part is worked on by
programs of its devices alone, so the other ranks neither wait for a transfer nor know of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dskjax.decode.slots import Slots


class Home(NamedTuple):
    """Where an engine keeps a request.

    Attributes:
        rank: 0 where there are no ranks.
        slot: of that rank.
        pages: of that rank, from the request's first token on.
    """

    rank: int
    slot: int
    pages: Sequence[int]


class Pool(NamedTuple):
    """One rank's part of `Slots`, where ids of pages and slots count from 0.

    Attributes:
        cache: its pages, a `pallas_kernels.LatentCache`.
        hidden: [S, tail, D], see `Slots.hidden_tail`.
    """

    cache: Any
    hidden: jax.Array


class Pools:
    """The pools of an engine's ranks.

    Args:
        state: the engine's slots, or their shapes with shardings.
        where: the sharding of each rank's pool, whole on each of the rank's devices; one where
            there are no ranks.

    Attributes:
        where: see above.
        shapes: `Pool` of each rank, of shapes with shardings.
    """

    def __init__(self, state: Slots, where: Sequence[jax.sharding.Sharding]):
        self.where = tuple(where)
        whole = _whole(state)
        if self.count == 1:
            self.shapes = [jax.tree.map(lambda x: _shape(x, x.shape, x.sharding), whole)]
            return
        self.shapes = [
            jax.tree.map(lambda x, own=own: _shape(x, x.sharding.shard_shape(x.shape), own), whole)
            for own in self.where
        ]

    @property
    def count(self) -> int:
        """Ranks."""
        return len(self.where)

    def read(self, state: Slots, rank: int) -> Pool:
        """A rank's pool; shares its buffers with the state."""
        whole = _whole(state)
        if self.count == 1:
            return whole
        return jax.tree.map(lambda x, shape: _own(_by_device(x), shape), whole, self.shapes[rank])

    def change(
        self, state: Slots, rank: int, run: Callable[[Pool], tuple[Pool, Any]]
    ) -> tuple[Slots, Any]:
        """Replaces a rank's pool.

        Args:
            state: donated if `run` donates.
            rank: whose pool.
            run: from the pool to the new one and something else.

        Returns:
            The state with it, and what `run` returned beside it.
        """
        whole = _whole(state)
        if self.count == 1:
            pool, beside = run(whole)
            return _with(state, pool), beside
        # Taken apart before `run` donates a part: an array with a deleted part shows none of them.
        leaves, tree = jax.tree.flatten(whole)
        parts = [_by_device(leaf) for leaf in leaves]
        shapes = jax.tree.leaves(self.shapes[rank])
        own = [_own(part, shape) for part, shape in zip(parts, shapes, strict=True)]
        pool, beside = run(jax.tree.unflatten(tree, own))
        joined = [
            _join(leaf, part | _by_device(new))
            for leaf, part, new in zip(leaves, parts, jax.tree.leaves(pool), strict=True)
        ]
        return _with(state, jax.tree.unflatten(tree, joined)), beside


def _whole(state: Slots) -> Pool:
    return Pool(state.cache, state.hidden_tail)


def _with(state: Slots, pool: Pool) -> Slots:
    return dataclasses.replace(state, cache=pool.cache, hidden_tail=pool.hidden)


def _shape(x: Any, shape: tuple[int, ...], where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)


def _by_device(x: jax.Array) -> dict[Any, jax.Array]:
    return {shard.device: shard.data for shard in x.addressable_shards}


def _own(parts: dict[Any, jax.Array], shape: jax.ShapeDtypeStruct) -> jax.Array:
    assert shape.sharding is not None
    mine = [parts[device] for device in parts if device in shape.sharding.device_set]
    return jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, mine)


def _join(old: jax.Array, parts: dict[Any, jax.Array]) -> jax.Array:
    return jax.make_array_from_single_device_arrays(old.shape, old.sharding, list(parts.values()))
