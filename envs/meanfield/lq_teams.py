"""Linear-quadratic games of teams with very many agents: definitions, a loader, and simulation of finite populations.

A game separates into two that share nothing: that of the deviations y = x - xbar and that of the means xbar
(Zaman, Koppel, Lauriere, Basar, arXiv 2403.11345, section 3).  Both have the same form, `LQGame`, so that every solver is
written once and batched over the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mobula.errors import ConfigError, DataError, nearest


def symmetric(x: Tensor) -> Tensor:
    """(X + X') / 2."""
    return (x + x.mT) / 2


class LQGame(NamedTuple):
    """x_{t+1} = A_t x_t + sum_i B^i_t u^i_t + w; player i pays sum_t x'Q^i_t x + sum_j u^j' R^{ij}_t u^j (and x'Q^i_T x at T).

    A [..., T, n, n], B [..., N, T, n, p], Q [..., N, T + 1, n, n], R [..., N, N, T, p, p] (R^{ij}: j's input in i's cost).
    """

    A: Tensor
    B: Tensor
    Q: Tensor
    R: Tensor

    @property
    def horizon(self) -> int:
        return self.A.shape[-3]

    @property
    def players(self) -> int:
        return self.B.shape[-4]

    @staticmethod
    def stack(games: Sequence[LQGame]) -> LQGame:
        """Several games of one shape along a new first axis."""
        return LQGame(*(torch.stack(parts) for parts in zip(*games, strict=True)))


@dataclass(frozen=True)
class LQTeams:
    """A mean-field game of N teams, stacked: `games` holds the deviation game [0] and the mean game [1] along the first axis.

    noise    [2, n, n] covariance of w in each: idiosyncratic Sigma, common Sigma^0
    reset    [2, n, n] covariance that rollouts start from, Sigma_y and Sigma_xbar
    start_cov, start_mean  covariance of the initial deviation [n, n] and initial mean [n] of a play; reported costs use them
    mask     [2, N, p, n] entries of the gains that a policy may use (layout "teams": own deviations only)
    blocks   teams of the layout "teams": the state of one of them has n / blocks entries; 1 for "stacked"
    """

    name: str
    games: LQGame
    noise: Tensor
    reset: Tensor
    start_cov: Tensor
    start_mean: Tensor
    mask: Tensor
    blocks: int = 1

    def moments(self) -> Tensor:
        """[2, n, n] second moments of the initial state in the limit: of the deviation, and of the mean."""
        return torch.stack([self.start_cov, torch.outer(self.start_mean, self.start_mean)])


def _over_time(x: Tensor, axes: int, steps: int) -> Tensor:
    """An array of `axes` axes, or one more in front for time, with time third from the end."""
    if x.ndim == axes:
        return x.unsqueeze(-3).expand(*x.shape[:-2], steps, *x.shape[-2:])
    return x.movedim(0, -3)


def lq_game(
    A: Tensor, B: Tensor, Q: Tensor, R: Tensor, horizon: int, R_cross: Tensor | None = None, *, bar: str = ""
) -> LQGame:
    """A game with the matrices A [n, n], B [N, n, p], Q [N, n, n] (also terminal), R [N, p, p] (own inputs).

    R_cross [N, N, p, p] holds the weights R^{ij} of j's input in i's cost, j != i (default 0).  They may be indefinite, as in
    zero-sum games; that the cost stays convex in the own gain turns on P_{t+1} too and is checked by `riccati.nash`.
    Each of them may change with time: it then has one more axis in front, of `horizon` steps (Q: `horizon` + 1, the last terminal).
    Raises ConfigError for an asymmetric Q or R_cross, an R that is not positive definite, or own weights in R_cross, naming
    the team and the step; `bar` ends the names of the weights ("_bar" in the mean game).
    """
    if B.shape[-1] != R.shape[-1]:
        raise ConfigError(f"B has {B.shape[-1]} inputs a team and R{bar} {R.shape[-1]}: they must agree")
    A, B, R = _over_time(A, 2, horizon), _over_time(B, 3, horizon), _over_time(R, 3, horizon)
    Q = _over_time(Q, 3, horizon + 1)
    players = len(B)
    weights = R.new_zeros(players, players, *R.shape[1:])
    if R_cross is not None:
        weights += _over_time(R_cross, 4, horizon)

    def is_symmetric(x: Tensor) -> Tensor:
        return ((x - x.mT).abs() <= 1e-12 + 1e-5 * x.abs()).all(-1).all(-1)

    def refuse(good: Tensor, says: str) -> None:
        """good [..., T]: the first place where it is false, by team and step."""
        if not bool(good.all()):
            *team, t = ((~good).nonzero()[0]).tolist()
            step = "" if bool((~good[tuple(team)]).all()) else f" at t={t}"
            raise ConfigError(says.format(*(k + 1 for k in team)) + step)

    refuse(is_symmetric(Q), f"Q{bar} of team {{}} is not symmetric")
    definite = torch.linalg.eigvalsh(R)[..., 0] > 0
    refuse(is_symmetric(R) & definite, f"R{bar} of team {{}} is not symmetric and positive definite")
    refuse(
        (weights.diagonal(dim1=0, dim2=1) == 0).all(-2).all(-2).mT,
        f"R_cross{bar} of team {{}} on its own inputs is not 0: R{bar} holds that weight",
    )
    refuse(is_symmetric(weights), f"R_cross{bar} of team {{}} on the inputs of team {{}} is not symmetric")
    weights[range(players), range(players)] = R
    return LQGame(A, B, Q, weights)


def root(cov: Tensor) -> Tensor:
    """L [..., n, n] with L L' = cov: Cholesky, or the symmetric root where a covariance is singular (no noise in some direction)."""
    L, info = torch.linalg.cholesky_ex(cov)
    if not bool(info.any()):
        return L
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)) @ vectors.mT


def _own_blocks(players: int, p: int, n: int, blocks: int) -> Tensor:
    """[2, N, p, n] entries of gains of the layout "teams": inputs on a population read the deviation of its own agent alone."""
    mask = torch.ones(2, players, p, n, dtype=torch.bool)
    input_of, state_of = torch.arange(p) * blocks // p, torch.arange(n) * blocks // n
    mask[0] = input_of[:, None] == state_of
    return mask


def _f64(data: Any) -> Tensor:
    return torch.tensor(np.asarray(data, dtype=np.float64))


def _stacked(name: str, A: Tensor, B: Tensor, Q: Tensor, horizon: int) -> LQTeams:
    """The games G1 and G2: R = 2, Abar = 0.1 I, Bbar = 0.2 B, Qbar = 2 Q, Rbar = 3, Sigma = 0.1 I, Sigma0 = 0.05 I, resets I."""
    n, players, p = A.shape[0], len(B), B.shape[-1]
    eye = torch.eye(n, dtype=torch.float64)
    R = torch.eye(p, dtype=torch.float64).expand(players, p, p)
    deviation = lq_game(A, B, Q, 2.0 * R, horizon)
    mean = lq_game(A + 0.1 * eye, 1.2 * B, 2.0 * Q, 3.0 * R, horizon)
    return LQTeams(
        name,
        LQGame.stack([deviation, mean]),
        torch.stack([0.1 * eye, 0.05 * eye]),
        torch.stack([eye, eye]),
        eye,
        torch.zeros(n, dtype=torch.float64),
        torch.ones(2, players, p, n, dtype=torch.bool),
    )


def g1(horizon: int = 5, rho: float = 1.0) -> LQTeams:
    """Two teams that steer one population with two states, A of spectral radius `rho`."""
    A = _f64([[0.9, 0.2], [-0.1, 0.8]])
    A = rho * A / torch.linalg.eigvals(A).abs().max()
    B = _f64([[[1.0], [0.3]], [[0.2], [1.0]]])
    Q = torch.stack([torch.diag(_f64([1.0, 0.2])), torch.diag(_f64([0.2, 1.0]))])
    return _stacked(f"G1(T={horizon}, rho={rho:g})", A, B, Q, horizon)


def g2(seed: int = 0, horizon: int = 10) -> LQTeams:
    """Three teams and three states at random; redrawn until both games are diagonally dominant at every step."""
    from mobula.envs.meanfield.riccati import nash

    rng = np.random.default_rng(seed)
    Q = torch.stack([torch.diag(0.1 + 0.9 * torch.eye(3, dtype=torch.float64)[i]) for i in range(3)])
    while True:
        A = _f64(rng.standard_normal((3, 3)))
        A = 0.9 * A / torch.linalg.eigvals(A).abs().max()
        B = torch.eye(3, dtype=torch.float64).unsqueeze(-1) + 0.3 * _f64(
            [rng.standard_normal(3) for _ in range(3)]
        ).unsqueeze(-1)
        teams = _stacked(f"G2(seed={seed})", A, B, Q, horizon)
        if float(nash(teams.games).margin.min()) > 0:
            return teams


def g3(horizon: int = 20) -> LQTeams:
    """Fleets of pursuers and evaders: agents with position and velocity; fleet 1 wants its mean at fleet 2's, fleet 2 the origin."""
    A = torch.block_diag(*[_f64([[1.0, 0.2], [0.0, 1.0]])] * 2)
    b = _f64([0.02, 0.2])
    B = torch.zeros(2, 4, 2, dtype=torch.float64)
    for i in range(2):
        for k in range(2):
            B[i, 2 * k : 2 * k + 2, k] = b if i == k else 0.3 * b
    own = torch.diag(_f64([1.0, 0.1]))
    zero = torch.zeros(2, 2, dtype=torch.float64)
    Q = torch.stack([torch.block_diag(own, zero), torch.block_diag(zero, own)])
    d = _f64([1.0, 0.0, -1.0, 0.0])
    Q_bar = torch.stack(
        [
            torch.outer(d, d) + 0.1 * torch.block_diag(torch.eye(2, dtype=torch.float64), zero),
            torch.block_diag(zero, own),
        ]
    )
    R = torch.stack([torch.diag(_f64([0.5, 4.0])), torch.diag(_f64([4.0, 0.5]))])
    eye = torch.eye(4, dtype=torch.float64)
    return LQTeams(
        f"G3(T={horizon})",
        LQGame.stack([lq_game(A, B, Q, R, horizon), lq_game(A, B, Q_bar, R, horizon)]),
        torch.stack([0.1 * eye, 0.05 * eye]),
        torch.stack([eye, eye]),
        eye,
        _f64([1.0, 0.0, -1.0, 0.0]),
        _own_blocks(2, 2, 4, 2),
        blocks=2,
    )


NAMES = ("A", "B", "Q", "R", "A_bar", "B_bar", "Q_bar", "R_bar", "Sigma", "Sigma0")
OPTIONAL = ("R_cross", "R_cross_bar", "Sigma_y", "Sigma_xbar", "start_cov", "start_mean")


def load_game(path: str | Path) -> LQTeams:
    """A game from a .npz or .json file with the arrays `NAMES` and the number `horizon` T.

    A, A_bar, Sigma, Sigma0 [n, n], B, B_bar [N, n, p], Q, Q_bar [N, n, n], R, R_bar [N, p, p]; Q_bar and R_bar are the whole
    weights of the means, A_bar and B_bar increments.  Optional (default 0): R_cross, R_cross_bar [N, N, p, p], entry (i, j) the
    weight of team j's input in team i's cost, nothing at i = j.
    Each of these arrays but Sigma and Sigma0 may have one more axis in front, time: T steps, for Q and Q_bar T + 1.
    Optional too: the covariances that rollouts are reset to, Sigma_y and Sigma_xbar [n, n] (default: the identity), and what a play
    begins with, start_cov [n, n] of the deviations (default: the identity) and start_mean [n] (default: 0).
    `blocks` (default 1, the layout "stacked") is the number of populations of the layout "teams": states and inputs are that many
    equal stretches, population by population, deviations of different populations have nothing to do with each other (A, B, Q, R
    and Sigma are block-diagonal; Sigma_y and start_cov as well), and inputs on one of them read its own deviation alone.
    Raises DataError where an array is missing, unknown, NaN or of another shape, ConfigError for weights that `lq_game` refuses, for
    covariances that are none (those of resets must not be singular), and for blocks that are not blocks.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
        else:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in file.files}
        arrays = {name: _f64(data[name]) for name in (*NAMES, *(k for k in OPTIONAL if k in data))}
        horizon, blocks = int(data["horizon"]), int(data.get("blocks", 1))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except KeyError as error:
        raise DataError(f"{path} lacks {error.args[0]}; it needs horizon and {', '.join(NAMES)}") from error
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"{path} cannot be read as arrays of numbers: {error}") from error
    # A misspelled optional array would be another game without a word.
    known = (*NAMES, *OPTIONAL, "horizon", "blocks")
    for name in data:
        if name not in known:
            raise DataError(f"{path}: {name} is no part of a game.{nearest(name, known)}")
    if arrays["A"].ndim not in (2, 3) or arrays["B"].ndim not in (3, 4):
        raise DataError(
            f"{path}: A has the axes [n, n] and B [N, n, p], both with time in front where they change; got"
            f" {[*arrays['A'].shape]}, {[*arrays['B'].shape]}"
        )
    if horizon < 1:
        raise DataError(f"{path}: horizon is {horizon}; at least 1 is needed")
    n, (players, _, p) = arrays["A"].shape[-1], arrays["B"].shape[-3:]
    shapes = {
        "A": (n, n),
        "B": (players, n, p),
        "Q": (players, n, n),
        "R": (players, p, p),
        "R_cross": (players, players, p, p),
        "start_mean": (n,),
    }
    for name, array in arrays.items():
        kind = name.removesuffix("_bar")
        fitting = [shapes.get(kind, (n, n))]
        if kind in shapes and name != "start_mean":
            fitting.append((horizon + (kind == "Q"), *fitting[0]))
        if tuple(array.shape) not in fitting or not bool(array.isfinite().all()):
            raise DataError(
                f"{path}: {name} is {tuple(array.shape)}; finite numbers {' or '.join(map(str, fitting))} are needed"
            )
    deviation = lq_game(arrays["A"], arrays["B"], arrays["Q"], arrays["R"], horizon, arrays.get("R_cross"))
    mean = lq_game(
        # With time in front, a constant array adds to each step.
        arrays["A"] + arrays["A_bar"],
        arrays["B"] + arrays["B_bar"],
        arrays["Q_bar"],
        arrays["R_bar"],
        horizon,
        arrays.get("R_cross_bar"),
        bar="_bar",
    )
    eye = torch.eye(n, dtype=torch.float64)
    covariances = {name: arrays.get(name, eye) for name in ("Sigma", "Sigma0", *OPTIONAL[2:5])}
    for name, cov in covariances.items():
        _check_covariance(f"{path}: {name}", cov, regular=name in ("Sigma_y", "Sigma_xbar"))
    teams = LQTeams(
        path.stem,
        LQGame.stack([deviation, mean]),
        torch.stack([covariances["Sigma"], covariances["Sigma0"]]),
        torch.stack([covariances["Sigma_y"], covariances["Sigma_xbar"]]),
        covariances["start_cov"],
        arrays.get("start_mean", torch.zeros(n, dtype=torch.float64)),
        torch.ones(2, players, p, n, dtype=torch.bool),
    )
    return teams if blocks == 1 else _in_blocks(teams, blocks, path)


def _check_covariance(name: str, cov: Tensor, regular: bool) -> None:
    smallest, largest = (float(x) for x in torch.linalg.eigvalsh(symmetric(cov))[[0, -1]])
    if not torch.allclose(cov, cov.mT, rtol=1e-5, atol=1e-12) or smallest < -1e-10 * max(largest, 1.0):
        raise ConfigError(f"{name} is no covariance: it must be symmetric, without negative eigenvalues")
    if regular and smallest <= 1e-10 * largest:
        raise ConfigError(
            f"{name} is singular: rollouts must be reset to every direction, or no gain can be learned"
        )


def _in_blocks(teams: LQTeams, blocks: int, path: Path) -> LQTeams:
    """The game in the layout "teams"."""
    A, B, Q, R = (part[0] for part in teams.games)
    n, players, p = A.shape[-1], B.shape[0], B.shape[-1]
    if blocks < 1 or n % blocks or p % blocks:
        raise DataError(
            f"{path}: blocks is {blocks}; {n} states and {p} inputs a team must be so many equal stretches"
        )
    state, put = torch.arange(n) * blocks // n, torch.arange(p) * blocks // p
    parts = {
        "A": (A, state, state),
        "B": (B, state, put),
        "Q": (Q, state, state),
        "R": (R, put, put),
        "Sigma": (teams.noise[0], state, state),
        "Sigma_y": (teams.reset[0], state, state),
        "start_cov": (teams.start_cov, state, state),
    }
    for name, (array, rows, columns) in parts.items():
        if bool((array != 0)[..., rows[:, None] != columns].any()):
            raise ConfigError(
                f"{path}: {name} couples the deviations of different populations; with blocks={blocks} it is block-diagonal"
            )
    return replace(teams, mask=_own_blocks(players, p, n, blocks), blocks=blocks)


# Finite populations -----------------------------------------------------------------------------------------


def play(teams: LQTeams, K: Tensor, sizes: int | Sequence[int], *, rollouts: int, seed: int = 0) -> Tensor:
    """Sampled costs [rollouts, N] of finite populations under the gains K [2, N, T, p, n] (deviation, mean).

    sizes  agents of each population: one number, or one a block of the layout "teams".  The mean is the empirical one.
    Raises ConfigError below two agents, where no deviation exists.
    """
    games, horizon = teams.games, teams.games.horizon
    n = games.A.shape[-1]
    counts = [sizes] * teams.blocks if isinstance(sizes, int) else list(sizes)
    if len(counts) != teams.blocks or min(counts) < 2:
        raise ConfigError(
            f"{teams.name} has {teams.blocks} population(s) of at least 2 agents; got sizes {counts}"
        )
    g = torch.Generator().manual_seed(seed)
    most = max(counts)
    members = torch.arange(most)[:, None] < torch.tensor(counts).repeat_interleave(n // teams.blocks)[None]
    weight = members.double() / members.sum(0)
    own, common = (root(c) for c in teams.noise)
    begin = root(teams.start_cov)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, n, dtype=torch.float64, generator=g)

    x = teams.start_mean + normal(rollouts, most) @ begin.mT
    cost = torch.zeros(rollouts, games.players, dtype=torch.float64)
    for t in range(horizon + 1):
        mean = (weight * x).sum(1)
        y = (x - mean[:, None]) * members
        Q, Q_bar = games.Q[0, :, t], games.Q[1, :, t]
        # Weights of the deviations are block-diagonal, so that agents of unlike numbers never meet in a product.
        spread = torch.einsum("rai,raj->rij", y * weight, y)
        cost += torch.einsum("kij,rij->rk", Q, spread)
        cost += torch.einsum("kij,ri,rj->rk", Q_bar, mean, mean)
        if t == horizon:
            break
        u_dev = -torch.einsum("kpi,rai->rakp", K[0, :, t], y)
        u_mean = -torch.einsum("kpi,ri->rkp", K[1, :, t], mean)
        closed = K[0, :, t] @ spread[:, None] @ K[0, :, t].mT
        cost += torch.einsum("ijpq,rjpq->ri", games.R[0, :, :, t], closed)
        cost += torch.einsum("ijpq,rjp,rjq->ri", games.R[1, :, :, t], u_mean, u_mean)
        moved = y @ games.A[0, t].mT + torch.einsum("knp,rakp->ran", games.B[0, :, t], u_dev)
        carried = mean @ games.A[1, t].mT + torch.einsum("knp,rkp->rn", games.B[1, :, t], u_mean)
        shock = normal(rollouts) @ common.mT
        x = (moved + (carried + shock)[:, None] + normal(rollouts, most) @ own.mT) * members
    return cost
