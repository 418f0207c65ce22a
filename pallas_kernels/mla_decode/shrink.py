"""Results times the factors of their rows, most of which are 1: the multiplications are left out by
a warp that needs none, one vote and one branch for 128 of them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector

from pallas_kernels.hopper import MATRIX, ROWS, by_row

HALF = 4
"""Axis of a part's registers that tells a warp's first eight rows from its last."""


def scale_rows(factors: jax.Array, parts: Sequence[jax.Array], interpret: Any) -> list[jax.Array]:
    """Each part [64, columns] times factors [64]; a warp whose rows' factors are all 1 skips it."""
    if interpret:
        return [part * by_row(factors, part) for part in parts]
    kinds = [plgpu.ShapeDtypeStruct(part.shape, jnp.float32, layout=MATRIX) for part in parts]

    @plgpu.inline_mgpu(arg_types=(ROWS, *[MATRIX] * len(parts)), return_type=kinds)
    def scale(_: Any, factors: Any, *parts: Any) -> Any:
        mine = [vector.extract(register, [], [0]) for register in factors.registers.flat]
        one = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), 1.0))
        others = [arith.cmpf(arith.CmpFPredicate.UNE, factor, one) for factor in mine]
        everyone = arith.constant(ir.IntegerType.get_signless(32), -1)
        needed = nvvm.vote_sync(everyone, arith.ori(*others), nvvm.VoteSyncKind.any)
        before = [register for part in parts for register in part.registers.flat]
        choice = scf.IfOp(needed, [register.type for register in before], has_else=True)
        with ir.InsertionPoint(choice.then_block):
            scaled = [
                arith.mulf(register, vector.broadcast(register.type, mine[index[HALF]]))
                for part in parts
                for index, register in np.ndenumerate(part.registers)
            ]
            scf.yield_(scaled)
        assert choice.else_block is not None
        with ir.InsertionPoint(choice.else_block):
            scf.yield_(before)
        results, made = list(choice.results), []
        for part in parts:
            count = part.registers.size
            registers = np.array(results[:count], dtype=object).reshape(part.registers.shape)
            results = results[count:]
            made.append(
                fragments.FragmentedArray(
                    _registers=registers, _layout=part.layout, _is_signed=None
                )
            )
        return made

    return list(scale(factors, *parts))
