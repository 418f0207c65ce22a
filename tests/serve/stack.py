"""Engines of the toy model and whoever waits for their answers."""

import queue
import time
from collections.abc import Iterable, Sequence

import jax

from dskjax.decode.rules import RuleOptions
from serve.build import Model, build_engine, place
from serve.config import EngineConfig, RoleConfig
from serve.engine import Engine
from serve.engine_api import EngineFailed, Role, Tokens
from serve.plan import TokenEvent, TokenLogprob
from serve.request import FinishReason, Request, SamplingOptions, StopOptions
from tests.decode.toy import toy

EOS = 1
"""The toy says it now and then."""
PATIENCE = 120.0
"""Seconds after which a test gives an engine up."""


def toy_model(modules: int) -> Model:
    params, cfg = toy(modules)
    return Model(name="toy", params=params, cfg=cfg, eos_ids=(EOS,))


def small(**changes) -> EngineConfig:
    """One program of each kind; a few slots of up to 64 tokens."""
    sizes = dict(max_model_len=64, slots=8, page_size=4, chunk=16, drafts=3, pages=64)
    rules = ("strict", "rejection")
    return EngineConfig(**{**sizes, "few_buckets": True, "rules": rules, **changes})


def make_request(id: str, prompt: Sequence[int], max_tokens: int = 12, **options) -> Request:
    """Options of any kind by name; greedy and strict unless they say otherwise."""
    of_stop = ("min_tokens", "stop", "stop_token_ids", "ignore_eos")
    of_request = ("drafts", "priority", "salt", "thinking", "arrival")
    stop = {key: options.pop(key) for key in of_stop if key in options}
    own = {key: options.pop(key) for key in of_request if key in options}
    rule = options.pop("rule", "strict")
    return Request(
        id,
        prompt,
        stop=StopOptions(max_tokens=max_tokens, **stop),
        sampling=SamplingOptions(**{"temperature": 0.0, **options}),
        accept=RuleOptions.parse(rule),
        **own,
    )


class Answers:
    """Takes the events of requests and waits for their ends.

    Attributes:
        tokens, logprobs, prompt_logprobs, ends: by request id.
    """

    def __init__(self):
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprob]] = {}
        self.ends: dict[str, TokenEvent] = {}
        self._queue: queue.SimpleQueue[list[TokenEvent]] = queue.SimpleQueue()

    def post(self, event) -> None:
        """What an engine posts, where there is no coordinator."""
        if isinstance(event, Tokens):
            self._queue.put(event.events)
        elif isinstance(event, EngineFailed):
            self._queue.put([])

    def sink(self, events: list[TokenEvent]) -> None:
        """What a coordinator sends."""
        self._queue.put(events)

    def take(self, timeout: float = PATIENCE) -> None:
        """Takes one batch of events in."""
        events = self._queue.get(timeout=timeout)
        assert events, "the engine failed"
        for event in events:
            id = event.request.id
            assert id not in self.ends, f"{event} after its end"
            self.tokens.setdefault(id, []).extend(event.tokens)
            if event.logprobs is not None:
                self.logprobs.setdefault(id, []).extend(event.logprobs)
            if event.prompt_logprobs is not None:
                assert id not in self.prompt_logprobs, f"{event} tells the prompt twice"
                assert self.tokens[id] == event.tokens, f"{event} comes before the prompt"
                self.prompt_logprobs[id] = event.prompt_logprobs
            if event.finish is not None:
                self.ends[id] = event

    def wait(self, ids: Iterable[str]) -> None:
        """Until all of these have ended."""
        ids = set(ids)
        while not ids <= self.ends.keys():
            self.take()

    def text(self, id: str) -> list[int]:
        """The tokens of a request that ended as it should."""
        end = self.ends[id]
        assert end.finish in (FinishReason.STOP, FinishReason.LENGTH), end
        return self.tokens[id]


def build(model: Model, config: EngineConfig, answers: Answers) -> Engine:
    """An engine that does everything, not started."""
    placement = place((RoleConfig(role=Role.IFB),), jax.devices())[0]
    return build_engine(model, config, placement, post=answers.post)


def until(condition, seconds: float = PATIENCE) -> None:
    """Waits for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def assert_empty(engine: Engine) -> None:
    """Nobody has a slot or a page, or waits; what is left are findable pages."""
    until(lambda: engine.scheduler.idle, 10.0)
    scheduler = engine.scheduler
    stats = scheduler.stats()
    assert stats[:6] == (0, 0, 0, 0, 0, 0), stats
    assert stats.free_pages == stats.total_pages, stats
    assert (scheduler.page_table == -1).all()
    for rank in getattr(scheduler, "ranks", [scheduler]):
        assert rank._table.free == rank.config.num_slots
        rank.blocks.check([])
