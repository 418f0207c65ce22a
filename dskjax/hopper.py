"""Weights in the layout that kernels for Hopper read."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from dskjax.params import Params, is_weight
from pallas_kernels import QTensor
from pallas_kernels.grouped_matmul import PackedInt4, pack
from pallas_kernels.grouped_matmul.packed_int4 import INPUTS, has_lowest
from pallas_kernels.quant import INT4_GROUP
from pallas_kernels.select import no_hopper, whole_arrays_only

Shardings = Callable[[Params], Any]
"""Of params or their shapes: a NamedSharding for each leaf."""


def pack_experts(params: Params, shardings: Shardings | None = None) -> Params:
    """Rearranges routed experts in int4 for the kernels of Hopper; exact, and not undone.

    Beside params and result it needs memory for a few copies of one matrix. Packed params run with
    every implementation; they cannot be saved as a checkpoint.

    Args:
        params: params of a model, stacked or from `dskjax.params.unstack`.
        shardings: where they are split over devices: each packs what it has. How the result is
            split is asked of it too.

    Returns:
        The same tree with `PackedInt4` for experts in int4; other leaves are not copied.

    Raises:
        ValueError: no experts in int4 with a scale per 128 inputs, or a matrix that does not divide
            into tiles of 64 outputs x 128 inputs.
    """
    if shardings is None:
        return _each(params, lambda w, _: _packed(w, bool(has_lowest(w))))
    before = shardings(params)
    after = shardings(packed_shapes(params))

    def one(w: QTensor, keys: tuple[Any, ...]) -> PackedInt4:
        split = [jax.tree.map(lambda where: where.spec, _at(t, keys)) for t in (before, after)]
        mesh, full_range = _at(before, keys).values.mesh, bool(has_lowest(w))
        return jax.jit(
            jax.shard_map(
                lambda w: _pack_matrices(w, full_range),
                mesh=mesh,
                in_specs=(split[0],),
                out_specs=dataclasses.replace(split[1], full_range=full_range),
                check_vma=False,
            )
        )(w)

    return _each(params, one)


def packed_shapes(params: Params) -> Any:
    """Shapes of what `pack_experts` makes of params, or of their shapes, if no weight is -8."""
    return jax.eval_shape(lambda params: _each(params, lambda w, _: _packed(w, False)), params)


def _each(params: Params, pack_one: Callable[[QTensor, tuple[Any, ...]], PackedInt4]) -> Params:
    found = 0

    def one(keys: tuple[Any, ...], weight: Any) -> Any:
        nonlocal found
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        if "experts" not in names or not isinstance(weight, QTensor) or weight.format != "int4":
            return weight
        found += 1
        try:
            return pack_one(weight, keys)
        except ValueError as error:
            raise ValueError(f"{'.'.join(names)}: {error}") from error

    out = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)
    if not found:
        raise ValueError("params hold no routed experts in int4: quantise(params, 'w4afp8') first")
    return out


def _at(tree: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        tree = tree[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
    return tree


def pack_where_read(params: Params, shardings: Shardings | None = None) -> Params:
    """`pack_experts` where the default device has kernels that read packed experts and all experts
    can be packed; else `params` as they are.

    Args:
        params: as there.
        shardings: as there, of params that only code inside a `shard_map` reads.
    """
    if no_hopper() or shardings is None and whole_arrays_only():
        return params
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    int4 = [w for w in leaves if isinstance(w, QTensor) and w.format == INT4_GROUP.format]
    # The outputs of one product of experts are inputs of another, where tiles are wider.
    tiles = all(w.block == INT4_GROUP.block and w.shape[-1] % INPUTS == 0 for w in int4)
    return pack_experts(params, shardings) if int4 and tiles else params


def _pack_matrices(weight: QTensor, full_range: bool) -> PackedInt4:
    """Matrix by matrix, weights being [..., N, K]; see `pack`."""
    lead = weight.shape[:-2]
    matrices = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), weight)
    packed = jax.lax.map(functools.partial(pack, full_range=full_range), matrices)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), packed)


_packed = jax.jit(_pack_matrices, static_argnums=1)
