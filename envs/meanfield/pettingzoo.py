"""A finite population of a mean-field game as a PettingZoo environment, for libraries that play with it and for checks of policies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.graphon import FiniteMFG, Graphon
from mobula.envs.meanfield.logs import positions
from mobula.errors import ConfigError

MOST_AGENTS = 64


class PopulationParallelEnv(ParallelEnv):  # type: ignore[type-arg]
    """N agents, 2 to 64, at the labels (i - 1/2) / N move at once; the game ends by truncation after H steps.

    Agent i meets z^i = 1 / (N - 1) sum_{j != i} W(xi_i, xi_j) delta_{s^j}: the population is finite, and nobody meets itself.
    An observation is [label, degree, h, state], what a served policy of `gmfg_ppo` reads; degree is the agent's own,
    1 / (N - 1) sum_{j != i} W.  `state()` is [h, every agent's state].
    """

    metadata = {"name": "mobula_population", "render_modes": [], "is_parallelizable": True}
    render_mode = None

    def __init__(self, game: FiniteMFG, graphon_: Graphon, agents: int) -> None:
        """game: its model, horizon and initial law (that of its first cell); graphon_: who meets whom."""
        if not 2 <= agents <= MOST_AGENTS:
            raise ConfigError(
                f"a population of {agents} agents: 2 to {MOST_AGENTS} can be played one by one; `ParticlePopulation` holds more"
            )
        self.game = game
        self.labels = positions(agents)
        W = graphon.matrix(graphon_, self.labels)
        self._met = (W - torch.diag(torch.diagonal(W))) / (agents - 1)
        self.possible_agents = [f"agent_{i}" for i in range(agents)]
        self.agents: list[str] = []
        high = np.array([1.0, 1.0, game.horizon, game.states - 1])
        self._observations_in = spaces.Box(np.zeros(4), high, dtype=np.float64)
        self._actions_in: spaces.Space[Any] = spaces.Discrete(game.actions)
        self._rng = np.random.default_rng()

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self._observations_in

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return self._actions_in

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self.agents, self.h = list(self.possible_agents), 0
        self.states = self._draw(self.game.mu0[:1].expand(len(self.agents), -1))
        return self._observations(), {agent: {} for agent in self.possible_agents}

    def _draw(self, law: torch.Tensor) -> torch.Tensor:
        """A draw [N] from laws [N, K]."""
        u = torch.from_numpy(self._rng.random((len(law), 1)))
        return (u > law.cumsum(-1)[:, :-1]).sum(-1)

    def state(self) -> np.ndarray[Any, Any]:
        return np.array([self.h, *self.states.tolist()])

    def aggregate(self) -> torch.Tensor:
        """z [N, S] that the agents meet now."""
        return self._met @ torch.eye(self.game.states, dtype=torch.float64)[self.states]

    def _observations(self) -> dict[str, Any]:
        h = torch.full_like(self.labels, self.h)
        every = torch.stack([self.labels, self._met.sum(-1), h, self.states.double()], -1).numpy()
        return dict(zip(self.possible_agents, every, strict=True))

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        names = self.possible_agents
        action = torch.tensor([int(actions[agent]) for agent in names])
        P, r = self.game.model(self.h, self.aggregate())
        each = torch.arange(len(names))
        rewards = r[each, self.states, action]
        self.states = self._draw(P[each, self.states, action])
        self.h += 1
        over = self.h == self.game.horizon
        self.agents = [] if over else list(names)
        return (
            self._observations(),
            dict(zip(names, rewards.tolist(), strict=True)),
            dict.fromkeys(names, False),
            dict.fromkeys(names, over),
            {agent: {} for agent in names},
        )
