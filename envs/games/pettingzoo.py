"""A structured zero-sum game as a PettingZoo environment, for libraries that play with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

from mobula.envs.games.tabular import FactoredGame, Game, checked


class MarkovGameParallelEnv(ParallelEnv):  # type: ignore[type-arg]
    """Two agents, "player_0" (maximises) and "player_1", move at once; the game ends by truncation after H steps.

    Observation [step, own state] (MultiDiscrete): the dynamics may depend on the step.  Rewards are Bernoulli draws with the
    game's means for player_0, and their negatives for player_1.  `state()` is [step, joint state].
    """

    metadata = {"name": "mobula_markov_game", "render_modes": [], "is_parallelizable": True}
    render_mode = None

    def __init__(self, game: Game) -> None:
        """game: one instance, without leading axes."""
        self.game = checked(game)
        self.possible_agents = ["player_0", "player_1"]
        self.agents: list[str] = []
        if isinstance(game, FactoredGame):
            self.horizon, *states, a, b = game.r.shape
            self._kernels = [game.P1.numpy(), game.P2.numpy()]
        else:
            self.horizon, size, a, b = game.r.shape
            states = [size, size]
            self._kernels = [game.P.numpy()]
        self.observation_spaces = {
            agent: spaces.MultiDiscrete([self.horizon + 1, size])
            for agent, size in zip(self.possible_agents, states, strict=True)
        }
        self.action_spaces: dict[str, spaces.Space[Any]] = {
            "player_0": spaces.Discrete(a),
            "player_1": spaces.Discrete(b),
        }
        self._rng = np.random.default_rng()

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.step_index = 0
        start = self.game.start
        self.states = list(start) if isinstance(start, tuple) else [start]
        return self._observations(), self._infos()

    def state(self) -> np.ndarray[Any, Any]:
        return np.array([self.step_index, *self.states])

    def _observations(self) -> dict[str, Any]:
        return {
            agent: np.array([self.step_index, self.states[min(i, len(self.states) - 1)]])
            for i, agent in enumerate(self.possible_agents)
        }

    def _infos(self) -> dict[str, Any]:
        return {agent: {"step": self.step_index} for agent in self.possible_agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        h, pair = self.step_index, [int(actions[agent]) for agent in self.possible_agents]
        mean = float(self.game.r[(h, *self.states, *pair)])
        reward = float(self._rng.random() < mean)
        self.states = [
            int(self._rng.choice(kernel.shape[-1], p=kernel[h, state, action]))
            for kernel, state, action in zip(self._kernels, self.states, pair, strict=False)
        ]
        self.step_index += 1
        over = self.step_index == self.horizon
        names = self.possible_agents
        self.agents = [] if over else list(names)
        return (
            self._observations(),
            {"player_0": reward, "player_1": -reward},
            dict.fromkeys(names, False),
            dict.fromkeys(names, over),
            self._infos(),
        )
