"""A whole measurement: asks the server what it is, loads it, checks its answers, adds up."""

import asyncio
import dataclasses
import datetime
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import httpx2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dskjax.provenance import source_commit
from dskjax.tokenizer import Tokenizer
from serve.bench.answer import Answer
from serve.bench.arrivals import offsets
from serve.bench.client import Client, connect
from serve.bench.lengths import Lengths
from serve.bench.load import closed_loop, open_loop
from serve.bench.options import BenchOptions
from serve.bench.prompts import load_prompts, load_text
from serve.bench.reference import Check, ask_alone, ask_together, compare, greedy
from serve.bench.search import Found, Point, find_rate
from serve.bench.server import ServerInfo, ask_counters, ask_info, tokenize
from serve.bench.summary import summarize
from serve.bench.workload import DrawnPrompts, Job, RealPrompts, Workload

FIGURES = (
    *(("ttft_s", f"p{p}") for p in (50, 90, 99)),
    *(("tpot_s", f"p{p}") for p in (50, 90, 99)),
    ("tokens_per_s", "input"),
    ("tokens_per_s", "output"),
    ("goodput", "requests_per_s"),
)
"""Whose median and spread over the repeats are reported, beside `qpm`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One run under one load.

    Attributes:
        rate: requests a second of an open loop; None in a closed one.
        answers: measured ones.
        summary: their figures.
        check: of the reference answers; None if there was none.
    """

    rate: float | None
    answers: list[Answer]
    summary: dict[str, Any]
    check: Check | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Everything that was measured.

    Attributes:
        trials: the runs that count: the repeats, in a search of the best rate.
        found: the search, if it was one.
        checks: reference checks of every run, those of a search's other rates included.
        synthetic: acceptance was simulated: speed without meaning.
        facts: about server and client, for JSON.
    """

    trials: list[Trial]
    found: Found | None
    checks: list[Check]
    synthetic: bool
    facts: dict[str, Any]

    @property
    def mismatches(self) -> int:
        """Reference answers that changed under load."""
        return sum(len(check.mismatches) for check in self.checks)

    @property
    def unchecked(self) -> bool:
        """Reference answers were asked for under load and not one came."""
        return bool(self.checks) and not any(check.compared for check in self.checks)

    def spread(self) -> dict[str, dict[str, float]]:
        """Median, least and most of the main figures over the repeats."""
        rows = {"qpm": [trial.summary["qpm"] for trial in self.trials]}
        for group, name in FIGURES:
            rows[f"{group}.{name}"] = [trial.summary[group][name] for trial in self.trials]
        return {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in rows.items()
            if values and None not in values
        }


def run_bench(options: BenchOptions, console: Console) -> BenchResult:
    """Measures, with progress on `console`.

    Raises:
        ValueError: no such server or file, a request that it refuses, or not one answer.
        FileNotFoundError: no such file.
    """
    return asyncio.run(measure(options, console))


async def measure(options: BenchOptions, console: Console) -> BenchResult:
    """`run_bench` in a running event loop."""
    url, key = options.url, options.api_key
    async with connect(url, api_key=key, timeout=options.timeout) as http:
        info = await ask_info(http, model=options.model)
        workload = await _workload(options, http, info)
        client = Client(http, info.model, options.options)
        references = greedy(workload.jobs(options.references, seed=options.seed))
        console.print(f"{info.model} at {url}: reference answers", highlight=False)
        alone = await ask_alone(client.send, references)
        if any(answer.synthetic for answer in alone):
            console.print("acceptance is simulated: texts are not compared", style="yellow")
            references, alone = [], []
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as progress:
            bench = _Bench(options, client, workload, references, alone, progress)
            found, trials = await bench.all()
        answers = [answer for trial in bench.done for answer in trial.answers]
        return BenchResult(
            trials=trials,
            found=found,
            checks=[trial.check for trial in bench.done if trial.check is not None],
            synthetic=any(answer.synthetic for answer in answers),
            facts=_facts(options, info),
        )


class _Bench:
    def __init__(
        self,
        options: BenchOptions,
        client: Client,
        workload: Workload,
        references: Sequence[Job],
        alone: Sequence[Answer],
        progress: Progress,
    ):
        self._options = options
        self._client = client
        self._workload = workload
        self._references = references
        self._alone = alone
        self._progress = progress
        self.done: list[Trial] = []

    async def all(self) -> tuple[Found | None, list[Trial]]:
        options = self._options
        if options.search_from is None:
            return None, [await self._trial(options.rate) for _ in range(options.repeats)]
        found = await find_rate(
            self._probe,
            start=options.search_from,
            tolerance=options.tolerance,
            most=options.probes,
        )
        if found.best is None:
            return found, []
        rate = found.best.rate
        trials = [trial for trial in self.done if trial.rate == rate]
        return found, trials + [await self._trial(rate) for _ in range(options.repeats - 1)]

    async def _probe(self, rate: float) -> Point:
        trial = await self._trial(rate)
        met = trial.summary["goodput"]["objectives_met"]
        self._progress.console.print(
            f"{60 * rate:.1f} QPM: {'within' if met else 'outside'} the objectives",
            highlight=False,
        )
        return Point(rate=rate, met=met, summary=trial.summary)

    async def _trial(self, rate: float | None) -> Trial:
        options, number = self._options, len(self.done)
        count = options.requests
        if options.search_from is not None and rate is not None:
            count = max(count, math.ceil(rate * options.probe_seconds))
        seed = options.seed + 1 + number  # other prompts every time: a prefix cache must not help
        jobs = self._workload.jobs(options.warmup + count, seed=seed)
        what = f"{options.concurrency} at once" if rate is None else f"{60 * rate:.1f} QPM"
        task = self._progress.add_task(f"run {number + 1}, {what}", total=len(jobs))
        middle = _Middle(self._client, self._references, options.warmup + (count + 1) // 2)
        before = await ask_counters(self._client.http)
        notes = {"sent": middle.sent, "done": lambda: self._progress.advance(task)}
        if rate is None:
            assert options.concurrency is not None
            answers = await closed_loop(self._client.send, jobs, options.concurrency, **notes)
        else:
            times = offsets(options.arrivals, rate, len(jobs), seed=seed)
            answers = await open_loop(self._client.send, jobs, times, **notes)
        loaded = await middle.answers()
        after = await ask_counters(self._client.http)
        measured = answers[options.warmup :]
        if not any(answer.ok for answer in measured):
            raise ValueError(
                f"every request failed; the first: {measured[0].error}: {measured[0].message}"
            )
        counted = None
        if before is not None and after is not None:
            counted = {name: after[name] - before.get(name, 0.0) for name in after}
        summary = summarize(measured, options.objectives, counted)
        if counted is not None:
            summary["server_counters"] = counted
        check = compare(self._alone, loaded) if self._references else None
        trial = Trial(rate=rate, answers=measured, summary=summary, check=check)
        self.done.append(trial)
        return trial


class _Middle:
    """Asks the reference requests once so many others were sent."""

    def __init__(self, client: Client, jobs: Sequence[Job], at: int):
        self._client, self._jobs, self._left = client, jobs, at
        self._task: asyncio.Task[list[Answer]] | None = None

    def sent(self) -> None:
        self._left -= 1
        if not self._left:
            self._task = asyncio.create_task(ask_together(self._client.send, self._jobs))

    async def answers(self) -> list[Answer]:
        assert self._task is not None, "half of all requests were sent"
        return await self._task


async def _workload(
    options: BenchOptions, http: httpx2.AsyncClient, info: ServerInfo
) -> RealPrompts | DrawnPrompts:
    if options.prompts is not None:
        found = load_prompts(options.prompts, chars=options.document_chars)
        return RealPrompts(prompts=found, max_tokens=options.max_tokens)
    assert options.text is not None
    text = load_text(options.text)
    if options.tokenizer is None:
        front, ids = await tokenize(http, info.model, text)
    else:
        tokenizer = Tokenizer.load(options.tokenizer)
        front = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        ids = tuple(tokenizer.encode(text, bos=False))
    inputs = Lengths(mean=options.input_mean, most=options.input_max)
    outputs = Lengths(mean=options.output_mean, most=options.output_max)
    return DrawnPrompts(
        ids=ids,
        front=front,
        inputs=inputs.scaled(options.scale),
        outputs=outputs.scaled(options.scale),
        limit=info.max_model_len,
    )


def _facts(options: BenchOptions, info: ServerInfo) -> dict[str, Any]:
    told = info.version.get("device")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": info.model,
        "max_model_len": info.max_model_len,
        "device": options.device or (str(told) if told is not None else None),
        "server": dict(info.version),
        "client": {
            "dskjax": importlib.metadata.version("dskjax"),
            "httpx2": importlib.metadata.version("httpx2"),
            "python": platform.python_version(),
            "commit": source_commit(),
        },
        "settings": options.settings(),
    }
