"""The settings of a run: from names and values to a config, to YAML and back."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mobula import registry
from mobula.errors import ConfigError, nearest
from mobula.placement import apply, given

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig


def make_config(
    method: str,
    env: str | None = None,
    *,
    env_config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    num_env_runners: int | None = None,
    num_envs_per_env_runner: int | None = None,
    num_learners: int | None = None,
    placement: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> AlgorithmConfig:
    """The config of a run (`placement`: see mobula.placement).  Raises ConfigError for names or values that do not exist or do not fit."""
    from mobula.method import MethodConfig

    config: Any = registry.config_class(method)()
    # RLlib sets its loggers to this, and remarks on its own API at every start.
    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    config.debugging(log_level="INFO" if verbose else "ERROR")
    if env is not None:
        spelled = registry.env_name(env)
        if not isinstance(config, MethodConfig):
            spelled = registry.register_with_ray(spelled)
            if not env.startswith(registry.GYMNASIUM) and spelled == registry.env_name(env):
                config.env_runners(gym_env_vectorize_mode="vector_entry_point")
        config.environment(spelled, env_config=_plain(env_config or {}))
    if seed is not None:
        config.debugging(seed=seed)
    counts = {"num_env_runners": num_env_runners, "num_envs_per_env_runner": num_envs_per_env_runner}
    config.env_runners(**{name: value for name, value in counts.items() if value is not None})
    if num_learners is not None:
        config.learners(num_learners=num_learners)
    for name, value in (settings or {}).items():
        _apply(config, name, value)
    apply(config, placement or {})
    if not isinstance(config, MethodConfig):
        from mobula.metrics import watched

        config = watched(config)
    try:
        config.validate()
    except ValueError as error:
        raise ConfigError(f"{method}: {' '.join(str(error).split())}") from error
    return config  # type: ignore[no-any-return]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them: YAML reads 2015-01-01 as a date."""
    return {name: v.isoformat() if isinstance(v, datetime.date) else v for name, v in settings.items()}


def _apply(config: Any, name: str, value: Any) -> None:
    """One setting: a hyper-parameter, an argument of RLlib's `training`, or any other attribute of the config."""
    from mobula.method import MethodConfig, _training_arguments

    if (
        isinstance(config, MethodConfig) and (name in config.hyperparameters() or name in config.rejected)
    ) or name in _training_arguments(type(config)):
        config.training(**{name: value})
    elif not name.startswith("_") and name in vars(config):
        setattr(config, name, value)
    elif isinstance(config, MethodConfig):
        config.training(**{name: value})
    else:
        known = [*_training_arguments(type(config)), *(n for n in vars(config) if not n.startswith("_"))]
        raise ConfigError(f"{type(config).__name__} has no setting {name!r}.{nearest(name, known)}")


def dump_config(config: AlgorithmConfig) -> str:
    """The config as YAML that `mobula train --config` takes."""
    method = registry.name_of(config)
    data = {
        "method": method,
        "env": config.env if isinstance(config.env, str) else None,
        "env_config": dict(config.env_config),
        "seed": config.seed,
        "num_env_runners": config.num_env_runners,
        "num_envs_per_env_runner": config.num_envs_per_env_runner,
        "num_learners": config.num_learners,
        "placement": given(config) or None,
        "settings": config.knobs() if hasattr(config, "knobs") else _changed(config),
    }
    return yaml.safe_dump({k: v for k, v in data.items() if v is not None}, sort_keys=False)


def _changed(config: Any) -> dict[str, Any]:
    """Training settings of an RLlib config that differ from its defaults and are plain data."""
    from mobula.method import _training_arguments

    fresh, found = type(config)(), {}
    for name in sorted(_training_arguments(type(config))):
        value = getattr(config, name, None)
        if value != getattr(fresh, name, None) and isinstance(value, int | float | str | bool | list):
            found[name] = value
    return found


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A config file.  Raises ConfigError where it is no mapping of the names that `dump_config` writes."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is no YAML: {' '.join(str(error).split())}") from error
    known = {
        "method",
        "env",
        "env_config",
        "seed",
        "num_env_runners",
        "num_envs_per_env_runner",
        "num_learners",
        "placement",
        "settings",
        "stop",
    }
    if not isinstance(data, dict) or not set(data) <= known:
        extra = sorted(set(data) - known) if isinstance(data, dict) else [type(data).__name__]
        raise ConfigError(
            f"config file {path} holds {', '.join(map(str, extra))}; it may hold {', '.join(sorted(known))}"
        )
    return data
