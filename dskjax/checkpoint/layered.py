"""Params that are put together on their devices, layer by layer."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dskjax.axes import Sharding
from dskjax.checkpoint.parts import Part
from dskjax.params import Params, WeightSpec, tree_of
from pallas_kernels.quant import QTensor, Weight, dequantise


class LayeredParams:
    """Takes the weights of one part after the other and becomes params.

    Args:
        specs: of all leaves, stacked.
        separate: keep layers apart, as `dskjax.params.unstack` does; else each leaf is one stack,
            which is made with its first layer and updated in place.
        sharding: where weights go; None: the first device.
    """

    def __init__(
        self, specs: Mapping[str, WeightSpec], *, separate: bool, sharding: Sharding | None
    ):
        self._specs, self._separate, self._sharding = specs, separate, sharding
        self._whole: dict[str, Weight] = {}
        self._layers: dict[str, list[dict[str, Weight]]] = {}

    def place(self, name: str, spec: WeightSpec, weight: Any) -> Any:
        """Where a weight goes: a sharding, or a QTensor of two.

        Args:
            name: its name, for errors.
            spec: its shape and axes.
            weight: itself; its shapes are enough.

        Raises:
            ValueError: it is quantised and a part would end inside a block.
        """
        if self._sharding is None:
            device = SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(lambda _: device, weight)
        if isinstance(weight, QTensor):
            return self._sharding.quantised(spec.axes, weight, name)
        return self._sharding.of(spec.axes, spec.shape)

    def floats(self, name: str, spec: WeightSpec, weight: Weight, dtype: Any) -> jax.Array:
        """A weight in another dtype, dequantised if need be."""
        place = self.place(name, spec, jax.ShapeDtypeStruct(spec.shape, dtype))
        return _caster(np.dtype(dtype), place)(weight)

    def add(self, part: Part, weights: dict[str, Weight]) -> None:
        """Takes the weights of a part, by their names inside it; parts come in order."""
        if part.layer is None:
            self._whole |= weights
        elif self._separate:
            self._layers.setdefault(part.group, []).append(weights)
        else:
            for name in list(weights):
                self._stack(part.leaf(name), weights.pop(name), part.layer)

    def params(self) -> Params:
        """The params, once all parts are in."""
        layers = {group: tuple(map(tree_of, of)) for group, of in self._layers.items()}
        return tree_of(self._whole) | layers

    def _stack(self, leaf: str, weight: Weight, layer: int) -> None:
        spec = self._specs[leaf]
        stacked = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((spec.shape[0], *x.shape), x.dtype), weight
        )
        places = self.place(leaf, spec, stacked)
        if layer == 0:
            self._whole[leaf] = jax.tree.map(
                lambda x, place: jnp.zeros(x.shape, x.dtype, device=place), stacked, places
            )
        self._whole[leaf] = jax.tree.map(
            lambda stack, x, place: _setter(place)(stack, x, np.int32(layer)),
            self._whole.pop(leaf),
            weight,
            places,
        )


@functools.cache
def _caster(dtype: np.dtype, place: Any) -> Any:
    return jax.jit(functools.partial(dequantise, dtype=dtype), out_shardings=place)


@functools.cache
def _setter(place: Any) -> Any:
    def put(stack: jax.Array, x: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, x, layer, axis=0)

    return jax.jit(put, donate_argnums=0, out_shardings=place)
