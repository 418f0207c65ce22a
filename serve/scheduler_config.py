"""What a scheduler is told once: sizes of the device side, budgets and bounds of its policy."""

import dataclasses
from typing import Literal, NamedTuple

PrefillPolicy = Literal["short-first", "fcfs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Sizes and policy. The sizes must be those of the runner and of the block manager.

    Attributes:
        num_slots: most requests with device state at a time.
        num_pages, page_size: the pool, and tokens a page holds.
        max_columns: width of the page table: most pages of one sequence.
        drafts: K, most drafts a step.
        lookahead, tail: see `serve.blocks.BlockManager`.
        max_prefill_tokens: prompt rows of one step.
        max_chunk_tokens: those of one request; None is as many as the step has.
        max_chunks: requests that may have prompt rows in one step.
        mixed: prompt rows and decoding share a step; otherwise they take turns.
        prefill_policy: "short-first" serves the fewest uncached tokens first, "fcfs" by arrival.
            Priority comes before either.
        max_skips: steps with prompt rows that may pass a request by before it goes to the head of
            its priority for one chunk.
        max_wait: seconds without a chunk after which it goes there too.
        reserve_tokens: new tokens that admission leaves room for, for each running request.
        max_waiting: requests without a slot; more are refused.
        max_waiting_tokens: their tokens together; more are refused, though never a lone request.

    Raises:
        ValueError: a value is out of range.
    """

    num_slots: int
    num_pages: int
    page_size: int
    max_columns: int
    drafts: int = 0
    lookahead: int = 0
    tail: int = 0
    max_prefill_tokens: int = 8192
    max_chunk_tokens: int | None = None
    max_chunks: int = 16
    mixed: bool = True
    prefill_policy: PrefillPolicy = "short-first"
    max_skips: int = 16
    max_wait: float = 1.0
    reserve_tokens: int = 128
    max_waiting: int = 1024
    max_waiting_tokens: int = 2**20

    def __post_init__(self):
        positive = ("num_slots", "num_pages", "page_size", "max_columns", "max_prefill_tokens")
        for name in (*positive, "max_chunks", "max_waiting", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise ValueError(f"max_chunk_tokens={self.max_chunk_tokens} must be at least 1")
        for name in ("drafts", "lookahead", "tail", "max_skips", "max_wait", "reserve_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.lookahead > self.drafts:
            raise ValueError(
                f"lookahead={self.lookahead} exceeds drafts={self.drafts}: no module that is "
                "deeper than the drafts runs"
            )
        if self.prefill_policy not in ("short-first", "fcfs"):
            raise ValueError(f"prefill_policy={self.prefill_policy!r}: use 'short-first' or 'fcfs'")

    def pages(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    @property
    def chunk(self) -> int:
        """Most prompt rows of one request in a step."""
        return min(self.max_chunk_tokens or self.max_prefill_tokens, self.max_prefill_tokens)

    @property
    def first_rows(self) -> int:
        """Rows beyond a sequence's length that its first decode step may touch."""
        return 1 + 2 * self.drafts


class SchedulerStats(NamedTuple):
    """A snapshot; counts since the scheduler was made where nothing else is said.

    Attributes:
        waiting, prefilling, running, receiving, held: requests in each state now.
        waiting_tokens: known tokens of the waiting ones.
        free_pages: pages nobody holds, findable ones included, now.
        cached_pages: those of them that are findable, now.
        total_pages: the pool.
        hit_tokens, queried_tokens: prompt tokens found in the prefix cache, and looked for.
        preemptions: requests that lost slot and pages to another.
        mean_output: tokens of an answer, running mean over those that ended; 0 before the first.
    """

    waiting: int
    prefilling: int
    running: int
    receiving: int
    held: int
    waiting_tokens: int
    free_pages: int
    cached_pages: int
    total_pages: int
    hit_tokens: int
    queried_tokens: int
    preemptions: int
    mean_output: float
