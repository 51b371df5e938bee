"""Implicit Q-learning (Kostrikov, Nair, Levine; ICLR 2022, arXiv 2110.06169) on the networks and data of its neighbours.

The value is an expectile of Q over data actions, the actor clones rows with weight exp(beta A).  RLlib's own is `rllib:IQL`.
"""

from __future__ import annotations

from typing import Any

import torch
from ray import tune
from torch import Tensor

from mobula.algorithms.offline.base.method import Offline
from mobula.algorithms.offline.base.module import OfflineModule
from mobula.algorithms.offline.in_sample import InSampleConfig, InSampleLearner
from mobula.method import hyperparameter


def expectile_loss(q: Tensor, value: Tensor, expectile: float) -> Tensor:
    """Mean over the batch of |expectile - 1[q < V]| (q - V)^2: q, value [..., B] -> [...]."""
    gap = q - value
    side = torch.where(gap < 0, 1 - expectile, expectile)
    return (side * gap.square()).mean(-1)


class IQLConfig(InSampleConfig):
    """IQL with seeds side by side: expectile values, advantage-weighted cloning (Kostrikov et al., ICLR 2022, arXiv 2110.06169)."""

    citation = """@inproceedings{kostrikov2022offline,
  title={Offline Reinforcement Learning with Implicit {Q}-Learning},
  author={Kostrikov, Ilya and Nair, Ashvin and Levine, Sergey},
  booktitle={International Conference on Learning Representations},
  year={2022}
}"""
    when = (
        "Use it as the in-sample baseline: robust and cheap on most logged data. Its value averages over all data actions, poor ones"
        " too, so with few good ones among many bad ones SQL keeps more of the return."
    )
    expectile = hyperparameter(
        0.7, tune.choice([0.7, 0.8, 0.9]), "expectile of the value (antmaze 0.9)", low=0.5, high=0.999
    )
    beta = hyperparameter(
        3.0, tune.choice([1.0, 3.0, 10.0]), "inverse temperature of the actor's weights (antmaze 10)", low=0.0
    )

    def weighting(self) -> dict[str, Any]:
        return {"beta": self.beta, "w_max": self.w_max}

    def get_module_class(self) -> Any:
        return IQLModule

    def get_default_learner_class(self) -> Any:
        return IQLLearner


class IQLModule(OfflineModule):
    """Weights exp(beta A)."""

    def weight(self, advantage: Tensor) -> Tensor:
        return (self.about["beta"] * advantage).exp().clamp_max(self.about["w_max"])


class IQLLearner(InSampleLearner):
    """Value by expectile regression."""

    def value_loss(self, q: Tensor, value: Tensor) -> Tensor:
        return expectile_loss(q, value, self.config.expectile)


class IQL(Offline, config=IQLConfig):
    """Implicit Q-learning."""

    config: IQLConfig
