"""Device state of the sequences that decode together: one slot each, resident from step to step.

A step names the slots it runs (`DecodeRows`, `PrefillRows`); the other slots keep their state. The
host writes a slot once, when a sequence takes it (`admit`), and never reads it back: tokens,
lengths and drafts go from step to step on the device.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dskjax.config import ModelConfig
from dskjax.decode.draft import DraftSpec
from dskjax.decode.logits import LogitRows, Said
from dskjax.decode.rules import RuleOptions, RuleRows
from dskjax.decode.sampling import SamplingParams
from pallas_kernels import LatentCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class RowOptions:
    """What a request asked for, [S] arrays; written when its slot is taken.

    Attributes:
        sampling: temperature and truncation.
        rules: acceptance rule and its parameters.
        logits: penalties, biases, log-probabilities; None where the program has no such features.
        stop_ids: i32 [S, N], ids that end the sequence; -1 is unused.
        draft_limit: i32 [S], most drafts a step.
    """

    sampling: SamplingParams
    rules: RuleRows
    logits: LogitRows | None
    stop_ids: Int[Array, "S N"]
    draft_limit: Int[Array, " S"]

    @classmethod
    def make(
        cls,
        sampling: SamplingParams,
        *,
        accept: RuleOptions | Sequence[RuleOptions],
        drafts: int,
        stop_ids: Sequence[int] = (),
    ) -> "RowOptions":
        """The same rule, stop ids and draft limit for every row, without logit features."""
        rows = sampling.seed.shape[0]
        stops = jnp.asarray(list(stop_ids) or [-1], jnp.int32)
        return cls(
            sampling=sampling,
            rules=RuleRows.make(rows, accept),
            logits=None,
            stop_ids=jnp.broadcast_to(stops, (rows, stops.shape[0])),
            draft_limit=jnp.full(rows, drafts, jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Slots:
    """State of S slots. Donate it.

    Attributes:
        cache: the paged pool.
        length: i32 [S], n: tokens in the cache; the last token stands at position n.
        last_token: i32 [S].
        drafts: i32 [S, K], drafts for positions n + 1 .. n + K; -1 is none.
        draft_probs: f32 [S, K, X], what they were drawn from; None for argmax drafts.
        hidden_tail: [S, tail, D], trunk hidden states of the last anchors a chain computes again.
        token_tail: i32 [S, tail], the token after each of them.
        remaining: i32 [S], tokens the sequence may still emit.
        done: bool [S], ended; such a row is idle and touches nothing.
        thinking: bool [S], inside a thinking section.
        options: what each request asked for.
        said: token counts for penalties, or None.
        loads: i32 [1, L, E], how many rows chose each expert of each MoE layer since the start;
            None where nobody counts. With ranks: [R, L, E].
        mtp_loads: i32 [1 or R, M, E], the same of each MTP module; None also without drafts.
    """

    cache: LatentCache
    length: Int[Array, " S"]
    last_token: Int[Array, " S"]
    drafts: Int[Array, "S K"]
    draft_probs: Float[Array, "S K X"] | None
    hidden_tail: Float[Array, "S t D"]
    token_tail: Int[Array, "S t"]
    remaining: Int[Array, " S"]
    done: jax.Array
    thinking: jax.Array
    options: RowOptions
    said: Said | None
    loads: Int[Array, "R L E"] | None = None
    mtp_loads: Int[Array, "R M E"] | None = None

    @property
    def count(self) -> int:
        """S."""
        return self.length.shape[0]


def init_slots(
    cache: LatentCache,
    options: RowOptions,
    *,
    cfg: ModelConfig,
    spec: DraftSpec,
    dtype: Any,
    counters: int = 0,
) -> Slots:
    """Empty slots over a pool: all are done until something is admitted.

    Args:
        cache: the pool.
        options: one row a slot (any values will do; they are written again at admission).
        cfg: the model.
        spec: drafting with the most drafts any step will use.
        dtype: of hidden states.
        counters: ranks that count their experts' rows; 0 counts nothing.

    Raises:
        ValueError: the model has no experts to count for.
    """
    if counters and cfg.moe is None:
        raise ValueError("the model has no routed experts whose rows could be counted")
    slots = options.draft_limit.shape[0]
    loads = mtp_loads = None
    if counters and cfg.moe is not None:
        experts, modules = cfg.moe.n_routed_experts, cfg.mtp.num_nextn_predict_layers
        loads = jnp.zeros((counters, cfg.num_moe_layers, experts), jnp.int32)
        if spec.depths:
            mtp_loads = jnp.zeros((counters, modules, experts), jnp.int32)
    said = None
    if options.logits is not None:
        shape = (slots, cfg.vocab_size)
        said = Said(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    return Slots(
        cache=cache,
        length=jnp.zeros(slots, jnp.int32),
        last_token=jnp.zeros(slots, jnp.int32),
        drafts=jnp.full((slots, spec.drafts), -1, jnp.int32),
        draft_probs=jnp.zeros((slots, spec.drafts, cfg.vocab_size), jnp.float32)
        if spec.sampled
        else None,
        hidden_tail=jnp.zeros((slots, spec.tail, cfg.hidden_size), dtype),
        token_tail=jnp.zeros((slots, spec.tail), jnp.int32),
        remaining=jnp.zeros(slots, jnp.int32),
        done=jnp.ones(slots, bool),
        thinking=jnp.zeros(slots, bool),
        options=options,
        said=said,
        loads=loads,
        mtp_loads=mtp_loads,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Admission:
    """Sequences that take slots, [A] rows; a slot of S or more is padding.

    Attributes:
        slots: i32 [A].
        length: i32 [A], tokens that will be in the cache when the sequence first decodes: all that
            are known but the last.
        last_token: i32 [A], the last known token.
        token_tail: i32 [A, tail], the last known tokens, oldest first, `last_token` included.
        remaining: i32 [A].
        thinking: bool [A].
        options: RowOptions of [A] rows.
    """

    slots: Int[Array, " A"]
    length: Int[Array, " A"]
    last_token: Int[Array, " A"]
    token_tail: Int[Array, "A t"]
    remaining: Int[Array, " A"]
    thinking: jax.Array
    options: RowOptions


def admit(state: Slots, new: Admission) -> Slots:
    """Writes the slots of new sequences; their drafts are empty, their hidden tail is to come."""

    def put(old: jax.Array, value: jax.Array) -> jax.Array:
        return old.at[new.slots].set(value.astype(old.dtype), mode="drop")

    rows = new.slots.shape[0]
    return dataclasses.replace(
        state,
        length=put(state.length, new.length),
        last_token=put(state.last_token, new.last_token),
        drafts=put(state.drafts, jnp.full((rows, state.drafts.shape[1]), -1)),
        token_tail=put(state.token_tail, new.token_tail),
        remaining=put(state.remaining, new.remaining),
        done=put(state.done, jnp.zeros(rows, bool)),
        thinking=put(state.thinking, new.thinking),
        options=jax.tree.map(put, state.options, new.options),
    )


def set_said(
    state: Slots,
    slot: Int[Array, ""],
    counts: Int[Array, " X"],
    in_prompt: Array,
) -> Slots:
    """Writes the token counts of a slot whose request has penalties."""
    assert state.said is not None
    counts_sx = state.said.counts.at[slot].set(counts, mode="drop")
    prompt_sx = state.said.in_prompt.at[slot].set(in_prompt, mode="drop")
    return dataclasses.replace(state, said=Said(counts_sx, prompt_sx))


def stack_rows(rows: Sequence[Mapping[str, Any]], kind: type, size: int, **fixed: Any) -> Any:
    """A pytree of class `kind` with [size, ...] NumPy arrays from dicts of one row each; what is
    missing repeats the first row.
    """
    padded = [*rows, *[rows[0]] * (size - len(rows))]
    stacked = {name: np.stack([row[name] for row in padded]) for name in rows[0]}
    return kind(**stacked, **fixed)
