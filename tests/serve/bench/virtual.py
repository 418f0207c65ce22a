"""An event loop whose clock jumps to the next timer, and a queue of servers on it."""

import asyncio
import selectors

from serve.bench.answer import Answer


class JumpingSelector(selectors.SelectSelector):
    """Nothing is waited for: time is what was slept."""

    now = 0.0

    def select(self, timeout=None):
        events = super().select(0)
        if not events:
            assert timeout is not None, "everything waits for something that has no time"
            self.now += timeout
        return events


def run(main):
    """`asyncio.run` in virtual time; returns (result, seconds)."""
    selector = JumpingSelector()

    def make_loop():
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now
        return loop

    with asyncio.Runner(loop_factory=make_loop) as runner:
        result = runner.run(main)
    return result, selector.now


class Queue:
    """`slots` requests at a time, each `seconds` for its tokens; the first comes at once.

    Attributes:
        most: requests that were under way together, waiting ones included.
        seen: what was asked, in order.
    """

    def __init__(self, slots, seconds, tokens=11, fail=lambda number: None):
        self.slots, self.seconds, self.tokens = asyncio.Semaphore(slots), seconds, tokens
        self.fail = fail
        self.here = self.most = 0
        self.seen = []

    async def send(self, job, *, due=None):
        loop = asyncio.get_running_loop()
        sent = loop.time()
        due = sent if due is None else due
        self.seen.append((job, sent))
        error = self.fail(len(self.seen) - 1)
        if error is not None:
            return Answer(due=due, sent=sent, error=error)
        self.here += 1
        self.most = max(self.most, self.here)
        async with self.slots:
            first = loop.time()
            await asyncio.sleep(self.seconds)
        self.here -= 1
        return answer(due, sent, first, loop.time(), tokens=self.tokens)


def answer(due, sent, first, last, tokens=11, **rest):
    """One that came to its end."""
    return Answer(
        due=due,
        sent=sent,
        pieces=(first, last),
        finish="length",
        prompt_tokens=rest.pop("prompt_tokens", 5),
        completion_tokens=tokens,
        **rest,
    )
