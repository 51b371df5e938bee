"""General-sum matrix games in a batch: correlated and coarse correlated equilibria, and Nash equilibria of two players.

Payoffs U [N, n, A_1, .., A_n] of n players in N games, float64; joint distributions p [N, A_1, .., A_n].
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import block_diag
from torch import Tensor

from mobula.errors import ConfigError, DataError

SELECTIONS = ("welfare", "egalitarian")
LARGEST = 4
"""Actions of each player up to which Nash equilibria are enumerated."""


def _checked(U: Tensor) -> Tensor:
    if U.ndim < 3 or U.shape[1] != U.ndim - 2:
        raise DataError(
            f"payoffs have shape {tuple(U.shape)}; [games, players, actions of 1, .., actions of n] is needed"
        )
    if not bool(U.isfinite().all()):
        place = (~U.isfinite()).nonzero()[0].tolist()
        raise DataError(
            f"game {place[0]}: player {place[1]} has the payoff {float(U[tuple(place)])} at {tuple(place[2:])}"
        )
    return U


# Correlated equilibria -------------------------------------------------------------------------------------


def deviations(U: Tensor, *, coarse: bool) -> Tensor:
    """What deviations gain, linear in the joint distribution: [N, D, A_1 * .. * A_n]; an equilibrium has G p <= 0.

    coarse   rows (i, a'): U_i(a', a_-i) - U_i(a), decided before any advice is seen
    else     rows (i, a, a'): the same on the advice a of player i alone, 0 elsewhere
    """
    rows = []
    for i in range(U.shape[1]):
        own = U[:, i].movedim(1 + i, 1)
        # [N, a', a, others]: the payoff of a' less that of a.
        gain = own.unsqueeze(2) - own.unsqueeze(1)
        size = own.shape[1]
        if not coarse:
            # On advice a alone: [N, a, a', a, others].
            on = torch.eye(size, dtype=U.dtype).view(1, size, 1, size, *[1] * (own.ndim - 2))
            gain = (on * gain.unsqueeze(1)).flatten(1, 2)
        rows.append(gain.movedim(2, 2 + i).flatten(2))
    return torch.cat(rows, 1)


def gap(U: Tensor, p: Tensor, *, coarse: bool) -> Tensor:
    """Largest gain [N] of a deviation from p, 0 or less exactly at a (coarse) correlated equilibrium."""
    return torch.einsum("ndk,nk->nd", deviations(U, coarse=coarse), p.flatten(1)).amax(1)


def correlated(
    U: Tensor, *, coarse: bool = False, select: str = "welfare", chunk: int = 500
) -> tuple[Tensor, Tensor]:
    """(p [N, A_1, .., A_n], gap [N]): the (coarse) correlated equilibrium of the largest sum of payoffs, or, with
    select="egalitarian", of the largest payoff of the worst-off player.  One sparse linear program (HiGHS) for `chunk` games.

    Raises DataError for a payoff that is no number, ConfigError for another selection.
    """
    _checked(U)
    if select not in SELECTIONS:
        raise ConfigError(f"select is {select!r}; it is one of {', '.join(SELECTIONS)}")
    N, n = U.shape[:2]
    K = math.prod(U.shape[2:])
    G, flat = deviations(U, coarse=coarse).numpy(), U.reshape(N, n, K).numpy()
    worst = select == "egalitarian"
    found = []
    for start in range(0, N, chunk):
        blocks = []
        for gains, payoffs in zip(G[start : start + chunk], flat[start : start + chunk], strict=True):
            # With a last variable t, which no player's payoff may be below.
            below = np.c_[gains, np.zeros(len(gains))]
            blocks.append(np.r_[below, np.c_[-payoffs, np.ones(n)]] if worst else gains)
        m, width = len(blocks), K + worst
        objective = np.tile(np.r_[np.zeros(K), -1.0], m) if worst else -flat[start : start + m].sum(1).ravel()
        answer: Any = linprog(  # type: ignore[call-overload]
            objective,
            block_diag(blocks, format="csr"),
            np.zeros(m * len(blocks[0])),
            block_diag([np.r_[np.ones(K), np.zeros(int(worst))][None]] * m, format="csr"),
            np.ones(m),
            bounds=([(0, None)] * K + [(None, None)] * worst) * m,
            method="highs",
        )
        if answer.status != 0:
            raise ArithmeticError(f"the linear program ended without a solution: {answer.message}")
        found.append(answer.x.reshape(m, width)[:, :K])
    p = torch.tensor(np.concatenate(found)).clamp_min(0.0)
    p = (p / p.sum(1, keepdim=True)).reshape(N, *U.shape[2:])
    return p, gap(U, p, coarse=coarse)


# Nash equilibria of two players ----------------------------------------------------------------------------


class Pair(NamedTuple):
    """Strategies x [N, A], y [N, B], expected payoffs [N, 2], regret [N]: the larger one of both players."""

    x: Tensor
    y: Tensor
    payoffs: Tensor
    regret: Tensor


def nash(U: Tensor, *, select: str = "first", tolerance: float = 1e-8) -> Pair:
    """A Nash equilibrium of two-player games U [N, 2, A, B], A and B at most 4, from all extreme ones.

    The candidates for x make the columns J of a square block (I, J) of player 2's payoffs equal, those for y the rows of a block of
    player 1's; every game has an equilibrium among their pairs (Mangasarian 1964), degenerate games too, whose two blocks may differ.
    select   "first": smallest block of x, then of y, then in lexicographic order; "welfare": the largest sum of payoffs
    Regrets are at most `tolerance` times the spread of the game's payoffs.
    """
    _checked(U)
    if select not in ("first", "welfare"):
        raise ConfigError(f"select is {select!r}; it is one of first, welfare")
    if U.shape[1] != 2 or max(U.shape[2:]) > LARGEST:
        raise DataError(f"two players with at most {LARGEST} actions are needed; got shape {tuple(U.shape)}")
    most = max(1, 20_000_000 // len(list(_blocks(*U.shape[2:]))) ** 2)
    parts = [_nash(part, select, tolerance) for part in U.split(most)]
    return Pair(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _blocks(A: int, B: int) -> Any:
    for r in range(1, min(A, B) + 1):
        yield from itertools.product(itertools.combinations(range(A), r), itertools.combinations(range(B), r))


def _extremes(M: Tensor) -> Tensor:
    """Strategies of the row player [N, K, A] that make columns of M [N, A, B] equal, block by block; NaN where there is none."""
    N, A, B = M.shape
    found = []
    for rows, columns in _blocks(A, B):
        r = len(rows)
        # M' x = v on the columns, sum x = 1.
        system = M.new_zeros(N, r + 1, r + 1)
        system[:, :r, :r] = M[:, rows][:, :, columns].mT
        system[:, :r, r], system[:, r, :r] = -1.0, 1.0
        right = M.new_zeros(N, r + 1, 1)
        right[:, r] = 1.0
        answer, bad = torch.linalg.solve_ex(system, right)
        x = M.new_zeros(N, A)
        x[:, rows] = answer[:, :r, 0]
        x[(bad != 0) | (x.amin(1) < -1e-10) | ~x.isfinite().all(1)] = torch.nan
        found.append(x.clamp_min(0.0))
    return torch.stack(found, 1)


def _nash(U: Tensor, select: str, tolerance: float) -> Pair:
    # Differences of payoffs in units of the game's spread: what is singular does not depend on the unit.
    low = U.amin((2, 3), keepdim=True)
    spread = (U.amax((2, 3), keepdim=True) - low).clamp_min(1e-300)
    first, second = ((U - low) / spread).unbind(1)
    x, y = _extremes(second), _extremes(first.mT)
    row, column = torch.einsum("nab,nkb->nka", first, y), torch.einsum("nab,nka->nkb", second, x)
    one, two = torch.einsum("nka,nla->nkl", x, row), torch.einsum("nkb,nlb->nkl", column, y)
    regret = (row.amax(-1).unsqueeze(1) - one).maximum(column.amax(-1).unsqueeze(2) - two)
    good = regret < tolerance
    if not bool(good.flatten(1).any(1).all()):
        game = int((~good.flatten(1).any(1)).nonzero()[0])
        raise ArithmeticError(
            f"no equilibrium of game {game} of a chunk is within {tolerance:g}: its payoffs are near-degenerate"
        )
    scale = spread.view(-1, 2, 1, 1)
    welfare = (scale[:, 0] * one + scale[:, 1] * two).where(good, -torch.inf)
    # The first of those whose welfare is the best to rounding.
    best = welfare.flatten(1).amax(1)[:, None, None]
    wanted = good if select == "first" else welfare >= best - 1e-9 * scale.sum(1)
    place = wanted.flatten(1).int().argmax(1)
    n = torch.arange(len(U))
    kx, ky = place // y.shape[1], place % y.shape[1]
    x, y = x[n, kx], y[n, ky]
    return Pair(x, y, torch.einsum("niab,na,nb->ni", U, x, y), (regret[n, kx, ky] * scale.amax((1, 2, 3))))
