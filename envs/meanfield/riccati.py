"""Exact answers of linear-quadratic games: coupled Riccati equations, costs, best responses, exploitability.

Batched over any leading axes of an `LQGame`, float64, no inverses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mobula.envs.meanfield.lq_teams import LQGame, symmetric
from mobula.errors import ConfigError


class Equilibrium(NamedTuple):
    """K [..., N, T, p, n], P [..., N, T + 1, n, n]; per step [..., T]: smallest singular value of Phi, smallest real part of
    its eigenvalues, margin of block diagonal dominance.
    """

    K: Tensor
    P: Tensor
    sigma_min: Tensor
    min_real: Tensor
    margin: Tensor


def stage(game: LQGame, t: int, P: Tensor) -> tuple[Tensor, Tensor]:
    """(Phi [..., N p, N p], Psi [..., N p, n]) of step t, given P_{t+1} [..., N, n, n]: equilibrium gains solve Phi K = Psi.

    Phi^{ij} = 1{i=j} R^{ii} + B^i' P^i B^j,  Psi^i = B^i' P^i A.
    """
    A, B = game.A[..., t, :, :], game.B[..., t, :, :]
    N, n, p = B.shape[-3:]
    BP = B.mT @ P
    blocks = torch.einsum("...ipn,...jnq->...ipjq", BP, B)
    own = game.R[..., t, :, :].diagonal(dim1=-4, dim2=-3).movedim(-1, -3)
    eye = torch.eye(N, dtype=B.dtype)
    blocks = blocks + torch.einsum("...ipq,ij->...ipjq", own, eye)
    Psi = BP @ A.unsqueeze(-3)
    return blocks.reshape(*blocks.shape[:-4], N * p, N * p), Psi.reshape(*Psi.shape[:-3], N * p, n)


def step_back(game: LQGame, t: int, P: Tensor, K: Tensor) -> Tensor:
    """P_t [..., N, n, n] from P_{t+1} under gains K [..., N, p, n]: Q^i + sum_j K^j' R^{ij} K^j + A_K' P^i_{t+1} A_K."""
    closed = game.A[..., t, :, :] - (game.B[..., t, :, :] @ K).sum(-3)
    inputs = torch.einsum("...jpn,...ijpq,...jqm->...inm", K, game.R[..., t, :, :], K)
    closed = closed.unsqueeze(-3)
    return symmetric(game.Q[..., t, :, :] + inputs + closed.mT @ P @ closed)


def nash(game: LQGame) -> Equilibrium:
    """The feedback Nash equilibrium by the coupled Riccati equations.

    Raises ConfigError where Phi is singular (no unique equilibrium), and where Phi^{ii} is not positive definite: then team i's
    cost has no minimum over its own gain, and the first-order conditions hold at no equilibrium.  Both name the step.
    """
    P = game.Q[..., -1, :, :]
    N, n, p = *game.B.shape[-4:-3], game.A.shape[-1], game.B.shape[-1]
    gains, values, sigma, real, margin = [], [P], [], [], []
    for t in reversed(range(game.horizon)):
        Phi, Psi = stage(game, t, P)
        singular = torch.linalg.svdvals(Phi)[..., -1]
        if float(singular.min()) < 1e-10:
            raise ConfigError(f"no unique equilibrium at t={t}: sigma_min = {float(singular.min()):.1e}")
        blocks = Phi.reshape(*Phi.shape[:-2], N, p, N, p).transpose(-3, -2)
        own = symmetric(blocks.diagonal(dim1=-4, dim2=-3).movedim(-1, -3))
        curvature = torch.linalg.eigvalsh(own)[..., 0].reshape(-1, N).amin(0)
        if float(curvature.min()) <= 0:
            raise ConfigError(
                f"no equilibrium at t={t}: the cost of team {int(curvature.argmin()) + 1} is not convex in its own gain"
                f" (smallest eigenvalue of R + B'PB {float(curvature.min()):.3g}); raise its R, or look at Q and R_cross"
            )
        K = torch.linalg.solve(Phi, Psi).reshape(*Psi.shape[:-2], N, p, n)
        P = step_back(game, t, P, K)
        norms = torch.linalg.svdvals(blocks)
        diagonal = norms.diagonal(dim1=-3, dim2=-2)[..., -1, :]
        others = norms[..., 0].sum(-1) - norms.diagonal(dim1=-3, dim2=-2)[..., 0, :]
        gains.append(K)
        values.append(P)
        sigma.append(singular)
        real.append(torch.linalg.eigvals(Phi).real.amin(-1))
        margin.append((diagonal - others).amin(-1))
    return Equilibrium(
        torch.stack(gains[::-1], -3),
        torch.stack(values[::-1], -3),
        *(torch.stack(x[::-1], -1) for x in (sigma, real, margin)),
    )


def values(game: LQGame, K: Tensor) -> Tensor:
    """P [..., N, T + 1, n, n] of fixed gains K [..., N, T, p, n]: x'P^i_t x is i's cost to go without noise."""
    P = game.Q[..., -1, :, :]
    found = [P]
    for t in reversed(range(game.horizon)):
        P = step_back(game, t, P, K[..., t, :, :])
        found.append(P)
    return torch.stack(found[::-1], -3)


def expected_cost(P: Tensor, moment: Tensor, noise: Tensor) -> Tensor:
    """[..., N] cost of an initial second moment [..., n, n] and noise covariance [..., n, n] under values P."""
    first = (P[..., 0, :, :] * moment.unsqueeze(-3)).sum((-2, -1))
    return first + (P[..., 1:, :, :] * noise[..., None, None, :, :]).sum((-3, -2, -1))


def best_response(game: LQGame, K: Tensor, player: int) -> tuple[Tensor, Tensor]:
    """(gains [..., T, p, n], P [..., T + 1, n, n]) of the linear-quadratic regulator against the others' fixed gains."""
    P = game.Q[..., player, -1, :, :]
    gains, found = [], [P]
    for t in reversed(range(game.horizon)):
        others = K[..., t, :, :].clone()
        others[..., player, :, :] = 0.0
        A = game.A[..., t, :, :] - (game.B[..., t, :, :] @ others).sum(-3)
        B, R = game.B[..., player, t, :, :], game.R[..., player, :, t, :, :]
        S = symmetric(R[..., player, :, :] + B.mT @ P @ B)
        gain = torch.cholesky_solve(B.mT @ P @ A, torch.linalg.cholesky(S))
        inputs = torch.einsum("...jpn,...jpq,...jqm->...nm", others, R, others)
        closed = A - B @ gain
        P = symmetric(
            game.Q[..., player, t, :, :]
            + inputs
            + gain.mT @ R[..., player, :, :] @ gain
            + closed.mT @ P @ closed
        )
        gains.append(gain)
        found.append(P)
    return torch.stack(gains[::-1], -3), torch.stack(found[::-1], -3)


def exploitability(game: LQGame, K: Tensor, moment: Tensor, noise: Tensor) -> Tensor:
    """[..., N] own cost minus that of the best response; zero exactly at an equilibrium."""
    own = expected_cost(values(game, K), moment, noise)
    best = torch.stack(
        [
            expected_cost(best_response(game, K, i)[1].unsqueeze(-4), moment, noise).squeeze(-1)
            for i in range(game.players)
        ],
        -1,
    )
    return own - best


def iterated_best_response(game: LQGame, iterations: int) -> Tensor:
    """Gains [..., N, T, p, n] after players have answered each other in turn, `iterations` rounds from zero."""
    shape = (*game.B.shape[:-2], game.B.shape[-1], game.A.shape[-1])
    K = torch.zeros(shape, dtype=game.A.dtype)
    for _ in range(iterations):
        for i in range(game.players):
            K[..., i, :, :, :] = best_response(game, K, i)[0]
    return K


def finite_costs(
    games: LQGame, K: Tensor, noise: Tensor, start_cov: Tensor, start_mean: Tensor, agents: float
) -> Tensor:
    """[N] exact costs of populations of `agents` agents each (inf: the mean-field limit), gains K [2, N, T, p, n].

    The empirical deviations have covariance (1 - 1/M) Sigma, and the mean takes Sigma / M besides the common noise.
    """
    share = 1.0 / agents
    P = values(games, K)
    moments = torch.stack([(1 - share) * start_cov, torch.outer(start_mean, start_mean) + share * start_cov])
    noises = torch.stack([(1 - share) * noise[0], noise[1] + share * noise[0]])
    return expected_cost(P, moments, noises).sum(0)
