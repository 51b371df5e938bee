"""Independent epsilon-greedy Q-learning: each player takes the other for a part of the world.

Tables over (h, own state, own action) and nothing else; step sizes (H + 1) / (H + n) of the n-th visit (Jin, Allen-Zhu, Bubeck,
Jordan; NeurIPS 2018, arXiv 1807.03765).  There is no guarantee against a learning opponent: it is the naive peer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mobula.algorithms.games.fictitious_play_po import Play, Trajectories

EPSILON = 0.1


def q_step(Q: Tensor, visits: Tensor, state: Tensor, action: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, visits) [N, H, S, A] after one episode of every instance: Q_h <- Q_h + (H + 1) / (H + n) (r + max Q_{h+1} - Q_h).

    state [N, H + 1] own states, action [N, H], reward [N, H], one's own.  Later steps are updated first.
    """
    Q, visits = Q.clone(), visits.clone()
    N, H = action.shape
    rows = torch.arange(N)
    for h in reversed(range(H)):
        where = (rows, h, state[:, h], action[:, h])
        ahead = Q[rows, h + 1, state[:, h + 1]].amax(-1) if h + 1 < H else 0.0
        visits[where] += 1.0
        rate = (H + 1) / (H + visits[where])
        Q[where] += rate * (reward[:, h] + ahead - Q[where])
    return Q, visits


def epsilon_greedy(Q: Tensor, epsilon: float) -> Tensor:
    """The policy [..., A]; the first of equal actions."""
    A = Q.shape[-1]
    return (1 - epsilon) * torch.nn.functional.one_hot(Q.argmax(-1), A).double() + epsilon / A


class IndependentQ(Play):
    """`Play` with independent Q-learning in place of mirror steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tables = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (self.mu, self.nu)]
        self.mu, self.nu = (epsilon_greedy(Q, EPSILON) for Q, _ in self.tables)

    def _update(self, seen: Trajectories) -> None:
        for episode in range(seen.a.shape[1]):
            for player, (state, action, sign) in enumerate(((seen.i, seen.a, 1.0), (seen.j, seen.b, -1.0))):
                self.tables[player] = q_step(
                    *self.tables[player],
                    state[:, episode],
                    action[:, episode],
                    sign * seen.reward[:, episode],
                )
        self.mu, self.nu = (epsilon_greedy(Q, EPSILON) for Q, _ in self.tables)
