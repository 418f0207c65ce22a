"""Gradients of `mla_prefill` for Hopper: two kernels in Triton, for heads as `mosaic_sm90` takes.

The backward pass of FlashAttention-2 (Dao 2023, section 3.1.2): probabilities come back from the
log-sum-exp, a tile at a time. A program of one kernel has a tile of keys and walks the queries that
see it; of the other it has a tile of queries and walks their keys. So no two programs add to one
place, and a result has the same bits each run. Both follow a list (`work.Walk`): tiles that are
seen whole need no mask. The gradient of the shared rope key is summed over heads by XLA.

Scores stand with the program's own rows first, keys in the one and queries in the other, so that
probabilities go from registers straight into the next product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.mla_prefill.tiles import HEAD
from pallas_kernels.mla_prefill.work import ALL, FULL, Walk, walk_keys, walk_queries
from pallas_kernels.triton_ops import ptx

NOPE, ROPE, VALUE = HEAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientTiles:
    """Sizes of one of the two kernels.

    Attributes:
        own: rows whose gradient a program makes, 16 for each warp: 64 or 128.
        walked: rows of the other side that it takes at once.
        stages: of Triton's pipeline. With 1 a tile is loaded when its turn comes; with 2 the next
            tile is on its way, with 3 also its place in the list.

    Raises:
        ValueError: a size is another number.
    """

    own: int = 128
    walked: int = 64
    stages: int = 2

    def __post_init__(self) -> None:
        if self.own not in (64, 128):
            raise ValueError(f"{self.own=} must be 64 or 128")
        if self.walked not in (32, 64, 128):
            raise ValueError(f"{self.walked=} must be 32, 64 or 128")
        if self.stages < 1:
            raise ValueError(f"{self.stages=} must be at least 1")

    @property
    def compiler_params(self) -> Any:
        """For Triton."""
        return plt.CompilerParams(num_warps=self.own // 16, num_stages=self.stages)


FOR_QUERIES = GradientTiles(stages=3)
FOR_KEYS = GradientTiles(own=64, walked=32, stages=3)


# A jit of its own, so that all layers of an unrolled model call one function.
@functools.partial(jax.jit, static_argnames=("scale", "for_queries", "for_keys", "interpret"))
def gradients(
    q_nope: Float[Array, "T H N"],
    q_rope: Float[Array, "T H P"],
    k_nope: Float[Array, "S H N"],
    k_rope: Float[Array, "S P"],
    v: Float[Array, "S H V"],
    out: Float[Array, "T H V"],
    lse: Float[Array, "T H"],
    d_out: Float[Array, "T H V"],
    d_lse: Float[Array, "T H"] | None,
    plan: MlaPrefillPlan,
    *,
    scale: float,
    for_queries: GradientTiles = FOR_QUERIES,
    for_keys: GradientTiles = FOR_KEYS,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Of q_nope, q_rope, k_nope, k_rope and v, each in its shape and type.

    Args:
        q_nope: as in `api.mla_prefill`, bf16, as are all others but log-sum-exps.
        q_rope: as there.
        k_nope: as there.
        k_rope: as there.
        v: as there.
        out: result.
        lse: its log-sum-exp, fp32.
        d_out: gradient of `out`; of padding it may be NaN.
        d_lse: of `lse`, fp32, or None; of queries that see nothing it counts for nothing.
        plan: as there.
        scale: as there.
        for_queries: tiles of the kernel for q_nope and q_rope.
        for_keys: of that for the others.
        interpret: run on a CPU.

    Arrays have fewer than 2**31 elements: offsets have 32 bits.
    """
    # Of a whole number of tiles, whatever their size.
    spare = ((0, 0), (0, -len(q_nope) % 128))
    arrays = {
        "q_nope": q_nope,
        "q_rope": q_rope,
        "k_nope": k_nope,
        "k_rope": k_rope,
        "v": v,
        "d_out": d_out,
        "lse": jnp.pad(lse.T * math.log2(math.e), spare),
        "delta": jnp.pad(_delta(out, lse, d_out, d_lse).T, spare),
    }
    call = functools.partial(_call, arrays, scale=scale, interpret=interpret)
    d_q = call(
        _for_queries,
        walk_keys(plan, for_queries.own, for_queries.walked),
        for_queries,
        {"d_q_nope": q_nope, "d_q_rope": q_rope},
    )
    of_heads = jax.ShapeDtypeStruct((*k_nope.shape[:2], ROPE), k_rope.dtype)
    d_k_nope, d_k_rope, d_v = call(
        _for_keys,
        walk_queries(plan, for_keys.walked, for_keys.own),
        for_keys,
        {"d_k_nope": k_nope, "d_k_rope": of_heads, "d_v": v},
    )
    d_k_rope = d_k_rope.astype(jnp.float32).sum(axis=1).astype(k_rope.dtype)
    return *d_q, d_k_nope, d_k_rope, d_v


def _delta(out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array | None) -> jax.Array:
    """What is taken from the gradients of a row of probabilities: fp32 [T, H], 0 for a query that
    sees nothing. A gradient of the log-sum-exp only adds to it.
    """
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    if d_lse is not None:
        delta -= d_lse
    return jnp.where(lse > -jnp.inf, delta, 0)


def _call(
    arrays: dict[str, jax.Array],
    function: Callable[["_Program"], None],
    walk: Walk,
    tiles: GradientTiles,
    results: dict[str, Any],
    *,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    operands = arrays | {f.name: getattr(walk, f.name) for f in dataclasses.fields(walk)}
    names = (*operands, *results)

    def kernel(*refs: Any) -> None:
        named = SimpleNamespace(**dict(zip(names, refs, strict=True)))
        function(_Program(named, tiles, scale, interpret))

    # The name of the function is that of the kernel.
    kernel.__name__ = kernel.__qualname__ = f"mla_prefill_gradient{function.__name__}"
    found = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results.values()],
        grid=(len(walk.counts), arrays["q_nope"].shape[1]),  # the first moves fastest
        compiler_params=tiles.compiler_params,
        interpret=interpret,
        name=kernel.__name__,
    )(*operands.values())
    return tuple(found)


class _Program:
    """A program: its place, and what the two kernels share.

    Attributes:
        refs: arrays, the walk and results.
        tiles: sizes.
        scale: softmax scale.
        interpret: on a CPU.
        tile: its own, of the walk.
        head: which one.
    """

    def __init__(
        self, refs: SimpleNamespace, tiles: GradientTiles, scale: float, interpret: bool
    ) -> None:
        self.refs, self.tiles, self.scale, self.interpret = refs, tiles, scale, interpret
        self.tile, self.head = pl.program_id(0), pl.program_id(1)

    def zeros(self, *channels: int) -> tuple[jax.Array, ...]:
        """Sums of its rows."""
        return tuple(jnp.zeros((self.tiles.own, n), jnp.float32) for n in channels)

    def walk(self, step: Callable[[jax.Array, Any, bool], Any], sums: Any) -> Any:
        """Calls `step(rows, sums, masked)` for each tile of the list."""
        refs, count = self.refs, self.tiles.walked
        full, every = (refs.counts[self.tile, column] for column in (FULL, ALL))

        def body(masked: bool, index: jax.Array, sums: Any) -> Any:
            rows = refs.tiles[self.tile, index] * count + jnp.arange(count)
            return step(rows, sums, masked)

        sums = lax.fori_loop(jnp.int32(0), full, functools.partial(body, False), sums)
        return lax.fori_loop(full, every, functools.partial(body, True), sums)

    def load(self, name: str, rows: jax.Array, used: jax.Array | None) -> jax.Array:
        """Rows of this head; 0 for those that are not used, whatever they hold."""
        ref = getattr(self.refs, name)
        head = (self.head,) if len(ref.shape) == 3 else ()
        where = ref.at[(rows[:, None], *head, jnp.arange(ref.shape[-1])[None])]
        if used is None:
            return plt.load(where)
        return plt.load(where, mask=used[:, None], other=0.0)

    def store(self, name: str, rows: jax.Array, values: jax.Array) -> None:
        """Rows of this head, except past the end."""
        ref = getattr(self.refs, name)
        where = ref.at[rows[:, None], self.head, jnp.arange(ref.shape[-1])[None]]
        plt.store(where, values.astype(ref.dtype), mask=(rows < ref.shape[0])[:, None])

    def positions(self, of: str, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sequences and positions of queries or keys, which end with a whole tile."""
        return getattr(self.refs, f"{of}_seq")[rows], getattr(self.refs, f"{of}_pos")[rows]

    def statistics(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-sum-exps for exponents of 2, and what is taken from gradients of probabilities."""
        return self.refs.lse[self.head, rows], self.refs.delta[self.head, rows]

    def probabilities(self, scores: jax.Array, lse: jax.Array) -> jax.Array:
        """From products and log-sum-exps."""
        exponents = scores * (self.scale * math.log2(math.e)) - lse
        if self.interpret:
            return jnp.exp2(exponents)
        return ptx("ex2.approx.ftz.f32 $0, $1;", exponents)


def _for_keys(p: _Program) -> None:
    """k_nope, k_rope of this head, and v."""
    key = p.tile * p.tiles.own + jnp.arange(p.tiles.own)
    key_seq, key_pos = p.positions("key", key)
    k_nope, k_rope, v = (p.load(name, key, key_seq >= 0) for name in ("k_nope", "k_rope", "v"))

    def step(query: jax.Array, sums: Any, masked: bool) -> Any:
        d_k_nope, d_k_rope, d_v = sums
        used = seen = None
        if masked:
            query_seq, query_pos = p.positions("query", query)
            used = query_seq >= 0
            seen = (key_seq[:, None] == query_seq) & (key_pos[:, None] <= query_pos)
        q_nope, q_rope = (p.load(name, query, used) for name in ("q_nope", "q_rope"))
        d_out = p.load("d_out", query, used)
        lse, delta = p.statistics(query)
        probs = p.probabilities(_by_columns(k_nope, q_nope) + _by_columns(k_rope, q_rope), lse)
        if seen is not None:
            probs = jnp.where(seen, probs, 0.0)
        d_v += _product(probs.astype(v.dtype), d_out)
        d_scores = (probs * (_by_columns(v, d_out) - delta)).astype(v.dtype)
        d_k_nope += _product(d_scores, q_nope)
        d_k_rope += _product(d_scores, q_rope)
        return d_k_nope, d_k_rope, d_v

    d_k_nope, d_k_rope, d_v = p.walk(step, p.zeros(NOPE, ROPE, VALUE))
    p.store("d_k_nope", key, d_k_nope * p.scale)
    p.store("d_k_rope", key, d_k_rope * p.scale)
    p.store("d_v", key, d_v)


def _for_queries(p: _Program) -> None:
    """q_nope and q_rope."""
    # The longest lists first: with causal masks those of the last queries.
    p.tile = p.refs.counts.shape[0] - 1 - p.tile
    query = p.tile * p.tiles.own + jnp.arange(p.tiles.own)
    query_seq, query_pos = p.positions("query", query)
    names = ("q_nope", "q_rope", "d_out")
    q_nope, q_rope, d_out = (p.load(name, query, query_seq >= 0) for name in names)
    lse, delta = (x[:, None] for x in p.statistics(query))

    def step(key: jax.Array, sums: Any, masked: bool) -> Any:
        d_q_nope, d_q_rope = sums
        used = seen = None
        if masked:
            key_seq, key_pos = p.positions("key", key)
            used = key_seq >= 0
            seen = (key_seq == query_seq[:, None]) & (key_pos <= query_pos[:, None])
        k_nope, k_rope, v = (p.load(name, key, used) for name in ("k_nope", "k_rope", "v"))
        probs = p.probabilities(_by_columns(q_nope, k_nope) + _by_columns(q_rope, k_rope), lse)
        if seen is not None:
            probs = jnp.where(seen, probs, 0.0)
        d_scores = (probs * (_by_columns(d_out, v) - delta)).astype(v.dtype)
        d_q_nope += _product(d_scores, k_nope)
        d_q_rope += _product(d_scores, k_rope)
        return d_q_nope, d_q_rope

    d_q_nope, d_q_rope = p.walk(step, p.zeros(NOPE, ROPE))
    p.store("d_q_nope", query, d_q_nope * p.scale)
    p.store("d_q_rope", query, d_q_rope * p.scale)


def _by_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T in fp32."""
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in fp32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
