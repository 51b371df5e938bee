"""Logged data made here: "pack/quality[,option=value]" -> `Dataset`, the same for the same name, seed and versions.

Packs
  pendulum     random; scripted (energy swing-up, then balance); scripted-mixed-P; and of one SAC run on the seed: medium,
               medium-replay, expert, medium-expert, mixed-P, replaced-P (made once, in minutes)
  point_maze   random, medium, expert, mixed-P of a waypoint controller with noise; layout=umaze|medium|large
  halfcheetah, hopper, walker2d   random, medium, medium-replay, expert, medium-expert, mixed-P, replaced-P of one SAC run on
               gymnasium's v5 simulators, made once; steps= (default a million: hours on a core; goes on after a kill)
  four_rooms   mixed-P: 0.9 optimal + 0.1 uniform from the corner, the rest uniform from anywhere
P is the share of the better policy, by whole episodes (four_rooms: of transitions).  replaced-P: random rows, the last (1 - P) P of
them replaced with expert ones, as the noise study of SQL mixes them.

Options of every pack: size (transitions), seed, sub (a uniformly chosen share of episodes) and, in mazes, sub_goal (keeps a
transition with probability min(1, k d / d_max), d the distance of the next state to the goal).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula import registry
from mobula.envs.datasets.dataset import Array, Dataset, concatenate, make, spaces_of
from mobula.envs.mazes import FourRooms, PointMaze2D, distances
from mobula.errors import ConfigError, nearest
from mobula.sampling.tensor_env import TensorEnv
from mobula.versions import versions

Controller = Callable[[Tensor, torch.Generator], Tensor]
"""(observations [B, ...], random stream) -> actions [B, m] in [-1, 1], or indices [B]."""

REFERENCE_EPISODES = 100


def parse(name: str) -> tuple[str, str, dict[str, Any]]:
    """("pack", "quality", options) of "pack/quality,option=value".  Raises ConfigError where it is not of that form."""
    plain, *rest = name.split(",")
    pack, slash, quality = plain.partition("/")
    if not slash or not pack or not quality:
        raise ConfigError(
            f"data {name!r}: write pack/quality (packs: {', '.join(PACKS)}), or a path that exists"
        )
    options: dict[str, Any] = {}
    for entry in rest:
        key, sign, value = entry.partition("=")
        if not sign:
            raise ConfigError(f"data {name!r}: option {entry!r} is not written key=value")
        try:
            options[key.strip()] = int(value) if re.fullmatch(r"\d+", value) else float(value)
        except ValueError:
            options[key.strip()] = value
    return pack, quality, options


def generate(name: str) -> Dataset:
    """The data set of a recipe.  Raises ConfigError for an unknown pack, quality or option."""
    pack, quality, options = parse(name)
    if pack not in PACKS:
        raise ConfigError(f"no data pack {pack!r}.{nearest(pack, PACKS)} There are {', '.join(PACKS)}.")
    maker, sizes, own, qualities = PACKS[pack]
    known = {"size", "seed", "sub", *own}
    for option in options:
        if option not in known:
            raise ConfigError(f"data {name!r}: no option {option!r}; {pack} takes {', '.join(sorted(known))}")
    seed, sub, sub_goal = options.pop("seed", 0), options.pop("sub", None), options.pop("sub_goal", None)
    size = options.pop("size", sizes)
    if not isinstance(size, int) or size < 1 or not isinstance(seed, int):
        raise ConfigError(f"data {name!r}: size and seed are whole numbers")
    if not re.fullmatch("|".join(qualities), quality):
        readable = ", ".join(q.replace(MIX, "P") for q in qualities)
        raise ConfigError(f"data {name!r}: no quality {quality!r}; {pack} has {readable}")
    found = maker(quality, size, seed, **options)
    if sub is not None:
        found = sub_episodes(found, float(sub), seed)
    if sub_goal is not None:
        found = thin_near_goal(found, float(sub_goal), seed)
    return found.with_metadata(name=name, recipe=name, generator_seed=seed)


# Playing --------------------------------------------------------------------------------------------------------


def collect(
    env: TensorEnv,
    act: Controller,
    size: int,
    seed: int,
    behaviour: str,
    about: Mapping[str, Any] | None = None,
) -> Dataset:
    """`size` transitions of `act` in the B environments of `env`, side by side; the last episode of each is cut there.

    Continuous actions are in [-1, 1] and mapped onto the action space.
    """
    B = env.num_envs
    steps = -(-size // B)
    generator = torch.Generator().manual_seed(seed + 1)
    obs, _ = env.reset(seed=seed)
    rows: dict[str, list[Tensor]] = {
        k: [] for k in ("obs", "next_obs", "action", "reward", "terminated", "truncated")
    }
    scale = _unit_to_space(env)
    with torch.no_grad():
        for _ in range(steps):
            action = act(obs, generator)
            new, reward, terminated, truncated, info = env.step(scale(action))
            for key, value in zip(
                rows, (obs, info["final_obs"], action, reward, terminated, truncated), strict=True
            ):
                rows[key].append(value)
            obs = new
    columns = {key: torch.stack(values, 1).flatten(0, 1)[:size].cpu().numpy() for key, values in rows.items()}
    last = np.r_[np.arange(steps, size, steps) - 1, size - 1]
    columns["truncated"][last] |= ~columns["terminated"][last]
    return make(columns, {**spaces_of(env), "behaviour": behaviour, **(about or {})})


def _unit_to_space(env: TensorEnv) -> Callable[[Tensor], Tensor]:
    from mobula.sampling.actions import action_map, to_space

    space = env.single_action_space
    return to_space(space, action_map(space, normalize=True, clip=True), env.device)


def mean_return(env: TensorEnv, act: Controller, episodes: int, seed: int) -> float:
    """Mean undiscounted return of one episode in each of `episodes` environments."""
    assert env.num_envs == episodes
    generator = torch.Generator().manual_seed(seed + 1)
    obs, _ = env.reset(seed=seed)
    scale = _unit_to_space(env)
    total = torch.zeros(episodes, dtype=torch.float64)
    alive = torch.ones(episodes, dtype=torch.bool)
    with torch.no_grad():
        while bool(alive.any()):
            obs, reward, terminated, truncated, _ = env.step(scale(act(obs, generator)))
            total += reward * alive
            alive &= ~(terminated | truncated)
    return float(total.mean())


def uniform_box(size: int) -> Controller:
    """Uniform actions in [-1, 1]^size."""
    return lambda obs, generator: 2 * torch.rand(len(obs), size, generator=generator) - 1


def noisy(act: Callable[[Tensor], Tensor], sigma: float) -> Controller:
    """`act` plus N(0, sigma^2), clipped to [-1, 1]."""

    def noised(obs: Tensor, generator: torch.Generator) -> Tensor:
        action = act(obs)
        return (action + sigma * torch.randn(action.shape, generator=generator)).clamp(-1.0, 1.0)

    return noised


# Parts of data sets -----------------------------------------------------------------------------------------------


def sub_episodes(dataset: Dataset, share: float, seed: int) -> Dataset:
    """A uniformly chosen share of the episodes."""
    if not 0 < share <= 1:
        raise ConfigError(f"sub is {share}; a share above 0 and at most 1 is needed")
    count = len(dataset.starts())
    chosen = np.random.default_rng([seed, 11]).permutation(count)[: max(1, round(share * count))]
    return dataset.episodes(chosen)


def thin_near_goal(dataset: Dataset, k: float, seed: int) -> Dataset:
    """Keeps a transition with probability min(1, k d / d_max), d the distance of the next position to the goal.

    What is left of an episode after a gap counts as another episode, and a row before a gap as truncated.
    """
    if dataset["obs"].ndim == 2 and dataset["obs"].shape[1] == 6:
        gap = np.linalg.norm(dataset["next_obs"][:, :2] - dataset["next_obs"][:, 4:], axis=1)
    else:
        raise ConfigError(f"{dataset.name}: sub_goal needs a point maze")
    keep = np.random.default_rng([seed, 12]).random(len(dataset)) < np.minimum(1.0, k * gap / gap.max())
    if not keep.any():
        raise ConfigError(f"{dataset.name}: sub_goal={k:g} keeps no transition")
    found = dataset.rows(keep)
    position = np.flatnonzero(keep)
    joined = (np.diff(position) == 1) & (np.diff(found["episode_id"]) == 0)
    columns = dict(found.columns)
    columns["episode_id"] = np.r_[0, np.cumsum(~joined)].astype(np.int64)
    columns["truncated"] = ~columns["terminated"] & (columns["truncated"] | np.r_[~joined, True])
    starts = np.flatnonzero(np.r_[True, ~joined])
    columns["t"] = np.arange(len(found)) - np.repeat(starts, np.diff(np.r_[starts, len(found)]))
    return Dataset(columns, found.metadata)


def mixture(better: Dataset, worse: Dataset, share: float, size: int, quality: str) -> Dataset:
    """Whole episodes of both until `share` of `size` transitions are the better policy's."""
    parts = []
    for part, wanted in ((better, share * size), (worse, (1 - share) * size)):
        count = int(np.searchsorted(np.cumsum(part.lengths()), wanted - 1e-9)) + 1 if wanted > 0 else 0
        if count:
            parts.append(part.episodes(np.arange(min(count, len(part.starts())))))
    return concatenate(parts, quality=quality)


def first_rows(dataset: Dataset, rows: int) -> Dataset:
    """The first rows; the episode that is cut there ends as truncated."""
    found = dataset.rows(np.arange(len(dataset)) < rows)
    found.columns["truncated"][-1] |= not found.columns["terminated"][-1]
    return found


def replaced(better: Dataset, worse: Dataset, ratio: float, quality: str) -> Dataset:
    """Of n rows of `worse` the last (1 - ratio) ratio n, replaced with the first of `better` (the noise study of SQL's released code)."""
    count = round((1 - ratio) * ratio * len(worse))
    parts = [first_rows(worse, len(worse) - count)] + ([first_rows(better, count)] if count else [])
    return concatenate(parts, quality=quality)


MIX = r"(?:0(?:\.\d+)?|1(?:\.0)?)"


def _share(quality: str) -> float:
    return float(quality.rsplit("-", 1)[1])


# Pendulum -----------------------------------------------------------------------------------------------------------


def swing_up(obs: Tensor) -> Tensor:
    """Torque [B, 1] in units of its limit: pumps energy until the pendulum can reach the top, balances it there.

    obs (cos, sin, speed) of gymnasium's pendulum: energy speed^2 / 6 + 5 (cos - 1) about 0 at rest upright (m = l = 1,
    inertia 1/3, g = 10).
    """
    cos, sin, speed = obs.unbind(1)
    angle = torch.atan2(sin, cos)
    energy = speed.square() / 6 + 5 * (cos - 1)
    pump = torch.where(speed >= 0, 1.0, -1.0) * torch.where(energy < 0, 1.0, -1.0)
    balance = -(10.0 * angle + 2.0 * speed) / 2.0
    near = (angle.abs() < 0.6) & (speed.abs() < 3.0)
    return torch.where(near, balance, pump).clamp(-1.0, 1.0).unsqueeze(1)


def _pendulum(quality: str, size: int, seed: int) -> Dataset:
    if quality == "random" or quality.startswith("scripted"):
        return _scripted_pendulum(quality, size, seed)
    from mobula.envs.datasets.sac import pack

    return pack("pendulum", quality, size, seed)


def _scripted_pendulum(quality: str, size: int, seed: int) -> Dataset:
    expert, uniform = noisy(swing_up, 0.1), uniform_box(1)
    world = registry.make_env("pendulum", REFERENCE_EPISODES)
    reference = {
        "scale": "pendulum:scripted",
        "random": mean_return(world, uniform, REFERENCE_EPISODES, 977),
        "expert": mean_return(world, expert, REFERENCE_EPISODES, 977),
    }
    about = {"env": "pendulum", "env_config": {}, "reference": reference, "quality": quality}
    batch = registry.make_env("pendulum", 20)

    def part(act: Controller, behaviour: str, stream: int) -> Dataset:
        return collect(batch, act, size, 2 * seed + stream, behaviour, about)

    if quality == "random":
        return part(uniform, "random", 0)
    if quality == "scripted":
        return part(expert, "scripted", 1)
    return mixture(part(expert, "scripted", 1), part(uniform, "random", 0), _share(quality), size, quality)


# MuJoCo ---------------------------------------------------------------------------------------------------------------

MUJOCO = {name.lower(): f"gymnasium:{name}-v5" for name in ("HalfCheetah", "Hopper", "Walker2d")}


def _mujoco(quality: str, size: int, seed: int, steps: int = 1_000_000, *, env: str) -> Dataset:
    from mobula.envs.datasets.sac import USUAL, pack

    if not isinstance(steps, int) or steps < 20:
        raise ConfigError(f"{env}: steps is {steps}; a whole number of at least 20 is needed")
    # Shards of 10,000 steps, as long as the start with random actions.
    part = min(10_000, steps // 20)
    return pack(env, quality, size, seed, **USUAL, steps=steps, random_steps=part, snapshot_every=part)


def made_by(pack: str) -> dict[str, str]:
    """Versions of the packages that the rows of a pack depend on."""
    from mobula.envs.datasets.sac import simulator

    return {name: versions()[name] for name in ("mobula", "torch")} | simulator(MUJOCO.get(pack, ""))


# Point maze -----------------------------------------------------------------------------------------------------------


def waypoint(world: PointMaze2D) -> Callable[[Tensor], Tensor]:
    """Acceleration towards the next cell's centre on a shortest way, proportional to the error of position and speed."""
    table = world.waypoints()

    def act(obs: Tensor) -> Tensor:
        position, velocity = obs[:, :2].double(), obs[:, 2:4].double()
        cell = position.long()
        wanted = (table[cell[:, 1], cell[:, 0]] - position).clamp(-1.0, 1.0)
        return (8.0 * (0.5 * wanted - velocity)).clamp(-1.0, 1.0).float()

    return act


def _point_maze(quality: str, size: int, seed: int, layout: str = "umaze") -> Dataset:
    world = PointMaze2D(25, layout=layout)
    steer = waypoint(world)
    policies = {"random": uniform_box(2), "medium": noisy(steer, 0.8), "expert": noisy(steer, 0.2)}
    judge = PointMaze2D(REFERENCE_EPISODES, layout=layout)
    reference = {
        "scale": f"point_maze:{layout}",
        "random": mean_return(judge, policies["random"], REFERENCE_EPISODES, 977),
        "expert": mean_return(judge, policies["expert"], REFERENCE_EPISODES, 977),
    }
    about = {
        "env": "point_maze",
        "env_config": {"layout": layout},
        "reference": reference,
        "quality": quality,
    }

    def part(name: str) -> Dataset:
        return collect(world, policies[name], size, 3 * seed + list(policies).index(name), name, about)

    if quality in policies:
        return part(quality)
    return mixture(part("expert"), part("random"), _share(quality), size, quality)


# Four rooms -------------------------------------------------------------------------------------------------------------

FOUR_ROOMS_GAMMA = 0.97


def optimal_policy(world: FourRooms, gamma: float = FOUR_ROOMS_GAMMA) -> tuple[Tensor, Tensor]:
    """(optimal action [S], smallest index on ties within 1e-9; optimal value [S])."""
    P, r = world.model()
    V = torch.zeros(len(P), dtype=torch.float64)
    while True:
        Q = r + gamma * torch.einsum("sat,t->sa", P, V)
        new = Q.amax(1)
        if float((new - V).abs().max()) < 1e-13:
            return (new.unsqueeze(1) - 1e-9 <= Q).int().argmax(1), new
        V = new


def four_rooms_data(shares: float, size: int, seed: int) -> dict[str, Array]:
    """Columns of round(p N) transitions of 0.9 optimal + 0.1 uniform from the corner, then uniform play from any other cell.

    Episodes of at most 200 steps; the last one of each part is cut where its quota is full.  One environment after the
    other would be slow: each part is played in 50 at once and laid end to end, episode by episode, until the quota.
    """
    optimal, _ = optimal_policy(FourRooms(1))
    good = round(shares * size)

    def follow(obs: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.rand(len(obs), 2, generator=generator)
        return torch.where(u[:, 0] < 0.1, (u[:, 1] * 4).long(), optimal[obs])

    def uniform(obs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(4, (len(obs),), generator=generator)

    parts: list[Dataset] = []
    for act, start, quota, behaviour, stream in (
        (follow, "corner", good, "expert", 1),
        (uniform, "uniform", size - good, "random", 2),
    ):
        if not quota:
            continue
        # Whole episodes of 20 worlds, in order, until the quota: the worlds play long enough that none runs dry.
        world = FourRooms(20, start=start)
        played = collect(world, act, max(quota, 20 * 210) * 2, 2 * seed + stream, behaviour)
        ended = played["terminated"] | (played["t"] == world.max_episode_steps - 1)
        last = np.r_[played.starts()[1:], len(played)] - 1
        whole = played.episodes(np.flatnonzero(ended[last]))
        part = whole.rows(np.arange(len(whole)) < quota)
        part["truncated"][-1] |= not part["terminated"][-1]
        parts.append(part)
    return concatenate(parts).columns


def _four_rooms(quality: str, size: int, seed: int) -> Dataset:
    world = FourRooms(1)
    P, r = world.model()
    # Undiscounted returns are success rates; the scale of a tabular task is its exact discounted value instead.
    _, optimum = optimal_policy(world)
    uniform = torch.linalg.solve(
        torch.eye(len(P), dtype=torch.float64) - FOUR_ROOMS_GAMMA * P.mean(1), r.mean(1)
    )
    judge = FourRooms(REFERENCE_EPISODES)
    best = optimal_policy(world)[0]
    reference = {
        "scale": "four_rooms",
        "random": mean_return(
            judge, lambda o, g: torch.randint(4, (len(o),), generator=g), REFERENCE_EPISODES, 977
        ),
        "expert": mean_return(judge, lambda o, g: best[o], REFERENCE_EPISODES, 977),
    }
    about = {
        **spaces_of(world),
        "env": "four_rooms",
        "env_config": {},
        "reference": reference,
        "quality": quality,
        "optimal_value": float(optimum[world.start_state]),
        "uniform_value": float(uniform[world.start_state]),
    }
    return make(four_rooms_data(_share(quality), size, seed), about)


OF_A_RUN = (
    "random", "medium", "medium-replay", "expert", "medium-expert", rf"mixed-{MIX}", rf"replaced-{MIX}",
)  # fmt: skip
"""Qualities that come from one run of a learner."""

PACKS: Mapping[str, tuple[Callable[..., Dataset], int, tuple[str, ...], tuple[str, ...]]] = {
    "pendulum": (
        _pendulum,
        20_000,
        (),
        (*OF_A_RUN, "scripted", rf"scripted-mixed-{MIX}"),
    ),
    "point_maze": (
        _point_maze,
        50_000,
        ("layout", "sub_goal"),
        ("random", "medium", "expert", rf"mixed-{MIX}"),
    ),
    "four_rooms": (_four_rooms, 10_000, (), (rf"mixed-{MIX}",)),
    **{
        name: (functools.partial(_mujoco, env=env), 1_000_000, ("steps",), OF_A_RUN)
        for name, env in MUJOCO.items()
    },
}
"""pack -> (maker(quality, size, seed, **options), default size, options of its own, patterns of its qualities)."""

__all__ = ["PACKS", "collect", "distances", "generate", "mean_return", "parse"]
