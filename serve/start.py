"""From a checkpoint folder and options to a server: engines, coordinator, service, HTTP."""

import dataclasses
import functools
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
from fastapi import FastAPI
from rich.console import Console

from dskjax.checkpoint import load, load_config
from dskjax.decode.rules import ThinkIds
from dskjax.tokenizer import Tokenizer
from serve.attempts import CoordinatorConfig
from serve.build import Model, Placement, build_engine, decode_config, place
from serve.config import EngineConfig, RoleConfig
from serve.coordinator import Coordinator, Mailbox
from serve.engine import Engine, settle_process
from serve.engine_api import Role
from serve.engine_metrics import EngineMetrics
from serve.http.app import create_app
from serve.http.config import HttpConfig
from serve.http.server import check_address, run
from serve.metrics import Metrics
from serve.observe import EngineObserver, TransferObserver
from serve.programs import CompileCounter
from serve.router import Policy, Router
from serve.service import Service
from serve.transfer.faults import Faults
from serve.transfer.local import LocalTransport

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What to serve and how.

    Attributes:
        model: checkpoint folder with tokenizer.
        name: under which it is served.
        roles: engines.
        engine: sizes and choices of every engine.
        router: policy by name.
        faults: of the transport, on purpose; see `Faults.parse`.
        dtype: compute dtype; None: float32 on a CPU, bfloat16 elsewhere.
        quantised: what becomes of quantized weights: "keep", or "dequantise".
        http: limits and keys.
        coordinator: limits of requests on their way; None fits them to `engine`.

    Raises:
        ValueError: an unknown policy, or faults that cannot be read.
    """

    model: Path
    name: str
    roles: tuple[RoleConfig, ...]
    engine: EngineConfig
    router: str = Policy.REMAINING_SLOTS.value
    faults: str = ""
    dtype: str | None = None
    quantised: str = "keep"
    http: HttpConfig = dataclasses.field(default_factory=HttpConfig)
    coordinator: CoordinatorConfig | None = None

    def __post_init__(self):
        policies = [policy.value for policy in Policy]
        if self.router not in policies:
            raise ValueError(f"router={self.router!r}: use one of {', '.join(policies)}")
        Faults.parse(self.faults)
        if self.faults and all(role.role is Role.IFB for role in self.roles):
            raise ValueError(f"faults={self.faults!r} are of transfers: use roles such as 1P1D")


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that is warmed up; `service.start()` makes it answer.

    Attributes:
        service: text in, text out.
        app: the HTTP application.
        coordinator: requests on their way.
        engines: those that work.
        metrics: what /metrics shows.
        compiled: counts programs compiled since the warm-up.
        seconds: that the start took.
    """

    service: Service
    app: FastAPI
    coordinator: Coordinator
    engines: list[Engine]
    metrics: Metrics
    compiled: CompileCounter
    seconds: float


def engine_config(
    model: Path, *, max_model_len: int | None, drafts: int | None, **rest: Any
) -> EngineConfig:
    """`EngineConfig` with what a checkpoint says where nothing is given: its longest sequence, and
    as many drafts as it has MTP modules. Reads no weights.

    Raises:
        ValueError: a value is out of range, or more than the model can do.
        FileNotFoundError: no checkpoint there.
    """
    cfg = load_config(model)
    if drafts is None:
        drafts = cfg.mtp.num_nextn_predict_layers
    if max_model_len is None:
        max_model_len = cfg.max_position_embeddings
    config = EngineConfig(max_model_len=max_model_len, drafts=drafts, **rest)
    decode_config(cfg, config, ThinkIds())  # sooner than after loading the weights
    return config


def build_server(options: ServerOptions, console: Console) -> Server:
    """Loads the model, builds every engine and warms it up, with progress on `console`.

    Raises:
        ValueError: the options do not fit the model, the devices or their memory.
        FileNotFoundError: no checkpoint or no tokenizer there.
    """
    begun = time.monotonic()
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    placements = place(options.roles, jax.devices())
    tokenizer = Tokenizer.load(options.model)  # first: if it is missing, why load the weights
    params, cfg = load(
        options.model, dtype=dtype, quantised=options.quantised, progress=console.is_terminal
    )
    model = Model(
        name=options.name,
        params=params,
        cfg=cfg,
        eos_ids=tuple(dict.fromkeys((*cfg.eos_token_id, *tokenizer.eos_ids))),
        think=ThinkIds(tokenizer.think_id, tokenizer.end_think_id),
    )
    metrics, mailbox = Metrics(options.name), Mailbox()
    router = Router(Policy(options.router))
    split = any(role.role is Role.PREFILL for role in options.roles)
    transport = _transport(options, placements) if split else None
    counter = CompileCounter()
    coordinator: Coordinator | None = None

    def remaining(engine: Engine) -> int | None:
        """Of engines that decode, once the coordinator is there and has measured."""
        slots = None if coordinator is None else coordinator.lifecycle.remaining.get(engine.name)
        return None if slots is None else math.floor(slots)

    engines: list[Engine] = []
    by_engine: dict[str, EngineMetrics] = {}
    for placement in placements:
        numbers = metrics.engine(placement.name, _METRIC_ROLES[placement.role])
        by_engine[placement.name] = numbers
        observer = EngineObserver(
            numbers,
            options.engine.accept,
            compiled=lambda: counter.count,
            remaining=remaining,
        )
        engines.append(
            build_engine(
                model,
                options.engine,
                placement,
                post=mailbox.post,
                transport=transport,
                observer=observer,
                progress=functools.partial(_say, console, placement),
            )
        )
        numbers.started(time.monotonic() - begun)
    coordinator = Coordinator(
        engines,
        mailbox,
        transport=transport,
        router=router,
        config=options.coordinator or _limits(options),
        on_transfer=TransferObserver(by_engine),
    )
    service = Service(
        coordinator,
        tokenizer,
        model=options.name,
        max_model_len=options.engine.max_model_len,
        default_accept=options.engine.accept,
        default_drafts=options.engine.drafts,
        synthetic=options.engine.synthetic is not None,
        metrics=metrics,
    )
    app = create_app(service, options.http, registry=metrics.registry)
    counter.restart()
    return Server(service, app, coordinator, engines, metrics, counter, time.monotonic() - begun)


_METRIC_ROLES: dict[Role, Any] = {Role.IFB: "both", Role.PREFILL: "prefill", Role.DECODE: "decode"}


def _limits(options: ServerOptions) -> CoordinatorConfig:
    engine = options.engine
    layerwise = engine.layerwise_from
    if any(role.role is Role.PREFILL and role.dp is not None for role in options.roles):
        layerwise = engine.max_model_len + 1  # ranks send whole
    return CoordinatorConfig(max_queue=engine.max_waiting, layerwise_tokens=layerwise)


def _transport(options: ServerOptions, placements: list[Placement]) -> LocalTransport:
    faults = Faults.parse(options.faults) if options.faults else None
    if faults is not None:
        log.warning("transfers fail on purpose: %s", options.faults)
    return LocalTransport({p.name: p.mover() for p in placements}, faults=faults)


def _say(console: Console, placement: Placement, done: int, total: int, what: str) -> None:
    console.print(
        f"{placement.name}: compiled {done}/{total}: {what}", highlight=False, soft_wrap=True
    )


def serve_model(
    options: ServerOptions, host: str, port: int, drain_timeout: float, console: Console
) -> int:
    """Serves until a signal; returns the exit status.

    Raises:
        ValueError: see `build_server`, or nothing can listen there.
        FileNotFoundError: see `build_server`.
    """
    if not drain_timeout >= 0:
        raise ValueError(f"{drain_timeout=} must not be negative (seconds)")
    try:
        check_address(host, port)
    except OSError as error:
        raise ValueError(f"{error}; choose another host or port") from error
    server = build_server(options, console)

    def announce(host: str, port: int) -> None:
        roles = ", ".join(f"{engine.name}" for engine in server.engines)
        console.print(
            f"serving {options.name} at http://{host}:{port}/v1 ({roles}; started in "
            f"{server.seconds:.1f} s)",
            highlight=False,
            soft_wrap=True,
        )

    settle_process()
    server.service.start()
    try:
        return run(server.app, server.service, host, port, drain_timeout, announce=announce)
    finally:
        server.service.stop()
