"""The model: embedding, dense layers, MoE layers, final norm, head; MTP modules beside them.

Everything here is a pure function of params under plain `jax.jit`:

    init(cfg, key)                                   random params
    apply(params, tokens, cfg=cfg)                   logits of whole sequences (differentiable)
    trunk(params, tokens, cfg=cfg)                   hidden states, chosen experts, residual stream
    mtp_chain(params, tokens, hidden, cfg=cfg, ...)  the MTP modules over whole sequences

Layers are stacked and scanned. The same layers over the paged cache: `dskjax.paged`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax import attention
from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.expert_parallel import Exchange
from dskjax.layers.block import Block
from dskjax.layers.norm import RmsNorm
from dskjax.layers.rope import rope_tables
from dskjax.lookup import lookup
from dskjax.mtp import MtpModule
from dskjax.params import Params, WeightSpec, abstract, bind, initialise, is_spec, specs_of
from pallas_kernels import MlaPrefillPlan
from pallas_kernels.matmul.xla import accumulate

Remat = Callable[..., Any] | None
"""A `jax.checkpoint` policy, for example `jax.checkpoint_policies.nothing_saveable`; None keeps all
activations.
"""


def param_specs(cfg: ModelConfig) -> Params:
    """Every weight of the model as a nested dict of `WeightSpec`; layers are stacked on the first
    axis.
    """
    x, d = cfg.vocab_size, cfg.hidden_size
    specs: Params = {
        "embed_tokens": {"weight": WeightSpec((x, d), ("vocab", "embed"), "embedding")},
        "norm": specs_of(RmsNorm, d, cfg.rms_norm_eps, "embed"),
    }
    if cfg.num_dense_layers:
        specs["dense_layers"] = _stack(specs_of(Block, cfg, experts=False), cfg.num_dense_layers)
    if cfg.num_moe_layers:
        specs["moe_layers"] = _stack(specs_of(Block, cfg, experts=True), cfg.num_moe_layers)
    if cfg.mtp.num_nextn_predict_layers:
        specs["mtp_layers"] = _stack(specs_of(MtpModule, cfg), cfg.mtp.num_nextn_predict_layers)
    if not cfg.tie_word_embeddings:
        specs["lm_head"] = {"weight": WeightSpec((x, d), ("vocab", "embed"), "normal")}
    return specs


def _stack(specs: Params, layers: int) -> Params:
    return jax.tree.map(lambda spec: spec.stacked(layers), specs, is_leaf=is_spec)


def init(
    cfg: ModelConfig, key: jax.Array, *, dtype: Any = jnp.float32, std: float | None = None
) -> Params:
    """Random params of the model; see `dskjax.params.initialise`. Under jit with out_shardings
    nothing is made unsharded.

    Raises:
        ValueError: the config has redundant experts, whose replicas would differ.
    """
    if cfg.moe is not None and cfg.moe.num_redundant_experts:
        raise ValueError(
            f"num_redundant_experts={cfg.moe.num_redundant_experts}, but replicas are copies: make "
            "params with 0, then call dskjax.expert_parallel.place.place"
        )
    return initialise(param_specs(cfg), key, dtype, std)


def abstract_params(cfg: ModelConfig, dtype: Any = jnp.bfloat16) -> Params:
    """Shapes and dtypes of the params, without arrays."""
    return abstract(param_specs(cfg), dtype)


class TrunkOutput(NamedTuple):
    """What the trunk computes over whole sequences.

    Attributes:
        hidden: [B, T, D] after the final norm.
        experts: int32 [moe layers, B, T, K], chosen experts; -1 for padding.
        layers: [num_hidden_layers, B, T, D] residual stream after each block, or None.
        embedded: [B, T, D] token embeddings.
    """

    hidden: jax.Array
    experts: jax.Array | None
    layers: jax.Array | None
    embedded: jax.Array


def embed(
    params: Params, token_ids: Int[Array, "*T"], *, sharding: Sharding | None = None
) -> Float[Array, "*T D"]:
    """Token embeddings. Ids outside the vocabulary give NaN rows; with `sharding`, gradients are
    added on each device alone (`dskjax.lookup`).
    """
    with jax.named_scope("embed"):
        return lookup(params["embed_tokens"]["weight"], token_ids, sharding is not None)


def head(
    params: Params,
    hidden: Float[Array, "*T D"],
    *,
    cfg: ModelConfig,
    sharding: Sharding | None = None,
) -> Float[Array, "*T X"]:
    """fp32 logits of hidden states that already went through a final norm; with `sharding`, whole
    ones where its rules split the vocabulary.
    """
    logits = logits_of(
        hidden, params["embed_tokens" if cfg.tie_word_embeddings else "lm_head"]["weight"]
    )
    return logits if sharding is None else sharding.whole_logits(logits)


def logits_of(hidden: Float[Array, "*T D"], weight: Float[Array, "X D"]) -> Float[Array, "*T X"]:
    """The head's product in the dtype of `hidden`, to which gradients are rounded too."""
    with jax.named_scope("lm_head"):
        return accumulate(hidden, weight.astype(hidden.dtype))


def final_norm(
    params: Params, x: Float[Array, "*T D"], *, cfg: ModelConfig
) -> Float[Array, "*T D"]:
    """The trunk's last norm; its output feeds both the head and the MTP modules."""
    return bind(RmsNorm, params["norm"], cfg.hidden_size, cfg.rms_norm_eps, "embed")(x)


def sequence_plan(segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> MlaPrefillPlan:
    """Causal attention inside each segment of packed rows; segment 0 is padding."""
    rows = segment_ids.shape[0]
    wide = segment_ids.astype(jnp.int32) + jnp.arange(rows, dtype=jnp.int32)[:, None] * (
        segment_ids.shape[1] + 1
    )
    seq = jnp.where(segment_ids > 0, wide, -1).reshape(-1)
    pos = positions.reshape(-1).astype(jnp.int32)
    return MlaPrefillPlan(seq, pos, seq, pos, rows, same_rows=True)


def trunk(
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    cfg: ModelConfig,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    impl: str = "auto",
    remat: Remat = None,
    capture: bool = False,
    sharding: Sharding | None = None,
) -> TrunkOutput:
    """Runs whole sequences through the trunk, without a cache.

    Args:
        params: nested dict of weights; their dtype is the compute dtype.
        tokens: ids [B, T].
        cfg: the model.
        segment_ids: document of each token in packed rows, from 1; 0 is padding. One document a row
            when None.
        positions: position in its document; 0..T-1 when None.
        impl: implementation of every op.
        remat: checkpoint policy of each layer for the backward pass.
        capture: also return the residual stream after every block.
        sharding: mesh and rules that pin the residual stream and say how rows meet their experts;
            None leaves it all to XLA.
    """
    shape = tokens.shape
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    plan = sequence_plan(segment_ids, positions)
    tables = rope_tables(positions.reshape(-1), cfg.mla.qk_rope_head_dim, cfg.rope)
    attend = attention.over_sequences(tables, plan, cfg, impl)
    exchange, real = Exchange.of(sharding), segment_ids.reshape(-1) > 0

    def layer(
        x: jax.Array, weights: Params, experts: bool
    ) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
        block = bind(Block, weights, cfg, experts=experts)
        x, _, chosen = block(x, attend, real, impl=impl, exchange=exchange, sharding=sharding)
        return x, (x if capture else None, chosen)

    embedded = embed(params, tokens, sharding=sharding)
    x = embedded.reshape(-1, cfg.hidden_size)
    captured, chosen = [], None
    for name, experts in (("dense_layers", False), ("moe_layers", True)):
        if name in params:
            body = lambda x, w, e=experts: layer(x, w, e)  # noqa: E731
            x, (residuals, chosen) = jax.lax.scan(remat_of(body, remat), x, params[name])
            captured.append(residuals)
    hidden = final_norm(params, x if sharding is None else sharding.between(x), cfg=cfg).reshape(
        *shape, -1
    )
    layers = jnp.concatenate(captured).reshape(-1, *shape, cfg.hidden_size) if capture else None
    experts = None if chosen is None else chosen.reshape(chosen.shape[0], *shape, -1)
    return TrunkOutput(hidden, experts, layers, embedded)


def remat_of(body: Callable[..., Any], policy: Remat) -> Callable[..., Any]:
    """`body`, recomputed in the backward pass as the policy says."""
    return body if policy is None else jax.checkpoint(body, policy=policy)


def apply(
    params: Params, tokens: Int[Array, "B T"], *, cfg: ModelConfig, **options: Any
) -> Float[Array, "B T X"]:
    """fp32 logits of whole sequences; row i predicts token i + 1. Options are those of `trunk`."""
    return head(params, trunk(params, tokens, cfg=cfg, **options).hidden, cfg=cfg)


class MtpOutput(NamedTuple):
    """h^k and chosen experts of each depth k = 1..K: lists of [B, T, D] and int32 [B, T, top_k]."""

    hidden: list[jax.Array]
    experts: list[jax.Array]


def mtp_chain(
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
    """Runs MTP depths 1..`depths` over whole sequences, each fed by the one before (scheme A,
    "chain").

    Row i of depth k sees tokens up to i + k and predicts token i + k + 1. The last k rows of a
    sequence (or segment) have no token to look at: their values mean nothing, and no other row sees
    them.

    Args:
        params: params with `mtp_layers`.
        tokens: ids [B, T].
        hidden: trunk hidden states after the final norm.
        cfg: the model.
        depths: K, at most the number of modules.
        segment_ids: see `trunk`.
        positions: see `trunk`.
        impl: implementation of every op.
        remat: checkpoint policy of each module.
        detach: stop the gradient between depths: each trains on its own input only.
        sharding: mesh and rules; they say how rows meet their experts.

    Raises:
        ValueError: more depths than modules.
    """
    modules = cfg.mtp.num_nextn_predict_layers
    if depths > modules:
        raise ValueError(
            f"{depths=} but the model has {modules} MTP modules (num_nextn_predict_layers)"
        )
    shape = tokens.shape
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    tables = rope_tables(positions.reshape(-1), cfg.mla.qk_rope_head_dim, cfg.rope)
    attend = attention.over_sequences(tables, sequence_plan(segment_ids, positions), cfg, impl)
    exchange, real = Exchange.of(sharding), segment_ids.reshape(-1) > 0
    out = MtpOutput([], [])

    def module(
        weights: Params, embedded: jax.Array, previous: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        module = bind(MtpModule, weights, cfg)
        h, _, experts = module(embedded, previous, attend, real, impl=impl, exchange=exchange)
        return h, experts

    h = hidden.reshape(-1, cfg.hidden_size)
    for k in range(1, depths + 1):
        weights = jax.tree.map(lambda w, k=k: w[k - 1], params["mtp_layers"])
        shifted = jnp.pad(tokens[:, k:], ((0, 0), (0, k)))
        if detach:
            h = jax.lax.stop_gradient(h)
        embedded = embed(params, shifted.reshape(-1), sharding=sharding)
        h, experts = remat_of(module, remat)(weights, embedded, h)
        out.hidden.append(h.reshape(*shape, -1))
        out.experts.append(experts.reshape(*shape, -1))
    return out
