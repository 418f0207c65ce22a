"""Which acceptance rule a request asks for, with its parameters: a host value without JAX.

`dskjax.decode.rules` turns it into rows of a batch. Sources of the defaults: Medusa's code for
typical (eps 0.09, delta 0.3), TensorRT-LLM's guide for DeepSeek-R1 for relaxed (top 10, delta 0.6);
those of the hybrid rule are ours.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import numpy as np

RuleName = Literal["strict", "rejection", "block", "typical", "relaxed", "hybrid"]
RULE_NAMES: tuple[RuleName, ...] = get_args(RuleName)
"""Names by rule id, the number that stands in a batch's rows."""

_OWN: dict[str, dict[str, str]] = {
    "typical": {"eps": "typical_eps", "delta": "typical_delta"},
    "relaxed": {"top_n": "relaxed_top_n", "delta": "relaxed_delta"},
    "hybrid": {
        "lenience": "lenience",
        "a": "draft_a",
        "b": "draft_b",
        "t_min": "draft_t_min",
        "t_max": "draft_t_max",
    },
}
"""Parameters of each rule: name in a rule's text -> field of `RuleOptions`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """A rule and its parameters; those of other rules must keep their defaults.

    Attributes:
        name: `strict`, `rejection` and `block` are those of `dskjax.decode.acceptance`; `typical`
            and `relaxed` those of `dskjax.decode.lossy`. `hybrid` draws its drafts at a temperature
            of its own (`dskjax.decode.rules.draft_sampling`) and verifies them as a block; with a
            lenience below 1 it verifies leniently inside thinking.
        typical_eps: typical accepts what is likelier than min(eps, delta exp(-entropy)), [0, 1].
        typical_delta: see typical_eps, [0, 1].
        relaxed_top_n: most candidates while thinking, at least 1.
        relaxed_delta: candidates are at most so much less likely than the best, [0, 1].
        lenience: of hybrid, (0, 1]; 1 is lossless.
        draft_a: hybrid draws at T c (a + b H), with the request's temperature T, the tuned factor c
            of the draft's depth, and the entropy H in nats of the drafter's first law; a > 0.
        draft_b: see draft_a, per nat; at least 0.
        draft_t_min: lowest draft temperature, > 0 (a greedy request drafts greedily all the same).
        draft_t_max: highest draft temperature.

    Raises:
        ValueError: a value is out of range, or belongs to another rule.
    """

    name: RuleName
    typical_eps: float = 0.09
    typical_delta: float = 0.3
    relaxed_top_n: int = 10
    relaxed_delta: float = 0.6
    lenience: float = 1.0
    draft_a: float = 0.8
    draft_b: float = 0.05
    draft_t_min: float = 0.1
    draft_t_max: float = 2.0

    def __post_init__(self):
        if self.name not in RULE_NAMES:
            raise ValueError(_unknown(self.name))
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in self._own().values():
                raise ValueError(
                    f"{field.name}={value!r} is no parameter of {self.name!r}: {self._has()}"
                )
        for name in ("typical_eps", "typical_delta", "relaxed_delta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be in [0, 1]")
        if not 1 <= self.relaxed_top_n < 2**31:
            raise ValueError(f"{self.relaxed_top_n=} must be an integer of at least 1")
        if not 0 < self.lenience <= 1:
            raise ValueError(f"{self.lenience=} must be in (0, 1]; 1 is lossless")
        if not (0 < self.draft_a < math.inf and 0 <= self.draft_b < math.inf):
            raise ValueError(
                f"{self.draft_a=} must be above 0 and {self.draft_b=} at least 0, both finite"
            )
        if not 0 < self.draft_t_min <= self.draft_t_max < math.inf:
            raise ValueError(
                f"{self.draft_t_min=} and {self.draft_t_max=} must be 0 < t_min <= t_max < inf"
            )

    @property
    def lossless(self) -> bool:
        """The text follows the target's law exactly."""
        return self.name in ("strict", "rejection", "block") or (
            self.name == "hybrid" and self.lenience == 1
        )

    @property
    def label(self) -> str:
        """The rule's text for logs and metrics: name and what differs from the defaults; `parse`
        reads it back."""
        defaults = type(self)(name=self.name)
        changed = [
            f"{key}={getattr(self, field)}"
            for key, field in self._own().items()
            if getattr(self, field) != getattr(defaults, field)
        ]
        return self.name + (":" + ",".join(changed) if changed else "")

    @classmethod
    def parse(cls, text: str) -> "RuleOptions":
        """Reads a rule from "name" or "name:key=value,...", such as "relaxed:top_n=10,delta=0.6".

        Keys: typical has eps and delta; relaxed top_n and delta; hybrid lenience, a, b, t_min and
        t_max; the others none.

        Raises:
            ValueError: names what is wrong in `text` and what would be right.
        """
        name, _, rest = text.strip().partition(":")
        if name not in RULE_NAMES:
            raise ValueError(_unknown(name))
        rule = cls(name=name)
        values: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in rest.split(","))):
            key, equals, value = (part.strip() for part in item.partition("="))
            field = rule._own().get(key)
            if field is None or not equals:
                raise ValueError(f"{text!r}: {item!r} is not understood: {rule._has()}")
            if field in values:
                raise ValueError(f"{text!r}: {key} is given twice; give it once")
            kind = type(getattr(rule, field))
            try:
                values[field] = kind(value)
            except ValueError:
                wanted = "an integer" if kind is int else "a number"
                raise ValueError(f"{text!r}: {key}={value!r} must be {wanted}") from None
        return dataclasses.replace(rule, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: name, whether it is lossless, and the rule's own parameters."""
        own = {key: getattr(self, field) for key, field in self._own().items()}
        return {"name": self.name, "lossless": self.lossless, **own}

    def row(self) -> dict[str, np.generic]:
        """One row of `dskjax.decode.rules.RuleRows`: NumPy scalars by field, i32 and f32."""
        values: dict[str, np.generic] = {"rule": np.int32(RULE_NAMES.index(self.name))}
        for field in dataclasses.fields(self)[1:]:
            kind = np.int32 if isinstance(field.default, int) else np.float32
            values[field.name] = kind(getattr(self, field.name))
        return values

    def _own(self) -> dict[str, str]:
        return _OWN.get(self.name, {})

    def _has(self) -> str:
        own = self._own()
        if not own:
            return "it has none, give the name alone"
        return f"{self.name!r} takes " + ", ".join(f"{key}=VALUE" for key in own)


def _unknown(name: str) -> str:
    return f"unknown acceptance rule {name!r}; choose one of {', '.join(RULE_NAMES)}"
