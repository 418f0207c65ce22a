"""Loads of experts while serving: how many tokens each got in a step, as an exponential mean."""

from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float64

from dskjax.eplb.layout import check_loads

Phase = Literal["prefill", "decode"]
"""Prompts and answers use different experts, and are often served in different places."""


class ExpertLoads:
    """Exponential means of tokens per step, layer and expert; prefill and decode apart.

    Every step counts by its tokens. The same updates give the same means, on any machine.
    """

    def __init__(self, num_layers: int, num_experts: int, *, half_life: float = 1000.0):
        """Starts without any step.

        Args:
            num_layers: L, those with experts.
            num_experts: E.
            half_life: steps of a phase after which a step weighs half.

        Raises:
            ValueError: a number that is not positive.
        """
        if num_layers < 1 or num_experts < 1 or not 0 < half_life < np.inf:
            raise ValueError(f"{num_layers=}, {num_experts=} and {half_life=} must be positive")
        self._keep = 0.5 ** (1 / half_life)
        self._steps = dict.fromkeys(get_args(Phase), 0)
        self._sums = {phase: np.zeros((num_layers, num_experts)) for phase in self._steps}

    def update(self, phase: Phase, counts: Any) -> None:
        """Takes in one step of a phase.

        Args:
            phase: of all its tokens; count a mixed step in two parts.
            counts: tokens [L, E] that the router gave each expert, replicas summed up, without
                padding and dummy tokens. A step without any token is left out.

        Raises:
            ValueError: counts of another shape, negative or not finite.
        """
        values = check_loads(counts)
        sums = self._sums[phase]
        if values.shape != sums.shape:
            raise ValueError(f"counts are {values.shape}; expected [layers, experts] {sums.shape}")
        if values.any():
            sums *= self._keep
            sums += values
            self._steps[phase] += 1

    def steps(self, phase: Phase) -> int:
        """Steps taken in so far."""
        return self._steps[phase]

    def mean(self, phase: Phase) -> Float64[np.ndarray, "L E"]:
        """Mean tokens of a step: loads for `dskjax.eplb.plan`. Zeros before the first step."""
        weight = (1 - self._keep ** self._steps[phase]) / (1 - self._keep)
        return self._sums[phase] / max(weight, 1.0)
