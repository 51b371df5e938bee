"""In-sample actor-critic: what SQL, EQL and IQL share.  They differ in the loss of the value and in the weight of a row.

One gradient step on a batch, in this order: the value on target critics and data actions; the actor by weighted cloning and the
critics by one-step regression, both with the updated value; the target critics.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from ray import tune
from torch import Tensor

from mobula.algorithms.offline.base.config import OfflineConfig
from mobula.algorithms.offline.base.learner import OfflineLearner, Rows
from mobula.algorithms.offline.base.module import OfflineModule
from mobula.learning.batched import cosine, polyak
from mobula.method import hyperparameter


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Sum over the critics of the mean squared error: q [S, E, B], target [S, B] -> [S]."""
    return (q - target.unsqueeze(1)).square().mean(-1).sum(-1)


def cloning_loss(weight: Tensor, log_prob: Tensor) -> Tensor:
    """-mean weight log pi(a | s): [S, B] -> [S].  All weights 0 give 0, not NaN."""
    return -(weight * log_prob).mean(-1)


class InSampleConfig(OfflineConfig):
    """Settings of the in-sample methods (base class)."""

    tau = hyperparameter(
        0.005, None, "share of the critics that their targets take in a step", low=0.0, high=1.0
    )
    w_max = hyperparameter(100.0, None, "largest weight of a row in the actor's loss", low=0.0)
    value_layernorm = hyperparameter(True, tune.choice([True, False]), "LayerNorm before each ReLU of V")
    value_dropout = hyperparameter(0.0, tune.choice([0.0, 0.1, 0.5]), "dropout of V", low=0.0, high=0.95)
    actor_dropout = hyperparameter(
        0.0, tune.choice([0.0, 0.1, 0.5]), "dropout of the actor", low=0.0, high=0.95
    )
    lr_decay = hyperparameter(
        "actor",
        None,
        "what falls over the run: the actor's lr as a cosine, every lr linearly, or nothing",
        choices=["actor", "linear", "none"],
    )
    module_class: ClassVar[Any] = OfflineModule

    def parts(self) -> dict[str, Any]:
        return {
            "critics": 2,
            "value": True,
            "value_layernorm": self.value_layernorm,
            "value_dropout": self.value_dropout,
            "actor_dropout": self.actor_dropout,
            **self.weighting(),
        }

    def weighting(self) -> dict[str, Any]:
        """What the module needs to weigh rows (it serves the weights)."""
        return {}

    def get_module_class(self) -> Any:
        return self.module_class


class InSampleLearner(OfflineLearner):
    """The gradient step; a method overrides `value_loss`, and its module `weight`."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self.module[module_id].unwrapped()
        lr = self.config.lr
        actor = list(module.actor.parameters()) + ([] if module.log_std is None else [module.log_std])
        self.value_adam = self.adam("value", list(module.value.parameters()), lr)
        self.critic_adam = self.adam("critic", list(module.critics.parameters()), lr)
        self.actor_adam = self.adam("actor", actor, lr)
        self._targets = list(module.target_critics.parameters())
        self._sources = list(module.critics.parameters())

    def value_loss(self, q: Tensor, value: Tensor) -> Tensor:
        """[S] from q, value [S, B]."""
        raise NotImplementedError

    def extra(self, q: Tensor, value: Tensor) -> dict[str, Tensor]:
        """More to report, before the value's step."""
        return {}

    def set_rates(self) -> None:
        """Step sizes at the present position of the run."""
        share = 1.0 - min(self.taken / self.config.steps, 1.0)
        rate = {"actor": cosine(self.taken, self.config.steps), "linear": share, "none": 1.0}[
            self.config.lr_decay
        ]
        self.actor_adam.param_groups[0]["lr"] = self.config.lr * rate
        if self.config.lr_decay == "linear":
            for adam in (self.value_adam, self.critic_adam):
                adam.param_groups[0]["lr"] = self.config.lr * rate

    def step(self, rows: Rows) -> dict[str, Tensor]:
        module, config, B = self.rl_module, self.config, rows["reward"].shape[1]
        self.set_rates()
        both = module.features(torch.cat([rows["obs"], rows["next_obs"]], dim=1))
        obs = both[:, :B]
        dropout = self.generator if config.value_dropout else None
        with torch.no_grad():
            q = module.q_values(obs, rows["action"], target=True).amin(1)
        value = module.values(obs, dropout_from=dropout)
        value_loss = self.value_loss(q, value)
        report = self.extra(q, value.detach())
        self.descend(value_loss.sum(), self.value_adam)
        with torch.no_grad():
            value, following = module.values(both).split([B, B], dim=1)
            weight = module.weight(q - value)
            target = rows["reward"] + config.gamma * (1.0 - rows["terminated"]) * following
        log_prob = module.log_prob(obs, rows["action"], self.generator if config.actor_dropout else None)
        actor_loss = cloning_loss(weight, log_prob)
        error = critic_loss(module.q_values(obs, rows["action"]), target)
        self.descend((actor_loss + error).sum(), self.actor_adam, self.critic_adam)
        polyak(self._targets, self._sources, config.tau)
        return {
            "value_loss": value_loss,
            "actor_loss": actor_loss,
            "critic_loss": error,
            "value": value,
            "zero_weights": (weight == 0).double(),
            "clipped_weights": (weight >= config.w_max).double(),
            **report,
        }
