"""Contract of `route`: which experts a token goes to, and with what weights."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.router import reference
from pallas_kernels.select import Implementation, choose

IMPLEMENTATIONS = (
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
        impl: "auto", "reference" or "xla".

    Returns:
        weights float32 [T, K] and experts int32 [T, K], best first.
    """
    run = choose("router", impl, IMPLEMENTATIONS, logits, bias)
    with jax.named_scope("router"):
        return run(
            logits,
            bias,
            top_k=top_k,
            scoring_func=scoring_func,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
        )
