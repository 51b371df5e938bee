"""The conformance test that every `TensorEnv` passes; for the environments of others too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from mobula.errors import EnvironmentFault
from mobula.sampling.actions import random_actions
from mobula.sampling.bridge import GymnasiumBridge
from mobula.sampling.spaces import full_observations
from mobula.sampling.tensor_env import TensorEnv


def check_env(make: Callable[..., TensorEnv], *, steps: int = 200, num_envs: int = 5) -> None:
    """Raises EnvironmentFault, saying which promise of `TensorEnv` is broken.

    make(num_envs, **settings) gives a fresh environment; settings are those of the base class, e.g.
    `autoreset_mode`.  Checked: spaces, shapes and dtypes, seeds, saved states, that `transition` depends on its
    arguments only, both autoreset modes, time limits, the declared reward range, the NumPy view.
    """
    _check_shapes(make(num_envs), steps)
    _check_seeds(make, steps, num_envs)
    _check_saved_state(make, steps, num_envs)
    bridged = isinstance(make(1), GymnasiumBridge)
    if not bridged:
        _check_purity(make(num_envs), steps)
    _check_autoreset(make, steps, num_envs)
    _check_numpy(make, num_envs)


def _require(condition: Any, message: str) -> None:
    if not bool(condition):
        raise EnvironmentFault(message)


def _actions(env: TensorEnv, generator: torch.Generator) -> Tensor:
    axes = (env.num_envs,) if env.num_agents is None else (env.num_envs, env.num_agents)
    actions = random_actions(env.single_action_space, "none", axes, generator, env.device)
    space = env.single_action_space
    return actions + int(space.start) if isinstance(space, spaces.Discrete) else actions


def _check_shapes(env: TensorEnv, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    obs, _ = env.reset(seed=1)
    agents = () if env.num_agents is None else (env.num_agents,)
    for _ in range(steps):
        space = env.single_observation_space
        shape = (env.num_envs, *agents, *(space.shape or ()))
        _require(obs.shape == shape, f"observations have shape {tuple(obs.shape)}, the space says {shape}")
        kind = torch.from_numpy(np.zeros(0, dtype=space.dtype)).dtype
        _require(obs.dtype == kind, f"observations are {obs.dtype}, the space says {kind}")
        _require(
            env.observation_space.contains(obs.cpu().numpy()),
            "an observation lies outside the observation space",
        )
        obs, reward, terminated, truncated, info = env.step(_actions(env, generator))
        _require(
            reward.shape == (env.num_envs, *agents),
            f"rewards have shape {tuple(reward.shape)}, not {(env.num_envs, *agents)}",
        )
        _require(reward.is_floating_point(), f"rewards are {reward.dtype}, not floating point")
        _require(reward.isfinite().all(), "a reward is not finite")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            _require(
                flag.shape == (env.num_envs,) and flag.dtype == torch.bool,
                f"{name} is {flag.dtype} {tuple(flag.shape)}, not bool ({env.num_envs},)",
            )
        _require(
            not (env.continuing and (terminated | truncated).any()),
            "it says continuing, but an episode ended",
        )
        if env.reward_range is not None:
            low, high = env.reward_range
            _require(
                ((reward >= low - 1e-6) & (reward <= high + 1e-6)).all(),
                f"a reward lies outside the declared range {env.reward_range}",
            )
        if env.autoreset_mode is AutoresetMode.SAME_STEP and not env.continuing:
            _require("final_obs" in info, "same-step autoreset gives no info['final_obs']")
            same = (info["final_obs"] == obs).reshape(env.num_envs, -1).all(1)
            _require(
                (same | terminated | truncated).all(), "final_obs differs from obs where no episode ended"
            )


def _play(env: TensorEnv, steps: int, seed: int | None, action_seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(action_seed)
    obs = env.reset(seed=seed)[0]
    seen = [obs]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(_actions(env, generator))
        seen += [obs, reward, terminated, truncated]
    return seen


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _check_seeds(make: Callable[..., TensorEnv], steps: int, num_envs: int) -> None:
    first, second = _play(make(num_envs), steps, 7), _play(make(num_envs), steps, 7)
    _require(_equal(first, second), "the same seed and actions give different trajectories")


def _check_saved_state(make: Callable[..., TensorEnv], steps: int, num_envs: int) -> None:
    env = make(num_envs)
    _play(env, steps, 3)
    if isinstance(env, GymnasiumBridge):
        return
    saved = env.get_state()
    generator = torch.Generator().manual_seed(1)
    plan = [_actions(env, generator) for _ in range(steps)]
    first = [part for action in plan for part in env.step(action)[:4]]
    other = make(num_envs)
    other.reset(seed=99)
    other.set_state(saved)
    second = [part for action in plan for part in other.step(action)[:4]]
    _require(_equal(first, second), "an environment with a restored state goes on differently")


def _check_purity(env: TensorEnv, steps: int) -> None:
    if type(env).transition is TensorEnv.transition:
        return
    _play(env, steps, 5)
    state = {name: value.clone() for name, value in env.state.items()}
    action = _actions(env, torch.Generator().manual_seed(2))

    def result() -> list[Tensor]:
        env.generator.manual_seed(11)
        new, reward, terminated = env.transition(state, action)
        return [*(new[name] for name in sorted(new)), reward, terminated, env.observe(new)]

    before = result()
    _require(
        all(torch.equal(state[name], env.state[name]) for name in state),
        "transition changes the state that it was given",
    )
    env.reset(seed=6)
    _require(_equal(before, result()), "transition or observe depends on self.state")
    row = {name: value[:1] for name, value in state.items()}
    env.generator.manual_seed(11)
    single = env.transition(row, action[:1])
    _require(
        torch.allclose(single[1].double(), before[-3][:1].double()) or not _deterministic(env, state, action),
        "a batch of one gives another reward than the same row of a larger batch",
    )


def _deterministic(env: TensorEnv, state: dict[str, Tensor], action: Tensor) -> bool:
    env.generator.manual_seed(1)
    first = env.transition(state, action)
    env.generator.manual_seed(2)
    second = env.transition(state, action)
    return torch.equal(first[1], second[1]) and all(torch.equal(first[0][k], second[0][k]) for k in first[0])


def _check_autoreset(make: Callable[..., TensorEnv], steps: int, num_envs: int) -> None:
    probe = make(num_envs)
    if probe.continuing:
        return
    env = make(num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
    generator = torch.Generator().manual_seed(4)
    env.reset(seed=8)
    over = torch.zeros(num_envs, dtype=torch.bool)
    limit = env.max_episode_steps
    age = torch.zeros(num_envs, dtype=torch.int64)
    for _ in range(steps):
        _, reward, terminated, truncated, _ = env.step(_actions(env, generator))
        quiet = (reward == 0).reshape(num_envs, -1).all(1) & ~terminated & ~truncated
        _require(
            (quiet | ~over.to(quiet.device)).all(),
            "the step after an end has a reward or a flag (next-step autoreset)",
        )
        age = torch.where(over, 0, age + 1)
        if limit is not None:
            _require((age <= limit).all(), f"an episode outlives its limit of {limit} steps")
            _require(
                (truncated.cpu() == (age >= limit)).all() or isinstance(env, GymnasiumBridge),
                "truncated is not the time limit alone",
            )
        over = (terminated | truncated).cpu()


def _check_numpy(make: Callable[..., TensorEnv], num_envs: int) -> None:
    env, view = make(num_envs), make(num_envs).numpy()
    generator = torch.Generator().manual_seed(9)
    first, _ = env.reset(seed=2)
    second, _ = view.reset(seed=2)
    space = env.single_observation_space
    _require(
        np.array_equal(full_observations(space, first).cpu().numpy(), second),
        "the NumPy view starts elsewhere",
    )
    for _ in range(50):
        action = _actions(env, generator)
        tensors, arrays = env.step(action), view.step(action.cpu().numpy())
        for a, b in zip((full_observations(space, tensors[0]), *tensors[1:4]), arrays[:4], strict=True):
            _require(np.allclose(a.cpu().numpy(), b), "the NumPy view goes another way")
