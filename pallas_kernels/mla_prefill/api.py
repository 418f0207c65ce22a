"""Contract of `mla_prefill`: causal attention with expanded keys and one rope key shared by all
heads.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.mla_prefill import cudnn, reference, xla
from pallas_kernels.mla_prefill.block_list import BlockList
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.mla_prefill.tiles import HEAD, QUERY_TILE
from pallas_kernels.select import (
    Implementation,
    choose,
    no_hopper,
    on_gpu_only,
    whole_arrays_only,
)

__all__ = ["IMPLEMENTATIONS", "BlockList", "MlaPrefillPlan", "hopper_refusal", "mla_prefill"]


def hopper_refusal(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *_: Any,
    **__: Any,
) -> str | None:
    """Why the Hopper kernel cannot take these arguments, whatever the device, or None."""
    types = {x.dtype.name for x in (q_nope, q_rope, k_nope, k_rope, v)}
    if types != {"bfloat16"}:
        return f"needs bfloat16, not {', '.join(sorted(types))}"
    if (head := (q_nope.shape[-1], q_rope.shape[-1], v.shape[-1])) != HEAD:
        return f"needs heads of {HEAD} (nope, rope, value), not {head}"
    if not q_nope.shape[0] or not k_nope.shape[0]:
        return f"needs a query and a key, not {q_nope.shape[0]} and {k_nope.shape[0]}"
    return None


def _supports_mosaic_sm90(*args: Any, **kwargs: Any) -> str | None:
    return no_hopper() or hopper_refusal(*args)


def _mosaic_sm90(*args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array | None]:
    # Not at the top: only a GPU needs Pallas.
    from pallas_kernels.mla_prefill import mosaic_sm90

    return mosaic_sm90.mla_prefill(*args, **kwargs)


IMPLEMENTATIONS = (
    Implementation(
        "mosaic_sm90", _mosaic_sm90, auto=whole_arrays_only, supports=_supports_mosaic_sm90
    ),
    Implementation("cudnn", cudnn.mla_prefill, supports=cudnn.supports),
    Implementation("xla", xla.mla_prefill, auto=on_gpu_only),
    Implementation("reference", reference.mla_prefill),
)


def mla_prefill(
    q_nope: Float[Array, "T H N"],
    q_rope: Float[Array, "T H P"],
    k_nope: Float[Array, "S H N"],
    k_rope: Float[Array, "S P"],
    v: Float[Array, "S H V"],
    plan: MlaPrefillPlan,
    *,
    scale: float,
    with_lse: bool = True,
    blocks: BlockList | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "T H V"], Float[Array, "T H"] | None]:
    """Attends over the keys the plan allows: score = scale * (q_nope . k_nope + q_rope . k_rope).

    The log-sum-exp lets a caller attend to a cached prefix and to the new tokens in two calls and
    `merge` them exactly. The op is differentiable in q, k and v. Source: DeepSeek-V2 report,
    section 2.1.3.

    Args:
        q_nope: [T, H, N].
        q_rope: [T, H, P], rotated.
        k_nope: [S, H, N].
        k_rope: [S, P], rotated; not copied per head.
        v: [S, H, V].
        plan: who sees what; keys outside every sequence may hold NaN.
        scale: softmax scale.
        with_lse: the caller needs the log-sum-exp; without it cuDNN may run.
        blocks: tiles of keys that are left in, for sparse attention, see `sparse.py`; all if None.
            Only "mosaic_sm90" saves the work of the others.
        impl: "auto", "reference", "xla", "cudnn" or "mosaic_sm90" (H100 and H200; bf16, heads of
            128 + 64 channels and values of 128; one device or whole copies on each: it is not
            partitioned by itself).

    Returns:
        out [T, H, V] in the query dtype and lse [T, H] float32, which may be None without
        `with_lse`; 0 and -inf for a query that sees nothing.

    Raises:
        ValueError: T or S is not a multiple of `plan.rows`, or `blocks` are not of these queries.
    """
    if q_nope.shape[0] % plan.rows or k_nope.shape[0] % plan.rows:
        raise ValueError(
            f"{q_nope.shape[0]} queries and {k_nope.shape[0]} keys must be multiples of "
            f"{plan.rows=}"
        )
    args = (q_nope, q_rope, k_nope, k_rope, v, plan)
    options: dict[str, Any] = {"with_lse": with_lse}
    if blocks is not None:
        _check_blocks(blocks, q_nope)
        options["blocks"] = blocks
    run = choose("mla_prefill", impl, IMPLEMENTATIONS, *args, **options)
    with jax.named_scope("mla_prefill"):
        return run(*args, scale=scale, **options)


def _check_blocks(blocks: BlockList, q_nope: jax.Array) -> None:
    tokens, heads, _ = q_nope.shape
    if blocks.key_tile not in (64, 128):
        raise ValueError(f"{blocks.key_tile=} must be 64 or 128")
    lists, tiles = blocks.counts.shape, -(-tokens // QUERY_TILE)
    if lists not in ((1, tiles), (heads, tiles)) or blocks.tiles.shape[:2] != lists:
        raise ValueError(
            f"blocks have lists {lists} and tiles {blocks.tiles.shape}, but {heads} heads and "
            f"{tokens} queries need lists (1 or {heads}, {tiles}): a tile has {QUERY_TILE} queries"
        )
