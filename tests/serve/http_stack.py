"""A whole server of the toy model on a real port, and clients that know the answers."""

import asyncio
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence

import httpx2
import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dskjax.decode import RuleOptions, generate
from dskjax.tokenizer import Tokenizer
from serve.build import build_engine, place
from serve.config import EngineConfig, RoleConfig
from serve.coordinator import Coordinator, Mailbox
from serve.engine import Engine
from serve.engine_api import Role
from serve.http import HttpConfig, create_app
from serve.metrics import Metrics
from serve.observe import EngineObserver
from serve.service import Service
from tests.decode.toy import toy
from tests.serve.http.fake import listening
from tests.serve.stack import EOS, assert_empty, small, toy_model, until

LETTERS = "abcde"
LONGEST = 64
STOPS = ("dc", "ced", "ac", "aa")


def toy_tokenizer() -> Tokenizer:
    """A letter for each of the toy's ids."""
    vocab = {letter: id for id, letter in enumerate(LETTERS)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, config={"eos_token": LETTERS[EOS]})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """A greedy completion. `leave_after` closes the connection after so many pieces."""

    prompt: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool = True
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    speculate: int | None = None
    stream: bool = False
    leave_after: int | None = None

    @property
    def body(self) -> dict:
        body = dataclasses.asdict(self) | {"model": "toy", "temperature": 0}
        del body["leave_after"]
        body["stop"], body["prompt"] = list(self.stop), list(self.prompt)
        body["accept"] = "strict" if self.max_tokens % 2 else "rejection"
        if body["speculate"] is None:
            del body["speculate"]
        return body

    def expected(self) -> tuple[str, str]:
        """Text and finish reason, from one token at a time of `dskjax.decode.generate`."""
        ends = {*self.stop_token_ids, *(() if self.ignore_eos else (EOS,))}
        text = ""
        for token in alone(self.prompt)[: self.max_tokens]:
            if token in ends:
                return text, "stop"
            text += LETTERS[token]
            found = [stop for stop in self.stop if text.endswith(stop)]
            if found:
                return text[: -len(max(found, key=len))], "stop"
        return text, "length"


@functools.cache
def alone(prompt: tuple[int, ...]) -> list[int]:
    """The longest greedy answer to a prompt, generated with nobody else in the batch."""
    params, cfg = toy(1)
    rest = LONGEST - len(prompt)  # every prompt has one page table width, hence one program
    result = generate(
        params, cfg, [prompt], max_tokens=rest, drafts=0, accept="strict", page_size=4, chunk=8
    )
    return result.tokens[0]


@functools.cache
def prompts(count: int = 24) -> list[tuple[int, ...]]:
    """Two of three begin like seven others."""
    rng = np.random.default_rng(0)
    families = [rng.integers(0, 5, 16).tolist() for _ in range(2)]
    pool = []
    for n in range(count):
        tail = rng.integers(0, 5, int(rng.integers(1, 14))).tolist()
        pool.append(tuple([*families[n % 2], *tail] if n % 3 else tail))
    return pool


def wishes(count: int, *, seed: int = 0, leaving: float = 0.1, longest: int = 30) -> list[Wish]:
    """Mixed requests over a few prompts, many of which begin alike."""
    rng, pool = np.random.default_rng(seed), prompts()
    pick = rng.choice
    found = []
    for _ in range(count):
        prompt = pool[rng.integers(len(pool))]
        leaves = rng.random() < leaving
        found.append(
            Wish(
                prompt=prompt,
                max_tokens=30 if leaves else int(rng.integers(1, longest + 1)),
                ignore_eos=leaves or bool(rng.random() < 0.7),
                stop=() if leaves or rng.random() < 0.6 else (str(pick(STOPS)),),
                stop_token_ids=() if leaves or rng.random() < 0.8 else (int(pick([0, 3])),),
                speculate=[None, 0, 3][rng.integers(3)],
                stream=leaves or bool(rng.random() < 0.5),
                leave_after=int(rng.integers(0, 4)) if leaves else None,
            )
        )
    return found


@dataclasses.dataclass
class Reply:
    """What a client got; `usage` is empty of one that left."""

    text: str
    finish: str | None
    usage: dict


async def ask(client: httpx2.AsyncClient, wish: Wish) -> Reply:
    if not wish.stream:
        response = await client.post("/v1/completions", json=wish.body)
        assert response.status_code == 200, response.text
        answer = response.json()
        choice = answer["choices"][0]
        return Reply(choice["text"], choice["finish_reason"], answer["usage"])
    reply, pieces = Reply("", None, {}), 0
    body = wish.body | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        if wish.leave_after == 0:
            return reply
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            piece = json.loads(line.removeprefix("data: "))
            assert "error" not in piece, piece
            reply.usage = piece.get("usage") or reply.usage
            for choice in piece["choices"]:
                reply.text += choice["text"]
                reply.finish = choice["finish_reason"] or reply.finish
            pieces += 1
            if pieces == wish.leave_after:
                return reply
    return reply


@dataclasses.dataclass
class Stack:
    """A server that listens."""

    port: int
    engines: list[Engine]
    coordinator: Coordinator
    service: Service

    def ask_all(self, asked: Sequence[Wish], *, at_once: int) -> list[Reply]:
        """Replies in the order of the wishes, at most so many under way."""

        async def run() -> list[Reply]:
            room = asyncio.Semaphore(at_once)
            limits = httpx2.Limits(max_connections=at_once)
            base = f"http://127.0.0.1:{self.port}"
            async with httpx2.AsyncClient(base_url=base, limits=limits, timeout=120) as client:

                async def one(wish: Wish) -> Reply:
                    async with room:
                        return await ask(client, wish)

                return await asyncio.gather(*(one(wish) for wish in asked))

        return asyncio.run(run())

    def assert_empty(self) -> None:
        """Nobody is served, and nothing is left of anybody."""
        until(lambda: self.coordinator.lifecycle.idle, 10.0)
        until(lambda: not len(self.service._output), 10.0)
        assert not self.coordinator._posted and not self.coordinator.lifecycle.books.queue
        assert self.service._streams == 0
        for engine in self.engines:
            assert_empty(engine)


@contextlib.contextmanager
def serving(config: EngineConfig, modules: int = 1) -> Iterator[Stack]:
    """One engine behind coordinator, service and HTTP."""
    model, mailbox, metrics = toy_model(modules), Mailbox(), Metrics("toy")
    engines = [
        build_engine(
            model,
            config,
            placement,
            post=mailbox.post,
            observer=EngineObserver(metrics.engine(placement.name), config.accept),
        )
        for placement in place((RoleConfig(role=Role.IFB),), jax.devices())
    ]
    coordinator = Coordinator(engines, mailbox)
    service = Service(
        coordinator,
        toy_tokenizer(),
        model="toy",
        max_model_len=config.max_model_len,
        default_accept=RuleOptions(name="strict"),
        default_drafts=config.drafts,
        metrics=metrics,
    )
    app = create_app(service, HttpConfig(), registry=metrics.registry)
    service.start()
    try:
        with listening(app) as port:
            until(lambda: service.ready)
            yield Stack(port, engines, coordinator, service)
    finally:
        service.stop()


def tight() -> EngineConfig:
    """So few pages that requests push each other out."""
    return small(max_model_len=LONGEST, pages=22, adaptive=True)
