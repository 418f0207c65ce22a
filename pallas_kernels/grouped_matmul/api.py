"""Contract of `grouped_matmul`: rows sorted by expert times that expert's weight."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.quant import QTensor
from pallas_kernels.select import Implementation, choose, on_gpu_only

IMPLEMENTATIONS = (
    Implementation("xla", xla.grouped_matmul, auto=on_gpu_only),
    Implementation("reference", reference.grouped_matmul),
)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E *L K"] | QTensor,
    group_sizes: Int[Array, " E"],
    *,
    impl: str = "auto",
) -> Float[Array, "M *L"]:
    """Multiplies each group of rows with its own weight: out[r] = w[e] @ x[r] for the group e that
    row r lies in.

    Args:
        x: rows in group order, [M, K]; rows past sum(group_sizes) may hold anything.
        w: an array or QTensor [E, ..., N, K].
        group_sizes: i32 [E], rows of each group; 0 is allowed, the sum must not exceed M.
        impl: "auto", "reference" or "xla".

    Returns:
        [M, *w.shape[1:-1]] in the dtype of x, accumulated in fp32; rows past sum(group_sizes) are
        0.

    Raises:
        ValueError: the contracted sizes differ.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"grouped_matmul: x has K={x.shape[-1]} but w has K={w.shape[-1]} (shapes {x.shape}, "
            f"{w.shape})"
        )
    run = choose("grouped_matmul", impl, IMPLEMENTATIONS, x, w, group_sizes)
    with jax.named_scope("grouped_matmul"):
        return run(x, w, group_sizes)
