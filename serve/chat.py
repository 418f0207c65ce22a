"""A conversation with a running server in a terminal: text as it comes, thinking dimmed.

Knows the server's HTTP interface only, so the server may be any that speaks OpenAI's.
"""

import dataclasses
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import httpx2
from rich.console import Console
from rich.text import Text

HELP = (
    "/system TEXT sets the system message and starts over (no TEXT: removes it)\n"
    "/think on|off|auto switches thinking\n"
    "/reset starts over\n"
    "/quit ends (so does end of input)"
)


class ChatError(ValueError):
    """The server does not answer, or refuses."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """What one event of an answer brought."""

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    usage: Mapping[str, Any] | None = None
    extras: Mapping[str, Any] | None = None


class Chat:
    """One conversation; what was said is kept here, since the server keeps nothing.

    Args:
        client: with the server's base URL.
        console: where text goes.
        model: which one; None: the first that the server lists.
        system: the system message, if any.
        thinking: switches the chat template's thinking; None leaves it to the template.
        options: further fields of every request, such as temperature.

    Raises:
        ChatError: no server answers there.
    """

    def __init__(
        self,
        client: httpx2.Client,
        console: Console,
        *,
        model: str | None = None,
        system: str | None = None,
        thinking: bool | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self._client = client
        self._console = console
        self._options = dict(options or {})
        self._system = system
        self._thinking = thinking
        self._turns: list[dict[str, str]] = []
        self.model = model or self._first_model()

    def reset(self) -> None:
        """Forgets the turns; the system message stays."""
        self._turns.clear()

    def command(self, line: str) -> bool:
        """Does what a line that begins with / says; False ends the conversation."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/reset":
            self.reset()
            self._note("started over")
        elif name == "/system":
            self._system = rest or None
            self.reset()
            self._note("system message set" if rest else "no system message")
        elif name == "/think" and rest in ("on", "off", "auto"):
            self._thinking = {"on": True, "off": False, "auto": None}[rest]
            self._note(f"thinking: {rest}")
        else:
            self._note(HELP)
        return True

    def say(self, text: str) -> str:
        """Sends a turn and shows the answer as it comes; returns it.

        A turn that fails, or that is interrupted, is forgotten.

        Raises:
            ChatError: the server refused it or broke off.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        answer: list[str] = []
        last = _Piece()
        for piece in self._pieces(turns):
            self._show(piece.reasoning, "dim")
            self._show(piece.text, "")
            answer.append(piece.text)
            last = _Piece(
                finish=piece.finish or last.finish,
                usage=piece.usage or last.usage,
                extras=piece.extras or last.extras,
            )
        self._console.print()
        self._note(_summary(last))
        self._turns = [*turns, {"role": "assistant", "content": "".join(answer)}]
        return "".join(answer)

    def _pieces(self, turns: list[dict[str, str]]) -> Iterator["_Piece"]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *turns],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        if self._thinking is not None:
            body["chat_template_kwargs"] = {"thinking": self._thinking}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise ChatError(_refusal(answer))
                yield from _parsed(httpx2.EventSource(answer))
        except httpx2.HTTPError as error:
            raise ChatError(f"the server broke off: {error or type(error).__name__}") from error

    def _first_model(self) -> str:
        try:
            answer = self._client.get("/v1/models")
        except httpx2.HTTPError as error:
            raise ChatError(
                f"no server answers at {self._client.base_url}: {error or type(error).__name__}; "
                "start one with `dskjax serve`, or give its address"
            ) from error
        if answer.status_code != 200:
            raise ChatError(_refusal(answer))
        try:
            return answer.json()["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise ChatError(
                f"what answers at {self._client.base_url} lists no models: it is no such server"
            ) from error

    def _show(self, text: str, style: str) -> None:
        """Text as it is: brackets are no markup, and no model may drive the terminal."""
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
        if text:
            self._console.print(Text(text, style), end="", soft_wrap=True)

    def _note(self, text: str) -> None:
        self._console.print(Text(text, "cyan"), soft_wrap=True)


def run_chat(
    url: str,
    *,
    lines: Iterable[str] | None = None,
    console: Console | None = None,
    model: str | None = None,
    api_key: str | None = None,
    system: str | None = None,
    thinking: bool | None = None,
    options: Mapping[str, Any] | None = None,
    timeout: float = 600.0,
) -> None:
    """Talks with the server at `url` until /quit or the end of the lines.

    A refused turn is shown and the conversation goes on; an interrupt (ctrl-C) during an answer
    ends the answer.

    Args:
        url: of the server, with or without a trailing /v1.
        lines: what the user says; None asks at the console.
        console: None: this terminal.
        model, system, thinking, options: see `Chat`.
        api_key: sent as a bearer token.
        timeout: seconds to wait for the next piece of an answer.

    Raises:
        ChatError: no server answers there.
    """
    console = console or Console()
    base = url.rstrip("/").removesuffix("/v1")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    waits = httpx2.Timeout(timeout, connect=5.0)
    try:
        client = httpx2.Client(base_url=base, headers=headers, timeout=waits, trust_env=False)
    except (httpx2.InvalidURL, ValueError) as error:
        raise ChatError(f"{url!r} is no address of a server: {error}") from error
    with client:
        chat = Chat(client, console, model=model, system=system, thinking=thinking, options=options)
        console.print(Text(f"{chat.model} at {base} (/help)", "cyan"), soft_wrap=True)
        for line in _asked(console.input) if lines is None else lines:
            line = line.strip()
            if line.startswith("/"):
                if not chat.command(line):
                    return
            elif line:
                _say(chat, console, line)


def _say(chat: Chat, console: Console, line: str) -> None:
    try:
        chat.say(line)
    except ChatError as error:
        console.print(Text(f"error: {error}", "red"), soft_wrap=True)
    except KeyboardInterrupt:
        console.print(Text("\nstopped; this turn is forgotten", "cyan"))


def _asked(ask: Callable[[str], str]) -> Iterator[str]:
    """Lines typed at a prompt until end of input."""
    while True:
        try:
            yield ask("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return


def _parsed(events: Iterable[httpx2.ServerSentEvent]) -> Iterator[_Piece]:
    for event in events:
        if event.data == "[DONE]":
            return
        try:
            value = json.loads(event.data)
            if "error" in value:
                raise ChatError(str(value["error"]["message"]))
            piece = _piece(value)
        except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
            raise ChatError(f"the server sent what is no piece of an answer: {error}") from error
        yield piece
    raise ChatError("the server broke off before the end of the answer")


def _piece(value: Mapping[str, Any]) -> _Piece:
    rest: dict[str, Any] = {"usage": value.get("usage"), "extras": value.get("dskjax")}
    if not value["choices"]:
        return _Piece(**rest)
    choice = value["choices"][0]
    delta = choice["delta"]
    text, reasoning = delta.get("content") or "", delta.get("reasoning_content") or ""
    return _Piece(text=text, reasoning=reasoning, finish=choice.get("finish_reason"), **rest)


def _refusal(answer: httpx2.Response) -> str:
    try:
        return f"{answer.json()['error']['message']} (HTTP {answer.status_code})"
    except (ValueError, LookupError, TypeError):
        return f"HTTP {answer.status_code}: {answer.text[:200]}"


def _summary(last: _Piece) -> str:
    parts = [last.finish or "no end"]
    if last.usage:
        cached = (last.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        parts.append(f"{last.usage['prompt_tokens']} prompt tokens ({cached} cached)")
        parts.append(f"{last.usage['completion_tokens']} new")
    if last.extras:
        accepted, drafted = last.extras["accepted"], last.extras["drafted"]
        rate = f" = {accepted / drafted:.0%}" if drafted else ""
        parts.append(f"{accepted}/{drafted} drafts accepted{rate} by {last.extras['accept']}")
        if not last.extras["lossless"]:
            parts.append("lossy")
        if last.extras.get("synthetic_acceptance"):
            parts.append("SYNTHETIC ACCEPTANCE: the text means nothing")
    return ", ".join(parts)
