"""The command line: the one place that may import every package, each lazily inside its command."""

import os
from typing import Annotated, NoReturn

import typer

from dskjax.cli import (
    acceptance,
    bench,
    convert,
    eplb,
    eval,
    heads,
    launch,
    model,
    serve,
    study,
    train,
)
from dskjax.cli.common import app, err, train_mtp
from dskjax.extras import EXTRAS, hint

__all__ = [
    "acceptance",
    "app",
    "bench",
    "convert",
    "eplb",
    "eval",
    "heads",
    "launch",
    "main",
    "model",
    "serve",
    "study",
    "train",
    "train_mtp",
]


@app.callback()
def _main(
    cpu_devices: Annotated[
        int, typer.Option(help="Simulate this many devices on the CPU; 0 uses what is there.")
    ] = 0,
) -> None:
    import jax

    from dskjax.distributed import Membership

    if cpu_devices < 0:
        raise ValueError(f"--cpu-devices {cpu_devices} must be 0 or more")
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if (place := Membership.told(os.environ)) is not None:
        place.join()


def main(command: typer.Typer = app) -> NoReturn:
    """Entry point: a user's mistake ends with one line and exit code 2, a defect with a
    traceback.
    """
    try:
        command(standalone_mode=True)
    except (ValueError, NotImplementedError, FileNotFoundError, FileExistsError) as error:
        err.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(2) from error
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        err.print(f"error: {hint(error.name)}", style="red", markup=False)
        raise SystemExit(2) from error
    raise SystemExit(0)
