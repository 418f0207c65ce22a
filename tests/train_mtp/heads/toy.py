"""A frozen toy trunk and recipes of heads over it."""

import dataclasses
import functools

import jax
import numpy as np

from dskjax.config import MtpConfig
from dskjax.model import init
from tests.train_mtp import toy
from train_mtp.heads.objective import Objective
from train_mtp.heads.recipe import HeadsRecipe
from train_mtp.heads.start import first_weights
from train_mtp.heads.step import teach
from train_mtp.optim import AdamW
from train_mtp.state import TrainState, make_state

TRUNK = toy.model(modules=1)


@functools.cache
def frozen():
    """Loud random weights, so that the trunk's law is far from uniform."""
    return jax.jit(lambda: init(TRUNK, jax.random.key(3), std=0.3))()


def recipe(weights="independent", depths=2, **changes) -> HeadsRecipe:
    mtp = MtpConfig(
        num_nextn_predict_layers=depths if weights == "independent" else 1,
        mtp_scheme="chain" if weights == "independent" else "recycled",
    )
    given = {
        "cfg": dataclasses.replace(TRUNK, mtp=mtp),
        "depths": depths,
        "weights": weights,
        "objective": Objective(ce=0.5, kl=0.5),
        "optimizer": AdamW(lr=2e-2, warmup=3, steps=60, weight_decay=0.0),
        "top_k": 16,
        "precision": "float32",
    }
    return HeadsRecipe(**{**given, **changes})


@functools.cache
def _first(of, init, seed):
    key = jax.random.key(seed)
    return make_state(of, first_weights, frozen(), key, trunk=TRUNK, recipe=of, init=init)


def state(of, init="random", seed=0) -> TrainState:
    """A copy, as a step takes it over: compiling the first weights takes longer than a step."""
    leave = lambda leaf: jax.device_put(np.array(leaf), leaf.sharding)  # noqa: E731
    return jax.tree.map(leave, _first(of, init, seed))


def taught(of, rows, params=None):
    """`teach` with nothing of a recipe but what it looks at, so that recipes share its program."""
    looked_at = ("objective", "top_k", "watch", "precision", "sharding")
    same = recipe(**{name: getattr(of, name) for name in looked_at})
    return teach(frozen() if params is None else params, rows, recipe=same)


def batch(rows=4, columns=16, seed=0):
    """`toy.batch`, with the first tokens of each row not counting as labels."""
    made = toy.batch(rows=rows, columns=columns, seed=seed)
    scored = np.ones_like(made.tokens)
    scored[:, :5] = 0
    return made._replace(scored=scored)
