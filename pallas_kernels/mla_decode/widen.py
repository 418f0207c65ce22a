"""Tiles of e4m3 made fp16 in shared memory: tensor cores take fp8 values only along the channels.

Any thread may convert any piece, so 16 bytes are read and 32 written at a time, and nobody else's
registers are asked: the arrangement of a product's operand, in which a thread has two channels next
to each other, would need eight reads for these. Eight threads read, and write, 128 different bytes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.hopper import MATRIX, ROWS, by_row, transforms

STRIP = 64
"""Columns of a tile of `hopper.swizzled`, which has 8 rows."""
PIECE = 16
"""Columns that a thread converts at once."""


def widen(
    raw: Any, to: Any, *, first: int = 0, factors: Sequence[jax.Array] = (), interpret: Any
) -> None:
    """to = raw[:, first:] * factors; both in shared memory as `hopper.swizzled` makes it.

    Args:
        raw: e4m3 [64, n].
        to: fp16 [64, columns].
        first: column of raw where `to` begins, a multiple of 64.
        factors: fp32 [64], one for each row, for every 64 columns of `to`; none means 1.
        interpret: on a CPU.
    """
    strips = to.shape[1] // STRIP
    if interpret:
        for strip in range(strips):
            here, there = pl.ds(strip * STRIP, STRIP), pl.ds(first + strip * STRIP, STRIP)
            values = plgpu.load(raw.at[:, there], layout=MATRIX).astype(to.dtype)
            if factors:
                values = values * by_row(factors[strip].astype(to.dtype), values)
            to.at[:, here][...] = values
        return
    tiles = raw.shape[1] // STRIP

    kinds = [plgpu.RefType(transforms(dtype)) for dtype in (jnp.float8_e4m3fn, jnp.float16)]

    @plgpu.inline_mgpu(arg_types=(*kinds, *[ROWS] * len(factors)))
    def convert(_: Any, raw: Any, to: Any, *factors: Any) -> None:
        source, target = _addresses(raw, to, tiles, strips)
        scales = [_pairs(factor) for factor in factors]
        for half in range(2):  # the warp's rows are those of a product: 8, and the next 8
            for strip in range(strips):
                read = (half * tiles + first // STRIP + strip) * 8 * STRIP
                write = (half * strips + strip) * 8 * STRIP * 2
                scale = scales[strip][half] if scales else None
                _convert(source, target, read, write, scale)

    convert(raw, to, *factors)


def _addresses(raw: Any, to: Any, tiles: int, strips: int) -> tuple[Any, list[Any]]:
    """Where this thread reads and writes in the first strip, i32: its row of eight and its piece.
    Swizzles exchange pieces of 16 bytes of a row: by its number, of which 64 bytes take half.
    """
    i32 = ir.IntegerType.get_signless(32)

    def c(value: int) -> Any:
        return utils.c(value, i32)

    thread = arith.remui(utils.thread_idx(), c(utils.WARPGROUP_SIZE))
    warp, lane = arith.divui(thread, c(32)), arith.remui(thread, c(32))
    row, piece = arith.divui(lane, c(4)), arith.remui(lane, c(4))

    def at(ref: Any, row_bytes: int, tile_bytes: int, place: Any) -> Any:
        base = llvm.ptrtoint(i32, utils.memref_ptr(ref))
        own = arith.addi(arith.muli(row, c(row_bytes)), arith.muli(place, c(PIECE)))
        return arith.addi(base, arith.addi(arith.muli(warp, c(2 * tile_bytes)), own))

    read = arith.xori(piece, arith.divui(row, c(2)))
    write = arith.xori(arith.muli(piece, c(2)), row)
    target = at(to, 2 * STRIP, strips * 8 * STRIP * 2, write)
    source = at(raw, STRIP, tiles * 8 * STRIP, read)
    return source, [target, arith.xori(target, c(PIECE))]


def _pairs(factor: Any) -> list[Any]:
    """A factor for each half of the warp's rows, twice in a register, as fp16."""
    found = []
    for register in factor.registers.flat:
        value = vector.extract(register, [], [0])
        half = arith.truncf(ir.F16Type.get(), value)
        pair = vector.broadcast(ir.VectorType.get((2,), ir.F16Type.get()), half)
        found.append(utils.bitcast(pair, ir.IntegerType.get_signless(32)))
    return found


def _convert(source: Any, target: list[Any], read: int, write: int, scale: Any) -> None:
    """Converts a piece."""
    code = [
        "{ .reg .b32 w<4>, v<8>; .reg .b16 h<8>;",
        f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$0 + {read}];",
        *(f"mov.b32 {{h{2 * i}, h{2 * i + 1}}}, w{i};" for i in range(4)),
        *(f"cvt.rn.f16x2.e4m3x2 v{i}, h{i};" for i in range(8)),
    ]
    if scale is not None:
        code += [f"mul.rn.f16x2 v{i}, v{i}, $3;" for i in range(8)]
    code += [
        f"st.shared.v4.b32 [$1 + {write}], {{v0, v1, v2, v3}};",
        f"st.shared.v4.b32 [$2 + {write}], {{v4, v5, v6, v7}}; }}",
    ]
    operands = [source, *target, *([] if scale is None else [scale])]
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        operands,
        "\n".join(code),
        ",".join(["r"] * len(operands)) + ",~{memory}",
        asm_dialect=0,
        has_side_effects=True,
    )
