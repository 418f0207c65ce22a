"""`dskjax logits`: logits and hidden states of whole sequences, for comparing implementations."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dskjax import model
from dskjax.config import ModelConfig
from dskjax.params import Params

ROWS_AT_ONCE = 8
"""Sequences per call; every result row is independent of the others."""


def compute(
    params: Params,
    cfg: ModelConfig,
    ids: np.ndarray,
    *,
    mtp_depth: int = 0,
    hidden: bool = False,
    impl: str = "auto",
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Runs ids [B, T] through the model.

    Args:
        params: weights; their dtype is the compute dtype.
        cfg: the model.
        ids: int32 [B, T].
        mtp_depth: 0 for the trunk's logits; k for those of MTP depth k, each depth fed by the one
            before.
        hidden: also return the trunk's hidden states.
        impl: implementation of every op.

    Returns:
        fp32 logits [B, T, X] (row i predicts token i + 1), or [B, T - k, X] (row i predicts token i
        + 1 + k); and, if asked for, `embed`, `layer_{l}` (residual stream after block l), `final`
        (after the last norm) as fp32 [B, T, D] and `experts_{l}` int32 [B, T, top_k], ascending.

    Raises:
        ValueError: mtp_depth exceeds the model's modules or leaves no row.
    """
    modules = cfg.mtp.num_nextn_predict_layers
    if not 0 <= mtp_depth <= modules:
        raise ValueError(
            f"{mtp_depth=} but the checkpoint has {modules} MTP modules; use 0..{modules}"
        )
    if mtp_depth >= ids.shape[1]:
        raise ValueError(f"{mtp_depth=} leaves no row of sequences of {ids.shape[1]} tokens")
    run = jax.jit(functools.partial(_run, cfg=cfg, mtp_depth=mtp_depth, capture=hidden, impl=impl))
    logits, states = [], []
    for rows in _slices(ids.shape[0]):
        out, trunk = run(params, jnp.asarray(ids[rows]))
        logits.append(np.asarray(out))
        if hidden:
            states.append(_named(jax.device_get(trunk), cfg))
    merged = {
        name: np.concatenate([s[name] for s in states]) for name in (states[0] if states else ())
    }
    return np.concatenate(logits), merged


def _slices(rows: int) -> Iterator[slice]:
    for first in range(0, rows, ROWS_AT_ONCE):
        yield slice(first, min(first + ROWS_AT_ONCE, rows))


def _run(
    params: Params, ids: jax.Array, *, cfg: ModelConfig, mtp_depth: int, capture: bool, impl: str
) -> tuple[jax.Array, model.TrunkOutput]:
    out = model.trunk(params, ids, cfg=cfg, capture=capture, impl=impl)
    states = out.hidden
    if mtp_depth:
        chain = model.mtp_chain(params, ids, out.hidden, cfg=cfg, depths=mtp_depth, impl=impl)
        states = chain.hidden[-1][:, : ids.shape[1] - mtp_depth]
    return model.head(params, states, cfg=cfg), out


def _named(out: model.TrunkOutput, cfg: ModelConfig) -> dict[str, np.ndarray]:
    assert out.layers is not None
    named = {
        "embed": np.asarray(out.embedded, np.float32),
        "final": np.asarray(out.hidden, np.float32),
    }
    for layer, residual in enumerate(out.layers):
        named[f"layer_{layer}"] = np.asarray(residual, np.float32)
    for index, experts in enumerate(out.experts if out.experts is not None else ()):
        named[f"experts_{cfg.num_dense_layers + index}"] = np.sort(np.asarray(experts), axis=-1)
    return named
