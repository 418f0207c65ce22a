"""`dskjax bench acceptance`: the acceptance report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dskjax.cli.common import (
    DequantiseOption,
    DtypeOption,
    ImplOption,
    ModelDir,
    RevisionOption,
    bench,
    err,
    find,
    load,
)


@bench.command()
def acceptance(
    model: ModelDir,
    prompts: Annotated[
        Path, typer.Option(help="Texts and questions by kind, .json; see benchmarks/prompts.")
    ] = Path("benchmarks/prompts/acceptance.json"),
    out: Annotated[Path, typer.Option(help="Folder for acceptance.json, .md and .png.")] = Path(
        "runs/acceptance"
    ),
    rule: Annotated[
        list[str] | None, typer.Option(help="Rules to compare; repeat. Default: all of them.")
    ] = None,
    drafts: Annotated[
        list[int] | None, typer.Option(help="Drafts a step; repeat. Default: 1 to 5.")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Repeat for more. Default: 0.6 and 1.0.")
    ] = None,
    count: Annotated[int, typer.Option(help="Most prompts of each kind.")] = 40,
    length: Annotated[int, typer.Option(help="Tokens of each text prompt.")] = 48,
    max_tokens: Annotated[int, typer.Option(help="New tokens of text prompts.")] = 48,
    thinking_tokens: Annotated[int, typer.Option(help="New tokens of questions.")] = 96,
    max_seconds: Annotated[float, typer.Option(help="No run begins after so long.")] = 3000.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    join: Annotated[
        list[Path] | None,
        typer.Option(help="Measure nothing: draw these acceptance.json, joined. Repeat."),
    ] = None,
    dtype: DtypeOption = None,
    dequantise: DequantiseOption = False,
    revision: RevisionOption = None,
    impl: ImplOption = "auto",
) -> None:
    """How many drafts each acceptance rule keeps, and what the lossy ones cost; tables and plot."""
    from dskjax.commands.acceptance import RULES, joined, load_prompts, report
    from dskjax.commands.acceptance_tables import markdown, plot
    from dskjax.commands.rule_tv import tv_rows
    from dskjax.decode import RuleOptions
    from dskjax.tokenizer import Tokenizer

    if join:
        result = joined([json.loads(path.read_text()) for path in join])
    else:
        rules = tuple(map(RuleOptions.parse, rule)) if rule else RULES
        model = find(model, revision)
        params, cfg = load(model, dtype, dequantise=dequantise)
        tokenizer = Tokenizer.load(model)
        kinds, answers = load_prompts(prompts, tokenizer, count=count, length=length)
        result = report(
            params,
            cfg,
            tokenizer,
            kinds,
            answers=answers,
            rules=rules,
            drafts=drafts or (1, 2, 3, 4, 5),
            temperatures=temperature or (0.6, 1.0),
            max_tokens=max_tokens,
            thinking_tokens=thinking_tokens,
            max_seconds=max_seconds,
            seed=seed,
            impl=impl,
            on_run=lambda what: err.print(what, highlight=False, soft_wrap=True),
        )
    if "tv" not in result:
        err.print("measuring how far each rule bends the law of the text")
        result["tv"] = tv_rows(result["settings"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "acceptance.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "acceptance.md").write_text(markdown(result))
    err.print(f"wrote {out}/acceptance.json, .md and {plot(result, out / 'acceptance.png')}")
