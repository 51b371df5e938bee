"""The agents that MarketRL trains: PPO and A2C on tensors, RLlib's SAC on the NumPy view, and how one plays a range of bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from torch import Tensor, nn

from mobula import registry
from mobula.envs.finance.market_env import MarketEnv
from mobula.errors import ConfigError
from mobula.learning.learners import Learner
from mobula.learning.modules import TensorModule, mlp

FAMILIES = ("ppo", "a2c", "sac")
COMPACT_FROM = 1024
"""Environments side by side from which observations are compact: with fewer, the gather saves nothing that shows."""


class Actor(nn.Module):
    """The deterministic policy of one agent: the mean of its distribution, in [-1, 1]."""

    def __init__(self, family: str, inputs: int, hidden: Sequence[int], actions: int) -> None:
        super().__init__()
        self.squashed = family == "sac"
        self.net = mlp([inputs, *hidden, actions], "relu" if self.squashed else "tanh")

    def forward(self, obs: Tensor) -> Tensor:
        mean: Tensor = self.net(obs)
        return mean.tanh() if self.squashed else mean.clamp(-1.0, 1.0)

    @torch.no_grad()
    def take(self, layers: Sequence[nn.Linear]) -> None:
        """Copies `layers`; of the last one the rows of the mean."""
        own = [m for m in self.net if isinstance(m, nn.Linear)]
        for mine, theirs in zip(own, layers, strict=True):
            mine.weight.copy_(theirs.weight[: mine.out_features])
            mine.bias.copy_(theirs.bias[: mine.out_features])


def stop_at(threshold: float) -> dict[str, Any]:
    """Settings of an environment whose turbulence stop acts above `threshold`."""
    # An infinite threshold is no JSON; nothing is above this one.
    bar = min(threshold, 1e300)
    return {"turbulence_q": None, "turbulence_threshold": bar, "turbulence_stop": True}


class MarketRLModule(TensorModule):
    """The agents of every family and which family acts; agents of one family (`n_seeds`) act by their mean.

    model_config: families, n_seeds, hidden.  Buffers: `selected`, the index of the family; `threshold` of turbulence; `fitted` [2], the
    instants (ns since 1970) from and before which the bars of the last window's training range end.
    """

    selected: Tensor
    threshold: Tensor
    fitted: Tensor

    def setup(self) -> None:
        config: dict[str, Any] = dict(self.model_config)
        self.families = list(config["families"])
        inputs = int(np.prod(self.observation_space.shape))
        outputs = int(np.prod(self.action_space.shape))
        self.actors = nn.ModuleDict(
            {
                family: nn.ModuleList(
                    Actor(family, inputs, config["hidden"], outputs) for _ in range(config["n_seeds"])
                )
                for family in self.families
            }
        )
        self.register_buffer("selected", torch.zeros((), dtype=torch.int64))
        self.register_buffer("threshold", torch.full((), torch.inf, dtype=torch.float64))
        self.register_buffer("fitted", torch.zeros(2, dtype=torch.int64))

    @property
    def acting(self) -> str:
        """The family that acts."""
        return str(self.families[int(self.selected)])

    def env_settings(self) -> dict[str, Any]:
        """Settings of the environment that the last window was traded in, but for its bars: scale, threshold, stop.

        Raises ConfigError before the first window.
        """
        if not int(self.fitted[1]):
            raise ConfigError("market_rl has traded no window yet: train it first")
        first, stop = (str(np.datetime64(int(at), "ns")) for at in self.fitted)
        return {"fit_start": first, "fit_end": stop, **stop_at(float(self.threshold))}

    def act_as(self, family: str, obs: Tensor) -> Tensor:
        """Actions [B, A] of a family."""
        group: Any = self.actors[family]
        return torch.stack([actor(obs) for actor in group]).mean(0)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.act_as(self.acting, batch[Columns.OBS].float())}

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """agent: index of the family that acts; threshold of the turbulence stop (-1: none)."""
        n = len(batch[Columns.OBS])
        bar = torch.where(self.threshold.isfinite(), self.threshold, -1.0)
        return {"agent": self.selected.expand(n), "threshold": bar.expand(n)}


class MarketRLLearner(Learner):
    """Holds the agents; they are trained by algorithms of their own."""

    @torch.no_grad()
    def learn(self, batch: Any) -> None:
        state = self.rl_module.state_dict()
        for name, value in batch.items():
            state[name].copy_(value)


def train_agent(
    family: str,
    env: str,
    env_config: dict[str, Any],
    config: Any,
    seed: int,
    warm: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Trains one agent on one range.  Returns (state of its `Actor`, all its weights for a warm start, steps taken)."""
    algorithm = build_agent(family, env, env_config, config, seed)
    steps = config.sac_steps if family == "sac" else config.steps
    module = algorithm.learner_group._learner.module[DEFAULT_MODULE_ID].unwrapped()
    taken = 0
    try:
        if warm is not None:
            module.load_state_dict(warm)
        while taken < steps:
            result = algorithm.train()
            taken = int(result["env_runners"]["num_env_steps_sampled_lifetime"])
        weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        return actor_of(family, module, config.hidden).state_dict(), weights, taken
    finally:
        algorithm.stop()


def actor_of(family: str, module: Any, hidden: Sequence[int]) -> Actor:
    """The deterministic policy of a trained module."""
    parts = [module.pi_encoder, module.pi] if family == "sac" else [module.pi]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]
    # RLlib's heads hold the deviations behind the means.
    actor = Actor(family, layers[0].in_features, hidden, int(np.prod(module.action_space.shape)))
    actor.take(layers)
    return actor


def build_agent(family: str, env: str, env_config: dict[str, Any], config: Any, seed: int) -> Any:
    """The algorithm that trains an agent of a family, by the settings of a MarketRLConfig."""
    if family == "sac":
        return _sac(env, env_config, config, seed)
    return _ppo(family, env, env_config, config, seed)


def _ppo(family: str, env: str, env_config: dict[str, Any], config: Any, seed: int) -> Any:
    made: Any = registry.config_class("PPO")()
    # The agents' own environments: no reader but the encoder, which sees the same either way.
    compact = config.num_envs >= COMPACT_FROM
    made.environment(env, env_config={**env_config, "compact_obs": compact})
    made.env_runners(num_envs_per_env_runner=config.num_envs)
    shared = {
        "lr": config.lr,
        "gamma": config.gamma,
        "entropy_coeff": config.entropy,
        "hidden": config.hidden,
        "normalize_rewards": True,
        "initial_log_std": -0.5,
    }
    if family == "a2c":
        # One step along the plain policy gradient a batch: the ratio is 1, so the clip has no part.
        made.training(
            **shared, num_epochs=1, minibatch_size=10**9, clip_param=1e9, lambda_=1.0, rollout_length=8
        )
    else:
        made.training(**shared, num_epochs=4, minibatch_size=256, rollout_length=32)
    made.debugging(seed=seed, log_level="ERROR")
    return made.build_algo()


def _sac(env: str, env_config: dict[str, Any], config: Any, seed: int) -> Any:
    made: Any = registry.config_class("SAC")()
    made.environment(registry.register_with_ray(env), env_config=env_config)
    made.env_runners(
        num_env_runners=0,
        num_envs_per_env_runner=config.num_envs,
        gym_env_vectorize_mode="vector_entry_point",
    )
    made.training(
        gamma=config.gamma,
        train_batch_size_per_learner=256,
        num_steps_sampled_before_learning_starts=min(1000, config.sac_steps // 4),
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 100_000},
    )
    made.rl_module(
        model_config=DefaultModelConfig(
            fcnet_hiddens=list(config.hidden), fcnet_activation="relu", head_fcnet_hiddens=[]
        )
    )
    made.reporting(min_sample_timesteps_per_iteration=500, min_time_s_per_iteration=0)
    made.debugging(seed=seed, log_level="ERROR")
    return made.build_algo()


def play(
    env: MarketEnv, act: Callable[[Tensor], Tensor], account: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """One pass of B accounts side by side over the range of `env` (made with `training=False`), from `account`, or from the start that
    the settings give.

    Returns value [T, B], weights [T, B, N + 1] after each bar (cash first), paid and traded [B] in currency, and the accounts at the end.
    """
    obs = env.reset(seed=0)[0] if account is None else env.carry_on(account)
    begun, values, held = env.account(), [env.state["value"].clone()], [env.weights(env.state).clone()]
    # A ruined account is out of the market for good.
    ruined = env.state["value"] <= env.ruin * env.first_value
    with torch.no_grad():
        for _ in range(env.T - 1):
            before = env.account()
            env.state, _, terminated = env.transition(env.state, act(obs))
            weights = env.weights(env.state)
            if bool(ruined.any()):
                for name, value in before.items():
                    env.state[name][ruined] = value[ruined]
                weights = torch.where(ruined[:, None], held[-1], weights)
            ruined = ruined | terminated
            obs = env.observe(env.state)
            values.append(env.state["value"].clone())
            held.append(weights.clone())
    return {
        "value": torch.stack(values).numpy(),
        "weights": torch.stack(held).numpy(),
        **{name: env.state[name] - begun[name] for name in ("paid", "traded")},
        "account": env.account(),
    }
