"""The one decode step: verify last step's drafts, accept, draft again. Pure, meant for one jit with
donated state.

    tokens  = [last token | drafts]                       1 + m rows a sequence, at positions n .. n
    + m forward -> p[0..m]                                    target laws after temperature and
    truncation rule(p, drafts, q, uniforms) -> y[0..a-1]             a in 1 .. m + 1 tokens, cut at
    eos and at the request's limit propose(hidden of the a accepted rows, y) -> drafts   MTP
    modules, see `dskjax.decode.draft`

A sequence's state after the step: n + a tokens cached, y[a-1] waiting as last token. The same step
serves plain decoding (m = 0), and a prompt's last token is simply the first "last token": prefill
never samples.
"""

import dataclasses
import typing
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dskjax.batch import RaggedBatch
from dskjax.config import ModelConfig
from dskjax.decode.acceptance import RULES, Rule, truncate_at_eos
from dskjax.decode.draft import Drafts, DraftSpec, Window, extend, propose
from dskjax.decode.sampling import SamplingParams, distribution, step_uniforms
from dskjax.model import forward, head
from dskjax.params import Params
from pallas_kernels import LatentCache

TIE_GAP = 1e-4
"""Gap of the two best logits below which a greedy choice counts as a tie: two correct programs may
differ there.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Static choices of a decode step; each value compiles its own program.

    Attributes:
        rule: acceptance rule.
        spec: drafting.
        eos_ids: ids that end a sequence; empty ignores eos.
        impl: implementation of every op.
    """

    rule: Rule
    spec: DraftSpec
    eos_ids: tuple[int, ...] = ()
    impl: str = "auto"

    @classmethod
    def make(
        cls,
        cfg: ModelConfig,
        *,
        rule: str = "rejection",
        drafts: int = 0,
        eos_ids: tuple[int, ...] | None = None,
        impl: str = "auto",
    ) -> "DecodeConfig":
        """Builds and checks a configuration. The strict rule compares tokens, so it drafts by
        argmax; the others draw drafts from the modules' tempered distribution, which at temperature
        0 is the argmax too.

        Raises:
            ValueError: unknown rule, or more drafts than the model's modules allow.
        """
        if rule not in RULES:
            raise ValueError(f"unknown acceptance rule {rule!r}; choose one of {', '.join(RULES)}")
        spec = DraftSpec.make(cfg, drafts, sampled=rule != "strict" and drafts > 0)
        return cls(
            rule=cast(Rule, rule),
            spec=spec,
            eos_ids=cfg.eos_token_id if eos_ids is None else eos_ids,
            impl=impl,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class DecodeState:
    """Everything a batch of sequences carries from step to step, on device. Donate it.

    Attributes:
        cache: the paged pool.
        page_table: i32 [B, W].
        length: i32 [B], n: tokens in the cache; the last token stands at position n.
        last_token: i32 [B].
        drafts: drafts for positions n + 1 .. n + m.
        hidden_tail: [B, tail, D], trunk hidden states of the last anchors a chain computes again.
        token_tail: i32 [B, tail], the token after each of them.
        remaining: i32 [B], tokens the request may still emit.
        active: bool [B]; a finished or empty row is idle and touches nothing.
        sampling: per-row parameters.
    """

    cache: LatentCache
    page_table: jax.Array
    length: jax.Array
    last_token: jax.Array
    drafts: Drafts
    hidden_tail: jax.Array
    token_tail: jax.Array
    remaining: jax.Array
    active: jax.Array
    sampling: SamplingParams


class StepOutput(NamedTuple):
    """What a step hands to the host.

    Attributes:
        tokens: i32 [B, m + 1]; the first `count` are new.
        count: i32 [B], 0 for idle rows.
        accepted: i32 [B], drafts the rule accepted before any cut at eos or limit.
        offered: i32 [B], drafts that were on the table.
        active: bool [B], rows that were decoding in this step.
        finished: bool [B], rows that ended in this step.
        ties: i32 [B], greedy tokens among the new ones whose top-2 logit gap was below `TIE_GAP`.
    """

    tokens: Int[Array, "B n"]
    count: Int[Array, " B"]
    accepted: Int[Array, " B"]
    offered: Int[Array, " B"]
    active: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    ties: Int[Array, " B"]


def prefill(
    params: Params,
    cache: LatentCache,
    batch: RaggedBatch,
    following: Int[Array, "T K"],
    *,
    cfg: ModelConfig,
    spec: DraftSpec,
    impl: str = "auto",
) -> tuple[Float[Array, "T D"], LatentCache]:
    """Runs prompt rows through the trunk and the MTP modules, any chunking.

    A prompt of P tokens is prefilled up to its last token exclusive (P - 1 rows), which then starts
    decoding. At a chunk border the modules see the known next tokens of the prompt.

    Args:
        params: the model's weights.
        cache: the pool.
        batch: chunk rows.
        following: i32 [T, spec.depths], the token 1, 2, .. places after each row.
        cfg: the model.
        spec: drafting.
        impl: implementation of every op.

    Returns:
        hidden [T, D] (the last `spec.tail + 1` rows of each sequence go to `start`) and the cache.
    """
    hidden, cache = forward(params, cache, batch, cfg=cfg, impl=impl)
    return hidden, extend(params, cache, batch, following, hidden, cfg=cfg, spec=spec, impl=impl)


def start(
    params: Params,
    cache: LatentCache,
    page_table: Int[Array, "B W"],
    length: Int[Array, " B"],
    last_token: Int[Array, " B"],
    hidden: Float[Array, "B R D"],
    tokens: Int[Array, "B R"],
    remaining: Int[Array, " B"],
    sampling: SamplingParams,
    *,
    cfg: ModelConfig,
    config: DecodeConfig,
) -> DecodeState:
    """State of sequences whose prompts are prefilled, with their first drafts.

    Args:
        params: the model's weights.
        cache: the pool.
        page_table: pages, with room for prompt, new tokens and m drafts.
        length: prefilled tokens of each sequence (P - 1).
        last_token: the prompt's last token.
        hidden: trunk hidden states of the last R = tail + 1 prefilled rows; what lies before the
            prompt's begin may be anything.
        tokens: the token after each of those rows; the last one is `last_token`.
        remaining: tokens to emit at most; 0 makes an idle row.
        sampling: per-row parameters.
        cfg: the model.
        config: static choices.
    """
    spec, batch = config.spec, last_token.shape[0]
    active = remaining > 0
    end = jnp.where(active, length, 0)
    rows = hidden.shape[1]
    assert rows == spec.tail + 1, (rows, spec)
    window = Window(hidden, tokens, jnp.full((batch,), rows - 1, jnp.int32), end)
    uniforms = step_uniforms(sampling.seed, length + 1, spec.drafts)
    drafts, cache = propose(
        params,
        cache,
        page_table,
        window,
        sampling,
        uniforms.draft,
        cfg=cfg,
        spec=spec,
        impl=config.impl,
    )
    return DecodeState(
        cache=cache,
        page_table=page_table,
        length=length,
        last_token=last_token,
        drafts=drafts,
        hidden_tail=hidden[:, 1:],
        token_tail=tokens[:, 1:],
        remaining=remaining,
        active=active,
        sampling=sampling,
    )


def decode_step(
    params: Params, state: DecodeState, *, cfg: ModelConfig, config: DecodeConfig
) -> tuple[DecodeState, StepOutput]:
    """Verifies, accepts and drafts once for every active sequence."""
    spec = config.spec
    m, active, batch = spec.drafts, state.active, state.last_token.shape[0]
    with jax.named_scope("verify"):
        rows = jnp.concatenate(
            [state.last_token[:, None], jnp.maximum(state.drafts.tokens, 0)], axis=1
        )
        end = jnp.where(active, state.length + 1 + m, 0)
        part = RaggedBatch.uniform(rows, state.page_table, end, "absorbed")
        hidden, cache = forward(params, state.cache, part, cfg=cfg, impl=config.impl)
        hidden = hidden.reshape(batch, 1 + m, -1)
        logits = head(params, hidden, cfg=cfg)
    with jax.named_scope("accept"):
        uniforms = step_uniforms(state.sampling.seed, state.length + 1, m)
        probs = distribution(logits, state.sampling)
        ruled = RULES[config.rule](
            probs, state.drafts.tokens, state.drafts.probs, uniforms.accept, uniforms.final
        )
        kept, finished = truncate_at_eos(
            ruled, config.eos_ids, jnp.where(active, state.remaining, 0)
        )
        count = kept.count
    newest = jnp.maximum(count - 1, 0)
    last_token = jnp.where(active, kept.tokens[jnp.arange(batch), newest], state.last_token)
    length = state.length + count
    going = active & ~finished
    hidden_all = jnp.concatenate([state.hidden_tail, hidden], axis=1)
    tokens_all = jnp.concatenate([state.token_tail, kept.tokens], axis=1)
    window = Window(hidden_all, tokens_all, spec.tail + newest, jnp.where(going, end, 0))
    next_uniforms = step_uniforms(state.sampling.seed, length + 1, m)
    drafts, cache = propose(
        params,
        cache,
        state.page_table,
        window,
        state.sampling,
        next_uniforms.draft,
        cfg=cfg,
        spec=spec,
        impl=config.impl,
    )
    tail = count[:, None] + jnp.arange(spec.tail)
    new_state = DecodeState(
        cache=cache,
        page_table=state.page_table,
        length=length,
        last_token=last_token,
        drafts=drafts,
        hidden_tail=jnp.take_along_axis(hidden_all, tail[:, :, None], axis=1),
        token_tail=jnp.take_along_axis(tokens_all, tail, axis=1),
        remaining=state.remaining - count,
        active=going,
        sampling=state.sampling,
    )
    return new_state, StepOutput(
        tokens=kept.tokens,
        count=count,
        accepted=jnp.where(active, ruled.count - 1, 0),
        offered=jnp.where(active, (state.drafts.tokens >= 0).sum(axis=1), 0).astype(jnp.int32),
        active=active,
        finished=active & finished,
        ties=_ties(logits, state.sampling, count),
    )


def _ties(logits: jax.Array, sampling: SamplingParams, count: jax.Array) -> jax.Array:
    best = jax.lax.top_k(logits, 2)[0]
    close = (best[..., 0] - best[..., 1] < TIE_GAP) & (sampling.temperature == 0)[:, None]
    return (close & (jnp.arange(logits.shape[1]) < count[:, None])).sum(axis=1).astype(jnp.int32)
