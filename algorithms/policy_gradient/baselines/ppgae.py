"""PPGAE: parameterised policy gradient with advantage estimation from one trajectory (Bai, Mondal, Aggarwal; AAAI 2024,
arXiv 2309.01922).

The policy is fixed for an epoch of H_e steps.  The advantage of each visited pair is estimated from sub-trajectories of the
same epoch that are far enough apart to be nearly independent; theory wants their length to be a multiple of the mixing
time, which nobody knows.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.columns import Columns
from torch import Tensor

from mobula.algorithms.policy_gradient.chain import ChainConfig, ChainMethod
from mobula.errors import ConfigError
from mobula.learning.learners import Batch, Learner
from mobula.method import hyperparameter
from mobula.sampling.rollout import concatenate
from mobula.sampling.tensor_env import TensorEnv


def window_statistics(
    states: Tensor, actions: Tensor, rewards: Tensor, window: int, num_states: int, num_actions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the windows of an epoch, for each of B chains.

    states, actions [H, B] int64, rewards [H, B].  A visit of s at time tau opens a window with
    y = sum_{u=tau}^{tau+N-1} r_u if it is complete (tau + N <= H) and no window of s was opened in the 2N steps
    before.  Returns (number of windows [B, S], sum of y [B, S], sum of y by first action [B, S, A]).
    """
    horizon, chains = states.shape
    prefix = torch.cat([rewards.new_zeros(1, chains, dtype=torch.float64), rewards.double().cumsum(0)])
    row = torch.arange(chains)
    free = torch.zeros(chains, num_states, dtype=torch.int64)
    count = torch.zeros(chains, num_states, dtype=torch.float64)
    total = torch.zeros_like(count)
    by_action = torch.zeros(chains, num_states, num_actions, dtype=torch.float64)
    # Whether a window opens depends on the last one of the same state: the scan is sequential in time.
    for tau in range(horizon - window + 1):
        s, a = states[tau], actions[tau]
        opens = free[row, s] <= tau
        y = torch.where(opens, prefix[tau + window] - prefix[tau], 0.0)
        count[row, s] += opens
        total[row, s] += y
        by_action[row, s, a] += y
        free[row, s] = torch.where(opens, tau + 2 * window, free[row, s])
    return count, total, by_action


def advantages(count: Tensor, total: Tensor, by_action: Tensor, pi: Tensor) -> Tensor:
    """A(s, a) [B, S, A] = Q - V with V(s) = mean y, Q(s, a) = mean(y 1{a}) / pi(a|s); 0 where no window is complete."""
    windows = count.clamp_min(1.0)
    value = total / windows
    q = by_action / windows[..., None] / pi
    return torch.where(count[..., None] > 0, q - value[..., None], 0.0)


class PPGAEConfig(ChainConfig):
    """Average-reward policy gradient with epoch-wise advantage estimates (Bai, Mondal, Aggarwal; AAAI 2024, arXiv 2309.01922)."""

    citation = """@inproceedings{bai2024ppgae,
  title     = {Regret Analysis of Policy Gradient Algorithm for Infinite Horizon Average Reward Markov Decision Processes},
  author    = {Bai, Qinbo and Mondal, Washim Uddin and Aggarwal, Vaneet},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2024},
  note      = {arXiv:2309.01922}
}"""
    when = (
        "The baseline of MAC. Its epochs and windows should grow with the mixing time, so it needs a long budget and "
        "either knowledge of that time or a search over `epoch_length` and `window`."
    )

    epoch_length = hyperparameter(1000, tune.choice([200, 500, 1000]), "H_e: steps of an epoch", low=1)
    window = hyperparameter(8, tune.choice([4, 8, 16]), "N: rewards summed in a window", low=1)
    lr = hyperparameter(100.0, tune.choice([10.0, 50.0, 100.0]), "alpha: step size of the policy", low=0.0)

    def get_default_learner_class(self) -> Any:
        return PPGAELearner

    def adapt_env(self, env: TensorEnv) -> TensorEnv:
        env = super().adapt_env(env)
        if not isinstance(env.single_observation_space, spaces.Discrete):
            raise ConfigError(
                f"PPGAE visits states by index and needs discrete observations; {self.env} has"
                f" {env.single_observation_space}. mac takes boxes."
            )
        return env

    def validate(self) -> None:
        super().validate()
        if self.window > self.epoch_length:
            raise ConfigError(f"window={self.window} is longer than epoch_length={self.epoch_length}")


class PPGAELearner(Learner):
    """theta <- theta + alpha / H_e sum_t A(s_t, a_t) grad log pi(a_t | s_t), the mean over chains."""

    @torch.no_grad()
    def learn(self, batch: Batch) -> None:
        module = self.rl_module
        states, actions, rewards = (batch[name] for name in (Columns.OBS, Columns.ACTIONS, Columns.REWARDS))
        horizon, chains = states.shape
        pi = module.theta.softmax(-1)
        statistics = window_statistics(states, actions, rewards, self.config.window, *pi.shape)
        A = advantages(*statistics, pi)
        weight = A[torch.arange(chains).expand_as(states), states, actions] / horizon
        # grad log pi(a|s) = e_a - pi(.|s) in row s of the table.
        gradient = torch.zeros_like(pi)
        gradient.index_put_((states, actions), weight, accumulate=True)
        per_state = torch.zeros(len(pi), dtype=pi.dtype).index_add_(0, states.flatten(), weight.flatten())
        gradient -= per_state[:, None] * pi
        gradient = self.all_reduce(gradient / chains)
        module.theta.add_(self.config.lr * gradient)
        module.eta.copy_(self.all_reduce(rewards.double().mean()))
        self.log({"eta": module.eta.item(), "actor_norm": gradient.norm().item()})


class PPGAE(ChainMethod, config=PPGAEConfig):
    """Epochs of a fixed policy, each followed by one step."""

    config: PPGAEConfig

    def training_step(self) -> None:
        chains = self.config.num_envs_per_env_runner
        rollout = concatenate(self.sample(num_timesteps=self.config.epoch_length * chains))
        self.check_rewards(rollout[Columns.REWARDS])
        self.learn(rollout)
