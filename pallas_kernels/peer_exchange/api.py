"""Contract of `peer_exchange`: run r of a rank's rows goes to rank r of a mesh axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.peer_exchange import reference, xla
from pallas_kernels.select import Implementation, choose, no_hopper, on_gpu_only

MOST_RANKS = 8
"""Devices that XLA lets one kernel reach (`kMaxPeers` of its Mosaic GPU custom call)."""
LONGEST_ROW = 48 * 1024
"""Bytes; some rows must lie in shared memory at once."""


def refusal(rows: jax.Array, _counts: jax.Array, _axis: str) -> str | None:
    """Why the kernel cannot take these arguments (on such GPUs), or None."""
    ranks, capacity, width = rows.shape
    if ranks > MOST_RANKS or not capacity * width:
        return f"needs rows, and at most {MOST_RANKS} ranks, not {rows.shape}"
    if width * rows.dtype.itemsize > LONGEST_ROW:
        return f"needs rows of at most {LONGEST_ROW} bytes, not {width * rows.dtype.itemsize}"
    if jax.process_count() > 1:
        return f"needs all GPUs in one process, not in {jax.process_count()}"
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.size > 1 or not mesh.are_all_axes_manual:
        return f"needs a shard_map over all axes of a mesh, not over {mesh.manual_axes} of {mesh}"
    return None


def _mosaic_sm90(rows: jax.Array, counts: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    # Not at the top: importing Pallas takes a second or more.
    from pallas_kernels.peer_exchange import mosaic_sm90

    return mosaic_sm90.peer_exchange(rows, counts, axis)


IMPLEMENTATIONS = (
    Implementation("xla", xla.peer_exchange, auto=on_gpu_only),
    Implementation("reference", reference.peer_exchange),
    Implementation(
        "mosaic_sm90", _mosaic_sm90, supports=lambda *args: no_hopper() or refusal(*args)
    ),
)


def peer_exchange(
    rows: Shaped[Array, "R C W"], counts: Int[Array, " R"], axis: str, *, impl: str = "auto"
) -> tuple[Shaped[Array, "R C W"], Int[Array, " R"]]:
    """Sends the first counts[r] rows of run r to rank r, where they are the run of this rank.

    Inside `shard_map`; every device of the mesh must call. No gradient: callers know what of a run
    counts, so they send gradients back themselves.

    Args:
        rows: any dtype; a run for each of the R ranks of `axis`, this one included.
        counts: i32; less than 0 means 0, more than C means C.
        axis: mesh axis.
        impl: "auto", "reference", "xla" (a padded `all_to_all`) or "mosaic_sm90" (puts through
            NVLink, only of rows that count; H100 and H200; up to 8 GPUs of one process, the first
            ones in their order; never chosen by "auto").

    Returns:
        The rows that arrived, run r from rank r, and i32 counts of them. Rows of a run past its
        count hold anything, NaN included.

    Raises:
        NotImplementedError: the named implementation cannot run here.
    """
    counts = jnp.clip(counts, 0, rows.shape[1])
    run = choose("peer_exchange", impl, IMPLEMENTATIONS, rows, counts, axis)
    with jax.named_scope("peer_exchange"):
        return run(rows, counts, axis)
