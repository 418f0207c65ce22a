"""Log-probabilities that a model gives to the tokens of whole sequences."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax.config import ModelConfig
from dskjax.model import head, trunk
from dskjax.params import Params

_LOGIT_BYTES = 256 << 20  # fp32 logits that may exist at one time


def token_logprobs(
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    cfg: ModelConfig,
    temperature: Float[Array, " B"] | None = None,
    **options: Any,
) -> Float[Array, "B T-1"]:
    """log P(token i + 1 | tokens 0..i) in nats, column i = 0..T-2; pure, so call it inside jit.

    Logits exist for a few columns at a time, so that a large vocabulary does not fill the memory.

    Args:
        params: weights; their dtype is the compute dtype.
        tokens: ids [B, T].
        cfg: the model.
        temperature: divides the logits of each row; 1 when None.
        **options: those of `dskjax.trunk`, for example segment_ids and positions of packed rows. A
            column whose next token belongs to another segment means nothing.
    """
    hidden_btd = trunk(params, tokens, cfg=cfg, **options).hidden[:, :-1]

    def column(part: tuple[Array, Array]) -> Array:
        hidden_bd, next_b = part
        logits = head(params, hidden_bd, cfg=cfg)
        if temperature is not None:
            logits /= temperature[:, None]
        found = jnp.take_along_axis(logits, next_b[:, None], axis=1)[:, 0]
        return found - jax.nn.logsumexp(logits, axis=1)

    at_once = max(1, _LOGIT_BYTES // (4 * tokens.shape[0] * cfg.vocab_size))
    columns = (jnp.swapaxes(hidden_btd, 0, 1), tokens[:, 1:].T)
    return jax.lax.map(column, columns, batch_size=at_once).T
