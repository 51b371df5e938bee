"""PPGAE's advantage estimator: against the algorithm as it is written, and against exact values on long epochs."""

from __future__ import annotations

import pytest
import torch

from mobula.algorithms.common import average_reward as exact
from mobula.algorithms.policy_gradient.baselines.ppgae import advantages, window_statistics
from mobula.envs.continuing import GoalGrid


def literal(
    states: list[int], actions: list[int], rewards: list[float], N: int, pi: torch.Tensor
) -> torch.Tensor:
    """The scan of the algorithm, one state at a time."""
    A = torch.zeros_like(pi)
    horizon = len(states)
    for s in range(pi.shape[0]):
        windows, tau = [], 0
        while tau + N <= horizon:
            if states[tau] == s:
                windows.append((sum(rewards[tau : tau + N]), actions[tau]))
                tau += 2 * N
            else:
                tau += 1
        if windows:
            value = sum(y for y, _ in windows) / len(windows)
            for a in range(pi.shape[1]):
                q = sum(y for y, b in windows if b == a) / len(windows) / float(pi[s, a])
                A[s, a] = q - value
    return A


@pytest.mark.parametrize("window", [1, 3, 8])
def test_the_scan_equals_the_literal_one(window: int) -> None:
    g = torch.Generator().manual_seed(window)
    horizon, chains, S, A = 60, 4, 5, 3
    states = torch.randint(S - 1, (horizon, chains), generator=g)
    actions = torch.randint(A, (horizon, chains), generator=g)
    rewards = torch.rand(horizon, chains, generator=g, dtype=torch.float64)
    pi = torch.randn(S, A, generator=g, dtype=torch.float64).softmax(-1)
    found = advantages(*window_statistics(states, actions, rewards, window, S, A), pi)
    for chain in range(chains):
        columns = (states[:, chain].tolist(), actions[:, chain].tolist(), rewards[:, chain].tolist())
        assert torch.allclose(found[chain], literal(*columns, window, pi))
    # A state that was never visited gets 0.
    assert torch.equal(found[:, S - 1], torch.zeros(chains, A, dtype=torch.float64))


def test_windows_hold_exactly_their_rewards() -> None:
    """One visit, N = 3: y is the sum of three rewards; a window that is cut by the end of the epoch does not count."""
    states = torch.tensor([[0], [1], [1], [1], [1], [2]])
    rewards = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]])
    count, total, _ = window_statistics(states, torch.zeros_like(states), rewards, 3, 3, 1)
    assert count[0].tolist() == [1, 1, 0]
    assert total[0].tolist() == [7.0, 14.0, 0.0]


def test_long_epochs_give_the_exact_advantage_of_the_window() -> None:
    """E[y | s, a] - E[y | s] for sums of N rewards, by powers of the chain."""
    env = GoalGrid(200, size=3)
    P, R = env.model()
    g = torch.Generator().manual_seed(0)
    pi = (0.5 * torch.randn(8, 5, generator=g, dtype=torch.float64)).softmax(-1)
    P_pi, r_pi = exact.chain(P, R, pi)
    window, value = 4, torch.zeros(8, dtype=torch.float64)
    for _ in range(window - 1):
        value = r_pi + P_pi @ value
    Q = R + P @ value
    wanted = Q - (pi * Q).sum(-1, keepdim=True)
    obs, _ = env.reset(seed=1)
    rows: tuple[list, list, list] = ([], [], [])
    for _ in range(4000):
        action = torch.multinomial(pi[obs], 1, generator=g).squeeze(1)
        rows[0].append(obs)
        rows[1].append(action)
        obs, reward, *_ = env.step(action)
        rows[2].append(reward)
    statistics = window_statistics(*(torch.stack(column) for column in rows), window, 8, 5)
    pooled = [part.sum(0, keepdim=True) for part in statistics]
    assert torch.allclose(advantages(*pooled, pi)[0], wanted, atol=0.03)
