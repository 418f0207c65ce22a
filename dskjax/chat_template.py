"""The chat template of a checkpoint: Jinja source that turns a conversation into a prompt's text.

The format is whatever the checkpoint says; nothing here knows it. Families differ in more
than the template:

    switch    V3.1 and Kimi-K2.5 look at `thinking`, others at `enable_thinking`; R1 and
              Kimi-K2-Thinking always think and have none
    tools     Moonshot's tokenizer code sorts the keys of tool schemas before the template sees them
    no file   DeepSeek-V3.2 and later render with Python code, which is not run
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

SWITCHES = ("thinking", "enable_thinking")
"""Names under which templates look for the choice to think or not."""

_ENCODERS = ("encoding/encoding*.py", "encoding*.py")  # where DeepSeek and Moonshot ship it


class ChatTemplate:
    """One template.

    Args:
        text: Jinja source.
        source: of the tokenizer, for errors.
        sort_tools: sort the keys of tool schemas, as Moonshot's tokenizers do.
    """

    def __init__(self, text: str, *, source: str, sort_tools: bool = False):
        self.text = text
        self._source = source
        self._sort_tools = sort_tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The text of a conversation.

        Args:
            messages: see `Tokenizer.apply_chat_template`.
            thinking: for the template's switches; None leaves them undefined.
            tools: tool schemas.
            variables: what else the template may look at; a switch given here is left as it is.

        Raises:
            ValueError: the template or a message is malformed, or the template refuses.
        """
        if not messages:
            raise ValueError("a conversation needs at least one message")
        switches = {} if thinking is None else dict.fromkeys(self.switches, thinking)
        try:
            return self._compiled[0].render(
                messages=[_checked(message, i) for i, message in enumerate(messages)],
                tools=_sorted(tools) if self._sort_tools else tools,
                **{**switches, **variables},
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self._source}: the chat template refused: {error}") from error

    @property
    def switches(self) -> list[str]:
        """Those of `SWITCHES` that the template looks at."""
        return self._compiled[1]

    @functools.cached_property
    def _compiled(self) -> tuple[jinja2.Template, list[str]]:
        environment = _environment()
        try:
            tree = environment.parse(self.text)
            used = jinja2.meta.find_undeclared_variables(tree)
            return environment.from_string(self.text), [name for name in SWITCHES if name in used]
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{self._source}: chat template line {error.lineno}: {error.message}"
            ) from error


def read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The source in a folder: `chat_template.jinja` wins over the key of tokenizer_config.json.

    Raises:
        ValueError: the key holds no text, or a list of named templates without a default.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        if "default" not in named:
            raise ValueError(
                f"{directory / 'tokenizer_config.json'}: chat_template has no entry named default, "
                f"found {sorted(map(str, named))}"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be text, "
            f"found {type(template).__name__}"
        )
    return template


def python_encoder(directory: Path) -> str | None:
    """Name of the Python file that renders conversations where there is no template, if any."""
    found = sorted(path for pattern in _ENCODERS for path in directory.glob(pattern))
    return str(found[0].relative_to(directory)) if found else None


def no_template(source: str, encoder: str | None) -> str:
    """What to say, and to do, where a conversation cannot be rendered."""
    if encoder is None:
        return (
            f"{source}: no chat template (looked for chat_template.jinja and for "
            "chat_template in tokenizer_config.json); give a plain prompt instead"
        )
    return (
        f"{source}: no chat template: this checkpoint renders conversations with Python code "
        f"({encoder}), which is not run here; put a chat_template.jinja that writes the same text "
        f"beside {Path(source).name}, or render with that code and give the ids of the result"
    )


def _checked(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message with its content flattened to text (none is kept beside tool calls)."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages[{index}]: expected an object with a role, found {message!r}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"messages[{index}]: only text parts are supported, found {part!r}"
                )
        content = "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        return dict(message)  # templates test for none
    if not isinstance(content, str):
        raise ValueError(f"messages[{index}]: content must be text, found {content!r}")
    return {**message, "content": content}


def _sorted(value: Any) -> Any:
    """The same JSON value with the keys of all its objects in order."""
    if isinstance(value, Mapping):
        return {key: _sorted(item) for key, item in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What Hugging Face templates are written for, sandboxed: a template is untrusted input."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda spec: datetime.datetime.now().strftime(spec)
    return env
