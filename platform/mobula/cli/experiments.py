"""reproduce, data: published experiments and the data they read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobula.cli.options import Address, Quiet, Track, TrackingUri
from mobula.cli.screen import show


def reproduce(
    method: Annotated[str, typer.Argument(help="a method that declares an experiment")],
    budget: Annotated[str, typer.Option("--budget", help="paper, or smoke for a quick look")] = "paper",
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="seeds of every task (default: as declared)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder (default: reproductions/, or runs/ for smoke)")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="keep the finished cells of an earlier run")
    ] = True,
    track: Track = True,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Runs the experiment of a method and judges its claims, each with its interval.

    Example: mobula reproduce mac --budget smoke
    """
    from mobula.experiment import reproduce as run

    result = run(
        method,
        budget=budget,
        seeds=seeds,
        out=out,
        resume=resume,
        track=track,
        tracking_uri=tracking_uri,
        address=address,
        progress=not quiet,
    )
    from mobula.experiment.ledger import claims_table

    show(claims_table(result))
    for figure in result["figures"]:
        typer.echo(f"figure: {Path(result['folder']) / figure}")
    typer.echo(f"result: {Path(result['folder']) / 'result.json'}")
    if result["failed_cells"]:
        for cell in result["failed_cells"]:
            typer.echo(f"failed: {cell['cell']}: {cell['error']}", err=True)
        raise typer.Exit(1)


def data(context: typer.Context) -> None:
    """Lists, describes and fetches logged data: list | info NAME | fetch NAME [--out FOLDER]."""
    from mobula import registry

    registry.command("data")(context.args)
