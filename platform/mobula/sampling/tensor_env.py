"""`TensorEnv`: a `gymnasium.vector.VectorEnv` whose arrays are torch tensors on one device.

An environment is written as three functions of a dictionary of tensors, each over any leading batch size:

    initial(n)                 -> state                      n fresh states
    transition(state, action)  -> next_state, reward, terminated
    observe(state)             -> obs

The base class does the rest: stepping in a batch, time limits, autoreset, seeds, checkpoints of the state.  The
same functions serve planners, exact solvers and gradients through the dynamics, without an environment object in
between: `transition` and `observe` must not depend on `self.state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from mobula.sampling.spaces import full_observations, full_space

State = dict[str, Tensor]
"""Named tensors with one leading axis of size n (environments)."""

Info = dict[str, Any]


class TensorEnv(VectorEnv):  # type: ignore[type-arg]
    """A batch of environments that step together as tensors.

    Class attributes that an environment may set:

    max_episode_steps  time limit in steps (None: no limit); reaching it sets `truncated`
    reward_range       (low, high) that every reward lies in, or None if undeclared
    continuing         True if no state ever terminates and there is no time limit (average-reward problems)
    num_agents         size of the agent axis A, or None for a single agent.  With an agent axis, `single_*_space` are
                       those of one agent; observations are [B, A, ...], actions [B, A, ...], rewards [B, A];
                       `terminated` and `truncated` stay [B]: agents end together.

    Autoreset (gymnasium's two modes): with SAME_STEP, the step that ends an episode returns the first observation of
    the next one and the last true observation in `info["final_obs"]` ([B, ...], meaningful where an episode ended;
    elsewhere equal to the returned observation).  With NEXT_STEP, the step after the end ignores its action, returns
    the first observation, reward 0 and no flags.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}
    max_episode_steps: int | None = None
    reward_range: tuple[float, float] | None = None
    continuing: ClassVar[bool] = False
    num_agents: int | None = None
    state: State

    def __init__(
        self,
        num_envs: int = 1,
        *,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        device: torch.device | str = "cpu",
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
    ) -> None:
        """`num_envs`: B.  The spaces are those of one environment (of one agent, where there is an agent axis)."""
        super().__init__()
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; at least 1 environment is needed")
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = self._batched(observation_space)
        self.action_space = self._batched(action_space)
        if max_episode_steps is not None:
            self.max_episode_steps = max_episode_steps
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode is AutoresetMode.DISABLED:
            raise ValueError("a TensorEnv resets itself: autoreset_mode is SAME_STEP or NEXT_STEP")
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = render_mode
        self.generator = torch.Generator(device=self.device)
        self.state = {}
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.over = torch.zeros(num_envs, dtype=torch.bool, device=self.device)

    def _batched(self, space: gymnasium.Space[Any]) -> gymnasium.Space[Any]:
        if self.num_agents is not None:
            space = batch_space(space, self.num_agents)
        return batch_space(space, self.num_envs)

    # What an environment defines -----------------------------------------------------------------------------

    def initial(self, n: int) -> State:
        """`n` fresh states, drawn with `self.generator`."""
        raise NotImplementedError

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        """(next state, reward [B] or [B, A], terminated [B] bool) of `action` in `state`; random draws use `self.generator`."""
        raise NotImplementedError

    def observe(self, state: State) -> Tensor:
        """Observations [B, ...] (or [B, A, ...]) of `state`."""
        raise NotImplementedError

    # gymnasium's interface -----------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        """Restarts every environment; `seed` fixes all later draws too.  Returns (obs [B, ...], info)."""
        if seed is not None:
            self.seed(
                seed if isinstance(seed, int) else int(np.random.SeedSequence(seed).generate_state(1)[0])
            )
        self.state = self.initial(self.num_envs)
        self.elapsed.zero_()
        self.over.zero_()
        return self.observe(self.state), {}

    def seed(self, seed: int) -> None:
        """Fixes the random stream of the environment."""
        self.generator.manual_seed(seed)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        """One step of all environments.

        actions: [B, ...] (or [B, A, ...]).  Returns obs [B, ...], reward [B] (or [B, A]), terminated [B],
        truncated [B] (bool, kept apart), info.
        """
        state, reward, terminated = self.transition(self.state, actions)
        self.elapsed += 1
        if self.max_episode_steps is None:
            truncated = torch.zeros_like(terminated)
        else:
            truncated = self.elapsed >= self.max_episode_steps
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            state, reward, terminated, truncated = self._reset_the_ended(state, reward, terminated, truncated)
            self.state = state
            return self.observe(state), reward, terminated, truncated, {}
        obs = self.observe(state)
        info: Info = {"final_obs": obs}
        done = terminated | truncated
        rows = done.nonzero().flatten()
        if rows.numel():
            state = self._with_fresh_rows(state, rows)
            obs = self.observe(state)
        self.state = state
        return obs, reward, terminated, truncated, info

    def _reset_the_ended(
        self, state: State, reward: Tensor, terminated: Tensor, truncated: Tensor
    ) -> tuple[State, Tensor, Tensor, Tensor]:
        rows = self.over.nonzero().flatten()
        if rows.numel():
            state = self._with_fresh_rows(state, rows)
            reward = reward.index_fill(0, rows, 0.0)
            terminated = terminated.index_fill(0, rows, False)
            truncated = truncated.index_fill(0, rows, False)
        self.over = terminated | truncated
        return state, reward, terminated, truncated

    def _with_fresh_rows(self, state: State, rows: Tensor) -> State:
        fresh = self.initial(rows.numel())
        self.elapsed[rows] = 0
        return {name: value.index_copy(0, rows, fresh[name].to(value.dtype)) for name, value in state.items()}

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on: states, clocks and the random stream."""
        return {
            "state": {name: value.clone() for name, value in self.state.items()},
            "elapsed": self.elapsed.clone(),
            "over": self.over.clone(),
            "generator": self.generator.get_state(),
        }

    def set_state(self, saved: Mapping[str, Any]) -> None:
        """Puts back what `get_state` returned, for an environment with the same `num_envs`."""
        self.state = {name: value.clone() for name, value in saved["state"].items()}
        self.elapsed = saved["elapsed"].clone()
        self.over = saved["over"].clone()
        self.generator.set_state(saved["generator"])

    def render(self) -> Any:
        """An RGB frame [H, W, 3] uint8 of environment 0, where the environment draws itself; else None."""
        return None

    def numpy(self) -> NumpyView:
        """The same environments behind NumPy arrays, for libraries that know nothing of torch."""
        return NumpyView(self)


class NumpyView(VectorEnv):  # type: ignore[type-arg]
    """A `TensorEnv` as an ordinary `gymnasium.vector.VectorEnv` of NumPy arrays; indexed observations are expanded.

    With SAME_STEP autoreset, `info["final_obs"]` and `info["_final_obs"]` are laid out as gymnasium's own vector
    environments do: an object array with an entry where an episode ended.
    """

    def __init__(self, env: TensorEnv) -> None:
        super().__init__()
        self.tensor_env = env
        self.num_envs = env.num_envs
        self.single_observation_space = full_space(env.single_observation_space)
        self.single_action_space = env.single_action_space
        self.observation_space = env._batched(self.single_observation_space)
        self.action_space = env.action_space
        self.metadata = env.metadata
        self.render_mode = env.render_mode

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray[Any, Any], Info]:
        obs, _ = self.tensor_env.reset(seed=seed, options=options)
        return self._array(obs), {}

    def _array(self, obs: Tensor) -> np.ndarray[Any, Any]:
        return full_observations(self.tensor_env.single_observation_space, obs).cpu().numpy()

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, Info]:
        tensor = torch.as_tensor(np.asarray(actions), device=self.tensor_env.device)
        obs, reward, terminated, truncated, info = self.tensor_env.step(tensor)
        ended = (terminated | truncated).cpu().numpy()
        infos: Info = {}
        if "final_obs" in info and ended.any():
            final = np.full(self.num_envs, None, dtype=object)
            last = self._array(info["final_obs"])
            for index in np.flatnonzero(ended):
                final[index] = last[index]
            infos = {"final_obs": final, "_final_obs": ended}
        return (
            self._array(obs),
            reward.double().cpu().numpy(),
            terminated.cpu().numpy(),
            truncated.cpu().numpy(),
            infos,
        )

    def render(self) -> Any:
        return self.tensor_env.render()

    def close_extras(self, **kwargs: Any) -> None:
        self.tensor_env.close()
