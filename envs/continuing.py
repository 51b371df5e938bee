"""Problems that never end, for average-reward methods; each with its exact model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mobula.errors import ConfigError
from mobula.sampling.tensor_env import State, TensorEnv


class TabularEnv(TensorEnv):
    """A finite MDP that never ends, given by tables; the observation is the index of the state.

    P: [S, A, S] transition probabilities; R: [S, A, S] reward of each transition.
    """

    continuing = True
    P: Tensor
    R: Tensor

    def __init__(self, num_envs: int, P: Tensor, R: Tensor, start: Tensor, **kwargs: Any) -> None:
        """start: [S] law of the first state."""
        super().__init__(
            num_envs,
            observation_space=spaces.Discrete(P.shape[0]),
            action_space=spaces.Discrete(P.shape[1]),
            **kwargs,
        )
        self.P, self.R, self.start = (table.to(self.device) for table in (P.double(), R.double(), start))
        self._rewards = self.R.float()
        self._deterministic = bool(((self.P == 0) | (self.P == 1)).all())
        self._next = self.P.argmax(-1)
        # Rounding must not leave a gap below 1.
        self._cumulative = self.P.cumsum(-1)
        self._cumulative[..., -1] = 1.0

    def model(self) -> tuple[Tensor, Tensor]:
        """(P [S, A, S], expected reward [S, A]), float64."""
        return self.P, (self.P * self.R).sum(-1)

    def initial(self, n: int) -> State:
        return {"state": torch.multinomial(self.start, n, replacement=True, generator=self.generator)}

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        old = state["state"]
        if self._deterministic:
            new = self._next[old, action]
        else:
            uniform = torch.rand(
                len(old), 1, generator=self.generator, dtype=torch.float64, device=self.device
            )
            new = torch.searchsorted(self._cumulative[old, action], uniform, right=True).squeeze(1)
        reward = self._rewards[old, action, new]
        return {"state": new}, reward, torch.zeros_like(old, dtype=torch.bool)

    def observe(self, state: State) -> Tensor:
        return state["state"]


class GoalGrid(TabularEnv):
    """n x n grid: reward 1 for the move into the far corner, which returns to the start; never ends.

    State i * n + j is row i, column j; actions stay, up, down, left, right; moves into walls stay.  The goal
    (n-1, n-1) is never occupied: S = n^2 - 1.  Without walls the optimal gain is exactly 1 / (2 (n - 1)).
    """

    reward_range = (0.0, 1.0)

    def __init__(self, num_envs: int = 1, *, size: int = 5, walls: Sequence[int] = (), **kwargs: Any) -> None:
        """size: n, at least 2.  walls: indices of blocked cells, e.g. (2, 7, 17, 22) for n = 5."""
        cells = size * size
        if size < 2:
            raise ConfigError(f"goal_grid: size is {size}; at least 2 is needed")
        if any(not 0 < wall < cells - 1 for wall in walls):
            raise ConfigError(f"goal_grid: walls {list(walls)} must lie strictly between 0 and {cells - 1}")
        self.size, self.walls = size, tuple(walls)
        P = torch.zeros(cells - 1, 5, cells - 1, dtype=torch.float64)
        R = torch.zeros_like(P)
        moves = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
        for state in range(cells - 1):
            for action, (down, right) in enumerate(moves):
                i, j = state // size + down, state % size + right
                target = i * size + j
                if not (0 <= i < size and 0 <= j < size) or target in self.walls:
                    target = state
                if target == cells - 1:
                    P[state, action, 0] = R[state, action, 0] = 1.0
                else:
                    P[state, action, target] = 1.0
        start = torch.zeros(cells - 1, dtype=torch.float64)
        start[0] = 1.0
        super().__init__(num_envs, P, R, start, **kwargs)

    def render(self) -> Any:
        frame = np.full((self.size, self.size, 3), 235, dtype=np.uint8)
        frame[-1, -1] = (0, 158, 115)
        for wall in self.walls:
            frame[divmod(wall, self.size)] = (60, 60, 60)
        frame[divmod(int(self.state["state"][0]), self.size)] = (0, 114, 178)
        image = frame.repeat(32, axis=0).repeat(32, axis=1)
        image[::32] = image[:, ::32] = 255
        return image


class Queue(TabularEnv):
    """Admission control of a queue that mixes slowly: accept or reject before each event; never ends.

    State q in {0..cap}.  With probability rho / (1 + rho) a customer arrives (admitted if action 1 and q < cap), else one is
    served.  Reward (1 + 1{admitted} - c q / cap) / 2, with q before the event.
    """

    reward_range = (0.0, 1.0)

    def __init__(
        self, num_envs: int = 1, *, rho: float = 0.9, cap: int = 30, c: float = 1.0, **kwargs: Any
    ) -> None:
        """rho: load (arrival over service rate), above 0.  cap: places.  c: holding cost of a full queue, 0 to 1."""
        if not rho > 0 or cap < 1 or not 0 <= c <= 1:
            raise ConfigError(f"queue: needs rho > 0, cap >= 1, 0 <= c <= 1, not rho={rho}, cap={cap}, c={c}")
        P = torch.zeros(cap + 1, 2, cap + 1, dtype=torch.float64)
        R = torch.zeros_like(P)
        arrival = rho / (1 + rho)
        for q in range(cap + 1):
            holding = 0.5 * (1 - c * q / cap)
            for action in range(2):
                admitted = action == 1 and q < cap
                P[q, action, q + 1 if admitted else q] += arrival
                P[q, action, max(q - 1, 0)] += 1 - arrival
                R[q, action] = holding
                if admitted:
                    R[q, action, q + 1] = holding + 0.5
        start = torch.zeros(cap + 1, dtype=torch.float64)
        start[0] = 1.0
        super().__init__(num_envs, P, R, start, **kwargs)
