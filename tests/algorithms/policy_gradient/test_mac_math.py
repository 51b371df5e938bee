"""The mathematics of MAC: levels, multi-level means, directions, steps."""

from __future__ import annotations

import pytest
import torch
from gymnasium import spaces

from mobula.algorithms.common import average_reward as exact
from mobula.algorithms.policy_gradient.chain import ChainModule, clip_gain, directions
from mobula.algorithms.policy_gradient.mac import (
    adagrad_norm,
    draw_levels,
    expected_length,
    mlmc,
    mlmc_weights,
    rollout_length,
)
from mobula.algorithms.policy_gradient.mac_experiment import mean_length, mlmc_bias


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_levels_are_geometric_from_one() -> None:
    levels = draw_levels(400_000, 4, generator())
    assert int(levels.min()) == 1
    for j in range(1, 6):
        assert float((levels == j).double().mean()) == pytest.approx(
            2.0**-j, abs=4 * (2.0**-j / 400_000) ** 0.5
        )


def test_resampled_levels_stay_below_the_longest() -> None:
    levels = draw_levels(100_000, 3, generator(), resample=True)
    assert int(levels.max()) == 3
    assert float((levels == 1).double().mean()) == pytest.approx(4 / 7, abs=0.01)


def test_lengths() -> None:
    assert [rollout_length(j, 4) for j in range(1, 7)] == [2, 4, 8, 16, 1, 1]


@pytest.mark.parametrize("j_max", [1, 2, 3, 4, 5])
def test_the_expected_length_is_the_sum_over_levels(j_max: int) -> None:
    summed = sum(2.0**-j * 2**j for j in range(1, j_max + 1)) + 2.0**-j_max
    assert expected_length(j_max) == pytest.approx(summed)


def test_the_mean_length_of_draws_is_within_one_per_cent() -> None:
    assert mean_length(draws=500_000, j_max=4).value == pytest.approx(1.0, abs=0.01)


def literal(q: torch.Tensor, level: int, j_max: int) -> torch.Tensor:
    """Step 4 as it is written."""
    if 2**level > 2**j_max:
        return q[0]
    return q[0] + 2**level * (q[: 2**level].mean(0) - q[: 2 ** (level - 1)].mean(0))


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5, 9])
def test_the_multi_level_mean_and_its_weights(level: int) -> None:
    q = torch.randn(rollout_length(level, 4), 3, dtype=torch.float64, generator=generator(level))
    assert torch.allclose(mlmc(q, level, 4), literal(q, level, 4))
    assert torch.allclose(mlmc_weights(level, 4) @ q, literal(q, level, 4))


def test_its_expectation_over_levels_is_the_longest_mean() -> None:
    """Exact, for a fixed sequence: sum_j P(J = j) q^MLMC(j) = q^{j_max}; with levels from 0 or redrawn it is not."""
    j_max = 4
    q = torch.randn(2**j_max, dtype=torch.float64, generator=generator(1))
    by_level = {j: mlmc(q[: rollout_length(j, j_max)], j, j_max) for j in range(1, j_max + 2)}
    above = 2.0**-j_max
    mean = sum(2.0**-j * by_level[j] for j in range(1, j_max + 1)) + above * by_level[j_max + 1]
    assert float(mean) == pytest.approx(float(q.mean()), abs=1e-12)
    redrawn = sum(2.0**-j * by_level[j] for j in range(1, j_max + 1)) / (1 - above)
    assert float(redrawn) == pytest.approx(float(q[0] + (q.mean() - q[0]) / (1 - above)), abs=1e-12)
    assert abs(float(redrawn - q.mean())) > 1e-3
    from_zero = sum(2.0 ** -(j + 1) * by_level[j] for j in range(1, j_max + 1))
    assert abs(float(from_zero - q.mean())) > 1e-3


def test_the_actor_s_direction_is_unbiased_on_sampled_rollouts() -> None:
    """Claim 3 of the experiment: within 4 standard errors of the exact mean of the longest rollout."""
    assert mlmc_bias(draws=200_000, j_max=4).value < 4


def module(states: int = 5, actions: int = 3) -> ChainModule:
    made = ChainModule(
        observation_space=spaces.Discrete(states),
        action_space=spaces.Discrete(actions),
        inference_only=False,
        model_config={"hidden": []},
    )
    with torch.no_grad():
        made.theta.copy_(torch.randn(states, actions, dtype=torch.float64, generator=generator(2)))
        made.omega.copy_(torch.randn(states, dtype=torch.float64, generator=generator(3)))
        made.eta.fill_(0.3)
    return made


def batch(n: int = 16) -> dict[str, torch.Tensor]:
    g = generator(4)
    return {
        "obs": torch.randint(5, (n,), generator=g),
        "actions": torch.randint(3, (n,), generator=g),
        "rewards": torch.rand(n, generator=g),
        "new_obs": torch.randint(5, (n,), generator=g),
        "weight": torch.randn(n, generator=g, dtype=torch.float64),
    }


def test_directions_of_a_table_in_closed_form() -> None:
    made, rows = module(), batch()
    (f,), (g,), (h,) = directions(made, rows)
    pi, V, eta = made.theta.detach().softmax(-1), made.omega.detach(), 0.3
    wanted_f, wanted_g, wanted_h = 0.0, torch.zeros(5).double(), torch.zeros(5, 3).double()
    for s, a, r, t, w in zip(
        *(rows[k].tolist() for k in ("obs", "actions", "rewards", "new_obs", "weight")), strict=True
    ):
        delta = r - eta + V[t] - V[s]
        wanted_f += w * (r - eta)
        wanted_g[s] += w * delta
        wanted_h[s] += w * delta * (torch.eye(3, dtype=torch.float64)[a] - pi[s])
    assert float(f) == pytest.approx(wanted_f)
    # The next value is not differentiated: g touches the rows of s alone.
    assert torch.allclose(g, wanted_g)
    assert torch.allclose(h, wanted_h)


def test_the_mean_direction_of_the_actor_is_the_exact_gradient() -> None:
    """With the true gain and value, E_d[delta grad log pi] is the policy gradient."""
    made = module()
    P = torch.rand(5, 3, 5, dtype=torch.float64, generator=generator(5))
    P, R = P / P.sum(-1, keepdim=True), torch.rand(5, 3, dtype=torch.float64, generator=generator(6))
    pi = made.theta.detach().softmax(-1)
    d = exact.stationary(exact.chain(P, R, pi)[0])
    with torch.no_grad():
        made.eta.copy_(exact.gain(P, R, pi))
        made.omega.copy_(exact.differential_value(P, R, pi))
    s, a, t = (
        index.flatten() for index in torch.meshgrid(*(torch.arange(n) for n in (5, 3, 5)), indexing="ij")
    )
    weight = d[s] * pi[s, a] * P[s, a, t]
    rows = {"obs": s, "actions": a, "rewards": R[s, a], "new_obs": t, "weight": weight}
    (f,), (g,), (h,) = directions(made, rows)
    assert torch.allclose(h, exact.softmax_gradient(P, R, made.theta.detach()), atol=1e-12)
    assert float(f) == pytest.approx(0.0, abs=1e-12)
    assert torch.allclose(g, torch.zeros_like(g), atol=1e-12)


def test_the_entropy_bonus_is_the_gradient_of_the_entropy() -> None:
    made, rows = module(), batch()
    (_,), _, (plain,) = directions(made, rows)
    (_,), _, (with_bonus,) = directions(made, rows, entropy_coeff=0.7)
    theta = made.theta.detach().clone().requires_grad_()
    entropy = torch.distributions.Categorical(logits=theta[rows["obs"]]).entropy()
    (wanted,) = torch.autograd.grad(0.7 * (rows["weight"] * entropy).sum(), theta)
    assert torch.allclose(with_bonus - plain, wanted)


def test_adagrad_norm_takes_one_norm_over_all_coordinates() -> None:
    q = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    accumulator, step = adagrad_norm(torch.tensor(11.0, dtype=torch.float64), q, 2.0, 0.0, 0)
    assert float(accumulator) == pytest.approx(36.0)
    assert float(step) == pytest.approx(2.0 / 6.0)
    _, decayed = adagrad_norm(torch.tensor(11.0, dtype=torch.float64), q, 2.0, 0.5, 8)
    assert float(decayed) == pytest.approx(2.0 / 6.0 / 3.0)


def test_adagrad_norm_stands_still_before_the_first_reward() -> None:
    accumulator, step = adagrad_norm(torch.zeros((), dtype=torch.float64), [torch.zeros(3)], 10.0, 0.0, 0)
    assert float(accumulator) == 0.0
    assert float(step) == 0.0


def test_the_gain_estimate_is_clipped_to_declared_rewards_only() -> None:
    eta = torch.tensor(1.7)
    assert float(clip_gain(eta, (0.0, 1.0))) == 1.0
    assert float(clip_gain(eta, (None, None))) == pytest.approx(1.7)
    assert float(clip_gain(-eta, (None, 1.0))) == pytest.approx(-1.7)


def test_the_variance_of_the_multi_level_mean_grows_slowly_with_the_longest_level() -> None:
    """Of order log2 T_max for independent samples, not T_max."""
    q = torch.randn(20_000, 64, dtype=torch.float64, generator=generator(7))
    variances = []
    for j_max in (2, 4, 6):
        levels = draw_levels(20_000, j_max, generator(8)).tolist()
        draws = [float(mlmc(q[i, : rollout_length(j, j_max), None], j, j_max)) for i, j in enumerate(levels)]
        variances.append(torch.tensor(draws).var().item())
    # Level j has 2^j - 1 weights of size 1 (the first sample's cancel), a level above the longest has one:
    # sum_j 2^-j (2^j - 1) + 2^-j_max.
    for j_max, variance in zip((2, 4, 6), variances, strict=True):
        assert variance == pytest.approx(j_max - 1 + 2.0 ** (1 - j_max), rel=0.1)
