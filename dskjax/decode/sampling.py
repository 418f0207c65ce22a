"""From logits and a request's sampling parameters to a token, with the randomness passed in.

Three pure parts: `distribution` (logits -> the probabilities that are sampled from), `sample`
(probabilities and an explicit uniform -> a token), and the uniforms. The target model, the draft
head and the acceptance rules all use these same three, so that the q handed to a rule is the very
array its draft was drawn from. Which of a step's tokens survive is left to
`dskjax.decode.acceptance`.

A uniform is a pure function of (seed, position, use), never of the batch, the slot or the device: a
request gives the same tokens whatever it shares a batch with. See `Use` for what has to be
independent of what, and why.
"""

import dataclasses
import enum
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class SamplingParams:
    """How each row of a batch is sampled; a pytree of [B] arrays, so one graph serves any mix.

    Attributes:
        temperature: f32 [B]; 0 is greedy, and then the four others do not matter.
        top_p: f32 [B] in [0, 1]; 1 is off.
        top_k: i32 [B]; 0 is off, as is anything from the vocabulary's size on.
        min_p: f32 [B] in [0, 1]; 0 is off.
        seed: u32 [B]; rows with one seed and one prompt give the same text.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt[Array, " B"]

    @classmethod
    def make(
        cls,
        batch: int,
        *,
        temperature: float | Sequence[float] = 1.0,
        top_p: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> "SamplingParams":
        """Builds parameters for `batch` rows from scalars (the same for all) or one value a row.

        Raises:
            ValueError: a value is out of range or of the wrong kind, or a sequence is not `batch`
            long.
        """

        def column(name: str, value: Any, dtype: Any, low: float, high: float, fix: str) -> Array:
            values = np.asarray(value)
            if values.shape not in ((), (batch,)):
                raise ValueError(
                    f"{name} has shape {values.shape}: give one value, or {batch} (one a row)"
                )
            kinds = "iu" if np.dtype(dtype).kind in "iu" else "iuf"
            if values.dtype.kind not in kinds or not np.all((values >= low) & (values <= high)):
                raise ValueError(f"{name}={value!r}: {fix}")
            return jnp.asarray(np.broadcast_to(values.astype(dtype), (batch,)))

        if batch < 0:
            raise ValueError(f"{batch=} must be 0 or more rows")
        f32_max = float(np.finfo(np.float32).max)
        return cls(
            temperature=column(
                "temperature", temperature, np.float32, 0, f32_max, "use a finite number >= 0"
            ),
            top_p=column("top_p", top_p, np.float32, 0, 1, "use 0 to 1, where 1 turns it off"),
            top_k=column("top_k", top_k, np.int32, 0, 2**31 - 1, "use an integer >= 0 (0: off)"),
            min_p=column("min_p", min_p, np.float32, 0, 1, "use 0 to 1, where 0 turns it off"),
            seed=column("seed", seed, np.uint32, 0, 2**32 - 1, "use an integer in [0, 2**32)"),
        )


def distribution(
    logits: Float[Array, "B *T X"], params: SamplingParams, truncate: bool | None = None
) -> Float[Array, "B *T X"]:
    """Turns logits into the probabilities to sample from.

    Order: temperature -> top-k -> top-p -> min-p, that of Hugging Face `generate` (vLLM too tempers
    first and takes top-p inside top-k; it applies min-p before them, which differs only where min-p
    and top-p are both on). Temperature comes first so that top-p and min-p cut the distribution
    that is sampled. Top-p's mass is that of the tokens top-k left; min-p compares with the largest
    probability, which no cut changes.

    Ties are settled by id, so the result is deterministic: tokens are ranked by (logit down, id
    up), top-k keeps exactly k of them, top-p the shortest prefix with mass >= top_p (never less
    than one token). Temperature 0 gives an exact one-hot of the argmax, the lowest id on ties. No
    shape depends on data, and the sort runs only if a row needs it.

    Args:
        logits: [B, X] or [B, T, X], any float; -inf forbids a token, one logit of a row must be
            finite. NaN and +inf give NaN.
        params: per-row parameters, shared by the T positions of the row.
        truncate: static: whether any row may use top-k or top-p. None finds out at run time, which
            makes a GPU wait for the host.

    Returns:
        Probabilities in fp32 (fp64 for fp64 logits) that sum to 1; what was cut is exactly 0.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    vocab = logits.shape[-1]

    def per_row(x: Array) -> Array:
        return x.reshape(x.shape + (1,) * (logits.ndim - 1))

    greedy = per_row(params.temperature) <= 0
    # Subtract the maximum, then divide: a tiny temperature gives one-hot, never inf - inf.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(shifted / jnp.where(greedy, 1, per_row(params.temperature)))

    top_k, top_p = per_row(params.top_k), per_row(params.top_p)
    top_k = jnp.where(greedy | (top_k <= 0), vocab, jnp.minimum(top_k, vocab))
    top_p = jnp.where(greedy, 1, top_p)
    keep = _if_any(
        (top_k < vocab) | (top_p < 1) if truncate is None else truncate,
        lambda: _top_k_top_p_mask(logits, weights, top_k, top_p),
        lambda: jnp.ones(logits.shape, bool),
    )
    keep &= weights >= per_row(params.min_p)  # the largest weight is exactly 1
    weights = jnp.where(keep, weights, 0)
    probs = weights / jnp.sum(weights, axis=-1, keepdims=True)
    best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), vocab, dtype=probs.dtype)
    return jnp.where(greedy, best, probs)


def _if_any(
    asked: Array | bool, then: Callable[[], Array], otherwise: Callable[[], Array]
) -> Array:
    if isinstance(asked, bool):
        return then() if asked else otherwise()
    return jax.lax.cond(jnp.any(asked), then, otherwise)


def _top_k_top_p_mask(logits: Array, weights: Array, top_k: Array, top_p: Array) -> Array:
    """What survives top-k, then top-p: a prefix of the order (logit down, id up)."""
    vocab = logits.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    key, order, sorted_weights = jax.lax.sort((-logits, ids, weights), num_keys=1, is_stable=True)
    mass = jnp.cumsum(jnp.where(ids < top_k, sorted_weights, 0), axis=-1)
    # First crossing, not a count of crossings: a parallel cumsum in fp32 need not be monotone.
    length = 1 + jnp.argmax(mass >= top_p * mass[..., -1:], axis=-1, keepdims=True)
    length = jnp.minimum(jnp.where(top_p < 1, length, vocab), top_k)
    last_key = jnp.take_along_axis(key, length - 1, axis=-1)
    last_id = jnp.take_along_axis(order, length - 1, axis=-1)
    return (-logits < last_key) | ((-logits == last_key) & (ids <= last_id))


def sample(probs: Float[Array, "*S X"], u: Float[Array, "*S"]) -> Int[Array, "*S"]:
    """Inverse CDF: the first token whose cumulative probability exceeds u times the total.

    `probs` need not be normalised. A token of zero probability is never returned, whatever u in [0,
    1) and the rounding do: only tokens of the support can be hit, and if u * total rounds up to the
    total, the last of them is. (A parallel cumsum may step up at a zero, so comparing with it alone
    is not enough.) An all-zero row, which has no answer, gives token X-1.

    Args:
        probs: [..., X], non-negative.
        u: [...], in [0, 1).

    Returns:
        int32 [...].
    """
    vocab = probs.shape[-1]
    cdf = jnp.cumsum(probs, axis=-1)
    support = probs > 0
    hit = support & (cdf > u[..., None] * cdf[..., -1:])
    last = vocab - 1 - jnp.argmax(support[..., ::-1], axis=-1)
    return jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last).astype(jnp.int32)


class Use(enum.IntEnum):
    """What a uniform is for. Position p means the p-th token of the request, prompt included.

    FINAL draws the token that the *target* puts at position p: the bonus token, the corrected token
    (residual), every token of the token-by-token rule, and the token of a step without drafts. It
    is keyed by (seed, p) alone, and exactly one such token per position is ever emitted. So the
    token-by-token rule emits `sample(p, u_final)` at every position whatever was drafted: with
    speculation it gives the very tokens it gives without, for any temperature and seed.

    DRAFT draws the draft for position p and ACCEPT tests it. Both are keyed by (seed, p, first
    position of the step), because a position can be drafted for in several steps: a step that emits
    fewer than m + 1 tokens leaves positions for which it drew and tested drafts. Block verification
    looks at *all* its tests (it emits little when the late ones failed too), so a later step that
    used the same draws again would use ones known to be unlucky, and the output law would shift. A
    step's first position never repeats, hence each draw is used in one step only.
    """

    DRAFT = 0
    ACCEPT = 1
    FINAL = 2


def uniforms(
    seed: UInt[Array, " B"],
    positions: Int[Array, "B n"],
    use: Use,
    start: Int[Array, " B"] | None = None,
) -> Float[Array, "B n"]:
    """Independent uniforms by counter: each depends on its seed, position, use and start only.

    Args:
        seed: u32 [B].
        positions: i32 [B, n], which token of the request the draw is for.
        use: what it is for; static.
        start: i32 [B], first position of the step. Required for DRAFT and ACCEPT, refused for FINAL
            (see `Use`).

    Returns:
        f32 [B, n], multiples of 2**-24 in [0, 1).

    Raises:
        ValueError: `start` is missing or not wanted.
    """
    if (start is None) != (use is Use.FINAL):
        fix = "leave start out" if use is Use.FINAL else "pass start, the step's first position"
        raise ValueError(f"{use!r} with start {'absent' if start is None else 'given'}: {fix}")

    use_bn = jnp.full(positions.shape, int(use), jnp.int32)
    start_bn = jnp.zeros_like(positions) + (0 if start is None else start[:, None])
    return _draw(seed, use_bn, positions, start_bn)


def _draw(seed: Array, use_bn: Array, positions_bn: Array, start_bn: Array) -> Array:
    def one(seed: Array, use: Array, position: Array, start: Array) -> Array:
        # threefry by name: tokens must not change with jax_default_prng_impl. (seed, use) is the
        # 64-bit key, and the two words of a folded key are themselves uniform bits.
        words = jnp.stack([seed, use.astype(seed.dtype)])
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, position), start)
        bits = jax.random.key_data(key)[0]
        return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)

    rows = jax.vmap(one, in_axes=(None, 0, 0, 0))
    return jax.vmap(rows)(seed, use_bn, positions_bn, start_bn)


class StepUniforms(NamedTuple):
    """All draws of one step with m drafts; slot i is for position start + i.

    `draft` f32 [B, m] draws the drafts, `accept` f32 [B, m] tests them, `final` f32 [B, m+1] draws
    the target's own token.
    """

    draft: Float[Array, "B m"]
    accept: Float[Array, "B m"]
    final: Float[Array, "B n"]


def step_uniforms(seed: UInt[Array, " B"], start: Int[Array, " B"], m: int) -> StepUniforms:
    """The uniforms of the step whose first new token has position `start`.

    The same values as `uniforms` gives for each use, drawn as one batch: a third of the code to
    compile.

    Args:
        seed: u32 [B].
        start: i32 [B], tokens the request has already (prompt and generated).
        m: drafts a row, static, >= 0.
    """
    slots = np.concatenate([np.arange(m), np.arange(m), np.arange(m + 1)])
    uses = np.repeat([Use.DRAFT, Use.ACCEPT, Use.FINAL], [m, m, m + 1])
    start_bn = jnp.where(uses == Use.FINAL, 0, start[:, None])
    positions_bn = start[:, None] + jnp.asarray(slots, start.dtype)
    use_bn = jnp.broadcast_to(jnp.asarray(uses, jnp.int32), positions_bn.shape)
    u = _draw(seed, use_bn, positions_bn, start_bn)
    return StepUniforms(draft=u[:, :m], accept=u[:, m : 2 * m], final=u[:, 2 * m :])
