"""Workloads of `route`: every gate, groups, ties, negative biases; shapes of real models."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing.generate import BaseCase, Tag, normal, tagged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """A gate.

    Attributes:
        tokens: T.
        experts: E.
        top_k: K.
        n_group: groups of experts.
        topk_group: groups a token may use.
        bias: range of the selection bias (a sigmoid gate), or None (a softmax gate without one).
        norm_topk_prob: divide the chosen scores by their sum.
        routed_scaling_factor: factor of the weights.
        logits: "normal"; "ties": only 0, 1 and 3, so that most choices are ties; "sharp": so far
            apart that most softmax scores are 0.
    """

    tokens: int
    experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    bias: tuple[float, float] | None = (-0.1, 0.1)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    logits: Literal["normal", "ties", "sharp"] = "normal"

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `route`; a poisoned last row is NaN, which may not touch the others."""
        rng = self.rng(seed)
        logits = normal(rng, self.tokens, self.experts)
        if self.logits == "ties":
            logits = rng.choice(np.array([0, 1, 3], np.float32), logits.shape)
        if self.logits == "sharp":
            logits = np.round(logits) * np.float32(200) + logits
        if poison:
            logits[-1] = np.nan
        bias = None
        if self.bias is not None:
            low, high = self.bias
            bias = jnp.asarray(rng.uniform(low, high, self.experts), jnp.float32)
        return {
            "logits": jnp.asarray(logits),
            "bias": bias,
            "top_k": self.top_k,
            "scoring_func": "softmax" if self.bias is None else "sigmoid",
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "norm_topk_prob": self.norm_topk_prob,
            "routed_scaling_factor": self.routed_scaling_factor,
        }


_V2_LITE: dict[str, Any] = {"bias": None, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
_V2: dict[str, Any] = _V2_LITE | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
_V2_REAL: dict[str, Any] = _V2 | {"n_group": 8, "topk_group": 3}
_REAL: tuple[tuple[int, tuple[Tag, ...]], ...] = ((128, ("full", "bench")), (4096, ("bench",)))
"""Tokens and tags of the published gates."""

CASES = (
    Case(name="v3 groups", tokens=33, experts=16, top_k=4, n_group=4, topk_group=2),
    # c = score + bias is negative for every expert: a mask of 0.0 would let the dropped groups win.
    Case(
        name="negative bias",
        tokens=33,
        experts=16,
        top_k=6,
        n_group=4,
        topk_group=2,
        bias=(-3.0, -1.0),
    ),
    Case(
        name="ties in groups",
        tokens=33,
        experts=16,
        top_k=5,
        n_group=4,
        topk_group=2,
        bias=(0.0, 0.0),
        logits="ties",
    ),
    Case(name="no groups", tokens=9, experts=8, top_k=3, norm_topk_prob=False),
    Case(name="one token", tokens=2, experts=8, top_k=8),
    Case(name="v2-lite", tokens=9, experts=8, top_k=2, **_V2_LITE),
    Case(name="v2-lite ties", tokens=9, experts=8, top_k=3, logits="ties", **_V2_LITE),
    Case(name="v2 groups", tokens=33, experts=16, top_k=3, **_V2),
    Case(name="v2 ties in groups", tokens=33, experts=16, top_k=5, logits="ties", **_V2),
    # All but a few scores underflow to 0: experts of dropped groups win ties with weight 0.
    Case(name="v2 sharp", tokens=33, experts=16, top_k=6, logits="sharp", **_V2),
    Case(name="groups of one", tokens=9, experts=4, top_k=2, **_V2),
    *(
        Case(
            name=f"deepseek-v3 t{tokens}",
            tags=tags,
            tokens=tokens,
            experts=256,
            top_k=8,
            n_group=8,
            topk_group=4,
        )
        for tokens, tags in _REAL
    ),
    *(
        Case(
            name=f"deepseek-v2 t{tokens}",
            tags=tags,
            tokens=tokens,
            experts=160,
            top_k=6,
            **_V2_REAL,
        )
        for tokens, tags in _REAL
    ),
    *(
        Case(
            name=f"kimi-k2 t{tokens}",
            tags=tags,
            tokens=tokens,
            experts=384,
            top_k=8,
            routed_scaling_factor=2.827,
        )
        for tokens, tags in _REAL
    ),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
