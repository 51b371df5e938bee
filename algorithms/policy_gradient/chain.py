"""What average-reward policy-gradient methods on a chain share: policy, critic and gain estimate; directions; checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor, nn

from mobula.errors import ConfigError, EnvironmentFault
from mobula.learning.modules import Encoder, TensorModule, mlp
from mobula.method import Method, MethodConfig, hyperparameter
from mobula.sampling.continuing import ContinuingWrapper
from mobula.sampling.tensor_env import TensorEnv

NO_DISCOUNT = {"gamma": "there is no discount in the average-reward criterion"}


class ChainModule(TensorModule):
    """Policy pi_theta, differential value V_omega and gain estimate eta.

    Discrete observations: tables theta [S, A] and omega [S] in float64, uniform policy and zero value at first.
    Box observations: two ReLU networks (model_config["hidden"]) in float32.
    """

    eta: Tensor

    def setup(self) -> None:
        actions = int(self.action_space.n)
        self.tabular = isinstance(self.observation_space, spaces.Discrete)
        self.register_buffer("eta", torch.zeros((), dtype=torch.float64))
        if self.tabular:
            states = int(self.observation_space.n)
            self.theta = nn.Parameter(torch.zeros(states, actions, dtype=torch.float64))
            self.omega = nn.Parameter(torch.zeros(states, dtype=torch.float64))
        else:
            hidden = list(self.model_config["hidden"])
            self.encoder = Encoder(self.observation_space)
            self.pi = mlp([self.encoder.size, *hidden, actions], "relu", last_gain=0.01)
            self.vf = mlp([self.encoder.size, *hidden, 1], "relu")

    def logits(self, obs: Tensor) -> Tensor:
        """[..., A]."""
        out: Tensor = self.theta[obs] if self.tabular else self.pi(self.encoder(obs))
        return out

    def value(self, obs: Tensor) -> Tensor:
        """V_omega(obs), [...]; defined up to a constant."""
        out: Tensor = self.omega[obs] if self.tabular else self.vf(self.encoder(obs)).squeeze(-1)
        return out

    def actor_parameters(self) -> list[nn.Parameter]:
        return [self.theta] if self.tabular else list(self.pi.parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        return [self.omega] if self.tabular else list(self.vf.parameters())

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.logits(batch[Columns.OBS])}

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Fields that a served policy answers with, for observations [B, ...]."""
        obs = batch[Columns.OBS]
        return {
            "probabilities": self.logits(obs).softmax(-1),
            "differential_value": self.value(obs),
            "avg_reward_estimate": self.eta.expand(obs.shape[0]),
        }


class ChainConfig(MethodConfig):
    """Average-reward methods on chains that never end (base class)."""

    rejected = NO_DISCOUNT
    default_env = "goal_grid"
    default_stop = {"env_steps": 20_000}

    features = hyperparameter(
        "auto",
        None,
        "tables or networks; auto: tables for discrete observations",
        choices=["auto", "tabular", "mlp"],
    )
    hidden = hyperparameter([200, 200], tune.choice([[64, 64], [200, 200]]), "hidden layers of the networks")
    continuing_wrapper = hyperparameter(
        True, None, "takes episodic environments by making a reset a transition; otherwise they are refused"
    )
    r_min = hyperparameter(
        None, None, "smallest reward, lower clip of eta (default: what the environment declares)"
    )
    r_max = hyperparameter(
        None, None, "largest reward, upper clip of eta (default: what the environment declares)"
    )
    report_every = hyperparameter(500, None, "transitions of one training iteration (of reports)", low=1)

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        # The optimum of these problems is a stochastic policy as it is trained; there are no episodes to count.
        self.evaluation(
            evaluation_duration=10_000,
            evaluation_duration_unit="timesteps",
            evaluation_config={"explore": True},
        )

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=ChainModule, model_config={"hidden": list(self.hidden)})

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}

    def validate(self) -> None:
        super().validate()
        if self.r_min is not None and self.r_max is not None and not self.r_min < self.r_max:
            raise ConfigError(f"r_min={self.r_min} must lie below r_max={self.r_max}")

    def adapt_env(self, env: TensorEnv) -> TensorEnv:
        name = type(self).__name__
        if not isinstance(env.single_action_space, spaces.Discrete):
            raise ConfigError(
                f"{name} takes discrete actions; {self.env} has {env.single_action_space}. PPO takes continuous ones."
            )
        tabular = isinstance(env.single_observation_space, spaces.Discrete)
        if self.features == "tabular" and not tabular:
            raise ConfigError(
                f"{name}: features='tabular' needs discrete observations; {self.env} has"
                f" {env.single_observation_space}. Set features='mlp' (or 'auto')."
            )
        if self.features == "mlp" and tabular:
            raise ConfigError(f"{name}: features='mlp' needs box observations; {self.env} has discrete ones")
        if env.continuing:
            return env
        if not self.continuing_wrapper:
            raise ConfigError(
                f"{self.env} has episodes: average reward needs a continuing task; wrap resets as transitions"
                " (continuing_wrapper=True)"
            )
        return ContinuingWrapper(env)


def directions(
    module: ChainModule, batch: Mapping[str, Tensor], *, entropy_coeff: float = 0.0
) -> list[list[Tensor]]:
    """Weighted sums of the per-sample directions f, g, h, all at the same (eta, omega, theta).

    batch: obs, actions, rewards, new_obs, weight [N].  With delta_i = r_i - eta + V(s'_i) - V(s_i):

        f = sum_i w_i (r_i - eta),  g = sum_i w_i delta_i grad V(s_i),  h = sum_i w_i delta_i grad log pi(a_i|s_i)

    g is the semi-gradient of TD (s' is not differentiated).  Returns [[f], g, h], g and h one tensor a parameter.
    """
    obs, weight = batch[Columns.OBS], batch["weight"]
    values = module.value(obs)
    log_pi = module.logits(obs).log_softmax(-1)
    with torch.no_grad():
        excess = batch[Columns.REWARDS] - module.eta
        delta = excess + module.value(batch[Columns.NEXT_OBS]) - values
    chosen = log_pi.gather(-1, batch[Columns.ACTIONS].unsqueeze(-1)).squeeze(-1)
    actor = weight * delta * chosen
    if entropy_coeff:
        actor = actor - weight * entropy_coeff * (log_pi.exp() * log_pi).sum(-1)
    g = torch.autograd.grad((weight * delta * values).sum(), module.critic_parameters())
    h = torch.autograd.grad(actor.sum(), module.actor_parameters())
    return [[(weight * excess).sum()], list(g), list(h)]


class ChainMethod(Method):
    """Base of the algorithms: knows the reward range, watches the rewards and the entropy of the policy."""

    config: ChainConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        declared = self._runners().foreach_env_runner(
            lambda runner: runner.env.reward_range if runner.env is not None else None
        )
        low, high = next((found for found in declared if found is not None), (None, None))
        self.reward_range: tuple[float | None, float | None] = (
            self.config.r_min if self.config.r_min is not None else low,
            self.config.r_max if self.config.r_max is not None else high,
        )

    def check_rewards(self, rewards: Tensor) -> None:
        """Raises EnvironmentFault where a reward leaves the declared range: the clip of eta would hide it."""
        low, high = self.reward_range
        least, most = float(rewards.min()), float(rewards.max())
        if (low is not None and least < low - 1e-6) or (high is not None and most > high + 1e-6):
            raise EnvironmentFault(
                f"{self.config.env} returned rewards in [{least:g}, {most:g}], outside [r_min, r_max] = [{low}, {high}]:"
                " set r_min and r_max to the range of the rewards"
            )


def clip_gain(eta: Tensor, reward_range: tuple[float | None, float | None]) -> Tensor:
    """eta within the declared rewards; as it is where none are declared."""
    low, high = reward_range
    return eta if low is None and high is None else eta.clamp(low, high)
