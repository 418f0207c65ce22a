"""What a server is told: the model's limits, roles and devices, speculation, queues. No JAX."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from dskjax.decode.rules import RULE_NAMES, RuleOptions
from serve.engine_api import Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """The engines of one role.

    Attributes:
        role: what they do.
        engines: how many.
        tp: ways in which each splits heads and widths of MLPs and experts.
        ep: ways in which each splits experts, and heads once more. It has ep * tp devices.
        dp: None: all devices of an engine work on the same sequences. A number: each of its dp * ep
            ranks has sequences and a cache of its own, and experts are split over ep; it has dp *
            ep * tp devices.
    """

    role: Role
    engines: int = 1
    tp: int = 1
    ep: int = 1
    dp: int | None = None

    @property
    def width(self) -> int:
        """Devices of each engine."""
        return (self.dp or 1) * self.ep * self.tp

    @property
    def devices(self) -> int:
        """Devices of all its engines."""
        return self.engines * self.width


def parse_roles(
    text: str,
    *,
    prefill_tp: int = 1,
    decode_tp: int = 1,
    prefill_ep: int = 1,
    decode_ep: int = 1,
    mesh: Mapping[str, int] | None = None,
    prefill_mesh: Mapping[str, int] | None = None,
    decode_mesh: Mapping[str, int] | None = None,
) -> tuple[RoleConfig, ...]:
    """Reads "ifb", "4ifb" or "2P1D".

    Args:
        text: how many engines of which role.
        prefill_tp: see `RoleConfig.tp`, of each prefill engine.
        decode_tp: the same of each decode or ifb engine.
        prefill_ep: see `RoleConfig.ep`, of each prefill engine.
        decode_ep: the same of each decode or ifb engine.
        mesh: dp, ep and tp of each ifb engine whose ranks have sequences of their own, 1 where one
            is missing; None or empty: no such ranks.
        prefill_mesh: the same of each prefill engine.
        decode_mesh: the same of each decode engine.

    Raises:
        ValueError: not of that form, a count below 1, a mesh beside other ways to split, or a mesh
            of engines that there are none of.
    """
    if min(prefill_tp, decode_tp, prefill_ep, decode_ep) < 1:
        raise ValueError(
            f"{prefill_tp=}, {decode_tp=}, {prefill_ep=} and {decode_ep=} must be at least 1"
        )
    meshes = {"mesh": mesh, "prefill_mesh": prefill_mesh, "decode_mesh": decode_mesh}
    given = {name: dict(sizes) for name, sizes in meshes.items() if sizes}
    if match := re.fullmatch(r"(\d*)ifb", text.strip().lower()):
        _check_given(text, given, ("mesh",))
        roles = (_role(Role.IFB, int(match[1] or 1), decode_tp, decode_ep, "mesh", given),)
    elif match := re.fullmatch(r"(\d+)p(\d+)d", text.strip().lower()):
        _check_given(text, given, ("prefill_mesh", "decode_mesh"))
        roles = (
            _role(Role.PREFILL, int(match[1]), prefill_tp, prefill_ep, "prefill_mesh", given),
            _role(Role.DECODE, int(match[2]), decode_tp, decode_ep, "decode_mesh", given),
        )
    else:
        raise ValueError(
            f"roles {text!r}: use ifb, Nifb (N engines that do everything) or xPyD "
            "(x prefill and y decode engines), for example 1P1D"
        )
    if any(role.engines < 1 for role in roles):
        raise ValueError(f"roles {text!r}: each role needs at least one engine")
    return roles


def _check_given(text: str, given: Mapping[str, dict[str, int]], known: tuple[str, ...]) -> None:
    """Whether each mesh is for engines that `text` has.

    Raises:
        ValueError: one is not.
    """
    for name, sizes in given.items():
        if name not in known:
            raise ValueError(f"roles {text!r} with {name}={sizes}: use {' or '.join(known)}")


def _role(
    role: Role, engines: int, tp: int, ep: int, name: str, given: Mapping[str, dict[str, int]]
) -> RoleConfig:
    """Engines that split tp and ep ways, or as the mesh of that name says.

    Raises:
        ValueError: both are given.
    """
    if name not in given:
        return RoleConfig(role=role, engines=engines, tp=tp, ep=ep)
    if (tp, ep) != (1, 1):
        raise ValueError(f"tp={tp} and ep={ep} beside {name}={given[name]}: give both in the mesh")
    return RoleConfig(role=role, engines=engines, **(dict(dp=1) | given[name]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and choices that all engines of a server share.

    Attributes:
        max_model_len: most tokens of prompt and answer together.
        slots: most sequences an engine decodes together, all its ranks counted.
        pages: pages of each engine's cache, all its ranks counted; None fills what memory is left.
        page_size: tokens a page; GPU kernels need 64.
        chunk: most prompt tokens in a step.
        drafts: most drafts a step; 0 turns speculation off.
        accept: rule of requests that name none.
        rules: rules that requests may name; compiled into every step.
        adaptive: let each engine choose between no drafts and all by what it measures.
        synthetic: mean accepted length to simulate instead of verifying; None verifies.
        kv_dtype: of the cache, see `dskjax.cache.init_cache`.
        impl: implementation of every op.
        few_buckets: compile one shape of each kind: starts fast, pads more.
        mixed: prompt rows share a program with decoding rows.
        extras: serve rules other than `accept`, penalties, logit biases, min_tokens and
            log-probabilities; without, such requests are refused and fewer programs compiled.
        prompt_logprobs: serve log-probabilities of prompts, for which every program with prompt
            rows is compiled once more; without, requests for them are refused.
        unroll: unstack the layers' weights (`dskjax.params.unstack`): slower to compile, and on a
            GPU much faster to run.
        redundant_experts: slots of each layer's experts beyond one an expert, for copies of those
            that many rows choose. Prefill engines whose ranks do not share experts have none.
        rebalance_every: steps after which the copies are dealt out anew; 0 leaves them as they are.
        memory_fraction: of a device's memory that weights, cache and scratch may take together.
        max_waiting, max_waiting_tokens: queue limits of an engine.
        prefill_policy: "short-first" or "fcfs".
        layerwise_from: prompt tokens from which pages are sent layer group by layer group.
        layer_group: layers of such a group.

    Raises:
        ValueError: a value is out of range.
    """

    max_model_len: int
    slots: int = 16
    pages: int | None = None
    page_size: int = 64
    chunk: int = 512
    drafts: int = 0
    accept: RuleOptions = dataclasses.field(default_factory=lambda: RuleOptions(name="rejection"))
    rules: tuple[str, ...] = RULE_NAMES
    adaptive: bool = False
    synthetic: float | None = None
    kv_dtype: str = "auto"
    impl: str = "auto"
    few_buckets: bool = False
    mixed: bool = False
    extras: bool = True
    prompt_logprobs: bool = False
    unroll: bool = False
    redundant_experts: int = 0
    rebalance_every: int = 1000
    memory_fraction: float = 0.9
    max_waiting: int = 1024
    max_waiting_tokens: int = 2**20
    prefill_policy: Literal["short-first", "fcfs"] = "short-first"
    layerwise_from: int = 8192
    layer_group: int = 8

    def __post_init__(self):
        sizes = ("max_model_len", "slots", "page_size", "chunk", "layerwise_from", "layer_group")
        for name in (*sizes, "max_waiting", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_model_len < 2:
            raise ValueError(f"{self.max_model_len=} must hold a prompt and an answer: 2 or more")
        if self.pages is not None and self.pages < 1:
            raise ValueError(f"{self.pages=} must be at least 1")
        if self.kv_dtype not in ("auto", "fp8"):
            raise ValueError(f"{self.kv_dtype=}: use auto or fp8")
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"{self.memory_fraction=} must be in (0, 1]")
        for name in ("redundant_experts", "rebalance_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.redundant_experts and self.unroll:
            raise ValueError(
                f"redundant_experts={self.redundant_experts} move within stacked layers: turn "
                "unroll off"
            )
        if self.accept.name not in self.rules:
            raise ValueError(
                f"the default rule {self.accept.name!r} is not among rules={list(self.rules)}"
            )

    @property
    def columns(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)
