"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347): RLlib's loss and settings, sampling and minibatches
on tensors.

The settings are RLlib's `PPOConfig`'s (same names, same meaning), the loss is RLlib's `PPOTorchLearner`'s.  What differs
is that nothing between the environment and the optimizer leaves torch, that observation statistics are part of the
module, and that the defaults suit many environments in a batch.  RLlib's own PPO is there as `rllib:PPO`.
"""

from __future__ import annotations

from typing import Any

import torch
from ray import tune
from ray.rllib.algorithms.ppo.ppo import PPOConfig as RLlibPPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.evaluation.postprocessing import Postprocessing
from torch import Tensor

from mobula.learning.advantages import gae
from mobula.learning.learners import Batch, TensorLearner
from mobula.learning.modules import ActorCritic
from mobula.method import Method, MethodConfig, hyperparameter
from mobula.sampling.rollout import concatenate


class PPOConfig(MethodConfig, RLlibPPOConfig):
    """PPO on tensors: clipped surrogate, GAE, RLlib's loss and settings (Schulman et al. 2017, arXiv 1707.06347)."""

    citation = """@article{schulman2017ppo,
  title   = {Proximal Policy Optimization Algorithms},
  author  = {Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg},
  journal = {arXiv preprint arXiv:1707.06347},
  year    = {2017}
}"""
    when = (
        "Use it as the on-policy baseline wherever an environment can be stepped in a batch; it is robust and fast. "
        "It learns nothing from logged data, and where samples are expensive an off-policy method (SAC) needs fewer."
    )

    effort = (
        "An iteration samples rollout_length steps of every environment and takes num_epochs passes over them in minibatches: on pendulum with"
        " the defaults, 4,096 steps and 80 gradient steps in 0.52 s of one core."
    )
    default_stop = {"env_steps": 1_000_000}

    lr = hyperparameter(1e-3, tune.loguniform(1e-5, 1e-2), "step size of Adam (or RLlib's schedule)", low=0.0)
    gamma = hyperparameter(0.99, tune.uniform(0.9, 0.999), "discount", low=0.0, high=1.0)
    lambda_ = hyperparameter(
        0.95, tune.uniform(0.8, 1.0), "lambda of generalised advantage estimation", low=0.0, high=1.0
    )
    clip_param = hyperparameter(0.2, tune.uniform(0.1, 0.4), "clip of the probability ratio", low=0.0)
    use_kl_loss = hyperparameter(False, None, "adds the adaptive KL penalty")
    kl_coeff = hyperparameter(0.2, None, "first coefficient of the KL penalty", low=0.0)
    kl_target = hyperparameter(0.01, None, "KL divergence that the penalty aims at", low=0.0)
    entropy_coeff = hyperparameter(0.0, tune.loguniform(1e-5, 1e-2), "weight of the entropy bonus", low=0.0)
    vf_loss_coeff = hyperparameter(0.5, tune.uniform(0.25, 1.0), "weight of the value loss", low=0.0)
    vf_clip_param = hyperparameter(1e4, None, "clip of the squared value error", low=0.0)
    grad_clip = hyperparameter(
        0.5, tune.choice([0.5, 1.0, 10.0]), "largest global norm of the gradient", low=0.0
    )
    num_epochs = hyperparameter(10, tune.choice([3, 5, 10]), "passes over each batch", low=1)
    minibatch_size = hyperparameter(512, tune.choice([128, 256, 512, 1024]), "rows of a gradient step", low=1)
    rollout_length = hyperparameter(
        128, tune.choice([32, 64, 128, 256]), "steps of each environment in a batch", low=1
    )
    normalize_observations = hyperparameter(
        False, tune.choice([False, True]), "running mean and variance of observations"
    )
    normalize_rewards = hyperparameter(
        False, tune.choice([False, True]), "divides rewards by the running deviation of the discounted return"
    )
    hidden = hyperparameter([64, 64], tune.choice([[64, 64], [256, 256]]), "hidden layers of both networks")
    activation = hyperparameter("tanh", None, "activation", choices=["tanh", "relu", "elu", "silu"])
    initial_log_std = hyperparameter(0.0, None, "first log standard deviation of continuous actions")

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self.env_runners(num_envs_per_env_runner=32)
        self.grad_clip_by = "global_norm"

    def validate(self) -> None:
        # RLlib holds minibatch_size against a batch size that has no part here; a minibatch larger than the batch is the batch.
        batch = self.rollout_length * self.num_envs_per_env_runner * max(1, self.num_env_runners)
        self.train_batch_size_per_learner = max(batch // max(1, self.num_learners), self.minibatch_size)
        super().validate()

    def get_default_learner_class(self) -> Any:
        return PPOTensorLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        names = ("hidden", "activation", "normalize_observations", "initial_log_std")
        return RLModuleSpec(
            module_class=ActorCritic, model_config={name: getattr(self, name) for name in names}
        )

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}


class PPOTensorLearner(PPOTorchLearner, TensorLearner):
    """RLlib's PPO loss; advantages and normalisation on tensors."""

    def build(self) -> None:
        super().build()
        self._return_square = torch.zeros((), dtype=torch.float64)
        self._return_count = torch.zeros((), dtype=torch.float64)
        self._discounted: Tensor | None = None

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Rollout [T, B, (A), ...] -> rows [N, ...] with advantages and value targets."""
        module, config = self.rl_module, self.config
        obs, new_obs = batch[Columns.OBS], batch[Columns.NEXT_OBS]
        terminated, truncated = batch[Columns.TERMINATEDS], batch[Columns.TRUNCATEDS]
        done = terminated | truncated
        rewards = batch[Columns.REWARDS].float()
        if config.normalize_rewards:
            rewards = self._scaled(rewards, done)
        values = module.compute_values({Columns.OBS: obs})
        # The value of a reached state is that of the next row, but for the last row and where an episode ended.
        next_values = torch.cat([values[1:], module.compute_values({Columns.OBS: new_obs[-1:]})])
        step, env = truncated[:-1].nonzero(as_tuple=True)
        if len(step):
            next_values[step, env] = module.compute_values({Columns.OBS: new_obs[step, env]})
        advantages = gae(rewards, values, next_values, terminated, done, config.gamma, config.lambda_)
        rows = {
            Columns.OBS: obs,
            Columns.ACTIONS: batch[Columns.ACTIONS],
            Columns.ACTION_LOGP: batch[Columns.ACTION_LOGP],
            Columns.ACTION_DIST_INPUTS: batch[Columns.ACTION_DIST_INPUTS],
            Postprocessing.ADVANTAGES: advantages,
            Postprocessing.VALUE_TARGETS: advantages + values,
        }
        axes = rewards.ndim
        flat = {name: value.flatten(0, axes - 1) for name, value in rows.items()}
        if Columns.LOSS_MASK in batch:
            mask = batch[Columns.LOSS_MASK]
            mask = mask.unsqueeze(-1).expand_as(rewards).flatten() if axes == 3 else mask.flatten()
            flat = {name: value[mask] for name, value in flat.items()}
        flat[Postprocessing.ADVANTAGES] = self._standardized(flat[Postprocessing.ADVANTAGES])
        if config.normalize_observations:
            # After the advantages: they belong to the values that the rollout was taken with.
            self._update_statistics(flat[Columns.OBS])
        return flat

    def _standardized(self, values: Tensor) -> Tensor:
        """Zero mean, unit deviation over the batch of all learners."""
        moments = torch.stack([values.new_tensor(len(values)), values.sum(), values.square().sum()]).double()
        count, total, squares = self.all_reduce(moments, mean=False)
        mean = total / count
        deviation = (squares / count - mean**2).clamp_min(0.0).sqrt()
        return (values - mean.float()) / (deviation.float() + 1e-4)

    def _scaled(self, rewards: Tensor, done: Tensor) -> Tensor:
        """Rewards over the running root mean square of the discounted return of each environment."""
        if self._discounted is None or self._discounted.shape != rewards.shape[1:]:
            self._discounted = torch.zeros_like(rewards[0])
        alive = (~done).view(*done.shape, *[1] * (rewards.ndim - 2)).float()
        square = torch.zeros((), dtype=torch.float64)
        for t in range(len(rewards)):
            self._discounted = self._discounted * self.config.gamma + rewards[t]
            square += self._discounted.double().square().sum()
            self._discounted = self._discounted * alive[t]
        moments = torch.stack([square, torch.tensor(float(rewards.numel()), dtype=torch.float64)])
        square, count = self.all_reduce(moments, mean=False)
        self._return_square, self._return_count = self._return_square + square, self._return_count + count
        return rewards / (self._return_square / self._return_count).sqrt().clamp_min(1e-4).float()

    def _update_statistics(self, obs: Tensor) -> None:
        encoder = self.rl_module.encoder
        features = encoder.features(obs).double()
        moments = torch.cat([features.new_tensor([len(features)]), features.sum(0), features.square().sum(0)])
        moments = self.all_reduce(moments, mean=False)
        encoder.update_statistics(moments[0], *moments[1:].chunk(2))

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().get_state(*args, **kwargs)
        return {**state, "reward_scale": (self._return_square, self._return_count)}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "reward_scale" in state:
            self._return_square, self._return_count = state["reward_scale"]


class PPO(Method, config=PPOConfig):
    """Proximal policy optimisation on tensors."""

    config: PPOConfig

    def training_step(self) -> None:
        envs = self.config.num_envs_per_env_runner
        batch = concatenate(self.sample(num_timesteps=self.config.rollout_length * envs))
        self.learn(batch, num_epochs=self.config.num_epochs, minibatch_size=self.config.minibatch_size)
