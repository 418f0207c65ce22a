"""What is asked: bodies of requests, from real prompts or in drawn lengths; no two alike by chance.

Ids of drawn prompts are stretches of a real text: what is drafted for random ids is never accepted,
and an engine's time depends on it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from serve.bench.lengths import Lengths

Job = Mapping[str, Any]
"""Of a request's body: `prompt` or `messages`, `max_tokens`, `seed`, ..."""


@runtime_checkable
class Workload(Protocol):
    """Any number of requests."""

    def jobs(self, count: int, *, seed: int) -> list[Job]:
        """The same seed gives the same requests, another one others where there are others."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealPrompts:
    """Prompts as they are, in random order, again from the start when there are too few.

    Attributes:
        prompts: each {"prompt": ...} or {"messages": ...}.
        max_tokens: most new tokens of each; an eos ends an answer earlier.
    """

    prompts: Sequence[Mapping[str, Any]]
    max_tokens: int

    def jobs(self, count: int, *, seed: int) -> list[Job]:
        """See `Workload`."""
        rng = np.random.default_rng(seed)
        order: list[int] = []
        while len(order) < count:
            order += rng.permutation(len(self.prompts)).tolist()
        return [
            {**self.prompts[place], "max_tokens": self.max_tokens, "seed": _seed(seed, number)}
            for number, place in enumerate(order[:count])
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnPrompts:
    """Stretches of a text, of drawn length and answered in drawn length whatever an eos says.

    Attributes:
        ids: of the text.
        front: ids before every prompt, such as bos.
        inputs, outputs: laws of the two lengths.
        limit: most tokens of prompt and answer together; None is none. A longer pair is cut, the
            answer first to what is left, which `serve.bench.run` keeps from happening often.

    Raises:
        ValueError: the text is shorter than the longest prompt, or the mean request than nothing.
    """

    ids: Sequence[int]
    front: Sequence[int]
    inputs: Lengths
    outputs: Lengths
    limit: int | None = None

    def __post_init__(self):
        longest = self.inputs.most
        if self.limit is not None:
            mean = self.inputs.mean + self.outputs.mean
            if mean > self.limit:
                raise ValueError(
                    f"prompt and answer have {mean:.0f} tokens on average and the server takes "
                    f"{self.limit} together: lower the means, or --scale"
                )
            longest = min(longest, self.limit - 1)
        if len(self.ids) < longest:
            raise ValueError(
                f"the text has {len(self.ids)} tokens and the longest prompt {longest}: give a "
                "longer text, or lower --input-max"
            )

    def jobs(self, count: int, *, seed: int) -> list[Job]:
        """See `Workload`."""
        inputs = self.inputs.draw(count, seed=_seed(seed, 0))
        outputs = self.outputs.draw(count, seed=_seed(seed, 1))
        if self.limit is not None:
            inputs = np.minimum(inputs, self.limit - 1)
            outputs = np.minimum(outputs, self.limit - inputs)
        starts = np.random.default_rng(_seed(seed, 2)).integers(0, len(self.ids) - inputs + 1)
        return [
            self._job(int(start), int(length), int(new), _seed(seed, 3 + number))
            for number, (start, length, new) in enumerate(zip(starts, inputs, outputs, strict=True))
        ]

    def _job(self, start: int, length: int, new: int, seed: int) -> Job:
        front = list(self.front)[:length]
        ids = [*front, *self.ids[start : start + length - len(front)]]
        return {"prompt": ids, "max_tokens": new, "ignore_eos": True, "seed": seed}


def _seed(seed: int, number: int) -> int:
    """One of many streams under a seed; 31 bits, which every server takes."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) >> 1
