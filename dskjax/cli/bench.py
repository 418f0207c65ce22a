"""Commands that measure: bench serve, bench kernels."""

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console

from dskjax.cli.common import bench, err


@bench.command()
def serve(
    url: Annotated[str, typer.Option(help="Any server with OpenAI's interface.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str | None, typer.Option(help="Model; default: the server's first.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='Real prompts: .jsonl of {"prompt"} or {"messages"}, or text documents.'),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="With --prompts: most new tokens.")] = 256,
    document_chars: Annotated[
        int, typer.Option(help="With --prompts: most characters of a text document.")
    ] = 400,
    text: Annotated[
        Path | None, typer.Option(help="Text to cut prompts of drawn lengths from.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="With --text: folder of tokenizer.json; default: the server tokenizes."),
    ] = None,
    input_mean: Annotated[
        float, typer.Option(help="With --text: mean tokens of prompts.")
    ] = 3500.0,
    input_max: Annotated[int, typer.Option(help="With --text: most tokens of a prompt.")] = 16_000,
    output_mean: Annotated[float, typer.Option(help="With --text: mean new tokens.")] = 1200.0,
    output_max: Annotated[int, typer.Option(help="With --text: most new tokens.")] = 32_000,
    scale: Annotated[float, typer.Option(help="Factor on these four.")] = 1.0,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests a second.")] = None,
    constant: Annotated[bool, typer.Option(help="Open loop: equal gaps, not Poisson.")] = False,
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: requests under way.")
    ] = None,
    search: Annotated[
        bool, typer.Option(help="Find the highest rate within the objectives, from --rate on.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="How closely --search ends.")] = 0.05,
    probes: Annotated[int, typer.Option(help="Most rates that --search tries.")] = 12,
    probe_seconds: Annotated[
        float, typer.Option(help="Least seconds of requests at each rate of --search.")
    ] = 60.0,
    slo_ttft: Annotated[float, typer.Option(help="Objective: seconds to the first token.")] = 2.0,
    slo_tpot: Annotated[float, typer.Option(help="Objective: seconds per token after it.")] = 0.05,
    percentile: Annotated[
        float, typer.Option(help="Percent of requests that must keep each objective.")
    ] = 90.0,
    requests: Annotated[int, typer.Option(help="Measured in a run, or at least.")] = 100,
    warmup: Annotated[int, typer.Option(help="Requests before them.")] = 4,
    repeats: Annotated[int, typer.Option(help="Runs; with --search: of the best rate.")] = 1,
    references: Annotated[
        int, typer.Option(help="Greedy prompts whose texts must be the same alone and under load.")
    ] = 4,
    allow_mismatch: Annotated[
        bool, typer.Option(help="End well even if such a text changed or none came back.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of every measured request.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Of every measured request.")] = 1.0,
    accept: Annotated[
        str | None, typer.Option(help="Acceptance rule; only for a dskjax server.")
    ] = None,
    speculate: Annotated[
        int | None, typer.Option(help="Most drafts a step; only for a dskjax server.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths, arrivals and sampling.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds without a piece: failed.")] = 600.0,
    device: Annotated[
        str | None, typer.Option(help="What the server runs on, for the record.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Also DSKJAX_API_KEY.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for serve.json and serve.png.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Load a running server; latency, throughput, goodput, drafts, and whether texts hold."""
    from serve.bench.options import BenchOptions
    from serve.bench.report import table, write
    from serve.bench.run import run_bench
    from serve.bench.summary import Objectives

    if search and rate is None:
        rate = 1.0
    fields = {"temperature": temperature, "top_p": top_p, "accept": accept, "speculate": speculate}
    options = BenchOptions(
        url=url,
        model=model,
        api_key=api_key or os.environ.get("DSKJAX_API_KEY"),
        prompts=prompts,
        document_chars=document_chars,
        max_tokens=max_tokens,
        text=text,
        tokenizer=tokenizer,
        input_mean=input_mean,
        input_max=input_max,
        output_mean=output_mean,
        output_max=output_max,
        scale=scale,
        rate=None if search else rate,
        arrivals="constant" if constant else "poisson",
        concurrency=concurrency,
        search_from=rate if search else None,
        tolerance=tolerance,
        probes=probes,
        probe_seconds=probe_seconds,
        requests=requests,
        warmup=warmup,
        repeats=repeats,
        references=references,
        objectives=Objectives(ttft=slo_ttft, tpot=slo_tpot, percentile=percentile),
        options={key: value for key, value in fields.items() if value is not None},
        seed=seed,
        timeout=timeout,
        device=device,
    )
    result = run_bench(options, err)
    json_path, png_path = write(result, options, out)
    Console().print(table(result, options.objectives))
    err.print(f"wrote {json_path} and {png_path}", soft_wrap=True, highlight=False)
    if result.mismatches or result.unchecked:
        what = f"{result.mismatches} greedy texts changed under load; {json_path} has them"
        if result.unchecked:
            what = "no greedy text came back under load, so none was compared"
        err.print(what, style="red", soft_wrap=True, highlight=False)
        if not allow_mismatch:
            raise typer.Exit(1)
    if result.found is not None and result.found.best is None:
        err.print(f"no rate of {len(result.found.curve)} kept the objectives", style="red")
        raise typer.Exit(1)


@bench.command()
def kernels(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OP[:PATTERN]",
            help="Ops, or cases of an op (* for any letters). Default: every case of every op.",
        ),
    ] = None,
    names: Annotated[
        bool, typer.Option("--list", help="Only list ops and cases; needs no GPU.")
    ] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Other tiles too.")] = False,
    tiles: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Only implementations of such names; sweeps."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Sweep over tiles alone and keep each case's fastest right ones in a table.",
        ),
    ] = False,
    others: Annotated[
        bool, typer.Option("--others", help="Our other implementations too.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Check results, time nothing.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a kernels-OP.json of each op; with --tune for tune-OP.json and "
            "tiles.json, which is in benchmarks/results by default."
        ),
    ] = None,
) -> None:
    """Check and time GPU kernels at real shapes beside the card's own ceilings."""
    programs = _checkout("benchmarks.kernels")
    chosen = programs.chosen_cases(ops or [])
    if names:
        Console().print(programs.listing(chosen), soft_wrap=True, highlight=False, markup=False)
        return
    pattern = tiles or ("*" if sweep else None)
    rows = programs.run(chosen, sweep=pattern, others=others, check=check, tune=tune, out=out)
    failed = sum("failed" in row for row in rows)
    if failed and not (pattern or tune):  # of tiles some do not fit, which is no defect
        err.print(f"{failed} of {len(rows)} failed, see above", style="red")
        raise typer.Exit(1)


def _checkout(name: str) -> ModuleType:
    """A module of the programs that are no part of the installed package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise
        raise ValueError(
            f"{name} is in the repository, not in the installed package: clone it and run "
            "`pip install -e .` there, or `python -m benchmarks.kernels` from its root"
        ) from error
