"""A thread block of the Hopper kernel of `mla_prefill`: what its warpgroups share.

It has 128 queries of one head, 64 for each of two warpgroups (`attend.py`); a third one copies
(`copies.py`). It walks the list of key tiles of `work.py`. The rope keys are copied as they are,
one tile for all heads: scores are two products into one accumulator. Probabilities stay in
registers as the left operand of the product with the values, which is issued together with the
scores of the next tile. The warpgroups take turns at the tensor cores: one multiplies while the
other does its softmax. Both are from FlashAttention-3 (Shah et al. 2024, section 3).
"""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.mla_prefill.tiles import HEAD, QUERY_TILE, Tiles
from pallas_kernels.mla_prefill.work import ALL, FULL

NOPE, ROPE, VALUE = HEAD
COMPUTE = 2
"""Warpgroups that multiply."""
ROWS_EACH = QUERY_TILE // COMPUTE
REGISTERS = (232, 40)
"""A thread of the warpgroups that multiply, and of the one that copies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is known when the kernel is compiled.

    Attributes:
        scale: softmax scale.
        tiles: see there.
        interpret: parameters of Pallas' GPU interpreter; None on a GPU.
    """

    scale: float
    tiles: Tiles
    interpret: Any = None

    @property
    def exponent(self) -> float:
        """From scores to exponents of 2."""
        return self.scale * math.log2(math.e)


def scratch(g: Geometry) -> dict[str, Any]:
    """Shared memory and barriers."""
    slots, keys = g.tiles.slots, g.tiles.keys
    tile = functools.partial(hopper.swizzled, dtype=jnp.bfloat16)
    memory = {
        "queries": tile(COMPUTE, ROWS_EACH, NOPE),  # later the results
        "rope_queries": tile(COMPUTE, ROWS_EACH, ROPE),
        "keys": tile(slots, keys, NOPE),
        "rope_keys": tile(slots, keys, ROPE),
        "values": tile(slots, keys, VALUE),
        "queries_ready": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
        "keys_ready": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "values_ready": plgpu.Barrier(num_barriers=slots),
        "values_copied": plgpu.Barrier(),
        "keys_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
        "values_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE),
    }
    if g.interpret:
        # The interpreter takes both operands of a product from memory only.
        memory["probs"] = tile(COMPUTE, ROWS_EACH, keys)
    return memory


class Block:
    """A thread block: its place and its memory.

    Attributes:
        g: see there.
        refs: operands and results of the kernel, and `scratch`.
        head: which one.
        work_head: of the lists, which may be the same for all heads.
        tile: of queries.
        full: key tiles that are seen whole, the first ones of its list.
        count: key tiles, at least one.
    """

    def __init__(self, g: Geometry, refs: SimpleNamespace) -> None:
        self.g, self.refs = g, refs
        self.head = lax.axis_index("head")
        self.work_head = self.head if refs.counts.shape[0] > 1 else 0
        # The longest lists first: with causal masks those of the last queries.
        self.tile = refs.counts.shape[1] - 1 - lax.axis_index("tile")
        self.full, self.count = (
            refs.counts[self.work_head, self.tile, column] for column in (FULL, ALL)
        )

    def slot(self, step: jax.Array) -> jax.Array:
        """Where a step's keys and values are."""
        return lax.rem(step, jnp.int32(self.g.tiles.slots))

    def key_tile(self, step: jax.Array) -> jax.Array:
        """What a step visits."""
        return self.refs.tiles[self.work_head, self.tile, step]


def load(source: Any, layout: Any) -> jax.Array:
    """Numbers of a plan from memory into registers."""
    return plgpu.load(source, layout=layout, optimized=False)
