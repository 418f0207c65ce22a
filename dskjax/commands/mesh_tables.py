"""Tables of `dskjax info` on meshes: what a GPU holds, what it sends, and how long a step takes."""

import dataclasses
import typing
from collections.abc import Sequence

from rich.table import Table

from dskjax import roofline
from dskjax.commands.info import BATCHES, CACHES, human_bytes
from dskjax.config import ModelConfig
from dskjax.traffic import Exchange, MeshSize, Payload, Traffic, copy_bytes, fill, traffic

USABLE = 0.9
"""Part of a card's memory that weights and cache may take; the rest is for activations."""

WAYS = (8, 16, 32, 144, 320)
"""Sizes of expert parallelism that `--compare` compares; DeepSeek decodes on 144 and 320 GPUs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is decoded.

    Attributes:
        mesh: how it is split.
        context: cached tokens per sequence.
        drafts: drafts verified a step.
        experts: format of the routed experts.
        cache: layout of the latent cache.
        payload: what dispatch sends.
        exchange: how rows reach the experts.
    """

    mesh: MeshSize
    context: int = 4096
    drafts: int = 0
    experts: roofline.Experts = "int4"
    cache: roofline.CacheLayout = "fp8_tensor"
    payload: Payload = "fp8"
    exchange: Exchange = "padded"

    def weights(self, cfg: ModelConfig) -> roofline.Weights:
        """Weights on one GPU."""
        return roofline.weights_held(
            cfg,
            self.mesh.ep,
            tp=self.mesh.tp,
            redundant=self.mesh.redundant,
            experts=self.experts,
        )

    def traffic(self, cfg: ModelConfig, batch: int) -> Traffic:
        """Collectives of a step with so many sequences per GPU."""
        return traffic(
            cfg,
            self.mesh,
            batch,
            drafts=self.drafts,
            payload=self.payload,
            exchange=self.exchange,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A decode step on one GPU of a mesh.

    Attributes:
        floor: its least time without communication.
        exchange: least seconds of its communication.
        room: bytes left for the cache; negative if the weights are too much.
        fits: whether the cache of its sequences fits there.
    """

    floor: roofline.Floor
    exchange: float
    room: float
    fits: bool

    @property
    def apart(self) -> float:
        """Seconds if communication waits for computation and the other way round."""
        return self.floor.step + self.exchange

    @property
    def overlapped(self) -> float:
        """Seconds if the longer hides the shorter."""
        return max(self.floor.step, self.exchange)


def cache_room(cfg: ModelConfig, plan: Plan, gpu: str) -> tuple[float, int]:
    """Bytes left for the cache at 90% of a card, and tokens that they hold (0 if none are left).
    MTP modules and their cache are counted.
    """
    room = USABLE * roofline.GPUS[gpu].memory - plan.weights(cfg).total
    return room, max(0, int(room // roofline.cache_bytes_per_token(cfg, plan.cache)))


def mesh_step(cfg: ModelConfig, plan: Plan, gpu: str, batch: int) -> Step:
    """Bounds a step with so many sequences per GPU.

    Raises:
        ValueError: an unknown name, a size below its least value, or a mesh that does not fit.
    """
    sent = plan.traffic(cfg, batch)
    mesh = plan.mesh
    floor = roofline.roofline(
        cfg,
        gpu,
        batch,
        plan.context,
        mesh.ep,
        1 + plan.drafts,
        experts=plan.experts,
        cache=plan.cache,
        tp=mesh.tp,
        redundant=mesh.redundant,
    )
    room, tokens = cache_room(cfg, plan, gpu)
    return Step(
        floor=floor,
        exchange=sent.seconds(roofline.GPUS[gpu]),
        room=room,
        fits=batch * mesh.tp * plan.context <= tokens,
    )


def memory_table(cfg: ModelConfig, plan: Plan, gpus: Sequence[str]) -> Table:
    """Weights of one GPU by part, and what each of some cards has left for the cache."""
    held = plan.weights(cfg)
    table = Table(title=f"memory of one GPU of {plan.mesh.gpus}: {plan.mesh}", show_header=False)
    rows = [
        (f"routed experts in {plan.experts}", held.routed),
        ("redundant experts", held.redundant),
        ("rest of the layers in fp8", held.rest),
        ("embedding and head in bf16", held.vocab),
        ("MTP modules", held.mtp),
    ]
    for what, size in rows:
        if size:
            table.add_row(what, human_bytes(size))
    table.add_row("all weights", human_bytes(held.total), end_section=True)
    per_token = roofline.cache_bytes_per_token(cfg, plan.cache)
    for gpu in gpus:
        room, tokens = cache_room(cfg, plan, gpu)
        usable = USABLE * roofline.GPUS[gpu].memory
        text = f"{human_bytes(room)}: {tokens:,} tokens of {per_token:,} bytes"
        if room <= 0:
            text = f"does not fit: the weights exceed {human_bytes(usable)}"
        table.add_row(f"left for the cache at {USABLE:.0%} of {gpu}", text)
    if plan.mesh.tp > 1:
        table.caption = f"each of the {plan.mesh.tp} GPUs of a rank holds the whole cache of it"
    return table


def collectives_table(cfg: ModelConfig, plan: Plan, batch: int) -> Table:
    """Bytes that one GPU sends, per call and per step: useful ones, and all."""
    sent = plan.traffic(cfg, batch)
    title = f"bytes a GPU sends, {batch} sequences per GPU, {plan.payload} rows, {plan.exchange}"
    table = Table(title=title)
    table.add_column("collective")
    for name in ("calls", "useful\na call", "useful\na step", "sent\na call", "sent\na step"):
        table.add_column(name, justify="right")
    for c in sent.collectives:
        each = (c.useful, c.calls * c.useful, c.sent, c.calls * c.sent)
        table.add_row(c.name, str(c.calls), *map(human_bytes, each))
    table.add_section()
    table.add_row("all", "", "", human_bytes(sent.useful), "", human_bytes(sent.sent))
    if cfg.moe is not None:
        out, back = copy_bytes(cfg, plan.payload)
        every = cfg.num_moe_layers * (out + back)
        table.caption = (
            f"a copy per chosen expert, own rank included, would be {human_bytes(out)} out and "
            f"{human_bytes(back)} back a token and layer, {human_bytes(every)} over the "
            f"{cfg.num_moe_layers} layers; ranks are counted as if choices were independent"
        )
    return table


def steps_table(cfg: ModelConfig, plan: Plan, gpu: str) -> Table:
    """Floor, communication and both together, for each of `BATCHES`."""
    title = f"step in ms with communication ({plan.exchange}): {gpu}, {plan.mesh}"
    table = _step_columns(title, "batch/GPU")
    for batch in BATCHES:
        _add_step(table, str(batch), mesh_step(cfg, plan, gpu, batch))
    return table


def compare_table(cfg: ModelConfig, plan: Plan, gpu: str, batch: int) -> Table:
    """The same for each of `WAYS` at one batch, with the fewest redundant experts that fill the
    ranks; the plan's own mesh does not matter.

    Raises:
        ValueError: as `mesh_step`; a model without experts.
    """
    if cfg.moe is None:
        raise ValueError("--compare compares expert parallelism; the model has no routed experts")
    title = f"step in ms with communication ({plan.exchange}): {gpu}, {batch} sequences per GPU"
    table = _step_columns(title, "ep+re-\ndundant", "weights\nGB", "free\nGB")
    for ep in WAYS:
        mesh = MeshSize(ep=ep, redundant=fill(cfg.moe.n_routed_experts, ep))
        each = dataclasses.replace(plan, mesh=mesh)
        step = mesh_step(cfg, each, gpu, batch)
        name = f"{ep}+{mesh.redundant}" if mesh.redundant else str(ep)
        sizes = (each.weights(cfg).total, max(0.0, step.room))
        _add_step(table, name, step, *(f"{size / 1e9:.1f}" for size in sizes))
    return table


def _step_columns(title: str, *first: str) -> Table:
    caption = (
        f"tokens/s of a GPU, not overlapped, one token a sequence; no room: weights and cache "
        f"exceed {USABLE:.0%} of its memory"
    )
    table = Table(title=title, caption=caption)
    times = ("floor", "exchange", "not over-\nlapped", "over-\nlapped", "tokens/s")
    for name in (*first, *times):
        table.add_column(name, justify="right")
    return table


def _add_step(table: Table, name: str, step: Step, *more: str) -> None:
    seconds = (step.floor.step, step.exchange, step.apart, step.overlapped)
    times = (f"{1e3 * t:.2f}" for t in seconds)
    rate = f"{step.floor.batch / step.apart:,.0f}"
    table.add_row(name, *more, *times, rate if step.fits else "no room")


def checked_plan(cfg: ModelConfig, gpu: str | None, mesh: MeshSize, **options: typing.Any) -> Plan:
    """A plan of what a user typed.

    Raises:
        ValueError: an unknown name, a size below its least value, or a mesh that does not fit the
            model.
    """
    if gpu is not None and gpu not in roofline.GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; known: {', '.join(roofline.GPUS)}")
    known = {
        "experts": roofline.EXPERT_BYTES,
        "cache": CACHES,
        "payload": typing.get_args(Payload),
        "exchange": typing.get_args(Exchange),
    }
    for name, names in known.items():
        if name in options and options[name] not in names:
            raise ValueError(f"{name}={options[name]!r} must be one of {', '.join(names)}")
    mesh.check(cfg)
    return Plan(mesh=mesh, **options)
