"""An engine on a fake device, turned by hand, and a wire that is a function call."""

import time

from serve.blocks import BlockManager
from serve.engine import Engine
from serve.engine_api import EngineEvent, Installed, Role, Tokens
from serve.plan import TokenEvent
from serve.scheduler import Scheduler
from serve.scheduler_config import SchedulerConfig
from serve.transfer.transport import KVForm, Mode, Part, Ticket
from tests.serve.fake import FakeRunner, continuation
from tests.serve.harness import EOS, make_config, make_request

FORM = KVForm(
    model="fake",
    dtype="int64",
    kv_dtype="int64",
    page_size=4,
    layers=1,
    latent=1,
    rope=0,
    mtp_scheme="chain",
    mtp_depth=1,
    page_bytes=32,
)


class TracedRunner(FakeRunner):
    """Notes when steps are launched and fetched; fails or hangs when told to.

    Attributes:
        trace: ("launch" or "fetch", number), in order.
        fail: what to raise, by the call it is raised in.
        hold: an event that fetches wait for.
        refuse: raised by `check`.
    """

    def __init__(self, config: SchedulerConfig, **options):
        super().__init__(config, eos_ids=EOS, **options)
        self.trace = []
        self.fail = {}
        self.hold = None
        self.refuse = None

    def check(self, request):
        if self.refuse is not None:
            raise self.refuse

    def launch(self, plan, page_table):
        self._note("launch", plan.number)
        return super().launch(plan, page_table)

    def fetch(self, pending):
        if self.hold is not None:
            self.hold.wait()
        self._note("fetch", pending.plan.number)
        return super().fetch(pending)

    def _note(self, what, number):
        self.trace.append((what, number))
        if what in self.fail:
            raise self.fail[what]


class FakeLink:
    """Writes parts, whose arrays are all tokens of a request, into the fake device at once."""

    def __init__(self, runner: FakeRunner):
        self.runner = runner
        self.calls = []
        self.where = {}
        self._known = []

    @property
    def checking(self):
        return bool(self._known)

    def begin(self, ticket, request, where):
        self.calls.append(("begin", request.id))
        self.where[request.id] = where

    def complete(self, request_id):
        self.calls.append(("complete", request_id, len(self.where[request_id]().pages)))

    def drop(self, request_id):
        self.calls.append(("drop", request_id))

    def receive(self, ticket, part, home):
        self.calls.append(("receive", ticket.transfer_id))
        if home is not None:
            assert home.slot >= 0
            self.runner.receive(part.arrays, home.pages, ticket.skip_tokens, ticket.transfer_id)
        self._known.append((ticket.transfer_id, part.index, home is not None))

    def installed(self, engine):
        known, self._known = self._known, []
        return [Installed(engine, *one) for one in known]


class Turned(Engine):
    """Never waits for a command: whoever turns it has none."""

    idled = 0

    def _rest(self, seconds):
        self.idled += 1


class EngineBench:
    """An engine without its thread.

    Attributes:
        events: everything it posted.
    """

    def __init__(self, role: Role = Role.IFB, *, acceptance: float = 0.6, **changes):
        drafts = changes.get("drafts", 0)
        sizes = dict(lookahead=min(drafts, 2), tail=min(drafts, 1)) | changes
        config = make_config(**sizes)
        self.runner = TracedRunner(config, acceptance=acceptance)
        self.link = FakeLink(self.runner)
        self.blocks = BlockManager(
            config.num_pages, config.page_size, lookahead=config.lookahead, tail=config.tail
        )
        self.scheduler = Scheduler(config, self.blocks, eos_ids=EOS)
        self.events: list[EngineEvent] = []
        self.engine = Turned(
            "e", role, self.scheduler, self.runner, FORM, post=self.events.append, link=self.link
        )

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine._turn()

    def drain(self) -> None:
        """Turns until it has nothing left to do."""
        for _ in range(3000):
            idled = self.engine.idled
            self.turn()
            if self.engine.idled > idled and not self.engine._inbox:
                return
        raise AssertionError(f"still busy: {self.scheduler.requests}")

    def of(self, id: str) -> list[TokenEvent]:
        """Events of a request."""
        batches = [event.events for event in self.events if isinstance(event, Tokens)]
        return [event for batch in batches for event in batch if event.request.id == id]

    def tokens(self, id: str) -> list[int]:
        return [token for event in self.of(id) for token in event.tokens]

    def posted(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    def check_drained(self) -> None:
        """Every slot and every page is back."""
        stats = self.scheduler.stats()
        assert self.scheduler.idle and stats[:6] == (0, 0, 0, 0, 0, 0), stats
        lost = self.scheduler.config.num_pages - self.blocks.available
        assert not lost, f"{lost} pages are lost"
        assert (self.scheduler.page_table == -1).all()
        self.blocks.check([])
        assert not self.engine._launched and not self.engine._inbox


def ticket(id: str, tokens: int, skip: int = 0) -> Ticket:
    """Of the request's first attempt; its transfer id is "id#0"."""
    return Ticket(
        request_id=id,
        generation=0,
        source="p",
        target="e",
        tokens=tokens,
        skip_tokens=skip,
        page_size=4,
        layers=1,
        page_bytes=32,
        mode=Mode.WHOLE,
        deadline=time.monotonic() + 100,
    )


def part(tokens: list[int], pages: tuple[int, int], index: int = 0) -> Part:
    return Part(
        index=index,
        is_last=True,
        layers=(0, 1),
        pages=pages,
        arrays=tokens,
        checksum=0,
        nbytes=32,
    )


def wanted(tokens, max_tokens=8, **options):
    return continuation(tokens, make_request("x", tokens, max_tokens, **options).stop, EOS)[0]


def submit(bench, id, tokens, max_tokens=8, **options):
    request = make_request(id, tokens, max_tokens, **options)
    bench.engine.submit(request)
    return request
