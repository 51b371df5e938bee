"""train, track: runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mobula.cli.options import (
    Address,
    ConfigFile,
    EnvName,
    EnvRunners,
    Envs,
    EnvSettings,
    ExperimentName,
    Learners,
    MethodName,
    Out,
    Placement,
    Quiet,
    Seed,
    Stop,
    Track,
    TrackingUri,
    Verbose,
    config_of,
    knob_flags,
    pairs,
    settings_of,
    targets_of,
)
from mobula.cli.screen import progress_bar, show
from mobula.errors import ConfigError


def train(
    context: typer.Context,
    method: MethodName = None,
    env: EnvName = None,
    env_set: EnvSettings = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any setting of the config, key=value")
    ] = None,
    config: ConfigFile = None,
    dump_config: Annotated[
        bool, typer.Option("--dump-config", help="prints the settings as YAML and stops")
    ] = False,
    seed: Seed = None,
    iterations: Annotated[int | None, typer.Option("--iterations", help="training iterations")] = None,
    stop: Stop = None,
    num_env_runners: EnvRunners = None,
    num_envs: Envs = None,
    num_learners: Learners = None,
    placement: Placement = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="prints what goes where and what it asks of the cluster, and stops"),
    ] = False,
    out: Out = Path("runs"),
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            "--checkpoint-every", help="iterations between checkpoints (default: every five minutes)"
        ),
    ] = None,
    keep: Annotated[int, typer.Option("--keep", help="checkpoints that are kept")] = 1,
    max_failures: Annotated[
        int,
        typer.Option(
            "--max-failures",
            min=0,
            help="times to go on from the last checkpoint after a lost learner or machine",
        ),
    ] = 3,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="run folder to go on with, from its last checkpoint; --stop may set a later end"
        ),
    ] = None,
    track: Track = True,
    tracking_uri: TrackingUri = None,
    experiment: ExperimentName = None,
    address: Address = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    help_: Annotated[
        bool, typer.Option("--help", "-h", help="this text; with a method, its settings too")
    ] = False,
) -> None:
    """Trains a method on an environment, in a run folder of its own."""
    if help_ or (method is None and config is None and resume is None):
        _train_help(context, method)
        return
    from mobula import running, settings

    if resume is not None:
        if method is not None or config is not None or context.args:
            raise ConfigError(
                "--resume takes the run's own method and settings: leave out others (a later --stop may be given)"
            )
        with progress_bar(f"resume {resume}", quiet) as progress:
            run = running.resume(
                resume,
                stop={**pairs(stop or [], "--stop"), **({"iterations": iterations} if iterations else {})},
                address=address,
                progress=progress,
                verbose=verbose,
            )
        _report(run, quiet)
        return

    given = settings.load_yaml(config) if config is not None else {}
    name = method or given.get("method")
    if name is None:
        raise ConfigError(f"{config} names no method, and the command line gives none")
    environment = env or given.get("env")
    flags = {**pairs(set_ or [], "--set"), **knob_flags(context.args, settings_of(name), name)}
    counts = (num_env_runners, num_envs, num_learners)
    chosen = config_of(given, name, env, env_set, flags, seed, counts, placement, verbose)
    if dump_config:
        typer.echo(settings.dump_config(chosen), nl=False)
        return
    if dry_run:
        _dry_run(chosen, address, verbose)
        return
    targets = targets_of({**given.get("stop", {}), **pairs(stop or [], "--stop")}) or {}
    if iterations is not None:
        if iterations < 1:
            raise ConfigError(f"--iterations {iterations}: at least 1")
        targets["iterations"] = iterations
    title = name if environment is None else f"{name} on {environment}"
    with progress_bar(title, quiet, getattr(chosen, "headline", None)) as progress:
        run = running.train(
            chosen,
            stop=targets or None,
            out=out,
            track=track,
            tracking_uri=tracking_uri,
            experiment=experiment,
            address=address,
            checkpoint_every=checkpoint_every,
            keep=keep,
            max_failures=max_failures,
            progress=progress,
            verbose=verbose,
        )
    _report(run, quiet)


def _dry_run(config: Any, address: str | None, verbose: bool) -> None:
    from rich.table import Table

    from mobula import joining, placement, registry

    table = Table(
        title=f"{registry.name_of(config)} on {config.env or 'data'}", title_justify="left", box=None
    )
    for column in ("role", "count", "each asks for", "where", "what"):
        table.add_column(column, justify="right" if column == "count" else "left")
    table.add_row("main", "1", "", "this process", "drives the run, keeps checkpoints and metrics")
    total: dict[str, float] = {}
    for role in placement.roles(config):
        each = ", ".join(f"{amount:g} {name}" for name, amount in role.each.items())
        where = "Ray tasks" if role.name == "workers" else "Ray actors"
        table.add_row(
            role.name,
            str(role.count),
            each if role.count else "",
            where if role.count else "this process",
            role.what,
        )
        for name, amount in role.each.items():
            if role.count:
                total[name] = total.get(name, 0.0) + role.count * amount
    show(table)
    asked = (
        ", ".join(f"{amount:g} {name}" for name, amount in total.items())
        or "nothing: all is done in this process"
    )
    typer.echo(f"asks for:   {asked}")
    joining.start_ray(address, verbose=verbose)
    nodes = placement.cluster_nodes()
    for index, node in enumerate(nodes):
        typer.echo(
            f"node {index + 1}:     {', '.join(f'{amount:g} {name}' for name, amount in sorted(node.items()))}"
        )
    short = placement.lacking(placement.roles(config), nodes)
    typer.echo(f"verdict:    {short or 'fits'}")


def _train_help(context: typer.Context, method: str | None) -> None:
    typer.echo(context.get_help())
    typer.echo(
        "\nExamples:\n"
        "  mobula train mac --env goal_grid --env-set size=7 --stop env_steps=80000 --seed 1\n"
        "  mobula train PPO --env cartpole --num-env-runners 2 --stop return=475\n"
        "  mobula train PPO --env gymnasium:HalfCheetah-v5 --normalize-observations --stop env_steps=1000000\n"
        "  mobula train --resume runs/RUN --stop env_steps=2000000\n"
        "  mobula train mac --env goal_grid --t-max 8 --dump-config > mac.yaml && mobula train --config mac.yaml\n"
    )
    if method is None:
        typer.echo("With a method (mobula train mac --help) this lists its hyper-parameters.")
        return
    from rich.table import Table

    from mobula import registry
    from mobula.method import MethodConfig, _training_arguments

    cls = registry.config_class(method)
    if not issubclass(cls, MethodConfig):
        plain = cls()
        typer.echo(
            f"Settings of {registry.method_name(method)} (RLlib's `training`; see RLlib's documentation):"
        )
        for name in sorted(_training_arguments(cls)):
            value = getattr(plain, name, None)
            if isinstance(value, int | float | str | bool | list) or value is None:
                typer.echo(f"  --{name.replace('_', '-')}  [default: {value}]")
        return
    summary = (cls.__doc__ or "").split("\n", 1)[0]
    table = Table(title=f"{registry.method_name(method)}: {summary}", title_justify="left", show_lines=False)
    for column in ("option", "default", "allowed", "meaning"):
        table.add_column(column, no_wrap=column == "option")
    for name, knob in cls.hyperparameters().items():
        table.add_row(f"--{name.replace('_', '-')}", str(knob.default), knob.range, knob.help)
    show(table)


def _report(run: Any, quiet: bool) -> None:
    if quiet:
        typer.echo(run.path)
        return
    from rich.table import Table

    from mobula.results import reward_per_step

    table = Table(title="result", title_justify="left", show_header=False)
    last = run.last
    returns = [
        row["env_runners/episode_return_mean"] for row in run.rows if "env_runners/episode_return_mean" in row
    ]
    seconds = last.get("time_total_s", 0.0)
    if run.headline is None:
        table.add_row("environment steps", f"{int(last['env_steps']):,}")
        table.add_row(
            "training time", f"{seconds:.1f} s ({last['env_steps'] / max(seconds, 1e-9):,.0f} steps/s)"
        )
    else:
        metric, label = run.headline
        table.add_row("iterations", f"{len(run.rows):,}")
        table.add_row("training time", f"{seconds:.1f} s")
        table.add_row(label, f"{last[metric]:.4g}" if metric in last else "not measured")
    if returns:
        table.add_row("training return (mean)", f"{returns[-1]:.2f}")
    elif run.headline is None:
        rewards = reward_per_step(run.rows)
        tail = rewards[-max(1, len(rewards) // 8) :]
        table.add_row("reward per step (last eighth)", f"{sum(tail) / len(tail):.4f}")
    found = run.evaluation
    if "episode_return_mean" in found:
        table.add_row("evaluation return (mean)", f"{found['episode_return_mean']:.2f}")
    elif found.get("num_env_steps_sampled"):
        table.add_row(
            "evaluation reward per step", f"{found['reward_sum'] / found['num_env_steps_sampled']:.4f}"
        )
    show(table)
    for label, value in (
        ("run folder", run.path),
        ("policy", run.path / "policy" if (run.path / "policy").is_dir() else None),
        *(("figure", file) for file in (run.figure, *run.figures)),
        ("tracked in", run.tracking_uri),
    ):
        if value is not None:
            typer.echo(f"{label + ':':12} {value}")
    if run.tracking_uri and run.tracking_uri.startswith("sqlite"):
        typer.echo(f"{'look:':12} mlflow ui --backend-store-uri {run.tracking_uri}")
    for note in run.notes:
        typer.echo(f"note: {note}")


def track(
    run: Annotated[Path, typer.Argument(help="run folder")],
    tracking_uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow URI (default: where the run was tracked)")
    ] = None,
    experiment: ExperimentName = None,
) -> None:
    """Sends MLflow what it lacks of a run: a server was away at its end, or the run was not tracked.

    Example: mobula track runs/RUN --tracking-uri http://127.0.0.1:5000
    """
    from mobula import running

    typer.echo(f"tracked in:  {running.send(run, uri=tracking_uri, experiment=experiment)}")
