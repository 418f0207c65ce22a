"""Products of the Hopper kernels of `grouped_matmul`: e4m3, 64 rows by n columns, 128 inputs deep.

The tensor cores of Hopper add fp8 products with some 14 bits, so every 128 inputs begin a sum of
their own, which is scaled and added to fp32 sums outside (DeepSeek-V3 report, section 3.3.2).
Pallas' `wgmma` would first write zeros into all registers of such a sum, and keeps them in pairs,
which costs moves of registers in flight. So the instructions are written out here: the first of a
block ignores what the registers hold.

Operands lie in shared memory of [rows, 128] bytes, see `hopper.swizzled_rows`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import packed_int4

BLOCK = 128
"""Inputs of a product: one block of scales, one row of swizzled shared memory."""
SUMS: Any = plgpu.Layout._WGMMA_ACC_32BIT
"""How registers hold sums: like `hopper.MATRIX`, but each value in a variable of its own."""
inlined: Any = plgpu.inline_mgpu
OPERAND: Any = plgpu.RefType(hopper.SWIZZLED_ROWS)
WORDS = plgpu.Layout.WG_STRIDED((8, 128), vec_size=4)
"""How registers hold a tile of `PackedInt4`."""


def zeros(columns: int, interpret: Any) -> jax.Array:
    """Sums [64, columns] that nothing has been added to."""
    if interpret:
        return jnp.zeros((64, columns), jnp.float32)

    @inlined(return_type=_sums(columns))
    def zero(_: Any) -> Any:
        f32 = ir.F32Type.get()
        value = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        return _fragments([value] * (columns // 2), columns)

    return zero()


def multiply(left: Any, right: Any, columns: int, interpret: Any) -> jax.Array:
    """Starts [64, columns] = left [64, 128] @ right [columns, 128].T, both in shared memory. Only
    `add_scaled` may read the result.
    """
    if interpret:
        return multiplied(left, right, columns)

    @inlined(arg_types=(OPERAND, OPERAND), return_type=_sums(columns))
    def start(_: Any, left: Any, right: Any) -> Any:
        return wgmma([descriptor(left)], descriptor(right), columns)

    return start(left, right)


def multiply_words(
    left: tuple[jax.Array, jax.Array], right: Any, columns: int, staged: Any, interpret: Any
) -> jax.Array:
    """The same with the left operand in registers, as `packed_int4.as_e4m3` makes it. It must stay
    there until the product has ended, see `add_scaled`.

    Args:
        left: int32 [8, 128] each, laid out as `WORDS`.
        right: in shared memory.
        columns: of the result.
        staged: shared memory [64, 128] for the interpreter, which has products only of such.
        interpret: on a CPU.
    """
    if interpret:
        staged[...] = packed_int4.as_matrix(*left)
        plgpu.commit_smem()
        return multiplied(staged, right, columns)

    @inlined(arg_types=(WORDS, WORDS, OPERAND), return_type=_sums(columns))
    def start(_: Any, first: Any, second: Any, right: Any) -> Any:
        registers = [
            vector.extract(quadruples.registers.flat[half], [], [i])
            for i in range(4)
            for quadruples in (first, second)
            for half in range(2)
        ]
        return wgmma(registers, descriptor(right), columns)

    return start(*left, right)


def multiplied(left: Any, right: Any, columns: int) -> jax.Array:
    """The same for the interpreter, which knows only Pallas' own."""

    def product(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, left, right.transpose((1, 0)))
        return sums[...]

    return pl.run_scoped(product, hopper.accumulator(64, columns))


def add_scaled(
    sums: jax.Array,
    product: jax.Array,
    scales: jax.Array,
    *,
    axis: int,
    in_flight: int,
    held: Sequence[jax.Array] = (),
    interpret: Any,
) -> jax.Array:
    """sums + product * scales, once no more than `in_flight` products that began later are left.

    Args:
        sums: [64, columns].
        product: of `multiply`, [64, columns].
        scales: fp32, in the layout of `hopper.MATRIX` without the other axis.
        axis: 0 if there is a scale for each row, 1 if for each column.
        in_flight: products.
        held: what registers must hold until then, laid out as `WORDS`: operands of products in
            flight, which the compiler takes for dead, and what is to be made meanwhile.
        interpret: on a CPU.
    """
    columns = sums.shape[1]
    if interpret:
        return sums + product * lax.broadcast_in_dim(scales, product.shape, [axis])
    layouts = (SUMS, SUMS, hopper.MATRIX.reduce(1 - axis), *[WORDS] * len(held))

    @inlined(arg_types=layouts, return_type=_sums(columns))
    def add(_: Any, sums: Any, product: Any, scales: Any, *held: Any) -> Any:
        nothing = ir.Type.parse("!llvm.void")
        wait = f"wgmma.wait_group.sync.aligned {in_flight};"
        words = [value for array in held for value in _elements(array)]
        llvm.inline_asm(nothing, words, wait, ",".join("r" * len(words)), has_side_effects=True)
        product = fragments.optimization_barrier(product)  # nothing reads it before the wait
        factors = _elements(scales)
        results = []
        for i, (p, s) in enumerate(zip(_elements(product), _elements(sums), strict=True)):
            # Register i: column i % 2 of a pair, row half i // 2 % 2, tile of 8 columns i // 4.
            factor = factors[i // 2 % 2 if axis == 0 else 2 * (i // 4) + i % 2]
            results.append(mlir_math.fma(p, factor, s))
        return _fragments(results, columns)

    return add(sums, product, scales, *held)


def as_matrix(parts: Sequence[jax.Array], interpret: Any) -> jax.Array:
    """Sums beside each other, in the layout of `hopper.MATRIX`."""
    if interpret:
        return jnp.concatenate(parts, axis=1)
    columns = sum(part.shape[1] for part in parts)
    kind = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=hopper.MATRIX)

    @inlined(arg_types=(SUMS,) * len(parts), return_type=kind)
    def convert(_: Any, *parts: Any) -> Any:
        values = [value for part in parts for value in _elements(part)]
        return _fragments(values, columns).to_layout(fragments.WGMMA_LAYOUT)

    return convert(*parts)


def wait_for_warps(interpret: Any) -> None:
    """All four warps of the warpgroup have come here."""
    if interpret:
        return  # warps are no threads of the interpreter

    @inlined()
    def wait(_: Any) -> None:
        utils.warpgroup_barrier()

    wait()


def order_before_copies(interpret: Any) -> None:
    """Orders what other threads have read before a copy that overwrites it: copies go another way
    to shared memory than registers do.
    """
    if interpret:
        plgpu.commit_smem()
        return

    @inlined()
    def fence(_: Any) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()


# ------------------------------------------------------------------ inside inline_mgpu


def wgmma(left: Sequence[Any], right: Any, columns: int) -> Any:
    """The four instructions of a block, as one group.

    Args:
        left: one descriptor, or 16 registers of packed e4m3: four for each instruction.
        right: descriptor.
        columns: n.
    """
    results = columns // 2
    sums = "{" + ", ".join(f"${i}" for i in range(results)) + "}"
    code = [
        "{ .reg .pred clear, add; .reg .b64 l1, l2, l3, r1, r2, r3;",
        "setp.ne.b32 clear, 0, 0; setp.ne.b32 add, 1, 0;",
    ]
    rights = _advanced(code, "r", f"${results + len(left)}")
    if len(left) == 1:
        lefts = _advanced(code, "l", f"${results}")
    else:
        names = [f"${results + i}" for i in range(16)]
        lefts = ["{" + ", ".join(names[4 * i : 4 * i + 4]) + "}" for i in range(4)]
    code.append("wgmma.fence.sync.aligned;")
    for a, b, keep in zip(lefts, rights, ("clear", "add", "add", "add"), strict=True):
        name = f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3"
        code.append(f"{name} {sums}, {a}, {b}, {keep}, 1, 1;")
    code.append("wgmma.commit_group.sync.aligned; }")
    kinds = ["=f"] * results + ["l" if len(left) == 1 else "r"] * len(left) + ["l"]
    f32 = ir.F32Type.get()
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * results),
        [*left, right],
        "\n".join(code),
        ",".join(kinds),
        asm_dialect=0,
        has_side_effects=True,
    )
    return _fragments([llvm.extractvalue(f32, struct, [i]) for i in range(results)], columns)


def _advanced(code: list[str], name: str, first: str) -> list[str]:
    """Descriptors of the four quarters of a row, 32 bytes each; they count in 16 bytes."""
    code.extend(f"add.s64 {name}{i}, {first}, {2 * i};" for i in (1, 2, 3))
    return [first, *(f"{name}{i}" for i in (1, 2, 3))]


def descriptor(operand: Any) -> Any:
    """What tells `wgmma` where [rows, 128] bytes are: from the low bits on the address in 16 bytes,
    at bit 32 the distance of eight rows likewise, at bit 62 the swizzle of 128 bytes.
    """
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    # 32 bits of address, fewer than the usual way takes: products wait for this arithmetic.
    address = llvm.ptrtoint(i32, utils.memref_ptr(operand))
    low = llvm.zext(i64, llvm.lshr(address, utils.c(4, i32)))
    return llvm.or_(low, utils.c(8 * BLOCK // 16 << 32 | 1 << 62, i64))


def _sums(columns: int) -> Any:
    return plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=SUMS)


def _fragments(values: Sequence[Any], columns: int) -> Any:
    one, layout = ir.VectorType.get((1,), ir.F32Type.get()), fragments.WGMMA_LAYOUT_ACC_32BIT
    registers = np.array([vector.broadcast(one, value) for value in values], dtype=object)
    return fragments.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((64, columns))),
        _layout=layout,
        _is_signed=None,
    )


def _elements(array: Any) -> list[Any]:
    return [
        vector.extract(register, [], [i])
        for register in array.registers.flat
        for i in range(ir.VectorType(register.type).shape[0])
    ]
