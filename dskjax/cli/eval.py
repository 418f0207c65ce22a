"""`dskjax eval`: bits per byte, and right answers."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dskjax.cli.common import (
    DequantiseOption,
    DtypeOption,
    ImplOption,
    ModelDir,
    RevisionOption,
    app,
    err,
    find,
    load,
)


@app.command("eval")
def evaluate(
    model: ModelDir,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Held-out text, KIND=PATH or plain: .txt, .jsonl, .xz, folders; repeat."),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Kinds of the documents of each plain --text, .jsonl.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens a window over a document.")] = 1024,
    stride: Annotated[int, typer.Option(help="Tokens between the beginnings of windows.")] = 512,
    reasoning: Annotated[
        Path | None, typer.Option(help='Questions, .jsonl of {"task", "question", "answer"}.')
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="Most questions. Default: all of them.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Answers a question.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of the answers; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Whether to think before answering. Default: if the chat template has a switch.",
        ),
    ] = None,
    speculate: Annotated[
        int, typer.Option(help="Tokens drafted a step by the MTP modules; 0 is off.")
    ] = 0,
    batch: Annotated[int, typer.Option(help="Windows, or answers, at once.")] = 16,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write figures, settings and versions here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures, .png.")] = None,
    failures: Annotated[
        Path | None, typer.Option(help="Write every wrong answer here, .jsonl.")
    ] = None,
    dtype: DtypeOption = None,
    dequantise: DequantiseOption = False,
    revision: RevisionOption = None,
    impl: ImplOption = "auto",
) -> None:
    """Bits per byte of held-out text by kind, and right answers to questions by task."""
    from dskjax.checkpoint import load_config
    from dskjax.commands import eval as command
    from dskjax.commands import eval_tables
    from dskjax.tokenizer import Tokenizer

    options = command.EvalOptions(
        text=text or (),
        index=index,
        context=context,
        stride=stride,
        reasoning=reasoning,
        questions=questions,
        samples=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        thinking=thinking,
        drafts=speculate,
        batch_size=batch,
        impl=impl,
    )
    if failures is not None and reasoning is None:
        raise ValueError("--failures needs --reasoning")
    name = model.resolve().name if model.exists() else str(model)
    model = find(model, revision)
    tokenizer = Tokenizer.load(model)
    given = command.EvalInput.read(options, load_config(model), tokenizer)
    params, cfg = load(model, dtype, dequantise=dequantise)
    report, wrong = command.evaluate(
        params, cfg, tokenizer, given, options, name=name, folder=model, console=err
    )
    console = Console()
    if "text" in report:
        console.print(eval_tables.text_table(report))
    if "reasoning" in report:
        console.print(eval_tables.reasoning_table(report))
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(report, indent=1) + "\n")
        err.print(f"wrote {json_out}", soft_wrap=True, highlight=False)
    if plot is not None:
        err.print(f"plot: {eval_tables.plot(report, plot)}", soft_wrap=True, highlight=False)
    if failures is not None:
        command.write_lines(failures, wrong)
        err.print(f"wrote {len(wrong)} wrong answers to {failures}", soft_wrap=True)
