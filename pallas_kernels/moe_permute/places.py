"""Where the copies of `permute` go, so that rows lie by expert as `grouped_matmul` wants them."""

import jax.numpy as jnp
from jaxtyping import Array, Int

CHUNK = 1024
"""Choices that are compared with each other; counts of whole chunks are added up."""


def places_by_expert(
    chosen: Int[Array, "T K"], *, experts: int, rows: int
) -> tuple[Int[Array, "T K"], Int[Array, " E"]]:
    """Sorts choices by expert, those of one expert in the order of tokens.

    By counting, not by sorting: on a GPU a few comparisons of all with all are one short kernel
    where a sort is many, and there is no scatter.

    Args:
        chosen: experts of each token, -1 for none.
        experts: E.
        rows: M, of the result of `permute`; copies past it are left out.

    Returns:
        places i32, as `permute` takes them, -1 where no expert is; and the rows of each expert,
        i32, with a sum of at most M.
    """
    flat = chosen.reshape(-1)
    chunk = min(max(flat.size, 1), CHUNK)
    chosen_cp = jnp.pad(flat, (0, -flat.size % chunk), constant_values=-1).reshape(-1, chunk)
    counts_ce = jnp.sum(chosen_cp[..., None] == jnp.arange(experts), axis=1, dtype=jnp.int32)
    before_ce = jnp.cumsum(counts_ce, axis=0) - counts_ce
    sizes_e = counts_ce.sum(axis=0)
    starts_e = jnp.cumsum(sizes_e) - sizes_e
    index = jnp.arange(chunk)
    is_same_cpp = chosen_cp[:, :, None] == chosen_cp[:, None]
    is_earlier_pp = index[:, None] > index
    rank_cp = jnp.sum(is_same_cpp & is_earlier_pp, axis=2, dtype=jnp.int32)
    first_cp = jnp.take_along_axis(before_ce + starts_e, jnp.maximum(chosen_cp, 0), axis=1)
    places_cp = jnp.where(chosen_cp < 0, -1, first_cp + rank_cp)
    stops_e = jnp.minimum(starts_e + sizes_e, rows)
    places = places_cp.reshape(-1)[: flat.size].reshape(chosen.shape)
    return places, stops_e - jnp.minimum(starts_e, rows)
