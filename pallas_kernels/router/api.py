"""Contract of `route`: which experts a token goes to, and with what weights."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.router import reference
from pallas_kernels.select import Implementation, choose, no_ada, too_large, whole_arrays_only

MAX_EXPERTS = 1024
"""More would not stay in the registers of a warp."""


def triton_refusal(
    logits: jax.Array,
    bias: jax.Array | None,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    **_: Any,
) -> str | None:
    """Why the kernel in Triton cannot take these arguments (on such a device), or None."""
    experts = logits.shape[1]
    if not 1 <= top_k <= experts <= MAX_EXPERTS:
        return f"needs 1 <= top_k <= experts <= {MAX_EXPERTS}, not {top_k} of {experts}"
    if experts % n_group or not 1 <= topk_group <= n_group <= 32:
        return (
            f"needs experts in 1 <= topk_group <= n_group <= 32 groups of one size, not "
            f"{topk_group} of {n_group} groups of {experts}"
        )
    if n_group > 1 and n_group == experts and bias is not None:
        return "needs two experts in a group, whose scores are added"
    return too_large(logits.shape)


def _supports_triton(*args: Any, **kwargs: Any) -> str | None:
    return no_ada() or triton_refusal(*args, **kwargs)


def _triton(*args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
    # Not at the top: importing Pallas takes a second or more.
    from pallas_kernels.router import triton

    return triton.route(*args, **kwargs)


IMPLEMENTATIONS = (
    Implementation("triton", _triton, auto=whole_arrays_only, supports=_supports_triton),
    # One implementation under two names: the fp32 reference is already what XLA should run.
    Implementation("reference", reference.route),
    Implementation("xla", reference.route),
)


def route(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"] | None,
    *,
    top_k: int,
    scoring_func: str,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    impl: str = "auto",
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Chooses top_k experts per token; ties go to the lowest expert index.

    With a bias (V3 and Kimi-K2, `noaux_tc`): experts compete with score + bias, groups with the sum
    of their best two; experts outside the best `topk_group` groups are out (-inf), and weights are
    the *unbiased* scores. Without (V2, `group_limited_greedy`): experts compete with their score,
    groups with their best one; scores outside the best groups are 0. One group (V2-Lite, `greedy`)
    is plain top-k. Source: DeepSeek-V3 report, section 2.1.2; DeepSeek-V2 report, section 2.2.

    Args:
        logits: float32 gate products.
        bias: float32 `e_score_correction_bias`, or None.
        top_k: experts per token.
        scoring_func: "sigmoid" or "softmax".
        n_group: groups of consecutive experts; 1 does not limit the choice.
        topk_group: groups a token may use.
        norm_topk_prob: divide the chosen scores by their sum.
        routed_scaling_factor: multiplies the weights last.
        impl: "auto", "reference", "xla" or "triton" (NVIDIA GPUs from compute capability 8.9 on; up
            to 1024 experts; one device or whole copies on each: it is not partitioned by itself).

    Returns:
        weights float32 [T, K] and experts int32 [T, K], best first.
    """
    gate: dict[str, Any] = {
        "top_k": top_k,
        "scoring_func": scoring_func,
        "n_group": n_group,
        "topk_group": topk_group,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": routed_scaling_factor,
    }
    run = choose("router", impl, IMPLEMENTATIONS, logits, bias, **gate)
    with jax.named_scope("router"):
        return run(logits, bias, **gate)
