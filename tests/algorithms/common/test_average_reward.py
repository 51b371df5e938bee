"""Exact average-reward quantities against closed forms, powers of the chain and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from mobula.algorithms.common import average_reward as exact


def random_mdp(states: int = 6, actions: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    P = torch.rand(states, actions, states, generator=generator, dtype=torch.float64)
    return P / P.sum(-1, keepdim=True), torch.rand(states, actions, generator=generator, dtype=torch.float64)


def two_states(p: float, q: float) -> torch.Tensor:
    return torch.tensor([[1 - p, p], [q, 1 - q]], dtype=torch.float64)


def test_two_state_chain_in_closed_form() -> None:
    p, q = 0.2, 0.05
    P, R = two_states(p, q).unsqueeze(1), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    pi = torch.ones(2, 1, dtype=torch.float64)
    assert exact.stationary(two_states(p, q)).tolist() == pytest.approx([q / (p + q), p / (p + q)])
    assert float(exact.gain(P, R, pi)) == pytest.approx(q / (p + q))
    # V(0) - V(1) = (r(0) - r(1)) / (p + q), and d . V = 0.
    V = exact.differential_value(P, R, pi)
    assert float(V[0] - V[1]) == pytest.approx(1 / (p + q))
    assert float((exact.stationary(two_states(p, q)) * V).sum()) == pytest.approx(0.0, abs=1e-12)


def test_mixing_time_of_two_states_in_closed_form() -> None:
    p, q = 0.03, 0.01
    # ||P^m(0, .) - d||_TV = d(1) (1-p-q)^m with d(1) = p / (p + q), and with d(0) from state 1.
    worst = max(p, q) / (p + q)
    wanted = math.ceil(math.log(0.25 / worst) / math.log(1 - p - q))
    assert exact.mixing_time(two_states(p, q)) == wanted


def test_a_periodic_chain_never_mixes() -> None:
    assert exact.mixing_time(two_states(1.0, 1.0)) == float("inf")


def test_mixing_time_against_all_powers() -> None:
    P, R = random_mdp()
    pi = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    lazy = 0.02 * exact.chain(P, R, pi)[0] + 0.98 * torch.eye(6, dtype=torch.float64)
    d, power, m = exact.stationary(lazy), torch.eye(6, dtype=torch.float64), 0
    while float((0.5 * (power - d).abs().sum(-1)).max()) > 0.25:
        power, m = power @ lazy, m + 1
    assert exact.mixing_time(lazy) == m


def test_value_and_advantage_satisfy_poisson_s_equation() -> None:
    P, R = random_mdp(seed=3)
    pi = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    P_pi, r_pi = exact.chain(P, R, pi)
    d = exact.stationary(P_pi)
    assert torch.allclose(d @ P_pi, d)
    V = exact.differential_value(P, R, pi)
    assert torch.allclose(V, r_pi - exact.gain(P, R, pi) + P_pi @ V)
    assert torch.allclose(
        (pi * exact.advantage(P, R, pi)).sum(-1), torch.zeros(6, dtype=torch.float64), atol=1e-12
    )


def test_policy_gradient_against_finite_differences() -> None:
    P, R = random_mdp(states=4, seed=5)
    theta = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted, step = torch.zeros_like(theta), 1e-6
    for index in range(theta.numel()):
        bump = torch.zeros_like(theta)
        bump.view(-1)[index] = step
        up = exact.gain(P, R, (theta + bump).softmax(-1))
        down = exact.gain(P, R, (theta - bump).softmax(-1))
        wanted.view(-1)[index] = (up - down) / (2 * step)
    assert torch.allclose(exact.softmax_gradient(P, R, theta), wanted, atol=1e-8)


def test_relative_value_iteration_finds_the_best_deterministic_policy() -> None:
    P, R = random_mdp(states=4, actions=2, seed=7)
    gains = []
    for code in range(16):
        pi = torch.zeros(4, 2, dtype=torch.float64)
        pi[torch.arange(4), torch.tensor([code >> s & 1 for s in range(4)])] = 1.0
        gains.append(float(exact.gain(P, R, pi)))
    best, policy = exact.relative_value_iteration(P, R)
    assert best == pytest.approx(max(gains), abs=1e-10)
    assert gains[sum(int(a) << s for s, a in enumerate(policy))] == pytest.approx(max(gains), abs=1e-10)


def test_relative_value_iteration_takes_periodic_chains() -> None:
    P = two_states(1.0, 1.0).unsqueeze(1)
    gain, _ = exact.relative_value_iteration(P, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    assert gain == pytest.approx(0.5)
