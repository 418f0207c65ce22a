"""A placement: which expert each slot holds, and which slots hold each expert."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """The maps between slots ("physical") and experts ("logical"), per layer.

    Attributes:
        phy2log: i32 [L, P], the expert in each slot.
        log2phy: i32 [L, E, most], the slots of each expert; rows are padded with -1 to the most
            replicas that any expert has.
        logcnt: i32 [L, E], replicas of each expert, at least 1.
    """

    phy2log: Int32[np.ndarray, "L P"]
    log2phy: Int32[np.ndarray, "L E most"]
    logcnt: Int32[np.ndarray, "L E"]

    @classmethod
    def of(
        cls,
        phy2log: Int[np.ndarray, "L P"],
        num_experts: int,
        rank: Int[np.ndarray, "L P"] | None = None,
    ) -> "Placement":
        """The placement with these experts in its slots.

        Args:
            phy2log: every expert must be in some slot.
            num_experts: E.
            rank: position of each slot among the slots of its expert in `log2phy`; None = in the
                order of slots.
        """
        layers = np.arange(len(phy2log))[:, None]
        logcnt = replicas(phy2log, num_experts)
        assert logcnt.all(), "an expert without a slot"
        if rank is None:
            order = np.argsort(phy2log, axis=1, kind="stable")
            first = np.cumsum(logcnt, axis=1) - logcnt
            rank = np.empty_like(phy2log)
            inside = np.arange(phy2log.shape[1]) - first[layers, phy2log[layers, order]]
            np.put_along_axis(rank, order, inside.astype(rank.dtype), axis=1)
        log2phy = np.full((*logcnt.shape, logcnt.max()), -1, np.int32)
        log2phy[layers, phy2log, rank] = np.arange(phy2log.shape[1])
        return cls(phy2log=phy2log.astype(np.int32), log2phy=log2phy, logcnt=logcnt)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Placement":
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: a field is missing or has another form, or the maps contradict each other.
        """
        maps = {}
        for name, rank in (("phy2log", 2), ("log2phy", 3), ("logcnt", 2)):
            if name not in fields:
                raise ValueError(f"no {name!r}; a plan has phy2log, log2phy and logcnt")
            try:
                maps[name] = np.array(fields[name])
            except ValueError as error:
                raise ValueError(f"{name} has rows of unequal length") from error
            if maps[name].ndim != rank or maps[name].dtype.kind != "i" or not maps[name].size:
                raise ValueError(f"{name} must be {rank} levels of lists of integers, not empty")
        phy2log, num_experts = maps["phy2log"], maps["logcnt"].shape[1]
        if phy2log.min() < 0 or phy2log.max() >= num_experts:
            raise ValueError(f"phy2log must be within 0..{num_experts - 1}, as logcnt has it")
        if not replicas(phy2log, num_experts).all():
            raise ValueError("phy2log leaves an expert without a slot")
        found = cls.of(phy2log, num_experts)
        if not np.array_equal(maps["logcnt"], found.logcnt):
            raise ValueError("logcnt does not count the experts of phy2log")
        if not np.array_equal(np.sort(maps["log2phy"]), np.sort(found.log2phy)):
            raise ValueError("log2phy does not name the slots of phy2log")
        return cls(**{name: values.astype(np.int32) for name, values in maps.items()})

    def to_dict(self) -> dict[str, Any]:
        """The maps as lists."""
        return {
            field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)
        }


def replicas(phy2log: Int[np.ndarray, "L P"], num_experts: int) -> Int32[np.ndarray, "L E"]:
    """How many slots hold each expert."""
    count = len(phy2log) * num_experts
    named = phy2log + num_experts * np.arange(len(phy2log))[:, None]
    found = np.bincount(named.ravel(), minlength=count)
    return found.reshape(len(phy2log), num_experts).astype(np.int32)
