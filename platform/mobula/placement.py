"""Placement: how many processes of each role a run has, what each of them asks of the cluster, and whether that is there.

A config file says it as

    placement:
      env_runners: {count: 8, cpus: 1}
      learners: {count: 2, cpus: 1, gpus: 1, resources: {fast_network: 1}}
      evaluation: {count: 1}

`resources` are Ray's custom resources: a node that is started with `--resources='{"fast_network": 4}'` is the only kind that such
a process goes to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobula.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

# Role -> {key of a placement: RLlib's setting}.
SETTINGS: dict[str, dict[str, str]] = {
    "main": {"cpus": "num_cpus_for_main_process", "resources": "custom_resources_for_main_process"},
    "env_runners": {
        "count": "num_env_runners",
        "cpus": "num_cpus_per_env_runner",
        "gpus": "num_gpus_per_env_runner",
        "resources": "custom_resources_per_env_runner",
    },
    "learners": {
        "count": "num_learners",
        "cpus": "num_cpus_per_learner",
        "gpus": "num_gpus_per_learner",
        "resources": "custom_resources_per_learner",
    },
    "evaluation": {"count": "evaluation_num_env_runners"},
    # Ray tasks that share a population or a search; a hyper-parameter of the methods that have them.
    "workers": {"count": "workers"},
}


@dataclass(frozen=True)
class Role:
    """Processes of one kind: `count` of them, each asking for `each` ({"CPU": 1.0, ...}); 0: done in the main process."""

    name: str
    count: int
    each: dict[str, float]
    what: str


def apply(config: AlgorithmConfig, placement: Mapping[str, Any]) -> None:
    """Puts a placement into RLlib's settings.  Raises ConfigError for a role or a key that does not exist."""
    for role, wanted in placement.items():
        if role not in SETTINGS:
            raise ConfigError(
                f"placement: no role {role!r}.{nearest(role, SETTINGS)} Roles: {', '.join(SETTINGS)}"
            )
        if not isinstance(wanted, Mapping):
            raise ConfigError(f"placement: {role} is {wanted!r}; write it as {role}: {{count: 2, cpus: 1}}")
        for key, value in wanted.items():
            names = SETTINGS[role]
            if key not in names or not hasattr(config, names[key]):
                raise ConfigError(
                    f"placement: {role} of {type(config).__name__} has no {key!r}.{nearest(key, names)}"
                )
            if key == "resources":
                good = isinstance(value, Mapping) and all(_number(amount) for amount in value.values())
            else:
                good = _number(value) and (key != "count" or value == int(value))
            if not good:
                raise ConfigError(
                    f"placement: {role}.{key} is {value!r}; no negative number is allowed, and counts are whole"
                )
            setattr(config, names[key], dict(value) if key == "resources" else value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def given(config: AlgorithmConfig) -> dict[str, dict[str, Any]]:
    """The placement of `config` as `apply` takes it: what differs from the default, less the counts that stand elsewhere."""
    fresh = type(config)()
    elsewhere = {"num_env_runners", "num_learners", "workers"}
    found: dict[str, dict[str, Any]] = {}
    for role, names in SETTINGS.items():
        for key, name in names.items():
            if name in elsewhere or not hasattr(config, name):
                continue
            value = getattr(config, name)
            if value != getattr(fresh, name):
                found.setdefault(role, {})[key] = value
    return found


def roles(config: AlgorithmConfig) -> list[Role]:
    """What a run of `config` starts, role by role."""
    c: Any = config
    runner = _bundle(c.num_cpus_per_env_runner, c.num_gpus_per_env_runner, c.custom_resources_per_env_runner)
    cpus = c.num_cpus_per_learner
    if cpus == "auto":
        cpus = 0 if c.num_gpus_per_learner else 1
    learner = _bundle(cpus, c.num_gpus_per_learner, c.custom_resources_per_learner)
    online = c.env is not None and getattr(c, "needs_env", True)
    found = [
        Role("env_runners", c.num_env_runners if online else 0, runner, "sample from environments"),
        Role("learners", c.num_learners, learner, "take the gradient steps, in step with each other"),
        Role(
            "evaluation",
            c.evaluation_num_env_runners if online else 0,
            runner,
            "play the policy while it is trained",
        ),
    ]
    if hasattr(c, "workers"):
        found.append(Role("workers", c.workers, {"CPU": 1.0}, "tasks that share a population or a search"))
    return found


def _bundle(cpus: float, gpus: float, custom: Mapping[str, float] | None) -> dict[str, float]:
    asked = {"CPU": float(cpus), "GPU": float(gpus), **(custom or {})}
    return {name: amount for name, amount in asked.items() if amount}


def lacking(wanted: Sequence[Role], nodes: Sequence[Mapping[str, float]]) -> str:
    """Why the processes of `wanted` (tasks take turns and are left out) do not fit on `nodes`, or "" if they do.

    nodes: resources of each.  Largest first, each to the first node that has room.
    """
    free = [dict(node) for node in nodes]
    bundles = [(role.name, role.each) for role in wanted if role.name != "workers" for _ in range(role.count)]
    left = []
    for name, each in sorted(bundles, key=lambda entry: -sum(entry[1].values())):
        for room in free:
            if all(room.get(resource, 0.0) >= amount - 1e-9 for resource, amount in each.items()):
                for resource, amount in each.items():
                    room[resource] -= amount
                break
        else:
            left.append((name, each))
    if not left:
        return ""
    total: dict[str, float] = {}
    for node in nodes:
        for resource, amount in node.items():
            total[resource] = total.get(resource, 0.0) + amount
    asked: dict[str, float] = {}
    for _, each in bundles:
        for resource, amount in each.items():
            asked[resource] = asked.get(resource, 0.0) + amount
    have = ", ".join(f"{total.get(resource, 0.0):g} {resource}" for resource in asked)
    want = ", ".join(f"{amount:g} {resource}" for resource, amount in asked.items())
    names = ", ".join(dict.fromkeys(name for name, _ in left))
    return (
        f"it asks for {want} and there is {have} on {len(nodes)} node(s): no room for {len(left)} of {names}"
    )


def cluster_nodes() -> list[dict[str, float]]:
    """Resources of every living node of the Ray that this process is connected to."""
    import ray

    kept = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            kept.append(
                {k: v for k, v in resources.items() if not k.startswith(("node:", "object_store", "memory"))}
            )
    return kept
