"""A small soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905) on a tensor environment, to make behaviour data.

One environment, one update a step, twin critics with targets, automatic temperature; it keeps every transition and
snapshots of the actor.  It is no method of the library: it exists because a learner's replay buffer is a kind of data set.

A run is a folder of shards, each the transitions of `snapshot_every` steps and the actor at their end, and the learner behind the
last of them.  A run that was killed goes on there, and ends with the same rows.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mobula import registry
from mobula.envs import datasets
from mobula.envs.datasets.dataset import Dataset, concatenate, make, spaces_of
from mobula.errors import DataError
from mobula.files import storage
from mobula.learning.batched import Adam, BatchedMLP, generators, polyak
from mobula.sampling.actions import action_map, to_space
from mobula.versions import versions

logger = logging.getLogger("mobula")

SETTINGS: dict[str, Any] = {
    "steps": 15_000,
    "hidden": (64, 64),
    "batch": 128,
    "gamma": 0.99,
    "tau": 0.005,
    "lr": 1e-3,
    "random_steps": 500,
    "snapshot_every": 500,
    "evaluation_episodes": 10,
}
"""Smaller networks and a larger step size than the usual 2 x 256 and 3e-4, so that a run takes minutes on one core."""

USUAL: dict[str, Any] = {"hidden": (256, 256), "batch": 256, "lr": 3e-4}
"""The usual ones, for simulators that need them."""

LEARNER = "learner.safetensors"


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(tanh(u), log density of it) for u = mean + exp(log_std) noise: [..., m] -> [..., m], [...]."""
    u = mean + log_std.exp() * noise
    log_p = -(0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
    # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), stable for large u.
    jacobian = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    return u.tanh(), log_p - jacobian.sum(-1)


@dataclass
class Run:
    """What is left of a run: all transitions in order, actors with the step and return at which they were kept."""

    columns: dict[str, np.ndarray[Any, Any]]
    snapshots: list[tuple[int, float, dict[str, Tensor]]]
    actor: BatchedMLP


@dataclass
class Learner:
    """What the rest of a run depends on besides its transitions."""

    nets: torch.nn.Module
    adams: tuple[Adam, ...]
    stream: torch.Generator

    def save(self, path: Path, steps: int) -> None:
        """Writes everything as it is after `steps` steps."""
        tensors = {f"nets/{name}": value for name, value in self.nets.state_dict().items()}
        tensors |= {"steps": torch.tensor(steps), "stream": self.stream.get_state()}
        for i, adam in enumerate(self.adams):
            for k, moments in adam.state_dict()["state"].items():
                tensors |= {f"adam/{i}/{k}/{name}": value for name, value in moments.items()}
        # The parameters of an Adam share their counter of steps; safetensors takes no shared memory.
        _write(path, {name: value.clone() for name, value in tensors.items()})

    def restore(self, path: Path) -> int:
        """Reads it back; returns the number of steps (0 where there is no file)."""
        if not path.is_file():
            return 0
        tensors = load_tensors(path.read_bytes())
        self.nets.load_state_dict({k[5:]: value for k, value in tensors.items() if k.startswith("nets/")})
        self.stream.set_state(tensors["stream"])
        for i, adam in enumerate(self.adams):
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"adam/{i}/"):
                    k, name = key.split("/")[2:]
                    moments.setdefault(int(k), {})[name] = value
            adam.load_state_dict({**adam.state_dict(), "state": moments})
        return int(tensors["steps"])


def train(env_name: str, seed: int, folder: Path, **overrides: Any) -> None:
    """One run on environment `env_name` with the seed, kept in `folder`; goes on behind the shards that are whole.

    The simulator is brought back by playing the recorded actions again.  Raises DataError where that does not lead to the
    recorded observations.
    """
    from mobula.envs.datasets import recipes

    c = {**SETTINGS, **overrides}
    world = registry.make_env(env_name, 1)
    judge = registry.make_env(env_name, c["evaluation_episodes"])
    d = int(np.prod(world.single_observation_space.shape or ()))
    m = int(np.prod(world.single_action_space.shape or ()))
    (stream,) = generators([seed])
    (noise_stream,) = generators([seed + 104_729])
    actor = BatchedMLP(1, [d, *c["hidden"], 2 * m], [stream], last_gain=0.1)
    critics = BatchedMLP(2, [d + m, *c["hidden"], 1], [stream])
    targets = BatchedMLP(2, [d + m, *c["hidden"], 1], [stream])
    targets.load_state_dict(critics.state_dict())
    log_temperature = torch.nn.Parameter(torch.zeros(()))
    nets = torch.nn.ModuleDict({"actor": actor, "critics": critics, "targets": targets})
    nets.register_parameter("log_temperature", log_temperature)
    actor_adam, critic_adam = Adam(actor.parameters(), c["lr"]), Adam(critics.parameters(), c["lr"])
    temperature_adam = Adam([log_temperature], c["lr"])
    learner = Learner(nets, (actor_adam, critic_adam, temperature_adam), noise_stream)
    scale = _map(world)
    N, B = c["steps"], c["batch"]
    store = {
        "obs": torch.zeros(N, d),
        "action": torch.zeros(N, m),
        "reward": torch.zeros(N),
        "next_obs": torch.zeros(N, d),
        "terminated": torch.zeros(N, dtype=torch.bool),
        "truncated": torch.zeros(N, dtype=torch.bool),
    }

    def policy(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = actor(obs).chunk(2, dim=-1)
        return squash(mean, log_std.clamp(-5.0, 2.0), noise)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise_stream)

    def judge_it() -> dict[str, Tensor]:
        """The return of the mean action over some episodes, and the actor."""
        value = recipes.mean_return(
            judge, lambda obs, _: actor(obs.unsqueeze(0))[0, :, :m].tanh(), judge.num_envs, 10_000 + seed
        )
        weights = {f"actor/{name}": weight.clone() for name, weight in actor.state_dict().items()}
        return {"return": torch.tensor(value, dtype=torch.float64), **weights}

    def update(rows: int) -> None:
        index = torch.randint(rows, (B,), generator=noise_stream)
        s, a, s2 = (store[name][index].unsqueeze(0) for name in ("obs", "action", "next_obs"))
        temperature = float(log_temperature.detach().exp())
        with torch.no_grad():
            a2, log_p2 = policy(s2, draw(1, B, m))
            ahead = targets(torch.cat([s2, a2], -1)).squeeze(-1).amin(0) - temperature * log_p2[0]
            y = store["reward"][index] + c["gamma"] * (~store["terminated"][index]).float() * ahead
        critic_adam.clear()
        (critics(torch.cat([s, a], -1)).squeeze(-1) - y).square().mean(-1).sum().backward()
        critic_adam.advance()
        actor_adam.clear()
        own, log_p = policy(s, draw(1, B, m))
        q = critics(torch.cat([s, own], -1)).squeeze(-1).amin(0)
        (temperature * log_p[0] - q).mean().backward()
        actor_adam.advance()
        temperature_adam.clear()
        (-log_temperature * (log_p.detach().mean() - m)).backward()
        temperature_adam.advance()
        polyak(list(targets.parameters()), list(critics.parameters()), c["tau"])

    done = learner.restore(folder / LEARNER)
    if done == N:
        return
    for end, shard in _shards(folder):
        if end <= done:
            begin = end - len(shard["column/reward"])
            for name, column in store.items():
                column[begin:end] = shard[f"column/{name}"]
    obs, _ = world.reset(seed=seed)
    for t in range(done):
        if not torch.equal(obs[0], store["obs"][t]):
            raise DataError(f"{folder}: {env_name} does not repeat itself at step {t}; delete the folder")
        obs = world.step(scale(store["action"][t : t + 1]))[0]
    whole = done
    for t in range(done, N):
        with torch.no_grad():
            if t < c["random_steps"]:
                action = 2 * torch.rand(1, m, generator=noise_stream) - 1
            else:
                action = policy(obs.unsqueeze(0), draw(1, 1, m))[0][0]
        new, reward, terminated, truncated, info = world.step(scale(action))
        row = (obs[0], action[0], reward[0], info["final_obs"][0], terminated[0], truncated[0])
        for name, value in zip(store, row, strict=True):
            store[name][t] = value
        obs = new
        ends = (t + 1) % c["snapshot_every"] == 0 or t + 1 == N
        shard = judge_it() if ends else {}
        if t >= c["random_steps"]:
            update(t + 1)
        if ends:
            shard |= {f"column/{name}": value[whole : t + 1].clone() for name, value in store.items()}
            _write(folder / f"shard-{t + 1:09d}.safetensors", shard)
            # Written last: a shard counts when the learner behind it is there too.
            learner.save(folder / LEARNER, t + 1)
            whole = t + 1


def _map(world: Any) -> Any:
    space = world.single_action_space
    return to_space(space, action_map(space, normalize=True, clip=True), world.device)


def controller(run: Run, weights: dict[str, Tensor]) -> Any:
    """The stochastic policy of a snapshot, as `recipes.collect` takes it."""
    run.actor.load_state_dict(weights)
    frozen = {name: value.clone() for name, value in weights.items()}

    def act(obs: Tensor, generator: torch.Generator) -> Tensor:
        run.actor.load_state_dict(frozen)
        mean, log_std = run.actor(obs.unsqueeze(0))[0].chunk(2, dim=-1)
        noise = torch.randn(mean.shape, generator=generator)
        return squash(mean, log_std.clamp(-5.0, 2.0), noise)[0]

    return act


@functools.lru_cache(maxsize=2)
def _trained(env_name: str, seed: int, overrides: tuple[tuple[str, Any], ...]) -> Run:
    """The run of that seed, kept in the cache of data sets: all qualities of a seed come from one run."""
    made_by = {name: versions()[name] for name in ("mobula", "torch")} | simulator(env_name)
    settings = {**SETTINGS, **dict(overrides)}
    digest = hashlib.sha256(
        json.dumps([env_name, seed, settings, made_by], sort_keys=True).encode()
    ).hexdigest()
    folder = datasets.cache_folder() / f"sac-{env_name.rpartition(':')[2]}-{digest[:12]}"
    with datasets.alone(folder):
        if not (folder / LEARNER).is_file():
            logger.warning(
                "making behaviour data: a soft actor-critic on %s (minutes to hours, once)", env_name
            )
        train(env_name, seed, folder, **settings)
    return read_run(folder)


def simulator(env_name: str) -> dict[str, str]:
    """Versions of the packages that simulate a gymnasium environment; ours are part of mobula."""
    if not env_name.startswith(registry.GYMNASIUM):
        return {}
    needed = [name for name in ("gymnasium", "mujoco") if find_spec(name)]
    return {name: importlib.metadata.version(name) for name in needed}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(save_tensors(dict(tensors)))
        temporary.replace(path)


def _shards(folder: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(steps at its end, tensors) of every shard, in order."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        yield int(path.stem.removeprefix("shard-")), load_tensors(path.read_bytes())


def read_run(folder: Path) -> Run:
    """The finished run in `folder`."""
    columns: dict[str, list[np.ndarray[Any, Any]]] = {}
    snapshots = []
    for end, shard in _shards(folder):
        for name, value in shard.items():
            if name.startswith("column/"):
                columns.setdefault(name[7:], []).append(value.numpy())
        weights = {name[6:]: value for name, value in shard.items() if name.startswith("actor/")}
        snapshots.append((end, float(shard["return"]), weights))
    last = snapshots[-1][2]
    layers = [last[f"weight.{i}"].shape for i in range(sum(name.startswith("weight.") for name in last))]
    actor = BatchedMLP(1, [layers[0][1], *(shape[2] for shape in layers)], generators([0]))
    actor.load_state_dict(last)
    return Run({name: np.concatenate(parts) for name, parts in columns.items()}, snapshots, actor)


def pack(env_name: str, quality: str, size: int, seed: int, **overrides: Any) -> Dataset:
    """random, medium, medium-replay, expert, medium-expert and mixed-P of an environment, and its reference scores.

    expert: the last policy, sampled.  medium: the first snapshot whose deterministic return over 10 episodes reaches
    J_random + (J_expert - J_random) / 3.  medium-replay: all transitions up to it.  Raises DataError where the run never got there.
    """
    from mobula.envs.datasets import recipes

    run = _trained(env_name, seed, tuple(sorted(overrides.items())))
    world = registry.make_env(env_name, 20)
    crowd = registry.make_env(env_name, recipes.REFERENCE_EPISODES)
    uniform = recipes.uniform_box(run.columns["action"].shape[1])
    expert = controller(run, run.snapshots[-1][2])
    low = recipes.mean_return(crowd, uniform, recipes.REFERENCE_EPISODES, 977)
    high = recipes.mean_return(crowd, expert, recipes.REFERENCE_EPISODES, 977)
    third = low + (high - low) / 3
    reached = next((s for s in run.snapshots if high > low and s[1] >= third), None)
    settings = {**SETTINGS, **overrides}
    about = {
        "env": env_name,
        "env_config": {},
        "reference": {"scale": f"{env_name}:sac", "random": low, "expert": high},
        "quality": quality,
        "sac": {
            **settings,
            "hidden": list(settings["hidden"]),
            "seed": seed,
            "medium_at_step": reached[0] if reached else None,
        },
    }

    def part(act: Any, behaviour: str, stream: int) -> Dataset:
        return recipes.collect(world, act, size, 5 * seed + stream, behaviour, about)

    if quality == "random":
        return part(uniform, "random", 2)
    if quality == "expert":
        return part(expert, "expert", 0)
    if quality.startswith(("mixed", "replaced")):
        share, both = (
            float(quality.rsplit("-", 1)[1]),
            (part(expert, "expert", 0), part(uniform, "random", 2)),
        )
        if quality.startswith("replaced"):
            return recipes.replaced(*both, share, quality)
        return recipes.mixture(*both, share, size, quality)
    if reached is None:
        raise DataError(
            f"{env_name}, seed {seed}: no policy of the run came a third of the way from random ({low:g}) to its last ({high:g});"
            " more steps are needed"
        )
    if quality == "medium-replay":
        columns = {name: value[: reached[0]] for name, value in run.columns.items()}
        columns["truncated"] = columns["truncated"].copy()
        columns["truncated"][-1] |= not columns["terminated"][-1]
        return make(columns, {**spaces_of(world), **about, "behaviour": "replay"})
    medium = part(controller(run, reached[2]), "medium", 1)
    if quality == "medium":
        return medium
    halves = medium, part(expert, "expert", 0)
    return concatenate([recipes.first_rows(half, size // 2) for half in halves], quality=quality)
