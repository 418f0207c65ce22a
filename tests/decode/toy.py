"""A toy model with 5 tokens: guesses are often right, so that every path of acceptance is taken."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dskjax import model, presets
from dskjax.config import ModelConfig, MtpConfig
from dskjax.params import Params, WeightSpec, is_spec

PROMPTS = ((1, 2, 3, 4, 0, 1, 2, 2, 2, 3, 3, 3, 4), (3,), (2, 1, 4))
"""A prompt over several pages, one of a single token (nothing to prefill), and a short one."""


@functools.cache
def toy(modules: int, scheme: str | None = None) -> tuple[Params, ModelConfig]:
    """(params, config) with that many MTP modules."""
    cfg = dataclasses.replace(
        presets.preset("tiny-v3"),
        vocab_size=5,
        hidden_size=32,
        num_hidden_layers=2,
        eos_token_id=(),
        mtp=MtpConfig(num_nextn_predict_layers=modules, mtp_scheme=scheme),
    )
    rng = np.random.default_rng(0)  # NumPy: `model.init` would compile a program per shape

    def draw(spec: WeightSpec) -> jax.Array:
        loc, scale = (1.0, 0.0) if spec.init == "ones" else (0.0, 0.3)
        return jnp.asarray(rng.normal(loc, scale, spec.shape), jnp.float32)

    return jax.tree.map(draw, model.param_specs(cfg), is_leaf=is_spec), cfg
