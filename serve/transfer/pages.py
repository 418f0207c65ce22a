"""Pages out of one engine's pool and into another's: the device programs of both ends.

Extraction copies pages into fresh arrays in the normal form, [layers, pages, page, width] per cache
leaf, so what is on the wire is never touched by later steps; installation writes them into the
target's donated pool and reads them back for the checksum. Both are padded to a few page counts and
compiled before the first request.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dskjax.decode.slots import Slots
from serve.transfer.device import device_checksum
from serve.transfer.transport import KVForm


class Shape(NamedTuple):
    """Static shape of a part: padded pages, layers, and whether the hidden states travel in it."""

    pages: int
    layers: int
    hidden: bool


def extract(
    state: Slots, first_layer: Any, pages: Any, count: Any, slot: Any, *, shape: Shape
) -> tuple[Any, jax.Array]:
    """Copies a part out of the pool.

    Args:
        state: read only.
        first_layer: i32 scalar.
        pages: i32 [shape.pages], page ids; what is beyond `count` may be anything.
        count: i32 scalar, pages in use.
        slot: i32 scalar, whose hidden states to take.
        shape: static.

    Returns:
        The part's arrays, unused pages zero, and their checksum.
    """
    used = jnp.arange(shape.pages) < count
    ids = jnp.clip(pages, 0, state.cache.num_pages - 1)

    def take(leaf: jax.Array) -> jax.Array:
        layers = jax.lax.dynamic_slice_in_dim(leaf, first_layer, shape.layers, axis=0)
        taken = layers[:, ids]
        return jnp.where(used.reshape(-1, *(1,) * (leaf.ndim - 2)), taken, jnp.zeros_like(taken))

    arrays = {"cache": jax.tree.map(take, state.cache)}
    if shape.hidden:
        arrays["hidden"] = state.hidden_tail[slot][:, None]
    return arrays, device_checksum(arrays, count)


def install(
    state: Slots,
    arrays: Any,
    first_layer: Any,
    pages: Any,
    count: Any,
    slot: Any,
    *,
    shape: Shape,
) -> tuple[Slots, jax.Array]:
    """Writes a part into the pool (donated) and takes the checksum of what stands there then."""
    used = jnp.arange(shape.pages) < count
    where = jnp.where(used, pages, state.cache.num_pages)
    layers = first_layer + jnp.arange(shape.layers)

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[layers[:, None], where].set(new, mode="drop")

    cache = jax.tree.map(put, state.cache, arrays["cache"])
    state = dataclasses.replace(state, cache=cache)
    if shape.hidden:
        tail = state.hidden_tail.at[slot].set(arrays["hidden"][:, 0], mode="drop")
        state = dataclasses.replace(state, hidden_tail=tail)
    _, actual = extract(state, first_layer, pages, count, slot, shape=shape)
    return state, actual


class PagePrograms:
    """Compiled extraction and installation of one engine.

    Args:
        state: the engine's slots, or their shapes with shardings.
        sizes: padded page counts, rising.
        groups: numbers of layers of the parts that are sent while later layers compute.
    """

    def __init__(self, state: Slots, sizes: Sequence[int], groups: Sequence[int] = ()):
        self._state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        self.layers = state.cache.latent.shape[0]
        self.sizes, self.groups = tuple(sizes), sorted(set(groups))
        self._extract: dict[Shape, Any] = {}
        self._install: dict[Shape, Any] = {}

    def compile(self, *, sends: bool, receives: bool) -> None:
        """Compiles what this end needs."""
        shapes = [Shape(size, self.layers, True) for size in self.sizes]
        shapes += [Shape(size, layers, False) for size in self.sizes for layers in self.groups]
        out = jax.tree.map(lambda x: x.sharding, self._state)
        small = _small(0, np.zeros(1, np.int32), 0, 0)
        for shape in shapes:
            args = (small[0], np.zeros(shape.pages, np.int32), *small[2:])
            run = jax.jit(functools.partial(extract, shape=shape))
            lowered = run.lower(self._state, *args)
            if sends:
                self._extract[shape] = lowered.compile()
            if receives:
                arrays, _ = lowered.out_info
                self._install[shape] = (
                    jax.jit(
                        functools.partial(install, shape=shape),
                        donate_argnums=0,
                        out_shardings=(out, None),
                    )
                    .lower(self._state, _placed(arrays, self._state), *args)
                    .compile()
                )

    def warm_up(self, state: Slots) -> Slots:
        """Runs every program once on nothing."""
        arrays = {}
        for shape, run in self._extract.items():
            args = _small(0, np.zeros(shape.pages, np.int32), 0, 0)
            arrays[shape], _ = run(state, *args)
        for shape, run in self._install.items():
            args = _small(0, np.zeros(shape.pages, np.int32), 0, state.count)
            example = arrays.get(shape) or self._zeros(shape)
            state, _ = run(state, example, *args)
        return state

    def cut(self, first: int, end: int) -> list[tuple[int, int]]:
        """Splits pages [first, end) into ranges no longer than the largest size."""
        largest = self.sizes[-1]
        return [(at, min(at + largest, end)) for at in range(first, end, largest)]

    def extract(
        self, state: Slots, pages: Sequence[int], layers: tuple[int, int], slot: int, hidden: bool
    ) -> tuple[Any, jax.Array]:
        """See `extract`; `layers` are all of them, or a group that ends within the pool."""
        shape, ids = self._shape(pages, layers, hidden)
        return self._extract[shape](state, *_small(layers[0], ids, len(pages), slot))

    def install(
        self,
        state: Slots,
        arrays: Any,
        pages: Sequence[int],
        layers: tuple[int, int],
        slot: int,
        hidden: bool,
    ) -> tuple[Slots, jax.Array]:
        """See `install`; the state is donated."""
        shape, ids = self._shape(pages, layers, hidden)
        return self._install[shape](state, arrays, *_small(layers[0], ids, len(pages), slot))

    def place(self) -> Callable[[Any], Any]:
        """Moves a part's arrays, from wherever they are, to this engine's devices."""
        sharding = self._state.length.sharding
        return lambda arrays: jax.device_put(arrays, sharding)

    def _shape(
        self, pages: Sequence[int], layers: tuple[int, int], hidden: bool
    ) -> tuple[Shape, np.ndarray]:
        size = next(size for size in self.sizes if size >= len(pages))
        ids = np.zeros(size, np.int32)
        ids[: len(pages)] = pages
        return Shape(size, layers[1] - layers[0], hidden), ids

    def _zeros(self, shape: Shape) -> Any:
        def one(leaf: jax.ShapeDtypeStruct) -> Any:
            full = (shape.layers, shape.pages, *leaf.shape[2:])
            return jax.device_put(jnp.zeros(full, leaf.dtype), leaf.sharding)

        arrays = {"cache": jax.tree.map(one, self._state.cache)}
        if shape.hidden:
            tail = self._state.hidden_tail
            zeros = jnp.zeros((tail.shape[1], 1, tail.shape[2]), tail.dtype)
            arrays["hidden"] = jax.device_put(zeros, tail.sharding)
        return arrays


def _small(first_layer: int, pages: np.ndarray, count: int, slot: int) -> tuple[Any, ...]:
    return np.int32(first_layer), pages, np.int32(count), np.int32(slot)


def _placed(arrays: Any, state: Slots) -> Any:
    sharding = state.length.sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


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
