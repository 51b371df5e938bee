"""Linear-quadratic team games: exact answers against brute force, simulation against exact answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from mobula.envs.meanfield import lq_teams, riccati
from mobula.envs.meanfield.lq_teams import LQGame
from mobula.envs.meanfield.shards import play_sharded
from mobula.errors import ConfigError, DataError


def scalar_game(seed: int = 0, horizon: int = 2) -> LQGame:
    """Two players, one state, one input, different matrices at every step and a weight on the other's input."""
    g = torch.Generator().manual_seed(seed)

    def positive(*shape: int) -> torch.Tensor:
        return 0.5 + torch.rand(*shape, dtype=torch.float64, generator=g)

    R = torch.zeros(2, 2, horizon, 1, 1, dtype=torch.float64)
    R[0, 0], R[1, 1], R[0, 1] = positive(horizon, 1, 1), positive(horizon, 1, 1), 0.3
    return LQGame(positive(horizon, 1, 1), positive(2, horizon, 1, 1), positive(2, horizon + 1, 1, 1), R)


def brute_cost(game: LQGame, K: np.ndarray, player: int, moment: float, noise: float) -> float:
    """E cost of scalar gains K [2, T], straight from the definition."""
    m, total = moment, 0.0
    for t in range(game.horizon):
        total += float(game.Q[player, t, 0, 0]) * m
        total += sum(float(game.R[player, j, t, 0, 0]) * K[j, t] ** 2 * m for j in range(2))
        closed = float(game.A[t, 0, 0]) - sum(float(game.B[j, t, 0, 0]) * K[j, t] for j in range(2))
        m = closed**2 * m + noise
    return total + float(game.Q[player, game.horizon, 0, 0]) * m


def test_costs_and_best_responses_against_brute_force() -> None:
    game, moment, noise = scalar_game(), 1.7, 0.4
    K = torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64)
    full = K[:, :, None, None]
    one = torch.eye(1, dtype=torch.float64)
    cost = riccati.expected_cost(riccati.values(game, full), moment * one, noise * one)
    gaps = riccati.exploitability(game, full, moment * one, noise * one)
    for i in range(2):
        assert float(cost[i]) == pytest.approx(brute_cost(game, K.numpy(), i, moment, noise))

        def own(k: np.ndarray, i: int = i) -> float:
            trial = K.numpy().copy()
            trial[i] = k
            return brute_cost(game, trial, i, moment, noise)

        best = minimize(own, K[i].numpy(), tol=1e-14)
        assert float(cost[i] - gaps[i]) == pytest.approx(best.fun, rel=1e-9)
        np.testing.assert_allclose(riccati.best_response(game, full, i)[0].flatten(), best.x, atol=1e-6)


def test_the_coupled_riccati_solution_is_an_equilibrium() -> None:
    one = torch.eye(1, dtype=torch.float64)
    for game in (scalar_game(), scalar_game(3, horizon=6)):
        found = riccati.nash(game)
        gaps = riccati.exploitability(game, found.K, one, one)
        assert float(gaps.abs().max()) < 1e-12
        torch.testing.assert_close(found.P, riccati.values(game, found.K))
        answered = riccati.iterated_best_response(game, 200)
        torch.testing.assert_close(answered, found.K)


def test_one_team_is_a_regulator_and_an_opposite_team_mirrors_it() -> None:
    """N = 1: scipy's discrete algebraic Riccati equation at a long horizon; zero sum: P2 = -P1."""
    from scipy.linalg import solve_discrete_are

    A = torch.tensor([[1.0, 0.2], [0.0, 1.1]], dtype=torch.float64)
    B = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    Q, R = torch.eye(2, dtype=torch.float64)[None], torch.ones(1, 1, 1, dtype=torch.float64)
    found = riccati.nash(lq_teams.lq_game(A, B, Q, R, 200))
    wanted = solve_discrete_are(A.numpy(), B[0].numpy(), np.eye(2), np.eye(1))
    np.testing.assert_allclose(found.P[0, 0].numpy(), wanted, rtol=1e-8)

    T = 4
    two = torch.tensor([[[0.3], [1.0]], [[0.5], [0.1]]], dtype=torch.float64)
    cross = torch.zeros(2, 2, T, 1, 1, dtype=torch.float64)
    cross[0, 0], cross[1, 1] = 1.0, 5.0
    cross[1, 0], cross[0, 1] = -1.0, -5.0
    Q1 = torch.eye(2, dtype=torch.float64).expand(T + 1, 2, 2)
    zero_sum = LQGame(A.expand(T, 2, 2), two[:, None].expand(2, T, 2, 1), torch.stack([Q1, -Q1]), cross)
    P = riccati.nash(zero_sum).P
    torch.testing.assert_close(P[1], -P[0])


def test_the_fleets_are_those_of_the_specification() -> None:
    teams = lq_teams.g3()
    found = riccati.nash(teams.games)
    assert float(found.margin.min()) == pytest.approx(0.503, abs=5e-4)
    np.testing.assert_allclose(found.K[1, 0, 0, 1].numpy(), [-0.0287, -0.0178, 0.0215, 0.0117], atol=5e-5)
    assert bool((found.K[0][:, :, ~teams.mask[0, 0]] == 0).all())
    args = (teams.games, found.K, teams.noise, teams.start_cov, teams.start_mean)
    limit = riccati.finite_costs(*args, float("inf"))
    np.testing.assert_allclose(limit.numpy(), [63.8455, 43.4946], atol=5e-5)
    for agents in (2, 100):
        scaled = agents * (riccati.finite_costs(*args, agents) - limit)
        np.testing.assert_allclose(scaled.numpy(), [16.2825, -0.0694], atol=5e-5)
    margins = [float(riccati.nash(lq_teams.g2(seed).games).margin.min()) for seed in range(5)]
    assert all(1.5 < margin < 2.6 for margin in margins)


@pytest.mark.parametrize("name", ["g1", "g3"])
def test_finite_populations_cost_what_the_recursion_says(name: str) -> None:
    teams = getattr(lq_teams, name)()
    K = riccati.nash(teams.games).K
    for agents in (2, 7):
        cost = lq_teams.play(teams, K, agents, rollouts=6000, seed=agents)
        wanted = riccati.finite_costs(teams.games, K, teams.noise, teams.start_cov, teams.start_mean, agents)
        error = cost.std(0) / 6000**0.5
        assert bool(((cost.mean(0) - wanted).abs() < 4 * error).all())


def test_populations_of_different_sizes() -> None:
    """Each block's mean takes the noise of its own number of agents: with one of them huge, that one's mean is the limit's."""
    teams = lq_teams.g3(horizon=1)
    K = torch.zeros(2, 2, 1, 2, 4, dtype=torch.float64)
    cost = lq_teams.play(teams, K, [2, 50], rollouts=60_000, seed=0)
    # Without control: E cost of team 2 is that of its own block: deviation (1 - 1/50) and mean 1/50 shares.
    A, own = teams.games.A[0, 0, 2:, 2:], torch.diag(torch.tensor([1.0, 0.1])).double()
    start, mean = torch.eye(2).double(), torch.tensor([-1.0, 0.0]).double()
    first = (own * start).sum() + mean @ own @ mean
    noise = teams.noise[0, 2:, 2:] + teams.noise[1, 2:, 2:]
    second = (own * (A @ start @ A.mT + noise)).sum() + (A @ mean) @ own @ (A @ mean)
    error = float(cost[:, 1].std() / 60_000**0.5)
    assert float(cost[:, 1].mean()) == pytest.approx(float(first + second), abs=4 * error)


def test_shards_change_nothing_and_agree_with_the_limit(ray_session: None) -> None:
    teams = lq_teams.g3(horizon=5)
    K = riccati.nash(teams.games).K
    plays = [play_sharded(teams, K, 5000, actors=actors, seed=3, block=1000) for actors in (0, 1, 2)]
    for other in plays[1:]:
        for name, value in plays[0].items():
            assert torch.equal(value, other[name]), name
    # Deviations follow the Lyapunov recursion, up to the noise of 5,000 agents.
    closed = teams.games.A[0] - (teams.games.B[0] @ K[0]).sum(0)
    cov = teams.start_cov
    for t in range(5):
        cov = closed[t] @ cov @ closed[t].mT + teams.noise[0]
        torch.testing.assert_close(plays[0]["covariances"][t + 1], cov, atol=0.12, rtol=0)


def test_sharded_costs_agree_with_the_recursion() -> None:
    teams = lq_teams.g1(horizon=3)
    K = riccati.nash(teams.games).K
    costs = torch.stack([play_sharded(teams, K, 20, seed=s)["costs"] for s in range(1500)])
    wanted = riccati.finite_costs(teams.games, K, teams.noise, teams.start_cov, teams.start_mean, 20)
    assert bool(((costs.mean(0) - wanted).abs() < 4 * costs.std(0) / 1500**0.5).all())


def written(path: Path, **changes: object) -> Path:
    teams = {
        "A": [[0.9, 0.2], [-0.1, 0.8]], "B": [[[1.0], [0.3]], [[0.2], [1.0]]],
        "Q": [[[1.0, 0.0], [0.0, 0.2]], [[0.2, 0.0], [0.0, 1.0]]], "R": [[[2.0]], [[2.0]]],
        "A_bar": [[0.1, 0.0], [0.0, 0.1]], "B_bar": [[[0.2], [0.06]], [[0.04], [0.2]]],
        "Q_bar": [[[2.0, 0.0], [0.0, 0.4]], [[0.4, 0.0], [0.0, 2.0]]], "R_bar": [[[3.0]], [[3.0]]],
        "Sigma": [[0.1, 0.0], [0.0, 0.1]], "Sigma0": [[0.05, 0.0], [0.0, 0.05]], "horizon": 5,
    }  # fmt: skip
    teams.update(changes)  # type: ignore[arg-type]
    data = {k: v for k, v in teams.items() if v is not None}
    if path.suffix == ".json":
        path.write_text(json.dumps(data), encoding="utf-8")
    else:
        np.savez(path, **{k: np.asarray(v) for k, v in data.items()})
    return path


def test_games_from_files(tmp_path: Path) -> None:
    A = torch.tensor([[0.9, 0.2], [-0.1, 0.8]], dtype=torch.float64)
    rescaled = (A / torch.linalg.eigvals(A).abs().max()).tolist()
    wanted = riccati.nash(lq_teams.g1().games).K
    for name in ("game.json", "game.npz"):
        teams = lq_teams.load_game(written(tmp_path / name, A=rescaled))
        torch.testing.assert_close(riccati.nash(teams.games).K, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"R": [[[2.0]], [[-2.0]]]}, ConfigError, "R of team 2 is not symmetric and positive definite"),
        (
            {"Q": [[[1.0, 0.5], [0.0, 0.2]], [[0.2, 0.0], [0.0, 1.0]]]},
            ConfigError,
            "Q of team 1 is not symmetric",
        ),
        ({"R": [[2.0], [2.0]]}, DataError, "R is"),
        ({"Sigma": None}, DataError, "lacks Sigma"),
        ({"A": [[float("nan"), 0.0], [0.0, 1.0]]}, DataError, "finite numbers"),
    ],
)
def test_games_that_are_refused(tmp_path: Path, changes: dict[str, object], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        lq_teams.load_game(written(tmp_path / "game.json", **changes))
    with pytest.raises(DataError, match="does not exist"):
        lq_teams.load_game(tmp_path / "nowhere.npz")


def test_a_game_without_a_unique_equilibrium_and_a_population_of_one() -> None:
    game = lq_teams.g1().games
    broken = game._replace(R=game.R * 0, B=game.B * 0)
    with pytest.raises(ConfigError, match="no unique equilibrium at t=4"):
        riccati.nash(broken)
    teams = lq_teams.g3()
    K = riccati.nash(teams.games).K
    with pytest.raises(ConfigError, match="at least 2 agents"):
        lq_teams.play(teams, K, [5, 1], rollouts=3)
    with pytest.raises(ConfigError, match="at least 2"):
        play_sharded(teams, K, 1)
