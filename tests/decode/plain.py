"""A request answered the slow way: the whole sequence again for every token, its law in NumPy."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dskjax import model
from dskjax.decode.sampling import Use, uniforms
from tests.decode.toy import toy
from tests.oracles.enumeration import truncated_distribution

LONGEST = 64
"""Most tokens of prompt and answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A request of the tests: names and defaults of `serve.request`."""

    prompt: Sequence[int]
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    stop_ids: Sequence[int] = ()
    min_tokens: int = 0
    logprobs: bool = False


@functools.cache
def _apply(modules: int):
    params, cfg = toy(modules)
    return jax.jit(lambda tokens: model.apply(params, tokens, cfg=cfg))


def logits_after(tokens: Sequence[int], modules: int = 3) -> np.ndarray:
    """f32 [X], the model's logits of the token that follows."""
    padded = jnp.asarray([[*tokens, *[0] * (LONGEST - len(tokens))]], jnp.int32)
    return np.asarray(_apply(modules)(padded)[0, len(tokens) - 1])


def adjusted(logits: np.ndarray, ask: Ask, answer: Sequence[int]) -> np.ndarray:
    """One token's logits under the ask's penalties, biases and forbidden stops, id by id."""
    out = np.array(logits, np.float64)
    for token in range(len(out)):
        count = list(answer).count(token)
        if count or token in ask.prompt:
            out[token] = (
                out[token] / ask.repetition if out[token] > 0 else out[token] * (ask.repetition)
            )
        if count:
            out[token] -= ask.presence + count * ask.frequency
        out[token] += ask.bias.get(token, 0.0)
        if len(answer) < ask.min_tokens and token in ask.stop_ids:
            out[token] = -np.inf
    return out


@functools.cache
def _finals(seed: int) -> np.ndarray:
    positions = jnp.arange(LONGEST + 1, dtype=jnp.int32)[None]
    return np.asarray(uniforms(jnp.asarray([seed], jnp.uint32), positions, Use.FINAL))[0]


def answer(ask: Ask, modules: int = 3) -> list[int]:
    """The tokens that any correct program gives under greedy or `strict` decoding."""
    tokens, start = list(ask.prompt), len(ask.prompt)
    while len(tokens) - start < ask.max_tokens:
        logits = adjusted(logits_after(tokens, modules), ask, tokens[start:])
        probs = truncated_distribution(
            logits, ask.temperature, top_k=ask.top_k, top_p=ask.top_p, min_p=ask.min_p
        )
        point = _finals(ask.seed)[len(tokens)] * probs.sum()
        tokens.append(int(np.flatnonzero((np.cumsum(probs) > point) & (probs > 0))[0]))
        if tokens[-1] in ask.stop_ids:
            break
    return tokens[start:]


def logprobs(ask: Ask, said: Sequence[int], modules: int = 3) -> np.ndarray:
    """f32 [len(said), X], the model's own log-probabilities at each token of an answer."""
    rows = []
    for at in range(len(said)):
        logits = logits_after([*ask.prompt, *said[:at]], modules).astype(np.float64)
        shifted = logits - logits.max()
        rows.append(shifted - np.log(np.exp(shifted).sum()))
    return np.array(rows, np.float32)
