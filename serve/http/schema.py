"""What the bodies of requests may hold, with strict types: "5" is no number and true no 1.

A null is an absent field. Fields of OpenAI's interface that are not supported are accepted if they
ask for nothing (`IGNORED`, or a value that changes nothing) and refused by name otherwise; unknown
ones are refused. Ranges of sampling options are checked by `serve.request`, where they live.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from dskjax.decode.rule_options import RuleOptions
from serve.http.errors import ApiError, invalid, short

IGNORED = frozenset({
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip
"""Fields that change nothing here, whatever they hold."""


def _never(_: Any) -> bool:
    return False


_NEUTRAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "audio": (_never, "only text is served"),
    "chat_template": (_never, "the template is the checkpoint's own"),
    "continue_final_message": (lambda v: v is False, "an answer is always a new message"),
    "echo": (lambda v: v is False, "an answer does not repeat the conversation"),
    "function_call": (lambda v: v in ("none", "auto"), "functions are not supported"),
    "functions": (lambda v: v == [], "functions are not supported"),
    "modalities": (lambda v: v == ["text"], "only text is served"),
    "prediction": (_never, "drafts come from the model's MTP modules"),
    "reasoning_effort": (_never, 'use chat_template_kwargs {"thinking": true or false}'),
    "response_format": (lambda v: v == {"type": "text"}, "only text, without a grammar"),
    "suffix": (lambda v: v == "", "text is continued, not filled in"),
    "tool_choice": (lambda v: v in ("none", "auto"), "tools are not supported"),
    "tools": (lambda v: v == [], "tools are not supported"),
    "verbosity": (_never, "ask for it in the prompt"),
    "web_search_options": (_never, "nothing is searched"),
}
"""Known but not supported: whether a value asks for nothing, and what to say if it does not."""


class Body(pydantic.BaseModel):
    """What all bodies share: strict types, no further fields."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _rule(value: Any) -> RuleOptions:
    """ "typical:eps=0.1", or {"name": "typical", "eps": 0.1}."""
    if isinstance(value, str):
        return RuleOptions.parse(value)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('give a rule as "name:key=value,..." or {"name": ..., key: value, ...}')
    for key, number in value.items():
        if key == "name":
            continue
        if not re.fullmatch(r"\w{1,32}", key):
            raise ValueError(f"{short(key)} is no parameter of a rule")
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{key}={short(number)} must be a number")
    rest = ",".join(f"{key}={number!r}" for key, number in value.items() if key != "name")
    return RuleOptions.parse(f"{value['name']}:{rest}" if rest else value["name"])


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One text, several, ids of one prompt, or ids of several."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, list) and item for item in value) and all(
            type(id_) is int for item in value for id_ in item
        ):
            return value
    raise ValueError("give text, a list of texts, token ids or a list of lists of token ids")


def _content(value: Any) -> str:
    """Text, or OpenAI's text parts joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("give text or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"only parts of type text are supported, not {short(part)}")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"a text part is {{'type': 'text', 'text': ...}}, not {short(part)}")
    return "".join(part["text"] for part in value)


def _printable(value: str) -> str:
    if len(value) > 256:
        raise ValueError("give at most 256 characters")
    return value


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content)]
    name: str | None = None
    reasoning_content: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        """A message of an answer can be sent back as it came. lm-evaluation-harness marks each
        message as one of type "text".
        """
        if not isinstance(value, dict):
            return value
        nothing = (("annotations", []), ("tool_calls", []), ("type", "text"))
        return {
            key: item
            for key, item in value.items()
            if item is not None and (key, item) not in nothing
        }


class StreamOptions(Body):
    """`include_obfuscation` is accepted and changes nothing."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TemplateOptions(Body):
    """The one switch of a chat template that a request may set."""

    thinking: bool | None = None


class GenerateBody(Body):
    """What completions and chat completions have in common."""

    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_listed)] = []
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    # beyond OpenAI's interface:
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Annotated[str, AfterValidator(_printable)] = ""
    accept: Annotated[RuleOptions | None, PlainValidator(_rule)] = None
    speculate: Annotated[int, Field(ge=0, le=64)] | None = None
    skip_special_tokens: bool = True


class CompletionBody(GenerateBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    best_of: int | None = None


class ChatBody(GenerateBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()


class TokenizeBody(Body):
    """POST /tokenize: a prompt as /v1/completions takes it, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: TemplateOptions = TemplateOptions()


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = False


def read[B: Body](kind: type[B], data: Mapping[str, Any]) -> B:
    """A body from parsed JSON.

    Raises:
        ApiError: 400 that names the field.
    """
    values = {key: value for key, value in data.items() if value is not None}
    if issubclass(kind, GenerateBody):
        values = _without_unsupported(kind, values)
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        raise _first(error) from None


def _without_unsupported(kind: type[Body], values: dict[str, Any]) -> dict[str, Any]:
    calls_nothing = values.get("tool_choice") == "none"
    kept = {}
    for key, value in values.items():
        if key in _NEUTRAL and key not in kind.model_fields:
            neutral, reason = _NEUTRAL[key]
            if not neutral(value) and not (key == "tools" and calls_nothing):
                raise invalid(
                    f"{key}={short(value)} is not supported: {reason}", key, "unsupported_parameter"
                )
        elif key not in IGNORED:
            kept[key] = value
    return kept


def _first(error: pydantic.ValidationError) -> ApiError:
    found = error.errors(include_url=False)[0]
    where = ".".join(map(str, found["loc"]))
    if found["type"] == "missing":
        return invalid(f"{where} is required", where, "missing_required_parameter")
    if found["type"] == "extra_forbidden":
        return invalid(f"unknown parameter {short(where)}", where[:80], "unknown_parameter")
    reason = str(found.get("ctx", {}).get("error", found["msg"]))
    return invalid(f"{where}={short(found['input'])}: {reason}", where or None, "invalid_value")
