"""Exact answers of structured zero-sum Markov games: values, best responses, duality gaps, equilibria by linear programming.

Policies: mu [..., H, S1, A] and nu [..., H, S2, B] on the own component (factored); mu [..., H, S, A] and nu [..., H, S, B]
on the state (single controller).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import lil_matrix
from torch import Tensor

from mobula.envs.games.tabular import FactoredGame, Game, SingleControllerGame


def reach(P: Tensor, pi: Tensor, start: int) -> Tensor:
    """d_h(s) = probability of s at step h: P [..., H, S, A, S], pi [..., H, S, A] -> [..., H, S]."""
    H, S = P.shape[-4], P.shape[-3]
    d = torch.zeros(*pi.shape[:-3], S, dtype=pi.dtype)
    d[..., start] = 1.0
    found = [d]
    for h in range(H - 1):
        d = torch.einsum("...s,...sa,...sat->...t", d, pi[..., h, :, :], P[..., h, :, :, :])
        found.append(d)
    return torch.stack(found, -2)


def plan(P: Tensor, R: Tensor, start: int, *, sign: float = 1.0) -> Tensor:
    """Best total reward [...] (sign 1: largest, -1: smallest) of the process P [..., H, S, A, S] with rewards R [..., H, S, A]."""
    V = torch.zeros((), dtype=R.dtype).expand(*R.shape[:-3], R.shape[-2])
    for h in reversed(range(R.shape[-3])):
        Q = R[..., h, :, :] + torch.einsum("...sat,...t->...sa", P[..., h, :, :, :], V)
        V = sign * (sign * Q).amax(-1)
    return V[..., start]


def effective(game: Game, mu: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards that each player faces given the other's policy: (for player 1 [..., H, S, A], for player 2 [..., H, S, B]).

    Factored: E1_h(i, a) = sum_j d2_h(j) sum_b r nu, and the mirror image.  Single controller: E1_h(s, a) = sum_b r nu, and
    E2_h(s, b) = d_h(s) sum_a mu r, whose sum over (h, s) is the value.  They are linear in the other's occupancy (player 2 of a
    single controller: in nu itself), so sums over episodes give hindsight.
    """
    if isinstance(game, FactoredGame):
        d1, d2 = reach(game.P1, mu, game.start[0]), reach(game.P2, nu, game.start[1])
        first = torch.einsum("...hijab,...hj,...hjb->...hia", game.r, d2, nu)
        second = torch.einsum("...hijab,...hi,...hia->...hjb", game.r, d1, mu)
        return first, second
    d = reach(game.P, mu, game.start)
    first = torch.einsum("...hsab,...hsb->...hsa", game.r, nu)
    return first, torch.einsum("...hsab,...hs,...hsa->...hsb", game.r, d, mu)


def value(game: Game, mu: Tensor, nu: Tensor) -> Tensor:
    """V^{mu, nu} at the start, [...]."""
    first, second = effective(game, mu, nu)
    if isinstance(game, FactoredGame):
        d = reach(game.P1, mu, game.start[0])
        return torch.einsum("...hia,...hi,...hia->...", first, d, mu)
    return torch.einsum("...hsb,...hsb->...", second, nu)


def best_values(game: Game, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(largest value of player 1 against `first`, smallest value that player 2 can reach against `second`), each [...]."""
    if isinstance(game, FactoredGame):
        upper = plan(game.P1, first, game.start[0])
        return upper, plan(game.P2, second, game.start[1], sign=-1.0)
    return plan(game.P, first, game.start), second.amin(-1).sum((-2, -1))


def gap(game: Game, mu: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(duality gap, V^{dagger, nu}, V^{mu, dagger}), each [...]; the gap is zero exactly at an equilibrium."""
    upper, lower = best_values(game, *effective(game, mu, nu))
    return upper - lower, upper, lower


def equilibrium_value(game: Game) -> float:
    """Value of one game (no leading axes) by linear programming over player 1's flows (HiGHS)."""
    if isinstance(game, FactoredGame):
        return _factored_value(game)
    return _single_controller_value(game)


def _flows(P: np.ndarray, start: int, width: int) -> tuple[lil_matrix, np.ndarray]:
    """Equality constraints of flows q_h(s, a) among `width` variables."""
    H, S, A, _ = P.shape
    rows, right = lil_matrix((H * S, width)), np.zeros(H * S)
    right[start] = 1.0
    for h in range(H):
        for s in range(S):
            for a in range(A):
                rows[h * S + s, (h * S + s) * A + a] += 1.0
                if h + 1 < H:
                    for t in range(S):
                        rows[(h + 1) * S + t, (h * S + s) * A + a] -= P[h, s, a, t]
    return rows, right


def _factored_value(game: FactoredGame) -> float:
    P1, P2, r = game.P1.numpy(), game.P2.numpy(), game.r.numpy()
    H, S1, A, _ = P1.shape
    S2, B = P2.shape[1], P2.shape[2]
    flows, width = H * S1 * A, H * S1 * A + H * S2
    equal, right = _flows(P1, game.start[0], width)
    below = lil_matrix((H * S2 * B, width))
    row = 0
    for h in range(H):
        for j in range(S2):
            for b in range(B):
                below[row, flows + h * S2 + j] = 1.0
                for i in range(S1):
                    for a in range(A):
                        below[row, (h * S1 + i) * A + a] = -r[h, i, j, a, b]
                if h + 1 < H:
                    for k in range(S2):
                        below[row, flows + (h + 1) * S2 + k] -= P2[h, j, b, k]
                row += 1
    objective = np.zeros(width)
    objective[flows + game.start[1]] = -1.0
    return _solve(objective, below, equal, right, flows, width)


def _single_controller_value(game: SingleControllerGame) -> float:
    P, r = game.P.numpy(), game.r.numpy()
    H, S, A, _ = P.shape
    B = r.shape[-1]
    flows, width = H * S * A, H * S * A + H * S
    equal, right = _flows(P, game.start, width)
    below = lil_matrix((H * S * B, width))
    for h in range(H):
        for s in range(S):
            for b in range(B):
                row = (h * S + s) * B + b
                below[row, flows + h * S + s] = 1.0
                for a in range(A):
                    below[row, (h * S + s) * A + a] = -r[h, s, a, b]
    objective = np.zeros(width)
    objective[flows:] = -1.0
    return _solve(objective, below, equal, right, flows, width)


def _solve(
    objective: np.ndarray, below: lil_matrix, equal: lil_matrix, right: np.ndarray, flows: int, width: int
) -> float:
    bounds = [(0, None)] * flows + [(None, None)] * (width - flows)
    found: Any = linprog(  # type: ignore[call-overload]
        objective,
        below.tocsr(),
        np.zeros(below.shape[0]),
        equal.tocsr(),
        right,
        bounds,
        method="highs",
    )
    if found.status != 0:
        raise ArithmeticError(f"the linear program ended without a solution: {found.message}")
    return -float(found.fun)
