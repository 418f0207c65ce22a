"""The model over the paged cache: prefill chunks, decode, verification and mixed steps.

    forward(params, cache, batch, cfg=cfg)                new tokens through the trunk
    forward_layers(params, cache, batch, x, layers=...)   through some of its layers
    forward_mtp(params, cache, batch, hidden, ...)        through one MTP module

The cache is a carry of the scan over layers, so under donation its rows are written in place. A
scan copies each layer's weights out of their stack; with weights that `dskjax.params.unstack` took
apart the layers are unrolled instead: more to compile, nothing to copy.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax import attention
from dskjax.batch import BatchPlan, RaggedBatch, plan_batch
from dskjax.config import ModelConfig
from dskjax.expert_parallel import Exchange
from dskjax.layers.block import Block
from dskjax.layers.rope import rope_tables
from dskjax.model import embed, final_norm
from dskjax.mtp import MtpModule
from dskjax.params import Params, bind
from pallas_kernels import LatentCache

Batch = RaggedBatch | tuple[RaggedBatch, ...]


@dataclasses.dataclass(frozen=True)
class _Step:
    parts: tuple[RaggedBatch, ...]
    plans: tuple[BatchPlan, ...]
    tables: tuple[jax.Array, jax.Array]
    token_ids: jax.Array
    real: jax.Array


def _step(batch: Batch, cache: LatentCache, cfg: ModelConfig) -> _Step:
    parts = (batch,) if isinstance(batch, RaggedBatch) else batch
    heads = cfg.num_attention_heads
    plans = tuple(plan_batch(part, cache.page_size, heads) for part in parts)
    positions = jnp.concatenate([plan.positions for plan in plans])
    tables = rope_tables(positions, cfg.mla.qk_rope_head_dim, cfg.rope)
    token_ids = jnp.concatenate([part.token_ids for part in parts])
    real = jnp.concatenate([plan.pages for plan in plans]) >= 0
    return _Step(parts, plans, tables, token_ids, real)


def forward(
    params: Params,
    cache: LatentCache,
    batch: Batch,
    *,
    cfg: ModelConfig,
    impl: str = "auto",
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "T D"], LatentCache]:
    """Runs new tokens through the trunk over the paged cache.

    One function serves prefill chunks, decode, verification of 1 + K tokens, and mixed steps (a
    tuple of parts; rows follow one another). Donate the cache at the jit boundary: rows are written
    in place.

    Returns:
        hidden [T, D] after the final norm (call `head` on the rows whose logits are wanted) and the
        cache.
    """
    layers = (0, cfg.num_hidden_layers)
    x, cache = forward_layers(
        params, cache, batch, None, cfg=cfg, layers=layers, impl=impl, exchange=exchange
    )
    return final_norm(params, x, cfg=cfg), cache


def forward_counted(
    params: Params,
    cache: LatentCache,
    batch: Batch,
    *,
    cfg: ModelConfig,
    impl: str = "auto",
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "T D"], LatentCache, Int[Array, "L E"]]:
    """`forward`, and how many real rows chose each expert of each MoE layer, int32 [L, E]."""
    every = (0, cfg.num_hidden_layers)
    run = functools.partial(_run_layers, cfg=cfg, layers=every, impl=impl, exchange=exchange)
    x, cache, loads = run(params, cache, batch, None, counted=True)
    assert loads is not None
    return final_norm(params, x, cfg=cfg), cache, loads


def forward_layers(
    params: Params,
    cache: LatentCache,
    batch: Batch,
    x: Float[Array, "T D"] | None,
    *,
    cfg: ModelConfig,
    layers: tuple[int, int],
    impl: str = "auto",
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "T D"], LatentCache]:
    """Runs new tokens through some of the trunk's layers; `forward` is this over all of them.

    In groups, the rows that early layers wrote can leave for another device while later layers
    compute.

    Args:
        params: the model's weights.
        cache: the pool.
        batch: the rows, the same for every group.
        x: residual stream [T, D] after the layers before; None embeds the tokens.
        cfg: the model.
        layers: half-open range; static.
        impl: implementation of every op.
        exchange: how rows meet experts that are split over devices.

    Returns:
        The residual stream after these layers, and the cache.
    """
    run = functools.partial(_run_layers, cfg=cfg, layers=layers, impl=impl, exchange=exchange)
    x, cache, _ = run(params, cache, batch, x, counted=False)
    return x, cache


def _run_layers(
    params: Params,
    cache: LatentCache,
    batch: Batch,
    x: jax.Array | None,
    *,
    cfg: ModelConfig,
    layers: tuple[int, int],
    impl: str,
    exchange: Exchange | None,
    counted: bool,
) -> tuple[jax.Array, LatentCache, jax.Array | None]:
    """Residual stream, cache, and if `counted` int32 [MoE layers among these, E]."""
    step, moe = _step(batch, cache, cfg), cfg.moe

    def layer(
        carry: tuple[jax.Array, LatentCache],
        weights: Params,
        index: jax.Array | int,
        experts: bool,
    ) -> tuple[Any, jax.Array | None]:
        x, pool = carry
        attend = attention.over_cache(step.tables, pool, index, step.parts, step.plans, cfg, impl)
        block = bind(Block, weights, cfg, experts=experts)
        x, pool, chosen = block(x, attend, step.real, impl=impl, exchange=exchange)
        if moe is None or chosen is None or not counted:
            return (x, pool), None
        return (x, pool), _count(chosen, moe.n_routed_experts)

    loads = None
    carry, first = (embed(params, step.token_ids) if x is None else x, cache), 0
    for name, experts, count in (
        ("dense_layers", False, cfg.num_dense_layers),
        ("moe_layers", True, cfg.num_moe_layers),
    ):
        begin, end = max(layers[0] - first, 0), min(layers[1] - first, count)
        indices = jnp.arange(begin, end, dtype=jnp.int32)
        if isinstance(params.get(name), tuple):
            each = []
            for i in range(begin, end):
                carry, load = layer(carry, params[name][i], first + i, experts)
                each.append(load)
            loads = jnp.stack(each) if experts and counted and each else None
        elif (begin, end) == (0, count) and count:
            body = lambda c, xs, e=experts, f=first: layer(c, xs[0], f + xs[1], e)  # noqa: E731
            carry, loads = jax.lax.scan(body, carry, (params[name], indices))
        elif begin < end:  # slicing the stack first would copy the weights
            pick = lambda i, w=params[name]: jax.tree.map(lambda leaf: leaf[i], w)  # noqa: E731
            body = lambda c, i, e=experts, f=first, p=pick: layer(c, p(i), f + i, e)  # noqa: E731
            carry, loads = jax.lax.scan(body, carry, indices)
        first += count
    return carry[0], carry[1], loads


def _count(chosen: jax.Array, experts: int) -> jax.Array:
    """i32 [E]: how many rows of int32 [T, K] chose each expert; -1 is none."""
    return (chosen[:, :, None] == jnp.arange(experts)).sum(axis=(0, 1), dtype=jnp.int32)


def forward_mtp(
    params: Params,
    cache: LatentCache,
    batch: Batch,
    hidden: Float[Array, "T D"],
    *,
    cfg: ModelConfig,
    module: Int[Array, ""] | int,
    impl: str = "auto",
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "T D"], LatentCache]:
    """Runs one MTP module over the paged cache, in its own layer of the pool.

    Slot p of module k holds the pair (h^{k}[p], t[p + k + 1]) counted from k = 0: `batch.token_ids`
    are the *following* tokens, while positions and pages are those of the trunk row the hidden
    state came from.

    Args:
        params: params with `mtp_layers`.
        cache: the pool, MTP layers included.
        batch: rows like those of `forward`.
        hidden: [T, D], trunk hidden states after the final norm, or the previous depth's output.
        cfg: the model.
        module: index of the module, 0 for the first; static with unstacked weights.
        impl: implementation of every op.
        exchange: how rows meet experts that are split over devices.

    Returns:
        h [T, D] after the module's norm (feed it to `head`, and to the next depth) and the cache.
    """
    run = functools.partial(_run_module, cfg=cfg, module=module, impl=impl, exchange=exchange)
    h, cache, _ = run(params, cache, batch, hidden)
    return h, cache


def forward_mtp_counted(
    params: Params,
    cache: LatentCache,
    batch: Batch,
    hidden: Float[Array, "T D"],
    *,
    cfg: ModelConfig,
    module: Int[Array, ""] | int,
    impl: str = "auto",
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "T D"], LatentCache, Int[Array, " E"]]:
    """`forward_mtp`, and how many real rows chose each expert of the module, int32 [E]."""
    assert cfg.moe is not None
    run = functools.partial(_run_module, cfg=cfg, module=module, impl=impl, exchange=exchange)
    h, cache, chosen = run(params, cache, batch, hidden)
    return h, cache, _count(chosen, cfg.moe.n_routed_experts)


def _run_module(
    params: Params,
    cache: LatentCache,
    batch: Batch,
    hidden: jax.Array,
    *,
    cfg: ModelConfig,
    module: jax.Array | int,
    impl: str,
    exchange: Exchange | None,
) -> tuple[jax.Array, LatentCache, jax.Array]:
    """Hidden states, cache, and the chosen experts int32 [T, K]."""
    step = _step(batch, cache, cfg)
    layer = cfg.num_hidden_layers + module
    attend = attention.over_cache(step.tables, cache, layer, step.parts, step.plans, cfg, impl)
    stack = params["mtp_layers"]
    weights = (
        stack[module] if isinstance(stack, tuple) else jax.tree.map(lambda w: w[module], stack)
    )
    h, cache_out, chosen = bind(MtpModule, weights, cfg)(
        embed(params, step.token_ids), hidden, attend, step.real, impl=impl, exchange=exchange
    )
    assert isinstance(cache_out, LatentCache)
    return h, cache_out, chosen
