"""The one jitted step: verify last step's drafts, accept, draft again; and put prompt rows into the
cache beside it.

    tokens  = [last token | drafts]            1 + m rows a sequence, at positions n .. n + m
    forward -> p[0..m]                         target laws after penalties, temperature, truncation
    rule(p, drafts, q, uniforms) -> y[0..a-1]  a in 1 .. m + 1 tokens, cut at a stop or at the limit
    propose(hidden of the a rows, y) -> drafts MTP modules, see `dskjax.decode.draft`

A sequence's state after the step: n + a tokens cached, y[a-1] waiting as last token. The same step
serves plain decoding (m = 0), and a prompt's last token is simply the first "last token": prefill
never samples, and a sequence's first step has no drafts to verify.
"""

import dataclasses
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dskjax.axes import Sharding
from dskjax.batch import RaggedBatch
from dskjax.config import ModelConfig
from dskjax.decode.acceptance import truncate_at_stop
from dskjax.decode.draft import Drafts, DraftSpec, Window, extend, propose
from dskjax.decode.logits import Logprobs, adjust, count_said, logprobs, prompt_logprobs
from dskjax.decode.rows import TIE_GAP, DecodeRows, PrefillRows, StepOutput
from dskjax.decode.rules import (
    RULE_NAMES,
    RuleOptions,
    SyntheticAcceptance,
    ThinkIds,
    accept_rows,
    accept_synthetic,
    draft_sampling,
    overlap,
    thinking_after,
)
from dskjax.decode.sampling import distribution, step_uniforms
from dskjax.decode.slots import RowOptions, Slots
from dskjax.expert_parallel import Exchange
from dskjax.model import head
from dskjax.paged import forward, forward_counted
from dskjax.params import Params

NO_THINKING = ThinkIds(None, None)
"""A tokenizer without thinking tags."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Static choices of a decode step; each value compiles its own program.

    Attributes:
        spec: drafting.
        rules: names of the acceptance rules that rows may use.
        think: ids that open and close a thinking section.
        synthetic: simulated acceptance, for benchmarks; the text then means nothing.
        truncate: whether rows may use top-k or top-p; None finds out at run time.
        extras: whether rows may use penalties, biases, min_length and log-probabilities.
        impl: implementation of every op.
        exchange: how rows meet experts that are split over devices.
        sharding: mesh and rules, where they may split the vocabulary.

    What is found out at run time is a branch, and at a branch a GPU waits for the host: a server
    compiles steps without branches beside one that has them all.
    """

    spec: DraftSpec
    rules: tuple[str, ...]
    think: ThinkIds = NO_THINKING
    synthetic: SyntheticAcceptance | None = None
    truncate: bool | None = None
    extras: bool = True
    impl: str = "auto"
    exchange: Exchange | None = None
    sharding: Sharding | None = None

    @classmethod
    def make(
        cls,
        cfg: ModelConfig,
        *,
        accept: RuleOptions | tuple[str, ...],
        drafts: int = 0,
        think: ThinkIds = NO_THINKING,
        synthetic: SyntheticAcceptance | None = None,
        impl: str = "auto",
    ) -> "DecodeConfig":
        """Builds and checks a configuration. A rule that compares tokens wants argmax drafts; the
        others draw drafts from the modules' distributions, one-hot for a greedy row.

        Args:
            cfg: the model.
            accept: the rule of every row, or the names of the rules that rows may choose from.
            drafts: tokens drafted a step.
            think: ids of the thinking tags.
            synthetic: see the class.
            impl: see the class.

        Raises:
            ValueError: unknown rule, or more drafts than the model's modules allow.
        """
        rules = (accept.name,) if isinstance(accept, RuleOptions) else tuple(accept)
        if unknown := [name for name in rules if name not in RULE_NAMES]:
            raise ValueError(
                f"unknown acceptance rule {unknown[0]!r}; choose one of {', '.join(RULE_NAMES)}"
            )
        sampled = drafts > 0 and rules != ("strict",)
        spec = DraftSpec.make(cfg, drafts, sampled=sampled)
        return cls(spec=spec, rules=rules, think=think, synthetic=synthetic, impl=impl)

    @property
    def how(self) -> dict[str, typing.Any]:
        """What every forward pass is told."""
        return {"impl": self.impl, "exchange": self.exchange}

    def fewer(self, drafts: int) -> "DecodeConfig":
        """The same sequences, with fewer drafts in a step."""
        return dataclasses.replace(self, spec=self.spec.fewer(drafts))


def step(
    params: Params,
    state: Slots,
    decode: DecodeRows | None,
    prefill: PrefillRows | None,
    *,
    cfg: ModelConfig,
    config: DecodeConfig,
) -> tuple[Slots, StepOutput | None]:
    """`scored_step` for rows whose log-probabilities nobody wants."""
    state, output, _ = scored_step(params, state, decode, prefill, cfg=cfg, config=config)
    return state, output


def scored_step(
    params: Params,
    state: Slots,
    decode: DecodeRows | None,
    prefill: PrefillRows | None,
    *,
    cfg: ModelConfig,
    config: DecodeConfig,
) -> tuple[Slots, StepOutput | None, Logprobs | None]:
    """Runs decoding rows, prompt rows, or both in one forward. No slot may be in both.

    Args:
        params: weights; their dtype is the compute dtype.
        state: donated.
        decode: rows to decode, or None.
        prefill: prompt rows, or None.
        cfg: the model.
        config: static choices; its spec may draft fewer tokens than the state holds.

    Returns:
        The state, the output of the decoding rows (None without any), and what the model said about
        the targets of the prompt rows, [B, n] (None without any).
    """
    parts, m = [], config.spec.drafts
    rows = None
    if decode is not None:
        rows = _Rows.of(state, decode, m)
        parts.append(RaggedBatch.uniform(rows.tokens, decode.page_table, rows.end, "absorbed"))
    if prefill is not None:
        parts.append(
            RaggedBatch.uniform(
                prefill.token_ids,
                prefill.page_table,
                prefill.cached_lens,
                "expanded",
                prefill.query_lens,
            )
        )
    with jax.named_scope("forward"):
        if state.loads is None:
            hidden, cache = forward(params, state.cache, tuple(parts), cfg=cfg, **config.how)
            loads = None
        else:
            hidden, cache, loads = forward_counted(
                params, state.cache, tuple(parts), cfg=cfg, **config.how
            )
            loads = state.loads + loads
    state = dataclasses.replace(state, cache=cache, loads=loads)
    output = scores = None
    decoded = 0 if rows is None else rows.tokens.size
    if prefill is not None:
        state = keep_prefilled(params, state, prefill, parts[-1], hidden[decoded:], cfg, config)
        if prefill.targets is not None:
            wide = hidden[decoded:].reshape(*prefill.targets.shape, -1)
            scores = prompt_logprobs(wide, prefill.targets, lambda x: head(params, x, cfg=cfg))
    if decode is not None:
        assert rows is not None
        batch = rows.tokens.shape[0]
        wide = hidden[:decoded].reshape(batch, 1 + m, -1)
        state, output = _accept_and_draft(params, state, decode, rows, wide, cfg, config)
    return state, output, scores


def _with_mtp_loads(state: Slots, loads: jax.Array | None) -> Slots:
    """The state with this rank's counts of the modules' experts, i32 [M, E]."""
    return state if loads is None else dataclasses.replace(state, mtp_loads=loads[None])


class _Rows(NamedTuple):
    """The decoding slots' state, gathered: [B] rows."""

    active: jax.Array
    length: jax.Array
    last_token: jax.Array
    drafts: Drafts
    tokens: jax.Array
    end: jax.Array
    options: RowOptions

    @classmethod
    def of(cls, state: Slots, decode: DecodeRows, m: int) -> "_Rows":
        slots = jnp.minimum(decode.slots, state.count - 1)
        real = decode.slots < state.count
        active = real & ~state.done[slots] & (state.remaining[slots] > 0)
        length, last_token = state.length[slots], state.last_token[slots]
        drafts = state.drafts[slots, :m]
        probs = None if state.draft_probs is None else state.draft_probs[slots, :m]
        tokens = jnp.concatenate([last_token[:, None], jnp.maximum(drafts, 0)], axis=1)
        end = jnp.where(active, length + 1 + m, 0)
        options = jax.tree.map(lambda x: x[slots], state.options)
        return cls(active, length, last_token, Drafts(drafts, probs), tokens, end, options)


def keep_prefilled(
    params: Params,
    state: Slots,
    rows: PrefillRows,
    part: RaggedBatch,
    hidden: jax.Array,
    cfg: ModelConfig,
    config: DecodeConfig,
) -> Slots:
    """Runs the modules over prompt rows and keeps the hidden states that drafting needs again."""
    spec = config.spec
    if not spec.depths:
        return state
    with jax.named_scope("mtp/prefill"):
        following = rows.following.reshape(-1, spec.depths)
        cache, loads = extend(
            params,
            state.cache,
            part,
            following,
            hidden,
            cfg=cfg,
            spec=spec,
            loads=None if state.mtp_loads is None else state.mtp_loads[0],
            **config.how,
        )
    state = _with_mtp_loads(state, loads)
    batch = rows.token_ids.shape[0]
    slots = jnp.minimum(rows.slots, state.count - 1)
    both = jnp.concatenate(
        [state.hidden_tail[slots], hidden.reshape(batch, -1, hidden.shape[-1])], 1
    )
    newest = rows.query_lens[:, None] + jnp.arange(spec.tail)
    tail = jnp.take_along_axis(both, newest[:, :, None], axis=1)
    hidden_tail = state.hidden_tail.at[rows.slots].set(tail, mode="drop")
    return dataclasses.replace(state, cache=cache, hidden_tail=hidden_tail)


def _accept_and_draft(
    params: Params,
    state: Slots,
    decode: DecodeRows,
    rows: _Rows,
    hidden: jax.Array,
    cfg: ModelConfig,
    config: DecodeConfig,
) -> tuple[Slots, StepOutput]:
    spec, options = config.spec, rows.options
    m, active, batch = spec.drafts, rows.active, rows.tokens.shape[0]
    slots = jnp.minimum(decode.slots, state.count - 1)
    target = jnp.where(active, decode.slots, state.count)  # idle rows write nothing
    with jax.named_scope("accept"):
        raw = head(params, hidden, cfg=cfg, sharding=config.sharding)
        logits = raw
        if options.logits is not None and config.extras:
            assert state.said is not None
            logits = adjust(
                raw,
                options.logits,
                state.said,
                slots,
                rows.tokens,
                rows.length + 1,
                options.stop_ids,
            )
        uniforms = step_uniforms(options.sampling.seed, rows.length + 1, m)
        probs = distribution(logits, options.sampling, config.truncate)
        thinking = state.thinking[slots]
        if config.synthetic is not None:
            ruled = accept_synthetic(
                rows.drafts.tokens, probs, uniforms.accept, uniforms.final, config.synthetic.rates
            )
        else:
            ruled = accept_rows(
                options.rules,
                logits,
                probs,
                rows.drafts.tokens,
                rows.drafts.probs,
                uniforms.accept,
                uniforms.final,
                thinking,
                think=config.think,
                names=config.rules,
            )
        kept, finished = truncate_at_stop(
            ruled, options.stop_ids, jnp.where(active, state.remaining[slots], 0)
        )
        count = kept.count
        shared = jnp.zeros((batch, m), jnp.float32)
        if rows.drafts.probs is not None and "hybrid" in config.rules:  # who tunes by it
            shared = overlap(probs, rows.drafts.probs)
    newest = jnp.maximum(count - 1, 0)
    length, going = rows.length + count, active & ~finished
    hidden_all = jnp.concatenate([state.hidden_tail[slots], hidden], axis=1)
    tokens_all = jnp.concatenate([state.token_tail[slots], kept.tokens], axis=1)
    window = Window(hidden_all, tokens_all, spec.tail + newest, jnp.where(going, rows.end, 0))

    def draw(depth: jax.Array | int, entropy: jax.Array) -> typing.Any:
        return draft_sampling(options.rules, options.sampling, depth, entropy, decode.draft_scale)

    drafts, (cache, loads) = propose(
        params,
        state.cache,
        decode.page_table,
        window,
        draw,
        step_uniforms(options.sampling.seed, length + 1, m).draft,
        cfg=cfg,
        spec=spec,
        truncate=config.truncate,
        sharding=config.sharding,
        loads=None if state.mtp_loads is None else state.mtp_loads[0],
        **config.how,
    )
    state = _with_mtp_loads(state, loads)
    allowed = jnp.arange(m) < options.draft_limit[:, None]
    tail = count[:, None] + jnp.arange(spec.tail)
    put = _put_at(target)
    draft_probs = state.draft_probs
    if drafts.probs is not None and draft_probs is not None:
        draft_probs = draft_probs.at[target, :m].set(drafts.probs, mode="drop")
    next_drafts = jnp.where(allowed, drafts.tokens, -1)
    unused = ((0, 0), (0, state.drafts.shape[1] - m))
    said, found = state.said, None
    if options.logits is not None and config.extras:
        assert said is not None
        said = count_said(said, options.logits, target, kept.tokens, count)
        found = logprobs(raw, kept.tokens, options.logits.logprobs & active)
    new_state = dataclasses.replace(
        state,
        cache=cache,
        length=put(state.length, length),
        last_token=put(state.last_token, kept.tokens[jnp.arange(batch), newest]),
        drafts=put(state.drafts, jnp.pad(next_drafts, unused, constant_values=-1)),
        draft_probs=draft_probs,
        hidden_tail=put(
            state.hidden_tail, jnp.take_along_axis(hidden_all, tail[:, :, None], axis=1)
        ),
        token_tail=put(state.token_tail, jnp.take_along_axis(tokens_all, tail, axis=1)),
        remaining=put(state.remaining, state.remaining[slots] - count),
        done=put(state.done, finished),
        thinking=put(state.thinking, thinking_after(thinking, kept.tokens, count, config.think)),
        said=said,
    )
    return new_state, StepOutput(
        tokens=kept.tokens,
        count=count,
        accepted=jnp.where(active, ruled.count - 1, 0),
        offered=jnp.where(active, (rows.drafts.tokens >= 0).sum(axis=1), 0).astype(jnp.int32),
        active=active,
        finished=active & finished,
        ties=_ties(logits, options.sampling.temperature, count),
        overlap=jnp.where((rows.drafts.tokens >= 0) & active[:, None], shared, 0),
        logprobs=found,
    )


def _put_at(target: jax.Array) -> typing.Any:
    return lambda old, new: old.at[target].set(new.astype(old.dtype), mode="drop")


def _ties(logits: jax.Array, temperature: jax.Array, count: jax.Array) -> jax.Array:
    best = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1)[..., None]
    second = jnp.max(jnp.where(first, -jnp.inf, logits), axis=-1)
    close = (best[..., 0] - second < TIE_GAP) & (temperature == 0)[:, None]
    return (close & (jnp.arange(logits.shape[1]) < count[:, None])).sum(axis=1).astype(jnp.int32)
