"""From a validated body to what a service is asked for."""

import dataclasses
import itertools
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dskjax.decode.rule_options import RuleOptions
from serve.api import GenerateOptions, TextService
from serve.http.config import HttpConfig
from serve.http.errors import ApiError, invalid, short
from serve.http.prompt import PromptEncoder
from serve.http.schema import ChatBody, CompletionBody, GenerateBody, Message
from serve.request import MAX_STOP_TOKENS, SamplingOptions, StopOptions


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One HTTP request for text.

    Attributes:
        prompts: ids and options of each prompt; all have the same `n`.
        accept: the rule that holds for it.
        stream, include_usage: how the client wants it.
    """

    prompts: Sequence[tuple[list[int], GenerateOptions]]
    accept: RuleOptions
    stream: bool
    include_usage: bool

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return self.prompts[0][1].n


class Planner:
    """Turns bodies into jobs, with the limits of a model and of the server."""

    def __init__(self, service: TextService, config: HttpConfig):
        self.encoder = PromptEncoder(service.tokenizer)
        self._service = service
        self._config = config
        self._seeds = _seeds()

    def completion(self, body: CompletionBody) -> Job:
        """Of /v1/completions.

        Raises:
            ApiError: 400 that names the field and the limit.
        """
        self._check(body)
        if body.best_of not in (None, body.n):
            raise invalid(
                f"best_of={body.best_of} is not supported: it must equal n={body.n} or be absent",
                "best_of",
                "unsupported_parameter",
            )
        if len(body.prompt) > self._config.max_prompts:
            raise invalid(
                f"{len(body.prompt)} prompts: give at most {self._config.max_prompts}", "prompt"
            )
        rows = [item for item in body.prompt if isinstance(item, list)]
        for ids in rows:
            self.check_ids(ids, "prompt")
        rows += self.encoder.text([item for item in body.prompt if isinstance(item, str)])
        if body.echo:
            for ids in rows:
                self._check_texts(ids)
        return self._job(
            body, rows, "prompt", body.max_tokens, body.logprobs, split=False, echo=body.echo
        )

    def chat(self, body: ChatBody) -> Job:
        """Of /v1/chat/completions.

        Raises:
            ApiError: 400 that names the field and the limit.
        """
        self._check(body)
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid(
                f"{body.max_tokens=} and {body.max_completion_tokens=} differ: give one of them",
                "max_tokens",
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        ids = self.conversation(body.messages, body.chat_template_kwargs.thinking)
        split = self.encoder.splits_reasoning
        return self._job(body, [ids], "messages", next(iter(limits), None), logprobs, split=split)

    def conversation(self, messages: Sequence[Message], thinking: bool | None) -> list[int]:
        """Ids of messages."""
        try:
            return self.encoder.chat([_plain(message) for message in messages], thinking)
        except ValueError as error:
            raise invalid(str(error), "messages") from None

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Every id must be one of the tokenizer's."""
        size = self._service.tokenizer.vocab_size
        bad = next((i for i in ids if not 0 <= i < size), None)
        if bad is not None:
            raise invalid(f"{param} has token id {bad}: ids are 0 to {size - 1}", param)

    def _check_texts(self, ids: Sequence[int]) -> None:
        """Every id must stand for a text: there are ids between the used ones."""
        for id_ in set(ids):
            try:
                self._service.tokenizer.token_bytes(id_)
            except ValueError as error:
                raise invalid(f"the prompt cannot be echoed: {error}", "prompt") from None

    def check_model(self, model: str | None) -> None:
        """Raises 404 for another model than the one served."""
        if model is not None and model != self._service.model:
            raise ApiError(
                404,
                f"the model {short(model)} does not exist; this server has {self._service.model!r}",
                param="model",
                code="model_not_found",
            )

    def _check(self, body: GenerateBody) -> None:
        """What needs no tokens."""
        config = self._config
        if body.n > config.max_n:
            raise invalid(f"n={body.n}: this server gives at most {config.max_n}", "n")
        if len(body.stop) > config.max_stop:
            raise invalid(f"{len(body.stop)} stop strings: give at most {config.max_stop}", "stop")
        room = MAX_STOP_TOKENS - len(self._service.tokenizer.eos_ids)
        if len(body.stop_token_ids) > room:
            raise invalid(
                f"{len(body.stop_token_ids)} stop_token_ids: give at most {room}", "stop_token_ids"
            )
        self.check_ids(body.stop_token_ids, "stop_token_ids")
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream=true", "stream_options")

    def _job(
        self,
        body: GenerateBody,
        rows: Sequence[list[int]],
        param: str,
        max_tokens: int | None,
        logprobs: int | None,
        *,
        split: bool,
        echo: bool = False,
    ) -> Job:
        bias = self._bias(body.logit_bias)
        prompts = []
        for ids in rows:
            stop = {
                "max_tokens": self._max_tokens(len(ids), max_tokens, param, least=0 if echo else 1),
                "min_tokens": body.min_tokens,
                "stop": tuple(body.stop),
                "stop_token_ids": tuple(body.stop_token_ids),
                "ignore_eos": body.ignore_eos,
            }
            sampling = {name: getattr(body, name) for name in _SAMPLING}
            sampling |= {"seed": self._seed(body), "logprobs": logprobs}
            if echo:
                sampling["prompt_logprobs"] = logprobs
            options = GenerateOptions(
                sampling=_made(SamplingOptions, **sampling, logit_bias=bias),
                stop=_made(StopOptions, **stop),
                accept=body.accept,
                drafts=body.speculate,
                n=body.n,
                priority=body.priority,
                salt=body.cache_salt,
                thinking=self.encoder.thinking(ids),
                split_reasoning=split,
                echo_special=not body.skip_special_tokens,
                echo=echo,
            )
            prompts.append((ids, options))
        usage = body.stream_options is not None and body.stream_options.include_usage
        accept = body.accept or self._service.default_accept
        return Job(prompts=prompts, accept=accept, stream=body.stream, include_usage=usage)

    def _max_tokens(self, prompt: int, wanted: int | None, param: str, *, least: int) -> int:
        limit = self._service.max_model_len
        if wanted is not None and wanted < least:
            fix = "use 0 or more" if not least else "use at least 1, or 0 in a completion with echo"
            raise invalid(f"max_tokens={wanted}: {fix}", "max_tokens", "invalid_value")
        if prompt == 0:
            raise invalid("the prompt is empty: a model continues at least one token", param)
        if prompt + (1 if wanted is None else wanted) > limit:
            new = f"max_tokens={wanted}" if wanted is not None else "at least 1 new token"
            raise invalid(
                f"the prompt has {prompt} tokens, which with {new} is more than the model's "
                f"{limit} tokens: shorten the prompt or lower max_tokens",
                param,
                "context_length_exceeded",
            )
        if wanted is not None:
            return wanted
        return min(limit - prompt, self._config.default_max_tokens or limit)

    def _seed(self, body: GenerateBody) -> int:
        """The given one, or one that no other request of this process got; answer i adds i."""
        if body.seed is not None:
            if not 0 <= body.seed <= 2**32 - body.n:
                raise invalid(f"seed={body.seed}: use 0 to 2**32 - n", "seed")
            return body.seed
        return next(seed for seed in self._seeds if seed <= 2**32 - body.n)

    def _bias(self, given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
        for key in given:
            if not re.fullmatch("0|[1-9][0-9]{0,9}", key):
                raise invalid(f"logit_bias has the key {short(key)}: use a token id", "logit_bias")
        pairs = tuple((int(key), value) for key, value in given.items())
        self.check_ids([token for token, _ in pairs], "logit_bias")
        return pairs


_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty",
)  # fmt: skip


def _made(kind: Any, **values: Any) -> Any:
    """Options whose own checks name the field."""
    try:
        return kind(**values)
    except ValueError as error:
        field = re.match(r"\w+", str(error))
        param = field[0] if field and field[0] in values else None
        raise invalid(str(error), param, "invalid_value") from None


def _plain(message: Message) -> dict[str, Any]:
    values = message.model_dump(exclude_none=True)
    if message.role == "developer":  # OpenAI's newer word for it
        values["role"] = "system"
    return values


def _seeds() -> Iterator[int]:
    """Every 32-bit number once, in an order that looks drawn: the step is odd."""
    start = secrets.randbits(32)
    return ((start + i * 0x9E3779B1) % 2**32 for i in itertools.count())
