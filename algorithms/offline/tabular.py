"""Offline learning on counts: exact fixed points of in-sample methods on finite data, batched over data sets and settings.

mu [..., S, A] empirical behaviour, r [..., S, A] mean rewards, P [..., S, A, S] empirical transitions (the mass of terminal ones is
left out).  Leading axes: data sets, then settings; a setting's tensors broadcast against them.  A state without data has the
value 0 and the uniform policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Operator = Callable[[Tensor, Tensor], Tensor]
"""(Q [..., S, A], mu [..., S, A]) -> V [..., S]: a monotone operator that commutes with constants."""

TOLERANCE = 1e-9


class Counts(NamedTuple):
    """Empirical tables and visits [..., S, A]."""

    mu: Tensor
    r: Tensor
    P: Tensor
    visits: Tensor


def count(
    obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor, S: int, A: int
) -> Counts:
    """Tables from rows [..., N] of indices, rewards and ends (float64); leading axes are data sets of equal size."""
    lead = obs.shape[:-1]
    pair = obs * A + action
    flat = torch.zeros(*lead, S * A, dtype=torch.float64)
    visits = flat.scatter_add(-1, pair, torch.ones_like(reward, dtype=torch.float64))
    total = flat.scatter_add(-1, pair, reward.double())
    moves = torch.zeros(*lead, S * A * S, dtype=torch.float64)
    moves = moves.scatter_add(-1, pair * S + next_obs, (~terminated).double())
    share = visits.clamp_min(1.0)
    P = moves.unflatten(-1, (S * A, S)) / share.unsqueeze(-1)
    visits = visits.unflatten(-1, (S, A))
    of_state = visits.sum(-1, keepdim=True)
    return Counts(
        visits / of_state.clamp_min(1.0),
        (total / share).unflatten(-1, (S, A)),
        P.unflatten(-2, (S, A)),
        visits,
    )


def iterate(
    counts: Counts, operator: Operator, gamma: float, settings: int = 1, most: int = 100_000
) -> tuple[Tensor, Tensor]:
    """(V [..., K, S], Q [..., K, S, A]) at the fixed point of V <- T(r + gamma P V), to 1e-9 (a gamma-contraction).

    `settings` K: the operator gets Q [..., K, S, A] and mu [..., 1, S, A].
    """
    mu, r = counts.mu.unsqueeze(-3), counts.r.unsqueeze(-3)
    lead, (S, A) = counts.mu.shape[:-2], counts.mu.shape[-2:]
    table = counts.P.flatten(-3, -2)
    seen = mu.sum(-1) > 0
    V = torch.zeros(*lead, settings, S, dtype=torch.float64)
    for _ in range(most):
        ahead = (table @ V.transpose(-1, -2)).transpose(-1, -2).unflatten(-1, (S, A))
        Q = r + gamma * ahead
        new = torch.where(seen, operator(Q, mu), 0.0)
        gap = float((new - V).abs().max())
        V = new
        # The distance to the fixed point is at most gamma / (1 - gamma) of the last step.
        if gap * gamma <= TOLERANCE * (1 - gamma):
            break
    ahead = (table @ V.transpose(-1, -2)).transpose(-1, -2).unflatten(-1, (S, A))
    return V, r + gamma * ahead


def expectile(Q: Tensor, mu: Tensor, tau: Tensor | float) -> Tensor:
    """The tau-expectile of Q under mu, tau at least 1/2: [..., S, A] -> [..., S].

    The root v of tau E(Q - v)_+ = (1 - tau) E(v - Q)_+; with the actions in falling order, the largest over k of
    (tau sum_{i<=k} mu Q + (1 - tau) sum_{i>k} mu Q) / (the same of mu).
    """
    values, order = Q.masked_fill(mu == 0, -torch.inf).sort(-1, descending=True)
    p = mu.expand_as(Q).gather(-1, order)
    weighted = torch.where(p > 0, p * values, 0.0)
    upper, lower = weighted.cumsum(-1), p.cumsum(-1)
    tau = torch.as_tensor(tau, dtype=Q.dtype)
    top = tau * upper + (1 - tau) * (upper[..., -1:] - upper)
    bottom = tau * lower + (1 - tau) * (lower[..., -1:] - lower)
    found = torch.where(p > 0, top / bottom.clamp_min(1e-300), -torch.inf)
    return found.amax(-1)


def extract(mu: Tensor, weight: Tensor) -> Tensor:
    """pi proportional to mu weight; mu where all weights vanish; uniform where there is no data."""
    pi = mu * weight
    mass = pi.sum(-1, keepdim=True)
    pi = torch.where(mass > 0, pi / mass.clamp_min(1e-300), mu)
    empty = mu.sum(-1, keepdim=True) == 0
    return torch.where(empty, 1.0 / mu.shape[-1], pi)


def extract_log(mu: Tensor, log_weight: Tensor) -> Tensor:
    """`extract` for positive weights given by their logarithms."""
    pi = (mu.clamp_min(1e-300).log() + log_weight).masked_fill(mu == 0, -torch.inf).softmax(-1)
    empty = mu.sum(-1, keepdim=True) == 0
    return torch.where(empty, 1.0 / mu.shape[-1], pi)


def policy_value(pi: Tensor, P: Tensor, r: Tensor, gamma: float) -> Tensor:
    """V^pi [..., S] of pi [..., S, A] in the true model P [S, A, S], r [S, A], by a linear system."""
    moves = torch.einsum("...sa,sat->...st", pi, P)
    gain = torch.einsum("...sa,sa->...s", pi, r)
    eye = torch.eye(len(P), dtype=P.dtype)
    return torch.linalg.solve(eye - gamma * moves, gain.unsqueeze(-1)).squeeze(-1)
