"""Engines whose cache is a NumPy array of token ids.

The next token is a function of every cached row, read back from the pages: a wrong, stale or
corrupted page gives a wrong token. Freed pages are poisoned at once. The wire is as unforgiving as
remote memory access: a part is read from the source's pages when it is sent, and written to the
addresses that were reserved for it, whoever owns them by then.
"""

import dataclasses
from collections import deque

import numpy as np

from serve.engine_api import (
    EngineFailed,
    EngineLoad,
    EngineReady,
    Held,
    Installed,
    Refused,
    Reserved,
    Tokens,
)
from serve.plan import TokenEvent
from serve.request import FinishReason, Request
from serve.transfer.checks import checksum
from serve.transfer.transport import KVForm, Mode, Part

PAGE, LAYERS, VOCAB = 4, 2, 997
EOS = 0
POISON = -1
FORM = KVForm(
    model="fake",
    dtype="int64",
    kv_dtype="int64",
    page_size=PAGE,
    layers=LAYERS,
    latent=1,
    rope=0,
    mtp_scheme="none",
    mtp_depth=0,
    page_bytes=PAGE * LAYERS * 4,
)


def rows_of(tokens):
    """What the cache holds of these tokens: int32 [layers, tokens]."""
    tokens = np.asarray(tokens, np.int32)
    return np.stack([tokens + layer * 10007 for layer in range(LAYERS)])


def next_token(rows):
    """The model: int32 [layers, tokens] -> id."""
    weights = np.arange(1, rows.shape[1] + 1) * 2654435761 % 65521
    return int((rows.astype(np.int64) * weights).sum() % VOCAB)


def answer(prompt, stop):
    """What a request must get: its tokens to the end."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < stop.max_tokens:
        tokens.append(next_token(rows_of(tokens)))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class PageView:
    """Pages of a pool that are read when they are sent."""

    def __init__(self, pool, layers, pages):
        self.pool, self.layers, self.pages = pool, layers, pages

    def read(self):
        return self.pool[self.layers[0] : self.layers[1], self.pages].copy()


def place(packets, ranks):
    return [view.read() for view in packets]


@dataclasses.dataclass
class Run:
    """A request in a fake engine; `rows` are in its pages."""

    request: Request
    pages: list
    rows: int = 0
    ticket: object = None
    decoding: bool = False
    held: bool = False
    parts: int = 0
    pushed: int = 0  # pages


class FakeEngine:
    """Implements `EngineHandle`; `work` does one thing at a time."""

    def __init__(self, name, role, *, pages=16, slots=4, chunk=8, compat=FORM):
        self.name, self.role, self.compat = name, role, compat
        self.total, self.slots, self.chunk = pages, slots, chunk
        self.events = deque()
        self.transport = None
        self.bad_installs = 0
        self.lost = 0  # calls that a test makes it miss
        self.incarnation = 0
        self._begin()

    def _begin(self):
        self.pool = np.full((LAYERS, self.total, PAGE), POISON, np.int32)
        self.refs = [0] * self.total
        self.found: dict[tuple, int] = {}  # prefix -> page
        self.inbox, self.runs, self.waiting = deque(), {}, deque()
        self.addresses = {}
        self.ready = True

    def start(self):
        pass

    def stop(self):
        pass

    def kill(self):
        if self.ready:
            self._begin()
            self.ready = False
            self.events.append(EngineFailed(self.name, "killed"))

    def revive(self):
        if not self.ready:
            self._begin()
            self.events.append(EngineReady(self.name))

    # --- calls ----------------------------------------------------------------------------------

    def load(self):
        return EngineLoad(
            running=len(self.runs),
            waiting=len(self.waiting),
            free_pages=self.refs.count(0),
            total_pages=self.total,
            page_size=PAGE,
            slots=self.slots,
            tpot=0.01,
        )

    def validate(self, request):
        if -(-(len(request.tokens) + request.stop.max_tokens) // PAGE) > self.total:
            raise ValueError("too long for the pool")

    def _call(self, function, *args):
        if self.lost:
            self.lost -= 1
        elif self.ready:
            self.inbox.append((function, args))

    def submit(self, request):
        self._call(lambda: self.waiting.append(Run(request, [])))

    def submit_prefill(self, request, ticket):
        assert request.prefill_only and request.id == ticket.transfer_id
        self._call(lambda: self.waiting.append(Run(request, [], ticket=ticket)))

    def reserve(self, request):
        self._call(self._reserve, request)

    def activate(self, request_id, tokens):
        self._call(self._activate, request_id, tokens)

    def release(self, request_id, failed):
        self._call(self._end, request_id, not failed)

    def abort(self, request_id):
        self._call(self._end, request_id, True)

    def finish(self, request_id, reason):
        self._call(self._end, request_id, True)

    def deliver(self, ticket, part):
        """Writes at once, to whoever owns the addresses."""
        if not self.ready:
            return
        pages = self.addresses.get(ticket.transfer_id)
        ok = pages is not None
        if pages is not None:
            ids = pages[part.pages[0] : part.pages[1]]
            self.pool[part.layers[0] : part.layers[1], ids] = part.arrays
            there = self.pool[part.layers[0] : part.layers[1], ids]
            ok = checksum([there]) == part.checksum
            self.bad_installs += not ok
        self.events.append(Installed(self.name, ticket.transfer_id, part.index, ok))

    # --- the engine -----------------------------------------------------------------------------

    @property
    def idle(self):
        return not (self.inbox or self.runs or self.waiting)

    @property
    def pages_held(self):
        return sum(map(bool, self.refs))

    def work(self):
        """One command, or one step."""
        if self.inbox:
            function, args = self.inbox.popleft()
            function(*args)
        elif self.ready:
            self._step()

    def _take(self, run, tokens):
        """Slot and pages for so many tokens, those of a cached prefix first; False without room."""
        known = run.request.tokens
        hits = []
        for end in range(PAGE, len(known), PAGE):
            page = self.found.get(tuple(known[:end]))
            if page is None:
                break
            hits.append(page)
        need = -(-tokens // PAGE) - len(hits)
        free = [p for p in range(self.total) if not self.refs[p] and p not in hits]
        if len(self.runs) >= self.slots or need > len(free):
            return False
        unknown = set(self.found.values())
        free.sort(key=lambda page: page in unknown)
        run.pages = hits + free[:need]
        self._forget(free[:need])
        for page in run.pages:
            self.refs[page] += 1
        run.rows = len(hits) * PAGE
        run.request.hit = run.rows
        self.runs[run.request.id] = run
        return True

    def _forget(self, pages):
        self.found = {key: page for key, page in self.found.items() if page not in pages}
        self.pool[:, pages] = POISON

    def _reserve(self, request):
        run = Run(request, [])
        if self._take(run, len(request.tokens) + request.stop.max_tokens):
            self.addresses[request.id] = list(run.pages)
            self.events.append(Reserved(self.name, request.id, run.rows))
        else:
            self.events.append(Refused(self.name, request.id, "full"))

    def _activate(self, request_id, tokens):
        if run := self.runs.get(request_id):
            run.rows = len(run.request.tokens)
            run.request.tokens.extend(tokens)
            run.decoding = True

    def _end(self, request_id, keep):
        self.waiting = deque(run for run in self.waiting if run.request.id != request_id)
        if run := self.runs.pop(request_id, None):
            if keep:
                for end in range(PAGE, run.rows + 1, PAGE):
                    key = tuple(run.request.tokens[:end])
                    self.found.setdefault(key, run.pages[end // PAGE - 1])
            known = set(self.found.values())
            for page in run.pages:
                self.refs[page] -= 1
                if not self.refs[page] and page not in known:
                    self.pool[:, page] = POISON

    def _write(self, run, end):
        rows = rows_of(run.request.tokens[:end])
        for at in range(run.rows, end):
            self.pool[:, run.pages[at // PAGE], at % PAGE] = rows[:, at]
        run.rows = max(run.rows, end)

    def _read(self, run):
        pages = np.asarray(run.pages)
        return self.pool[:, pages].reshape(LAYERS, -1)[:, : run.rows]

    def _step(self):
        while self.waiting:
            run = self.waiting[0]
            more = 1 if run.ticket else run.request.remaining
            if not self._take(run, len(run.request.tokens) + more):
                break
            run.decoding = True
            self.waiting.popleft()
        events = []
        for run in list(self.runs.values()):
            if run.decoding and not run.held:
                self._advance(run, events)
        if events:
            self.events.append(Tokens(self.name, events))

    def _advance(self, run, events):
        request = run.request
        known = len(request.tokens)
        end = min(known, run.rows + self.chunk)
        layerwise = run.ticket and run.ticket.mode is Mode.LAYERWISE
        self._write(run, end)
        if layerwise:
            self._push(run, end)
        if end < known:
            return
        token = next_token(self._read(run))
        request.tokens.append(token)
        finish = None
        if token == EOS:
            finish = FinishReason.STOP
        elif request.remaining == 0:
            finish = FinishReason.LENGTH
        if run.ticket:
            run.held = True
            if not layerwise:
                first, last = run.ticket.pages
                self._send(run, (0, LAYERS), (first, last), True)
            self.events.append(Held(self.name, request.id, [token], None, finish))
            return
        events.append(TokenEvent(request, [token], finish))
        if finish:
            self._end(request.id, True)

    def _push(self, run, rows):
        """Parts of a chunk, one a layer; the first chunk's have what its own prefix cache held."""
        last = rows == len(run.request.tokens)
        first = max(run.pushed, run.ticket.pages[0])
        run.pushed = -(-rows // PAGE) if last else rows // PAGE
        for layer in range(LAYERS):
            if first < run.pushed:
                is_last = last and layer == LAYERS - 1
                self._send(run, (layer, layer + 1), (first, run.pushed), is_last)

    def _send(self, run, layers, pages, is_last):
        ids = run.pages[pages[0] : pages[1]]
        view = PageView(self.pool, layers, ids)
        part = Part(
            index=run.parts,
            is_last=is_last,
            layers=layers,
            pages=pages,
            arrays=view,
            checksum=checksum([view.read()]),
            nbytes=(layers[1] - layers[0]) * len(ids) * PAGE * 4,
        )
        run.parts += 1
        self.transport.push(run.ticket, part)
