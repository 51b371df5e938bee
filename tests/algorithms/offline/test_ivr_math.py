"""SQL and EQL: losses against numerical minimisers, tabular operators against bisection, fixed points against linear programs of
the theory, steps of several seeds and learners against single ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium import spaces
from scipy import optimize
from torch import Tensor

from mobula.algorithms.offline import ivr, tabular
from mobula.algorithms.offline.baselines.iql import expectile_loss
from mobula.algorithms.offline.baselines.td3_bc import actor_objective
from mobula.algorithms.offline.ivr import KL, ChiSquare


def problem(seed: int = 0, states: int = 6, actions: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    Q = 3 * torch.randn(states, actions, generator=g, dtype=torch.float64)
    mu = torch.rand(states, actions, generator=g, dtype=torch.float64)
    mu[0, 1] = mu[1, :3] = 0.0
    return Q, mu / mu.sum(-1, keepdim=True)


def minimiser(function: object, low: float = -30.0, high: float = 30.0) -> float:
    return float(
        optimize.minimize_scalar(function, bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x
    )


@pytest.mark.parametrize("alpha", [0.03, 0.5, 4.0])
def test_values_minimise_the_losses(alpha: float) -> None:
    """The closed forms are the minimisers of (1), of (2) and of the expectile loss over samples from mu."""
    Q, mu = problem()
    sparse = ivr.sparse_value(Q, mu, alpha)
    soft = ivr.log_sum_exp_value(Q, mu, alpha)
    middle = tabular.expectile(Q, mu, 0.8)
    for s in range(len(Q)):

        def sql(v: float, s: int = s) -> float:
            z = (1 + (Q[s] - v) / (2 * alpha)).clamp_min(0.0)
            return float((mu[s] * z.square()).sum() + v / alpha)

        def expectile(v: float, s: int = s) -> float:
            gap = Q[s] - v
            return float((mu[s] * torch.where(gap < 0, 0.2, 0.8) * gap.square()).sum())

        assert float(sparse[s]) == pytest.approx(minimiser(sql), abs=1e-5)
        assert float(middle[s]) == pytest.approx(minimiser(expectile), abs=1e-5)
        seen = mu[s] > 0
        slope = float((mu[s] * ((Q[s] - soft[s]) / alpha).masked_fill(~seen, 0).exp()).sum())
        assert slope == pytest.approx(1.0, abs=1e-9)


def test_sample_losses_have_the_stated_gradients() -> None:
    """d(1)/dV = (1 - E z_+) / alpha; d(2)/dV = e^-m (1 - E e^z [z < 5]) / alpha: zero at the closed forms."""
    Q, mu = problem(1)
    s, n, alpha = 2, 200_000, 0.7
    g = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(mu[s], n, replacement=True, generator=g)
    q = Q[s, drawn]
    for v0 in (float(ivr.sparse_value(Q, mu, alpha)[s]), 0.3):
        v = torch.full((1, n), v0, dtype=torch.float64, requires_grad=True)
        ivr.sparse_value_loss(q.unsqueeze(0), v, alpha).sum().backward()
        z = (1 + (q - v0) / (2 * alpha)).clamp_min(0)
        assert float(v.grad.sum()) == pytest.approx(float((1 - z.mean()) / alpha), abs=1e-9)  # type: ignore[union-attr]
    assert float(
        (1 + (q - ivr.sparse_value(Q, mu, alpha)[s]) / (2 * alpha)).clamp_min(0).mean()
    ) == pytest.approx(1.0, abs=0.02)
    v0 = float(ivr.log_sum_exp_value(Q, mu, alpha)[s])
    for shift in (0.0, 1.0):
        v = torch.full((1, n), v0 - shift, dtype=torch.float64, requires_grad=True)
        peak = ((q - v.detach()) / alpha).clamp_max(5.0).amax(-1)
        ivr.exponential_value_loss(q.unsqueeze(0), v, alpha, peak).sum().backward()
        z = (q - v0 + shift) / alpha
        m = max(-1.0, min(5.0, float(z.max())))
        wanted = (1 - (z.exp() * (z <= 5)).mean()) / alpha * torch.tensor(-m).exp()
        assert float(v.grad.sum()) == pytest.approx(float(wanted), abs=1e-6)  # type: ignore[union-attr]


def test_the_cap_and_the_floor_of_the_exponent() -> None:
    v = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[100.0, 0.0]], dtype=torch.float64)
    ivr.exponential_value_loss(q, v, 1.0, torch.tensor([5.0]).double()).sum().backward()
    # The capped row keeps the linear term alone: it pushes V down, whatever its q.
    e = torch.tensor(-5.0, dtype=torch.float64).exp()
    torch.testing.assert_close(v.grad, torch.stack([e / 2, e / 2 * (1 - 1)]).unsqueeze(0))  # type: ignore[arg-type]
    low = ivr.exponential_value_loss(q - 200, v.detach(), 1.0, torch.tensor([-100.0]).double())
    assert float(low) == pytest.approx(float((torch.tensor([-99.0, -199.0]).exp()).mean()), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 1.0, 10.0])
def test_general_divergences_agree_with_the_closed_forms(alpha: float) -> None:
    Q, mu = problem(3)
    V, w = ivr.regularised_value(Q, mu, alpha, KL())
    torch.testing.assert_close(V, ivr.log_sum_exp_value(Q, mu, alpha), atol=1e-8, rtol=0)
    torch.testing.assert_close(w, ((Q - V.unsqueeze(-1)) / alpha).exp() * (mu > 0), atol=1e-7, rtol=1e-7)
    V, w = ivr.regularised_value(Q, mu, alpha, ChiSquare())
    mass = mu * w
    torch.testing.assert_close(mass.sum(-1), torch.ones(6).double(), atol=1e-9, rtol=0)
    # The pitfall of the method's description: practical = exact - alpha (E w^2 - 1), w at U = practical - alpha.
    practical = ivr.sparse_value(Q, mu, alpha)
    torch.testing.assert_close(practical, V - alpha * ((mass * w).sum(-1) - 1), atol=1e-8, rtol=0)
    # The regularised value is the maximum of E_pi Q - alpha E_mu[w f(w)] over policies: compare with any other.
    g = torch.Generator().manual_seed(0)
    for divergence in (KL(), ChiSquare()):
        V, w = ivr.regularised_value(Q, mu, alpha, divergence)

        def objective(w: Tensor, divergence: object = divergence) -> Tensor:
            cost = torch.where(w > 0, w * divergence.f(w.clamp_min(1e-300)), 0.0)  # type: ignore[attr-defined]
            return (mu * w * Q).sum(-1) - alpha * (mu * cost).sum(-1)

        best = objective(w)
        for _ in range(20):
            other = torch.rand(Q.shape, generator=g, dtype=torch.float64) ** 3 * (mu > 0)
            other = other / (mu * other).sum(-1, keepdim=True)
            assert bool((objective(0.9 * w + 0.1 * other) <= best + 1e-9).all())
        # For one step, V = U + alpha E w^2 f'(w) is the value of that maximum.
        torch.testing.assert_close(V, best, atol=1e-8, rtol=0)


def test_a_divergence_of_one_s_own() -> None:
    """h(x) = x f(x) with f(x) = (x^2 - 1) / 2: h' = (3 x^2 - 1) / 2, g(y) = sqrt((2 y + 1) / 3)."""

    class Cubic:
        def f(self, x: Tensor) -> Tensor:
            return (x.square() - 1) / 2

        def df(self, x: Tensor) -> Tensor:
            return x

        def g(self, y: Tensor) -> Tensor:
            return ((2 * y + 1) / 3).clamp_min(0.0).sqrt()

    Q, mu = problem(4)
    V, w = ivr.regularised_value(Q, mu, 0.5, Cubic())
    torch.testing.assert_close((mu * w).sum(-1), torch.ones(6).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        V, (mu * w * Q).sum(-1) - 0.5 * (mu * w * (w**2 - 1) / 2).sum(-1), atol=1e-8, rtol=0
    )


def test_limits_and_kinship() -> None:
    Q, mu = problem(5)
    best = Q.masked_fill(mu == 0, -torch.inf).amax(-1)
    mean = (mu * Q).sum(-1)
    torch.testing.assert_close(ivr.log_sum_exp_value(Q, mu, 1e-4), best, atol=1e-2, rtol=0)
    torch.testing.assert_close(ivr.log_sum_exp_value(Q, mu, 1e6), mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(ivr.sparse_value(Q, mu, 1e6), mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(tabular.expectile(Q, mu, 0.5), mean)
    # SQL ignores samples at q <= V - 2 alpha: making them worse changes nothing.
    V = ivr.sparse_value(Q, mu, 0.2)
    ignored = V.unsqueeze(-1) - 0.4 >= Q
    assert bool(ignored.any())
    torch.testing.assert_close(ivr.sparse_value(torch.where(ignored, Q - 50, Q), mu, 0.2), V)
    assert not torch.equal(
        tabular.expectile(torch.where(ignored, Q - 50, Q), mu, 0.7), tabular.expectile(Q, mu, 0.7)
    )


def test_operators_are_monotone_and_commute_with_constants() -> None:
    Q, mu = problem(6)
    g = torch.Generator().manual_seed(1)
    more = Q + torch.rand(Q.shape, generator=g, dtype=torch.float64)
    for operator in (
        lambda Q: ivr.sparse_value(Q, mu, 0.3),
        lambda Q: ivr.log_sum_exp_value(Q, mu, 0.3),
        lambda Q: ivr.regularised_value(Q, mu, 0.3, ChiSquare())[0],
        lambda Q: tabular.expectile(Q, mu, 0.9),
    ):
        assert bool((operator(more) >= operator(Q) - 1e-12).all())
        torch.testing.assert_close(operator(Q + 7.0), operator(Q) + 7.0)


def test_shares_that_are_reported() -> None:
    """Of rows without a part in the gradient of (1), and of rows at the cap of (2)."""
    found: Any = SimpleNamespace(config=SimpleNamespace(alpha=0.5))
    V = torch.zeros(1, 4)
    q = torch.tensor([[-1.5, -1.0, -0.9, 0.0]])
    assert ivr.SQLLearner.extra(found, q, V)["ignored_by_value"].tolist() == [[1, 1, 0, 0]]
    q = torch.tensor([[2.6, 2.5, -2.6, 0.0]])
    assert ivr.EQLLearner.extra(found, q, V)["capped"].tolist() == [[1, 0, 0, 0]]
    # Loss (2) is scaled by the largest exponent of the batch, here 1: exponents 1, 0, -2 and -4.
    found.config.num_learners = 1
    loss = ivr.EQLLearner.value_loss(found, torch.tensor([[1.5, 1.0, 0.0, -1.0]]), V + 1)
    wanted = (
        sum(torch.tensor(z - 1.0).exp() for z in (1.0, 0.0, -2.0, -4.0)) / 4 + torch.tensor(-1.0).exp() * 2
    )
    torch.testing.assert_close(loss, wanted[None])


def test_weights() -> None:
    A = torch.tensor([-3.0, -0.5, 0.0, 0.5, 400.0])
    assert ivr.sparse_weight(A, 1.0, "release", 100.0).tolist() == [0, 0, 0, 0.5, 100]
    assert ivr.sparse_weight(A, 1.0, "theory", 100.0).tolist() == [0, 0.75, 1, 1.25, 100]
    assert ivr.sparse_weight(A, 1.0, "indicator", 100.0).tolist() == [0, 0, 0, 1, 1]
    wanted = (A / 2).exp().clamp_max(100)
    torch.testing.assert_close(ivr.exponential_weight(A, 2.0, "theory", 100.0), wanted)
    torch.testing.assert_close(ivr.exponential_weight(A, 2.0, "release", 100.0), (5 * A).exp().clamp_max(100))


def test_the_atari_loss_is_loss_1_at_a_quarter() -> None:
    """z = 1/2 + (q - V) / a with loss z_+^2 + V / a has the gradient of (1) with alpha = a / 4, up to a constant factor."""
    g = torch.Generator().manual_seed(2)
    q, a = torch.randn(1, 50, generator=g, dtype=torch.float64), 1.6
    v = torch.full((1, 50), 0.2, dtype=torch.float64, requires_grad=True)
    ((0.5 + (q - v) / a).clamp_min(0).square() + v / a).mean().backward()
    released = v.grad.clone()  # type: ignore[union-attr]
    v.grad = None
    ivr.sparse_value_loss(q, v, a / 4).sum().backward()
    torch.testing.assert_close(v.grad, 4 * released)


def test_counts_and_the_fixed_point() -> None:
    """Two states, by hand: s0 -a0-> s1 (r 0), s0 -a1-> s0 (r 0, twice), s1 -a0-> end (r 1); s1's other action is unseen."""
    rows = {
        "obs": [0, 0, 0, 1],
        "action": [0, 1, 1, 0],
        "next_obs": [1, 0, 0, 0],
        "reward": [0.0, 0.0, 0.0, 1.0],
        "terminated": [False, False, False, True],
    }
    tensors = {name: torch.tensor(value) for name, value in rows.items()}
    counts = tabular.count(**tensors, S=3, A=2)
    torch.testing.assert_close(counts.mu[0], torch.tensor([1 / 3, 2 / 3]).double())
    assert counts.P[0, 1].tolist() == [1, 0, 0]
    assert float(counts.P[1].sum()) == 0.0
    paid = tabular.count(**{**tensors, "reward": torch.tensor([2.0, 3.0, 5.0, 1.0])}, S=3, A=2)
    assert paid.r.tolist() == [[2.0, 4.0], [1.0, 0.0], [0.0, 0.0]]
    gamma, alpha = 0.9, 0.5
    V, Q = ivr.solve(counts, "eql", torch.tensor([alpha]), gamma)
    assert float(V[0, 1]) == pytest.approx(1.0)
    assert float(V[0, 2]) == 0.0

    def gap(v: float) -> float:
        z = torch.tensor([gamma * 1.0, gamma * v]).double() / alpha
        return float(alpha * (torch.tensor([1 / 3, 2 / 3]).double().log() + z).logsumexp(0)) - v

    assert float(V[0, 0]) == pytest.approx(optimize.brentq(gap, -5, 5), abs=1e-7)
    pi = tabular.extract_log(counts.mu, (Q[0] - V[0].unsqueeze(-1)) / alpha)
    torch.testing.assert_close(pi[2], torch.tensor([0.5, 0.5]).double())
    assert float(pi[1, 0]) == 1.0
    exact = ivr.solve(counts, "sql", torch.tensor([alpha]), gamma, exact=True)[0]
    assert bool((exact >= ivr.solve(counts, "sql", torch.tensor([alpha]), gamma)[0] - 1e-9).all())


def test_data_sets_and_strengths_in_one_batch() -> None:
    from mobula.envs.datasets.recipes import four_rooms_data

    played = [four_rooms_data(0.3, 600, seed) for seed in (0, 1)]
    names = ("obs", "action", "reward", "next_obs", "terminated")

    def stack(parts: list[dict[str, object]]) -> tabular.Counts:
        stacked = {n: torch.stack([torch.as_tensor(p[n]) for p in parts]) for n in names}
        return tabular.count(**stacked, S=104, A=4)

    both, alone = stack(played), stack(played[1:])
    alphas = torch.tensor([0.1, 0.01])
    for kind in ("sql", "eql"):
        V, _ = ivr.solve(both, kind, alphas, 0.97)
        W, _ = ivr.solve(alone, kind, alphas[1:], 0.97)
        torch.testing.assert_close(V[1, 1], W[0, 0], atol=1e-8, rtol=0)


def test_extraction_without_weight_is_the_behaviour() -> None:
    mu = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.0, 0.0]]).double()
    weight = torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 1.0]]).double()
    pi = tabular.extract(mu, weight)
    torch.testing.assert_close(pi, torch.tensor([[0.2, 0.8], [0.75, 0.25], [0.5, 0.5]]).double())


def test_extraction_from_logarithms_and_the_value_of_a_policy() -> None:
    """Weights by their logarithms give the same policy; its value is the discounted sum of what it earns."""
    Q, mu = problem(7, states=6, actions=6)
    pi = tabular.extract_log(mu, Q)
    torch.testing.assert_close(pi, tabular.extract(mu, Q.exp()))
    g = torch.Generator().manual_seed(3)
    P = torch.rand(6, 6, 6, generator=g, dtype=torch.float64)
    P = 0.9 * P / P.sum(-1, keepdim=True)
    r, wanted, here = Q.tanh(), torch.zeros(6).double(), torch.eye(6).double()
    for t in range(200):
        wanted += 0.8**t * here @ (pi * r).sum(-1)
        here = here @ torch.stack([sum(pi[s, a] * P[s, a] for a in range(6)) for s in range(6)])
    torch.testing.assert_close(tabular.policy_value(pi, P, r, 0.8), wanted)


def test_baselines_losses_by_hand() -> None:
    q, v = torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2)
    assert float(expectile_loss(q, v, 0.7)) == pytest.approx((0.7 + 0.3) / 2)
    assert float(expectile_loss(2 * q, v, 0.9)) == pytest.approx((0.9 * 4 + 0.1 * 4) / 2)
    # Rows above V weigh the expectile, rows below it the rest.
    assert float(expectile_loss(torch.tensor([[1.0, -2.0]]), v, 0.7)) == pytest.approx((0.7 + 0.3 * 4) / 2)
    value = torch.tensor([[2.0, -4.0]])
    pi, a = torch.tensor([[[0.5], [0.0]]]), torch.tensor([[[0.0], [1.0]]])
    # lambda = 2.5 / 3; mean Q = -1; cloning (0.25 + 1) / 2.
    assert float(actor_objective(value, pi, a, 2.5)) == pytest.approx(2.5 / 3 + 0.625)


def test_indices_as_observations_and_actions() -> None:
    """One-hot features, a categorical density, the likeliest action; boxes lose their mean and are divided by their scale."""
    spec = ivr.SQLConfig().training(num_seeds_batched=2, precision="float64").get_default_rl_module_spec()
    spec.observation_space, spec.action_space = spaces.Discrete(5), spaces.Discrete(4)
    module: Any = spec.build()
    obs, action = torch.tensor([[3, 0, 1], [2, 2, 4]]), torch.tensor([[0, 3, 2], [1, 1, 0]])
    features = module.features(obs)
    assert features.shape == (2, 3, 5) and torch.equal(features.argmax(-1), obs)
    assert float(features.sum()) == 6.0
    logits = module.actor(features)
    law = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(module.log_prob(features, action), law.log_prob(action))
    assert torch.equal(module.best_action(features), law.probs.argmax(-1))
    spec.observation_space = spaces.Box(-9, 9, (2,))
    module = spec.build()
    module.obs_mean.copy_(torch.tensor([1.0, -2.0]))
    module.obs_scale.copy_(torch.tensor([0.5, 4.0]))
    found = module.features(torch.tensor([[2.0, 6.0]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, 2.0]]).double())


def test_log_density_of_the_actor() -> None:
    config = ivr.SQLConfig().training(num_seeds_batched=2, precision="float64")
    spec = config.get_default_rl_module_spec()
    spec.observation_space, spec.action_space = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))
    module = spec.build()
    module.log_std.data.fill_(-0.7)
    obs, action = torch.randn(2, 5, 3).double(), torch.rand(2, 5, 2).double()
    mean, log_std = module.action_parameters(obs)
    wanted = torch.distributions.Normal(mean, log_std.exp().expand_as(mean)).log_prob(action).sum(-1)
    torch.testing.assert_close(module.log_prob(obs, action), wanted)
    module.log_std.data.fill_(-9.0)
    assert float(module.action_parameters(obs)[1].max()) == -5.0
