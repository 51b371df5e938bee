"""Options that several commands take, and how their words become settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mobula.errors import ConfigError, nearest

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


def parse(text: str) -> Any:
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


def pairs(entries: list[str], option: str) -> dict[str, Any]:
    """{key: value} of key=value entries."""
    found = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not sign or not name:
            raise ConfigError(f"{option} {entry}: write it as key=value")
        found[name.strip().replace("-", "_")] = parse(value)
    return found


def knob_flags(arguments: list[str], known: list[str], where: str) -> dict[str, Any]:
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
        found[name] = parse(text)
    return found


def targets_of(targets: dict[str, Any]) -> dict[str, float] | None:
    """What --stop says, None where it says nothing."""
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in targets.values()):
        raise ConfigError("--stop takes numbers: key=value")
    return targets or None


def settings_of(name: str) -> list[str]:
    """The settings that a method takes as flags, its own first."""
    from mobula import registry
    from mobula.method import MethodConfig, _training_arguments

    cls = registry.config_class(name)
    own = list(cls.hyperparameters()) if issubclass(cls, MethodConfig) else []
    return [*own, *sorted(_training_arguments(cls) - set(own))]


def config_of(
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
    from mobula.settings import make_config

    names = ("num_env_runners", "num_envs_per_env_runner", "num_learners")
    return make_config(
        name,
        env or given.get("env"),
        env_config={**given.get("env_config", {}), **pairs(env_set or [], "--env-set")},
        settings={**given.get("settings", {}), **settings},
        seed=_first(seed, given.get("seed")),
        placement=_placement(given.get("placement"), placement or []),
        verbose=verbose,
        **{key: _first(count, given.get(key)) for key, count in zip(names, counts, strict=True)},
    )


def _placement(given: Any, entries: list[str]) -> dict[str, Any]:
    """The placement of a config file with `role.key=value` entries over it."""
    found = {role: dict(wanted) for role, wanted in (given or {}).items()}
    for name, value in pairs(entries, "--placement").items():
        role, dot, key = name.partition(".")
        if not dot:
            raise ConfigError(f"--placement {name}: write it as role.key=value, such as learners.gpus=1")
        found.setdefault(role, {})[key] = value
    return found


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
