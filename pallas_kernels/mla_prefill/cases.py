"""Workloads of `mla_prefill`: chunks after a prefix, packed documents; DeepSeek's shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mla_prefill import sparse
from pallas_kernels.mla_prefill.block_list import BlockList
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.testing.generate import BaseCase, normal, tagged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """A flat batch of queries and keys.

    Attributes:
        chunks: (cached prefix, new tokens) of each sequence, split evenly over `rows`.
        queries: Q per row, padding included.
        keys: S per row, unused ones included.
        rows: parts of the flat axes that no sequence crosses.
        same_rows: keys are the queries, in order; then no sequence has a prefix, and S = T.
        shuffled: keys that are not the queries stand in random order, else by sequence and
            position, as in gathered pages.
        a_shape: (sink, local) of a list of blocks, see `sparse.a_shape`; all keys without.
        top: tiles of keys of an estimated list of blocks, see `sparse.block_sparse`.
        heads: H.
        nope: N.
        rope: P.
        value: V.
    """

    chunks: tuple[tuple[int, int], ...]
    queries: int
    keys: int
    rows: int = 1
    same_rows: bool = False
    shuffled: bool = True
    a_shape: tuple[int, int] | None = None
    top: int | None = None
    heads: int = 3
    nope: int = 16
    rope: int = 8
    value: int = 12

    def plan_arrays(self, seed: int) -> tuple[np.ndarray, ...]:
        """query_seq, query_pos, key_seq, key_pos: int32, -1 for padding and unused keys."""
        rng = self.rng(seed)
        query_seq, query_pos = (np.full((self.rows, self.queries), v, np.int32) for v in (-1, 0))
        key_seq, key_pos = (np.full((self.rows, self.keys), v, np.int32) for v in (-1, 0))
        per_row = -(-len(self.chunks) // self.rows)
        for row in range(self.rows):
            free = rng.permutation(self.keys) if self.shuffled else np.arange(self.keys)
            at = used = 0
            for seq in range(row * per_row, min((row + 1) * per_row, len(self.chunks))):
                prefix, new = self.chunks[seq]
                query_seq[row, at : at + new] = seq
                query_pos[row, at : at + new] = prefix + np.arange(new)
                mine = free[used : used + prefix + new]
                key_seq[row, mine], key_pos[row, mine] = seq, np.arange(prefix + new)
                at, used = at + new, used + prefix + new
            if at > self.queries or used > self.keys:
                raise ValueError(f"{self.name}: {at} queries and {used} keys do not fit")
        keys = (query_seq, query_pos) if self.same_rows else (key_seq, key_pos)
        return tuple(a.reshape(-1) for a in (query_seq, query_pos, *keys))

    def abstract(self) -> dict[str, Any]:
        """Shapes and types of what `make` gives, for compiling alone; blocks may be None."""
        t, s, h = self.rows * self.queries, self.rows * self.keys, self.heads
        rows = {"q_nope": (t, h, self.nope), "q_rope": (t, h, self.rope)}
        rows |= {"k_nope": (s, h, self.nope), "k_rope": (s, self.rope), "v": (s, h, self.value)}
        shapes: dict[str, Any] = {
            k: jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for k, shape in rows.items()
        }
        plan = self.plan(*(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (t, t, s, s)))
        return shapes | {"plan": plan, "blocks": jax.eval_shape(self.blocks, plan, shapes)}

    def plan(self, *arrays: Any) -> MlaPrefillPlan:
        """Of `plan_arrays`."""
        return MlaPrefillPlan(*arrays, rows=self.rows, same_rows=self.same_rows)

    def blocks(self, plan: MlaPrefillPlan, rows: Mapping[str, jax.Array]) -> BlockList | None:
        """The list of blocks if the case has one, of queries and keys by name."""
        if self.a_shape is not None:
            sink, local = self.a_shape
            return sparse.a_shape(plan, sink=sink, local=local)
        if self.top is None:
            return None
        q_and_k: Any = {name: rows[name] for name in ("q_nope", "q_rope", "k_nope", "k_rope")}
        return sparse.block_sparse(**q_and_k, plan=plan, top=self.top)

    @property
    def scale(self) -> float:
        """Scores have a deviation of 1.5."""
        return 1.5 * (self.nope + self.rope) ** -0.5

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `mla_prefill`; poison is NaN in padding queries and in keys nobody sees."""
        rng = self.rng(seed)
        query_seq, query_pos, key_seq, key_pos = self.plan_arrays(seed)
        t, s, h = query_seq.size, key_seq.size, self.heads
        q_nope, q_rope = normal(rng, t, h, self.nope), normal(rng, t, h, self.rope)
        k_nope, v = normal(rng, s, h, self.nope), normal(rng, s, h, self.value)
        k_rope = normal(rng, s, self.rope)
        if poison:
            for x in (q_nope, q_rope):
                x[query_seq < 0] = np.nan
            for x in (k_nope, k_rope, v):
                x[key_seq < 0] = np.nan
        arrays = (jnp.asarray(a) for a in (query_seq, query_pos, key_seq, key_pos))
        plan = self.plan(*arrays)
        args = {
            "q_nope": self.array(q_nope),
            "q_rope": self.array(q_rope),
            "k_nope": self.array(k_nope),
            "k_rope": self.array(k_rope),
            "v": self.array(v),
            "plan": plan,
            "scale": self.scale,
        }
        blocks = self.blocks(plan, args)
        return args if blocks is None else args | {"blocks": blocks}


def _deepseek_v3(
    name: str,
    chunks: tuple[tuple[int, int], ...],
    *,
    rows: int = 1,
    heads: int = 128,
    **options: Any,
) -> Case:
    """Prompts side by side, in so many rows of as many tokens."""
    return Case(
        name=f"deepseek-v3 {name}",
        tags=("bench",),
        dtype="bfloat16",
        chunks=chunks,
        queries=sum(new for _, new in chunks) // rows,
        keys=sum(map(sum, chunks)) // rows,
        rows=rows,
        same_rows=not chunks[0][0],
        shuffled=False,
        heads=heads,
        nope=128,
        rope=64,
        value=128,
        **options,
    )


_PROMPTS = (2900, 40, 1500, 64, 2000, 700, 600, 388)

CASES = (
    Case(name="one token", chunks=((0, 1),), queries=1, keys=1),
    Case(name="packed", chunks=((0, 1), (0, 9), (0, 6)), queries=20, keys=40),
    Case(name="after prefixes", chunks=((7, 5), (0, 0), (1, 1), (3, 12)), queries=20, keys=40),
    Case(name="all padding", chunks=((4, 0),), queries=20, keys=40),
    Case(name="rows", chunks=((0, 6), (9, 4), (5, 0)), queries=6, keys=16, rows=3),
    Case(
        name="same rows", chunks=((0, 5), (0, 0), (0, 6)), queries=8, keys=8, rows=3, same_rows=True
    ),
    Case(
        name="same rows bfloat16",
        chunks=((0, 20), (0, 9)),
        queries=40,
        keys=40,
        same_rows=True,
        dtype="bfloat16",
    ),
    Case(name="bfloat16", chunks=((40, 9), (0, 30)), queries=40, keys=80, dtype="bfloat16"),
    # Longer than one block of queries of `xla`, with a document border inside a block.
    Case(
        name="blocks",
        chunks=((0, 700), (30, 300), (16, 1000)),
        queries=1024,
        keys=1040,
        rows=2,
        heads=1,
    ),
    Case(
        name="real heads",
        tags=("full",),
        chunks=((64, 100), (0, 130)),
        queries=256,
        keys=320,
        heads=128,
        nope=128,
        rope=64,
        value=128,
        dtype="bfloat16",
    ),
    _deepseek_v3("b1 t4096", ((0, 4096),)),
    _deepseek_v3("b1 t8192", ((0, 8192),)),
    _deepseek_v3("b1 t16384", ((0, 16384),)),
    _deepseek_v3("b1 t32768 h32", ((0, 32768),), heads=32),
    # Of 128.5 tiles that a tile of queries sees on average: an eighth, its own among them.
    _deepseek_v3("b1 t32768 h32 an eighth", ((0, 32768),), heads=32, top=15),
    _deepseek_v3("b1 t16384 a-shape", ((0, 16384),), a_shape=(128, 2048)),
    _deepseek_v3("b4 t1024", ((0, 1024),) * 4, rows=4),
    _deepseek_v3("b1 t2048 after 6144", ((6144, 2048),)),
    _deepseek_v3("b8 t40-2900", tuple((0, n) for n in _PROMPTS)),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
