"""Optimistic Nash value iteration: the centralised peer that solves a matrix game in every state.

Setting II of `fictitious_play_po` (the state is seen by both).  Player 1 plays the equilibrium strategy of the upper estimates,
player 2 that of the lower ones; counts and bonuses are those of the method (after Bai and Jin, ICML 2020, arXiv 2002.04017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobula.algorithms.common.games import matrix
from mobula.algorithms.games.fictitious_play_po import Play, Trajectories, bonuses


def nash_value_iteration(r: Tensor, P: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mu [N, H, S, A], nu [N, H, S, B], V_low, V_up [N, S] at the first step) for estimates r [N, H, S, A, B], P [N, H, S, A, S].

    Q = clip(r + P V +- bonus, 0, H - h); V is the value of the matrix game Q_h(s, ., .).  With bonus 0 the equilibrium of the game.
    """
    N, H, S, A, B = r.shape
    tables: list[tuple[Tensor, Tensor]] = []
    V_up, V_low = r.new_zeros(N, S), r.new_zeros(N, S)
    for h in reversed(range(H)):
        games = []
        for V, sign in ((V_up, 1.0), (V_low, -1.0)):
            ahead = torch.einsum("nsat,nt->nsa", P[:, h], V).unsqueeze(-1)
            games.append((r[:, h] + ahead + sign * bonus[:, h]).clamp(0.0, H - h))
        solved = matrix.solve(torch.cat(games).reshape(-1, A, B))
        V_up, V_low = solved.value.reshape(2, N, S)
        tables.append((solved.x.reshape(2, N, S, A)[0], solved.y.reshape(2, N, S, B)[1]))
    mu, nu = (torch.stack(parts[::-1], 1) for parts in zip(*tables, strict=True))
    return mu, nu, V_low, V_up


class NashVI(Play):
    """`Play` with the update of Nash value iteration in place of mirror steps."""

    def _update(self, seen: Trajectories) -> None:
        r, (P,) = self.counts.model()
        reward, (moving,) = bonuses(self.counts, False, self._horizon(), self.delta, self.scale)
        self.mu, self.nu, low, high = nash_value_iteration(r, P, reward + moving.unsqueeze(-1))
        self.bounds = torch.stack([low[:, self.game.start], high[:, self.game.start]])  # type: ignore[index]
