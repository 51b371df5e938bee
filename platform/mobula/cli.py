"""The command line.  Exit codes: 0 done, 1 the run failed, 2 the user's mistake (one line on standard error).

Ray and torch are imported only where they are needed: `--help`, `methods` and `envs` answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mobula.errors import ConfigError, MobulaError, nearest
from mobula.serving.commands import app as serve_app

app = typer.Typer(
    name="mobula",
    help="Published learning methods as RLlib algorithms: train, evaluate and reproduce them, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# Options that several commands take.
MethodName = Annotated[str | None, typer.Argument(help="name of a method (`mobula methods`)")]
EnvName = Annotated[str | None, typer.Option("--env", help="environment, or gymnasium:ID")]
EnvSettings = Annotated[
    list[str] | None, typer.Option("--env-set", help="setting of the environment, key=value")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with the settings to start from")
]
Seed = Annotated[int | None, typer.Option("--seed", help="seed of everything random")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", help="key=value: env_steps, seconds, return, iterations, or any metric's full name"
    ),
]
EnvRunners = Annotated[
    int | None, typer.Option("--num-env-runners", help="env runner actors; 0 samples in the main process")
]
Envs = Annotated[int | None, typer.Option("--num-envs", help="environments of each env runner")]
Learners = Annotated[
    int | None, typer.Option("--num-learners", help="learner actors; 0 learns in the main process")
]
Placement = Annotated[
    list[str] | None,
    typer.Option(
        "--placement",
        help="role.key=value: env_runners, learners, evaluation, workers, main; count, cpus, gpus, resources",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="folder of run folders")]
Track = Annotated[
    bool, typer.Option("--track/--no-track", help="track in MLflow (a study: a child run a trial)")
]
TrackingUri = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow URI (default: MLFLOW_TRACKING_URI, else <out>/mlflow.db)"),
]
ExperimentName = Annotated[
    str | None, typer.Option("--experiment", help="MLflow experiment (default: the method)")
]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster (default: RAY_ADDRESS, else local)")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="prints the folder only")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="shows the logs of Ray and RLlib")]

app.add_typer(serve_app, name="serve")

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _print(*values: Any) -> None:
    from rich.console import Console

    # Into a file or a pipe, tables need not fit a terminal.
    Console(width=None if sys.stdout.isatty() else 160).print(*values)


def _parse(text: str) -> Any:
    """A value from the command line, read as YAML: 3, 0.1, true, [64, 64], word."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value {text!r}: {' '.join(str(error).split())}") from error
    if isinstance(value, str):
        # YAML takes 1e-3 for a word.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _pairs(entries: list[str], option: str) -> dict[str, Any]:
    found = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not sign or not name:
            raise ConfigError(f"{option} {entry}: write it as key=value")
        found[name.strip().replace("-", "_")] = _parse(value)
    return found


def _knob_flags(arguments: list[str], known: list[str], where: str) -> dict[str, Any]:
    """--t-max 8 --lr=0.1 -> {"t_max": 8, "lr": 0.1}.  A flag without a value is true, --no-flag is false."""
    found: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}; settings are written --name value")
        flag, sign, text = argument[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in known:
            if name.startswith("no_") and name[3:] in known and not sign:
                found[name[3:]] = False
                continue
            options = [option.replace("_", "-") for option in known]
            raise ConfigError(f"{where} has no option --{flag}.{nearest(flag, options)}")
        if not sign:
            following = arguments[position] if position < len(arguments) else None
            if following is None or following.startswith("--"):
                found[name] = True
                continue
            text = following
            position += 1
        found[name] = _parse(text)
    return found


# Lists ----------------------------------------------------------------------------------------------------


@app.command()
def methods() -> None:
    """Every method, a line each."""
    from rich.table import Table

    from mobula import registry

    _listing(Table(title="methods", title_justify="left", box=None, pad_edge=False), registry.methods())
    _print("\n[dim]mobula train NAME --help shows the settings of one.[/dim]")


@app.command()
def envs() -> None:
    """Every tensor environment, a line each; any gymnasium ID works too, as gymnasium:ID."""
    from rich.table import Table

    from mobula import registry

    _listing(Table(title="environments", title_justify="left", box=None, pad_edge=False), registry.envs())
    _print("\n[dim]Any gymnasium environment: --env gymnasium:HalfCheetah-v5[/dim]")


def _listing(table: Any, entries: list[Any]) -> None:
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is")
    table.add_column("from", style="dim", no_wrap=True)
    for entry in entries:
        table.add_row(entry.name, entry.summary, entry.source)
    _print(table)


@app.command()
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


# Train ----------------------------------------------------------------------------------------------------


@app.command(context_settings=PASS_THROUGH)
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
    from mobula import running

    if resume is not None:
        if method is not None or config is not None or context.args:
            raise ConfigError(
                "--resume takes the run's own method and settings: leave out others (a later --stop may be given)"
            )
        with _progress_bar(f"resume {resume}", quiet) as progress:
            run = running.resume(
                resume,
                stop={**_pairs(stop or [], "--stop"), **({"iterations": iterations} if iterations else {})},
                address=address,
                progress=progress,
                verbose=verbose,
            )
        if quiet:
            typer.echo(run.path)
        else:
            _report(run)
        return

    given = running.load_yaml(config) if config is not None else {}
    name = method or given.get("method")
    if name is None:
        raise ConfigError(f"{config} names no method, and the command line gives none")
    environment = env or given.get("env")
    flags = {**_pairs(set_ or [], "--set"), **_knob_flags(context.args, _settings_of(name), name)}
    counts = (num_env_runners, num_envs, num_learners)
    chosen = _config(given, name, env, env_set, flags, seed, counts, placement, verbose)
    if dump_config:
        typer.echo(running.dump_config(chosen), nl=False)
        return
    if dry_run:
        _dry_run(chosen, address, verbose)
        return
    targets = _targets({**given.get("stop", {}), **_pairs(stop or [], "--stop")}) or {}
    if iterations is not None:
        if iterations < 1:
            raise ConfigError(f"--iterations {iterations}: at least 1")
        targets["iterations"] = iterations
    title = name if environment is None else f"{name} on {environment}"
    with _progress_bar(title, quiet, getattr(chosen, "headline", None)) as progress:
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
    if quiet:
        typer.echo(run.path)
    else:
        _report(run)


def _config(
    given: dict[str, Any],
    name: str,
    env: str | None,
    env_set: list[str] | None,
    settings: dict[str, Any],
    seed: int | None,
    counts: tuple[int | None, int | None, int | None],
    placement: list[str] | None,
    verbose: bool,
) -> Any:
    """The config of a config file (`given`) and the command line over it; counts: env runners, environments of each, learners."""
    from mobula import running

    names = ("num_env_runners", "num_envs_per_env_runner", "num_learners")
    return running.make_config(
        name,
        env or given.get("env"),
        env_config={**given.get("env_config", {}), **_pairs(env_set or [], "--env-set")},
        settings={**given.get("settings", {}), **settings},
        seed=_first(seed, given.get("seed")),
        placement=_placement(given.get("placement"), placement or []),
        verbose=verbose,
        **{key: _first(count, given.get(key)) for key, count in zip(names, counts, strict=True)},
    )


def _placement(given: Any, entries: list[str]) -> dict[str, Any]:
    """The placement of a config file with `role.key=value` entries over it."""
    found = {role: dict(wanted) for role, wanted in (given or {}).items()}
    for name, value in _pairs(entries, "--placement").items():
        role, dot, key = name.partition(".")
        if not dot:
            raise ConfigError(f"--placement {name}: write it as role.key=value, such as learners.gpus=1")
        found.setdefault(role, {})[key] = value
    return found


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
    _print(table)
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


@app.command()
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


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _settings_of(name: str) -> list[str]:
    from mobula import registry
    from mobula.method import MethodConfig, _training_arguments

    cls = registry.config_class(name)
    own = list(cls.hyperparameters()) if issubclass(cls, MethodConfig) else []
    return [*own, *sorted(_training_arguments(cls) - set(own))]


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
    _print(table)


@contextmanager
def _progress_bar(title: str, quiet: bool, headline: tuple[str, str] | None = None) -> Iterator[Any]:
    if quiet:
        yield None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeElapsedColumn(),
        Remaining(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=1.0, metrics="starting Ray")

        def show(row: dict[str, float], share: float) -> None:
            bar.update(task, completed=share, metrics=_headline(row, headline))

        yield show


def _headline(row: dict[str, float], headline: tuple[str, str] | None) -> str:
    if headline is not None:
        return f"{headline[1]} {row[headline[0]]:.3g}" if headline[0] in row else ""
    parts = [f"{int(row['env_steps']):,} steps"]
    if "env_runners/episode_return_mean" in row:
        parts.append(f"return {row['env_runners/episode_return_mean']:.1f}")
    elif row.get("env_runners/num_env_steps_sampled"):
        mean = row.get("env_runners/reward_sum", 0.0) / row["env_runners/num_env_steps_sampled"]
        parts.append(f"reward/step {mean:.4f}")
    return ", ".join(parts)


def _report(run: Any) -> None:
    from rich.table import Table

    from mobula.running import reward_per_step

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
    _print(table)
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


# Tune -----------------------------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def tune(
    context: typer.Context,
    method: MethodName = None,
    env: EnvName = None,
    env_set: EnvSettings = None,
    config: ConfigFile = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, help="settings to try")] = 16,
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space", help="knob='loguniform(1e-3, 1)', choice([..]), uniform, randint or grid([..])"
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="search over this knob alone (repeatable)")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="full name, or `return` (default: what the method is judged by)"),
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="max or min (default: max, or as the method says)")
    ] = None,
    scheduler: Annotated[str, typer.Option("--scheduler", help="asha, pbt, median or none")] = "asha",
    search: Annotated[str, typer.Option("--search", help="random, optuna or grid")] = "random",
    stop: Stop = None,
    seed: Seed = None,
    num_env_runners: EnvRunners = None,
    num_envs: Envs = None,
    num_learners: Learners = None,
    placement: Placement = None,
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", min=1, help="trials at once, at most")
    ] = None,
    cpus_per_trial: Annotated[
        float | None, typer.Option("--cpus-per-trial", help="CPUs of a trial's main process")
    ] = None,
    confirm: Annotated[
        int,
        typer.Option("--confirm", min=0, help="fresh seeds on which the best is held against the default"),
    ] = 5,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="folder of a study that was interrupted: go on with it")
    ] = None,
    out: Out = Path("runs"),
    track: Track = True,
    tracking_uri: TrackingUri = None,
    experiment: ExperimentName = None,
    address: Address = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Searches for good settings of a method over its declared space; other settings are given as for `train`.

    Examples: mobula tune mac --env goal_grid --stop env_steps=20000 -n 16 --scheduler asha --search optuna ·
    mobula tune PPO --env cartpole --only lr --space lr='loguniform(1e-4, 1e-2)' ·
    mobula tune --resume runs/STUDY · mobula train --config runs/STUDY/best.yaml
    """
    from mobula import running, tuning

    common = {"address": address, "progress": not quiet, "verbose": verbose}
    if resume is not None:
        study = tuning.resume(resume, **common)  # type: ignore[arg-type]
    else:
        given = running.load_yaml(config) if config is not None else {}
        name = method or given.get("method")
        if name is None:
            raise ConfigError(
                "name a method (`mobula methods`), a --config that does, or a study to --resume"
            )
        domains = {}
        for entry in space or []:
            knob, sign, text = entry.partition("=")
            if not sign:
                raise ConfigError(f"--space {entry}: write it as knob='loguniform(1e-3, 1)'")
            domains[knob.strip().replace("-", "_")] = tuning.parse_space(text, f"--space {knob}")
        flags = _knob_flags(context.args, _settings_of(name), name)
        counts = (num_env_runners, num_envs, num_learners)
        chosen = _config(given, name, env, env_set, flags, seed, counts, placement, verbose)
        study = tuning.tune(
            chosen,
            num_samples=num_samples,
            space=domains,
            only=[knob.replace("-", "_") for knob in only or []],
            metric=metric,
            mode=mode,
            scheduler=scheduler,
            search=search,
            stop=_targets({**given.get("stop", {}), **_pairs(stop or [], "--stop")}),
            concurrent=concurrent,
            cpus_per_trial=cpus_per_trial,
            confirm=confirm,
            out=out,
            track=track,
            tracking_uri=tracking_uri,
            experiment=experiment,
            **common,  # type: ignore[arg-type]
        )
    if quiet:
        typer.echo(study.path)
    else:
        _study_report(study)
    if study.best is None:
        for note in study.notes:
            typer.echo(note, err=True)
        raise typer.Exit(1)


def _targets(targets: dict[str, Any]) -> dict[str, float] | None:
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in targets.values()):
        raise ConfigError("--stop takes numbers: key=value")
    return targets or None


def _study_report(study: Any) -> None:
    from mobula.tuning import trials_table

    about = {
        "space": study.trials[0].settings if study.trials else {},
        "metric": study.metric,
        "mode": study.mode,
    }
    rows = [
        {
            "settings": t.settings,
            "score": t.score,
            "steps": t.iterations,
            "seconds": t.seconds,
            "status": t.status,
        }
        for t in study.trials
    ]
    _print(trials_table(rows, about, f"{len(rows)} trials, the best first (steps: iterations)"))
    found = study.confirmation
    if found and found["seeds"]:
        words = {
            "better": "better than the default settings",
            "worse": "worse than the default settings",
            "undecided": "not shown to differ from the default settings",
        }
        means = [sum(found[k]) / len(found[k]) for k in ("tuned", "default")]
        _print(
            f"on {len(found['seeds'])} fresh seeds the best setting is [bold]{words[found['verdict']]}[/bold]:"
            f" {means[0]:.5g} against {means[1]:.5g},"
            f" improvement {found['improvement']:.3g} [{found['low']:.3g}, {found['high']:.3g}] (95 %)"
        )
    best = study.path / "best.yaml"
    for label, value in (
        ("study", study.path),
        ("figure", study.figure),
        ("best", best if best.is_file() else None),
        ("tracked in", study.tracking_uri),
    ):
        if value is not None:
            typer.echo(f"{label + ':':12} {value}")
    if best.is_file():
        typer.echo(f"{'train it:':12} mobula train --config {best}")


# Data ---------------------------------------------------------------------------------------------------


@app.command(context_settings=PASS_THROUGH)
def data(context: typer.Context) -> None:
    """Lists, describes and fetches logged data: list | info NAME | fetch NAME [--out FOLDER]."""
    from mobula import registry

    registry.command("data")(context.args)


# Submit -------------------------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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


# Dashboards ---------------------------------------------------------------------------------------------


@app.command(context_settings=PASS_THROUGH)
def dashboards(context: typer.Context) -> None:
    """Writes the files with which Prometheus and Grafana show runs, workers and the service: [--out FOLDER] [--ray-folder ...]."""
    from mobula import registry

    registry.command("dashboards")(context.args)


# Evaluate, export -----------------------------------------------------------------------------------------


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder, or an exported policy")],
    env: Annotated[
        str | None, typer.Option("--env", help="another environment than the one it was trained in")
    ] = None,
    env_set: Annotated[
        list[str] | None, typer.Option("--env-set", help="setting of the environment, key=value")
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="whole episodes to play")] = 10,
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps, where a task never ends")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="seed of environments and actions")] = 0,
    explore: Annotated[
        bool | None,
        typer.Option("--explore/--deterministic", help="sampled or likeliest actions (default: as trained)"),
    ] = None,
    video: Annotated[
        Path | None, typer.Option("--video", help="film of one episode: out.mp4 or out.gif")
    ] = None,
) -> None:
    """Plays a trained policy, without Ray; prints what it reaches, with a 95 % interval.

    Examples: mobula evaluate runs/LAST --episodes 100 · mobula evaluate runs/LAST --video film.mp4
    """
    from mobula import evaluation
    from mobula.artifact import load_policy

    policy = load_policy(run)
    world = env or policy.manifest["env"]
    if world is None:
        raise ConfigError("the policy names no environment: give one with --env")
    settings = {
        **(policy.manifest["env_config"] if env is None else {}),
        **_pairs(env_set or [], "--env-set"),
    }
    found = evaluation.evaluate_policy(
        policy, world, episodes=episodes, steps=steps, seed=seed, explore=explore, env_config=settings
    )
    if "returns" in found:
        from mobula.experiment.statistics import mean

        estimate = mean(found["returns"])
        _print(
            f"return {estimate.value:.2f}  [{estimate.low:.2f}, {estimate.high:.2f}] (95 %), "
            f"{len(found['returns'])} episodes of {sum(found['lengths']) / len(found['lengths']):.1f} steps on {world}"
        )
    else:
        _print(f"reward per step {found['reward_per_step']:.4f} over {found['steps']:,} steps on {world}")
    if video is not None:
        frames = evaluation.record_video(
            policy, world, video, seed=seed, explore=explore, env_config=settings
        )
        _print(f"film: {video} ({frames} frames)")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run folder, or an exported policy")],
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="ONNX file to write, checked against torch")
    ] = None,
    register: Annotated[
        str | None,
        typer.Option("--register", help="name in MLflow's model registry to give it a new version of"),
    ] = None,
    service: Annotated[
        str | None, typer.Option("--service", help="registered service that can be made of such a policy")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the service's artefact")] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Writes a trained policy as an ONNX model or as the artefact of a service, or registers it with MLflow.

    Example: mobula export runs/mac_goal_grid_1 --register grid, then mobula serve run models:/grid/1
    """
    if onnx is None and register is None and service is None:
        raise ConfigError(
            "nothing to export to: --onnx FILE, --register NAME, or --service NAME --out FOLDER"
        )
    if (service is None) != (out is None):
        raise ConfigError("--service NAME and --out FOLDER go together")
    from mobula.artifact import load_policy

    if onnx is not None:
        worst = load_policy(run).export_onnx(onnx)
        _print(f"{onnx}: obs -> (action_dist_inputs, action); differs from torch by at most {worst:.1e}")
    if register is not None:
        from mobula.pyfunc import register_policy

        where, version = register_policy(run, register, tracking_uri)
        typer.echo(f"models:/{register}/{version}  (MLFLOW_TRACKING_URI={where})")
    if service is not None and out is not None:
        from mobula import registry

        make = getattr(registry.service_class(service), "export", None)
        if make is None:
            raise ConfigError(
                f"the service {service!r} is not made of a policy: write its artefact with save_service"
            )
        typer.echo(f"{make(run, out)}  (mobula serve run {out})")


# Reproduce ------------------------------------------------------------------------------------------------


@app.command()
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

    _print(claims_table(result))
    for figure in result["figures"]:
        typer.echo(f"figure: {Path(result['folder']) / figure}")
    typer.echo(f"result: {Path(result['folder']) / 'result.json'}")
    if result["failed_cells"]:
        for cell in result["failed_cells"]:
            typer.echo(f"failed: {cell['cell']}: {cell['error']}", err=True)
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Looks at this machine: what is installed, what works, what to mend."""
    from mobula.doctor import examine

    healthy = True
    for name, good, text in examine():
        healthy &= good
        _print(f"{'[green]ok[/green]  ' if good else '[red]mend[/red]'}  [bold]{name}[/bold]  {text}")
    raise typer.Exit(0 if healthy else 1)


def main() -> None:
    """Entry point: one line and exit code 2 for what the user can mend."""
    # Ray takes seconds to say things that no user of a run needs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
    for name in (
        "ray.rllib.algorithms.algorithm_config",
        "ray._common.deprecation",
        "torch.onnx._internal.exporter._registration",
    ):
        # Advice about the libraries' own migrations and about packages that nothing here needs.
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except MobulaError as error:
        print(f"mobula: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mobula: interrupted; the run folder keeps what was done", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
