"""Whether and where the request at the head of the queue may start."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from serve.attempts import Attempt, Books, CoordinatorConfig, Record
from serve.engine_api import EngineHandle, Reserved, Role
from serve.router import Router
from serve.transfer.transport import Endpoint, KVTransport, Mode, Ticket


class Start(NamedTuple):
    """Where a request starts; `prefill` is empty if one engine does it all."""

    engine: str
    prefill: str = ""


def connect(engines: Sequence[EngineHandle], transport: KVTransport | None) -> bool:
    """Registers engines of different roles at the transport; whether roles are split.

    Raises:
        ValueError: the roles do not make a server, or a name is used twice.
        IncompatibleError: a prefill and a decode engine hold their caches differently.
    """
    roles = {engine.role for engine in engines}
    if roles not in ({Role.IFB}, {Role.PREFILL, Role.DECODE}):
        raise ValueError(f"{sorted(roles)=}: use ifb alone, or both prefill and decode")
    if len({engine.name for engine in engines}) != len(engines):
        raise ValueError(f"engine names {[e.name for e in engines]} must differ")
    if Role.IFB in roles:
        return False
    if transport is None:
        raise ValueError("prefill and decode engines need a transport between them")
    for engine in engines:
        transport.register(Endpoint(engine.name, engine.compat), engine.deliver)
    for source, target in itertools.product(engines, engines):
        if source.role is Role.PREFILL and target.role is Role.DECODE:
            transport.check(source.name, target.name)
    return True


class Admission:
    """Chooses engines for requests, from the books and the engines' own snapshots."""

    def __init__(self, books: Books, router: Router, config: CoordinatorConfig, split: bool):
        """`split`: prefill and decode are different engines."""
        self._books = books
        self._router = router
        self._config = config
        self._split = split

    def choose(self, record: Record) -> Start | None:
        """Where it may start now; None if it has to wait."""
        if not self._split:
            engine = self._router.pick(self._books.views(Role.IFB))
            return None if engine is None else Start(engine)
        config, known = self._config, len(record.request.tokens)
        views = [v for v in self._books.views(Role.DECODE) if len(v.requests) < v.load.slots]
        queued = self._books.queued_prefill()
        if not views or not queued:
            return None
        least = min(queued.values())
        if known <= config.local_prefill_tokens and least > config.local_prefill_queue:
            roomy = [v for v in views if self._router.remaining(v) > config.local_prefill_slots]
            if (engine := self._router.pick(roomy)) is not None:
                return Start(engine)
        if least and least + known > config.prefill_queue_tokens:
            return None
        engine, prefill = self._router.pick(views), self._router.pick_prefill(queued)
        assert engine is not None and prefill is not None
        return Start(engine, prefill)

    def ticket(self, attempt: Attempt, reserved: Reserved, now: float) -> Ticket | None:
        """The ticket of a reserved attempt, which may name another source; None without any."""
        queued = self._books.queued_prefill()
        if attempt.prefill in queued:
            queued[attempt.prefill] -= attempt.pending
        if (source := self._router.pick_prefill(queued)) is None:
            return None
        config, form = self._config, self._books.engines[attempt.decode].compat
        layerwise = attempt.prompt - reserved.hit_tokens >= config.layerwise_tokens
        if attempt.record.request.scored:  # layer groups do not score
            layerwise = False
        return Ticket(
            request_id=attempt.record.request.id,
            generation=attempt.record.generation,
            source=source,
            target=attempt.decode,
            tokens=attempt.prompt,
            skip_tokens=reserved.hit_tokens,
            page_size=form.page_size,
            layers=form.layers,
            page_bytes=form.page_bytes,
            mode=Mode.LAYERWISE if layerwise else Mode.WHOLE,
            deadline=now + config.prefill_timeout + config.transfer_timeout,
            lease=config.lease,
            target_rank=reserved.rank,
        )
