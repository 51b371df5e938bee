"""An episodic environment as one that never ends: a reset is a transition."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AutoresetMode
from torch import Tensor

from mobula.errors import ConfigError
from mobula.sampling.tensor_env import Info, TensorEnv


class ContinuingWrapper(TensorEnv):
    """Makes a reset a transition: the step that ends an episode keeps its reward and leads to the next first state.

    No flag is ever set, as average-reward methods need.  The inner environment resets in the same step.
    """

    continuing = True

    def __init__(self, env: TensorEnv) -> None:
        self.env = env
        if env.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ConfigError("ContinuingWrapper needs an environment with same-step autoreset")
        self.num_agents = env.num_agents
        super().__init__(
            env.num_envs,
            observation_space=env.single_observation_space,
            action_space=env.single_action_space,
            device=env.device,
            render_mode=env.render_mode,
        )
        self.reward_range = env.reward_range

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        return self.env.reset(seed=seed, options=options)

    def seed(self, seed: int) -> None:
        self.env.seed(seed)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        obs, reward, terminated, truncated, _ = self.env.step(actions)
        never = (terminated | truncated).zero_()
        return obs, reward, never, never, {}

    def get_state(self) -> dict[str, Any]:
        return self.env.get_state()

    def set_state(self, saved: Any) -> None:
        self.env.set_state(saved)

    def render(self) -> Any:
        return self.env.render()

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()
