"""The demo against a fake server process, its checks on their own, and once the real thing."""

import functools
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dskjax import cli
from serve import demo
from serve.child import ServerDiedError, ServerProcess
from serve.metrics import Metrics
from tests.serve.bench.virtual import answer

ROOT = Path(__file__).parents[2]


def show(out, **arguments):
    """The demo's rows, and what it printed."""
    page = io.StringIO()
    rows = demo.run(Console(file=page, width=120), out, **arguments)
    return rows, page.getvalue()


def fake(behaviour):
    return (sys.executable, "-m", "tests.serve.demo_server", behaviour)


def test_the_demo_shows_every_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows, text = show(tmp_path / "new", serve=fake("well"))
    assert [row.mode for row in rows] == list(demo.MODES)
    for mode in demo.MODES:
        assert mode.name in text
    for row in rows[:-1]:
        assert row.summary["speculation"]["mean_accepted_length"] == 2.0
    assert rows[-1].summary["speculation"]["drafted"] == 0
    assert all(len(row.answers) == len(demo.PROMPTS) for row in rows)
    for said in (
        "prefill0",
        "def read_config",
        "without them, character by character",
        "of 48 requests went through both engines",
        "ended with status 0",
    ):
        assert said in text
    assert (tmp_path / "new" / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("dies", r"ended with status 7; the end of its log, .*server.log:\n(.*\n)*out of memory"),
        ("stumbles", "status 3 after SIGTERM"),
    ],
)
def test_a_server_that_ends_badly(tmp_path, monkeypatch, behaviour, said):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RuntimeError, match=said):
        show(tmp_path, serve=fake(behaviour))


def script(text):
    return [sys.executable, "-c", text]


def test_a_server_that_cannot_start_shows_its_log(tmp_path):
    command = script("print('one\\ntwo', flush=True); raise SystemExit('no checkpoint')")
    with ServerProcess(command, tmp_path / "log") as server:
        with pytest.raises(ServerDiedError, match="status 1; .*log:\none\ntwo\nno checkpoint"):
            server.wait_ready(lambda *_: None)
        with pytest.raises(ServerDiedError, match="status 1"):
            server.drain()


def test_a_server_that_takes_too_long_is_killed(tmp_path):
    lines = "prefill0: compiled 1/2: a\\nprefill0: compiled 2/2: b\\ndecode0: compiled 1/4: c"
    command = script(f"import time; print('{lines}', flush=True); time.sleep(60)")
    seen = {}
    with ServerProcess(command, tmp_path / "log") as server:
        with pytest.raises(ServerDiedError, match="not ready after 1.5 s") as caught:
            server.wait_ready(lambda name, *counts: seen.update({name: counts}), timeout=1.5)
    assert server._process.poll() == -9
    assert seen == {"prefill0": (2, 2), "decode0": (1, 4)}
    assert "decode0: compiled 1/4" in str(caught.value)


def test_a_server_that_ignores_sigterm_is_killed(tmp_path):
    ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    with ServerProcess(script(f"{ignores}; time.sleep(60)"), tmp_path / "log") as server:
        while not (tmp_path / "log").read_text():
            server.check_alive()
        with pytest.raises(ServerDiedError, match="did not end within 0.2 s"):
            server.drain(timeout=0.2)
    assert server._process.poll() == -9


def said(text, prompt_tokens=10, tokens=11):
    return answer(0.0, 0.0, 1.0, 2.0, text=text, prompt_tokens=prompt_tokens, tokens=tokens)


def row(mode, *texts):
    return demo.Row(mode, [said(text) for text in texts], {})


def test_drafts_that_change_a_text_are_a_defect():
    sampled = demo.MODES[1]
    demo.check_same([row(demo.GREEDY, "a", "b"), row(sampled, "c", "d"), row(demo.PLAIN, "a", "b")])
    with pytest.raises(RuntimeError, match="greedy answer to prompt 2: 'b' instead of 'x'"):
        demo.check_same([row(demo.GREEDY, "a", "b"), row(demo.PLAIN, "a", "x")])


def page(prefill=20, decode=20, steps=2, moved=0, failed=0):
    metrics = Metrics("m")
    first, second = metrics.engine("prefill0", "prefill"), metrics.engine("decode0", "decode")
    first.prefix(queries=prefill, hits=0)
    second.prefix(queries=decode, hits=0)
    for _ in range(steps):
        first.step(seconds=0.1, host_seconds=0.1)
    for _ in range(moved):
        second.transferred("whole", seconds=0.1, hidden_seconds=0.0, size=10**6)
    second.transfer_failed(failed)
    return metrics.expose().decode()


ANSWERS = [said("a"), said("b"), said("", tokens=1)]  # the last one needs no decode engine


def test_caches_that_moved():
    text = demo.check_moved(page(), ANSWERS)
    assert text == "20 prompt tokens of 2 requests went through both engines"
    text = demo.check_moved(page(moved=2), ANSWERS)
    assert text.endswith("; 2 caches, 2.0 MB, moved from one to the other")


@pytest.mark.parametrize(
    ("counts", "wrong"),
    [
        ({"decode": 19}, "went past the prefill or the decode engine"),
        ({"prefill": 10}, "went past"),
        ({"steps": 0}, "went past"),
        ({"moved": 1}, "only 1 of 2 caches"),
        ({"moved": 2, "failed": 1}, "only 2 of 2 caches went to the decode engine"),
    ],
)
def test_caches_that_did_not_move(counts, wrong):
    with pytest.raises(RuntimeError, match=wrong):
        demo.check_moved(page(**counts), ANSWERS)


def test_the_command_ends_with_the_error_alone(tmp_path, monkeypatch, capsys):
    command = script("raise SystemExit('no memory left')")
    monkeypatch.setattr(demo, "run", functools.partial(demo.run, serve=command))
    monkeypatch.setattr("sys.argv", ["dskjax", "demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    shown = capsys.readouterr().err
    assert exit_.value.code == 1
    assert "status 1" in shown and "no memory left" in shown and "Traceback" not in shown


@pytest.mark.full
def test_the_demo_as_it_is(tmp_path):
    rows, text = show(tmp_path)
    assert rows[-1].summary["speculation"]["drafted"] == 0
    greedy = rows[0].summary["speculation"]
    assert greedy["lossless"] and greedy["mean_accepted_length"] > 2
    assert "return None" in text
