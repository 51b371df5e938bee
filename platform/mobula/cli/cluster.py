"""submit, dashboards: a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobula.errors import ConfigError


def submit(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", help="http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine)"
        ),
    ] = None,
    wheel: Annotated[
        bool,
        typer.Option(
            "--wheel/--no-wheel", help="ship this source tree, or use what the cluster has installed"
        ),
    ] = True,
    working_dir: Annotated[
        Path | None, typer.Option("--working-dir", help="folder that the job starts in, shipped too")
    ] = None,
    env_var: Annotated[
        list[str] | None, typer.Option("--env-var", help="environment variable of the job, NAME=VALUE")
    ] = None,
    submission_id: Annotated[str | None, typer.Option("--submission-id", help="the job's name")] = None,
    num_cpus: Annotated[
        float | None, typer.Option("--num-cpus", help="CPUs kept for the job's main process")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="stream its output and return its exit status")
    ] = True,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt/--leave-running", help="what Ctrl-C does to the job")
    ] = False,
) -> None:
    """Runs a command of mobula as a job of a Ray cluster, with this source tree; its exit status is the job's.

    Example: mobula submit --address http://head:8265 -- train mac --env goal_grid --out /shared/runs
    """
    from mobula.cluster import jobs

    variables = {}
    for entry in env_var or []:
        name, sign, value = entry.partition("=")
        if not sign or not name:
            raise ConfigError(f"--env-var {entry}: write it as NAME=VALUE")
        variables[name] = value
    _, status = jobs.submit(
        context.args,
        address=address,
        wheel=wheel,
        working_dir=working_dir,
        env_vars=variables,
        submission_id=submission_id,
        num_cpus=num_cpus,
        wait=wait,
        stop_on_interrupt=stop_on_interrupt,
    )
    raise typer.Exit(status)


def dashboards(context: typer.Context) -> None:
    """Writes the files with which Prometheus and Grafana show runs, workers and the service: [--out FOLDER] [--ray-folder ...]."""
    from mobula import registry

    registry.command("dashboards")(context.args)
