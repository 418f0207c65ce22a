"""How the rows of a MoE layer meet experts that are split over devices."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dskjax.axes import Sharding
from dskjax.expert_parallel.chunks import MOE_CHUNK_TOKENS, in_chunks
from dskjax.expert_parallel.dispatch import (
    Payload,
    Transport,
    by_expert,
    combine,
    dispatch,
    weigh,
)
from dskjax.expert_parallel.layout import layout
from pallas_kernels import expert_mlp
from pallas_kernels.quant import Weight, dequantise
from pallas_kernels.swiglu import swiglu

Mode = Literal["local", "sum", "throughput", "low_latency"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Static: how one MoE layer runs on a mesh.

    Attributes:
        mode: "local": every rank holds all experts and computes its own rows. "sum": every rank
            has all rows, computes what its experts add, and the ranks add up. "throughput" and
            "low_latency": rows travel, see `dskjax.expert_parallel.dispatch`.
        axis: mesh axis the experts are split over; "" with "local".
        rows: mesh axes the rows are split over.
        mesh: the mesh, when called on whole arrays; None inside a `shard_map` over `axis` and
            `rows`, where arrays are already a rank's own, and where there are no such axes.
        payload: as what rows travel.
        transport: "all_to_all", or "peer": GPUs of one host write into each other's memory, see
            `dskjax.expert_parallel.dispatch`; `rows` must then be all axes that split the mesh.
        slack: room for this many times the pairs (row, expert) and rows that a balanced load
            brings. What does not fit is noticed on every rank, and the layer runs with room for
            everything; nothing is ever dropped. None: always room for everything.
        moe_chunk_tokens: the most rows of a rank that dispatch, experts and combine handle at once;
            more go in chunks, one after the other, so that the memory they need is bounded (see
            `dskjax.expert_parallel.chunks.workspace_bytes`). None: all rows at once.
    """

    mode: Mode
    axis: str
    rows: tuple[str, ...]
    mesh: Mesh | None = None
    payload: Payload = "native"
    transport: Transport = "all_to_all"
    slack: float | None = None
    moe_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.moe_chunk_tokens is not None and self.moe_chunk_tokens < 1:
            raise ValueError(f"{self.moe_chunk_tokens=} must be at least 1, or None for all rows")
        if self.transport == "peer":
            self._check_peers()

    def _check_peers(self) -> None:
        if self.mode not in ("throughput", "low_latency"):
            raise ValueError(f"transport='peer' needs rows that travel, not {self.mode=}")
        sizes = {} if self.mesh is None else dict(self.mesh.shape)
        if left_out := {n: s for n, s in sizes.items() if s > 1 and n not in self.rows}:
            raise ValueError(
                f"transport='peer' needs rows split over the whole mesh, not over {self.rows} "
                f"beside {left_out}; use 'all_to_all'"
            )

    @classmethod
    def of(cls, sharding: Sharding | None) -> "Exchange | None":
        """The exchange that the rules of a mesh ask for; None where nothing is split. Where every
        rank has all rows, which is how long prompts are prefilled, they go in chunks.

        Raises:
            ValueError: the rules split experts over several mesh axes.
        """
        if sharding is None:
            return None
        mesh, rules = sharding.mesh, dict(sharding.rules.of)
        axis, batch = rules.get("experts"), rules.get("batch") or ()
        if axis is not None and not isinstance(axis, str):
            raise ValueError(f"rules split experts over {axis}; rows are exchanged over one axis")
        axes = (batch,) if isinstance(batch, str) else batch
        rows = tuple(name for name in axes if mesh.shape[name] > 1)
        if axis is None or mesh.shape[axis] == 1:
            if rows:
                return cls(mode="local", axis="", rows=rows, mesh=mesh)
            if axes or mesh.size == 1:
                return None
            return cls(mode="local", axis="", rows=(), moe_chunk_tokens=MOE_CHUNK_TOKENS)
        if axis not in rows:
            return cls(
                mode="sum", axis=axis, rows=rows, mesh=mesh, moe_chunk_tokens=MOE_CHUNK_TOKENS
            )
        return cls(mode="throughput", axis=axis, rows=rows, mesh=mesh, slack=2.0)

    @classmethod
    def within(cls, sharding: Sharding, experts: int) -> "Exchange | None":
        """The same for code that already runs as one rank of the mesh, inside `shard_map`.

        Args:
            sharding: mesh and rules.
            experts: physical experts of a layer.

        Raises:
            ValueError: ranks cannot share them equally.
        """
        found = cls.of(sharding)
        if found is None or found.mode == "local":
            return None
        found.check(experts)
        return dataclasses.replace(found, mesh=None, slack=None)

    def check(self, experts: int) -> None:
        """Whether the ranks can share so many experts equally.

        Raises:
            ValueError: they cannot; the message lists what would do.
        """
        if self.mesh is None or self.mode == "local":
            return
        ranks = self.mesh.shape[self.axis]
        if experts % ranks:
            legal = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
            raise ValueError(
                f"{experts} experts do not split over {self.axis}={ranks}; choose one of {legal}"
            )

    def experts(
        self,
        x: Float[Array, "T D"],
        weights: Float[Array, "T K"],
        experts: Int[Array, "T K"],
        gate_up: Weight,
        down: Weight,
        *,
        impl: str,
    ) -> Float[Array, "T D"]:
        """`expert_mlp` over the mesh.

        Args:
            x: rows.
            weights: float32 router weights.
            experts: i32 ids over all ranks; -1 is none.
            gate_up: [E, 2, F, D].
            down: [E, D, F].
            impl: implementation of the products.

        Raises:
            ValueError: the ranks cannot share the experts equally.
        """
        run = functools.partial(self._on_rank, impl=impl)
        if self.mesh is None:
            return run(x, weights, experts, gate_up, down)
        self.check(down.shape[0])
        ways = 1
        for name in self.rows:
            ways *= self.mesh.shape[name]
        padding = -x.shape[0] % ways
        if padding:
            x, weights = (jnp.pad(a, ((0, padding), (0, 0))) for a in (x, weights))
            experts = jnp.pad(experts, ((0, padding), (0, 0)), constant_values=-1)
        row = PartitionSpec(self.rows)
        mine = PartitionSpec() if self.mode == "local" else PartitionSpec(self.axis)
        over = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(row, row, row, mine, mine),
            out_specs=row,
            axis_names=self._manual_axes(self.mesh),
            check_vma=False,
        )
        out = over(x, weights, experts, gate_up, down)
        return out[: out.shape[0] - padding]

    def _manual_axes(self, mesh: Mesh) -> set[str]:
        if self.transport == "peer":  # a kernel that reaches peers wants to know where it is
            return set(mesh.axis_names)
        # An axis that nothing is split over is named too: kernels run where no axis is XLA's.
        whole = {axis for axis, size in mesh.shape.items() if size == 1}
        return {*self.rows, *(() if self.mode == "local" else (self.axis,))} | whole

    def _on_rank(
        self,
        x: jax.Array,
        weights: jax.Array,
        experts: jax.Array,
        gate_up: Weight,
        down: Weight,
        *,
        impl: str,
    ) -> jax.Array:
        run = functools.partial(self._at_once, gate_up=gate_up, down=down, impl=impl)
        return in_chunks(run, (x, weights, experts), self.moe_chunk_tokens)

    def _at_once(
        self,
        x: jax.Array,
        weights: jax.Array,
        experts: jax.Array,
        *,
        gate_up: Weight,
        down: Weight,
        impl: str,
    ) -> jax.Array:
        if self.mode == "local":
            return expert_mlp(x, weights, experts, gate_up, down, impl=impl)
        if self.mode == "sum":
            local = experts - lax.axis_index(self.axis) * down.shape[0]
            mine = (experts >= 0) & (local >= 0) & (local < down.shape[0])
            part = expert_mlp(x, weights, jnp.where(mine, local, -1), gate_up, down, impl=impl)
            return lax.psum(part.astype(jnp.float32), self.axis).astype(x.dtype)
        if not x.shape[0]:
            return x
        run = functools.partial(self._travel, x, weights, experts, gate_up, down, impl=impl)
        room = self._room(x, experts, down.shape[0])
        if room is None:
            return run(None, None)
        return lax.cond(
            self._overflows(experts, down.shape[0], *room),
            lambda: run(None, None),
            lambda: run(*room),
        )

    def _travel(
        self,
        x: jax.Array,
        weights: jax.Array,
        experts: jax.Array,
        gate_up: Weight,
        down: Weight,
        capacity: int | None,
        pairs: int | None,
        *,
        impl: str,
    ) -> jax.Array:
        per_rank = down.shape[0]
        with jax.named_scope("dispatch"):
            got = dispatch(
                x,
                experts,
                weights,
                axis=self.axis,
                per_rank=per_rank,
                capacity=capacity,
                payload=self.payload,
                transport=self.transport,
            )
        if self.mode == "low_latency":
            slots = by_expert(got, per_rank=per_rank, dtype=x.dtype)
            y = weigh(_every_slot(slots.x, gate_up, down), slots, got)
        else:
            rows = dequantise(got.x, x.dtype)
            y = expert_mlp(rows, got.weights, got.experts, gate_up, down, pairs=pairs, impl=impl)
        with jax.named_scope("combine"):
            return combine(y, got, axis=self.axis)

    def _room(self, x: jax.Array, experts: jax.Array, per_rank: int) -> tuple[int, int] | None:
        """(rows towards each rank, pairs on a rank) that usually suffice; None: take all."""
        ranks, (rows, top_k) = lax.axis_size(self.axis), experts.shape
        if self.slack is None:
            return None
        wanted = ranks * (1 - (1 - 1 / ranks) ** top_k)  # distinct ranks of a row, by chance
        capacity = min(rows, 8 + int(self.slack * rows * wanted / ranks))
        pairs = min(ranks * rows * min(top_k, per_rank), 8 + int(self.slack * rows * top_k))
        return None if capacity == rows and pairs >= rows * top_k * ranks else (capacity, pairs)

    def _overflows(self, experts: jax.Array, per_rank: int, capacity: int, pairs: int) -> jax.Array:
        """bool [], the same on every rank: there is more than fits somewhere."""
        ranks = lax.axis_size(self.axis)
        towards = layout(experts, per_rank=per_rank, ranks=ranks, capacity=1).counts
        rank_tk = jnp.where(experts >= 0, experts // per_rank, ranks)
        mine = (rank_tk[:, :, None] == jnp.arange(ranks)).sum((0, 1), dtype=jnp.int32)
        all_ranks = lax.all_gather(jnp.stack([towards, mine]), self.axis)  # [R, 2, R]
        found = (all_ranks[:, 0].max() > capacity) | (all_ranks[:, 1].sum(0).max() > pairs)
        if self.transport == "peer":  # whose launches begin with a barrier of the whole mesh
            found = lax.pmax(found.astype(jnp.int32), self.rows) > 0
        return found


def _every_slot(x_emd: jax.Array, gate_up: Weight, down: Weight) -> jax.Array:
    """Each expert's MLP over its slots, [E, M, D]; what a masked product computes of them."""
    fp32 = {"preferred_element_type": jnp.float32}
    dtype = x_emd.dtype
    pair = jnp.einsum("emd,egfd->emgf", x_emd, dequantise(gate_up, dtype), **fp32).astype(dtype)
    return jnp.einsum("emf,edf->emd", swiglu(pair), dequantise(down, dtype), **fp32).astype(dtype)
