"""How the Hopper kernels of `grouped_matmul` cut their work; what a sweep may change."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Choices that change speed, never results.

    Attributes:
        rows: rows of a tile; of `weight_gradient`, outputs.
        outputs: of an item; of `weight_gradient`, inputs. Other than 128 only with 128 rows, 64
            only in `matmul`.
        deep: blocks of 128 inputs, of bf16 64, that are loaded at once.
        together: such loads that are multiplied in one turn of a loop, which ends without a product
            in flight.
        stages: such loads that fit in shared memory.
        staged: pieces of 64 outputs that a warpgroup stores at once; with 128 rows only.
        per_sm: thread blocks of a streaming multiprocessor.
        cluster: thread blocks that take outputs next to each other, of the same tile of rows, at
            the same time: each copies a part of the rows for all. Only fp8 weights with 128 rows.
        registers: per thread, of the warpgroup that loads and of the two that multiply; None
            leaves all with the same number.
        auto_barriers: let the compiler put a barrier around each access to shared memory.
    """

    rows: int
    outputs: int = 128
    deep: int = 1
    together: int = 1
    stages: int = 5
    staged: int = 2
    per_sm: int = 1
    cluster: int = 1
    registers: tuple[int, int] | None = None
    auto_barriers: bool = True

    def __post_init__(self) -> None:
        if self.rows not in (8, 16, 32, 64, 128):
            raise ValueError(f"{self.rows=} must be 8, 16, 32, 64 or 128")
        if self.outputs not in (64, 128, 192, 256) or self.outputs != 128 and self.rows != 128:
            raise ValueError(
                f"{self.outputs=} must be 128, or 64, 192 or 256 with 128 rows, not {self.rows}"
            )
        if self.cluster > 1 and self.rows != 128:
            raise ValueError(f"{self.cluster=} must be 1 with {self.rows=}")
        if self.stages < min(2, self.together):
            raise ValueError(f"{self.stages=} must be at least 2 with {self.together=}")
        if self.registers and (any(n % 8 for n in self.registers) or self._all_registers > 504):
            raise ValueError(
                f"{self.registers=} must be multiples of 8, and loading + 2 * multiplying at most "
                "504"
            )

    @property
    def _all_registers(self) -> int:
        loading, multiplying = self.registers or (168, 168)
        return loading + 2 * multiplying

    @property
    def blocks(self) -> int:
        """Blocks of 128 inputs that are multiplied at once."""
        return self.deep * self.together


def fp8_tiles(rows: int, experts: int, blocks: int, outputs: int) -> Tiles:
    """The fastest known choice for fp8 weights.

    Args:
        rows: M.
        experts: E.
        blocks: blocks of 128 inputs, K / 128.
        outputs: N.
    """
    mean = rows / experts
    deep = 2 if blocks % 2 == 0 else 1
    if mean <= 8:
        return Tiles(rows=_few(mean), deep=deep, stages=6)
    if mean <= 32:
        return Tiles(rows=32, deep=deep)
    if mean <= 128:
        return Tiles(rows=128, registers=(40, 232))
    # Alone, thread blocks ask the L2 cache for more than it has to give: 32 KiB for 4.2 MFLOP.
    cluster = 2 if outputs % 256 == 0 else 1
    return Tiles(rows=128, together=_turn(blocks, 4), registers=(40, 232), cluster=cluster)


def _turn(blocks: int, most: int) -> int:
    """Blocks of a turn: a product is added while the next is made, but for the last of each. With
    more blocks than `most`, newer compilers (ptxas 13) run out of registers.
    """
    return next(count for count in (4, 2, 1) if count <= most and blocks % count == 0)


def _few(mean: float) -> int:
    """Rows of a tile where an expert has up to 8. Tiles begin at multiples of 4, and some experts
    have more than others: with 8 rows for 4 a tenth of the weights is read twice.
    """
    return 8 if mean <= 2 else 16


def w4a8_tiles(rows: int, experts: int, blocks: int) -> Tiles:
    """The fastest known choice for int4 weights; the other arguments as for `fp8_tiles`."""
    mean = rows / experts
    if mean <= 32:
        deep = 2 if blocks % 2 == 0 else 1
        return Tiles(rows=_few(mean) if mean <= 8 else 32, deep=deep, stages=7)
    return Tiles(
        rows=64 if mean <= 64 else 128,
        together=_turn(blocks, 2),
        stages=7,
        registers=(24, 240),
    )


def bf16_tiles(rows: int, experts: int, outputs: int) -> Tiles:
    """The choice for bf16 weights.

    Args:
        rows: M.
        experts: E.
        outputs: N, or K for the gradient of rows.
    """
    mean = rows / experts
    # Tiles begin at multiples of 8 rows: with fewer, most groups would lie in two, and their
    # weights be read twice.
    wanted = mean + 7 if mean > 1 else 1
    if wanted <= 64:
        size = next(size for size in (8, 16, 32, 64) if size >= wanted)
        return Tiles(rows=size, deep=2, stages=6 if size <= 16 else 5 if size <= 32 else 4)
    return _wide(outputs)


def weight_gradient_tiles(inputs: int) -> Tiles:
    """The choice for the gradient of bf16 weights with so many inputs, K."""
    return _wide(inputs)


def _wide(columns: int) -> Tiles:
    """256 columns where they waste none: they load fewest bytes for a product."""
    outputs = min((256, 128, 192), key=lambda width: -(-columns // width) * width)
    stages = {256: 4, 192: 4, 128: 5}[outputs]
    return Tiles(rows=128, outputs=outputs, stages=stages, registers=(40, 232))
