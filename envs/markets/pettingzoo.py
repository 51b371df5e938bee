"""The congestion game as a PettingZoo environment: the planner and the travellers of every OD pair, for libraries that play with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from mobula.envs.markets.congestion import CongestionGame
from mobula.envs.markets.dynamics import centred
from mobula.envs.markets.networks import Array
from mobula.errors import ConfigError, DataError
from mobula.sampling.tensor_env import State

ORDERS = ("leader", "simultaneous")


class CongestionParallelEnv(ParallelEnv):  # type: ignore[type-arg]
    """Agents "planner", and "travellers_O-D" for the travellers of every OD pair (Li et al., arXiv 2209.07618).

    A design stays for a round of `days` days; a step is a day, and an episode has as many rounds as `CongestionGame` has steps.

    order    "leader" (Stackelberg): a round begins with a step in which the planner's action alone counts and nobody travels;
             travellers see costs under the new design before they choose
             "simultaneous": the planner's action counts on the first day of a round, together with the travellers', who have
             not seen it

    The planner's action is the design (Box, m, clipped to [0, upper]); that of travellers is how they are distributed over their
    K_w paths (Box, K_w: weights of 0 or more, divided by their sum; uniform where all are 0).  Actions out of turn are ignored.  Who
    is left out of `actions` does what it does in `CongestionGame`: the planner keeps its design, travellers take a step of the imitative
    logit dynamic; with all of them left out, the leader's order is that environment, number by number.

    Observations begin with the day of the round (0: the planner's turn).  The planner sees volume over capacity of every link (A);
    travellers see their own shares and the costs of their own paths at the last flows under the design in force (2 K_w): neither
    sees the demands, nor travellers each other's shares.  Rewards: the planner's is (F_0 - F) / |F_0| at the end of a round and 0 before;
    travellers get minus their mean path cost, tolls included, every day.
    """

    metadata = {"name": "mobula_congestion", "render_modes": [], "is_parallelizable": True}
    render_mode = None

    def __init__(self, env: CongestionGame, order: str = "leader") -> None:
        """env: the game of the planner, of one environment.  Raises ConfigError for another number of them or another order."""
        if env.num_envs != 1:
            raise ConfigError(
                f"a PettingZoo environment is one game; this one has {env.num_envs}: set num_envs=1"
            )
        if order not in ORDERS:
            raise ConfigError(f"order is {order!r}; it is one of {', '.join(ORDERS)}")
        self.env, self.order = env, order
        network, od = env.problem.network, env.paths.od.numpy()
        names = [f"travellers_{network.od_name(w)}" for w in range(network.num_ods)]
        self.possible_agents = ["planner", *names]
        self.agents: list[str] = []
        self._own = {name: torch.from_numpy(np.flatnonzero(od == w)) for w, name in enumerate(names)}
        self.round_length = env.days + (order == "leader")
        days, links = np.float32(self.round_length - 1), network.num_links
        self.observation_spaces: dict[str, spaces.Space[Any]] = {
            "planner": spaces.Box(
                np.zeros(links + 1, np.float32), np.r_[days, np.full(links, np.inf, np.float32)]
            )
        }
        self.action_spaces: dict[str, spaces.Space[Any]] = {"planner": env.single_action_space}
        for name, own in self._own.items():
            K = len(own)
            high = np.r_[float(days), np.ones(K), np.full(K, np.inf)]
            self.observation_spaces[name] = spaces.Box(np.zeros(2 * K + 1), high, dtype=np.float64)
            self.action_spaces[name] = spaces.Box(0.0, 1.0, (K,), np.float64)

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self.env.seed(seed)
        self.agents = list(self.possible_agents)
        self.day, self.rounds = 0, 0
        self._state: State = self.env.initial(1)
        return self._observations(), self._infos()

    def state(self) -> Array:
        """[day, demand factor, design (m), shares of all paths (K)]."""
        parts = (self._state["factor"], self._state["design"][0], self._shares())
        return np.concatenate([[float(self.day)], *(part.numpy() for part in parts)])

    def _shares(self) -> torch.Tensor:
        return self.env.paths.shares(self._state["logits"])[0]

    @torch.no_grad()
    def _path_costs(self) -> torch.Tensor:
        users = self.env.users(self._state)
        return users.paths.path_costs(users.costs(users.flows(self._state["logits"])))[0]

    def _observations(self) -> dict[str, Any]:
        seen = self.env.observe(self._state)[0].numpy()
        shares, costs = self._shares(), self._path_costs()
        found: dict[str, Any] = {"planner": np.r_[np.float32(self.day), seen]}
        for name, own in self._own.items():
            found[name] = np.r_[float(self.day), shares[own].numpy(), costs[own].numpy()]
        return found

    def _infos(self) -> dict[str, Any]:
        return {agent: {"day": self.day, "round": self.rounds} for agent in self.possible_agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        env, names = self.env, self.possible_agents
        before = self._state
        state = dict(before)
        if self.day == 0 and "planner" in actions:
            y = _numbers(actions["planner"], "planner", env.problem.size)
            state["design"] = torch.from_numpy(y)[None].clamp(0.0, env.upper)
        travelled = self.order == "simultaneous" or self.day > 0
        if travelled:
            # In simultaneous order nobody has seen today's design: travellers look back at yesterday's.
            with torch.no_grad():
                logits = env.users(before).step(before["logits"], env.rate)
            for name, own in self._own.items():
                if name in actions:
                    logits[0, own] = torch.from_numpy(_distribution(actions[name], name, len(own))).log()
            state["logits"] = logits
        last = self.day == self.round_length - 1
        if last:
            state["logits"] = centred(env.paths, state["logits"])
        self._state = state
        rewards = dict.fromkeys(names, 0.0)
        if travelled:
            paid = self._shares() * self._path_costs()
            rewards |= {name: -float(paid[own].sum()) for name, own in self._own.items()}
        if last:
            rewards["planner"] = float(env.gain(state))
        self.day = 0 if last else self.day + 1
        self.rounds += last
        over = self.rounds == env.max_episode_steps
        self.agents = [] if over else list(names)
        return (
            self._observations(),
            rewards,
            dict.fromkeys(names, False),
            dict.fromkeys(names, over),
            self._infos(),
        )


def _numbers(action: Any, agent: str, size: int) -> Array:
    values = np.asarray(action, dtype=np.float64)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise DataError(f"{agent}: {action!r} is no action; {size} finite numbers are needed")
    return values


def _distribution(action: Any, agent: str, size: int) -> Array:
    weights = _numbers(action, agent, size)
    if (weights < 0).any():
        raise DataError(f"{agent}: {action!r} is no distribution over {size} paths: a weight is negative")
    total = float(weights.sum())
    return weights / total if total > 0 else np.full(size, 1.0 / size)
