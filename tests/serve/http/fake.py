"""A text service without an engine: words that depend on the seed, and knobs for what can go wrong.

Its iterators count themselves, so a test can tell whether one was left open.
"""

import asyncio
import contextlib
import math
import threading
from pathlib import Path

import uvicorn

from dskjax.decode.rules import RuleOptions
from dskjax.tokenizer import Tokenizer
from serve.api import Output, OutputLogprob, TextLogprob, UnavailableError, Usage
from serve.http.protocol import timed_protocol
from serve.request import FinishReason

WORDS = ("red ", "green ", "blue ", "grün ", "青 ", "black ", "white ")
TINY = Tokenizer.load(Path(__file__).parents[3] / "examples" / "tiny-deepseek")


class FakeService:
    """Answers `length` words, one a step.

    Attributes:
        length: words of an answer, if max_tokens allows.
        delay: seconds before each step.
        refusal: raised before the first piece.
        fault: raised instead of piece `at`.
        finish: (reason, message) that ends every answer at piece `at`.
        at: see there.
        hold: an event that every answer waits for before piece `at`.
        calls: what was asked, as (prompt, options, id).
        open, most: iterators open now, and at most so far.
    """

    def __init__(self, tokenizer: Tokenizer = TINY):
        self.model = "org/fake"
        self.created = 1_700_000_000
        self.max_model_len = 256
        self.tokenizer = tokenizer
        self.default_accept = RuleOptions.parse("rejection")
        self.default_drafts = 2
        self.synthetic = False
        self.started = True
        self.draining = False
        self.length = 4
        self.delay = 0.0
        self.refusal = None
        self.fault = None
        self.finish = None
        self.at = 1
        self.hold = None
        self.calls = []
        self.open = 0
        self.most = 0
        self.probes = 0
        self.probe_delay = 0.0
        self.probe_error = None

    @property
    def ready(self) -> bool:
        return self.started and not self.draining

    async def generate(self, prompt, options, *, request_id):
        self.calls.append((list(prompt), options, request_id))
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            if self.draining:
                raise UnavailableError("the server drains")
            if self.refusal is not None:
                raise self.refusal
            count = min(self.length, options.stop.max_tokens)
            if not count:
                for index in range(options.n):
                    yield self._nothing(prompt, options, index)
            for step in range(count):
                await asyncio.sleep(self.delay)
                if step == self.at:
                    if self.hold is not None:
                        await self.hold.wait()
                    if self.fault is not None:
                        raise self.fault
                for index in range(options.n):
                    yield self._output(prompt, options, index, step, count)
                if step == self.at and self.finish is not None:
                    return
        finally:
            self.open -= 1

    def _output(self, prompt, options, index, step, count):
        if step == self.at and self.finish is not None:
            return Output(index=index, finish=self.finish[0], message=self.finish[1])
        word = WORDS[(options.sampling.seed + index + step) % len(WORDS)]
        last = step == count - 1
        inside = options.thinking and options.split_reasoning and step < 2
        finish = FinishReason.STOP if count == self.length else FinishReason.LENGTH
        text = "" if inside else word
        logprobs = self._logprobs(word, options.sampling.logprobs)
        if not step:
            text = self._prompt(prompt, options) + text
            logprobs = [*(self._front(prompt, options) or ()), *(logprobs or ())] or None
        return Output(
            index=index,
            text=text,
            reasoning=word if inside else "",
            token_ids=[100 + step],
            logprobs=logprobs,
            finish=finish if last else None,
            usage=self._usage(prompt, options, count) if last else None,
        )

    def _nothing(self, prompt, options, index):
        return Output(
            index=index,
            text=self._prompt(prompt, options),
            logprobs=self._front(prompt, options),
            finish=FinishReason.LENGTH,
            usage=self._usage(prompt, options, 0),
        )

    def _prompt(self, prompt, options):
        skip = not options.echo_special
        return self.tokenizer.decode(prompt, skip_special=skip) if options.echo else ""

    def _front(self, prompt, options):
        """Of an echoed prompt: the word of each token, which -1 for the first but none."""
        if options.sampling.prompt_logprobs is None:
            return None
        words = [self.tokenizer.decode([token]) for token in prompt]
        found = [OutputLogprob(TextLogprob(words[0], [], None), [])]
        return found + [OutputLogprob(TextLogprob(word, [], -1.0), []) for word in words[1:]]

    def _usage(self, prompt, options, count):
        return Usage(
            prompt_tokens=len(prompt),
            completion_tokens=count,
            cached_tokens=min(2, len(prompt)),
            reasoning_tokens=2 if options.thinking else 0,
            drafted=2 * count,
            accepted=count,
            lossless=(options.accept or self.default_accept).lossless,
            synthetic=self.synthetic,
        )

    def _logprobs(self, word, count):
        if count is None:
            return None
        top = [TextLogprob(f"t{i}", list(b"t%d" % i), -0.5 - i) for i in range(count)]
        if top:  # an impossible token has no logarithm
            top[-1] = TextLogprob("never", list(b"never"), -math.inf)
        return [OutputLogprob(TextLogprob(word, list(word.encode()), -0.25), top)]

    async def probe(self, timeout):
        self.probes += 1
        await asyncio.sleep(self.probe_delay)
        if self.probe_error is not None:
            raise self.probe_error
        return 0.125

    def drain(self):
        self.draining = True


@contextlib.contextmanager
def listening(app, header_timeout=5.0, write_timeout=5.0):
    """The app on a free port of this machine; yields the port."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=timed_protocol(header_timeout, write_timeout),
        ws="none",
        log_level="critical",
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def until(condition, seconds=5.0):
    """Waits for something that another thread does."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen in time")
