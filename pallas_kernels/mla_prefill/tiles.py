"""What a sweep changes in the Hopper kernel of `mla_prefill`."""

import dataclasses

QUERY_TILE = 128
"""Query rows of a thread block: 64 for each of two warpgroups."""
HEAD = (128, 64, 128)
"""Channels: nope, rope, value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes and orders.

    Attributes:
        keys: keys that a thread block takes at once, 64 or 128.
        slots: tiles of keys, and of values, in shared memory.
        ping_pong: the two warpgroups take turns: one multiplies while the other does its softmax.

    Raises:
        ValueError: `keys` is another number, or the slots do not fit in shared memory.
    """

    keys: int = 128
    slots: int = 2
    ping_pong: bool = True

    def __post_init__(self) -> None:
        if self.keys not in (64, 128):
            raise ValueError(f"{self.keys=} must be 64 or 128")
        if not 1 <= self.slots <= 256 // self.keys:
            raise ValueError(f"{self.slots=} must be 1 to {256 // self.keys} with {self.keys=}")
