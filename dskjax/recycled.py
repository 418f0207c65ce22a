"""One MTP module run over whole sequences as drafting recycles it (scheme C), differentiable.

Serving runs the module once over all known pairs (h[i], t[i+1]) and then feeds it its own output,
one row a draft, at the next place of its cache. Seen from anchor i, depth k therefore attends to

    the depth-1 rows of anchors <= i, and the rows of depths 2..k of anchor i itself

and to nothing else: depths 2.. of other anchors were drafts that were thrown away. Training a
shared module has to use the same mask or it meets other keys when it serves (EAGLE-3, section 3.1,
arXiv:2503.01840, calls it training-time test). Depth k at anchor i stands at position i + k - 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.expert_parallel import Exchange
from dskjax.layers.block import Attend
from dskjax.layers.mla import Mla, Projected, Tables
from dskjax.layers.rope import rope_tables
from dskjax.model import MtpOutput, Remat, embed, remat_of, sequence_plan
from dskjax.mtp import MtpModule
from dskjax.params import Params, bind
from pallas_kernels import MlaPrefillPlan, mla_prefill


class Keys(NamedTuple):
    """What the rows of one depth leave for later depths: [T, H, N], [T, P] and [T, H, V]."""

    k_nope: jax.Array
    k_rope: jax.Array
    v: jax.Array


def mtp_recycled(
    params: Params,
    tokens: Int[Array, "B T"],
    hidden: Float[Array, "B T D"],
    *,
    cfg: ModelConfig,
    depths: int,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    impl: str = "auto",
    remat: Remat = None,
    detach: bool = False,
    sharding: Sharding | None = None,
) -> MtpOutput:
    """Runs module 0 `depths` times, each fed by the time before.

    Row i of depth k takes h^{k-1}[i] and token i + k (the text's own, not a draft) and predicts
    token i + k + 1. The last k rows of a sequence (or segment) mean nothing, and no other row sees
    them.

    Args:
        params: params with `mtp_layers`, of which the first is used.
        tokens: ids [B, T].
        hidden: trunk hidden states after the final norm.
        cfg: the model.
        depths: how often; any number.
        segment_ids: see `dskjax.model.trunk`.
        positions: see `dskjax.model.trunk`.
        impl: implementation of every op.
        remat: checkpoint policy of each depth.
        detach: stop the gradient between depths: each trains on its own input only.
        sharding: see `dskjax.model.mtp_chain`.

    Raises:
        ValueError: the model has no module.
    """
    if not cfg.mtp.num_nextn_predict_layers:
        raise ValueError("the model has no MTP module (num_nextn_predict_layers=0)")
    shape = tokens.shape
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    plan = sequence_plan(segment_ids, positions)
    weights = jax.tree.map(lambda w: w[0], params["mtp_layers"])
    exchange, real = Exchange.of(sharding), segment_ids.reshape(-1) > 0

    def module(
        embedded: jax.Array, previous: jax.Array, earlier: list[Keys], tables: Tables
    ) -> tuple[jax.Array, Keys, jax.Array]:
        attend = _recycling(tables, plan, earlier, cfg, impl)
        module = bind(MtpModule, weights, cfg)
        h, keys, experts = module(embedded, previous, attend, real, impl=impl, exchange=exchange)
        assert isinstance(keys, Keys)
        return h, keys, experts

    out = MtpOutput([], [])
    h, earlier = hidden.reshape(-1, cfg.hidden_size), []
    for k in range(1, depths + 1):
        at = positions.reshape(-1) + (k - 1)
        tables = rope_tables(at, cfg.mla.qk_rope_head_dim, cfg.rope)
        shifted = jnp.pad(tokens[:, k:], ((0, 0), (0, k)))
        if detach:
            h, earlier = jax.lax.stop_gradient((h, earlier))
        run = remat_of(module, remat)
        embedded = embed(params, shifted.reshape(-1), sharding=sharding)
        h, keys, experts = run(embedded, h, earlier, tables)
        earlier = [*earlier, keys]
        out.hidden.append(h.reshape(*shape, -1))
        out.experts.append(experts.reshape(*shape, -1))
    return out


def _recycling(
    tables: Tables, plan: MlaPrefillPlan, earlier: Sequence[Keys], cfg: ModelConfig, impl: str
) -> Attend:
    """Attention of one depth: causal over the first depth's rows, and to itself at later ones."""

    def attend(mla: Mla, x_td: jax.Array) -> tuple[jax.Array, Any]:
        p = mla.project(x_td, tables, impl=impl)
        mine = Keys(*_keys(mla, p, impl))
        first, *later = [*earlier, mine]
        out, lse = mla_prefill(
            p.q_nope,
            p.q_rope,
            *first,
            plan,
            scale=cfg.softmax_scale,
            with_lse=bool(later),
            impl=impl,
        )
        if later:
            assert lse is not None
            out = _with_own_rows(p, out, lse, later, cfg.softmax_scale)
        return mla.output(out, impl=impl), mine

    return attend


def _keys(mla: Mla, p: Projected, impl: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    k_nope, v = mla.expand(p.latent, impl=impl)
    return k_nope, p.k_rope, v


def _with_own_rows(
    p: Projected, out_thv: jax.Array, lse_th: jax.Array, later: Sequence[Keys], scale: float
) -> jax.Array:
    """Joins attention over many keys with one more key a row for each of `later`: one softmax."""
    fp32 = {"preferred_element_type": jnp.float32}
    scores = [lse_th]
    for keys in later:
        score_th = jnp.einsum("thn,thn->th", p.q_nope, keys.k_nope, **fp32)
        score_th += jnp.einsum("thp,tp->th", p.q_rope, keys.k_rope, **fp32)
        scores.append(score_th * scale)
    # A row that sees no key of the first depth (padding) still sees its own: no 0 / 0.
    weights_eth = jax.nn.softmax(jnp.stack(scores), axis=0)
    values_ethv = jnp.stack([out_thv, *(keys.v for keys in later)]).astype(jnp.float32)
    return jnp.einsum("eth,ethv->thv", weights_eth, values_ethv).astype(out_thv.dtype)
