"""A small model whose experts are placed on one device or on a mesh, and its text."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from dskjax import mesh, model, presets
from dskjax.config import ModelConfig, MtpConfig
from dskjax.decode.generate import generate
from dskjax.expert_parallel.place import experts_of, place, with_experts
from dskjax.params import Params, WeightSpec, is_spec, named_leaves
from dskjax.quantise import quantise

EXPERTS, REDUNDANT = 16, 8
SLOTS = EXPERTS + REDUNDANT
VOCAB = 8  # few, so that drafts are right now and then
GROUPS = {"moe_layers": 2, "mtp_layers": 2}  # of one size: they share programs
MESHES = {"one": None, "ep4": {"ep": 4, "tp": 2}, "ep8": {"ep": 8}}
TOKENS = np.random.default_rng(9).integers(0, VOCAB, (8, 9), np.int32)
PROMPTS = [
    np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (5, 9, 3, 1, 12, 2, 4, 7)
]


@functools.cache
def small() -> ModelConfig:
    tiny = presets.preset("tiny-v3")
    return dataclasses.replace(
        tiny,
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=0,
        mtp=MtpConfig(num_nextn_predict_layers=2),
        eos_token_id=(),
    )


def draw(cfg: ModelConfig) -> Params:
    """Loud random params in host memory: `model.init` would compile a program per shape."""
    rng = np.random.default_rng(0)

    def one(spec: WeightSpec) -> np.ndarray:
        loc, scale = (1.0, 0.0) if spec.init == "ones" else (0.0, 0.3)
        return rng.normal(loc, scale, spec.shape).astype(np.float32)

    return jax.tree.map(one, model.param_specs(cfg), is_leaf=is_spec)


@functools.cache
def logical(precision: Any = None) -> Params:
    """Params with every expert once, in host memory; quantised ones have quantised experts."""
    if precision is None:
        return draw(small())
    params = logical()
    for group in GROUPS:
        experts = {"experts": jax.device_put(experts_of(params, group))}
        params = with_experts(params, group, quantise(experts, precision)["experts"])
    return jax.tree.map(np.asarray, params)


@functools.cache
def sharding(name: str):
    size = MESHES[name]
    return None if size is None else mesh.preset("decode", mesh.make_mesh(**size))


def placed(name: str, plans=None, precision: Any = None) -> tuple[Params, ModelConfig]:
    """Params of the caller's own: a rebalancer donates them."""
    where = sharding(name)
    return place(logical(precision), small(), plans, redundant=REDUNDANT, sharding=where)


def text(params: Params, cfg: ModelConfig, name: str) -> list[list[int]]:
    """Greedy text with one draft a step."""
    out = generate(
        params,
        cfg,
        PROMPTS,
        max_tokens=8,
        drafts=1,
        accept="strict",
        page_size=4,
        chunk=8,
        sharding=sharding(name),
    )
    assert out.ties == 0
    assert out.stats.accepted > 0
    return out.tokens


@functools.cache
def plain_text(precision: Any = None) -> list[list[int]]:
    return text(jax.device_put(logical(precision)), small(), "one")


def logits(params: Params, cfg: ModelConfig, name: str) -> jax.Array:
    return _apply(params, TOKENS, cfg=cfg, sharding=sharding(name))


_apply = jax.jit(model.apply, static_argnames=("cfg", "sharding"))


def random_plan(rng, layers: int) -> np.ndarray:
    """int32 [layers, P], every expert somewhere."""
    rows = [rng.permutation(EXPERTS).tolist() for _ in range(layers)]
    more = [rng.integers(0, EXPERTS, REDUNDANT).tolist() for _ in range(layers)]
    slots = np.array([r + m for r, m in zip(rows, more, strict=True)], np.int32)
    return rng.permuted(slots, axis=1)


def assert_same_bits(got: Params, want: Params) -> None:
    got_leaves, want_leaves = dict(named_leaves(got)), dict(named_leaves(want))
    assert got_leaves.keys() == want_leaves.keys()
    for name, leaf in want_leaves.items():
        parts = zip(jax.tree.leaves(got_leaves[name]), jax.tree.leaves(leaf), strict=True)
        for a, b in parts:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
