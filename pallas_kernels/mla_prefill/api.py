"""Contract of `mla_prefill`: causal attention with expanded keys and one rope key shared by all
heads.
"""

import jax
from jaxtyping import Array, Float

from pallas_kernels.mla_prefill import cudnn, reference, xla
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.select import Implementation, choose, on_gpu_only

__all__ = ["IMPLEMENTATIONS", "MlaPrefillPlan", "mla_prefill"]

IMPLEMENTATIONS = (
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
        impl: "auto", "reference", "xla" or "cudnn".

    Returns:
        out [T, H, V] in the query dtype and lse [T, H] float32, which may be None without
        `with_lse`; 0 and -inf for a query that sees nothing.

    Raises:
        ValueError: T or S is not a multiple of `plan.rows`.
    """
    if q_nope.shape[0] % plan.rows or k_nope.shape[0] % plan.rows:
        raise ValueError(
            f"{q_nope.shape[0]} queries and {k_nope.shape[0]} keys must be multiples of "
            f"{plan.rows=}"
        )
    args = (q_nope, q_rope, k_nope, k_rope, v, plan)
    run = choose("mla_prefill", impl, IMPLEMENTATIONS, *args, with_lse=with_lse)
    with jax.named_scope("mla_prefill"):
        return run(*args, scale=scale, with_lse=with_lse)
