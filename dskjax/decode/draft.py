"""Drafting with MTP modules over the paged cache.

Two schemes, one interface. Positions count from 0; t[0..N] are the known tokens of a sequence,
H[0..N-1] the trunk's hidden states after its final norm, and anchor i is the row a hidden state
came from.

    chain (A)      K independent modules. Depth k at anchor i takes (h^{k-1}[i], t[i+k]), h^0 = H,
                   and has a cache of its own. Anchor N-1 gives draft k at depth k. A row is final
                   once t[i+k] is known; rows that looked at drafts are computed again, which is
                   why the last K-1 hidden states and tokens are kept from step to step.
    recycled (C)   one module. Depth 1 runs over all newly known pairs (H[i], t[i+1]), overwriting
                   what the last round of drafting wrote there; after that the module eats its own
                   output, one row per draft, at the next slot.

Rows of a wrong draft stay in the cache beyond the sequence's length, where nothing reads them,
until they are overwritten. A step may draft fewer tokens than the modules could (`drafts` below
`depths`): the modules' rows are kept up to date all the same, so that a later step can draft more.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax.axes import Sharding
from dskjax.batch import RaggedBatch
from dskjax.config import ModelConfig, MtpScheme
from dskjax.decode.sampling import SamplingParams, distribution, sample
from dskjax.expert_parallel import Exchange
from dskjax.model import head
from dskjax.paged import forward_mtp, forward_mtp_counted
from dskjax.params import Params
from pallas_kernels import LatentCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """How many tokens are drafted a step, and how. Static: each value compiles its own step.

    Attributes:
        scheme: "chain" or "recycled".
        drafts: m, tokens drafted a step; 0 drafts nothing.
        depths: modules that run over known tokens: all of a chain that may draft, one when
            recycled, none without speculation.
        sampled: draw drafts from the module's distribution, which the acceptance rule then needs;
            otherwise take the argmax.
    """

    scheme: MtpScheme
    drafts: int
    depths: int
    sampled: bool

    @classmethod
    def make(cls, cfg: ModelConfig, drafts: int, *, sampled: bool) -> "DraftSpec":
        """Checks `drafts` against the model's MTP modules.

        Raises:
            ValueError: drafts are asked of a model without modules, or more than a chain has.
        """
        modules = cfg.mtp.num_nextn_predict_layers
        if drafts < 0:
            raise ValueError(f"{drafts=} must be 0 (no speculation) or more")
        if drafts and not modules:
            raise ValueError(
                f"{drafts=} but this checkpoint has no MTP modules (num_nextn_predict_layers=0); "
                "use 0 drafts"
            )
        limit = cfg.mtp.max_drafts
        if limit is not None and drafts > limit:
            raise ValueError(
                f"{drafts=} but this checkpoint chains {modules} MTP modules "
                f"(num_nextn_predict_layers={modules}): "
                f"use at most {modules}"
            )
        depths = drafts if cfg.mtp.scheme == "chain" else min(drafts, 1)
        return cls(scheme=cfg.mtp.scheme, drafts=drafts, depths=depths, sampled=sampled)

    def fewer(self, drafts: int) -> "DraftSpec":
        """The same modules, drafting `drafts` tokens: what a step of the same sequences may use."""
        assert 0 <= drafts <= self.drafts, (drafts, self)
        return dataclasses.replace(self, drafts=drafts)

    @property
    def tail(self) -> int:
        """Rows a sequence carries from step to step because a chain must compute them again."""
        return max(self.depths - 1, 0)


class Window(NamedTuple):
    """Consecutive anchors of each sequence that drafting has to (re)compute.

    Attributes:
        hidden: [B, R, D], trunk hidden states after the final norm.
        tokens: i32 [B, R], the token after each anchor.
        last: i32 [B], row of the newest anchor whose following token is known (N - 1); later rows
            mean nothing.
        end: i32 [B], position after the last row: the window covers [end - R, end); 0 for an idle
            sequence.
    """

    hidden: Float[Array, "B R D"]
    tokens: Int[Array, "B R"]
    last: Int[Array, " B"]
    end: Int[Array, " B"]


class Drafts(NamedTuple):
    """i32 [B, m] draft tokens, and the distributions they were drawn from, fp32 [B, m, X] (None for
    argmax drafts).
    """

    tokens: Int[Array, "B m"]
    probs: Float[Array, "B m X"] | None


def no_drafts(batch: int, cfg: ModelConfig, spec: DraftSpec) -> Drafts:
    """Drafts that no rule accepts: token -1 with probability 0."""
    tokens = jnp.full((batch, spec.drafts), -1, jnp.int32)
    return Drafts(
        tokens,
        jnp.zeros((batch, spec.drafts, cfg.vocab_size), jnp.float32) if spec.sampled else None,
    )


Pool = tuple[LatentCache, Int[Array, "M E"] | None]
"""The cache, and how many rows chose each expert of each module."""


def extend(
    params: Params,
    cache: LatentCache,
    batch: RaggedBatch,
    following: Int[Array, "T K"],
    hidden: Float[Array, "T D"],
    *,
    cfg: ModelConfig,
    spec: DraftSpec,
    impl: str,
    exchange: Exchange | None = None,
    loads: Int[Array, "M E"] | None = None,
) -> Pool:
    """Fills the modules' cache for prompt rows whose following tokens are known.

    Args:
        params: params with `mtp_layers`.
        cache: the pool.
        batch: the rows just run through the trunk (its token ids are not used).
        following: i32 [T, depths], token k+1 places after each row; where it lies beyond the prompt
            any id will do, those rows are computed again by `propose`.
        hidden: trunk hidden states of the rows.
        cfg: the model.
        spec: scheme and number of drafts.
        impl: implementation of every op.
        exchange: see `dskjax.paged.forward_mtp`.
        loads: i32 [M, E], how many rows chose each expert of each module so far; None: nobody
            counts.

    Returns:
        The cache and the loads, these rows counted.
    """
    run, pool = _module_of(params, cfg=cfg, impl=impl, exchange=exchange), (cache, loads)
    for k in range(spec.depths):
        shifted = dataclasses.replace(batch, token_ids=following[:, k])
        hidden, pool = run(pool, shifted, hidden, module=k)
    return pool


def _module_of(params: Params, **how: Any) -> Callable[..., tuple[jax.Array, Pool]]:
    """`forward_mtp` that counts each expert's rows, where somebody does."""

    def run(
        pool: Pool, batch: RaggedBatch, hidden: jax.Array, *, module: jax.Array | int
    ) -> tuple[jax.Array, Pool]:
        cache, loads = pool
        if loads is None:
            hidden, cache = forward_mtp(params, cache, batch, hidden, module=module, **how)
            return hidden, (cache, None)
        hidden, cache, load = forward_mtp_counted(
            params, cache, batch, hidden, module=module, **how
        )
        return hidden, (cache, loads.at[module].add(load))

    return run


Depth = tuple[Array | int, Array]
"""A depth, and the uniforms its drafts are drawn with."""


def propose(
    params: Params,
    cache: LatentCache,
    page_table: Int[Array, "B W"],
    window: Window,
    draw: Callable[[Array | int, Array], SamplingParams],
    u_draft: Float[Array, "B m"],
    *,
    cfg: ModelConfig,
    spec: DraftSpec,
    truncate: bool | None = None,
    sharding: Sharding | None = None,
    impl: str,
    exchange: Exchange | None = None,
    loads: Int[Array, "M E"] | None = None,
) -> tuple[Drafts, Pool]:
    """Drafts the next m tokens of each sequence and brings the modules' cache up to date.

    Args:
        params: params with `mtp_layers`.
        cache: the pool.
        page_table: pages of each sequence.
        window: rows to compute; must start at or before the first anchor whose rows are not final
            (`spec.tail` rows back).
        draw: how draft `depth` (i32) is drawn if `spec.sampled`, given the entropy [B] in nats of
            the first draft's law.
        u_draft: uniforms for drawing them.
        cfg: the model.
        spec: scheme and number of drafts.
        truncate: see `dskjax.decode.sampling.distribution`.
        sharding: see `dskjax.model.head`.
        impl: implementation of every op.
        exchange: see `dskjax.paged.forward_mtp`.
        loads: see `extend`; rows that are computed again count again.

    Returns:
        The drafts (`no_drafts` for sequences without a single anchor), and the cache and the loads.
    """
    batch, rows, width = window.hidden.shape
    nothing = no_drafts(batch, cfg, spec)
    if not spec.depths:
        return nothing, (cache, loads)
    run = _module_of(params, cfg=cfg, impl=impl, exchange=exchange)
    sequence = jnp.arange(batch)
    known = window.end - rows + window.last + 1  # N: position of the newest known token

    def pick(
        hidden: jax.Array, u: jax.Array, depth: jax.Array | int, entropy: jax.Array
    ) -> tuple[Drafts, jax.Array]:
        logits = head(params, hidden, cfg=cfg, sharding=sharding)
        if not spec.sampled:
            return Drafts(jnp.argmax(logits, axis=-1).astype(jnp.int32), None), entropy
        entropy = jnp.where(depth == 0, _entropy(logits), entropy)
        probs = distribution(logits, draw(depth, entropy), truncate)
        return Drafts(sample(probs, u), probs), entropy

    def module(carry: Any, k: jax.Array | int) -> tuple[jax.Array, Pool]:
        hidden, tokens, _, pool = carry
        shifted = jax.lax.dynamic_slice_in_dim(tokens, k, rows, axis=1)
        part = RaggedBatch.uniform(shifted, page_table, window.end, "absorbed")
        return run(pool, part, hidden, module=k)

    def depth(carry: Any, xs: Depth) -> tuple[Any, Drafts]:
        k, u = xs
        hidden, pool = module(carry, k)
        newest = hidden.reshape(batch, rows, width)[sequence, window.last]
        draft, entropy = pick(newest, u, k, carry[2])
        tokens = carry[1].at[sequence, window.last + k + 1].set(draft.tokens)
        return (hidden, tokens, entropy, pool), draft

    def upkeep(carry: Any, xs: Depth) -> tuple[Any, None]:
        hidden, pool = module(
            carry, xs[0]
        )  # no draft follows: these rows are computed again anyway
        return (hidden, *carry[1:3], pool), None

    def recycle(carry: Any, xs: Depth) -> tuple[Any, Drafts]:
        newest, token, entropy, pool = carry
        j, u = xs
        lens = jnp.where(window.end > 0, known + j, 0)
        part = RaggedBatch.uniform(token[:, None], page_table, lens, "absorbed")
        newest, pool = run(pool, part, newest, module=0)
        draft, entropy = pick(newest, u, j, entropy)
        return (newest, draft.tokens, entropy, pool), draft

    loop = functools.partial(_loop, u_draft.T, isinstance(params["mtp_layers"], tuple))
    split = min(spec.depths, spec.drafts)
    tokens = jnp.pad(window.tokens, ((0, 0), (0, spec.depths)))
    start = (cache, loads)
    carry = (window.hidden.reshape(-1, width), tokens, jnp.zeros(batch, jnp.float32), start)
    picked = None
    if split:
        with jax.named_scope("mtp/depths"):
            carry, picked = loop(depth, carry, range(split))
    if split < spec.depths:
        with jax.named_scope("mtp/upkeep"):
            carry, _ = loop(upkeep, carry, range(split, spec.depths))
    hidden, _, entropy, pool = carry
    if picked is None:
        return nothing, pool
    if split < spec.drafts:
        newest = hidden.reshape(batch, rows, width)[sequence, window.last]
        carry = (newest, picked.tokens[-1], entropy, pool)
        with jax.named_scope("mtp/recycle"):
            (*_, pool), more = loop(recycle, carry, range(split, spec.drafts))
        picked = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), picked, more)
    drafts = jax.tree.map(lambda x: x.swapaxes(0, 1), picked)
    has_anchor = (window.end > 0) & (known > 0)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(has_anchor.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(keep, drafts, nothing), pool


def _loop(
    u_mb: jax.Array, unroll: bool, body: Callable[..., Any], carry: Any, depths: range
) -> tuple[Any, Any]:
    """Scans `body(carry, (depth, uniforms of that depth))` over depths, or unrolls that."""
    missing = max(depths.stop - u_mb.shape[0], 0)  # depths that draw nothing
    uniforms = jnp.pad(u_mb, ((0, missing), (0, 0)))
    if not unroll and len(depths) > 1:
        steps = jnp.arange(depths.start, depths.stop, dtype=jnp.int32)
        return jax.lax.scan(body, carry, (steps, uniforms[depths.start : depths.stop]))
    outs = []
    for k in depths:
        carry, out = body(carry, (k, uniforms[k]))
        outs.append(out)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outs)


def _entropy(logits: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
