"""The interface between the HTTP layer and what answers: text in pieces, with usage and errors.

HTTP knows nothing of engines and engines nothing of text; `serve.service.Service` implements
`TextService` on top of a backend, and tests of HTTP use a fake one.
"""

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from dskjax.decode.rules import RuleOptions
from dskjax.tokenizer import Tokenizer
from serve.errors import OverloadedError as OverloadedError
from serve.errors import UnavailableError as UnavailableError
from serve.request import FinishReason, SamplingOptions, StopOptions


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """Everything about a request but its prompt.

    Attributes:
        sampling, stop: see `serve.request`.
        accept: acceptance rule and its parameters; None is the server's.
        drafts: most drafts a step; None is the server's, 0 turns speculation off.
        n: answers to one prompt; answer i has seed + i.
        priority: smaller first.
        salt: prefix-cache name space.
        thinking: the rendered prompt ends inside a thinking section.
        split_reasoning: put what is inside thinking into `Output.reasoning`, without the tags.
        echo_special: keep special tokens in the text.
        echo: put the prompt in front of each answer, with `sampling.prompt_logprobs` among the
            log-probabilities too.
    """

    sampling: SamplingOptions
    stop: StopOptions
    accept: RuleOptions | None = None
    drafts: int | None = None
    n: int = 1
    priority: int = 0
    salt: str = ""
    thinking: bool = False
    split_reasoning: bool = False
    echo_special: bool = False
    echo: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class TextLogprob:
    """A token's text, its bytes and its log-probability: None for a prompt's first token."""

    token: str
    bytes: list[int]
    logprob: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class OutputLogprob:
    """The chosen token and the best alternatives, best first."""

    chosen: TextLogprob
    top: list[TextLogprob]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of one answer, and how speculation did.

    Attributes:
        prompt_tokens: ids of the prompt.
        completion_tokens: new ids up to the end, an eos and the tokens of a stop string included.
        cached_tokens: prompt ids found in the prefix cache.
        reasoning_tokens: new ids inside thinking.
        drafted, accepted: draft tokens offered to and accepted by the rule.
        lossless: the rule leaves the model's distribution unchanged.
        synthetic: acceptance was simulated: the text means nothing.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    lossless: bool = True
    synthetic: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A piece of one answer.

    Attributes:
        index: which of the n answers.
        text: new text; empty while a character or a possible stop string is held back. With `echo`
            the first piece's begins with the prompt.
        reasoning: new text of the thinking section, with `split_reasoning`.
        token_ids: new ids.
        logprobs: one entry per id of `token_ids`, if asked for; with `echo` those of the first
            piece are preceded by one per id of the prompt.
        finish: set on the last piece.
        stop_reason: the stop string or stop id that ended it; None for an eos.
        message: what went wrong, with FinishReason.ERROR.
        usage: on the last piece.
    """

    index: int = 0
    text: str = ""
    reasoning: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[OutputLogprob] | None = None
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    message: str = ""
    usage: Usage | None = None


@runtime_checkable
class TextService(Protocol):
    """What HTTP needs.

    Attributes:
        model: name under which the model is served.
        created: Unix time of the start.
        max_model_len: most tokens of prompt and answer together.
        tokenizer: of the model.
        default_accept, default_drafts: the server's own choice.
        synthetic: a synthetic acceptance mode is on: every output says so.
    """

    model: str
    created: int
    max_model_len: int
    tokenizer: Tokenizer
    default_accept: RuleOptions
    default_drafts: int
    synthetic: bool

    @property
    def ready(self) -> bool:
        """Warmed up and not draining."""
        ...

    @property
    def draining(self) -> bool:
        """No new requests; those in flight go on to their end."""
        ...

    def generate(
        self, prompt: Sequence[int], options: GenerateOptions, *, request_id: str
    ) -> AsyncIterator[Output]:
        """Starts n answers and yields their pieces as they come; closing the iterator aborts them.

        Raises (before the first piece):
            ValueError: the request cannot be served as it is.
            OverloadedError: the queue is full.
            UnavailableError: not ready, or draining.
        """
        ...

    async def probe(self, timeout: float) -> float:
        """Generates one token through every engine; returns the seconds it took.

        Raises:
            UnavailableError: no token within `timeout` seconds.
        """
        ...

    def drain(self) -> None:
        """Refuses new requests from now on."""
        ...
