"""From a model and a configuration to engines that are ready to start."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dskjax.cache import init_cache
from dskjax.config import ModelConfig
from dskjax.decode.ranks import Ranks
from dskjax.decode.rules import ThinkIds
from dskjax.decode.slots import RowOptions, Slots, init_slots
from dskjax.decode.step import DecodeConfig
from dskjax.decode.synthetic import SyntheticAcceptance
from dskjax.expert_parallel import Exchange
from dskjax.params import Params
from serve.blocks import BlockManager
from serve.buckets import Buckets
from serve.config import EngineConfig, RoleConfig
from serve.drafting import DraftPolicy
from serve.engine import Engine, Observer
from serve.engine_api import EngineEvent, Role
from serve.expert_balancer import ExpertBalancer
from serve.layerwise import LayerwisePrefill, layer_groups
from serve.link import DeviceLink
from serve.memory import count_pages, step_memory
from serve.placement import Placement, place_params
from serve.programs import Programs, Progress
from serve.rank_runner import RankRunner
from serve.rank_scheduler import RankScheduler
from serve.request import Request, StopOptions
from serve.rows import needs, option_row, row_options
from serve.runner import Runner
from serve.scheduler import Scheduler
from serve.scheduler_config import SchedulerConfig
from serve.transfer.pages import PagePrograms, kv_form
from serve.transfer.pools import Pools
from serve.transfer.transport import KVTransport


def place(roles: Sequence[RoleConfig], devices: Sequence[Any]) -> list[Placement]:
    """Gives each engine devices of its own, in order.

    Raises:
        ValueError: there are fewer devices than the roles need.
    """
    needed = sum(role.devices for role in roles)
    if needed > len(devices):
        raise ValueError(
            f"the roles need {needed} devices and there are {len(devices)}: use fewer engines or "
            f"smaller tp or ep, or, on a CPU, --cpu-devices {needed}"
        )
    placements, at = [], 0
    for role in roles:
        for index in range(role.engines):
            own = tuple(devices[at : at + role.width])
            at += role.width
            placements.append(
                Placement(f"{role.role.value}{index}", role.role, own, role.ep, role.dp)
            )
    return placements


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What every engine serves.

    Attributes:
        name: under which it is served.
        params: weights on the host or anywhere.
        cfg: the model.
        eos_ids: ids that end a request.
        think: ids of the thinking tags.
    """

    name: str
    params: Params
    cfg: ModelConfig
    eos_ids: tuple[int, ...]
    think: ThinkIds = ThinkIds()


def decode_config(cfg: ModelConfig, config: EngineConfig, think: ThinkIds) -> DecodeConfig:
    """The static choices of an engine's step. Needs no weights, so it is what tells early whether
    a configuration fits a model.

    Raises:
        ValueError: it does not.
    """
    longest = cfg.max_position_embeddings
    if config.max_model_len > longest:
        raise ValueError(
            f"max_model_len={config.max_model_len} exceeds max_position_embeddings={longest}: "
            "lower it"
        )
    synthetic = None
    if config.synthetic is not None:
        synthetic = SyntheticAcceptance.from_mean_length(config.synthetic, config.drafts)
    return DecodeConfig.make(
        cfg,
        accept=config.rules,
        drafts=config.drafts,
        think=think,
        synthetic=synthetic,
        impl=config.impl,
    )


def build_engine(
    model: Model,
    config: EngineConfig,
    placement: Placement,
    *,
    post: Callable[[EngineEvent], None],
    transport: KVTransport | None = None,
    observer: Observer | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Places the weights, sizes the cache, compiles every program and runs each once.

    Args:
        model: what to serve.
        config: sizes and choices.
        placement: name, role and devices.
        post: takes the engine's events.
        transport: between prefill and decode engines.
        observer: told about every step.
        progress: told about every program.

    Raises:
        ValueError: the configuration does not fit the model or the memory.
    """
    if placement.role is Role.PREFILL and (placement.dp is None or placement.ep == 1):
        config = dataclasses.replace(config, redundant_experts=0)  # those of the decode engines
    ranks, exchange = placement.ranks, Exchange.of(placement.split)
    count = 1 if ranks is None else ranks.count
    _check_shares(config, count)
    params, cfg = place_params(
        model.params,
        model.cfg,
        placement,
        unroll=config.unroll,
        redundant=config.redundant_experts,
    )
    if exchange is not None and cfg.moe is not None:
        exchange.check(cfg.moe.num_slots)
    decode = dataclasses.replace(
        decode_config(cfg, config, model.think), exchange=exchange, sharding=placement.split
    )
    drafts = {config.drafts}
    if placement.role is Role.PREFILL:
        drafts = {0}  # it makes first tokens alone
    elif config.adaptive:
        drafts.add(0)
    buckets = Buckets.make(
        slots=config.slots // count,
        columns=config.columns,
        chunk=config.chunk,
        drafts=tuple(drafts),
        mixed=config.mixed,
        few=config.few_buckets,
        extras=config.extras,
        scored=config.prompt_logprobs,
    )
    state = _empty_slots(model, config, decode, params, placement, pages=count * config.columns)
    pages = config.pages or _pages(config, cfg, decode, buckets, params, state, placement)
    state = _empty_slots(model, config, decode, params, placement, pages=pages)
    kind = Runner if ranks is None else RankRunner
    rest = {"accept": config.accept, "eos_ids": model.eos_ids, "ranks": ranks}
    runner = kind(cfg, decode, buckets, params, state, **rest)
    if isinstance(runner, RankRunner) and config.redundant_experts and config.rebalance_every:
        assert ranks is not None
        told = Observer().balanced if observer is None else observer.balanced
        runner.balancer = ExpertBalancer(
            params, cfg, ranks.sharding, every=config.rebalance_every, told=told
        )
    form = kv_form(
        state,
        model=_fingerprint(model),
        dtype=str(params["embed_tokens"]["weight"].dtype),
        mtp_scheme=cfg.mtp.scheme if config.drafts else "",
    )
    link = None
    if transport is not None:
        runner.state, link = _link(config, runner, transport, placement)
    runner.warm_up(progress)
    scheduler = _scheduler(config, decode, buckets, pages, model.eos_ids, form.digest, ranks)
    return Engine(
        placement.name,
        placement.role,
        scheduler,
        runner,
        form,
        post=post,
        link=link,
        observer=observer,
    )


def _link(
    config: EngineConfig, runner: Runner, transport: KVTransport, placement: Placement
) -> tuple[Slots, DeviceLink]:
    """The engine's end of the wire, with its programs compiled."""
    sends, receives = placement.role is Role.PREFILL, placement.role is Role.DECODE
    trunk, layers = runner.cfg.num_hidden_layers, runner.state.cache.latent.shape[0]
    groups: set[int] = set()
    whole = sends and placement.dp is not None  # steps of ranks are not cut into layer groups
    if config.layerwise_from <= config.max_model_len and not whole:
        ranges = layer_groups(trunk, config.layer_group)
        groups = {end - first for first, end in ranges} | ({layers - trunk} - {0})
        if sends:
            runner.layerwise = LayerwisePrefill(runner.programs, config.layer_group)
            runner.layerwise.compile()
    largest, sizes = config.columns, [config.columns]
    while sizes[0] > max(largest // 16, 1):
        sizes.insert(0, -(-sizes[0] // 2))
    programs = PagePrograms(Pools(runner.state, placement.pools), sizes, sorted(groups))
    programs.compile(sends=sends, receives=receives)
    return programs.warm_up(runner.state), DeviceLink(runner, programs, transport, trunk)


def _check_shares(config: EngineConfig, ranks: int) -> None:
    """Whether slots and pages can be shared out to the ranks.

    Raises:
        ValueError: they cannot; the message says what would do.
    """
    least = {"slots": ranks, "pages": ranks * config.columns if ranks > 1 else 1}
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and (value % ranks or value < smallest):
            raise ValueError(
                f"{name}={value} for {ranks} ranks: give a multiple of {ranks} that is at least "
                f"{smallest}"
            )


def _empty_slots(
    model: Model,
    config: EngineConfig,
    decode: DecodeConfig,
    params: Params,
    placement: Placement,
    *,
    pages: int,
) -> Slots:
    dtype = params["embed_tokens"]["weight"].dtype
    ranks = placement.ranks
    counters = 0 if ranks is None or not config.redundant_experts else ranks.count
    nobody = Request("nobody", [0], stop=StopOptions(max_tokens=1))
    row = option_row(nobody, accept=config.accept, drafts=config.drafts, eos_ids=())

    def make(options: RowOptions) -> Slots:
        cache = init_cache(
            model.cfg,
            num_pages=pages,
            page_size=config.page_size,
            dtype=dtype,
            kv_dtype=config.kv_dtype,
        )
        return init_slots(
            cache, options, cfg=model.cfg, spec=decode.spec, dtype=dtype, counters=counters
        )

    # Under jit: the pool may fill its device, so it must not be made on another one first.
    options = row_options([row], config.slots)
    where = placement.sharding if ranks is None else ranks.state(jax.eval_shape(make, options))
    return jax.jit(make, out_shardings=where)(options)


def _pages(
    config: EngineConfig,
    cfg: ModelConfig,
    decode: DecodeConfig,
    buckets: Buckets,
    params: Params,
    state: Slots,
    placement: Placement,
) -> int:
    """Pages of all ranks together."""
    rule, ranks = config.accept.name, placement.ranks
    count = 1 if ranks is None else ranks.count
    return count * count_pages(
        page_bytes=state.cache.page_bytes,
        most=config.slots // count * config.columns,
        least=config.columns,
        fraction=config.memory_fraction,
        device=placement.devices[0],
        measure=lambda: step_memory(Programs(cfg, decode, buckets, params, state, rule, ranks)),
    )


def _scheduler(
    config: EngineConfig,
    decode: DecodeConfig,
    buckets: Buckets,
    pages: int,
    eos_ids: tuple[int, ...],
    fingerprint: str,
    ranks: Ranks | None,
) -> Scheduler | RankScheduler:
    spec, count = decode.spec, 1 if ranks is None else ranks.count
    sizes = SchedulerConfig(
        num_slots=config.slots // count,
        num_pages=pages // count,
        page_size=config.page_size,
        max_columns=config.columns,
        drafts=config.drafts,
        lookahead=spec.depths,
        tail=spec.tail,
        max_prefill_tokens=buckets.chunk,
        max_chunks=8,
        max_chunk_tokens=buckets.chunk,
        prefill_policy=config.prefill_policy,
        reserve_tokens=min(128, config.max_model_len // 4),
        max_waiting=-(-config.max_waiting // count),
        max_waiting_tokens=-(-config.max_waiting_tokens // count),
    )
    blocks = [
        BlockManager(
            sizes.num_pages,
            config.page_size,
            fingerprint=fingerprint.encode(),
            lookahead=spec.depths,
            tail=spec.tail,
        )
        for _ in range(count)
    ]
    drafting = DraftPolicy(buckets.drafts, buckets.batches)
    if ranks is None:
        return Scheduler(sizes, blocks[0], eos_ids=eos_ids, drafting=drafting)
    return RankScheduler(
        sizes,
        blocks,
        buckets=buckets,
        needed=lambda request: needs(request, request.accept in (None, config.accept)),
        eos_ids=eos_ids,
        drafting=drafting,
    )


def _fingerprint(model: Model) -> str:
    """Names config and weights: a hash of the config and of a sample of every weight."""
    digest = hashlib.sha256(repr(model.cfg).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        first = np.asarray(jax.device_get(leaf[(0,) * leaf.ndim]))
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        digest.update(first.tobytes())
    return digest.hexdigest()
