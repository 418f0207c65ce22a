"""The command that trains a model from scratch: pretrain."""

from pathlib import Path
from typing import Annotated

import typer

from dskjax.cli.common import (
    DeterministicOption,
    Dtype,
    ImplOption,
    app,
    compile_one_way,
    err,
)


@app.command()
def pretrain(
    data: Annotated[
        list[Path], typer.Option(help="Text, .jsonl or .parquet files or folders; repeat.")
    ],
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
    tensorboard: Annotated[
        bool, typer.Option(help="Also write the metrics to OUT/tensorboard.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    deterministic: DeterministicOption = False,
    impl: ImplOption = "auto",
) -> None:
    """Train a model and its MTP modules on text; resumes by itself, exports to OUT/model."""
    if deterministic:
        compile_one_way(mesh)
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
        tensorboard=tensorboard,
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
