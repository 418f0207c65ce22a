"""Pages out of one engine's pool and into another's: the device programs of both ends.

Extraction copies pages into fresh arrays in the normal form, [layers, pages, page, width] per cache
leaf, so what is on the wire is never touched by later steps; installation writes them into the
target's donated pool and reads them back for the checksum. Both are padded to a few page counts and
compiled before the first request. Each rank's pool has programs of its own.
"""

import concurrent.futures
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dskjax.decode.slots import Slots
from serve.transfer.device import device_checksum
from serve.transfer.pools import Home, Pool, Pools
from serve.transfer.transport import KVForm


class Shape(NamedTuple):
    """Static shape of a part: padded pages, layers, and whether the hidden states travel in it."""

    pages: int
    layers: int
    hidden: bool


def extract(
    pool: Pool, first_layer: Any, pages: Any, count: Any, slot: Any, *, shape: Shape
) -> tuple[Any, jax.Array]:
    """Copies a part out of the pool.

    Args:
        pool: read only.
        first_layer: i32 scalar.
        pages: i32 [shape.pages], page ids; what is beyond `count` may be anything.
        count: i32 scalar, pages in use.
        slot: i32 scalar, whose hidden states to take.
        shape: static.

    Returns:
        The part's arrays, unused pages zero, and their checksum.
    """
    used = jnp.arange(shape.pages) < count
    ids = jnp.clip(pages, 0, pool.cache.num_pages - 1)

    def take(leaf: jax.Array) -> jax.Array:
        layers = jax.lax.dynamic_slice_in_dim(leaf, first_layer, shape.layers, axis=0)
        taken = layers[:, ids]
        return jnp.where(used.reshape(-1, *(1,) * (leaf.ndim - 2)), taken, jnp.zeros_like(taken))

    arrays = {"cache": jax.tree.map(take, pool.cache)}
    if shape.hidden:
        arrays["hidden"] = pool.hidden[slot][:, None]
    return arrays, device_checksum(arrays, count)


def install(
    pool: Pool,
    arrays: Any,
    first_layer: Any,
    pages: Any,
    count: Any,
    slot: Any,
    *,
    shape: Shape,
) -> tuple[Pool, jax.Array]:
    """Writes a part into the pool (donated) and takes the checksum of what stands there then."""
    used = jnp.arange(shape.pages) < count
    where = jnp.where(used, pages, pool.cache.num_pages)
    layers = first_layer + jnp.arange(shape.layers)

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[layers[:, None], where].set(new, mode="drop")

    pool = pool._replace(cache=jax.tree.map(put, pool.cache, arrays["cache"]))
    if shape.hidden:
        hidden = pool.hidden.at[slot].set(arrays["hidden"][:, 0], mode="drop")
        pool = pool._replace(hidden=hidden)
    _, actual = extract(pool, first_layer, pages, count, slot, shape=shape)
    return pool, actual


class PagePrograms:
    """Compiled extraction and installation of one engine, for each of its ranks.

    Args:
        pools: of the engine.
        sizes: padded page counts, rising.
        groups: numbers of layers of the parts that are sent while later layers compute.
    """

    def __init__(self, pools: Pools, sizes: Sequence[int], groups: Sequence[int] = ()):
        self._pools = pools
        self.layers = pools.shapes[0].cache.latent.shape[0]
        self.sizes, self.groups = tuple(sizes), sorted(set(groups))
        self._extract: dict[tuple[int, Shape], Any] = {}
        self._install: dict[tuple[int, Shape], Any] = {}

    def compile(self, *, sends: bool, receives: bool) -> None:
        """Compiles what this end needs, several programs at a time."""
        shapes = [Shape(size, self.layers, True) for size in self.sizes]
        shapes += [Shape(size, layers, False) for size in self.sizes for layers in self.groups]
        keys = [(rank, shape) for shape in shapes for rank in range(self._pools.count)]
        todo = [(self._extract, self._lower_extract)] * sends
        todo += [(self._install, self._lower_install)] * receives
        workers = max(1, min(16, os.cpu_count() or 1))
        with concurrent.futures.ThreadPoolExecutor(workers) as executor:
            for kept, lower in todo:
                running = {key: executor.submit(lower(*key).compile) for key in keys}
                kept.update((key, future.result()) for key, future in running.items())

    def _lower_extract(self, rank: int, shape: Shape) -> Any:
        run = jax.jit(functools.partial(extract, shape=shape))
        return run.lower(self._pools.shapes[rank], *_nothing(shape))

    def _lower_install(self, rank: int, shape: Shape) -> Any:
        pool = self._pools.shapes[rank]
        out = jax.tree.map(lambda x: x.sharding, pool)
        run = functools.partial(install, shape=shape)
        return jax.jit(run, donate_argnums=0, out_shardings=(out, None)).lower(
            pool, self._part(rank, shape), *_nothing(shape)
        )

    def _part(self, rank: int, shape: Shape) -> Any:
        """Shapes, with shardings, of a part that has arrived."""
        run = functools.partial(extract, shape=shape)
        arrays, _ = jax.eval_shape(run, self._pools.shapes[rank], *_nothing(shape))
        where = self._pools.where[rank]
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays
        )

    def warm_up(self, state: Slots) -> Slots:
        """Runs every program once on nothing."""
        for (rank, shape), run in self._extract.items():
            run(self._pools.read(state, rank), *_nothing(shape))
        for (rank, shape), run in self._install.items():
            part = jax.tree.map(
                lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding),
                self._part(rank, shape),
            )
            nobody = self._pools.shapes[rank].hidden.shape[0]
            args = (part, *_nothing(shape, slot=nobody))
            state, _ = self._pools.change(state, rank, lambda pool, run=run, a=args: run(pool, *a))
        return state

    def cut(self, first: int, end: int) -> list[tuple[int, int]]:
        """Splits pages [first, end) into ranges no longer than the largest size."""
        largest = self.sizes[-1]
        return [(at, min(at + largest, end)) for at in range(first, end, largest)]

    def extract(
        self,
        state: Slots,
        home: Home,
        pages: tuple[int, int],
        layers: tuple[int, int],
        hidden: bool,
    ) -> tuple[Any, jax.Array]:
        """See `extract`; `pages` count from the request's first one, `layers` are all of them, or a
        group that ends within the pool.
        """
        shape, args = self._args(home, pages, layers, hidden)
        return self._extract[home.rank, shape](self._pools.read(state, home.rank), *args)

    def install(
        self,
        state: Slots,
        arrays: Any,
        home: Home,
        pages: tuple[int, int],
        layers: tuple[int, int],
        hidden: bool,
    ) -> tuple[Slots, jax.Array]:
        """See `install`; the state is donated."""
        shape, args = self._args(home, pages, layers, hidden)
        run = self._install[home.rank, shape]
        return self._pools.change(state, home.rank, lambda pool: run(pool, arrays, *args))

    def _args(
        self, home: Home, pages: tuple[int, int], layers: tuple[int, int], hidden: bool
    ) -> tuple[Shape, tuple[Any, ...]]:
        mine = home.pages[slice(*pages)]
        size = next(size for size in self.sizes if size >= len(mine))
        ids = np.zeros(size, np.int32)
        ids[: len(mine)] = mine
        shape = Shape(size, layers[1] - layers[0], hidden)
        return shape, _small(layers[0], ids, len(mine), home.slot)


def _nothing(shape: Shape, slot: int = 0) -> tuple[Any, ...]:
    """Arguments for no pages."""
    return _small(0, np.zeros(shape.pages, np.int32), 0, slot)


def _small(first_layer: int, pages: np.ndarray, count: int, slot: int) -> tuple[Any, ...]:
    return np.int32(first_layer), pages, np.int32(count), np.int32(slot)


def kv_form(state: Slots, *, model: str, dtype: str, mtp_scheme: str) -> KVForm:
    """The form of an engine's pool, for the comparison before a transfer.

    Args:
        state: the engine's slots.
        model: what names config and weights.
        dtype: compute dtype.
        mtp_scheme: of the drafts, "" without.
    """
    cache = state.cache
    return KVForm(
        model=model,
        dtype=dtype,
        kv_dtype=str(cache.latent.dtype),
        page_size=cache.page_size,
        layers=cache.latent.shape[0],
        latent=cache.latent.shape[-1],
        rope=cache.rope.shape[-1],
        mtp_scheme=mtp_scheme,
        mtp_depth=state.hidden_tail.shape[1],
        page_bytes=cache.page_bytes,
    )
