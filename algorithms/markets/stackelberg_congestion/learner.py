"""The learner: gradients through the dynamic on a share of the demand scenarios, or of the OD pairs."""

from __future__ import annotations

from typing import Any

import ray
import torch
from torch import Tensor

from mobula.algorithms.markets.stackelberg_congestion.math import anticipate
from mobula.algorithms.markets.stackelberg_congestion.search import FOUND
from mobula.envs.markets.dynamics import Part
from mobula.learning.learners import Learner


class StackelbergCongestionLearner(Learner):
    """Differentiates through the users' dynamic, on its share of the demand scenarios; the mean gradient moves the designs.

    `od_shards` neighbours share the OD pairs of the same scenarios: they sum link flows in every step, and the gradient of link costs in
    every step back.
    """

    result: dict[str, Tensor]

    def build(self) -> None:
        super().build()
        self._held: dict[str, Any] = {}
        self.result = {}
        self._neighbours = None
        size = self.config.od_shards
        if size > 1:
            # Every process must take part in making each group.
            groups = [
                torch.distributed.new_group([*range(first, first + size)])
                for first in range(0, self.config.num_learners, size)
            ]
            self._neighbours = groups[torch.distributed.get_rank() // size]

    def _total(self, value: Tensor) -> Tensor:
        torch.distributed.all_reduce(value, group=self._neighbours)
        return value

    def _get(self, name: str, given: Any) -> Any:
        """An object, or the one behind a reference; fetched once."""
        if not isinstance(given, ray.ObjectRef):
            return given
        if name not in self._held or self._held[name][0] != given:
            self._held[name] = (given, ray.get(given))
        return self._held[name][1]

    def learn(
        self, batch: Any, *, problem: Any, shares: list[Any], scenarios: int, options: dict[str, Any]
    ) -> None:
        shape = batch["y"].shape[:2]
        flat = {name: batch[name].flatten(0, 1) for name in ("demand", "y", "logits", "r")}
        problem = self._get("problem", problem)
        share = self._get("share", shares[self._learner_index % len(shares)])
        part = None
        if len(shares) > 1:
            part = Part(share.first, problem.network.num_ods, len(shares), self._total)
        found = anticipate(
            problem,
            share.paths.to(self.device),
            flat["demand"],
            flat["y"],
            flat["logits"],
            flat["r"][:, None],
            **options,
            part=part,
        )
        self.result = {name: getattr(found, name).unflatten(0, shape).cpu() for name in FOUND}
        summed = found.gradient.unflatten(0, shape).sum(0)
        # Those who share the OD pairs of a scenario have all found its gradient.
        self.result["gradient"] = self.all_reduce(summed, mean=False).cpu() / (scenarios * len(shares))

    def keep(self, state: dict[str, Tensor]) -> None:
        """Writes designs and their values into the module."""
        own = self.rl_module.state_dict()
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
