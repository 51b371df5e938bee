"""Search spaces in words, and what trials are ranked by."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mobula import registry
from mobula.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

_DOMAINS = ("uniform", "loguniform", "quniform", "randint", "lograndint", "choice", "grid", "randn")


def parse_space(text: str, where: str) -> Any:
    """A Tune domain from words such as `loguniform(1e-3, 1)`, `choice([1, 2])`, `grid([0.1, 1])`.

    The text is parsed, never run.  Raises ConfigError where it is none of these.
    """
    from ray import tune

    try:
        node = ast.parse(text.strip().removeprefix("tune."), mode="eval").body
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords):
            raise ValueError("not a call")
        name, arguments = node.func.id, [ast.literal_eval(a) for a in node.args]
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"{where}: {text!r} is no search space; write loguniform(1e-3, 1), uniform(0, 1), randint(1, 9), choice([1, 2]) or"
            " grid([1, 2])"
        ) from error
    if name not in _DOMAINS:
        raise ConfigError(f"{where}: no distribution {name!r}.{nearest(name, _DOMAINS)}")
    try:
        return (tune.grid_search if name == "grid" else getattr(tune, name))(*arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{where}: {text!r}: {error}") from error


def describe(domain: Any) -> str:
    """A domain in the words that `parse_space` reads."""
    if isinstance(domain, dict) and "grid_search" in domain:
        return f"grid({domain['grid_search']})"
    if hasattr(domain, "categories"):
        return f"choice({list(domain.categories)})"
    sampler = type(domain.get_sampler()).__name__.strip("_").lower() if domain.sampler else "uniform"
    whole = type(domain).__name__ == "Integer"
    name = (
        ("lograndint" if "log" in sampler else "randint")
        if whole
        else ("log" * ("log" in sampler) + "uniform")
    )
    return f"{name}({domain.lower:g}, {domain.upper:g})"


def gridded(space: Mapping[str, Any]) -> dict[str, Any]:
    """Every domain as a grid.  Raises ConfigError for one that has no finite list of values."""
    from ray import tune

    found = {}
    for name, domain in space.items():
        if isinstance(domain, dict) and "grid_search" in domain:
            found[name] = domain
        elif hasattr(domain, "categories"):
            found[name] = tune.grid_search(list(domain.categories))
        else:
            raise ConfigError(
                f"a grid needs a list of values for {name}, which is {describe(domain)}:"
                f" --space {name}='grid([...])', or leave it out with --only"
            )
    return found


def default_metric(config: AlgorithmConfig) -> tuple[str, str]:
    """(metric, mode) that a method's trials are ranked by if nothing is said."""
    headline = getattr(config, "headline", None)
    if headline is not None:
        return headline[0], getattr(config, "headline_mode", "min")
    env = config.env
    if isinstance(env, str) and hasattr(config, "knobs"):
        world = registry.make_env(env, 1, **dict(config.env_config))
        if world.continuing or getattr(config.adapt_env(world), "continuing", False):  # type: ignore[attr-defined]
            return "env_runners/reward_per_step", "max"
    return "env_runners/episode_return_mean", "max"
