"""Load on a running server, and what it measured: `dskjax bench serve`.

Speaks OpenAI's HTTP interface only, so that any server of that kind is measured alike.

    lengths, arrivals   pure: how long requests are, when they are sent
    prompts, workload   real prompts, or token ids of real text in drawn lengths
    client, answer      one request over HTTP, and its times
    load                open and closed loop
    reference           the same greedy text alone and under load
    summary, search     pure: percentiles, goodput; the highest rate within the objectives
    run, report         a whole measurement; JSON, table, plot
"""

from serve.bench.answer import Answer
from serve.bench.client import Client, connect
from serve.bench.options import BenchOptions
from serve.bench.run import run_bench
from serve.bench.summary import Objectives, summarize

__all__ = [
    "Answer",
    "BenchOptions",
    "Client",
    "Objectives",
    "connect",
    "run_bench",
    "summarize",
]
