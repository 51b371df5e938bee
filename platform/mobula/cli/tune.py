"""tune: studies."""

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
from mobula.cli.screen import show
from mobula.errors import ConfigError


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
    from mobula import settings, tuning

    common = {"address": address, "progress": not quiet, "verbose": verbose}
    if resume is not None:
        study = tuning.resume(resume, **common)  # type: ignore[arg-type]
    else:
        given = settings.load_yaml(config) if config is not None else {}
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
        flags = knob_flags(context.args, settings_of(name), name)
        counts = (num_env_runners, num_envs, num_learners)
        chosen = config_of(given, name, env, env_set, flags, seed, counts, placement, verbose)
        study = tuning.tune(
            chosen,
            num_samples=num_samples,
            space=domains,
            only=[knob.replace("-", "_") for knob in only or []],
            metric=metric,
            mode=mode,
            scheduler=scheduler,
            search=search,
            stop=targets_of({**given.get("stop", {}), **pairs(stop or [], "--stop")}),
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
    show(trials_table(rows, about, f"{len(rows)} trials, the best first (steps: iterations)"))
    found = study.confirmation
    if found and found["seeds"]:
        words = {
            "better": "better than the default settings",
            "worse": "worse than the default settings",
            "undecided": "not shown to differ from the default settings",
        }
        means = [sum(found[k]) / len(found[k]) for k in ("tuned", "default")]
        show(
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
