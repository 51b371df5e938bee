"""Exact quantities of tabular average-reward problems, by linear algebra in float64.

P [S, A, S] transition probabilities, R [S, A] expected rewards, pi [S, A] policy.  The chain of the policy must have one
recurrent class (unichain).
"""

from __future__ import annotations

import torch
from torch import Tensor


def chain(P: Tensor, R: Tensor, pi: Tensor) -> tuple[Tensor, Tensor]:
    """(P_pi [S, S], r_pi [S]): what the policy makes of the MDP."""
    return torch.einsum("sa,sat->st", pi, P), (pi * R).sum(-1)


def stationary(P_pi: Tensor) -> Tensor:
    """Stationary law d [S]: d P = d, sum d = 1."""
    size = P_pi.shape[-1]
    identity = torch.eye(size, dtype=P_pi.dtype)
    # (I - P^T) d = 0 has rank S - 1 in a unichain; adding the row of ones to each equation makes it regular.
    system = identity - P_pi.transpose(-1, -2) + 1.0
    return torch.linalg.solve(system, torch.ones(*P_pi.shape[:-1], dtype=P_pi.dtype))


def gain(P: Tensor, R: Tensor, pi: Tensor) -> Tensor:
    """J = sum_s d(s) r_pi(s), reward per step in the long run."""
    P_pi, r_pi = chain(P, R, pi)
    return (stationary(P_pi) * r_pi).sum(-1)


def differential_value(P: Tensor, R: Tensor, pi: Tensor) -> Tensor:
    """V [S] with V = r_pi - J + P_pi V and d . V = 0 (Poisson's equation)."""
    P_pi, r_pi = chain(P, R, pi)
    d = stationary(P_pi)
    size = P_pi.shape[-1]
    fundamental = torch.eye(size, dtype=P_pi.dtype) - P_pi + d.expand(size, size)
    return torch.linalg.solve(fundamental, r_pi - (d * r_pi).sum())


def advantage(P: Tensor, R: Tensor, pi: Tensor) -> Tensor:
    """A [S, A] = R - J + P V - V."""
    V = differential_value(P, R, pi)
    return R - gain(P, R, pi) + P @ V - V[:, None]


def softmax_gradient(P: Tensor, R: Tensor, theta: Tensor) -> Tensor:
    """Exact gradient of J for pi = softmax(theta), [S, A]: d(s) pi(a|s) A(s, a)."""
    pi = theta.softmax(-1)
    d = stationary(chain(P, R, pi)[0])
    return d[:, None] * pi * advantage(P, R, pi)


def relative_value_iteration(
    P: Tensor, R: Tensor, *, tolerance: float = 1e-12, max_iterations: int = 1_000_000
) -> tuple[float, Tensor]:
    """(J*, greedy policy [S] of action indices) of a unichain MDP.

    The aperiodicity transformation P <- (P + I) / 2 leaves gains and policies as they are (Puterman 1994, 8.5.4).
    Raises ValueError if the span of the updates does not fall below `tolerance`.
    """
    size = P.shape[0]
    lazy = 0.5 * (P + torch.eye(size, dtype=P.dtype)[:, None, :])
    h = torch.zeros(size, dtype=P.dtype)
    for _ in range(max_iterations):
        Q = R + lazy @ h
        new = Q.max(-1).values
        change = new - h
        h = new - new[0]
        if float(change.max() - change.min()) < tolerance:
            return float((change.max() + change.min()) / 2), Q.argmax(-1)
    raise ValueError(f"relative value iteration did not converge in {max_iterations} iterations")


def mixing_time(P_pi: Tensor, *, epsilon: float = 0.25, longest: int = 2**40) -> float:
    """min{m: max_s ||P^m(s, .) - d||_TV <= epsilon}; infinity for a chain that does not mix (periodic).

    The distance falls with m, so the first m is found by doubling and bisection on powers of P.
    """
    d = stationary(P_pi)

    def mixed(power: Tensor) -> bool:
        return bool((0.5 * (power - d).abs().sum(-1)).max() <= epsilon)

    if mixed(torch.eye(len(P_pi), dtype=P_pi.dtype)):
        return 0.0
    powers = [P_pi]
    while not mixed(powers[-1]):
        if 2 ** len(powers) > longest:
            return float("inf")
        powers.append(powers[-1] @ powers[-1])
    # P^(2^k) has mixed, P^(2^(k-1)) has not: add the largest powers that keep it unmixed.
    below, count = torch.eye(len(P_pi), dtype=P_pi.dtype), 0
    for exponent in range(len(powers) - 2, -1, -1):
        candidate = below @ powers[exponent]
        if not mixed(candidate):
            below, count = candidate, count + 2**exponent
    return float(count + 1)
