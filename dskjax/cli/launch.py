"""`dskjax launch`."""

import os
from typing import Annotated

import typer

from dskjax.cli.common import app


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    command: Annotated[list[str], typer.Argument(help="A dskjax command with its options.")],
    processes: Annotated[
        int, typer.Option("--processes", "-n", help="Processes on this host.")
    ] = 2,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0; needed with several hosts.")
    ] = None,
    first_process: Annotated[int, typer.Option(help="Number of this host's first process.")] = 0,
    total_processes: Annotated[
        int | None, typer.Option(help="Processes on all hosts; those of this one if left out.")
    ] = None,
    gpus_per_process: Annotated[int, typer.Option(help="GPUs of each; 0: all of the host.")] = 0,
    cpu_devices: Annotated[int, typer.Option(help="Simulated devices of each; 0: GPUs.")] = 0,
) -> None:
    """Run one command in several processes that compute as one mesh."""
    from dskjax.commands.launch import launch as run

    devices = ["--cpu-devices", str(cpu_devices)] if cpu_devices else []
    code = run(
        [*devices, *command],
        processes=processes,
        environment=os.environ,
        coordinator=coordinator,
        first=first_process,
        total=total_processes,
        gpus_per_process=gpus_per_process,
    )
    if code:
        raise typer.Exit(code if code > 0 else 1)
