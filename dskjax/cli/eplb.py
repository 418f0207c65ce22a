"""`dskjax eplb`: expert placement."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dskjax.cli.common import app, err
from dskjax.eplb import Policy


@app.command()
def eplb(
    load: Annotated[
        Path,
        typer.Option(
            help="Loads (tokens) of the experts, [layers, experts], .npy; of the trunk's layers or "
            "of MTP modules, as dskjax generate writes them."
        ),
    ],
    replicas: Annotated[
        int,
        typer.Option(
            help="Slots of all GPUs together, not just the spare ones: 256 experts with 32 spare "
            "slots are 288. DeepSeek's num_replicas."
        ),
    ],
    gpus: Annotated[int, typer.Option(help="GPUs of all nodes together.")],
    out: Annotated[Path, typer.Option(help="Where to write the plan, .json.")],
    groups: Annotated[int, typer.Option(help="Groups of experts that the router knows.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes; each has gpus / nodes GPUs.")] = 1,
    policy: Annotated[
        Policy,
        typer.Option(
            help="global: any expert anywhere; hierarchical: groups stay on one node; deepseek: "
            "hierarchical if groups divide over nodes, else global; _refined: more even than "
            "DeepSeek's plan of that kind."
        ),
    ] = Policy.GLOBAL_REFINED,
    current: Annotated[
        Path | None,
        typer.Option(help="The plan in use: the new one moves few experts, and lists the moves."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(help="With --current: part by which the fullest GPU may be fuller for that."),
    ] = 0.02,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the load of every GPU before and after, .png.")
    ] = None,
) -> None:
    """Plan which GPU holds which experts, some of them several times, from measured loads."""
    from dskjax.commands import eplb as command
    from dskjax.eplb import Layout

    layout = Layout(num_replicas=replicas, num_groups=groups, num_nodes=nodes, num_gpus=gpus)
    loads = command.read_loads(load)
    in_use = None if current is None else command.read_plan(current)
    begun = time.perf_counter()
    result = command.make(loads, layout, policy, current=in_use, tolerance=tolerance)
    seconds = time.perf_counter() - begun
    command.write(result, out)
    Console().print(command.table(result))
    err.print(f"planned in {seconds:.2f} s; wrote {out}", soft_wrap=True, highlight=False)
    if plot is not None:
        err.print(f"plot: {command.plot(result, plot)}", soft_wrap=True, highlight=False)
