"""How the Hopper kernels of `mla_decode` cut their work; what a sweep may change."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Choices that change speed, never results.

    Attributes:
        value_columns: columns of one product of probabilities and values; "fp8_tensor" has its own.
        registers: per thread, of the warpgroup with the scores and of each of the two with the
            values; in steps of 8, and 504 at most in all: what 384 threads have at launch. Those of
            the cache's format when None.
        auto_barriers: let the compiler put a barrier around each access to shared memory. The
            kernels hold without.
    """

    value_columns: int = 128
    registers: tuple[int, int] | None = None
    auto_barriers: bool = False

    def __post_init__(self) -> None:
        if self.value_columns not in (64, 128, 256):
            raise ValueError(f"{self.value_columns=} must be 64, 128 or 256")
        scores, values = self.registers or (0, 0)
        if scores % 8 or values % 8 or scores + 2 * values > 504:
            raise ValueError(
                f"{self.registers=} must be multiples of 8, and scores + 2 * values at most 504"
            )
