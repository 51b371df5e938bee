"""Zero-sum matrix games in a batch: exact equilibria with certificates.

The row player chooses x and maximises x'My, the column player y.  M [N, A, B] float64; strategies [N, A], [N, B]; values [N].
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_matrix
from torch import Tensor

from mobula.errors import DataError


class Solution(NamedTuple):
    """value [N], x [N, A], y [N, B], gap [N]: max_a (My)_a - min_b (x'M)_b, zero exactly at an equilibrium."""

    value: Tensor
    x: Tensor
    y: Tensor
    gap: Tensor


def certified(M: Tensor, x: Tensor, y: Tensor) -> Solution:
    """The strategies with the middle of what they guarantee as value, and the gap between the two guarantees."""
    upper = torch.einsum("nab,nb->na", M, y).amax(-1)
    lower = torch.einsum("nab,na->nb", M, x).amin(-1)
    return Solution((upper + lower) / 2, x, y, upper - lower)


def solve(M: Tensor) -> Solution:
    """Equilibria of all games: square kernels for small ones, one sparse linear program for chunks of larger ones.

    Ties are broken towards the smallest kernel, then the first in lexicographic order.  Raises DataError for a NaN.
    """
    if not bool(M.isfinite().all()):
        game, a, b = (~M.isfinite()).nonzero()[0].tolist()
        raise DataError(f"game {game} has the payoff {float(M[game, a, b])} at ({a}, {b})")
    small = min(M.shape[1:])
    return shapley_snow(M) if small <= 4 or (small <= 5 and len(M) <= 2000) else block_lp(M)


def shapley_snow(M: Tensor) -> Solution:
    """By square kernels (Shapley and Snow 1950): some r x r submatrix K gives an optimal pair by K y = 1, K'x = 1.

    Every candidate of all open games is solved at once, and taken only with a certificate: gap below 1e-9 on the whole game.
    """
    N, A, B = M.shape
    shift = M.amin((1, 2), keepdim=True) - 1.0
    shifted = M - shift
    x, y = M.new_zeros(N, A), M.new_zeros(N, B)
    open_games = torch.arange(N)
    for r in range(1, min(A, B) + 1):
        for rows in itertools.combinations(range(A), r):
            for columns in itertools.combinations(range(B), r):
                if not len(open_games):
                    return certified(M, x, y)
                K = shifted[open_games][:, rows][:, :, columns]
                one = K.new_ones(len(K), r, 1)
                found_y, bad_y = torch.linalg.solve_ex(K, one)
                found_x, bad_x = torch.linalg.solve_ex(K.mT, one)
                tried_x, tried_y = K.new_zeros(len(K), A), K.new_zeros(len(K), B)
                tried_x[:, rows] = found_x.squeeze(-1) / found_x.sum(1)
                tried_y[:, columns] = found_y.squeeze(-1) / found_y.sum(1)
                solution = certified(M[open_games], tried_x, tried_y)
                sums = (tried_x.sum(1) - 1).abs().maximum((tried_y.sum(1) - 1).abs())
                least = tried_x.amin(1).minimum(tried_y.amin(1))
                scale = 1e-9 * shifted[open_games].amax((1, 2))
                # Comparisons with a NaN, from a singular kernel, are false.
                good = (bad_x == 0) & (bad_y == 0) & (sums < 1e-8) & (least >= -1e-10)
                good &= solution.gap < scale
                taken = open_games[good]
                x[taken], y[taken] = tried_x[good].clamp_min(0.0), tried_y[good].clamp_min(0.0)
                open_games = open_games[~good]
    if len(open_games):
        # Only rounding can leave a game open: every game has a kernel.
        rest = block_lp(M[open_games])
        x[open_games], y[open_games] = rest.x, rest.y
    return certified(M, x, y)


def block_lp(M: Tensor, *, chunk: int = 2000) -> Solution:
    """By linear programming (HiGHS), `chunk` games as the blocks of one sparse program: max v, M'x >= v, sum x = 1.

    y is minus the dual of the inequalities.
    """
    xs, ys = [], []
    N, A, B = M.shape
    for start in range(0, N, chunk):
        part = M[start : start + chunk].numpy()
        n = len(part)
        below = block_diag([np.c_[-game.T, np.ones(B)] for game in part], format="csr")
        equal = block_diag([np.r_[np.ones(A), 0.0][None]] * n, format="csr")
        found: Any = linprog(  # type: ignore[call-overload]
            np.tile(np.r_[np.zeros(A), -1.0], n),
            csr_matrix(below),
            np.zeros(n * B),
            csr_matrix(equal),
            np.ones(n),
            bounds=([(0, None)] * A + [(None, None)]) * n,
            method="highs",
        )
        if found.status != 0:
            raise ArithmeticError(f"the linear program ended without a solution: {found.message}")
        xs.append(found.x.reshape(n, A + 1)[:, :A])
        ys.append(-found.ineqlin.marginals.reshape(n, B))
    x, y = (torch.tensor(np.concatenate(parts)).clamp_min(0.0) for parts in (xs, ys))
    return certified(M, x / x.sum(1, keepdim=True), y / y.sum(1, keepdim=True))
