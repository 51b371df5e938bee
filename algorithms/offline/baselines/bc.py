"""Behaviour cloning, of all episodes or of the best share of them ("10 % BC").  RLlib's own is `rllib:BC`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from mobula.algorithms.offline.base.config import OfflineConfig
from mobula.algorithms.offline.base.learner import OfflineLearner, Rows
from mobula.algorithms.offline.base.method import Offline
from mobula.envs.datasets.dataset import Dataset
from mobula.errors import ConfigError
from mobula.learning.batched import cosine
from mobula.method import hyperparameter


def best_episodes(dataset: Dataset, share: float) -> Dataset:
    """The episodes with the largest returns, at least one, `share` of them."""
    returns = dataset.returns()
    count = max(1, round(share * len(returns)))
    return dataset.episodes(np.argsort(-returns, kind="stable")[:count])


class BCConfig(OfflineConfig):
    """Behaviour cloning on tensors, of all episodes or of the best share of them (Pomerleau 1991; "10 % BC")."""

    citation = """@article{pomerleau1991efficient,
  title={Efficient Training of Artificial Neural Networks for Autonomous Navigation},
  author={Pomerleau, Dean A.},
  journal={Neural Computation},
  volume={3},
  number={1},
  pages={88--97},
  year={1991}
}"""
    when = (
        "Use it as the trivial competitor of every offline method, and where the data are all good. With `best` 0.1 it clones the best"
        " tenth of episodes, which is hard to beat where whole good episodes are in the data and useless where they are not."
    )
    best = hyperparameter(1.0, None, "share of episodes, by return, that is cloned", low=1e-6, high=1.0)

    def validate(self) -> None:
        if self.streaming and self.best < 1:
            raise ConfigError("BC: best needs all returns at hand; it does not go with streaming")
        super().validate()

    def get_default_learner_class(self) -> Any:
        return BCLearner


class BCLearner(OfflineLearner):
    """Maximum likelihood of the data's actions; the step size falls as a cosine."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self.module[module_id].unwrapped()
        self.actor_adam = self.adam("actor", list(module.parameters()), self.config.lr)

    def step(self, rows: Rows) -> dict[str, Tensor]:
        module = self.rl_module
        self.actor_adam.param_groups[0]["lr"] = self.config.lr * cosine(self.taken, self.config.steps)
        loss = -module.log_prob(module.features(rows["obs"]), rows["action"]).mean(-1)
        self.descend(loss.sum(), self.actor_adam)
        return {"actor_loss": loss}


class BC(Offline, config=BCConfig):
    """Behaviour cloning."""

    config: BCConfig

    def select(self, dataset: Dataset) -> Dataset:
        return dataset if self.config.best == 1.0 else best_episodes(dataset, self.config.best)
