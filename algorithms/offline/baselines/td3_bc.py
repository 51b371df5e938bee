"""TD3+BC (Fujimoto and Gu, NeurIPS 2021, arXiv 2106.06860): TD3 with a cloning term, observations normalised."""

from __future__ import annotations

from typing import Any

import torch
from ray import tune
from torch import Tensor

from mobula.algorithms.offline.base.config import OfflineConfig
from mobula.algorithms.offline.base.learner import OfflineLearner, Rows
from mobula.algorithms.offline.base.method import Offline
from mobula.algorithms.offline.base.module import OfflineModule
from mobula.algorithms.offline.in_sample import critic_loss
from mobula.learning.batched import BatchedMLP, generators, polyak
from mobula.method import hyperparameter


def actor_objective(q: Tensor, policy: Tensor, action: Tensor, trade_off: float) -> Tensor:
    """Loss -lambda Q(s, pi(s)) + (pi(s) - a)^2 with lambda = trade_off / mean |Q|, no gradient through lambda.

    q [S, B], policy and action [S, B, m] -> [S].
    """
    scale = trade_off / q.detach().abs().mean(-1).clamp_min(1e-8)
    return -scale * q.mean(-1) + (policy - action).square().mean((-2, -1))


class TD3BCConfig(OfflineConfig):
    """TD3 with a behaviour-cloning term, for continuous actions (Fujimoto and Gu, NeurIPS 2021, arXiv 2106.06860)."""

    citation = """@inproceedings{fujimoto2021minimalist,
  title={A Minimalist Approach to Offline Reinforcement Learning},
  author={Fujimoto, Scott and Gu, Shixiang Shane},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}"""
    when = (
        "Use it as the simplest actor-critic baseline for continuous control from logs of decent quality. It queries Q at actions of the"
        " policy, held near the data by the cloning term alone, so on narrow or mostly poor data in-sample methods are safer."
    )
    action_kind = "continuous"

    trade_off = hyperparameter(2.5, tune.choice([1.0, 2.5, 4.0]), "weight of Q against cloning", low=0.0)
    tau = hyperparameter(0.005, None, "share that the targets take in a step", low=0.0, high=1.0)
    policy_noise = hyperparameter(0.2, None, "deviation of the noise on target actions", low=0.0)
    noise_clip = hyperparameter(0.5, None, "its largest size", low=0.0)
    policy_delay = hyperparameter(2, None, "critic steps an actor step", low=1)
    normalize_observations = hyperparameter(
        True, tune.choice([False, True]), "subtract the data's mean, divide by its deviation + 1e-3"
    )

    def parts(self) -> dict[str, Any]:
        return {"critics": 2, "actor": "deterministic"}

    def get_module_class(self) -> Any:
        return TD3BCModule

    def get_default_learner_class(self) -> Any:
        return TD3BCLearner


class TD3BCModule(OfflineModule):
    """Twin critics and a deterministic actor, each with a target."""

    def setup(self) -> None:
        super().setup()
        self.target_actor = BatchedMLP(self.actor.members, self.actor.sizes, generators([0]))
        self.target_actor.to(self.obs_mean.dtype).load_state_dict(self.actor.state_dict())
        self.target_actor.requires_grad_(False)


class TD3BCLearner(OfflineLearner):
    """A critic step, and an actor step every `policy_delay` of them."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self.module[module_id].unwrapped()
        self.critic_adam = self.adam("critic", list(module.critics.parameters()), self.config.lr)
        self.actor_adam = self.adam("actor", list(module.actor.parameters()), self.config.lr)

    def step(self, rows: Rows) -> dict[str, Tensor]:
        module, config, action = self.rl_module, self.config, rows["action"]
        obs, following = module.features(rows["obs"]), module.features(rows["next_obs"])
        with torch.no_grad():
            noise = (
                torch.randn(action.shape, generator=self.generator, dtype=action.dtype) * config.policy_noise
            )
            ahead = module.target_actor(following).tanh() + noise.clamp(-config.noise_clip, config.noise_clip)
            q = module.q_values(following, ahead.clamp(-1.0, 1.0), target=True).amin(1)
            target = rows["reward"] + config.gamma * (1.0 - rows["terminated"]) * q
        error = critic_loss(module.q_values(obs, action), target)
        self.descend(error.sum(), self.critic_adam)
        report = {"critic_loss": error}
        if (self.taken + 1) % config.policy_delay == 0:
            policy = module.actor(obs).tanh()
            loss = actor_objective(module.q_values(obs, policy)[:, 0], policy, action, config.trade_off)
            self.descend(loss.sum(), self.actor_adam)
            polyak(list(module.target_critics.parameters()), list(module.critics.parameters()), config.tau)
            polyak(list(module.target_actor.parameters()), list(module.actor.parameters()), config.tau)
            report["actor_loss"] = loss
        return report


class TD3BC(Offline, config=TD3BCConfig):
    """TD3+BC."""

    config: TD3BCConfig
