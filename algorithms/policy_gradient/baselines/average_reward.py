"""Average-reward actor-critic with a fixed rollout length and constant steps: what MAC's random lengths are measured against."""

from __future__ import annotations

from typing import Any

import torch
from ray import tune
from ray.rllib.core.columns import Columns

from mobula.algorithms.policy_gradient.chain import ChainConfig, ChainMethod, clip_gain, directions
from mobula.learning.learners import Batch, Learner
from mobula.method import hyperparameter
from mobula.sampling.rollout import Rollout, concatenate


class ACFixedConfig(ChainConfig):
    """Average-reward actor-critic with fixed rollouts and constant steps (baseline of MAC)."""

    when = "The plain competitor of MAC. It does well once rollout length and steps are tuned to the mixing time of the task at hand."

    rollout_length = hyperparameter(8, tune.choice([4, 8, 16, 32]), "H_r: steps of a rollout", low=1)
    lr_actor = hyperparameter(1.0, tune.loguniform(0.03, 10), "constant step of the actor", low=0.0)
    lr_critic = hyperparameter(
        0.5, tune.loguniform(0.01, 1), "constant step of the critic; 0: no critic", low=0.0
    )
    lr_reward = hyperparameter(
        0.01, tune.loguniform(1e-3, 0.1), "constant step of the gain estimate", low=0.0
    )

    def get_default_learner_class(self) -> Any:
        return SGDLearner


class ReinforceAvgConfig(ACFixedConfig):
    """REINFORCE with the gain as baseline, (r - eta) grad log pi (baseline of MAC)."""

    when = "The simplest competitor: no critic, so credit reaches only the action that was rewarded at once."

    lr_critic = hyperparameter(0.0, None, "no critic: the value stays 0", low=0.0, high=0.0)


class SGDLearner(Learner):
    """eta, omega and theta each move a constant step along the mean direction of the rollout."""

    def learn(self, batch: Batch, *, reward_range: tuple[float | None, float | None]) -> None:
        module, config = self.rl_module, self.config
        rows = batch.flatten() if isinstance(batch, Rollout) else dict(batch)
        dtype = rows[Columns.OBS].dtype if rows[Columns.OBS].is_floating_point() else torch.float64
        count = len(rows[Columns.REWARDS])
        rows["weight"] = torch.full((count,), 1 / count, dtype=dtype)
        (f,), g, h = [[self.all_reduce(part) for part in parts] for parts in directions(module, rows)]
        with torch.no_grad():
            module.eta.copy_(clip_gain(module.eta + config.lr_reward * f, reward_range))
            for parameter, direction in zip(module.critic_parameters(), g, strict=True):
                parameter.add_(config.lr_critic * direction)
            for parameter, direction in zip(module.actor_parameters(), h, strict=True):
                parameter.add_(config.lr_actor * direction)
        self.log({"eta": module.eta.item()})


class ACFixed(ChainMethod, config=ACFixedConfig):
    """Fixed rollouts, constant steps."""

    config: ACFixedConfig

    def training_step(self) -> None:
        steps = self.config.rollout_length * self.config.num_envs_per_env_runner
        taken, done = 0, False
        while not done:
            taken += steps * max(1, self.config.num_env_runners)
            done = taken >= self.config.report_every
            rollout = concatenate(self.sample(num_timesteps=steps, report=done))
            self.check_rewards(rollout[Columns.REWARDS])
            self.learn(rollout, reward_range=self.reward_range, report=done)


class ReinforceAvg(ACFixed, config=ReinforceAvgConfig):
    """Fixed rollouts without a critic."""
