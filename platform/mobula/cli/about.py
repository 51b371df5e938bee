"""methods, envs, cite, doctor: what there is, here and on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mobula.cli.screen import show
from mobula.errors import ConfigError


def methods() -> None:
    """Every method, a line each."""
    from rich.table import Table

    from mobula import registry

    _listing(Table(title="methods", title_justify="left", box=None, pad_edge=False), registry.methods())
    show("\n[dim]mobula train NAME --help shows the settings of one.[/dim]")


def envs() -> None:
    """Every tensor environment, a line each; any gymnasium ID works too, as gymnasium:ID."""
    from rich.table import Table

    from mobula import registry

    _listing(Table(title="environments", title_justify="left", box=None, pad_edge=False), registry.envs())
    show("\n[dim]Any gymnasium environment: --env gymnasium:HalfCheetah-v5[/dim]")


def _listing(table: Any, entries: list[Any]) -> None:
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is")
    table.add_column("from", style="dim", no_wrap=True)
    for entry in entries:
        table.add_row(entry.name, entry.summary, entry.source)
    show(table)


def cite(method: Annotated[str, typer.Argument(help="name of a method")]) -> None:
    """Prints the BibTeX entry of a method."""
    from mobula import registry

    cls: Any = registry.config_class(method)
    citation = getattr(cls, "citation", "")
    if not citation:
        if cls.__module__.startswith("ray."):
            citation = (
                "@inproceedings{liang2018rllib,\n  title     = {{RLlib}: Abstractions for Distributed Reinforcement Learning},\n"
                "  author    = {Liang, Eric and Liaw, Richard and Nishihara, Robert and Moritz, Philipp and Fox, Roy and\n"
                "               Goldberg, Ken and Gonzalez, Joseph and Jordan, Michael and Stoica, Ion},\n"
                "  booktitle = {International Conference on Machine Learning},\n  year      = {2018}\n}"
            )
        else:
            raise ConfigError(f"{method} declares no citation")
    typer.echo(citation)


def doctor() -> None:
    """Looks at this machine: what is installed, what works, what to mend."""
    from mobula.doctor import examine

    healthy = True
    for name, good, text in examine():
        healthy &= good
        show(f"{'[green]ok[/green]  ' if good else '[red]mend[/red]'}  [bold]{name}[/bold]  {text}")
    raise typer.Exit(0 if healthy else 1)
