"""Finite mean-field games on graphons: anchors, brute force, laws, and the solvers' equilibria."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from mobula.algorithms.common.meanfield import solvers
from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.graphon import FiniteMFG
from mobula.errors import ConfigError

SBM = graphon.block_model([0.7], [[0.9, 0.3], [0.3, 0.1]])


def some_policy(game: FiniteMFG, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    raw = torch.rand(graphon.uniform_policy(game).shape, dtype=torch.float64, generator=g) ** 2 + 0.01
    return raw / raw.sum(-1, keepdim=True)


def test_the_epidemic_of_the_specification() -> None:
    game = graphon.sis(graphon.matrix(graphon.constant(0.5), graphon.cells(3)), 5)
    pi = graphon.uniform_policy(game)
    mu = graphon.flow(game, pi)
    wanted = [0.5, 0.45, 0.4095, 0.37596195, 0.34769247, 0.32351446]
    np.testing.assert_allclose(mu[0, :, 1], wanted, atol=5e-9)
    _, V = graphon.evaluate(game, pi, mu, 0.0)
    assert float((game.mu0[0] * V[0, 0]).sum()) == pytest.approx(-5.416308844860879, abs=1e-10)
    for lam, value in ((0.0, 0.940936292220879), (0.5, 0.21392383847)):
        np.testing.assert_allclose(graphon.exploitability(game, pi, lam), value, atol=1e-10)


def test_investment_and_beach_bar_by_hand() -> None:
    """Entries of their transitions and rewards, from the specification's sentences."""
    W = torch.ones(1, 1, dtype=torch.float64)
    firms = graphon.investment(W)
    z = torch.zeros(1, 10, dtype=torch.float64)
    z[0, 2] = 0.5
    P, r = (part[0] for part in firms.model(0, z))
    assert [P[s, 1, s + 1].item() for s in (0, 4, 8)] == pytest.approx([0.9, 0.5, 0.1])
    assert [P[s, u, s].item() for s, u in ((0, 1), (4, 0), (8, 1), (9, 0), (9, 1))] == pytest.approx(
        [0.1, 1.0, 0.9, 1.0, 1.0]
    )
    # 1 + 2 times 0.5 of the neighbourhood.
    assert r[4].tolist() == pytest.approx([0.3 * 4 / 2, 0.3 * 4 / 2 - 2])
    assert (firms.horizon, firms.mu0[0].tolist()) == (50, [1.0] + [0.0] * 9)
    bar = graphon.beach_bar(W)
    z[0, 0], z[0, 6] = 0.24, 0.99
    P, r = (part[0] for part in bar.model(0, z))
    assert P[9, 2, [9, 0, 1]].tolist() == pytest.approx([0.05, 0.9, 0.05])
    assert P[0, 0, [8, 9, 0]].tolist() == pytest.approx([0.05, 0.9, 0.05])
    assert P[5, 1, [4, 5, 6]].tolist() == pytest.approx([0.05, 0.9, 0.05])
    assert r[0].tolist() == pytest.approx(
        [-0.6 - math.log(0.25), -0.5 - math.log(0.25), -0.6 - math.log(0.25)]
    )
    assert r[6].tolist() == pytest.approx([-0.2, -0.1, -0.2])
    assert (bar.horizon, bar.mu0[0].tolist()) == (10, [0.1] * 10)


@pytest.mark.parametrize("make", [graphon.sis, graphon.investment, graphon.beach_bar])
def test_models_are_laws_and_mass_is_kept(make: object) -> None:
    game = make(graphon.matrix(SBM, graphon.cells(10)), 6)  # type: ignore[operator]
    mu = graphon.flow(game, some_policy(game))
    torch.testing.assert_close(mu.sum(-1), torch.ones(10, 7, dtype=torch.float64), atol=1e-12, rtol=0)
    P, r = game.model(0, graphon.aggregate(game, mu[:, 2]))
    torch.testing.assert_close(P.sum(-1), torch.ones(P.shape[:-1], dtype=torch.float64))
    assert float(P.min()) >= 0
    assert r.shape == P.shape[:-1]


def brute_value(game: FiniteMFG, pi: Tensor, mu: Tensor, lam: float, label: int) -> float:
    """Value of one agent at a label by multiplying out its chain, with the entropy of every decision."""
    law, total = game.mu0[label], 0.0
    for h in range(game.horizon):
        z = torch.zeros(game.states, dtype=torch.float64)
        for other in range(game.labels):
            z += game.W[label, other] * mu[other, h] / game.labels
        P, r = game.model(h, z)
        p = pi[label, h]
        joint = law[:, None] * p
        total += float((joint * (r - lam * p.log())).sum())
        law = torch.einsum("sa,sat->t", joint, P)
    return total


@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_values_and_best_responses_against_brute_force(lam: float) -> None:
    game = graphon.beach_bar(graphon.matrix(graphon.ranked_attachment, graphon.cells(3)), 3)
    pi, mu = some_policy(game), graphon.flow(game, some_policy(game, 1))
    Q, V = graphon.evaluate(game, pi, mu, lam)
    for label in range(3):
        found = float((game.mu0[label] * V[label, 0]).sum())
        assert found == pytest.approx(brute_value(game, pi, mu, lam, label), abs=1e-10)
    best, V_best = graphon.best_response(game, mu, lam)
    _, V_of_best = graphon.evaluate(game, best, mu, lam)
    torch.testing.assert_close(V_of_best, V_best)
    assert bool((V_best >= V - 1e-12).all())
    assert Q.shape == pi.shape
    if lam > 0:
        # The last decision is a problem of its own: maximise <p, Q> - lam <p, log p>.
        q = graphon.evaluate(game, best, mu, lam)[0][0, -1, 4].numpy()

        def loss(x: np.ndarray) -> float:
            p = np.exp(x) / np.exp(x).sum()
            return float(-(p @ q) + lam * (p @ np.log(p)))

        x = minimize(loss, np.zeros(3), tol=1e-14).x
        np.testing.assert_allclose(best[0, -1, 4], np.exp(x) / np.exp(x).sum(), atol=1e-6)


def test_laws_of_graphons() -> None:
    """A constant graphon has no labels; relabelling permutes; block models are exact on any grid that holds their borders."""
    game = graphon.sis(graphon.matrix(graphon.constant(0.3), graphon.cells(7)), 8)
    gain = graphon.exploitability(game, graphon.uniform_policy(game), 0.2)
    torch.testing.assert_close(gain, gain[:1].expand_as(gain))
    W = graphon.matrix(graphon.exponential(3.0), graphon.cells(6))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    pi = some_policy(graphon.sis(W, 5))
    plain = graphon.exploitability(graphon.sis(W, 5), pi, 0.0)
    moved = graphon.exploitability(graphon.sis(W[order][:, order], 5), pi[order], 0.0)
    torch.testing.assert_close(moved, plain[order])
    values = []
    for M in (10, 100):
        game = graphon.sis(graphon.matrix(SBM, graphon.cells(M)), 12)
        values.append(float(graphon.exploitability(game, graphon.uniform_policy(game), 0.5).mean()))
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    x = graphon.cells(4)
    torch.testing.assert_close(
        graphon.matrix(graphon.exponential(2.0), x),
        2 * torch.exp(2 * x[:, None] * x) / (1 + torch.exp(2 * x[:, None] * x)) - 1,
    )
    assert float(graphon.matrix(graphon.uniform_attachment, x)[0, 3]) == pytest.approx(1 - 0.875)
    assert graphon.cells(3, "linspace").tolist() == [0.0, 0.5, 1.0]


def test_a_batch_of_graphons_is_its_members() -> None:
    x = graphon.cells(10)
    both = torch.stack([graphon.matrix(SBM, x), graphon.matrix(graphon.exponential(3.0), x)])
    game = graphon.sis(both[0], 6)
    wide = game.with_graphon(both)
    step = solvers.gmfg_ppo(0.5, 0.5, 0.2, 1e-3)
    batched = solvers.solve(wide, step, 15, lam=0.5, every=15)
    for i in range(2):
        alone = solvers.solve(game.with_graphon(both[i]), step, 15, lam=0.5, every=15)
        torch.testing.assert_close(batched.state.policy[i], alone.state.policy)
        torch.testing.assert_close(batched.exploitability[0, i], alone.exploitability[0])


def test_the_model_is_differentiable_in_z() -> None:
    game = graphon.sis(graphon.matrix(SBM, graphon.cells(10)), 4)
    W = game.W.clone().requires_grad_()
    mu = graphon.flow(game.with_graphon(W), graphon.uniform_policy(game))
    mu[..., -1, 1].sum().backward()
    step = torch.zeros_like(game.W)
    step[2, 3] = 1e-6

    def shifted(sign: float) -> float:
        moved = game.with_graphon(game.W + sign * step)
        return float(graphon.flow(moved, graphon.uniform_policy(game))[..., -1, 1].sum())

    assert W.grad is not None
    assert float(W.grad[2, 3]) == pytest.approx((shifted(1) - shifted(-1)) / 2e-6, rel=1e-5)


def test_the_proximal_step_is_the_maximiser() -> None:
    Q, pi = torch.tensor([0.3, -0.2, 0.5]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    eta, lam = 0.7, 0.4
    found = solvers.proximal(Q, pi, eta, lam)

    def loss(x: np.ndarray) -> float:
        p = np.exp(x) / np.exp(x).sum()
        return float(-eta * (p @ Q.numpy() - lam * p @ np.log(p)) + p @ (np.log(p) - np.log(pi.numpy())))

    x = minimize(loss, np.zeros(3), tol=1e-14).x
    np.testing.assert_allclose(found, np.exp(x) / np.exp(x).sum(), atol=1e-6)
    soft = (Q / lam).softmax(-1)
    torch.testing.assert_close(solvers.proximal(Q, soft, eta, lam), soft)
    with pytest.raises(ConfigError, match="temperature above 0"):
        solvers.proximal(Q, pi, eta, 0.0)


@pytest.mark.parametrize("network", ["sbm", "exp"])
def test_proximal_steps_with_a_damped_flow_reach_the_equilibrium(network: str) -> None:
    """Claim 1 of the specification at its practical step constants: below 1e-3 at M = 40, H = 20, T = 150."""
    W = graphon.matrix(SBM if network == "sbm" else graphon.exponential(3.0), graphon.cells(40))
    T, game = 150, graphon.sis(W, 20)
    step = solvers.gmfg_ppo(0.5, 5 * T ** (-1 / 3), 5 * T ** (-2 / 3), 0.1 / T)
    assert float(solvers.solve(game, step, T, lam=0.5, every=T).exploitability[-1]) < 1e-3
    # With the true dynamics and a wrong constant graphon the policy is no equilibrium.
    blind = game.with_graphon(torch.full_like(W, 0.5))
    pi = solvers.solve(blind, step, T, lam=0.5, every=T).state.policy
    assert float(graphon.exploitability(game, pi, 0.5).mean()) > 0.2


@pytest.mark.parametrize(
    ("step", "lam", "bound"),
    [
        (solvers.mirror_descent(0.3), 0.0, 0.05),
        (solvers.fictitious_play(), 0.0, 0.05),
        (solvers.gmfg_ppo(0.5, 1.0, 0.3, 1e-9), 0.5, 1e-5),
    ],
)
def test_reference_solvers_approach_equilibria(step: solvers.Step, lam: float, bound: float) -> None:
    game = graphon.beach_bar(graphon.matrix(graphon.constant(1.0), graphon.cells(1)))
    start = float(graphon.exploitability(game, graphon.uniform_policy(game), lam).mean())
    result = solvers.solve(game, step, 200, lam=lam, every=50)
    assert result.steps == [50, 100, 150, 200]
    assert float(result.exploitability[-1]) < min(bound, start)


def test_steps_move_the_flow_by_their_damping() -> None:
    """From a policy and a flow that do not belong together: 0.2 of the way to the new policy's own flow, 0.8 of the old one."""
    game = graphon.sis(graphon.matrix(SBM, graphon.cells(10)), 6)
    old, pi = graphon.flow(game, some_policy(game, 1)), some_policy(game, 2)
    state = solvers.State(pi, old, torch.zeros_like(pi), 0)
    Q, _ = graphon.evaluate(game, pi, old, 0.4)
    floored = 0.9 * solvers.proximal(Q, pi, 0.7, 0.4) + 0.1 / 2
    answer, _ = graphon.best_response(game, old, 0.4)
    for step, policy in (
        (solvers.gmfg_ppo(0.4, 0.7, 0.2, 0.1), floored),
        (solvers.fixed_point(0.4, damping=0.2), answer),
    ):
        found = step(game, state)
        torch.testing.assert_close(found.policy, policy)
        torch.testing.assert_close(found.flow, 0.8 * old + 0.2 * graphon.flow(game, policy))


def test_fictitious_play_answers_the_mean_of_the_flows() -> None:
    """Of the responses alone, every one of the same weight: the start counts only for the first answer."""
    game = graphon.sis(graphon.matrix(SBM, graphon.cells(10)), 6)
    step, state, flows = solvers.fictitious_play(0.4), solvers.initial(game), []
    for _ in range(4):
        flows.append(graphon.flow(game, graphon.best_response(game, state.flow, 0.4)[0]))
        state = step(game, state)
        torch.testing.assert_close(state.flow, torch.stack(flows).mean(0))


def test_boltzmann_iteration_settles_at_a_large_temperature() -> None:
    """Its fixed point satisfies pi = softmax(Q / temperature) against its own flow."""
    game = graphon.sis(graphon.matrix(SBM, graphon.cells(10)), 6)
    state = solvers.solve(game, solvers.boltzmann(3.0), 100, lam=0.0, every=100).state
    Q, _ = graphon.evaluate(game, state.policy, graphon.flow(game, state.policy), 0.0)
    torch.testing.assert_close(state.policy, (Q / 3.0).softmax(-1))


def test_a_regularised_equilibrium_is_the_same_for_every_solver() -> None:
    game = graphon.sis(graphon.matrix(SBM, graphon.cells(10)), 6)
    first = solvers.solve(game, solvers.fixed_point(0.5, damping=0.2), 300, lam=0.5, every=300)
    second = solvers.solve(game, solvers.gmfg_ppo(0.5, 1.0, 0.2, 0.0), 300, lam=0.5, every=300)
    torch.testing.assert_close(first.state.policy, second.state.policy, atol=1e-6, rtol=0)


def test_large_temperatures_give_the_uniform_policy() -> None:
    game = graphon.sis(graphon.matrix(SBM, graphon.cells(10)), 5)
    pi, _ = graphon.best_response(game, graphon.flow(game, graphon.uniform_policy(game)), 1e6)
    torch.testing.assert_close(pi, graphon.uniform_policy(game), atol=1e-4, rtol=0)


def test_bad_graphons() -> None:
    x = graphon.cells(5)
    with pytest.raises(ConfigError, match=r"values in \[0, 1\]"):
        graphon.matrix(graphon.constant(1.5), x)
    with pytest.raises(ConfigError, match="is symmetric"):
        graphon.matrix(lambda a, b: a.clone(), x)
    with pytest.raises(ConfigError, match="needs 2 x 2"):
        graphon.block_model([0.5], [[1.0]])
    assert math.isclose(float(graphon.matrix(graphon.constant(0.5), x).mean()), 0.5)


def test_nashconv_is_that_of_openspiel() -> None:
    """Uniform policy, iterates of both mirror descents, on the crowd modelling game with W = 1, one of odd size.

    `make bench` installs OpenSpiel into build/peers-openspiel; it is no dependency.
    """
    pytest.importorskip(
        "pyspiel", reason="OpenSpiel is not installed: PYTHONPATH=build/peers-openspiel after make bench"
    )
    from benchmarks.meanfield import against_openspiel

    for settings in ({}, {"horizon": 6, "size": 7, "iterations": 2, "rate": 1.0}):
        found = against_openspiel(**settings)  # type: ignore[arg-type]
        np.testing.assert_allclose(found["ours"], found["theirs"], rtol=0, atol=1e-9)
        assert found["ours"][-1] < 0.6 * found["ours"][0]
        # What the move costs by the game's own rules is not what its cached values charge.
        assert abs(found["charged"] - found["ours"][0]) > 1e-3
