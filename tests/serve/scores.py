"""What the plain model says about the tokens of a prompt, and the check of what a server says."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from dskjax import model
from serve.plan import TokenLogprob
from tests.decode.plain import LONGEST
from tests.decode.toy import toy

ATOL = 1e-4
"""That of the log-probabilities of answers."""


@functools.cache
def _log_probs(modules: int):
    params, cfg = toy(modules)
    return jax.jit(lambda ids: jax.nn.log_softmax(model.apply(params, ids, cfg=cfg), axis=-1))


def exact(tokens: Sequence[int], modules: int) -> np.ndarray:
    """f32 [len(tokens), X], log-probabilities after each token, from one `dskjax.model.apply`."""
    padded = np.array([[*tokens, *[0] * (LONGEST - len(tokens))]], np.int32)
    return np.asarray(_log_probs(modules)(padded))[0, : len(tokens)]


def check_scores(
    found: Sequence[TokenLogprob], prompt: Sequence[int], best: int, modules: int
) -> None:
    """Every token of the prompt from the second on has its value and its best alternatives."""
    wanted = exact(prompt, modules)[:-1]
    assert len(found) == len(prompt) - 1
    for entry, row, token in zip(found, wanted, prompt[1:], strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=ATOL)
        order = np.argsort(-row)[:best].tolist()
        assert [id for id, _ in entry.top] == order
        np.testing.assert_allclose([value for _, value in entry.top], row[order], atol=ATOL)
