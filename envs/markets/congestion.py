"""The Stackelberg congestion game as an environment for its planner: users re-route day by day while the design changes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mobula.envs.markets import assignment
from mobula.envs.markets.design import Bounds, Problem, bounds, evaluate, make_problem
from mobula.envs.markets.dynamics import Followers, Paths, PathSet, Roads, auto_rate, centred, unroll
from mobula.errors import ConfigError
from mobula.sampling.tensor_env import State, TensorEnv


@lru_cache(maxsize=8)
def _instance(
    network: str, objective: str | None, upper: float | None, given: tuple[tuple[str, Any], ...]
) -> tuple[Problem, Bounds, PathSet, Tensor]:
    """(problem, its bounds, path set, logits [1, K] of the equilibrium without a design)."""
    problem = make_problem(network, objective, upper=upper, **dict(given))
    if upper is None:
        n = problem.network
        column = n.free_flow_time if problem.kind == "toll" else n.capacity
        problem = replace(problem, upper=float(column[problem.links].mean()))
    top = float(problem.upper or 0.0)
    rng = np.random.default_rng(0)
    tried = [np.zeros(problem.size), np.full(problem.size, top)]
    tried += [rng.uniform(0, top, problem.size) for _ in range(6)]
    found = [evaluate(problem, y, gap=1e-6).assignment for y in tried]
    paths = Paths(problem.network)
    for one in found:
        for w, known in enumerate(one.paths):
            for path in known:
                paths.add(w, path)
    first = {
        (w, path): f / max(float(flows.sum()), 1e-300)
        for w, (known, flows) in enumerate(zip(found[0].paths, found[0].flows, strict=True))
        for path, f in zip(known, flows.tolist(), strict=True)
    }
    # One user in ten thousand tries every path: a share of 0 would never come back.
    shares = torch.tensor([[max(first.get(entry, 0.0), 1e-4) for entry in paths.listed()]])
    return problem, bounds(problem), paths.flat(), centred(paths.flat(), shares.double().log())


class CongestionGame(TensorEnv):
    """Tolls or capacities against users who imitate cheaper routes (Li et al., arXiv 2209.07618).

    Observation: volume over capacity of every link, as today's users see it (Box, A).  Action: the design (Box, m: tolls or capacity
    added on the candidate links, clipped to [0, upper]).  Then users take `days` steps of the imitative logit dynamic, and the
    reward is (F_0 - F) / |F_0|, F the objective at the new flows and F_0 that of no design at equilibrium.  An episode begins at that
    equilibrium, all demands multiplied by a draw from U[1 - spread, 1 + spread], and has 30 steps.

    Path sets are fixed: the paths used at equilibrium without a design, with the largest one, and with random ones.
    """

    max_episode_steps = 30

    def __init__(
        self,
        num_envs: int = 1,
        *,
        network: str = "braess5",
        objective: str | None = None,
        upper: float | None = None,
        days: int = 10,
        spread: float = 0.05,
        **kwargs: Any,
    ) -> None:
        """network, objective: see `make_problem`; upper: largest toll or capacity added on a link (default: the mean free-flow time
        or capacity of the candidates).
        """
        names = (
            "links",
            "cost",
            "eta",
            "demand_scale",
            "capacity_scale",
            "time_scale",
        )
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        if days < 1 or not 0 <= spread < 1:
            raise ConfigError(
                f"congestion: needs days >= 1 and 0 <= spread < 1; got days={days}, spread={spread}"
            )
        frozen = tuple(
            (name, tuple(value) if isinstance(value, list) else value) for name, value in given.items()
        )
        self.problem, self.bounds, self.paths, self._start = _instance(network, objective, upper, frozen)
        n = self.problem.network
        self.days, self.spread, self.upper = days, spread, float(self.problem.upper or 0.0)
        super().__init__(
            num_envs,
            observation_space=spaces.Box(0.0, np.inf, (n.num_links,), np.float32),
            action_space=spaces.Box(0.0, self.upper, (self.problem.size,), np.float32),
            **kwargs,
        )
        self.roads, self.demand = Roads.of(n), torch.from_numpy(n.demand.copy())
        followers = self._followers(torch.zeros(1, self.problem.size, dtype=torch.float64), torch.ones(1))
        self.rate = auto_rate(followers, self._start)[:, None]

    def _followers(self, y: Tensor, factor: Tensor) -> Followers:
        toll, add = self.problem.spread(y)
        return Followers(self.roads, self.paths, factor.double()[:, None] * self.demand, toll, add)

    def initial(self, n: int) -> State:
        draw = torch.rand(n, generator=self.generator, dtype=torch.float64)
        y = torch.zeros(n, self.problem.size, dtype=torch.float64)
        return {
            "logits": self._start.expand(n, -1).clone(),
            "factor": 1.0 + self.spread * (2.0 * draw - 1.0),
            "design": y,
        }

    @torch.no_grad()
    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        y = action.double().clamp(0.0, self.upper)
        users = self._followers(y, state["factor"])
        logits = centred(self.paths, unroll(users, state["logits"], self.rate, self.days))
        new = {"logits": logits, "factor": state["factor"], "design": y}
        return new, self.gain(new), torch.zeros(len(y), dtype=torch.bool)

    @torch.no_grad()
    def gain(self, state: State) -> Tensor:
        """(F_0 - F) / |F_0| [B] of the flows and the design of `state`."""
        users = self.users(state)
        x = users.flows(state["logits"])
        F = self.problem.value(x, self.roads.times(x, users.capacity_add), state["design"])
        base = self.bounds.objective
        # An objective that is 0 without a design (revenue) is measured against total travel time.
        scale = abs(base) if abs(base) > 1e-9 else self.bounds.equilibrium
        return ((base - F) / scale).float()

    def users(self, state: State) -> Followers:
        """The users of `state` under its design."""
        return self._followers(state["design"], state["factor"])

    @torch.no_grad()
    def observe(self, state: State) -> Tensor:
        users = self.users(state)
        x = users.flows(state["logits"])
        return (x / (self.roads.capacity + users.capacity_add).clamp_min(1e-12)).float()

    def equilibrium(self, action: Any, factor: float = 1.0) -> assignment.Assignment:
        """Where users end up under a design that stays: the reference solver's flows."""
        return evaluate(self.problem, np.asarray(action, dtype=np.float64), demand=factor).assignment
