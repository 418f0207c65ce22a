"""How far each acceptance rule bends the law of the text: total variation, measured.

On random models of a small vocabulary: a target law p and a drafter that resembles it. Drafts are
drawn as serving draws them, the rule runs on many rows with uniforms of their own, and the first
emitted tokens are counted and compared with p. A rule that is lossless shows the noise of counting
and nothing else; what a lossy one shows depends on how well the drafter knows the target, so the
figure is one of these models, not of any real one.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dskjax.decode.rules import (
    RuleOptions,
    RuleRows,
    ThinkIds,
    accept_rows,
    draft_sampling,
)
from dskjax.decode.sampling import SamplingParams, distribution, sample

VOCAB, DRAFTS, MODELS = 16, 2, 12
SPREAD, NOISE = 2.0, 1.0
"""Deviation of the target's logits, and of what the drafter adds to them."""


class Measured(NamedTuple):
    """Total variation between the first token's law and the target's, over the random models.

    Attributes:
        mean, largest: over models.
        noise: mean of the same figure for tokens drawn from the target itself.
    """

    mean: float
    largest: float
    noise: float


def measure_tv(
    rule: RuleOptions, temperature: float, *, samples: int = 1 << 16, seed: int = 0
) -> Measured:
    """Runs a rule on random models; rows are inside thinking, so that lossy rules are lossy.

    Args:
        rule: the rule.
        temperature: of the request; 0 is what relaxed is for.
        samples: rows of each model.
        seed: of models and rows.
    """
    found = []
    for index in range(MODELS):
        first, exact, own = _run(
            jax.random.key(seed + index), jnp.float32(temperature), rule=rule, samples=samples
        )
        p = np.asarray(exact, np.float64)
        laws = [np.bincount(np.asarray(x), minlength=VOCAB) / samples for x in (first, own)]
        found.append([0.5 * np.abs(law - p).sum() for law in laws])
    tv, noise = np.array(found).T
    return Measured(float(tv.mean()), float(tv.max()), float(noise.mean()))


def tv_rows(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`measure_tv` of the rules and temperatures of an acceptance report; relaxed at 0 alone."""
    rows = []
    for values in settings["rules"]:
        own = {k: v for k, v in values.items() if k not in ("name", "lossless")}
        text = values["name"] + ":" + ",".join(f"{k}={v}" for k, v in own.items())
        rule = RuleOptions.parse(text if own else values["name"])
        for t in [0.0] if rule.name == "relaxed" else settings["temperatures"]:
            found = measure_tv(rule, t)
            head = {"rule": rule.label, "lossless": rule.lossless, "temperature": t}
            rows.append(head | found._asdict())
    return rows


@functools.partial(jax.jit, static_argnames=("rule", "samples"))
def _run(
    key: jax.Array, temperature: jax.Array, *, rule: RuleOptions, samples: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(first token of each row, the target's law of it, tokens drawn from that law)."""
    keys = jax.random.split(key, 6)
    target = SPREAD * jax.random.normal(keys[0], (1, DRAFTS + 1, VOCAB))
    drafter = target[:, :DRAFTS] + NOISE * jax.random.normal(keys[1], (1, DRAFTS, VOCAB))
    logits = jnp.broadcast_to(target, (samples, DRAFTS + 1, VOCAB))
    sampling = SamplingParams(
        temperature=jnp.full(samples, temperature),
        top_p=jnp.ones(samples),
        top_k=jnp.zeros(samples, jnp.int32),
        min_p=jnp.zeros(samples),
        seed=jnp.zeros(samples, jnp.uint32),
    )
    rows = RuleRows.make(samples, rule)
    log_q = jax.nn.log_softmax(drafter[0, 0])
    entropy = jnp.full(samples, -jnp.sum(jnp.exp(log_q) * log_q))
    laws, drafts = [], []
    u_draft = jax.random.uniform(keys[2], (samples, DRAFTS))
    for depth in range(DRAFTS):
        how = draft_sampling(rows, sampling, depth, entropy, jnp.ones(DRAFTS))
        wide = jnp.broadcast_to(drafter[:, depth], (samples, VOCAB))
        laws.append(distribution(wide, how))
        drafts.append(sample(laws[-1], u_draft[:, depth]))
    p = distribution(logits, sampling)
    out = accept_rows(
        rows,
        logits,
        p,
        jnp.stack(drafts, axis=1),
        jnp.stack(laws, axis=1),
        jax.random.uniform(keys[3], (samples, DRAFTS)),
        jax.random.uniform(keys[4], (samples, DRAFTS + 1)),
        jnp.ones(samples, bool),
        think=ThinkIds(),
        names=(rule.name,),
    )
    own = sample(p[:, 0], jax.random.uniform(keys[5], (samples,)))
    return out.tokens[:, 0], p[0, 0], own
