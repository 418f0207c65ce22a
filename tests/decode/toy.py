"""A toy model with 5 tokens: guesses are often right, so that every path of acceptance is taken."""

import dataclasses
import functools

import jax

from dskjax import model, presets
from dskjax.config import ModelConfig, MtpConfig
from dskjax.params import Params

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
    return model.init(cfg, jax.random.key(0), std=0.3), cfg
