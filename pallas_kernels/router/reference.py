"""The meaning of `route`, in fp32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def route(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"] | None,
    *,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.route`."""
    logits = logits.astype(jnp.float32)
    scores_te = (
        jax.nn.sigmoid(logits) if scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    )
    if bias is not None:
        choice_te = scores_te + bias.astype(jnp.float32)
        if n_group > 1:
            # -inf, not 0: a strongly negative bias would let a masked expert win.
            choice_te = _keep_groups(choice_te, n_group, topk_group, best=2, mask=-jnp.inf)
    else:
        if n_group > 1:  # the best score stands for its group; masked weights are 0 as well
            scores_te = _keep_groups(scores_te, n_group, topk_group, best=1, mask=0.0)
        choice_te = scores_te
    _, experts_tk = jax.lax.top_k(choice_te, top_k)  # stable: the lowest index wins a tie
    weights_tk = jnp.take_along_axis(scores_te, experts_tk, axis=-1)
    if norm_topk_prob:
        weights_tk /= weights_tk.sum(axis=-1, keepdims=True) + 1e-20
    return weights_tk * routed_scaling_factor, experts_tk.astype(jnp.int32)


def _keep_groups(
    choice_te: jax.Array, n_group: int, topk_group: int, *, best: int, mask: float
) -> jax.Array:
    """Masks all but the groups whose `best` largest entries have the largest sums."""
    tokens, experts = choice_te.shape
    grouped_tge = choice_te.reshape(tokens, n_group, experts // n_group)
    group_scores_tg = jax.lax.top_k(grouped_tge, best)[0].sum(axis=-1)
    _, kept_tg = jax.lax.top_k(group_scores_tg, topk_group)
    is_kept_tg = (kept_tg[:, :, None] == jnp.arange(n_group)).any(axis=1)
    return jnp.where(is_kept_tg[:, :, None], grouped_tge, mask).reshape(tokens, experts)
