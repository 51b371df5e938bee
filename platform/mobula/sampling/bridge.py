"""Bridges: any gymnasium environment as a `TensorEnv`, and any `TensorEnv` as a gymnasium environment."""

from __future__ import annotations

import copy
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from mobula.errors import ConfigError, DataError, nearest
from mobula.sampling.spaces import full_observations, full_space
from mobula.sampling.tensor_env import Info, TensorEnv


class GymnasiumBridge(TensorEnv):
    """Any gymnasium environment, `num_envs` of them side by side, with tensors in and out.

    Box observations become float32; Dict and Tuple ones are flattened as `gymnasium.spaces.utils.flatten` does.  Resets
    happen in the same step.
    """

    vector: Any = None

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        vectorization: Literal["sync", "async"] = "sync",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **env_config: Any,
    ) -> None:
        """env_id: gymnasium ID.  vectorization: "sync" (one process) or "async" (one process each).  The rest goes to
        `gymnasium.make`.  Raises ConfigError for an unknown ID, a missing package, or spaces that cannot be tensors."""
        mode = AutoresetMode(autoreset_mode)
        optional = {"render_mode": render_mode, "max_episode_steps": max_episode_steps}
        try:
            self.vector = gymnasium.make_vec(
                env_id,
                num_envs=num_envs,
                vectorization_mode=vectorization,
                vector_kwargs={"autoreset_mode": mode},
                wrappers=[_flatten],
                **{name: value for name, value in optional.items() if value is not None},
                **env_config,
            )
        except gymnasium.error.DependencyNotInstalled as error:
            raise ConfigError(f"{env_id} needs a package that is not installed: {error}") from error
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
            raise ConfigError(
                f"gymnasium has no environment {env_id!r}.{nearest(env_id, gymnasium.registry)}"
            ) from error
        except TypeError as error:
            raise ConfigError(f"gymnasium:{env_id} does not take these settings: {error}") from error
        observation, action = self.vector.single_observation_space, self.vector.single_action_space
        if not isinstance(observation, _PLAIN):
            raise ConfigError(f"gymnasium:{env_id}: the observation space {observation} cannot be a tensor")
        if not isinstance(action, _PLAIN):
            raise ConfigError(f"gymnasium:{env_id}: the action space {action} cannot be a tensor")
        if isinstance(observation, spaces.Box) and np.issubdtype(observation.dtype, np.floating):
            observation = spaces.Box(
                observation.low.astype(np.float32), observation.high.astype(np.float32), dtype=np.float32
            )
        super().__init__(
            num_envs,
            observation_space=observation,
            action_space=action,
            device=device,
            autoreset_mode=mode,
            render_mode=render_mode,
        )
        self.env_id = env_id
        self._dtype = torch.float32 if observation.dtype == np.float32 else None

    def _tensor(self, array: Any) -> Tensor:
        # Vector environments reuse their buffers: the copy is needed.
        return torch.tensor(np.asarray(array), dtype=self._dtype, device=self.device)

    def seed(self, seed: int) -> None:
        raise NotImplementedError("gymnasium seeds at a reset: reset(seed=...)")

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        if isinstance(seed, int):
            # gymnasium takes 32-bit seeds and gives environment i the seed plus i.
            seed = [int(word) for word in np.random.SeedSequence(seed).generate_state(self.num_envs)]
        obs, _ = self.vector.reset(seed=seed, options=options)
        return self._tensor(obs), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        obs, reward, terminated, truncated, info = self.vector.step(actions.cpu().numpy())
        tensors = self._tensor(obs)
        infos: Info = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            final = tensors
            if "final_obs" in info:
                rows = np.flatnonzero(info["_final_obs"])
                final = tensors.clone()
                final[torch.from_numpy(rows).to(self.device)] = self._tensor(
                    np.stack(list(info["final_obs"][rows]))
                )
            infos["final_obs"] = final
        return (
            tensors,
            torch.tensor(reward, dtype=torch.float32, device=self.device),
            torch.tensor(terminated, device=self.device),
            torch.tensor(truncated, device=self.device),
            infos,
        )

    def render(self) -> Any:
        frames = self.vector.render()
        return None if frames is None else np.asarray(frames[0])

    def get_state(self) -> dict[str, Any]:
        """Copies of the simulators, where they can be copied.  Raises DataError where they cannot."""
        if not isinstance(self.vector.unwrapped, SyncVectorEnv):
            raise DataError(
                f"gymnasium:{self.env_id}: simulators in other processes cannot be saved; use sync"
            )
        if any(isinstance(env.unwrapped, EzPickle) for env in self.vector.unwrapped.envs):
            # Copying or writing such a simulator makes a new one from its arguments, at its start.
            raise DataError(
                f"gymnasium:{self.env_id}: its simulators cannot be saved in the middle of an episode"
            )
        try:
            inner = self.vector.unwrapped
            return {name: copy.deepcopy(getattr(inner, name)) for name in _POSITION if hasattr(inner, name)}
        except Exception as error:
            raise DataError(f"gymnasium:{self.env_id} cannot be saved: {error}") from error

    def set_state(self, saved: Any) -> None:
        for name, value in saved.items():
            setattr(self.vector.unwrapped, name, copy.deepcopy(value))

    def close_extras(self, **kwargs: Any) -> None:
        if self.vector is not None:
            self.vector.close()


_POSITION = (
    "envs",
    "_env_obs",
    "_observations",
    "_rewards",
    "_terminations",
    "_truncations",
    "_autoreset_envs",
)
"""Attributes of gymnasium's SyncVectorEnv that a later step depends on."""

_PLAIN = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def _flatten(env: gymnasium.Env[Any, Any]) -> Any:
    if (
        isinstance(env.observation_space, spaces.Dict | spaces.Tuple)
        and env.observation_space.is_np_flattenable
    ):
        return gymnasium.wrappers.FlattenObservation(env)
    return env


class GymView(gymnasium.Env[Any, Any]):
    """One environment of a `TensorEnv` as an ordinary gymnasium environment of NumPy arrays, for other libraries."""

    def __init__(self, env: TensorEnv) -> None:
        if env.num_envs != 1 or env.num_agents is not None:
            raise ConfigError("a gymnasium view takes a tensor environment with num_envs=1 and no agent axis")
        self.tensor_env = env
        self.observation_space = full_space(env.single_observation_space)
        self.action_space = env.single_action_space
        self.metadata = env.metadata
        self.render_mode = env.render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        obs, _ = self.tensor_env.reset(seed=seed, options=options)
        return self._item(obs), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        tensor = torch.as_tensor(np.asarray(action), device=self.tensor_env.device).unsqueeze(0)
        obs, reward, terminated, truncated, info = self.tensor_env.step(tensor)
        return self._item(info.get("final_obs", obs)), float(reward), bool(terminated), bool(truncated), {}

    def render(self) -> Any:
        return self.tensor_env.render()

    def close(self) -> None:
        self.tensor_env.close()

    def _item(self, obs: Tensor) -> Any:
        array = full_observations(self.tensor_env.single_observation_space, obs[0]).cpu().numpy()
        return array[()] if array.ndim == 0 else array
