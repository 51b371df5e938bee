"""Names: method -> config class, environment -> environment class.

Both come from entry points (`mobula.methods`: name = "module:ConfigClass"; `mobula.envs`: name = "module:EnvClass"),
ours and those of any installed distribution alike, so that a method or an environment is added without touching this
package.  RLlib's own algorithms answer to their RLlib names, and every gymnasium ID is an environment.

Listing imports neither Ray nor torch: the one-line summaries are read from the source by `ast`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobula.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    from mobula.sampling.tensor_env import TensorEnv

METHODS = "mobula.methods"
ENVS = "mobula.envs"
COMMANDS = "mobula.commands"
SERVICES = "mobula.services"
GYMNASIUM = "gymnasium:"
RLLIB = "rllib:"

RLLIB_ALGORITHMS = {
    "APPO": "Asynchronous PPO: IMPALA's architecture with PPO's clipped surrogate and a target network.",
    "BC": "Behaviour cloning from recorded episodes.",
    "CQL": "Conservative Q-learning: offline SAC with a penalty on out-of-distribution actions.",
    "DQN": "Deep Q-network, Rainbow options (double, dueling, prioritised replay, n-step).",
    "DreamerV3": "World-model reinforcement learning with fixed hyper-parameters.",
    "IMPALA": "Importance-weighted actor-learner architecture with V-trace.",
    "IQL": "Implicit Q-learning: offline RL by expectile regression.",
    "MARWIL": "Monotonic advantage re-weighted imitation learning.",
    "PPO": "Proximal policy optimisation, RLlib's own runners and learner connectors.",
    "SAC": "Soft actor-critic: off-policy maximum-entropy learning.",
}
"""RLlib's algorithms, one line each; a test holds the names against RLlib's registry."""


@dataclass(frozen=True)
class Entry:
    """A name that can be used: `target` is "module:attribute", `source` the distribution that provides it."""

    name: str
    target: str
    summary: str
    source: str


@cache
def _entries(group: str) -> dict[str, Entry]:
    found = {}
    for point in entry_points(group=group):
        source = point.dist.name if point.dist is not None else "?"
        found[point.name] = Entry(point.name, point.value, "", source)
    return found


def summary(target: str) -> str:
    """First docstring line of the class that "module:attribute" names, read from the source without running it."""
    module, _, attribute = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"(not importable: {module})"
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").split("\n", 1)[0]
    return f"(no class {attribute} in {module})"


def _listed(group: str) -> list[Entry]:
    return [Entry(e.name, e.target, summary(e.target), e.source) for e in _entries(group).values()]


def methods() -> list[Entry]:
    """Every method by name: mobula's, those of other distributions, and RLlib's."""
    own = _listed(METHODS)
    taken = {entry.name for entry in own}
    rllib = [
        Entry(name if name not in taken else RLLIB + name, f"ray.rllib:{name}", text, "ray")
        for name, text in RLLIB_ALGORITHMS.items()
    ]
    return sorted(own, key=lambda e: e.name.lower()) + rllib


def envs() -> list[Entry]:
    """Every registered tensor environment; gymnasium's are reached as "gymnasium:ID"."""
    return sorted(_listed(ENVS), key=lambda e: e.name.lower())


def _find(name: str, options: dict[str, Entry]) -> Entry | None:
    if name in options:
        return options[name]
    lowered = {option.lower(): entry for option, entry in options.items()}
    return lowered.get(name.lower())


def command(name: str) -> Any:
    """The function behind `mobula NAME` that a room provides (it takes the arguments).  Raises ConfigError for an unknown one."""
    entry = _entries(COMMANDS).get(name)
    if entry is None:
        raise ConfigError(f"unknown command {name!r}.{nearest(name, _entries(COMMANDS))}")
    return _load(entry)


def service_class(name: str) -> Any:
    """The class of the service registered as `name` (planners, mechanisms, language models).  Raises ConfigError for an unknown one."""
    entry = _entries(SERVICES).get(name)
    if entry is None:
        known = _entries(SERVICES)
        raise ConfigError(
            f"no service {name!r} is registered here.{nearest(name, known)} There are: {', '.join(sorted(known)) or 'none'};"
            f" the distribution that provides it declares it in the entry-point group {SERVICES!r}"
        )
    return _load(entry)


def method_name(name: str) -> str:
    """The registered spelling of `name`.  Raises ConfigError with the nearest names."""
    entry = _find(name, _entries(METHODS))
    if entry is not None:
        return entry.name
    plain = name[len(RLLIB) :] if name.lower().startswith(RLLIB) else name
    for known in RLLIB_ALGORITHMS:
        if plain.lower() == known.lower():
            return RLLIB + known if known in _entries(METHODS) else known
    known_names = [*_entries(METHODS), *RLLIB_ALGORITHMS]
    raise ConfigError(
        f"unknown method {name!r}.{nearest(name, known_names)} `mobula methods` lists all of them."
    )


def config_class(name: str) -> type[AlgorithmConfig]:
    """The config class of method `name` (imports its module).  Raises ConfigError for an unknown name."""
    spelled = method_name(name)
    entry = _entries(METHODS).get(spelled)
    if entry is None:
        plain = spelled.removeprefix(RLLIB)
        module = importlib.import_module(f"ray.rllib.algorithms.{plain.lower()}")
        found: type[AlgorithmConfig] = getattr(module, f"{plain}Config")
        return found
    cls: Any = _load(entry)
    if hasattr(cls, "register"):
        cls.register()
    return cls  # type: ignore[no-any-return]


def name_of(config: AlgorithmConfig) -> str:
    """The registered name of a config object's method.  Raises ConfigError if it is not registered."""
    target = f"{type(config).__module__}:{type(config).__qualname__}"
    for entry in _entries(METHODS).values():
        if entry.target == target:
            return entry.name
    plain = type(config).__name__.removesuffix("Config")
    if type(config).__module__.startswith("ray.rllib.") and plain in RLLIB_ALGORITHMS:
        return method_name(RLLIB + plain)
    raise ConfigError(
        f"{target} is not registered: add an entry point to the group {METHODS!r} of its distribution."
    )


def _load(entry: Entry) -> Any:
    module, _, attribute = entry.target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise ConfigError(
            f"{entry.name}: the entry point of {entry.source} names {entry.target}, which does not exist."
        ) from None


def env_name(name: str) -> str:
    """The registered spelling of environment `name`, or "gymnasium:ID".  Raises ConfigError with the nearest names."""
    if name.startswith(GYMNASIUM):
        return name
    entry = _find(name, _entries(ENVS))
    if entry is not None:
        return entry.name
    import gymnasium

    if name in gymnasium.registry:
        return GYMNASIUM + name
    known_names = [*_entries(ENVS), *gymnasium.registry]
    raise ConfigError(
        f"unknown environment {name!r}.{nearest(name, known_names)}"
        " `mobula envs` lists the tensor environments; any gymnasium ID works as gymnasium:ID."
    )


def make_env(name: str, num_envs: int = 1, **env_config: Any) -> TensorEnv:
    """`num_envs` environments of that name, as tensors.

    `env_config` goes to the environment's constructor.  Raises ConfigError for an unknown name or setting.
    """
    spelled = env_name(name)
    if spelled.startswith(GYMNASIUM):
        from mobula.sampling.bridge import GymnasiumBridge

        return GymnasiumBridge(spelled.removeprefix(GYMNASIUM), num_envs, **env_config)
    cls = _load(_entries(ENVS)[spelled])
    try:
        env: TensorEnv = cls(num_envs, **env_config)
    except TypeError as error:
        raise ConfigError(f"environment {spelled!r} does not take these settings: {error}") from error
    return env


def register_with_ray(name: str) -> str:
    """Makes environment `name` known to RLlib's own runners under its registered spelling, and returns that.

    RLlib's runners get a NumPy view with next-step autoreset, which is what they expect of a vector environment.
    """
    from ray.tune.registry import register_env

    spelled = env_name(name)

    def create(context: Any) -> Any:
        from mobula.sampling.bridge import GymView

        config = dict(context)
        num_envs = config.pop("num_envs", None)
        if num_envs is None:
            return GymView(make_env(spelled, 1, **config))
        return make_env(spelled, num_envs, autoreset_mode="NextStep", **config).numpy()

    if not spelled.startswith(GYMNASIUM):
        register_env(spelled, create)
        return spelled
    return spelled.removeprefix(GYMNASIUM)
