"""The terminal's side: a conversation with the fake server through real HTTP."""

import io
import json
import re
import socket
import threading

import pytest
from rich.console import Console

from dskjax.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from serve.api import OverloadedError
from serve.chat import ChatError, run_chat
from serve.http import HttpConfig, create_app
from serve.request import FinishReason
from tests.serve.http import fake
from tests.serve.http.fake import TINY, WORDS, listening

SEED = {"seed": 0}


@pytest.fixture
def talk(service):
    """Says lines to the server; returns what the terminal shows."""
    with listening(create_app(service, HttpConfig(api_keys=("key",)))) as port:

        def talk(*lines, colour=False, **settings):
            file = io.StringIO()
            system = "standard" if colour else None
            console = Console(file=file, force_terminal=colour, width=40, color_system=system)
            settings = {"api_key": "key", "options": SEED, **settings}
            run_chat(f"http://127.0.0.1:{port}/v1/", lines=lines, console=console, **settings)
            return file.getvalue()

        yield talk


def prompts(service):
    return [TINY.decode(prompt) for prompt, _, _ in service.calls]


def test_turns_follow_each_other(talk, service):
    shown = talk("one", "", "  two ")
    answer = "".join(WORDS[:4])
    assert shown.count(answer) == 2 and "org/fake at http://127.0.0.1" in shown
    first = f"{BOS}{USER}one{ASSISTANT}{END_THINK}"
    second = f"{first}{answer}{EOS}{USER}two{ASSISTANT}{END_THINK}"
    assert prompts(service) == [first, second]
    assert re.search(r"stop, \d+ prompt tokens \(2 cached\), 4 new, 4/8 drafts acc", shown)
    assert "accepted = 50% by rejection" in shown


def test_commands(talk, service):
    lines = ["a", "/reset", "b", "/system Be brief.", "c", "/system", "d", "/what", "/quit", "e"]
    shown = talk(*lines)
    end = f"{ASSISTANT}{END_THINK}"
    texts = ["a", "b", "c", "d"]
    expected = [f"{BOS}{'Be brief.' if t == 'c' else ''}{USER}{t}{end}" for t in texts]
    assert prompts(service) == expected
    assert "/quit ends" in shown


def test_thinking_is_dim_and_is_not_sent_back(talk, service):
    shown = talk("a", "/think off", "b", "/think auto", "/think maybe", thinking=True, colour=True)
    assert "\x1b[2mred \x1b[0m\x1b[2mgreen \x1b[0mblue grün " in shown
    first, second = prompts(service)
    assert first.endswith(THINK) and second.endswith(END_THINK) and "red" not in second


def test_a_lossy_or_synthetic_answer_says_so(talk, service):
    service.synthetic = True
    shown = talk("a", options={**SEED, "accept": "relaxed"}, system="s")
    assert "lossy" in shown and "SYNTHETIC" in shown and prompts(service)[0].startswith(f"{BOS}s")


def test_a_refused_turn_is_forgotten(talk, service):
    shown = talk("a " * 300, "b")
    assert "error: the prompt has" in shown and "(HTTP 400)" in shown
    assert prompts(service) == [f"{BOS}{USER}b{ASSISTANT}{END_THINK}"]
    service.refusal = OverloadedError("the queue is full")
    assert "error: the queue is full (HTTP 429)" in talk("c")


def test_an_answer_that_breaks_is_forgotten(talk, service):
    service.finish = (FinishReason.ERROR, "page fault")
    assert "error: page fault" in talk("a", "b")
    assert prompts(service)[1] == f"{BOS}{USER}b{ASSISTANT}{END_THINK}"


def test_an_interrupt_ends_the_answer_only(talk, service, monkeypatch):
    import serve.chat

    show = serve.chat.Chat._show
    stops = iter([True])

    def interrupted(self, text, style):
        show(self, text, style)
        if text and next(stops, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(serve.chat.Chat, "_show", interrupted)
    shown = talk("a", "b")
    assert "this turn is forgotten" in shown and shown.count("red green") == 1
    assert prompts(service)[1] == f"{BOS}{USER}b{ASSISTANT}{END_THINK}"


def test_no_text_drives_the_terminal(talk, service, monkeypatch):
    monkeypatch.setattr(fake, "WORDS", ("[red]x\x1b[2J\x07\r", "y\n\tz"))
    service.length = 2
    assert "[red]x[2Jy\n\tz\n" in talk("a").replace("        ", "\t")


def test_a_wrong_key_and_a_named_model(talk, service):
    with pytest.raises(ChatError, match=r"the API key is wrong.*HTTP 401"):
        talk("a", api_key="other")
    assert "does not exist" in talk("a", model="gpt")
    assert not service.calls


def test_no_server():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        ChatError, match=f"no server answers at http://127.0.0.1:{port}.*dskjax serve"
    ):
        run_chat(f"http://127.0.0.1:{port}", lines=["a"], console=Console(file=io.StringIO()))
    with pytest.raises(ChatError, match="no address of a server|no server answers"):
        run_chat("http://[", lines=["a"], console=Console(file=io.StringIO()))


def read_request(connection):
    """All of it: closing with unread bytes would reset the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length and len(body) < int(length[1]):
        body += connection.recv(65536)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "broke off before the end"),
        (["{"], "no piece of an answer"),
        (["[]"], "no piece of an answer"),
        (["{}"], "no piece of an answer"),
        ([json.dumps({"choices": [{"delta": {"content": "x"}}]})], "broke off before the end"),
    ],
)
def test_other_servers(events, message):
    """Whatever answers, the conversation says what is wrong and goes on."""
    stream = "".join(f"data: {event}\n\n" for event in events)
    bodies = ['{"data": [{"id": "m"}]}', stream]
    kinds = ["application/json", "text/event-stream"]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            for body, kind in zip(bodies, kinds, strict=True):
                connection, _ = listener.accept()
                with connection:
                    read_request(connection)
                    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"
                    connection.sendall((head + body).encode())

        thread = threading.Thread(target=answer)
        thread.start()
        file = io.StringIO()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        run_chat(url, lines=["hi"], console=Console(file=file, width=300))
        thread.join()
    assert message in file.getvalue()


def test_it_asks_until_the_end_of_input(talk, service, monkeypatch):
    answers = iter(["one", "two"])

    def ask(self, prompt):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Console, "input", ask)
    with listening(create_app(service)) as port:
        run_chat(f"http://127.0.0.1:{port}", console=Console(file=io.StringIO()), options=SEED)
    assert len(service.calls) == 2
