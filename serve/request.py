"""A request as an engine sees it: token ids in, token ids out. No text, no HTTP, no JAX.

The options are validated where they are made, so that what reaches an engine is known to be good. A
request that asks for n answers is n of these, with seeds counted up from its own.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence

MAX_LOGIT_BIAS = 300
"""Most ids a request may bias (OpenAI's limit); the device holds that many for every slot."""
MAX_STOP_TOKENS = 8
"""Most ids that end a request, those of the tokenizer included."""
MAX_LOGPROBS = 20
"""Most alternatives a token's log-probabilities list."""


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an eos, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the longest sequence the engine holds
    ABORT = "abort"  # the client went away, or the server drains
    ERROR = "error"  # see the event's message; nothing wrong was sent before it


class Status(enum.Enum):
    """Where a request is in an engine."""

    WAITING = enum.auto()  # no slot, no pages
    PREFILL = enum.auto()  # has a slot; some of its known tokens are not in the cache yet
    RUNNING = enum.auto()  # decoding
    RECEIVING = enum.auto()  # has a slot and pages; another engine's cache is on its way
    HELD = enum.auto()  # done here (prefill role), pages kept until the other side has them
    FINISHED = enum.auto()


def _check(name: str, value: float | int, low: float | int, high: float | int, fix: str) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: {fix}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How a request's tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus; 1 is off.
        top_k: 0 is off.
        min_p: 0 is off.
        presence_penalty: taken from the logit of each token the answer already has.
        frequency_penalty: taken once per occurrence in the answer.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and
            answer; 1 is off.
        logit_bias: (id, bias) pairs added to the logits.
        seed: same seed, same prompt, same options: same text under `strict` and greedy decoding.
        logprobs: None for none; n for the chosen token's and the n best ones'. Of the model's own
            distribution, before temperature, penalties and truncation.
        prompt_logprobs: the same for the tokens of the prompt, from the second on.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self):
        _check("temperature", self.temperature, 0, 100, "use a number from 0 (greedy) to 100")
        _check("top_p", self.top_p, 0, 1, "use 0 to 1, where 1 turns it off")
        _check("top_k", self.top_k, 0, 2**31 - 1, "use an integer >= 0, where 0 turns it off")
        _check("min_p", self.min_p, 0, 1, "use 0 to 1, where 0 turns it off")
        _check("presence_penalty", self.presence_penalty, -2, 2, "use -2 to 2")
        _check("frequency_penalty", self.frequency_penalty, -2, 2, "use -2 to 2")
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100, "use 0.01 to 100; 1 = off")
        _check("seed", self.seed, 0, 2**32 - 1, "use an integer in [0, 2**32)")
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _check(name, count, 0, MAX_LOGPROBS, f"use 0 to {MAX_LOGPROBS}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias has {len(self.logit_bias)} entries: give at most {MAX_LOGIT_BIAS}"
            )
        for token, bias in self.logit_bias:
            _check(f"logit_bias[{token}]", bias, -100, 100, "use -100 to 100")

    @property
    def penalised(self) -> bool:
        """Whether any of the three penalties is on."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StopOptions:
    """When a request ends.

    Attributes:
        max_tokens: most new tokens; with 0 the answer is empty, and only the prompt is scored.
        min_tokens: an eos or stop token cannot come before so many new tokens.
        stop: strings that end the answer; found by the output side, never part of the text.
        stop_token_ids: ids that end it beside the model's eos ids.
        ignore_eos: the model's eos ids do not end it.

    Raises:
        ValueError: a value is out of range.
    """

    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 0")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be 0 to {self.max_tokens=}")
        if len(self.stop) > 16 or any(not 0 < len(s) <= 256 for s in self.stop):
            raise ValueError(f"stop={self.stop!r}: give at most 16 strings of 1 to 256 characters")


class Request:
    """One sequence from arrival to end. Owned by the thread of the engine that runs it.

    `tokens` are all known tokens, prompt first; the last of them is never in the cache before the
    step that continues it. A preempted request starts over with everything it has as its prompt.

    Attributes:
        id: unique.
        tokens: prompt and emitted ids.
        prompt_len: ids of the prompt.
        sampling, stop, accept, drafts: options; `accept` is a `dskjax.decode.rules.RuleOptions`,
            `drafts` the most drafts a step (None: the engine's).
        priority: smaller runs first.
        arrival: seconds, on the engine's clock.
        salt: requests share cached prefixes only with the same salt.
        thinking: whether the rendered prompt ends inside a thinking section.
        status, slot: where it is; slot is -1 without one.
        cached: tokens whose rows are in the cache or in a launched step (prefill), from the front.
        hit: tokens of its prompt found in the prefix cache when it was admitted.
        drafted, accepted: draft tokens that the rule tested and accepted so far.
        admissions: how often it got a slot; tells results of an earlier life from this one's.
        first_scheduled, first_token, last_token: times, None until they happen.
    """

    __slots__ = (
        "accept",
        "accepted",
        "admissions",
        "arrival",
        "cached",
        "drafted",
        "drafts",
        "first_scheduled",
        "first_token",
        "hit",
        "id",
        "last_token",
        "prefill_only",
        "priority",
        "prompt_len",
        "salt",
        "sampling",
        "slot",
        "status",
        "stop",
        "thinking",
        "tokens",
    )

    def __init__(
        self,
        id: str,
        prompt: Sequence[int],
        *,
        stop: StopOptions,
        sampling: SamplingOptions | None = None,
        accept: object = None,
        drafts: int | None = None,
        priority: int = 0,
        arrival: float = 0.0,
        salt: str = "",
        thinking: bool = False,
        prefill_only: bool = False,
    ):
        if not len(prompt):
            raise ValueError("the prompt is empty: a model continues at least one token")
        self.id = id
        self.tokens = list(prompt)
        self.prompt_len = len(self.tokens)
        self.sampling = sampling or SamplingOptions()
        self.stop = stop
        self.accept = accept
        self.drafts = drafts
        self.priority = priority
        self.arrival = arrival
        self.salt = salt
        self.thinking = thinking
        self.prefill_only = prefill_only
        self.status = Status.WAITING
        self.slot = -1
        self.cached = 0
        self.hit = 0
        self.drafted = 0
        self.accepted = 0
        self.admissions = 0
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None

    @property
    def emitted(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """New tokens it may still emit."""
        return self.stop.max_tokens - self.emitted

    @property
    def scored(self) -> bool:
        """Its prompt's log-probabilities are asked for, and not told yet: they are told with the
        first token. Every row of the prompt has to be computed, so none is taken from the cache.
        """
        return self.sampling.prompt_logprobs is not None and not self.emitted

    @property
    def empty(self) -> bool:
        """There is no token to make and no log-probability to compute."""
        return not self.remaining and not (self.scored and self.prompt_len > 1)

    def __repr__(self) -> str:
        return f"Request({self.id!r}, {self.status.name}, {self.prompt_len}+{self.emitted})"
