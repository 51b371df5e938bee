"""MRPG: the estimators against the exact gradient, the sweep against the Riccati solution, the whole through RLlib."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from mobula.algorithms.meanfield import mrpg, mrpg_experiment
from mobula.algorithms.meanfield.mrpg import MRPG, MRPGConfig
from mobula.artifact import export_policy, load_policy
from mobula.envs.meanfield import lq_teams, riccati
from mobula.errors import ConfigError, DataError, TrainingFault
from mobula.serving.backend import LocalBackend
from mobula.serving.gateway import create_app


def uneven(teams: lq_teams.LQTeams) -> lq_teams.LQTeams:
    """The game with matrices that differ at every step, and resets that are no multiples of the identity."""
    g = torch.Generator().manual_seed(7)
    n = teams.start_mean.shape[0]

    def changed(part: torch.Tensor) -> torch.Tensor:
        factor = 1 + 0.3 * torch.rand(part.shape[-3], 1, 1, dtype=torch.float64, generator=g)
        return part * factor

    raw = torch.randn(2, n, n, dtype=torch.float64, generator=g)
    reset = 0.3 * raw @ raw.mT + 0.4 * torch.eye(n, dtype=torch.float64)
    return replace(teams, games=lq_teams.LQGame(*map(changed, teams.games)), reset=reset)


def some_gains(teams: lq_teams.LQTeams) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    K = mrpg.zero_gains(teams.games)
    return 0.4 * torch.randn(K.shape, dtype=torch.float64, generator=g) * teams.mask[:, :, None]


@pytest.mark.parametrize("name", ["g1", "g2", "g3"])
def test_the_exact_gradient_is_that_of_the_cost(name: str) -> None:
    """Automatic differentiation of the expected cost from the reset at t, for every player, step and game."""
    teams = uneven(getattr(lq_teams, name)(horizon=3))
    reset = teams.reset
    K = some_gains(teams)
    P = riccati.values(teams.games, K)
    for t in range(3):
        found = mrpg.exact_gradient(teams.games, K, t, P[..., t + 1, :, :], reset)
        free = K.clone().requires_grad_()
        cost = (riccati.values(teams.games, free)[..., t, :, :] * reset[:, None]).sum((-2, -1))
        for i in range(teams.games.players):
            (wanted,) = torch.autograd.grad(cost[:, i].sum(), free, retain_graph=True)
            torch.testing.assert_close(found[:, i], wanted[:, i, t])


@pytest.mark.parametrize("estimator", ["one_point", "baseline", "antithetic"])
@pytest.mark.parametrize("shared", [False, True])
def test_estimates_are_unbiased(estimator: str, shared: bool) -> None:
    """However large the radius: the cost is quadratic in the gains of one step."""
    teams = uneven(lq_teams.g3(horizon=2))
    K, t, batch, radius = some_gains(teams), 0, 400, 0.8
    g = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(300):
        drawn = mrpg.draws(teams, t, batch, radius, shared=shared, generator=g)
        sums = mrpg.gradient_sums(teams.games, K, t, drawn, estimator=estimator, shared=shared)
        dimensions = teams.mask.sum((-2, -1)).double()
        estimates.append(mrpg.gradient(sums, batch, radius, dimensions, estimator))
    found = torch.stack(estimates)
    P = riccati.values(teams.games, K)
    wanted = mrpg.exact_gradient(teams.games, K, t, P[..., 1, :, :], teams.reset) * teams.mask
    error = found.std(0) / 300**0.5
    assert float(((found.mean(0) - wanted).abs() / error.clamp_min(1e-12)).max()) < 4.5
    assert bool((found[:, ~teams.mask] == 0).all())


def test_the_baseline_of_a_sample_is_the_mean_of_the_others() -> None:
    """So that it is independent of the sample, and the estimate stays unbiased."""
    g = torch.Generator().manual_seed(0)
    J, e = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((2, 5), (2, 5, 1, 3)))
    sums = torch.einsum("ib,ibpn->ipn", J, e), e.sum(-3), J.sum(-1)
    found = mrpg.gradient(sums, 5, 0.5, torch.full((2,), 3.0, dtype=torch.float64), "baseline")
    wanted = torch.zeros_like(found)
    for j in range(5):
        others = [k for k in range(5) if k != j]
        wanted += (J[:, j] - J[:, others].mean(-1))[:, None, None] * e[:, j]
    torch.testing.assert_close(found, 3.0 / (5 * 0.5**2) * wanted)


def test_natural_steps_undo_the_covariance_of_the_reset() -> None:
    """2 (Phi K - Psi) Sigma times Sigma^{-1}: Richardson's iteration, whatever the reset; entries off the mask stay."""
    teams = uneven(lq_teams.g3(horizon=2))
    K, P = some_gains(teams), riccati.nash(teams.games).P
    Phi, Psi = riccati.stage(teams.games, 1, P[..., 2, :, :])
    now = K[..., 1, :, :].clone()
    E = (Phi @ now.flatten(-3, -2) - Psi).unflatten(-2, (2, 2))
    slope = mrpg.exact_gradient(teams.games, K, 1, P[..., 2, :, :], teams.reset)
    mrpg.natural_step(K, 1, slope, teams.reset, 0.1, teams.mask)
    torch.testing.assert_close(K[..., 1, :, :], now - 0.2 * E * teams.mask)
    assert torch.equal(K[..., 0, :, :], some_gains(teams)[..., 0, :, :])
    # The inverse of a full covariance fills what the mask forbids.
    mrpg.natural_step(K, 0, torch.ones_like(slope), teams.reset, 0.1, teams.mask)
    assert bool((K[..., 0, :, :][~teams.mask] == 0).all())


def test_the_safe_step_converges_and_is_sharp() -> None:
    """0.4 / lambda_max of the players' own blocks, here by eye: R + B'PB; two and a half times of it is the bound of one player alone."""
    teams = lq_teams.g1(horizon=10, rho=1.5)
    P = riccati.nash(teams.games).P
    own = max(
        float(game.R[i, i, t] + game.B[i, t].T @ P[k, i, t + 1] @ game.B[i, t])
        for k, game in enumerate(lq_teams.LQGame(*parts) for parts in zip(*teams.games, strict=True))
        for i in range(2)
        for t in range(10)
    )
    eta = mrpg.safe_step(teams.games, P)
    assert eta == pytest.approx(0.4 / own)
    K, _ = mrpg.solve_exactly(teams.games, teams.reset, eta, 600, receding=True)
    torch.testing.assert_close(K, riccati.nash(teams.games).K)


def test_without_common_noise_the_gains_of_means_are_learned_too() -> None:
    """Sigma0 = 0, and a Sigma of rank one: covariances without a Cholesky factor."""
    teams = lq_teams.g1(horizon=2)
    flat = torch.tensor([[[0.1, 0.2], [0.2, 0.4]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    for cov in flat:
        L = lq_teams.root(cov)
        torch.testing.assert_close(L @ L.mT, cov)
    teams = replace(teams, noise=flat)
    K, solution = mrpg.zero_gains(teams.games), riccati.nash(teams.games).K
    g, dimensions = torch.Generator().manual_seed(0), teams.mask.sum((-2, -1)).double()
    for t in (1, 0):
        for _ in range(60):
            drawn = mrpg.draws(teams, t, 200, 0.5, shared=False, generator=g)
            sums = mrpg.gradient_sums(teams.games, K, t, drawn, estimator="antithetic")
            mrpg.natural_step(
                K, t, mrpg.gradient(sums, 200, 0.5, dimensions, "antithetic"), teams.reset, 0.05, teams.mask
            )
    assert float((K - solution).abs().max()) < 0.05


def test_perturbations_lie_on_the_sphere_of_the_free_entries() -> None:
    teams = lq_teams.g3(horizon=1)
    e = mrpg.sphere((2, 2, 50), 0.7, teams.mask, torch.Generator().manual_seed(0))
    torch.testing.assert_close(e.flatten(-2).norm(dim=-1), torch.full((2, 2, 50), 0.7, dtype=torch.float64))
    assert bool((e.movedim(2, 0)[:, ~teams.mask] == 0).all())


def test_sampled_costs_have_the_exact_mean() -> None:
    """Without perturbation, the mean cost-to-go from the reset is the expected cost, in both layouts of the rollouts."""
    teams = uneven(lq_teams.g2(horizon=4))
    # Every player pays for every other's input, each at a price of its own.
    teams.games.R.copy_(teams.games.R + 0.1 * torch.arange(9.0, dtype=torch.float64).view(3, 3, 1, 1, 1))
    K, batch, t = some_gains(teams), 60_000, 1
    for shared in (False, True):
        e, y, noise = mrpg.draws(
            teams, t, batch, 1.0, shared=shared, generator=torch.Generator().manual_seed(2)
        )
        cost = mrpg.costs_to_go(teams.games, K, t, 0 * e, y, noise, shared=shared)
        P = riccati.values(teams.games, K)
        wanted = riccati.expected_cost(P[..., t:, :, :], teams.reset, teams.noise)
        assert bool(((cost.mean(-1) - wanted).abs() < 4.5 * cost.std(-1) / batch**0.5).all())


def test_exact_sweeps_converge_where_all_steps_at_once_diverge() -> None:
    assert mrpg_experiment.exact_errors(1.3, 10, 0.05, 0, receding=True) < 1e-9
    assert mrpg_experiment.exact_errors(1.3, 10, 0.05, 0, receding=False) > 1.0
    assert mrpg_experiment.benign_case().value < 1e-6
    rate = mrpg_experiment.rate_ratio()
    assert 0.95 < rate.low <= rate.high < 1.05
    warm, _ = mrpg.solve_exactly(
        lq_teams.g1().games, lq_teams.g1().reset, 0.05, 200, receding=True, warm_start=True
    )
    torch.testing.assert_close(warm, riccati.nash(lq_teams.g1().games).K)


# Through RLlib --------------------------------------------------------------------------------------------------


def config(**knobs: Any) -> Any:
    small = {"horizon": 2, "inner_iters": 60, "batch": 200, "report_every": 30, **knobs}
    return MRPGConfig().training(**small).debugging(seed=0, log_level="ERROR")


def sweep(algorithm: Any) -> dict[str, Any]:
    while True:
        result: dict[str, Any] = algorithm.train()
        if result["sweep"] >= 1:
            return result


def test_the_whole_way(ray_session: None, tmp_path: Path) -> None:
    algorithm = config().build_algo()
    first = algorithm.train()
    assert first["sweep"] == 0.25
    # The step that is being learned counts, those that wait do not.
    gap = (algorithm.K - riccati.nash(algorithm.teams.games).K)[..., 1, :, :]
    assert first["error"] == pytest.approx(float(gap.abs().max()))
    # A restored run goes on exactly, in the middle of a step of the sweep.
    restored = MRPG.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    result, again = sweep(algorithm), sweep(restored)
    assert result["error"] < 0.05
    assert result["error"] == again["error"]
    assert result["exploitability"] < 1e-2
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    K = algorithm.K
    x, mean = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    for team in range(2):
        answer = policy.answer(np.concatenate([[team, 1], x, mean]))
        wanted = -K[0, team, 1].numpy() @ (x - mean) - K[1, team, 1].numpy() @ mean
        np.testing.assert_allclose(answer["action"], wanted)
        np.testing.assert_allclose(answer["gain_bar"], K[1, team, 1].numpy())
        P = riccati.values(algorithm.teams.games, K)[:, team, 1].numpy()
        assert answer["value"] == pytest.approx((x - mean) @ P[0] @ (x - mean) + mean @ P[1] @ mean)
    with pytest.raises(DataError, match="whole numbers below"):
        policy.act(np.concatenate([[2, 0], x, mean]))
    # The certificate of the step, of both games, and what each team gains by leaving.
    solution, games = riccati.nash(algorithm.teams.games), algorithm.teams.games
    np.testing.assert_allclose(answer["sigma_min"], solution.sigma_min[:, 1])
    np.testing.assert_allclose(answer["margin"], solution.margin[:, 1])
    given = algorithm.teams.moments(), algorithm.teams.noise
    gap = riccati.exploitability(games, K, *given).sum(0)
    cost = riccati.expected_cost(riccati.values(games, K), *given).sum(0)
    assert answer["exploitability"] == pytest.approx(float(gap[1] / cost[1]))
    assert result["margin"] == pytest.approx(float(solution.margin.min()))
    # Served: the example is a question that it answers.
    client = TestClient(create_app(LocalBackend({"teams": str(tmp_path / "policy")}), None))
    (card,) = client.get("/v1/models").json()["data"]
    for obs in (card["example"]["request"]["obs"], [1, 1, *x, *mean]):
        served = client.post("/v1/policies/teams/act", json={"obs": obs}).json()
        np.testing.assert_allclose(served["action"], policy.act(obs))
    refused = client.post("/v1/policies/teams/act", json={"obs": [0.5, 1, *x, *mean]})
    assert refused.status_code == 422 and "whole numbers" in refused.json()["error"]["message"]
    for each in (algorithm, restored):
        each.stop()


def test_workers_change_nothing(ray_session: None) -> None:
    gains = []
    for workers in (0, 1, 2):
        algorithm = config(workers=workers, chunk=64, report_every=3).build_algo()
        algorithm.train()
        gains.append(algorithm.K)
        algorithm.stop()
    assert torch.equal(gains[0], gains[1])
    assert torch.equal(gains[0], gains[2])
    assert float(gains[0].abs().max()) > 0
    # Chunks have draws of their own: two are not one twice; and so have gradient steps.
    one, two = (config(batch=batch, chunk=64, report_every=1).build_algo() for batch in (64, 128))
    first = one.gradient(1)
    assert float((two.gradient(1) - first).abs().max()) > 1e-3
    one.inner = 1
    assert float((one.gradient(1) - first).abs().max()) > 1e-3
    for each in (one, two):
        each.stop()


@pytest.mark.parametrize(
    "knobs",
    [
        {"exact": True},
        {"estimator": "baseline", "batch": 2000},
        {"shared_rollouts": True},
        {"warm_start": True},
        {"receding": False, "inner_iters": 150, "exact": True},
        {"sigma_y": 2.0, "sigma_xbar": 0.5},
        {"game": "G3", "exact": True, "eta": 0.1, "inner_iters": 120},
    ],
)
def test_every_option_finds_the_equilibrium(ray_session: None, knobs: dict[str, Any]) -> None:
    algorithm = config(**knobs).build_algo()
    assert sweep(algorithm)["error"] < 0.08
    algorithm.stop()


def test_reset_covariances_are_scaled() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(
        config(sigma_y=4.0, sigma_xbar=0.5).teams().reset, torch.stack([4 * eye, 0.5 * eye])
    )


def test_what_is_refused(ray_session: None) -> None:
    with pytest.raises(ConfigError, match="it is one of G1, G2, G3"):
        config(game="G9")
    with pytest.raises(ConfigError, match="out of range"):
        config(radius=0.0)
    algorithm = config(exact=True, eta=5.0, inner_iters=60).build_algo()
    with pytest.raises(
        TrainingFault,
        match=r"diverged at t=1 .* eta=5.0: .* last gains \[\[.*\]\]; lower eta: 0\.\d+ is safe",
    ):
        algorithm.training_step()
    algorithm.stop()
    together = config(exact=True, eta=5.0, inner_iters=60, receding=False).build_algo()
    with pytest.raises(TrainingFault, match=r"diverged at t=[01] "):
        together.training_step()
    together.stop()
