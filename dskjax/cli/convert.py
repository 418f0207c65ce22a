"""`dskjax convert`: checkpoints in other shards, other forms, other kinds of folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dskjax.cli.common import Dtype, RevisionOption, app, err


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder, or org/name on the hub.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[
        Literal["hf", "orbax"], typer.Option(help="Hugging Face safetensors, or Orbax.")
    ] = "hf",
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Make floats of quantized weights.")
    ] = False,
    quantise: Annotated[
        Literal["fp8", "w4afp8"] | None,
        typer.Option(help="fp8: all linear weights; w4afp8: routed experts int4, the rest fp8."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of floats. Default: that of the stored embedding.")
    ] = None,
    max_shard_gb: Annotated[float, typer.Option(help="Largest file of weights, in 1e9 bytes.")] = 5,
    revision: RevisionOption = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a checkpoint at TARGET, and drop what another conversion left.",
        ),
    ] = False,
) -> None:
    """Convert a checkpoint, weight by weight; the same command goes on with what it has begun.

    Without options it puts the weights into other files. Tokenizer, templates and model card are
    copied along. TARGET appears when it is complete.
    """
    from dskjax.checkpoint import Conversion
    from dskjax.checkpoint import convert as run

    conversion = Conversion(
        to=to,
        dtype=None if dtype is None else dtype.value,
        dequantise=dequantise,
        quantise=quantise,
        max_shard_bytes=round(max_shard_gb * 1e9),
    )
    run(
        source,
        target,
        conversion,
        revision=revision,
        overwrite=overwrite,
        progress=err.is_terminal,
    )
    err.print(f"wrote {target}", soft_wrap=True, highlight=False)
