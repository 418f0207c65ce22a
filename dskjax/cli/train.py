"""Commands that train and evaluate: pretrain, train-mtp."""

from pathlib import Path
from typing import Annotated

import typer

from dskjax.cli.common import (
    Dtype,
    DtypeOption,
    ImplOption,
    ModelDir,
    RuleOption,
    app,
    chosen_rule,
    err,
    load,
    train_mtp,
)


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Option(help="Text files or folders; repeat for more.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on.")],
    model: Annotated[str, typer.Option(help="Preset, config.json or its folder.")] = "tiny-v3",
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows a step, over all devices.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    lr: Annotated[float, typer.Option(help="Peak learning rate (warm-up, then cosine).")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.")] = 0.1,
    mtp_weight: Annotated[float, typer.Option(help="Weight of the MTP loss.")] = 0.3,
    precision: Annotated[
        Dtype | None, typer.Option(help="Compute dtype. Default: float32 on a CPU, else bfloat16.")
    ] = None,
    remat: Annotated[str, typer.Option(help="jax.checkpoint policy per layer, or none.")] = "none",
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
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    impl: ImplOption = "auto",
) -> None:
    """Train a model and its MTP modules on text; resumes by itself, exports to OUT/model."""
    import jax

    from train_mtp.config import PretrainConfig
    from train_mtp.loop import Interrupted, NonFiniteLossError
    from train_mtp.pretrain import pretrain as run

    if precision is None:
        precision = Dtype.float32 if jax.default_backend() == "cpu" else Dtype.bfloat16
    config = PretrainConfig(
        model=model,
        data=data,
        tokenizer=tokenizer,
        out=out,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        mtp_weight=mtp_weight,
        precision=precision.value,
        remat=remat,  # pyright: ignore[reportArgumentType] - checked by PretrainConfig
        mesh=mesh,
        sharding=sharding,  # pyright: ignore[reportArgumentType] - checked by PretrainConfig
        eval_data=eval_data or (),
        eval_every=eval_every,
        save_every=save_every,
        log_every=log_every,
        max_minutes=max_minutes,
        seed=seed,
        impl=impl,
    )
    try:
        folder = run(config)
    except Interrupted as stop:
        err.print(str(stop), soft_wrap=True, markup=False)
        raise typer.Exit(128 + stop.signum) from stop
    except NonFiniteLossError as error:
        raise ValueError(str(error)) from error
    err.print(f"exported {folder}", soft_wrap=True)


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
    impl: ImplOption = "auto",
) -> None:
    """Acceptance of drafts on held-out text, by real speculative decoding, by kind of text."""
    import json

    import jax

    from dskjax.tokenizer import Tokenizer
    from train_mtp.acceptance import measure, prompts_of
    from train_mtp.evaluation import documents_by_kind

    params, cfg = load(model, dtype)
    tokenizer = Tokenizer.load(model)
    kinds = {
        kind: prompts_of(documents, tokenizer, count=prompts, length=prompt_tokens)
        for kind, documents in documents_by_kind(text, tokenizer=tokenizer).items()
    }
    name = chosen_rule(rule, temperature)
    figures = measure(
        params,
        cfg,
        kinds,
        drafts=drafts,
        temperature=temperature,
        rule=name,
        max_tokens=max_tokens,
        seed=seed,
        impl=impl,
    )
    settings = {"model": model.name, "drafts": drafts, "temperature": temperature, "rule": name}
    report = json.dumps({**settings, "device": jax.devices()[0].device_kind, **figures}, indent=2)
    if json_out is None:
        print(report)
    else:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(report + "\n")
