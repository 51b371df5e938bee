"""The learner: gradients through the dynamic on a share of the demand scenarios."""

from __future__ import annotations

from typing import Any

import ray
import torch
from torch import Tensor

from mobula.algorithms.markets.stackelberg_congestion.math import anticipate
from mobula.algorithms.markets.stackelberg_congestion.search import FOUND
from mobula.learning.learners import Learner


class StackelbergCongestionLearner(Learner):
    """Differentiates through the users' dynamic, on its share of the demand scenarios; the mean gradient moves the designs."""

    result: dict[str, Tensor]

    def build(self) -> None:
        super().build()
        self._held: dict[str, Any] = {}
        self.result = {}

    def _get(self, name: str, given: Any) -> Any:
        """An object, or the one behind a reference; fetched once."""
        if not isinstance(given, ray.ObjectRef):
            return given
        if name not in self._held or self._held[name][0] != given:
            self._held[name] = (given, ray.get(given))
        return self._held[name][1]

    def learn(self, batch: Any, *, problem: Any, paths: Any, scenarios: int, options: dict[str, Any]) -> None:
        shape = batch["y"].shape[:2]
        flat = {name: batch[name].flatten(0, 1) for name in ("demand", "y", "logits", "r")}
        found = anticipate(
            self._get("problem", problem),
            self._get("paths", paths),
            flat["demand"],
            flat["y"],
            flat["logits"],
            flat["r"][:, None],
            **options,
        )
        self.result = {name: getattr(found, name).unflatten(0, shape) for name in FOUND}
        summed = found.gradient.unflatten(0, shape).sum(0)
        self.result["gradient"] = self.all_reduce(summed, mean=False) / scenarios

    def keep(self, state: dict[str, Tensor]) -> None:
        """Writes designs and their values into the module."""
        own = self.rl_module.state_dict()
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
