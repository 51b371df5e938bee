"""Conservative Q-learning, CQL(H) (Kumar et al., NeurIPS 2020, arXiv 2006.04779), on the networks and data of its neighbours.

A soft actor-critic whose critics also descend the penalty alpha E_s[log of the integral of exp Q(s, a) over a, minus Q(s, a) of the
data], so that Q is low where there are no data.  The integral is estimated from N uniform actions and N of the policy, each divided by
its density (the paper's appendix F).  alpha is fixed, not the multiplier of a constraint.  RLlib's own is `rllib:CQL`; it adds
N terms Q(s', a') of the next state, which estimate another integral.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from ray import tune
from torch import Tensor

from mobula.algorithms.offline.base.config import OfflineConfig
from mobula.algorithms.offline.base.learner import OfflineLearner, Rows
from mobula.algorithms.offline.base.method import Offline
from mobula.algorithms.offline.base.module import OfflineModule
from mobula.algorithms.offline.in_sample import critic_loss
from mobula.envs.datasets.sac import squash
from mobula.learning.batched import polyak
from mobula.method import hyperparameter


def log_integral(q: Tensor, log_density: Tensor) -> Tensor:
    """log of the mean of exp(q) / density over the last axis, an estimate of log of the integral of exp Q: [..., N] -> [...]."""
    return (q - log_density).logsumexp(-1) - math.log(q.shape[-1])


def conservative_penalty(q: Tensor, log_density: Tensor, q_data: Tensor) -> Tensor:
    """Sum over the critics of the mean of log_integral(q) - q_data: q [S, E, B, N], log_density [S, B, N], q_data [S, E, B] -> [S]."""
    return (log_integral(q, log_density.unsqueeze(1)) - q_data).mean(-1).sum(-1)


def squashed_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log density of tanh(N(mean, exp(log_std)^2)) at actions inside (-1, 1): [..., m] -> [...]."""
    return squash(mean, log_std, (action.atanh() - mean) * (-log_std).exp())[1]


class CQLConfig(OfflineConfig):
    """CQL(H) with seeds side by side: soft actor-critic, Q pushed down off the data (Kumar et al., NeurIPS 2020, arXiv 2006.04779)."""

    citation = """@inproceedings{kumar2020conservative,
  title={Conservative {Q}-Learning for Offline Reinforcement Learning},
  author={Kumar, Aviral and Zhou, Aurick and Tucker, George and Levine, Sergey},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}"""
    when = (
        "Use it as the conservative baseline for continuous control, where the best policy may leave the data's actions a little. It"
        " samples actions in every step, so it costs many times an in-sample method, and `alpha` must be tuned: too small and Q is"
        " trusted off the data, too large and the policy is a clone."
    )
    action_kind = "continuous"

    alpha = hyperparameter(
        5.0, tune.loguniform(0.1, 20.0), "weight of the penalty, in units of the transformed reward", low=0.0
    )
    num_actions = hyperparameter(
        10, None, "N: uniform actions, and as many of the policy, that the penalty is estimated with", low=1
    )
    max_backup = hyperparameter(
        False, tune.choice([False, True]), "targets take the best of N actions of the policy, not one of them"
    )
    cloning = hyperparameter(
        0.04,
        None,
        "share of the run in which the actor clones the data in place of climbing Q",
        low=0.0,
        high=1.0,
    )
    actor_lr = hyperparameter(
        1e-4, tune.loguniform(3e-5, 1e-3), "step size of Adam for the actor and the temperature", low=0.0
    )
    tau = hyperparameter(
        0.005, None, "share of the critics that their targets take in a step", low=0.0, high=1.0
    )

    def parts(self) -> dict[str, Any]:
        return {"critics": 2, "actor": "squashed"}

    def get_module_class(self) -> Any:
        return CQLModule

    def get_default_learner_class(self) -> Any:
        return CQLLearner


class CQLModule(OfflineModule):
    """Twin critics, a tanh-Gaussian actor and the temperature of its entropy; acts by the tanh of the mean."""

    def setup(self) -> None:
        super().setup()
        self.log_temperature = torch.nn.Parameter(
            torch.zeros(self.about["seeds"], 1, 1, dtype=self.obs_mean.dtype)
        )

    def distribution(self, features: Tensor, *, member: int | None = None) -> tuple[Tensor, Tensor]:
        """(mean, log-std) [S, B, m] of the actions before tanh."""
        mean, log_std = self.actor(features, member=member).chunk(2, dim=-1)
        return mean, log_std.clamp(-5.0, 2.0)

    def action_parameters(
        self, features: Tensor, *, member: int | None = None, dropout_from: Any = None
    ) -> tuple[Tensor, None]:
        return self.distribution(features, member=member)[0].tanh(), None

    def log_prob(self, features: Tensor, action: Tensor, dropout_from: Any = None) -> Tensor:
        return squashed_log_prob(*self.distribution(features), action)


class CQLLearner(OfflineLearner):
    """Temperature, actor and critics, in this order; actions are those of the actor from before the step."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self.module[module_id].unwrapped()
        self.critic_adam = self.adam("critic", list(module.critics.parameters()), self.config.lr)
        self.actor_adam = self.adam("actor", list(module.actor.parameters()), self.config.actor_lr)
        self.temperature_adam = self.adam("temperature", [module.log_temperature], self.config.actor_lr)

    def noise(self, like: Tensor, count: int, kind: str = "standard_normal") -> Tensor:
        """[S, B, count, m] from the streams of the seeds, for `like` [S, B, m]; rows of other learners are drawn and left out."""
        _, B, m = like.shape
        learners, own = max(1, self.config.num_learners), self._learner_index * B
        drawn = [getattr(rng, kind)((B * learners, count, m), dtype=np.float32) for rng in self.streams]
        return torch.from_numpy(np.stack(drawn)[:, own : own + B]).to(like)

    def step(self, rows: Rows) -> dict[str, Tensor]:
        module, config, action, N = self.rl_module, self.config, rows["action"], self.config.num_actions
        obs, following = module.features(rows["obs"]), module.features(rows["next_obs"])
        mean, log_std = module.distribution(obs)
        with torch.no_grad():
            uniform = 2 * self.noise(action, N, "random") - 1
            drawn, log_drawn = squash(mean.unsqueeze(2), log_std.unsqueeze(2), self.noise(action, N))
            sampled = torch.cat([uniform, drawn], dim=2)
            log_uniform = torch.full_like(log_drawn, -action.shape[-1] * math.log(2.0))
            log_density = torch.cat([log_uniform, log_drawn], dim=2)
            mean_ahead, log_std_ahead = (x.unsqueeze(2) for x in module.distribution(following))
            tried, _ = squash(mean_ahead, log_std_ahead, self.noise(action, N if config.max_backup else 1))
            q_ahead = at_each(module, following, tried, target=True).amin(1).amax(-1)
            target = rows["reward"] + config.gamma * (1.0 - rows["terminated"]) * q_ahead

        own, log_p = (
            x.squeeze(2) for x in squash(mean.unsqueeze(2), log_std.unsqueeze(2), self.noise(action, 1))
        )
        excess = log_p.detach().mean(-1) - action.shape[-1]
        self.descend((-module.log_temperature[:, 0, 0] * excess).sum(), self.temperature_adam)
        temperature = module.log_temperature.detach().exp()[:, 0]
        if self.taken < config.cloning * config.steps:
            gain = squashed_log_prob(mean, log_std, action)
        else:
            gain = module.q_values(obs, own).amin(1)
        actor_loss = (temperature * log_p - gain).mean(-1)
        self.descend(actor_loss.sum(), self.actor_adam)

        q = module.q_values(obs, action)
        error = critic_loss(q, target)
        penalty = conservative_penalty(at_each(module, obs, sampled), log_density, q)
        self.descend((error + config.alpha * penalty).sum(), self.critic_adam)
        polyak(list(module.target_critics.parameters()), list(module.critics.parameters()), config.tau)
        return {
            "critic_loss": error,
            "penalty": penalty,
            "actor_loss": actor_loss,
            "entropy": -log_p,
            "temperature": temperature,
        }


def at_each(module: OfflineModule, features: Tensor, actions: Tensor, *, target: bool = False) -> Tensor:
    """Q [S, E, B, N] of N actions an observation: features [S, B, d], actions [S, B, N, m]."""
    N = actions.shape[2]
    q = module.q_values(features.repeat_interleave(N, 1), actions.flatten(1, 2), target=target)
    return q.unflatten(-1, (-1, N))


class CQL(Offline, config=CQLConfig):
    """Conservative Q-learning."""

    config: CQLConfig
