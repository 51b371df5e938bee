"""mobula: a distributed training platform on Ray.

    import mobula

    mobula.methods()                                    every method by name
    config = mobula.config("mac").environment("goal_grid").training(t_max=8)
    run = mobula.train(config, stop={"env_steps": 20_000})
    policy = mobula.load_policy(run.path)
    policy.act(0)
    mobula.tune(config, num_samples=16)
    mobula.serve(run.path)
    mobula.reproduce("mac", budget="smoke")

Everything is imported when it is first used: `import mobula` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mobula.artifact import export_policy as export_policy
    from mobula.artifact import load_policy as load_policy
    from mobula.evaluation import evaluate_policy as evaluate
    from mobula.experiment import reproduce as reproduce
    from mobula.policy import Policy as Policy
    from mobula.registry import envs as envs
    from mobula.registry import make_env as make_env
    from mobula.registry import methods as methods
    from mobula.running import train as train
    from mobula.serving.starting import serve as serve
    from mobula.tuning import tune as tune

_PLACES = {
    "Policy": "policy",
    "export_policy": "artifact",
    "load_policy": "artifact",
    "reproduce": "experiment",
    "envs": "registry",
    "make_env": "registry",
    "methods": "registry",
    "serve": "serving.starting",
    "train": "running",
    "tune": "tuning",
}

__all__ = ["__version__", "config", "evaluate", *sorted(_PLACES)]


def config(name: str) -> Any:
    """A fresh config of method `name`."""
    from mobula.registry import config_class

    return config_class(name)()


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "evaluate":
        return import_module("mobula.evaluation").evaluate_policy
    if name in _PLACES:
        return getattr(import_module(f"mobula.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'mobula' has no attribute {name!r}")
