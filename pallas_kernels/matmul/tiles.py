"""How the Hopper kernel of `matmul` cuts a product, and over how many sums it splits the inputs."""

import dataclasses
import math
from collections.abc import Iterator

from pallas_kernels.grouped_matmul.products import BLOCK
from pallas_kernels.grouped_matmul.tiles import Tiles

MOST_SPLITS = 16
# Microseconds and bytes a microsecond of an H100, for choosing only.
_MEMORY = 3.1e6
"""Bytes of weights that the device reads."""
_CACHE = 3.9e4
"""Bytes of weights and rows that a streaming multiprocessor loads, most of them from L2."""
_SUMS = 4e6
"""Bytes of fp32 sums that the device writes and reads again."""
_LAUNCH = 2.0
"""Of the kernel that adds them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Choices that change speed, and results only by the order of fp32 sums.

    Attributes:
        tiles: see there; an item has `tiles.outputs` outputs.
        splits: thread blocks that share an item: each sums K / splits inputs.
    """

    tiles: Tiles
    splits: int = 1

    def refusal(self, outputs: int, blocks: int) -> str | None:
        """Why weights with so many outputs and blocks of inputs cannot be cut like that."""
        width, together = self.tiles.outputs, self.splits * self.tiles.blocks
        if blocks % together:
            return f"{self.splits} splits x {self.tiles.blocks} blocks do not divide {blocks}"
        if outputs < width or self.tiles.rows == 128 and outputs % width:
            return f"items of {width} outputs do not divide {outputs}"
        return None


def usual_cut(rows: int, outputs: int, blocks: int, sms: int) -> Cut:
    """A fast choice: for 65 to 128 rows the fastest of a sweep on an H100, for others the fastest
    by a simple count of bytes.

    Args:
        rows: of x.
        outputs: N, a multiple of 64.
        blocks: blocks of 128 inputs, K / 128.
        sms: streaming multiprocessors.
    """
    if 64 < rows <= 128:
        # The narrowest items, and as many sums of each as all can be made at once.
        divisors = [n for n in range(1, MOST_SPLITS + 1) if blocks % n == 0]
        splits = max((n for n in divisors if outputs // 64 * n <= sms), default=1)
        return _wide(64, blocks // splits, splits)
    cuts = (cut for cut in _cuts(rows, blocks) if cut.refusal(outputs, blocks) is None)
    return min(cuts, key=lambda cut: _microseconds(cut, rows, outputs, blocks, sms))


def _cuts(rows: int, blocks: int) -> Iterator[Cut]:
    for splits in (n for n in range(1, MOST_SPLITS + 1) if blocks % n == 0):
        even = blocks // splits % 2 == 0
        if rows <= 64:
            size = next(size for size in (8, 16, 32, 64) if size >= rows)
            deep = 2 if even else 1
            stages = {8: 12, 16: 12, 32: 10, 64: 6}[size] // deep
            yield Cut(tiles=Tiles(rows=size, deep=deep, stages=stages), splits=splits)
            continue
        for width in (128, 64):
            yield _wide(width, blocks // splits, splits)


def _wide(width: int, blocks: int, splits: int) -> Cut:
    """128 rows by so many outputs; 64 of these make more items, and a larger share of what is
    loaded are rows.

    Args:
        width: outputs of an item.
        blocks: blocks of inputs of a split.
        splits: of an item.
    """
    # Two products at once hide the additions (see `fp8_tiles`) where there are many.
    together = 2 if blocks >= 8 and blocks % 2 == 0 else 1
    tiles = Tiles(
        rows=128,
        outputs=width,
        together=together,
        stages=5 if width == 128 else 7,
        staged=2 if width == 128 and splits == 1 else 1,
        registers=(24, 240),
    )
    return Cut(tiles=tiles, splits=splits)


def _microseconds(cut: Cut, rows: int, outputs: int, blocks: int, sms: int) -> float:
    size, width = cut.tiles.rows, cut.tiles.outputs
    row_tiles = -(-rows // size)
    items = row_tiles * -(-outputs // width) * cut.splits
    loaded = math.ceil(items / sms) * blocks // cut.splits * BLOCK * (size + width)
    reading = max(outputs * blocks * BLOCK / _MEMORY, loaded / _CACHE)
    if cut.splits == 1:
        return reading
    sums = 2 * 4 * cut.splits * row_tiles * size * outputs
    return reading + _LAUNCH + sums / _SUMS
