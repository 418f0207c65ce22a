"""Parameters: declared once by the module classes, used everywhere as a plain nested dict.

Flax NNX is the declaration layer and nothing more. A module's constructor declares its weights with
`weight`, each with its logical axes and initialiser; shapes, shardings, checkpoint names and
initial values all derive from that line. What runs is a pure function over a nested dict of arrays
(or `QTensor`s): `bind` turns the dict back into a module inside jit. All of flax is imported here,
so leaving it would touch one file.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from dskjax.axes import check_axes
from pallas_kernels.quant import QTensor, Weight

Params = dict[str, Any]
"""Nested dict of arrays or QTensors, stacked over layers."""

Init = Literal["normal", "embedding", "ones", "zeros"]


class Module(nnx.Module):
    """Base of every layer. Holds declared weights and static configuration, never state, keys or
    caches.
    """


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight as declared.

    Attributes:
        shape: full shape, the stacked layer axis included.
        axes: logical axis of each dimension (see `dskjax.axes`).
        init: initialiser.
        dtype: fixed dtype, or None for the dtype the caller chooses for parameters.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    dtype: str | None = None

    def stacked(self, layers: int) -> "WeightSpec":
        """The same weight once per layer, on a new leading axis."""
        return dataclasses.replace(self, shape=(layers, *self.shape), axes=("layers", *self.axes))


def weight(
    shape: tuple[int, ...],
    *,
    axes: tuple[str | None, ...],
    init: Init = "normal",
    dtype: str | None = None,
) -> Any:
    """Declares a weight of a module; read it as `self.name[...]`."""
    check_axes(shape, axes)
    return nnx.Param(
        jnp.zeros(shape, dtype or "float32"), spec=WeightSpec(shape, axes, init, dtype)
    )


@functools.cache
def _declare(cls: Callable[..., Module], args: tuple, kwargs: tuple) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: cls(*args, **dict(kwargs))), graph=False)


def specs_of(cls: Callable[..., Module], *args: Any, **kwargs: Any) -> Params:
    """Nested dict of `WeightSpec`, one leaf per weight that `cls(*args, **kwargs)` declares. No
    array is made.
    """
    _, state = _declare(cls, args, tuple(sorted(kwargs.items())))
    is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
    with_specs = jax.tree.map(
        lambda v: v.replace(_Leaf(v.get_metadata()["spec"])), state, is_leaf=is_variable
    )
    leaves = jax.tree.map(
        lambda leaf: leaf.spec, nnx.to_pure_dict(with_specs), is_leaf=lambda v: isinstance(v, _Leaf)
    )
    return dict(leaves)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    spec: WeightSpec


def bind(cls: Callable[..., Any], params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The module `cls(*args, **kwargs)` with its weights taken from `params`; call it inside jit,
    then use it and drop it.

    Raises:
        ValueError: `params` has other names than the module declares.
    """
    graphdef, state = _declare(cls, args, tuple(sorted(kwargs.items())))
    slots, treedef = jax.tree.flatten(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    values = jax.tree.structure(nnx.to_pure_dict(state)).flatten_up_to(dict(params))
    filled = [slot.replace(value) for slot, value in zip(slots, values, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, filled))


def is_spec(leaf: Any) -> bool:
    """For `is_leaf=` over trees of specs."""
    return isinstance(leaf, WeightSpec)


def is_weight(leaf: Any) -> bool:
    """For `is_leaf=` over params: a QTensor counts as one weight."""
    return isinstance(leaf, QTensor)


def named_leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict with their dotted names, in sorted order."""
    for name in sorted(tree):
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(tree[name], Mapping):
            yield from named_leaves(tree[name], path)
        else:
            yield path, tree[name]


def count(specs: Params) -> int:
    """Number of parameters in a tree of specs; integers, which are maps, are none."""
    return sum(
        math.prod(spec.shape)
        for _, spec in named_leaves(specs)
        if jnp.issubdtype(spec.dtype or "float32", jnp.floating)
    )


def nbytes(params: Params) -> int:
    """Bytes of all arrays in a tree of weights or of their shapes; scales of QTensors included."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))


def abstract(specs: Params, dtype: Any) -> Params:
    """`jax.ShapeDtypeStruct` for each spec; `dtype` where a weight does not fix its own."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype), specs, is_leaf=is_spec
    )


def cast(params: Params, specs: Params, dtype: Any) -> Params:
    """Params in another compute dtype; weights that fix their dtype, and QTensors, stay as they
    are.
    """

    def one(spec: WeightSpec, value: Any) -> Any:
        return value if spec.dtype or isinstance(value, QTensor) else value.astype(dtype)

    return jax.tree.map(one, specs, params, is_leaf=is_spec)


def unstack(params: Params) -> Params:
    """The same weights with every layer's as arrays of their own: stacks become tuples.

    For serving on a GPU (see `dskjax.paged`); training and checkpoints want stacks. While the
    caller keeps the stacks there are two copies of the layers.
    """
    out = {}
    for name, group in params.items():
        if name not in ("dense_layers", "moe_layers", "mtp_layers") or isinstance(group, tuple):
            out[name] = group
            continue
        parts = {path: _split(stack) for path, stack in named_leaves(group)}
        out[name] = tuple(
            tree_of(dict(zip(parts, layer, strict=True)))
            for layer in zip(*parts.values(), strict=True)
        )
    return out


@jax.jit
def _split(stack: Weight) -> tuple[Weight, ...]:
    return tuple(stack[i] for i in range(stack.shape[0]))


def initialise(specs: Params, key: jax.Array, dtype: Any, std: float | None = None) -> Params:
    """Random parameters.

    Args:
        specs: tree of `WeightSpec`.
        key: JAX random key; each weight folds in a hash of its name, so adding a weight changes no
            other.
        dtype: dtype of the weights that do not fix their own.
        std: standard deviation of normal weights; None takes half of fan_in^-0.5 (V3 trained with
            0.006, which is that).
    """

    def one(path: str, spec: WeightSpec) -> jax.Array:
        dt = spec.dtype or dtype
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, dt)
        if spec.init == "ones":
            return jnp.ones(spec.shape, dt)
        fan_in = spec.shape[-1]
        scale = std if std is not None else 0.5 * fan_in**-0.5
        sub = jax.random.fold_in(key, _stable_hash(path))
        return (jax.random.normal(sub, spec.shape, jnp.float32) * scale).astype(dt)

    return tree_of({path: one(path, spec) for path, spec in named_leaves(specs)})


def _stable_hash(text: str) -> int:
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value & 0x7FFFFFFF


def tree_of(leaves: Mapping[str, Any]) -> Params:
    """The nested dict with these leaves, keyed by dotted name; the inverse of `named_leaves`."""
    tree: Params = {}
    for path, value in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
