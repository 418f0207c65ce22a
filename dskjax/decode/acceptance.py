"""Acceptance rules of speculative decoding: which drafts stay, and the token that follows them.

A rule is a pure function `rule(p, drafts, q, u_accept, u_final) -> Accepted`, all randomness
explicit, so that tests can enumerate its output law. For a step with m drafts d_1..d_m after a
prefix:

    p         [B, m+1, X]  target distributions, tempered and truncated (`sampling.distribution`);
                           row i is the law of slot i given the prefix and the drafts before it
    drafts    [B, m]       draft tokens
    q         [B, m, X]    the distributions the drafts were drawn from: the same arrays, summing
                           to 1; None = argmax drafts, whose law is one-hot
    u_accept  [B, m]       uniforms in [0, 1) that test the drafts
    u_final   [B, m+1]     uniforms in [0, 1) for the target's own token; the one emitted at slot i
                           uses u_final[:, i]

All three are lossless: the emitted tokens follow the target law exactly
(`tests/decode/test_acceptance.py` proves it by enumeration), *provided* q is the law of the draft
and the uniforms are fresh in each step (`sampling.Use`). m is static and may be 0, when every rule
is `sample(p, u_final)`.

A row with fewer drafts than m: put zeros in q from its first missing slot on (with q=None: a draft
outside [0, X)). Such a draft is never accepted and its residual is p, so the row is verified
exactly as if m were smaller. `strict` compares tokens only, so there whatever stands in the slot is
a draft like any other.

Sources: `strict` is plain sampling; `rejection` is Leviathan et al. 2023 (arXiv 2211.17192) and
Chen et al. 2023 (arXiv 2302.01318); `block` is Sun et al., block verification (arXiv 2403.10444).
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dskjax.decode.sampling import sample

Rule = Literal["strict", "rejection", "block"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Accepted:
    """What a step emits.

    Attributes:
        tokens: i32 [B, m+1]; the first `count` are accepted drafts and one token from the target,
            the rest is 0.
        count: i32 [B]; tokens emitted, 1 to m+1 from a rule (`truncate_at_stop` may lower it, to 0
            at the least).
    """

    tokens: Int[Array, "B n"]
    count: Int[Array, " B"]


def strict(
    p: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    q: Float[Array, "B m X"] | None,
    u_accept: Float[Array, "B m"],
    u_final: Float[Array, "B n"],
) -> Accepted:
    """Token by token: y_i = sample(p_i, u_final_i); drafts stay while they equal y.

    Emits y_1, y_2, .. whatever the drafts were, hence the same tokens as without speculation. `q`
    and `u_accept` are not used. Accepts with probability sum_x q(x) p(x).
    """
    _check(p, drafts, q, u_accept, u_final)
    chosen = sample(p, u_final)
    accepted = _leading(chosen[:, :-1] == drafts)
    slots = jnp.arange(chosen.shape[1])
    # A draft that stays equals `chosen`, so one array holds both.
    return Accepted(tokens=jnp.where(slots <= accepted[:, None], chosen, 0), count=accepted + 1)


def rejection(
    p: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    q: Float[Array, "B m X"] | None,
    u_accept: Float[Array, "B m"],
    u_final: Float[Array, "B n"],
) -> Accepted:
    """Speculative sampling: accept d with min(1, p(d)/q(d)), else norm(max(p - q, 0)) and stop.

    Accepts with probability sum_x min(p, q)(x) = 1 - TV(p, q), the most that one draft a position
    allows.
    """
    _check(p, drafts, q, u_accept, u_final)
    q = _draft_law(p, drafts, q)
    accepted = _leading(u_accept < rejection_accept_probs(p, drafts, q))
    return _emit(drafts, accepted, rejection_residual(p, drafts, q, accepted), u_final)


def block(
    p: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    q: Float[Array, "B m X"] | None,
    u_accept: Float[Array, "B m"],
    u_final: Float[Array, "B n"],
) -> Accepted:
    """Block verification: accepts the longest prefix d_1..d_i whose own test u_i < h_i passes.

    Tests are independent and a failed early one does not end the block; never fewer tokens in
    expectation than `rejection`. Because it looks at every test, a later step must not see any of
    these uniforms again (`sampling.Use`).
    """
    _check(p, drafts, q, u_accept, u_final)
    q = _draft_law(p, drafts, q)
    passed = u_accept < block_accept_probs(p, drafts, q)
    lengths = jnp.arange(1, drafts.shape[1] + 1, dtype=jnp.int32)
    accepted = jnp.max(jnp.where(passed, lengths, 0), axis=1, initial=0)
    return _emit(drafts, accepted, block_residual(p, drafts, q, accepted), u_final)


RULES: dict[Rule, Callable[..., Accepted]] = {
    "strict": strict,
    "rejection": rejection,
    "block": block,
}
LOSSLESS: frozenset[Rule] = frozenset({"strict", "rejection", "block"})


def rejection_accept_probs(
    p: Float[Array, "B n X"], drafts: Int[Array, "B m"], q: Float[Array, "B m X"]
) -> Float[Array, "B m"]:
    """min(1, p_i(d_i) / q_i(d_i)): P(draft i stays), given that those before it did."""
    return jnp.minimum(_ratios(p, drafts, q), 1)


def rejection_residual(
    p: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    q: Float[Array, "B m X"],
    accepted: Int[Array, " B"],
) -> Float[Array, "B X"]:
    """Law of the token after `accepted` (0..m) drafts: norm(max(p - q, 0)) there, p after all m."""
    return _residual(p, q, accepted, jnp.ones(accepted.shape, p.dtype))


def block_accept_probs(
    p: Float[Array, "B n X"], drafts: Int[Array, "B m"], q: Float[Array, "B m X"]
) -> Float[Array, "B m"]:
    """h_1..h_m of block verification.

    With pi_0 = 1, pi_i = min(1, pi_{i-1} p_i(d_i) / q_i(d_i)) and S_i = sum_x max(pi_i p_{i+1}(x) -
    q_{i+1}(x), 0): h_i = S_i / (S_i + 1 - pi_i) for i < m, h_m = pi_m. 0/0 (S_i = 0 and pi_i = 1:
    the next p and q are equal) is 1.
    """
    m = drafts.shape[1]
    if m == 0:
        return jnp.zeros(drafts.shape, p.dtype)
    pi = _prefix_ratios(p, drafts, q)
    inner = pi[:, 1:m]
    gain = jnp.sum(jnp.maximum(inner[..., None] * p[:, 1:m] - q[:, 1:], 0), axis=-1)
    h = jnp.where(gain > 0, gain / jnp.where(gain > 0, gain + (1 - inner), 1), inner >= 1)
    return jnp.concatenate([h, pi[:, m:]], axis=1)


def block_residual(
    p: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    q: Float[Array, "B m X"],
    accepted: Int[Array, " B"],
) -> Float[Array, "B X"]:
    """Law of the token after `accepted` (0..m) drafts: norm(max(pi p - q, 0)), p after all m."""
    pi = _prefix_ratios(p, drafts, q)
    return _residual(p, q, accepted, jnp.take_along_axis(pi, accepted[:, None], axis=1)[:, 0])


def truncate_at_stop(
    accepted: Accepted, stop_ids: Int[Array, "B S"], limit: Int[Array, " B"]
) -> tuple[Accepted, Bool[Array, " B"]]:
    """Ends a row at its first stop token (eos), still emitted, or at its token budget.

    Drafts accepted after a stop are not part of the text: they must reach neither the output nor
    the cached length, so use the returned `count` for both.

    Args:
        accepted: what the rule gave.
        stop_ids: ids that end each row; -1 fills unused places.
        limit: i32 [B], tokens the row may still emit; 0 or less emits nothing (an idle row).

    Returns:
        The shortened step, and `finished` [B]: a stop was emitted or nothing is left of the limit.
    """
    slots = jnp.arange(accepted.tokens.shape[1], dtype=jnp.int32)
    budget = jnp.minimum(accepted.count, jnp.maximum(limit, 0)).astype(jnp.int32)
    is_stop = jnp.any(accepted.tokens[:, :, None] == stop_ids[:, None, :], axis=-1)
    is_stop &= slots < budget[:, None]  # what is beyond the count is padding, whatever its value
    ended = jnp.any(is_stop, axis=1)
    count = jnp.where(ended, jnp.argmax(is_stop, axis=1).astype(jnp.int32) + 1, budget)
    tokens = jnp.where(slots < count[:, None], accepted.tokens, 0)
    return Accepted(tokens=tokens, count=count), ended | (count >= limit)


def _check(p: Array, drafts: Array, q: Array | None, u_accept: Array, u_final: Array) -> None:
    """Shapes are static: a mix-up of m and m+1 is caught when tracing, type hook or not."""
    batch, slots, vocab = p.shape
    m = slots - 1
    want: dict[str, tuple[int, ...]] = {
        "drafts": (batch, m),
        "u_accept": (batch, m),
        "u_final": (batch, slots),
    }
    have = {"drafts": drafts.shape, "u_accept": u_accept.shape, "u_final": u_final.shape}
    if q is not None:
        want["q"], have["q"] = (batch, m, vocab), q.shape
    wrong = [f"{k} {have[k]} instead of {want[k]}" for k in want if have[k] != want[k]]
    if wrong or m < 0:
        raise ValueError(
            f"p has shape {p.shape} = [B, m+1, X], but {', '.join(wrong) or 'm is negative'}: "
            "give p one row more than there are drafts (row m is the bonus token's law)"
        )


def _draft_law(p: Array, drafts: Array, q: Array | None) -> Array:
    return jax.nn.one_hot(drafts, p.shape[-1], dtype=p.dtype) if q is None else q


def _leading(flags: Array) -> Array:
    """How many flags of each row are set before the first that is not; i32 [B]."""
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def _ratios(p: Array, drafts: Array, q: Array) -> Array:
    """p_i(d_i) / q_i(d_i), finite; 0 if d cannot have been drafted (q(d) = 0, or no token)."""
    m, vocab = drafts.shape[1], p.shape[-1]
    index = jnp.clip(drafts, 0, vocab - 1)[..., None]
    p_d = jnp.take_along_axis(p[:, :m], index, axis=2)[..., 0]
    q_d = jnp.take_along_axis(q, index, axis=2)[..., 0]
    possible = (q_d > 0) & (drafts >= 0) & (drafts < vocab)
    ratio = jnp.where(possible, p_d / jnp.where(possible, q_d, 1), 0)
    return jnp.minimum(ratio, jnp.finfo(p.dtype).max)  # inf * 0 would be NaN in the running product


def _prefix_ratios(p: Array, drafts: Array, q: Array) -> Array:
    """pi_0..pi_m of block verification, [B, m+1]."""
    ratios = _ratios(p, drafts, q)
    pi = [jnp.ones(drafts.shape[:1], p.dtype)]
    for i in range(drafts.shape[1]):
        pi.append(jnp.minimum(pi[-1] * ratios[:, i], 1))
    return jnp.stack(pi, axis=1)


def _residual(p: Array, q: Array, accepted: Array, weight: Array) -> Array:
    """norm(max(weight p - q, 0)) at slot `accepted`; p itself after all drafts.

    Also p where the difference is zero everywhere. Exact arithmetic never stops there (p = q is
    always accepted), so what rounding sends there, once in 2**24 tests or so, gets the target's own
    law.
    """
    m = q.shape[1]
    if m == 0:
        return p[:, 0]
    p_row = jnp.take_along_axis(p, accepted[:, None, None], axis=1)[:, 0]
    q_row = jnp.take_along_axis(q, jnp.minimum(accepted, m - 1)[:, None, None], axis=1)[:, 0]
    excess = jnp.maximum(weight[:, None] * p_row - q_row, 0)
    total = jnp.sum(excess, axis=1, keepdims=True)
    usable = (total > 0) & (accepted < m)[:, None]
    return jnp.where(usable, excess / jnp.where(usable, total, 1), p_row)


def _emit(drafts: Array, accepted: Array, law: Array, u_final: Array) -> Accepted:
    """The accepted drafts, then one token of `law` drawn with the uniform of its own slot."""
    last = sample(law, jnp.take_along_axis(u_final, accepted[:, None], axis=1)[:, 0])
    slots = jnp.arange(u_final.shape[1])
    padded = jnp.pad(drafts.astype(jnp.int32), ((0, 0), (0, 1)))
    tokens = jnp.where(slots == accepted[:, None], last[:, None], padded)
    return Accepted(tokens=jnp.where(slots <= accepted[:, None], tokens, 0), count=accepted + 1)
