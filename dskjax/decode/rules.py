"""Each row of a batch by its own acceptance rule, in one program: the one place that chooses.

`RuleOptions` says what a request wants; `RuleRows` holds that for a batch, as arrays; `accept_rows`
verifies a step and `draft_sampling` says what the rows' drafts are drawn from. A rule is computed
only if a row of the batch asks for it. The rules themselves are in `dskjax.decode.acceptance`
(lossless) and `dskjax.decode.lossy`; simulated acceptance, in `dskjax.decode.synthetic`, is for
benchmarks.

The hybrid rule. Lossless part: drafts come from q at a temperature T_d of their own,

    T_d = clip(T c_depth (a + b H(q_1)), t_min, t_max),   T = 0 -> T_d = 0,

and are verified as a block (arXiv 2403.10444). T_d may depend on whatever is known before the draft
is drawn: the request's temperature T, the depth, the entropy (nats) of the drafter's first law at
temperature 1, and factors c that `dskjax.decode.tuner` learns. The text keeps the target's law
because the q of the test is the array that the draft was drawn from. Lossy part, with a lenience
below 1: a row that begins the step inside thinking is verified leniently in its thinking slots and
by rejection in later ones. Which of the two a row gets must not depend on its drafts, so a row that
begins outside is verified as a block to the end of the step, whatever it drafts.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dskjax.decode.acceptance import Accepted, block, rejection, strict
from dskjax.decode.lossy import lenient, relaxed, typical
from dskjax.decode.phase import ThinkIds, thinking_after, thinking_slots
from dskjax.decode.rule_options import RULE_NAMES, RuleName, RuleOptions
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.synthetic import SyntheticAcceptance, accept_synthetic

__all__ = [
    "RULE_NAMES",
    "RuleName",
    "RuleOptions",
    "RuleRows",
    "SyntheticAcceptance",
    "ThinkIds",
    "accept_rows",
    "accept_synthetic",
    "draft_sampling",
    "overlap",
    "thinking_after",
    "thinking_slots",
]

_STRICT, _REJECTION, _BLOCK, _TYPICAL, _RELAXED, _HYBRID = range(len(RULE_NAMES))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class RuleRows:
    """The rule of each row of a batch; a pytree of [B] arrays, so one graph serves any mix.

    The fields and dtypes are those of `RuleOptions.row`, so that a slot of a batch can be written
    on the host.

    Attributes:
        rule: i32, index into `RULE_NAMES`.
        typical_eps, typical_delta: f32.
        relaxed_top_n: i32.
        relaxed_delta: f32.
        lenience: f32.
        draft_a, draft_b, draft_t_min, draft_t_max: f32.
    """

    rule: Int[Array, " B"]
    typical_eps: Float[Array, " B"]
    typical_delta: Float[Array, " B"]
    relaxed_top_n: Int[Array, " B"]
    relaxed_delta: Float[Array, " B"]
    lenience: Float[Array, " B"]
    draft_a: Float[Array, " B"]
    draft_b: Float[Array, " B"]
    draft_t_min: Float[Array, " B"]
    draft_t_max: Float[Array, " B"]

    @classmethod
    def make(cls, batch: int, options: RuleOptions | Sequence[RuleOptions]) -> "RuleRows":
        """Rows for a batch from one rule for all, or one a row.

        Raises:
            ValueError: a sequence is not `batch` long, or `batch` is negative.
        """
        every = [options] * batch if isinstance(options, RuleOptions) else list(options)
        if batch < 0 or len(every) != batch:
            raise ValueError(f"{len(every)} rules for {batch=} rows: give one, or one a row")
        rows = [option.row() for option in every]
        kinds = RuleOptions(name="strict").row()
        columns = {
            name: jnp.asarray(np.array([row[name] for row in rows], kind.dtype))
            for name, kind in kinds.items()
        }
        return cls(**columns)


def accept_rows(
    rows: RuleRows,
    raw_logits: Float[Array, "B n X"],
    p: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    q: Float[Array, "B m X"] | None,
    u_accept: Float[Array, "B m"],
    u_final: Float[Array, "B n"],
    thinking: Bool[Array, " B"],
    *,
    think: ThinkIds,
    names: Sequence[str] = RULE_NAMES,
) -> Accepted:
    """Verifies a step's drafts, every row by its own rule; n = m + 1, and m may be 0.

    A greedy row (one-hot p) comes out alike under every lossless rule, and under typical.

    Args:
        rows: the rules.
        raw_logits: target logits, after penalties and bias and before temperature; relaxed rows
            look at nothing else.
        p: target laws, `sampling.distribution` of those logits.
        drafts: i32; -1 is no draft, and there is none after it.
        q: the very arrays that the drafts were drawn from; anything where there is no draft. None
            means argmax drafts.
        u_accept: tests the drafts, fresh in each step.
        u_final: draws the target's own token.
        thinking: phase before the step's first token.
        think: ids of the markers; static. They turn the phase inside the step.
        names: the rules that rows may ask for; static. Others are left out of the program.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if raw_logits.shape != p.shape:
        raise ValueError(f"raw_logits has shape {raw_logits.shape} and p {p.shape}: give one shape")
    if unknown := set(names) - set(RULE_NAMES):
        raise ValueError(f"unknown rules {sorted(unknown)}; choose of {', '.join(RULE_NAMES)}")
    vocab = p.shape[-1]
    there = (drafts >= 0) & (drafts < vocab)
    there = jnp.cumprod(there.astype(jnp.int32), axis=1).astype(bool)
    drafts = jnp.where(there, drafts, -1).astype(jnp.int32)
    # A draft that is not there has q = 0: then the rules verify the row as if m were smaller.
    q = jax.nn.one_hot(drafts, vocab, dtype=p.dtype) if q is None else q
    q = jnp.where(there[..., None], q, 0)
    slots = thinking_slots(thinking, drafts, think)
    is_lenient = (rows.rule == _HYBRID) & (rows.lenience < 1) & thinking
    is_block = (rows.rule == _BLOCK) | ((rows.rule == _HYBRID) & ~is_lenient)

    choices: list[tuple[set[str], Array, Callable[[], Accepted]]] = [
        ({"strict"}, rows.rule == _STRICT, lambda: strict(p, drafts, q, u_accept, u_final)),
        (
            {"rejection"},
            rows.rule == _REJECTION,
            lambda: rejection(p, drafts, q, u_accept, u_final),
        ),
        ({"block", "hybrid"}, is_block, lambda: block(p, drafts, q, u_accept, u_final)),
        (
            {"hybrid"},
            is_lenient,
            lambda: lenient(p, drafts, q, u_accept, u_final, slots, lenience=rows.lenience),
        ),
        (
            {"typical"},
            rows.rule == _TYPICAL,
            lambda: typical(p, drafts, u_final, eps=rows.typical_eps, delta=rows.typical_delta),
        ),
        (
            {"relaxed"},
            rows.rule == _RELAXED,
            lambda: relaxed(
                raw_logits, drafts, slots, top_n=rows.relaxed_top_n, delta=rows.relaxed_delta
            ),
        ),
    ]
    out = Accepted(
        tokens=jnp.zeros(u_final.shape, jnp.int32), count=jnp.ones(drafts.shape[:1], jnp.int32)
    )
    possible = [(asked, rule) for users, asked, rule in choices if users & set(names)]
    for asked, rule in possible:
        out = _where_asked(asked, rule, out, always=len(possible) == 1)
    return out


def _where_asked(
    asked: Array, rule: Callable[[], Accepted], out: Accepted, *, always: bool
) -> Accepted:
    """`out` with the rows that ask for `rule` replaced by its answer. Computed if any row does; a
    branch makes a GPU wait for the host, so `always` computes it in any case.
    """

    def run() -> Accepted:
        new = rule()
        return Accepted(
            tokens=jnp.where(asked[:, None], new.tokens, out.tokens),
            count=jnp.where(asked, new.count, out.count),
        )

    return run() if always else jax.lax.cond(jnp.any(asked), run, lambda: out)


def draft_sampling(
    rows: RuleRows,
    sampling: SamplingParams,
    depth: int | Int[Array, ""],
    entropy_first: Float[Array, " B"],
    scale: Float[Array, " m"],
) -> SamplingParams:
    """What the drafts of one depth are drawn with.

    strict, typical and relaxed rows draft the argmax (temperature 0); rejection and block rows draw
    with the request's own parameters; hybrid rows too, but at the temperature T_d of this module's
    opening. The q handed to `accept_rows` must be `distribution` of the result.

    Args:
        rows: the rules.
        sampling: the requests' parameters.
        depth: which draft of the step, from 0.
        entropy_first: f32, nats: entropy of the softmax of the drafter's logits for the *first*
            draft, known before any draft of the step is drawn.
        scale: f32, the factors c by depth.
    """
    wanted = sampling.temperature
    factor = scale[depth] * (rows.draft_a + rows.draft_b * entropy_first)
    own = jnp.clip(wanted * factor, rows.draft_t_min, rows.draft_t_max)
    own = jnp.where(wanted > 0, own, 0)
    is_drawn = (rows.rule == _REJECTION) | (rows.rule == _BLOCK)
    temperature = jnp.where(rows.rule == _HYBRID, own, jnp.where(is_drawn, wanted, 0))
    return dataclasses.replace(sampling, temperature=temperature.astype(wanted.dtype))


def overlap(p: Float[Array, "B n X"], q: Float[Array, "B m X"]) -> Float[Array, "B m"]:
    """sum_x min(p_i, q_i) = 1 - TV: how often rejection would accept draft i; n > m.

    Slot i of p is conditional on the drafts before it, so a mean over steps must leave out the
    slots after the first rejected draft, and those without a draft.
    """
    return jnp.sum(jnp.minimum(p[:, : q.shape[1]], q), axis=-1)
