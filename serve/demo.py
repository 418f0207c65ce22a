"""`dskjax demo`: the small model of this repository, served by a prefill and a decode engine.

Starts `dskjax serve` on two simulated CPU devices, sends real prompts over HTTP under every kind of
acceptance rule and without speculation, and shows what came back: answers, times, accepted drafts.
Checks that greedy text with speculation is the text without it, that every prompt's cache went from
the one engine to the other, and that the server drains and ends well.
"""

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import httpx2
import matplotlib.pyplot as plt
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve.bench.answer import Answer
from serve.bench.client import Client, connect
from serve.bench.load import closed_loop
from serve.bench.server import ask_counters, ask_info
from serve.bench.summary import Objectives, summarize
from serve.child import ServerProcess

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny-deepseek"
DRAFTS = 3
MAX_TOKENS = 48

PROMPTS: tuple[dict[str, Any], ...] = (
    {"prompt": 'import os\n\n\ndef read_config(path):\n    """Read the configuration file'},
    {"prompt": "He walked slowly along the road, and when he came to the house"},
    {
        "messages": [
            {
                "role": "user",
                "content": "Your task is to convert a number between two different bases.\n\n"
                "Convert the base-2 number 1101 to base-10",
            }
        ],
        "chat_template_kwargs": {"thinking": True},
    },
    {"prompt": "def main():\n    parser = argparse."},
    {"prompt": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push("},
    {"prompt": "To install the package, run the following command:\n\n"},
    {"prompt": "In the beginning of the year the king sent his ships to"},
    {"prompt": "import unittest\n\n\nclass TestParser(unittest.TestCase):\n    def test_"},
)
"""Texts to continue and a question, in the kinds of text that the model was trained on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mode:
    """A way to decode: its name and the fields of a request that ask for it."""

    name: str
    fields: dict[str, Any]


GREEDY = Mode("strict, T=0", {"temperature": 0.0, "accept": "strict"})
PLAIN = Mode("no drafts, T=0", {"temperature": 0.0, "speculate": 0})
MODES = (
    GREEDY,
    Mode("rejection, T=0.7", {"temperature": 0.7, "accept": "rejection"}),
    Mode("block, T=0.7", {"temperature": 0.7, "accept": "block"}),
    Mode("typical, T=0.7", {"temperature": 0.7, "accept": "typical"}),
    # Last: an adaptive server that has measured steps without drafts may prefer them, and on a CPU,
    # where verifying is not nearly free, it would.
    PLAIN,
)

SERVE = (
    *(sys.executable, "-m", "dskjax", "--cpu-devices", "2"),
    *("serve", str(MODEL), "--port", "0", "--roles", "1P1D"),
    *("--max-model-len", "256", "--slots", str(len(PROMPTS)), "--chunk", "64", "--few-buckets"),
    *("--rules", "strict,rejection,block,typical", "--speculate", str(DRAFTS), "--adaptive"),
)
"""Few and small programs, since compiling them is most of the start; --adaptive compiles steps
without drafts too."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a mode did: answers in the prompts' order, and their figures."""

    mode: Mode
    answers: list[Answer]
    summary: dict[str, Any]


def run(console: Console, out: Path, *, serve: Sequence[str] = SERVE) -> list[Row]:
    """Runs the demo; writes `demo.png` and `server.log` into `out`.

    Args:
        console: for everything it shows.
        out: folder.
        serve: command line of the server.

    Raises:
        RuntimeError: the server died, failed a request, changed a greedy text, moved no cache or
            did not end well.
    """
    log = out / "server.log"
    console.print(f"starting a prefill and a decode engine; their log is {log}", soft_wrap=True)
    with ServerProcess(serve, log) as server:
        _wait(console, server)
        try:
            rows, moved = asyncio.run(_ask(server.url, console))
        except (httpx2.HTTPError, RuntimeError, ValueError):
            server.check_alive()  # if it died, its log says more
            raise
        show_answers(console, rows)
        console.print(table(rows))
        check_same(rows)
        console.print("greedy text with drafts is the text without them, character by character")
        console.print(moved, highlight=False, soft_wrap=True)
        status = server.drain()
    if status:
        raise RuntimeError(f"the server ended with status {status} after SIGTERM; see {log}")
    console.print("the server drained on SIGTERM and ended with status 0", highlight=False)
    console.print(f"plot: {plot(rows, out / 'demo.png')}", soft_wrap=True)
    return rows


def _wait(console: Console, server: ServerProcess) -> None:
    columns = (TextColumn("compiling {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        tasks: dict[str, Any] = {}

        def note(engine: str, done: int, total: int) -> None:
            if engine not in tasks:
                tasks[engine] = bar.add_task(engine)
            bar.update(tasks[engine], completed=done, total=total)

        server.wait_ready(note)


async def _ask(url: str, console: Console) -> tuple[list[Row], str]:
    async with connect(url) as http:
        info = await ask_info(http)
        rows = []
        first = await _measure(http, info.model, GREEDY)  # not shown: a process begins slowly
        for mode in MODES:
            with console.status(f"{len(PROMPTS)} prompts at once: {mode.name}"):
                rows.append(await _measure(http, info.model, mode))
        page = await http.get("/metrics")
        return rows, check_moved(page.text, [a for row in (first, *rows) for a in row.answers])


async def _measure(http: httpx2.AsyncClient, model: str, mode: Mode) -> Row:
    client = Client(http, model, {"max_tokens": MAX_TOKENS, **mode.fields})
    jobs = [{**prompt, "seed": seed} for seed, prompt in enumerate(PROMPTS)]
    before = await ask_counters(http)
    answers = await closed_loop(client.send, jobs, len(jobs))
    after = await ask_counters(http)
    if before is None or after is None:
        raise RuntimeError("the server shows no counters in /metrics")
    for answer in answers:
        if not answer.ok:
            raise RuntimeError(f"a request failed: {answer.error}: {answer.message}")
    counted = {name: after[name] - before[name] for name in after}
    return Row(mode, answers, summarize(answers, Objectives(), counted))


def check_same(rows: Sequence[Row]) -> None:
    """Raises RuntimeError if drafts changed a greedy text."""
    texts = {row.mode: [answer.text for answer in row.answers] for row in rows}
    for number, (with_drafts, without) in enumerate(zip(texts[GREEDY], texts[PLAIN], strict=True)):
        if with_drafts != without:
            raise RuntimeError(
                f"drafts changed the greedy answer to prompt {number + 1}: {with_drafts!r} instead "
                f"of {without!r}; please report this as a defect"
            )


def check_moved(page: str, answers: Sequence[Answer]) -> str:
    """What /metrics says of the caches that went from the prefill to the decode engine.

    Args:
        page: /metrics.
        answers: to all requests that the server has had. One that ended with its first token has
            no use for a decode engine.

    Raises:
        RuntimeError: it says that some did not.
    """
    totals: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = (sample.name.rpartition(":")[2], sample.labels.get("role", ""))
            totals[key] = totals.get(key, 0.0) + sample.value
    sizes = [answer.prompt_tokens for answer in answers if answer.completion_tokens > 1]
    requests, prompts = len(sizes), sum(sizes)
    taken = {role: totals["prefix_cache_queries_total", role] for role in ("prefill", "decode")}
    if min(taken.values()) < prompts or not totals["engine_step_seconds_count", "prefill"]:
        raise RuntimeError(
            f"{requests} requests had {prompts} prompt tokens, of which the engines took in "
            f"{taken}: some went past the prefill or the decode engine"
        )
    text = f"{prompts} prompt tokens of {requests} requests went through both engines"
    moved = totals["kv_transfer_latency_seconds_count", "decode"]
    if moved:
        if moved < requests or totals["kv_transfer_failed_total", "decode"]:
            raise RuntimeError(
                f"only {moved:.0f} of {requests} caches went to the decode engine, or some failed"
            )
        size = totals["kv_transfer_bytes_total", "decode"]
        text += f"; {moved:.0f} caches, {size / 1e6:.1f} MB, moved from one to the other"
    return text


def show_answers(console: Console, rows: Sequence[Row]) -> None:
    """The first prompts with their greedy answers, and one more at a temperature."""
    by_mode = {row.mode: row for row in rows}
    for title, mode, places in (("greedy", GREEDY, (0, 1, 2)), ("sampled", MODES[1], (0,))):
        for place in places:
            console.rule(f"prompt {place + 1}, {title}", align="left")
            body = PROMPTS[place]
            text = body["prompt"] if "prompt" in body else body["messages"][0]["content"] + "\n"
            console.print(text, style="cyan", highlight=False, markup=False, end="")
            console.print(by_mode[mode].answers[place].text, highlight=False, markup=False)
    console.rule()


def table(rows: Sequence[Row]) -> Table:
    """Times and acceptance of each mode."""
    title = f"{len(PROMPTS)} prompts at once over HTTP, {DRAFTS} drafts a step, fp32 on this CPU"
    out = Table(title=title)
    out.add_column("acceptance rule", no_wrap=True)
    for name in ("TTFT, ms", "TPOT, ms", "tokens/s", "accepted / drafted", "mean accepted length"):
        out.add_column(name, justify="right")
    for row in rows:
        drafts = row.summary["speculation"]
        rate, length = drafts["accepted_per_drafted"], drafts["mean_accepted_length"]
        out.add_row(
            row.mode.name,
            f"{1e3 * row.summary['ttft_s']['p50']:.0f}",
            f"{1e3 * row.summary['tpot_s']['p50']:.1f}",
            f"{row.summary['tokens_per_s']['output']:.0f}",
            "-" if rate is None else f"{rate:.3f}",
            "1.00" if length is None else f"{length:.2f}",
        )
    return out


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Draws TTFT, TPOT and accepted drafts by mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [row.mode.name.replace(", ", "\n") for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(15, 3.8), layout="constrained")
    for axis, key, title in ((axes[0], "ttft_s", "TTFT"), (axes[1], "tpot_s", "TPOT")):
        bars = axis.bar(names, [1e3 * row.summary[key]["p50"] for row in rows], color="tab:blue")
        axis.bar_label(bars, fmt="%.0f")
        axis.set(title=f"{title}, median of {len(PROMPTS)} requests", ylabel="ms")
    rates = [row.summary["speculation"]["accepted_per_drafted"] or 0.0 for row in rows]
    bars = axes[2].bar(names, rates, color="tab:green")
    lengths = [row.summary["speculation"]["mean_accepted_length"] for row in rows]
    axes[2].bar_label(bars, ["-" if v is None else f"{v:.2f} a step" for v in lengths])
    axes[2].set(title="drafts: accepted / drafted, tokens a step", ylim=(0, 1.1))
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
