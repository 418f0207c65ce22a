"""Commands that compare draft heads: train-mtp study, study-report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dskjax.cli.common import (
    DequantiseOption,
    DeterministicOption,
    Dtype,
    ImplOption,
    compile_one_way,
    err,
    train_mtp,
)


@train_mtp.command()
def study(
    trunk: Annotated[str, typer.Argument(help="Checkpoint folder, or org/name on the hub.")],
    table: Annotated[Path, typer.Option(help="JSON: the variants to compare.")],
    data: Annotated[
        list[Path], typer.Option(help="Text, .jsonl or .parquet files or folders; repeat.")
    ],
    eval_data: Annotated[
        list[str], typer.Option(help="Held-out files to draft on, KIND=PATH or plain; repeat.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the study; gets study.json.")],
    data_set: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: other text, for the variants whose data it is; repeat."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of every variant.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate (warm-up, then cosine).")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.")] = 20,
    top_k: Annotated[int, typer.Option(help="Tokens kept of the trunk's law.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of kl, lk and tv.")] = 1.0,
    drafts: Annotated[list[int] | None, typer.Option(help="Drafts a step. Default: 2, 3.")] = None,
    draft_temperature: Annotated[
        list[float] | None, typer.Option(help="Temperatures of decoding. Default: 0, 1.")
    ] = None,
    rule: Annotated[str, typer.Option(help="Acceptance rule at all temperatures.")] = "rejection",
    prompts: Annotated[int, typer.Option(help="Most prompts of a kind of text.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    stride: Annotated[int, typer.Option(help="Tokens between prompts of one document.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    precision: Annotated[
        Dtype | None, typer.Option(help="Compute dtype. Default: float32 on a CPU, else bfloat16.")
    ] = None,
    remat: Annotated[str, typer.Option(help="jax.checkpoint policy per module, or none.")] = "none",
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.")] = 10,
    max_minutes: Annotated[
        float | None, typer.Option(help="Leave out seeds and data sets that would end later.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where tokenised text is kept. Default: OUT/tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of variants that list none.")] = 0,
    deterministic: DeterministicOption = False,
    keep: Annotated[bool, typer.Option(help="Export each variant to OUT/VARIANT/model.")] = False,
    dequantise: DequantiseOption = False,
    impl: ImplOption = "auto",
) -> None:
    """Train every variant of a table on the same trunk passes, and measure what each drafts."""
    if deterministic:
        compile_one_way("dp=1")
    import jax

    from train_mtp.heads.config import HeadsConfig
    from train_mtp.study.evaluate import Evaluation
    from train_mtp.study.run import run_study

    given: dict[str, Any] = dict(locals())
    shared = set(HeadsConfig.__dataclass_fields__) - {"eval_data"}
    options = {name: value for name, value in given.items() if name in shared}
    if precision is None:
        precision = Dtype.float32 if jax.default_backend() == "cpu" else Dtype.bfloat16
    # What is drafted is measured: no acceptance at further temperatures from the training's laws.
    fixed = {"precision": precision.value, "mesh": "dp=1", "watch": ()}
    config = HeadsConfig(**{**options, **fixed})
    evaluation = Evaluation(
        text=eval_data,
        drafts=tuple(drafts or (2, 3)),
        temperatures=tuple(draft_temperature or (0.0, 1.0)),
        rule=rule,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        stride=stride,
        max_tokens=max_tokens,
    )
    path = run_study(config, table, evaluation, sets=_sets(data_set or []), keep=keep)
    err.print(f"wrote {path}", soft_wrap=True)


def _sets(given: list[str]) -> dict[str, list[Path]]:
    """Paths by name, of texts NAME=PATH; a name may have several."""
    sets: dict[str, list[Path]] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"--data-set {text}: expected NAME=PATH")
        sets.setdefault(name, []).append(Path(path))
    return sets


@train_mtp.command("study-report")
def study_report(
    results: Annotated[list[Path], typer.Argument(help="study.json of one study; several join.")],
    out: Annotated[Path, typer.Option(help="Page to write, .md; plots are put beside it.")],
) -> None:
    """Write the report of a study: tables, plots and findings; its section Reading is kept."""
    from train_mtp.study.page import write_page

    for path in write_page(results, out):
        err.print(f"wrote {path}", soft_wrap=True)
