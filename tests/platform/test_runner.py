"""`TensorEnvRunner`: what it returns, on every kind of environment and module, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray
import torch
from gymnasium import spaces
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from mobula import registry
from mobula.algorithms.policy_gradient.baselines.ppo import PPOConfig
from mobula.envs.classic import CartPole, Pendulum
from mobula.errors import ConfigError, EnvironmentFault
from mobula.sampling.rollout import Rollout, concatenate
from mobula.sampling.runner import TensorEnvRunner, _segments
from mobula.sampling.tensor_env import State, TensorEnv

pytestmark = pytest.mark.usefixtures("ray_session")


class Counter(TensorEnv):
    """Observes (index of the environment, step); reward is the step; index i ends after 2 + i steps."""

    def __init__(self, num_envs: int = 1, *, agents: int | None = None, **kwargs: Any) -> None:
        self.num_agents = agents
        box = spaces.Box(-1e6, 1e6, (2,), np.float32)
        super().__init__(num_envs, observation_space=box, action_space=spaces.Discrete(3), **kwargs)

    def initial(self, n: int) -> State:
        if not self.state:
            index = torch.arange(n)
        else:
            index = self.state["index"][self.ending]
        return {"index": index, "step": torch.zeros(n, dtype=torch.int64)}

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        step = state["step"] + 1
        reward = step.float()
        terminated = step >= 2 + state["index"]
        self.ending = (
            (self.over if self.autoreset_mode.value == "NextStep" else terminated).nonzero().flatten()
        )
        if self.num_agents is not None:
            reward = reward[:, None].expand(-1, self.num_agents) * action.new_tensor([1, 10])
        return {"index": state["index"], "step": step}, reward.float(), terminated

    def observe(self, state: State) -> Tensor:
        obs = torch.stack([state["index"], state["step"]], dim=-1).float()
        return obs if self.num_agents is None else obs[:, None].expand(-1, self.num_agents, -1)


def runner(
    env: Any, num_envs: int = 4, seed: int = 0, config: Any = None, **env_config: Any
) -> TensorEnvRunner:
    config = (config or PPOConfig()).environment(env, env_config=env_config).debugging(seed=seed)
    config.env_runners(num_envs_per_env_runner=num_envs)
    return TensorEnvRunner(config=config, worker_index=0)


def sample(made: TensorEnvRunner, **kwargs: Any) -> Rollout:
    (rollout,) = made.sample(**kwargs)
    return rollout


def test_shapes_and_continuation() -> None:
    made = runner(CartPole)
    first, second = sample(made, num_timesteps=40), sample(made, num_timesteps=4)
    assert first["obs"].shape == (10, 4, 4)
    assert first["actions"].shape == first["action_logp"].shape == first["rewards"].shape == (10, 4)
    assert first["action_dist_inputs"].shape == (10, 4, 2)
    assert (first.env_steps(), second.env_steps()) == (40, 4)
    assert torch.equal(second["obs"][0], first["new_obs"][-1])


def test_log_probabilities_are_those_of_the_module() -> None:
    rollout = sample(runner(CartPole), num_timesteps=40)
    wanted = torch.distributions.Categorical(logits=rollout["action_dist_inputs"]).log_prob(
        rollout["actions"]
    )
    assert torch.allclose(rollout["action_logp"], wanted)
    rollout = sample(runner(Pendulum), num_timesteps=40)
    mean, log_std = rollout["action_dist_inputs"].chunk(2, dim=-1)
    wanted = torch.distributions.Normal(mean, log_std.exp()).log_prob(rollout["actions"]).sum(-1)
    assert torch.allclose(rollout["action_logp"], wanted, atol=1e-6)


def test_drawn_actions_follow_the_distribution() -> None:
    from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchDiagGaussian

    from mobula.sampling.actions import draw

    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0])
    drawn = draw(TorchCategorical, logits.expand(200_000, 3), explore=True, generator=g)
    frequency = torch.bincount(drawn, minlength=3) / 200_000
    assert torch.allclose(frequency, logits.softmax(0), atol=5e-3)
    inputs = torch.tensor([2.0, -0.5]).expand(200_000, 2)
    drawn = draw(TorchDiagGaussian, inputs, explore=True, generator=g)
    assert float(drawn.mean()) == pytest.approx(2.0, abs=0.01)
    assert float(drawn.std()) == pytest.approx(float(np.exp(-0.5)), abs=0.01)
    assert torch.equal(draw(TorchDiagGaussian, inputs, explore=False, generator=g), inputs[:, :1])


def test_continuous_actions_reach_the_space_as_rllib_unsquashes_them() -> None:
    seen = []

    class Spy(Pendulum):
        def transition(self, state: State, action: Tensor) -> Any:
            seen.append(action)
            return super().transition(state, action)

    rollout = sample(runner(Spy), num_timesteps=400)
    assert torch.allclose(torch.stack(seen), 2 * rollout["actions"].clamp(-1, 1))


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_ends_and_last_observations(mode: str) -> None:
    made = runner(Counter, 3, autoreset_mode=mode)
    rollout = sample(made, num_timesteps=3 * 20)
    flat = rollout.flatten()
    # Every transition that counts goes from step t to step t + 1 of the same environment, across all resets.
    assert torch.equal(flat["new_obs"][:, 0], flat["obs"][:, 0])
    assert torch.equal(flat["new_obs"][:, 1], flat["obs"][:, 1] + 1)
    assert torch.equal(flat["rewards"], flat["new_obs"][:, 1])
    assert torch.equal(flat["terminateds"], flat["new_obs"][:, 1] >= 2 + flat["obs"][:, 0])
    skipped = 3 * 20 - len(flat["rewards"])
    assert skipped == (int(rollout.done()[:-1].sum()) if mode == "NextStep" else 0)
    assert rollout.env_steps() == len(flat["rewards"])


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_episode_returns_and_lengths(mode: str) -> None:
    made = runner(Counter, 3, autoreset_mode=mode)
    for _ in range(7):
        made.sample(num_timesteps=3 * 5)
    metrics = made.get_metrics()
    # Episodes of environment i last 2 + i steps and pay 1 + 2 + ... + (2 + i).
    assert metrics["episode_len_min"].peek() == 2
    assert metrics["episode_len_max"].peek() == 4
    assert metrics["episode_return_min"].peek() == 3
    assert metrics["episode_return_max"].peek() == 10


def test_whole_episodes_are_the_same_number_from_each_environment() -> None:
    made = runner(Counter, 3)
    rollout = sample(made, num_episodes=7)
    ended = rollout["loss_mask"] & rollout.done()
    assert ended.sum(0).tolist() == [3, 2, 2]
    metrics = made.get_metrics()
    assert metrics["num_episodes"].peek() == 7
    assert rollout.env_steps() == 3 * 2 + 2 * 3 + 2 * 4


def test_time_limits_truncate_and_do_not_terminate() -> None:
    rollout = sample(runner(Pendulum, 2, max_episode_steps=5), num_timesteps=2 * 12)
    assert rollout["truncateds"].sum(0).tolist() == [2, 2]
    assert not rollout["terminateds"].any()
    assert not torch.equal(rollout["new_obs"][4], rollout["obs"][5])


def test_a_trigger_stops_the_rollout_and_a_reduction_is_sent_instead() -> None:
    made = runner(Counter, 2)
    rollout = sample(made, until=lambda step: bool(step["terminateds"].any()))
    assert rollout.num_steps == 2
    (total,) = made.sample(num_timesteps=8, reduce=lambda rollout, module: float(rollout["rewards"].sum()))
    assert isinstance(total, float)


def test_an_agent_axis() -> None:
    made = runner(Counter, 3, agents=2)
    rollout = sample(made, num_timesteps=3 * 8)
    assert rollout["obs"].shape == (8, 3, 2, 2)
    assert rollout["actions"].shape == rollout["rewards"].shape == rollout["action_logp"].shape == (8, 3, 2)
    assert rollout["terminateds"].shape == (8, 3)
    assert rollout.agent_steps() == 48
    # The return of an episode is the sum over agents: (1 + 10) times that of one.
    assert made.get_metrics()["episode_return_min"].peek() == 33


class Recurrent(TorchRLModule):
    """Its state counts the steps since the last reset."""

    def setup(self) -> None:
        self.scale = nn.Parameter(torch.ones(()))

    def get_initial_state(self) -> dict[str, Tensor]:
        return {"h": torch.zeros(1)}

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        assert batch["obs"].ndim == 3
        return {
            "state_out": {"h": batch["state_in"]["h"] + 1},
            "action_dist_inputs": self.scale * torch.zeros(*batch["obs"].shape[:2], 3),
        }


def test_recurrent_state_is_carried_and_reset() -> None:
    config = PPOConfig().rl_module(rl_module_spec=RLModuleSpec(module_class=Recurrent))
    made = runner(Counter, 3, config=config)
    for _ in range(3):
        rollout = sample(made, num_timesteps=3 * 7)
        # The environment's own clock is the wanted count.
        assert torch.equal(rollout["state_in/h"].squeeze(-1), rollout["obs"][..., 1])


def test_the_same_seed_gives_the_same_rollout() -> None:
    first, second = (sample(runner(CartPole, seed=5), num_timesteps=400) for _ in range(2))
    other = sample(runner(CartPole, seed=6), num_timesteps=400)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["obs"], other["obs"])


def test_runners_of_one_group_draw_differently() -> None:
    config = PPOConfig().environment(CartPole).debugging(seed=1).env_runners(num_env_runners=2)
    one, two = (TensorEnvRunner(config=config, worker_index=i, num_workers=2) for i in (1, 2))
    assert not torch.equal(sample(one, num_timesteps=64)["obs"], sample(two, num_timesteps=64)["obs"])


class Broken(CartPole):
    """Returns a NaN in environment 2 at its 6th step."""

    what = "reward"

    def transition(self, state: State, action: Tensor) -> Any:
        new, reward, terminated = super().transition(state, action)
        if int(self.elapsed[2]) == 5:
            if self.what == "reward":
                reward[2] = float("nan")
            else:
                new["state"][2, 1] = float("nan")
        return new, reward, terminated


class BrokenObservation(Broken):
    """Returns a NaN observation in environment 2 at its 6th step."""

    what = "observation"


@pytest.mark.parametrize("cls", [Broken, BrokenObservation])
def test_a_nan_names_environment_and_step(cls: type[Broken]) -> None:
    made = runner(cls)
    made.sample(num_timesteps=8)
    with pytest.raises(EnvironmentFault, match=rf"{cls.what}.*environment index 2, step 5"):
        made.sample(num_timesteps=4 * 20)


def test_tasks_that_never_end_have_no_episodes() -> None:
    made = runner("goal_grid", 2)
    with pytest.raises(ConfigError, match="never ends"):
        made.sample(num_episodes=3)
    made.sample(num_timesteps=10)
    assert "episode_return_mean" not in made.get_metrics()


def test_rollouts_travel_and_join() -> None:
    rollout = sample(runner(CartPole), num_timesteps=40)
    back = ray.get(ray.put(rollout))
    assert isinstance(back, Rollout)
    assert all(torch.equal(back[name], rollout[name]) for name in rollout)
    back["rewards"].zero_()
    assert concatenate([rollout, back])["rewards"].shape == (10, 8)


def test_segments() -> None:
    values = torch.tensor([[1.0, 1.0], [2.0, 10.0], [4.0, 100.0], [8.0, 1000.0]], dtype=torch.float64)
    ends = torch.tensor([[False, True], [True, False], [False, True], [True, False]])
    count, sums, carried = _segments(values, ends, torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert count == 4
    assert sorted(sums.tolist()) == [1.25, 3.5, 12.0, 110.0]
    assert carried.tolist() == [0.0, 1000.0]


def test_rllib_s_own_runner_takes_tensor_environments() -> None:
    from ray.rllib.algorithms.ppo import PPOConfig as RLlibPPOConfig

    name = registry.register_with_ray("cartpole")
    config = RLlibPPOConfig().environment(name).debugging(seed=0, log_level="ERROR")
    config.env_runners(
        num_env_runners=0, num_envs_per_env_runner=3, gym_env_vectorize_mode="vector_entry_point"
    )
    algorithm = config.training(
        train_batch_size_per_learner=300, minibatch_size=100, num_epochs=1
    ).build_algo()
    result = algorithm.train()
    algorithm.stop()
    assert result["env_runners"]["num_env_steps_sampled"] >= 300
    assert 5 < result["env_runners"]["episode_return_mean"] < 100
