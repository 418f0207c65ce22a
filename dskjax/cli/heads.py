"""Commands for MTP heads: train-mtp run, export, evaluate, generate-data, plot."""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from dskjax.cli.common import (
    DequantiseOption,
    DeterministicOption,
    Dtype,
    DtypeOption,
    ImplOption,
    ModelDir,
    RevisionOption,
    RuleOption,
    chosen_rule,
    compile_one_way,
    err,
    find,
    load,
    train_mtp,
)


@train_mtp.command()
def run(
    trunk: Annotated[str, typer.Argument(help="Checkpoint folder, or org/name on the hub.")],
    data: Annotated[
        list[Path], typer.Option(help="Text, .jsonl or .parquet files or folders; repeat.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on.")],
    layers: Annotated[int, typer.Option(help="K, drafts that are trained for.")] = 1,
    weights: Annotated[str, typer.Option(help="independent or shared.")] = "independent",
    init: Annotated[str, typer.Option(help="last (the checkpoint's module) or random.")] = "last",
    ce: Annotated[float, typer.Option(help="Weight of cross entropy to the text.")] = 0.1,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the trunk.")] = 0.9,
    lk: Annotated[float, typer.Option(help="Weight of -log acceptance.")] = 0.0,
    tv: Annotated[float, typer.Option(help="Weight of 1 - acceptance.")] = 0.0,
    kl_decay: Annotated[float, typer.Option(help="Hand over from kl to tv; 0 does not.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of kl, lk and tv.")] = 1.0,
    depth_decay: Annotated[float, typer.Option(help="Weight of a depth over the last.")] = 0.8,
    detach: Annotated[bool, typer.Option(help="Stop gradients between depths.")] = False,
    top_k: Annotated[int, typer.Option(help="Tokens kept of the trunk's law.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows a step, over all devices.")] = 64,
    accumulate: Annotated[int, typer.Option(help="Parts of a step's rows, one at a time.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    lr: Annotated[float, typer.Option(help="Peak learning rate (warm-up, then cosine).")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.")] = 0.1,
    answers_only: Annotated[
        bool, typer.Option(help="Of conversations only the last answer counts.")
    ] = True,
    precision: Annotated[
        Dtype | None, typer.Option(help="Compute dtype. Default: float32 on a CPU, else bfloat16.")
    ] = None,
    remat: Annotated[str, typer.Option(help="jax.checkpoint policy per module, or none.")] = "none",
    mesh: Annotated[str, typer.Option(help='Like "dp=4,tp=2"; all devices on dp if empty.')] = "",
    sharding: Annotated[
        str, typer.Option(help="replicated, data, fsdp, tensor or train (fsdp and tensor).")
    ] = "data",
    eval_data: Annotated[
        list[str] | None, typer.Option(help="Held-out files, KIND=PATH or plain; repeat.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.")] = 10,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop, save and export after so many minutes.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option(help="Also write the metrics to OUT/tensorboard.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    deterministic: DeterministicOption = False,
    dequantise: DequantiseOption = False,
    impl: ImplOption = "auto",
) -> None:
    """Train MTP modules over a frozen trunk; resumes by itself, exports to OUT/model."""
    if deterministic:
        compile_one_way(mesh)
    import jax

    from train_mtp.heads.config import HeadsConfig
    from train_mtp.heads.run import train_heads
    from train_mtp.loop import Interrupted, NonFiniteLossError

    given: dict[str, Any] = dict(locals())
    fields = HeadsConfig.__dataclass_fields__
    options = {name: value for name, value in given.items() if name in fields}
    if precision is None:
        precision = Dtype.float32 if jax.default_backend() == "cpu" else Dtype.bfloat16
    config = HeadsConfig(
        **{**options, "precision": precision.value, "eval_data": tuple(eval_data or ())}
    )
    try:
        folder = train_heads(config)
    except Interrupted as stop:
        err.print(str(stop), soft_wrap=True, markup=False)
        raise typer.Exit(128 + stop.signum) from stop
    except NonFiniteLossError as error:
        raise ValueError(str(error)) from error
    err.print(f"exported {folder}", soft_wrap=True)


@train_mtp.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a train-mtp run.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint; default: the best.")] = None,
) -> None:
    """Write a checkpoint of a run as a model: the trunk with its trained modules."""
    from train_mtp.heads.run import export_heads

    err.print(f"exported {export_heads(run, out, step=step)}", soft_wrap=True)


@train_mtp.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
) -> None:
    """Draw the curves of several runs together."""
    from train_mtp.plot import plot_runs

    err.print(f"plot: {plot_runs(runs, out)}", soft_wrap=True)


@train_mtp.command(name="generate-data")
def generate_data(
    model: ModelDir,
    prompts: Annotated[
        list[Path], typer.Option(help="Text, .jsonl or .parquet files or folders; repeat.")
    ],
    out: Annotated[Path, typer.Option(help="File to write, .jsonl; one that is there goes on.")],
    temperature: Annotated[float, typer.Option(help="As the trunk will be served.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    prefix: Annotated[
        int, typer.Option(help="Tokens of a plain text that are its prompt.", min=1)
    ] = 64,
    per_text: Annotated[
        int, typer.Option(help="Prompts of a plain text, spread over it.", min=1)
    ] = 1,
    limit: Annotated[int | None, typer.Option(help="Most prompts. Default: all.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.", min=1)] = 64,
    thinking: Annotated[
        bool | None, typer.Option(help="The chat template's switch; on where there is one.")
    ] = None,
    speculate: Annotated[
        int, typer.Option(help="Tokens drafted a step; the text's law stays.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: DtypeOption = None,
    dequantise: DequantiseOption = False,
    revision: RevisionOption = None,
    impl: ImplOption = "auto",
) -> None:
    """Let the trunk answer prompts: data that heads learn best from."""
    from dskjax.tokenizer import Tokenizer
    from train_mtp.on_policy import read_prompts, write_answers

    folder = find(model, revision)
    params, cfg = load(folder, dtype, dequantise=dequantise)
    tokenizer = Tokenizer.load(folder)
    source = read_prompts(prompts, tokenizer, prefix=prefix, per_text=per_text, thinking=thinking)
    source = itertools.islice(source, limit)
    with Progress(*Progress.get_default_columns(), "{task.fields[note]}", console=err) as bar:
        task = bar.add_task("answering", total=None, note="")
        lines = write_answers(
            params,
            cfg,
            tokenizer,
            source,
            out,
            batch=batch,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            drafts=speculate,
            impl=impl,
            on_batch=lambda done, tokens: bar.update(
                task, completed=done, note=f"{done} answers, {tokens} tokens"
            ),
        )
    err.print(f"{lines} records in {out}", soft_wrap=True)


@train_mtp.command()
def evaluate(
    model: ModelDir,
    text: Annotated[list[str], typer.Option(help="Held-out files, KIND=PATH or plain; repeat.")],
    drafts: Annotated[int, typer.Option(help="Tokens drafted a step.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of target and drafts.")] = 0.6,
    rule: RuleOption = "auto",
    prompts: Annotated[int, typer.Option(help="Prompts per kind of text.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here, not to stdout.")
    ] = None,
    dtype: DtypeOption = None,
    dequantise: DequantiseOption = False,
    revision: RevisionOption = None,
    impl: ImplOption = "auto",
) -> None:
    """Acceptance of drafts on held-out text, by real speculative decoding, by kind of text."""
    import jax

    from dskjax.evaluation import documents_by_kind
    from dskjax.tokenizer import Tokenizer
    from train_mtp.acceptance import measure, prompts_of

    folder = find(model, revision)
    params, cfg = load(folder, dtype, dequantise=dequantise)
    tokenizer = Tokenizer.load(folder)
    kinds = {
        kind: prompts_of(documents, tokenizer, count=prompts, length=prompt_tokens)
        for kind, documents in documents_by_kind(text, tokenizer=tokenizer).items()
    }
    accept = chosen_rule(rule, temperature)
    figures = measure(
        params,
        cfg,
        kinds,
        drafts=drafts,
        temperature=temperature,
        rule=accept,
        max_tokens=max_tokens,
        seed=seed,
        impl=impl,
    )
    used = accept.name if rule == "auto" else rule
    settings = {"model": model.name, "drafts": drafts, "temperature": temperature, "rule": used}
    report = json.dumps({**settings, "device": jax.devices()[0].device_kind, **figures}, indent=2)
    if json_out is None:
        print(report)
    else:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(report + "\n")
