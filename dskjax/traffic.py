"""What one GPU of a mesh sends in a decode step: the collectives, their bytes, and the time the
links need for them.

Experts are split over ep ranks of tp GPUs each. A rank has the sequences of its GPUs, and each of
its GPUs sends all of the rank's rows to its peers of the other ranks. Choices are taken as uniform
and independent; a router that keeps to few groups reaches fewer ranks. Three ways to exchange rows:

    padded   what `dskjax.expert_parallel` does if its slack is None: an all_to_all of buffers in
             which every row has room towards every rank, so that none is ever dropped
    once     a row goes to each rank that has one of its experts (DeepEP's throughput mode): the
             useful bytes of "padded"
    copies   a row goes once per chosen expert (DeepEP's low-latency mode)

Times are bytes over bandwidth: latency, and rows that go through another GPU of the node, are left
out. Within a node NVLink carries them, between nodes each GPU's own NIC, both at the same time.

Source: DeepEP, https://github.com/deepseek-ai/DeepEP; DeepSeek-V3 report, section 3.4.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

from dskjax.config import ModelConfig
from dskjax.decode.draft import DraftSpec
from dskjax.roofline import Gpu

Payload = Literal["fp8", "bf16"]
Exchange = Literal["padded", "once", "copies"]

NODE = 8
"""GPUs of a node."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSize:
    """Ways of a mesh, and copies of experts beyond one of each.

    Attributes:
        dp: replicas that share nothing.
        ep: ranks that share the experts.
        tp: GPUs that share every layer; neighbours, so within a node if at most 8.
        redundant: further copies of experts, per layer.
    """

    dp: int = 1
    ep: int = 1
    tp: int = 1
    redundant: int = 0

    def __post_init__(self) -> None:
        for name, least in dict(dp=1, ep=1, tp=1, redundant=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def __str__(self) -> str:
        dp = f"dp={self.dp}, " if self.dp > 1 else ""
        tp = f", tp={self.tp}" if self.tp > 1 else ""
        more = f" and {self.redundant} redundant experts" if self.redundant else ""
        return f"{dp}ep={self.ep}{tp}{more}"

    @property
    def ranks(self) -> int:
        """Groups of tp GPUs, each with sequences of its own."""
        return self.dp * self.ep

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.ranks * self.tp

    def near(self, ranks: int) -> int:
        """How many of so many neighbouring ranks are on one node."""
        return min(ranks, max(1, NODE // self.tp))

    def check(self, cfg: ModelConfig) -> None:
        """Whether the model can be split like this.

        Raises:
            ValueError: experts, heads or a width do not divide, or an expert would be twice on a
                GPU.
        """
        moe = cfg.moe
        if moe is None:
            if self.ep > 1 or self.redundant:
                raise ValueError(f"{self}: the model has no routed experts; use ep=1")
        else:
            self._check_experts(moe.n_routed_experts)
        sizes = {
            "num_attention_heads": cfg.num_attention_heads,
            "intermediate_size": cfg.intermediate_size if cfg.num_dense_layers else 0,
            "moe_intermediate_size": 0 if moe is None else moe.moe_intermediate_size,
            "vocab_size": cfg.vocab_size,
        }
        for name, size in sizes.items():
            if size % self.tp:
                raise ValueError(f"{name}={size} does not divide by tp={self.tp}")

    def _check_experts(self, experts: int) -> None:
        slots, least = experts + self.redundant, fill(experts, self.ep)
        if slots % self.ep:
            more = self.redundant + fill(slots, self.ep)
            raise ValueError(
                f"{experts} experts + {self.redundant} redundant = {slots} do not divide among "
                f"ep={self.ep} ranks; {more} redundant ones do, {least} at the least"
            )
        if slots > experts * self.ep:
            raise ValueError(
                f"{self.redundant} redundant experts on ep={self.ep} ranks would put an expert "
                f"twice on one; at most {experts * (self.ep - 1)}"
            )


def fill(experts: int, ranks: int) -> int:
    """The least redundant experts that give every rank as many."""
    return -experts % ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective of a step.

    Attributes:
        name: what it is.
        calls: how often a step calls it.
        near: bytes a GPU sends to others of its node in a call.
        far: bytes a GPU sends to other nodes in a call.
        useful: of all these, bytes that somebody needs.
    """

    name: str
    calls: int
    near: float
    far: float
    useful: float

    @property
    def sent(self) -> float:
        """Bytes a GPU sends in a call."""
        return self.near + self.far

    def seconds(self, gpu: Gpu) -> float:
        """Least time of all calls of a step."""
        return self.calls * max(self.near / gpu.nvlink, self.far / gpu.network)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of a decode step, of which none overlaps another."""

    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> float:
        """Bytes a GPU sends in a step."""
        return sum(c.calls * c.sent for c in self.collectives)

    @property
    def useful(self) -> float:
        """Of these, bytes that somebody needs."""
        return sum(c.calls * c.useful for c in self.collectives)

    def seconds(self, gpu: Gpu) -> float:
        """Least time of a step's communication."""
        return sum(c.seconds(gpu) for c in self.collectives)


def distinct_ranks(choices: int, ranks: int) -> float:
    """Expected number of different ranks among independent uniform choices."""
    return ranks * (1 - (1 - 1 / ranks) ** choices)


def row_bytes(cfg: ModelConfig, payload: Payload) -> int:
    """Bytes of one row: hidden_size values, and fp32 scales for each 128 of them if fp8.

    Raises:
        ValueError: an unknown payload.
    """
    if payload not in get_args(Payload):
        raise ValueError(f"{payload=} must be one of {', '.join(get_args(Payload))}")
    size = cfg.hidden_size
    return 2 * size if payload == "bf16" else size + 4 * -(-size // 128)


def copy_bytes(cfg: ModelConfig, payload: Payload) -> tuple[int, int]:
    """Bytes out and back of one token in one MoE layer with a copy per chosen expert, those that
    stay on the own rank included.
    """
    choices = 0 if cfg.moe is None else cfg.moe.num_experts_per_tok
    return choices * row_bytes(cfg, payload), choices * row_bytes(cfg, "bf16")


def traffic(
    cfg: ModelConfig,
    mesh: MeshSize,
    batch: int,
    *,
    drafts: int = 0,
    payload: Payload = "fp8",
    exchange: Exchange = "padded",
) -> Traffic:
    """Lists the collectives of a decode step.

    Args:
        cfg: the model.
        mesh: how it is split.
        batch: sequences per GPU; a rank has tp times as many.
        drafts: tokens drafted by the model's MTP modules and verified in the next step. A model
            without modules verifies as many that come from elsewhere.
        payload: what dispatch sends; combine sends bf16.
        exchange: how rows reach the experts.

    Raises:
        ValueError: a mesh that does not fit the model, more drafts than its modules make, or an
            unknown name.
    """
    mesh.check(cfg)
    if exchange not in get_args(Exchange):
        raise ValueError(f"{exchange=} must be one of {', '.join(get_args(Exchange))}")
    if batch < 1 or drafts < 0:
        raise ValueError(f"{batch=} must be 1 or more, and {drafts=} 0 or more")
    sequences = batch * mesh.tp
    found = []
    for part in _passes(cfg, drafts):
        rows = part.rows * sequences
        if mesh.ep > 1 and part.moe_layers:
            found += _expert_exchange(cfg, mesh, part, rows, payload, exchange)
        if mesh.tp > 1:
            found += _tensor_parallel(cfg, mesh, part, rows, part.logits * sequences)
    if mesh.ranks > 1:
        found.append(_sizes(mesh))
    return Traffic(collectives=tuple(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pass:
    """Layers that run over some rows of each sequence, and how often; then logits of some."""

    name: str
    calls: int = 1
    layers: int
    moe_layers: int
    rows: int
    logits: int


def _passes(cfg: ModelConfig, drafts: int) -> Iterator[_Pass]:
    """The trunk, then MTP modules as `dskjax.decode.draft.propose` runs them."""
    yield _Pass(
        name="trunk",
        layers=cfg.num_hidden_layers,
        moe_layers=cfg.num_moe_layers,
        rows=1 + drafts,
        logits=1 + drafts,
    )
    if not drafts or not cfg.mtp.num_nextn_predict_layers:
        return
    spec = DraftSpec.make(cfg, drafts, sampled=False)
    one = _Pass(name="MTP", layers=1, moe_layers=1, rows=1 + drafts + spec.tail, logits=1)
    yield dataclasses.replace(one, calls=spec.depths)
    if drafts > spec.depths:
        again = drafts - spec.depths
        yield dataclasses.replace(one, name="MTP again", calls=again, rows=1)


def _expert_exchange(
    cfg: ModelConfig, mesh: MeshSize, part: _Pass, rows: int, payload: Payload, exchange: Exchange
) -> Iterator[Collective]:
    """Dispatch and combine of the pass's MoE layers."""
    assert cfg.moe is not None
    choices, row = cfg.moe.num_experts_per_tok, row_bytes(cfg, payload)
    once = distinct_ranks(choices, mesh.ep) / mesh.ep
    share = {"padded": 1.0, "once": once, "copies": choices / mesh.ep}[exchange]
    near = mesh.near(mesh.ep) - 1
    far = mesh.ep - 1 - near
    # With a row go ids and weights of its choices; a copy's expert is told by its place.
    tags = 0 if exchange == "copies" else 8 * choices
    sizes = {"dispatch": row + tags, "combine": row_bytes(cfg, "bf16")}
    for name, size in sizes.items():
        to_rank = rows * share * size
        yield Collective(
            name=f"{name}, {part.name}",
            calls=part.calls * part.moe_layers,
            near=near * to_rank,
            far=far * to_rank,
            useful=(near + far) * rows * min(share, once) * size,
        )


def _tensor_parallel(
    cfg: ModelConfig, mesh: MeshSize, part: _Pass, rows: int, logits: int
) -> Iterator[Collective]:
    """Ring all-reduces of bf16 rows after the embedding and in every layer after attention and MLP;
    an all-gather of fp32 logits.
    """
    once_round = (mesh.tp - 1) / mesh.tp
    summed, gathered = 2 * rows * 2 * cfg.hidden_size, logits * 4 * cfg.vocab_size
    for name, calls, size in (
        ("all-reduce of layers", 2 * part.layers, summed),
        ("all-reduce of embedding", 1, summed),
        ("all-gather of logits", 1, gathered),
    ):
        sent = once_round * size
        # A ring across nodes is as slow as its slowest link.
        near, far = (sent, 0.0) if mesh.tp <= NODE else (0.0, sent)
        label, calls = f"{name}, {part.name}", calls * part.calls
        yield Collective(name=label, calls=calls, near=near, far=far, useful=sent)


def _sizes(mesh: MeshSize) -> Collective:
    """All-gather of an int32 a rank: the step's shape must be everybody's choice."""
    near = mesh.near(mesh.ranks) - 1
    far = mesh.ranks - 1 - near
    return Collective(
        name="all-gather of sizes",
        calls=1,
        near=4.0 * near,
        far=4.0 * far,
        useful=4.0 * (near + far),
    )
