"""MRPG: the estimators against the exact gradient, the sweep against the Riccati solution, the whole through RLlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobula.algorithms.meanfield import mrpg, mrpg_experiment
from mobula.algorithms.meanfield.mrpg import MRPG, MRPGConfig
from mobula.artifact import export_policy, load_policy
from mobula.envs.meanfield import lq_teams, riccati
from mobula.errors import ConfigError, DataError, TrainingFault


def some_gains(teams: lq_teams.LQTeams) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    K = mrpg.zero_gains(teams.games)
    return 0.4 * torch.randn(K.shape, dtype=torch.float64, generator=g) * teams.mask[:, :, None]


@pytest.mark.parametrize("name", ["g1", "g2", "g3"])
def test_the_exact_gradient_is_that_of_the_cost(name: str) -> None:
    """Automatic differentiation of the expected cost from the reset at t, for every player, step and game."""
    teams = getattr(lq_teams, name)(horizon=3)
    scale = torch.tensor([[[2.0]], [[0.5]]], dtype=torch.float64)
    reset = teams.reset * scale + 0.1
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
    teams = lq_teams.g3(horizon=2)
    K, t, batch, radius = some_gains(teams), 0, 400, 1.0
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


def test_perturbations_lie_on_the_sphere_of_the_free_entries() -> None:
    teams = lq_teams.g3(horizon=1)
    e = mrpg.sphere((2, 2, 50), 0.7, teams.mask, torch.Generator().manual_seed(0))
    torch.testing.assert_close(e.flatten(-2).norm(dim=-1), torch.full((2, 2, 50), 0.7, dtype=torch.float64))
    assert bool((e.movedim(2, 0)[:, ~teams.mask] == 0).all())


def test_sampled_costs_have_the_exact_mean() -> None:
    """Without perturbation, the mean cost-to-go from the reset is the expected cost, in both layouts of the rollouts."""
    teams = lq_teams.g2(horizon=4)
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


def test_what_is_refused(ray_session: None) -> None:
    with pytest.raises(ConfigError, match="it is one of G1, G2, G3"):
        config(game="G9")
    with pytest.raises(ConfigError, match="out of range"):
        config(radius=0.0)
    algorithm = config(exact=True, eta=5.0, inner_iters=60).build_algo()
    with pytest.raises(TrainingFault, match="diverged at t=1"):
        algorithm.training_step()
    algorithm.stop()
