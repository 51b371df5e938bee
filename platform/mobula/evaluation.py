"""Evaluation and films of what was trained; no Ray is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobula import registry
from mobula.errors import ConfigError, DataError
from mobula.files import storage

if TYPE_CHECKING:
    from mobula.policy import Policy


def evaluate_policy(
    policy: Policy,
    env: str,
    *,
    episodes: int = 10,
    steps: int = 10_000,
    num_envs: int | None = None,
    seed: int | None = None,
    explore: bool | None = None,
    env_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plays `episodes` whole episodes (`steps` steps where a task never ends) and returns what they brought.

    {"returns": [...], "lengths": [...]} or {"reward_per_step": x, "steps": n}.  Every environment plays the same number of
    episodes, so that short ones are not favoured.
    """
    import torch

    from mobula.sampling.spaces import full_observations, full_space

    count = num_envs or max(1, min(episodes, 32))
    world = registry.make_env(env, count, **dict(env_config or {}))
    space = world.single_observation_space
    if full_space(space) != policy.observation_space or world.single_action_space != policy.action_space:
        raise DataError(
            f"the policy was trained for {policy.observation_space} -> {policy.action_space}; {env} has"
            f" {full_space(space)} -> {world.single_action_space}"
        )

    def seen(obs: Any) -> Any:
        return full_observations(space, obs).numpy()

    if seed is not None:
        policy.seed(seed)
    obs, _ = world.reset(seed=seed)
    if world.continuing:
        total, taken = 0.0, 0
        while taken < steps:
            obs, reward, *_ = world.step(torch.as_tensor(policy.act(seen(obs), explore=explore)))
            total, taken = total + float(reward.sum()), taken + count
        return {"reward_per_step": total / taken, "steps": taken}
    base, extra = divmod(episodes, count)
    quota = [base + (i < extra) for i in range(count)]
    running, length = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    returns: list[float] = []
    lengths: list[int] = []
    state = None
    while any(quota):
        answer = policy.answer(seen(obs), explore=explore, state=state)
        obs, reward, terminated, truncated, _ = world.step(torch.as_tensor(answer["action"]))
        state = answer.get("state")
        running += reward
        length += 1
        for i in (terminated | truncated).nonzero().flatten().tolist():
            if quota[i]:
                quota[i] -= 1
                returns.append(float(running[i]))
                lengths.append(int(length[i]))
            running[i], length[i] = 0.0, 0
            if state is not None:
                initial = policy.module.get_initial_state()
                for name, value in initial.items():
                    state[name][i] = value
    world.close()
    return {"returns": returns, "lengths": lengths}


def record_video(
    policy: Policy,
    env: str,
    path: str | Path,
    *,
    episodes: int = 1,
    steps: int = 500,
    seed: int | None = None,
    explore: bool | None = None,
    env_config: Mapping[str, Any] | None = None,
) -> int:
    """Writes a film (mp4 or gif) of `episodes` episodes, or of `steps` steps where a task never ends; returns the frames."""
    import imageio.v2 as imageio
    import torch

    path = Path(path)
    if path.suffix not in (".mp4", ".gif"):
        raise ConfigError(f"a film is an .mp4 or a .gif, not {path.name!r}")
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    world = registry.make_env(env, 1, render_mode="rgb_array", **dict(env_config or {}))
    if seed is not None:
        policy.seed(seed)
    obs, _ = world.reset(seed=seed)
    frame = world.render()
    if frame is None:
        raise ConfigError(f"{env} does not draw itself: no film can be made of it")
    rate = int(world.metadata.get("render_fps") or 30)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
        options: dict[str, Any] = (
            {"fps": rate, "macro_block_size": 8} if path.suffix == ".mp4" else {"duration": 1000 / rate}
        )
        frames, over, state = 0, 0, None
        writer: Any = imageio.get_writer(temporary, **options)
        with writer:
            while over < episodes and (not world.continuing or frames < steps):
                writer.append_data(frame)
                frames += 1
                answer = policy.answer(obs.numpy(), explore=explore, state=state)
                state = answer.get("state")
                obs, _, terminated, truncated, _ = world.step(torch.as_tensor(answer["action"]))
                over += int(terminated) + int(truncated and not terminated)
                frame = world.render()
        temporary.replace(path)
    world.close()
    return frames
