"""Linear-quadratic team games: exact answers against brute force, simulation against exact answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, root

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


def uneven(teams: lq_teams.LQTeams) -> lq_teams.LQTeams:
    """The game with matrices that differ at every step."""
    g = torch.Generator().manual_seed(4)

    def changed(part: torch.Tensor) -> torch.Tensor:
        return part * (1 + 0.4 * torch.rand(part.shape[-3], 1, 1, dtype=torch.float64, generator=g))

    return replace(teams, games=LQGame(*map(changed, teams.games)))


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


def test_what_is_reported_of_the_stage_matrices_by_hand() -> None:
    """Two inputs for team 1, one step: Phi = diag(R) + B'B, entry by entry in numpy, its rows unlike its columns."""
    rng = np.random.default_rng(3)
    A, B = rng.normal(size=(3, 3)), rng.normal(size=(2, 3, 2))
    Q, R = (
        np.stack([np.diag([1.0, 4.0, 0.2]), np.diag([0.3, 0.1, 2.0])]),
        np.stack([np.diag([3.0, 1.0]), np.eye(2)]),
    )
    game = lq_teams.lq_game(*(torch.tensor(x) for x in (A, B, Q, R)), 1)
    found = riccati.nash(game)
    blocks = [[B[i].T @ Q[i] @ B[j] + (R[i] if i == j else 0) for j in range(2)] for i in range(2)]
    Phi = np.block(blocks)
    norm = lambda x: np.linalg.norm(x, 2)  # noqa: E731
    margins = [np.linalg.svd(blocks[i][i])[1].min() - norm(blocks[i][1 - i]) for i in range(2)]
    columns = [np.linalg.svd(blocks[i][i])[1].min() - norm(blocks[1 - i][i]) for i in range(2)]
    assert abs(min(margins) - min(columns)) > 0.1
    assert float(found.margin[0]) == pytest.approx(min(margins))
    assert float(found.sigma_min[0]) == pytest.approx(np.linalg.svd(Phi)[1].min())
    assert float(found.min_real[0]) == pytest.approx(np.linalg.eigvals(Phi).real.min())


@pytest.mark.parametrize("name", ["g1", "g3"])
def test_finite_populations_cost_what_the_recursion_says(name: str) -> None:
    teams = uneven(getattr(lq_teams, name)(horizon=5))
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
    teams = uneven(lq_teams.g1(horizon=3))
    K = riccati.nash(teams.games).K
    costs = torch.stack([play_sharded(teams, K, 20, seed=s)["costs"] for s in range(1500)])
    wanted = riccati.finite_costs(teams.games, K, teams.noise, teams.start_cov, teams.start_mean, 20)
    assert bool(((costs.mean(0) - wanted).abs() < 4 * costs.std(0) / 1500**0.5).all())


def test_without_noise_a_population_follows_the_closed_loop() -> None:
    """All agents begin at the mean and nothing moves them apart: costs are those of one path, to rounding."""
    teams = uneven(lq_teams.g3(horizon=4))
    teams = replace(teams, noise=0 * teams.noise, start_cov=0 * teams.start_cov)
    K = riccati.nash(teams.games).K + 0.1
    x, path = teams.start_mean, [teams.start_mean]
    for t in range(4):
        x = (teams.games.A[1, t] - sum(teams.games.B[1, j, t] @ K[1, j, t] for j in range(2))) @ x
        path.append(x)
    shards = play_sharded(teams, K, 30, block=7)
    torch.testing.assert_close(shards["means"], torch.stack(path))
    wanted = riccati.finite_costs(teams.games, K, teams.noise, teams.start_cov, teams.start_mean, 30)
    torch.testing.assert_close(shards["costs"], wanted)
    torch.testing.assert_close(lq_teams.play(teams, K, 5, rollouts=2), wanted.expand(2, 2))


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


# Team 1 pays for team 2's input otherwise than team 2 for team 1's, and both otherwise in the game of means: no index can be swapped.
CROSS = [[[[0.0]], [[0.7]]], [[[-0.3]], [[0.0]]]]
CROSS_BAR = [[[[0.0]], [[-0.2]]], [[[1.1]], [[0.0]]]]


@pytest.mark.parametrize("name", ["game.json", "game.npz"])
def test_cross_weights_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name, R_cross=CROSS, R_cross_bar=CROSS_BAR)
    R = lq_teams.load_game(file).games.R
    assert R.shape == (2, 2, 2, 5, 1, 1)
    for t in range(5):
        assert R[0, :, :, t, 0, 0].tolist() == [[2.0, 0.7], [-0.3, 2.0]]
        assert R[1, :, :, t, 0, 0].tolist() == [[3.0, -0.2], [1.1, 3.0]]
    alone = lq_teams.load_game(written(tmp_path / name, R_cross=CROSS)).games.R
    assert torch.equal(alone[0], R[0])
    assert alone[1, :, :, 0, 0, 0].tolist() == [[3.0, 0.0], [0.0, 3.0]]


def solved_from_the_definition(data: dict[str, np.ndarray], bar: str) -> tuple[np.ndarray, np.ndarray]:
    """(gains [N, T, p, n], costs [N]) where no team's cost falls with its own gains, from the arrays of a file alone.

    Costs are sums of traces along the second moment of the state, from the identity, with noise 0.3 I.  Along one entry of a gain
    they are quadratics, so central differences are their derivatives; a root finder sets all to zero.
    """
    axes = {"A": 2, "B": 3, "Q": 3, "R": 3, "R_cross": 4}

    def at(name: str, t: int) -> np.ndarray:
        array = data[name]
        return array[t] if array.ndim > axes[name.removesuffix("_bar")] else array

    def dynamics(name: str, t: int) -> np.ndarray:
        return at(name, t) + (at(f"{name}_bar", t) if bar else 0)

    (N, n, p), T = data["B"].shape[-3:], int(data["horizon"])

    def cost(i: int, K: np.ndarray) -> float:
        M, total = np.eye(n), 0.0
        for t in range(T):
            A, B, R, cross = dynamics("A", t), dynamics("B", t), at(f"R{bar}", t), at(f"R_cross{bar}", t)
            closed = A - sum(B[j] @ K[j, t] for j in range(N))
            total += np.trace(at(f"Q{bar}", t)[i] @ M)
            for j in range(N):
                total += np.trace((R[i] if i == j else cross[i, j]) @ K[j, t] @ M @ K[j, t].T)
            M = closed @ M @ closed.T + 0.3 * np.eye(n)
        return float(total + np.trace(at(f"Q{bar}", T)[i] @ M))

    def slopes(flat: np.ndarray) -> np.ndarray:
        found = np.zeros((N, T * p * n))
        for i in range(N):
            for k in range(T * p * n):
                step = np.zeros((N, T * p * n))
                step[i, k] = 0.5
                ahead, behind = (flat.reshape(N, -1) + sign * step for sign in (1, -1))
                found[i, k] = cost(i, ahead.reshape(N, T, p, n)) - cost(i, behind.reshape(N, T, p, n))
        return found.flatten()

    found = root(slopes, np.zeros(N * T * p * n), tol=1e-13)
    assert found.success
    K = found.x.reshape(N, T, p, n)
    return K, np.array([cost(i, K) for i in range(N)])


def test_cross_weights_from_a_file_give_the_equilibrium_of_the_definition(tmp_path: Path) -> None:
    """Two inputs a team, so that the blocks of the weights count as matrices."""
    rng = np.random.default_rng(5)

    def weights(*shape: int) -> np.ndarray:
        raw = rng.uniform(-0.4, 0.4, size=(*shape, 2, 2))
        return raw + raw.swapaxes(-1, -2)

    cross, cross_bar = weights(2, 2), weights(2, 2)
    for each in (cross, cross_bar):
        each[range(2), range(2)] = 0.0
    changes = {
        "B": rng.uniform(-1, 1, (2, 2, 2)), "B_bar": rng.uniform(-0.2, 0.2, (2, 2, 2)),
        "R": weights(2) + 2 * np.eye(2), "R_bar": weights(2) + 3 * np.eye(2),
        "R_cross": cross, "R_cross_bar": cross_bar, "horizon": 2,
    }  # fmt: skip
    file = written(tmp_path / "game.npz", **changes)
    games = lq_teams.load_game(file).games
    found = riccati.nash(games)
    eye = torch.eye(2, dtype=torch.float64)
    costs = riccati.expected_cost(found.P, eye.expand(2, 2, 2), 0.3 * eye.expand(2, 2, 2))
    with np.load(file) as data:
        for game, bar in enumerate(("", "_bar")):
            K, wanted = solved_from_the_definition(dict(data), bar)
            np.testing.assert_allclose(found.K[game].numpy(), K, atol=1e-9)
            np.testing.assert_allclose(costs[game].numpy(), wanted, rtol=1e-9)
    without = riccati.nash(
        lq_teams.load_game(written(tmp_path / "plain.npz", **changes | {"R_cross": None})).games
    )
    assert float((without.K - found.K)[0].abs().max()) > 1e-3


def test_a_scalar_game_of_one_step_by_hand(tmp_path: Path) -> None:
    """A = B = Q = 1, R = (1, 2): Phi = [[2, 1], [1, 3]], Psi = (1, 1), K = (2, 1) / 5, closed loop 2 / 5.

    P^1 = 1 + 1 (4/25) + 0.5 (1/25) + 4/25 = 1.34 and P^2 = 1 + 2 (1/25) - 0.25 (4/25) + 4/25 = 1.2.
    """
    one, two, nothing = [[1.0]], [[[1.0]], [[1.0]]], [[[0.0]], [[0.0]]]
    file = written(
        tmp_path / "game.json", A=one, A_bar=[[0.0]], B=two, B_bar=nothing, Q=two, Q_bar=two,
        R=[[[1.0]], [[2.0]]], R_bar=[[[1.0]], [[2.0]]], Sigma=one, Sigma0=one, horizon=1,
        R_cross=[[[[0.0]], [[0.5]]], [[[-0.25]], [[0.0]]]],
    )  # fmt: skip
    found = riccati.nash(lq_teams.load_game(file).games)
    np.testing.assert_allclose(found.K[:, :, 0, 0, 0].numpy(), [[0.4, 0.2], [0.4, 0.2]], rtol=1e-14)
    np.testing.assert_allclose(found.P[:, :, 0, 0, 0].numpy(), [[1.34, 1.2], [1.32, 1.24]], rtol=1e-14)


def test_a_zero_sum_game_from_a_file(tmp_path: Path) -> None:
    """P^2 = -P^1; where the second team's weight is too small for its stake it has no best answer, and there is no equilibrium."""
    Q = np.array([[[1.0, 0.0], [0.0, 0.2]], [[-1.0, 0.0], [0.0, -0.2]]])

    def game(second: float) -> LQGame:
        cross = [[[[0.0]], [[-second]]], [[[-2.0]], [[0.0]]]]
        changes = {"Q": Q, "Q_bar": Q, "R": [[[2.0]], [[second]]], "R_bar": [[[2.0]], [[second]]]}
        file = written(tmp_path / "game.npz", R_cross=cross, R_cross_bar=cross, **changes)
        return lq_teams.load_game(file).games

    P = riccati.nash(game(8.0)).P
    torch.testing.assert_close(P[:, 1], -P[:, 0])
    with pytest.raises(
        ConfigError, match=r"at t=4: the cost of team 2 is not convex in its own gain .*-0\.0456"
    ):
        riccati.nash(game(0.3))


def test_simulated_costs_take_the_cross_weights(tmp_path: Path) -> None:
    teams = lq_teams.load_game(written(tmp_path / "game.json", R_cross=CROSS, R_cross_bar=CROSS_BAR))
    K = riccati.nash(teams.games).K
    cost = lq_teams.play(teams, K, 5, rollouts=6000, seed=1)
    wanted = riccati.finite_costs(teams.games, K, teams.noise, teams.start_cov, teams.start_mean, 5)
    assert bool(((cost.mean(0) - wanted).abs() < 4 * cost.std(0) / 6000**0.5).all())


def fleets(path: Path, **changes: object) -> Path:
    """G3 as a file."""
    teams = lq_teams.g3(horizon=3)
    (A, A_mean), (B, B_mean), (Q, Q_bar), (R, R_bar) = teams.games
    data = {
        "A": A[0], "A_bar": A_mean[0] - A[0], "B": B[:, 0], "B_bar": B_mean[:, 0] - B[:, 0],
        "Q": Q[:, 0], "Q_bar": Q_bar[:, 0], "R": R[[0, 1], [0, 1], 0], "R_bar": R_bar[[0, 1], [0, 1], 0],
        "Sigma": teams.noise[0], "Sigma0": teams.noise[1], "start_mean": teams.start_mean, "horizon": 3, "blocks": 2,
    }  # fmt: skip
    np.savez(path, **{k: np.asarray(v) for k, v in (data | changes).items() if v is not None})
    return path


def test_populations_from_a_file_are_those_of_the_built_in_game(tmp_path: Path) -> None:
    wanted, teams = lq_teams.g3(horizon=3), lq_teams.load_game(fleets(tmp_path / "g3.npz"))
    for mine, theirs in zip(teams.games, wanted.games, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(teams.mask, wanted.mask) and teams.blocks == 2
    assert teams.mask[0, 1].tolist() == [[True, True, False, False], [False, False, True, True]]
    K = riccati.nash(teams.games).K
    costs = [lq_teams.play(game, K, [2, 9], rollouts=20, seed=1) for game in (teams, wanted)]
    torch.testing.assert_close(*costs)
    other = np.diag([1.0, 2.0, 3.0, 4.0])
    teams = lq_teams.load_game(
        fleets(tmp_path / "g3.npz", Sigma_y=other, Sigma_xbar=2 * other, start_cov=3 * other)
    )
    assert [torch.diagonal(c)[1].item() for c in (*teams.reset, teams.start_cov)] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"Sigma0": -0.1 * np.eye(4)}, ConfigError, "Sigma0 is no covariance"),
        ({"Sigma": np.eye(4) + np.eye(4, k=1)}, ConfigError, "Sigma is no covariance"),
        ({"Sigma_y": np.diag([1.0, 1.0, 1.0, 0.0])}, ConfigError, "Sigma_y is singular"),
        ({"Sigma_xbar": np.zeros((4, 4))}, ConfigError, "Sigma_xbar is singular"),
        ({"Sigma": np.eye(4) + 0.5}, ConfigError, "Sigma couples the deviations of different populations"),
        ({"A": np.eye(4) + np.eye(4, k=2)}, ConfigError, "A couples the deviations"),
        ({"B": np.ones((2, 4, 2))}, ConfigError, "B couples the deviations"),
        ({"start_cov": np.eye(4) + 0.5}, ConfigError, "start_cov couples the deviations"),
        ({"blocks": 3}, DataError, "blocks is 3; 4 states and 2 inputs"),
        ({"blocks": 0}, DataError, "blocks is 0"),
        ({"start_mean": np.zeros(3)}, DataError, r"start_mean is \(3,\); finite numbers \(4,\) are needed"),
        ({"start_mean": np.zeros((3, 4))}, DataError, r"start_mean is \(3, 4\); finite numbers \(4,\)"),
    ],
)
def test_covariances_and_blocks_that_are_refused(
    tmp_path: Path, changes: dict[str, object], error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        lq_teams.load_game(fleets(tmp_path / "g3.npz", **changes))


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
        (
            {"Q_bar": [[[1.0, 0.0], [0.0, 0.2]], [[0.2, 0.3], [0.0, 1.0]]]},
            ConfigError,
            "^Q_bar of team 2 is not symmetric",
        ),
        ({"R_bar": [[[0.0]], [[1.0]]]}, ConfigError, "^R_bar of team 1 is not symmetric and positive"),
        ({"A": 0.9}, DataError, r"A has the axes \[n, n\]"),
        ({"horizon": 0}, DataError, "horizon is 0"),
        (
            {"R_cross": [[[0.0]], [[0.0]]]},
            DataError,
            r"R_cross is \(2, 1, 1\); finite numbers \(2, 2, 1, 1\)",
        ),
        (
            {"R_cross_bar": [[[[0.0]], [[float("inf")]]], [[[0.0]], [[0.0]]]]},
            DataError,
            "R_cross_bar is .* finite",
        ),
        (
            {"R_cross": [[[[2.0]], [[0.0]]], [[[0.0]], [[0.0]]]]},
            ConfigError,
            "^R_cross of team 1 on its own inputs is not 0: R holds that weight",
        ),
        (
            {"R_cross_bar": [[[[0.0]], [[0.0]]], [[[0.0]], [[1.0]]]]},
            ConfigError,
            "^R_cross_bar of team 2 on its own inputs is not 0: R_bar holds that weight",
        ),
        ({"R_crosss": [[0.0]]}, DataError, "R_crosss is no part of a game. Did you mean 'R_cross'"),
    ],
)
def test_games_that_are_refused(tmp_path: Path, changes: dict[str, object], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        lq_teams.load_game(written(tmp_path / "game.json", **changes))
    with pytest.raises(DataError, match="does not exist"):
        lq_teams.load_game(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("name", ["game.json", "game.npz"])
def test_matrices_that_change_with_time_give_the_equilibrium_of_the_definition(
    tmp_path: Path, name: str
) -> None:
    """Every array with time in front; then some of them constant beside others that change."""
    rng = np.random.default_rng(7)
    T = 3

    def changing(data: np.ndarray, steps: int = T, spread: float = 0.2) -> np.ndarray:
        return data * (1 + rng.uniform(-spread, spread, size=(steps, *(1 for _ in data.shape))))

    written(tmp_path / "constant.npz", R_cross=CROSS, R_cross_bar=CROSS_BAR, horizon=T)
    with np.load(tmp_path / "constant.npz") as file:
        constant = {k: file[k] for k in file.files}
    steps = {"Q": T + 1, "Q_bar": T + 1}
    times = {k: changing(v, steps.get(k, T)) for k, v in constant.items() if k[0] in "ABQR"}
    for kept in ((), ("A", "B_bar", "R"), ("A_bar", "B", "Q", "R_cross")):
        data = constant | {k: v for k, v in times.items() if k not in kept}
        file = written(
            tmp_path / name, **{k: v.tolist() if name.endswith("json") else v for k, v in data.items()}
        )
        found = riccati.nash(lq_teams.load_game(file).games)
        for index, bar in enumerate(("", "_bar")):
            K, _ = solved_from_the_definition(data, bar)
            np.testing.assert_allclose(found.K[index], K, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"A": [[[1.0, 0.0], [0.0, 1.0]]] * 4},
            r"A is \(4, 2, 2\); finite numbers \(2, 2\) or \(5, 2, 2\) are",
        ),
        (
            {"Q": [[[[1.0, 0.0], [0.0, 1.0]]] * 2] * 5},
            r"Q is \(5, 2, 2, 2\); .* or \(6, 2, 2, 2\) are needed",
        ),
        ({"Sigma": [[[1.0, 0.0], [0.0, 1.0]]] * 5}, r"Sigma is \(5, 2, 2\); finite numbers \(2, 2\) are"),
        (
            {"R": [[[[1.0]]] * 2] * 3 + [[[[1.0]], [[-1.0]]]] * 2},
            "R of team 2 is not .* positive definite at t=3",
        ),
    ],
)
def test_matrices_over_time_that_are_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises((DataError, ConfigError), match=says):
        lq_teams.load_game(written(tmp_path / "game.json", **changes))


def test_a_cross_weight_that_is_not_symmetric(tmp_path: Path) -> None:
    teams = lq_teams.g1().games
    two = torch.eye(2, dtype=torch.float64)
    cross = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    cross[1, 0, 0, 1] = 0.5
    with pytest.raises(ConfigError, match=r"^R_cross of team 2 on the inputs of team 1 is not symmetric"):
        lq_teams.lq_game(two, two.expand(2, 2, 2), teams.Q[0, :, 0], two.expand(2, 2, 2), 3, cross)
    assert float(cross.abs().sum()) == 0.5


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
