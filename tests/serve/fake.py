"""A device without a device: `FakeRunner` does to pages and slots what the real runner does.

Its language is a hash: the next token is a function of all tokens before it, so the answer to a
prompt is known (`continuation`) whatever batching, preemption and drafts do to it. Its cache holds
the token of every row, and for every MTP module the token that its row was computed from, so
reading a context through the page table shows whether every page still is what its reader thinks.
Whatever cannot happen on a correct host raises AssertionError.

    runner = FakeRunner(config, eos_ids=(0,))
    pending = runner.launch(plan, scheduler.page_table)      copies what it needs
    result = runner.fetch(pending)                           only now does the step happen

That a step happens as late as it can is the point: whatever the host does in between, a transfer
into pages that it thinks are free above all, comes before the step.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from serve.plan import Chunk, StepLogprobs, StepPlan, StepResult
from serve.request import MAX_LOGPROBS, FinishReason, Request, StopOptions
from serve.scheduler_config import SchedulerConfig

VOCAB = 64
"""Tokens of the fake's language."""
UNKNOWN, REJECTED, DRAFTED, SKIPPED, EMPTY = -2, -3, -4, -5, -1
"""What a cell holds that no correct reader may see."""


class Text:
    """Tokens, and the hash of all of them that the next one follows from."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens: list[int] = []
        self.hash = 0
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.hash = (self.hash * 6364136223846793005 + token + 1442695040888963407) & (2**64 - 1)

    def next(self, forbidden: frozenset[int], vocab: int) -> int:
        """The token that follows, or the first one after it that is allowed."""
        token = (self.hash >> 33) % vocab
        while token in forbidden:
            token = (token + 1) % vocab
        return token

    def draw(self, salt: int) -> float:
        """A number in [0, 1) that depends on all tokens and `salt`."""
        mixed = (self.hash ^ (salt * 0x9E3779B97F4A7C15)) * 0xD6E8FEB86659FD93 & (2**64 - 1)
        return (mixed >> 11) / 2**53


def stops(stop: StopOptions, eos_ids: Sequence[int]) -> frozenset[int]:
    """Ids that end a request."""
    return frozenset((*stop.stop_token_ids, *(() if stop.ignore_eos else eos_ids)))


def continuation(
    prompt: Sequence[int], stop: StopOptions, eos_ids: Sequence[int] = (), vocab: int = VOCAB
) -> tuple[list[int], FinishReason]:
    """What `FakeRunner` answers to a prompt, and how the answer ends."""
    text, ends = Text(prompt), stops(stop, eos_ids)
    for emitted in range(stop.max_tokens):
        text.append(text.next(ends if emitted < stop.min_tokens else frozenset(), vocab))
        if text.tokens[-1] in ends:
            return text.tokens[len(prompt) :], FinishReason.STOP
    return text.tokens[len(prompt) :], FinishReason.LENGTH


def scores(tokens: Sequence[int], start: int, end: int, vocab: int = VOCAB) -> StepLogprobs:
    """What `FakeRunner` says of the tokens after rows [start, end)."""
    following = np.array(tokens[start + 1 : end + 1])[:, None]
    best = np.arange(MAX_LOGPROBS)
    values = -np.arange(start, end)[:, None] - following / vocab - best
    return StepLogprobs(values[:, 0], (following + best) % vocab, values)


@dataclasses.dataclass
class Admitted:
    """Copy of a request as of its admission."""

    id: str
    slot: int
    tokens: list[int]
    prompt_len: int
    stop: StopOptions
    draft_limit: int


@dataclasses.dataclass
class Row:
    """Device state of a slot; `filled` rows from the front are in the cache, `hit` were before."""

    request: Admitted
    text: Text
    hit: int = -1
    filled: int = -1
    drafted: int = 0
    active: bool = True


@dataclasses.dataclass
class FakePending:
    """A launched step and copies of everything it reads."""

    plan: StepPlan
    admitted: list[Admitted]
    slots: list[int]
    chunks: list[tuple[int, int, int]]
    table: np.ndarray
    logprobs: bool
    scored: list[bool]
    ready: float


class FakeRunner:
    """Implements `serve.plan.Runner` without a device.

    Args:
        config: sizes, K, lookahead and tail.
        eos_ids: ids that end a request unless it ignores them.
        acceptance: probability that a draft is accepted.
        latency: seconds a step takes; steps follow each other, as on a device.
        vocab: tokens of the language.

    Attributes:
        trunk: int64 [pages, page_size], the token of each row.
        modules: int64 [pages, page_size, lookahead], the token k places on that the row of module k
            was computed from.
        launched, fetched: steps so far.
        computed: prompt rows computed so far.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        eos_ids: Sequence[int] = (),
        acceptance: float = 0.6,
        latency: float = 0.0,
        vocab: int = VOCAB,
    ):
        self.config = config
        self.eos_ids = tuple(eos_ids)
        self.acceptance = acceptance
        self.latency = latency
        self.vocab = vocab
        shape = (config.num_pages, config.page_size)
        self.trunk = np.full(shape, EMPTY)
        self.modules = np.full((*shape, config.lookahead), EMPTY)
        self.launched = self.fetched = self.computed = 0
        self._rows: dict[int, Row] = {}
        self._received: dict[str, int] = {}
        self._ready = 0.0

    # ---- what an engine calls

    def launch(self, plan: StepPlan, page_table: np.ndarray) -> FakePending:
        """Copies what the step reads; it happens in `fetch`."""
        assert not plan.empty, "an empty plan was launched"
        assert plan.number == self.launched, (plan.number, self.launched)
        assert page_table.shape == (self.config.num_slots, self.config.max_columns)
        assert plan.slots.dtype == np.int32 and len(plan.slots) == len(plan.requests)
        assert len(plan.chunks) <= self.config.max_chunks
        assert sum(chunk.length for chunk in plan.chunks) <= self.config.max_prefill_tokens
        assert 0 <= plan.drafts <= self.config.drafts
        self.launched += 1
        self._ready = max(self._ready, time.monotonic()) + self.latency
        return FakePending(
            plan=plan,
            admitted=[self._admitted(request) for request in plan.admit],
            slots=plan.slots.tolist(),
            chunks=[(c.request.slot, c.start, c.length) for c in plan.chunks],
            table=page_table.copy(),
            logprobs=any(r.sampling.logprobs is not None for r in plan.requests),
            scored=[c.request.scored for c in plan.chunks],
            ready=self._ready,
        )

    def fetch(self, pending: FakePending) -> StepResult:
        """Waits until the step's time is over, does it and returns what it did."""
        assert pending.plan.number == self.fetched, "results must be fetched in order"
        self.fetched += 1
        if self.latency:
            time.sleep(max(pending.ready - time.monotonic(), 0.0))
        for request in pending.admitted:
            assert len(request.tokens) > 0 and request.slot >= 0
            self._rows[request.slot] = Row(request, Text(request.tokens))
        touched = [*pending.slots, *(slot for slot, _, _ in pending.chunks)]
        assert len(set(touched)) == len(touched), f"a slot twice in one step: {touched}"
        for slot, request in zip(pending.slots, pending.plan.requests, strict=True):
            row = self._rows.get(slot)
            assert row and row.request.id == request.id, f"{request} was not admitted to {slot}"
        result = self._decode(pending)
        for slot, start, length in pending.chunks:
            self._prefill(slot, start, length, pending)
        return result._replace(prompt_logprobs=self._scores(pending))

    # ---- what a transfer does

    def receive(self, tokens: Sequence[int], pages: Sequence[int], start: int, id: str) -> None:
        """Writes the rows from `start` on of a prompt that another engine computed, at once.

        Args:
            tokens: the prompt and its first new token.
            pages: the request's pages, from its first token on.
            start: rows that were in the prefix cache.
            id: of the request.
        """
        length = len(tokens) - 1
        self._write(np.array(pages), tokens, range(start, length), length)
        self._received[id] = length

    # ---- the device

    def _admitted(self, request: Request) -> Admitted:
        limit = self.config.drafts if request.drafts is None else request.drafts
        return Admitted(
            request.id, request.slot, list(request.tokens), request.prompt_len, request.stop, limit
        )

    def _cells(self, table: np.ndarray, positions: range) -> tuple[np.ndarray, np.ndarray]:
        at = np.array(positions, np.int64)
        pages = table[at // self.config.page_size]
        assert (pages >= 0).all(), f"rows {positions} have no page in {table}"
        return pages, at % self.config.page_size

    def _write(
        self, table: np.ndarray, tokens: Sequence[int], positions: range, newest: int
    ) -> None:
        """Rows of trunk and modules, as far as tokens up to position `newest` determine them."""
        if not len(positions):
            return
        cells = self._cells(table, positions)
        self.trunk[cells] = [tokens[p] for p in positions]
        for k in range(self.config.lookahead):
            known = [tokens[p + k + 1] if p + k + 1 <= newest else UNKNOWN for p in positions]
            self.modules[(*cells, k)] = known

    def _verify(self, row: Row, table: np.ndarray, length: int) -> None:
        """Reads the first `length` rows back; rows from the prefix cache with their modules."""
        tokens = row.text.tokens
        cells = self._cells(table, range(length))
        found = self.trunk[cells].tolist()
        assert found == tokens[:length], f"{row.request.id} reads {found}, not {tokens[:length]}"
        hit = min(row.hit, length)
        for k in range(self.config.lookahead):
            found = self.modules[(*cells, k)][:hit].tolist()
            wanted = tokens[k + 1 : hit + k + 1]
            assert found[: len(wanted)] == wanted, (
                f"{row.request.id}: module {k + 1} reads {found} in shared rows, not {wanted}"
            )

    def _prefill(self, slot: int, start: int, length: int, pending: FakePending) -> None:
        row, table = self._rows[slot], pending.table[slot]
        if row.filled < 0:
            row.hit = row.filled = start
        end = start + length
        assert row.filled == start, f"{row.request.id}: rows {row.filled} to {start} are missing"
        assert 0 < length and end < len(row.text.tokens), (row.request.id, start, length)
        self._columns(end, pending)
        self._verify(row, table, start)
        self._write(table, row.text.tokens, range(start, end), len(row.text.tokens) - 1)
        row.filled = end
        self.computed += length

    def _columns(self, rows: int, pending: FakePending) -> None:
        columns = pending.plan.columns
        assert self.config.pages(rows) <= columns, f"{rows} rows exceed {columns} columns"

    def _decode(self, pending: FakePending) -> StepResult:
        n, m = len(pending.slots), pending.plan.drafts
        tokens = np.full((n, m + 1), UNKNOWN, np.int32)
        count, accepted, offered = np.zeros((3, n), np.int32)
        finished = np.zeros(n, np.bool_)
        for at, slot in enumerate(pending.slots):
            if self._rows[slot].active:
                new, offered[at], accepted[at], finished[at] = self._step(slot, m, pending)
                count[at] = len(new)
                tokens[at, : len(new)] = new
        return StepResult(
            tokens, count, accepted, offered, finished, self._logprobs(pending, tokens)
        )

    def _step(self, slot: int, m: int, pending: FakePending) -> tuple[list[int], int, int, bool]:
        config, row, table = self.config, self._rows[slot], pending.table[slot]
        request, text = row.request, row.text
        start = len(text.tokens) - 1
        if row.filled < 0:  # no prompt rows in this life: received, or all in the prefix cache
            row.hit = row.filled = start
            if self._received.pop(request.id, None) is not None:
                row.hit = 0  # the modules' last rows await the first step
            else:
                assert min(config.tail, start) == 0, f"{request.id} has no hidden states to go on"
        elif row.drafted == 0 and row.hit >= 0:
            assert row.filled - row.hit >= min(config.tail, row.filled), f"{request.id}: short tail"
        assert row.filled == start, (request.id, row.filled, start)
        self._verify(row, table, start)
        offered = min(m, row.drafted, request.draft_limit)
        kept = 0
        while kept < offered and text.draw(kept) < self.acceptance:
            kept += 1
        ends = stops(request.stop, self.eos_ids)
        new, finished = self._emit(text, request, kept + 1, ends)
        length = len(text.tokens) - 1
        limit = request.prompt_len + request.stop.max_tokens
        last = min(start + 1 + m, limit)
        self._columns(last, pending)
        cells = self._cells(table, range(start, last))
        self.trunk[cells] = REJECTED
        self.modules[cells] = SKIPPED
        self._write(table, text.tokens, range(start, length), start if finished else length)
        if finished:
            self.modules[self._cells(table, range(start, length))] = SKIPPED
        else:
            first = max(start - config.tail, 0)
            self._write(table, text.tokens, range(first, length), length)
            self.modules[self._cells(table, range(length, min(length + m, limit)))] = DRAFTED
            self._columns(min(length + m, limit), pending)
        row.filled, row.drafted, row.active = length, m, not finished
        return new, offered, kept, finished

    def _emit(
        self, text: Text, request: Admitted, most: int, ends: frozenset[int]
    ) -> tuple[list[int], bool]:
        new: list[int] = []
        while len(new) < most:
            emitted = len(text.tokens) - request.prompt_len
            early = ends if emitted < request.stop.min_tokens else frozenset()
            new.append(text.next(early, self.vocab))
            text.append(new[-1])
            if new[-1] in ends or emitted + 1 == request.stop.max_tokens:
                return new, True
        return new, False

    def _scores(self, pending: FakePending) -> list[tuple[Chunk, StepLogprobs]]:
        found = []
        for chunk, (slot, start, length) in zip(pending.plan.chunks, pending.chunks, strict=True):
            tokens = self._rows[slot].text.tokens
            found.append((chunk, scores(tokens, start, start + length, self.vocab)))
        return [one for one, wanted in zip(found, pending.scored, strict=True) if wanted]

    def _logprobs(self, pending: FakePending, tokens: np.ndarray) -> StepLogprobs | None:
        if not pending.logprobs:
            return None
        best = np.arange(MAX_LOGPROBS)
        ids = (np.maximum(tokens, 0)[..., None] + best) % self.vocab
        values = np.broadcast_to(-0.5 - best, ids.shape)
        return StepLogprobs(values[..., 0].astype(np.float32), ids, values.astype(np.float32))
