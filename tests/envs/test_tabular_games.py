"""Structured zero-sum games: generators, values by enumeration, best responses and linear programs against each other."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from mobula.envs.games import exact, tabular
from mobula.envs.games.tabular import FactoredGame, SingleControllerGame
from mobula.errors import ConfigError, DataError


def policies(game: tabular.Game, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    if isinstance(game, FactoredGame):
        shapes = [game.P1.shape[:-1], game.P2.shape[:-1]]
    else:
        shapes = [game.P.shape[:-1], game.r[..., 0, :].shape]
    mu, nu = (torch.rand(s, dtype=torch.float64, generator=g) ** 3 for s in shapes)
    return mu / mu.sum(-1, keepdim=True), nu / nu.sum(-1, keepdim=True)


def value_by_paths(game: tabular.Game, mu: Tensor, nu: Tensor) -> float:
    """Expected total reward, one joint state after the other, straight from the definition."""
    total = 0.0
    if isinstance(game, FactoredGame):
        H = game.r.shape[0]
        law = {game.start: 1.0}
        for h in range(H):
            new: dict[tuple[int, int], float] = {}
            for ((i, j), p), a, b in itertools.product(law.items(), range(mu.shape[-1]), range(nu.shape[-1])):
                q = p * float(mu[h, i, a] * nu[h, j, b])
                total += q * float(game.r[h, i, j, a, b])
                for k, m in itertools.product(range(game.P1.shape[-1]), range(game.P2.shape[-1])):
                    step = float(game.P1[h, i, a, k] * game.P2[h, j, b, m])
                    new[k, m] = new.get((k, m), 0.0) + q * step
            law = new
        return total
    states = {game.start: 1.0}
    for h in range(game.r.shape[0]):
        after: dict[int, float] = {}
        for (s, p), a, b in itertools.product(states.items(), range(mu.shape[-1]), range(nu.shape[-1])):
            q = p * float(mu[h, s, a] * nu[h, s, b])
            total += q * float(game.r[h, s, a, b])
            for t in range(game.P.shape[-1]):
                after[t] = after.get(t, 0.0) + q * float(game.P[h, s, a, t])
        states = after
    return total


GAMES = [
    tabular.random_factored(1),
    tabular.random_factored(1, S1=2, S2=3, A=3, B=2)._replace(start=(1, 2)),
    tabular.random_single_controller(1),
    tabular.random_single_controller(1, S=3, A=2, B=4)._replace(start=2),
    tabular.patrol(),
]


@pytest.mark.parametrize("game", GAMES)
def test_values_are_sums_over_paths(game: tabular.Game) -> None:
    mu, nu = policies(game)
    assert float(exact.value(game, mu, nu)) == pytest.approx(value_by_paths(game, mu, nu))


@pytest.mark.parametrize(
    "game",
    [
        tabular.random_factored(2, S1=2, S2=2, A=2, B=2, H=2)._replace(start=(1, 0)),
        tabular.random_factored(2, S1=2, S2=2, A=2, B=2, H=2)._replace(start=(0, 1)),
        tabular.random_single_controller(2, S=2, A=2, B=2, H=2)._replace(start=1),
    ],
)
def test_best_replies_are_the_best_of_all_deterministic_policies(game: tabular.Game) -> None:
    mu, nu = policies(game)
    gap, upper, lower = exact.gap(game, mu, nu)
    values: list[list[float]] = [[], []]
    for choice in itertools.product(range(2), repeat=4):
        pure = torch.nn.functional.one_hot(torch.tensor(choice).view(2, 2), 2).double()
        values[0].append(float(exact.value(game, pure, nu)))
        values[1].append(float(exact.value(game, mu, pure)))
    assert float(upper) == pytest.approx(max(values[0]))
    assert float(lower) == pytest.approx(min(values[1]))
    assert float(gap) == pytest.approx(max(values[0]) - min(values[1]))


@pytest.mark.parametrize(
    "game",
    [
        tabular.random_factored(3, S1=2, S2=2, A=2, B=2, H=2)._replace(start=(1, 0)),
        tabular.random_factored(3, S1=2, S2=2, A=2, B=2, H=2)._replace(start=(0, 1)),
        tabular.random_single_controller(3, S=2, A=2, B=2, H=2)._replace(start=1),
    ],
)
def test_the_linear_program_solves_the_normal_form(game: tabular.Game) -> None:
    """Against the matrix game over all deterministic policies of both players."""
    pure = [
        torch.nn.functional.one_hot(torch.tensor(c).view(2, 2), 2).double()
        for c in itertools.product(range(2), repeat=4)
    ]
    M = np.array([[float(exact.value(game, mu, nu)) for nu in pure] for mu in pure])
    rows, columns = M.shape
    found = linprog(
        np.r_[np.zeros(rows), -1.0],
        np.c_[-M.T, np.ones(columns)],
        np.zeros(columns),
        np.r_[np.ones(rows), 0.0][None],
        [1.0],
        [(0, None)] * rows + [(None, None)],
    )
    assert exact.equilibrium_value(game) == pytest.approx(-found.fun, abs=1e-8)


def test_the_patrol_is_that_of_the_specification() -> None:
    game = tabular.patrol()
    uniform = torch.full((6, 6, 3), 1 / 3, dtype=torch.float64)
    assert exact.equilibrium_value(game) == pytest.approx(3.293616, abs=5e-7)
    assert float(exact.value(game, uniform, uniform)) == pytest.approx(3.684096, abs=5e-7)
    _, upper, lower = exact.gap(game, uniform, uniform)
    assert (float(upper), float(lower)) == pytest.approx((4.133333, 2.547246), abs=5e-7)


def test_generators_draw_in_the_stated_order_and_batches_are_their_members() -> None:
    rng = np.random.default_rng(7)
    game = tabular.random_factored(7)
    np.testing.assert_array_equal(game.P1, rng.dirichlet(0.5 * np.ones(3), (3, 3, 3)))
    np.testing.assert_array_equal(game.P2, rng.dirichlet(0.5 * np.ones(3), (3, 3, 3)))
    np.testing.assert_array_equal(game.r, rng.random((3, 3, 3, 3, 3)))
    for make in (tabular.random_factored, tabular.random_single_controller):
        games = [make(seed) for seed in range(3)]
        both = [policies(g, seed) for seed, g in enumerate(games)]
        mu, nu = (torch.stack(parts) for parts in zip(*both, strict=True))
        gaps = exact.gap(tabular.stack(games), mu, nu)
        for i, (g, (m, n)) in enumerate(zip(games, both, strict=True)):
            for batched, single in zip(gaps, exact.gap(g, m, n), strict=True):
                assert float(batched[i]) == pytest.approx(float(single))


def test_bad_games_are_named() -> None:
    game = tabular.random_single_controller(0)
    P, r = game.P.clone(), game.r.clone()
    P[1, 2, 0] *= 0.98
    r[0, 0, 0, 1] = 1.5
    with pytest.raises(DataError, match=r"P\[1, 2, 0\] is no probability row: 0.98"):
        tabular.checked(SingleControllerGame(P, game.r))
    with pytest.raises(DataError, match=r"r\[0, 0, 0, 1\] is outside \[0, 1\]: 1.5"):
        tabular.checked(SingleControllerGame(game.P, r))
    with pytest.raises(ConfigError, match="it is one of random_factored"):
        tabular.make_game("chess", 0)
    with pytest.raises(DataError, match="start is 4: a state from 0 to 3"):
        tabular.checked(game._replace(start=4))
    with pytest.raises(DataError, match=r"r has shape \(3, 3, 3, 3\): .* with S = 4 as elsewhere"):
        tabular.checked(SingleControllerGame(game.P, game.r[:, :3]))


@pytest.mark.parametrize("game", GAMES[1:4:2])
def test_games_in_files(tmp_path: Path, game: tabular.Game) -> None:
    fields = {name: np.asarray(value) for name, value in game._asdict().items()}
    np.savez(tmp_path / "game.npz", **fields)
    again = tabular.make_game(str(tmp_path / "game.npz"), 0)
    assert type(again) is type(game) and again.start == game.start
    for a, b in zip(again[:-1], game[:-1], strict=True):
        assert torch.equal(a, b)
    last = next(iter(fields))
    for change, says in (
        ({last: None}, "P, r are needed"),
        ({"Q": np.zeros(2)}, "are needed"),
        ({last: np.zeros((2, 2))}, rf"{last} has 2 axes"),
        ({"r": 1j * fields["r"]}, "r holds complex128; numbers"),
        ({"r": 2 + fields["r"]}, "outside"),
        ({"start": np.zeros(3, dtype=int)}, "start has 3 numbers"),
        ({"start": np.array("x")}, "start holds <U1"),
        ({"r": np.array([None])}, "no archive of NumPy arrays"),
    ):
        kept = {name: value for name, value in {**fields, **change}.items() if value is not None}
        np.savez(tmp_path / "bad.npz", **kept)
        with pytest.raises(DataError, match=says):
            tabular.load_game(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    for name in ("bad.npz", "none.npz"):
        with pytest.raises(DataError, match="no archive of NumPy arrays"):
            tabular.load_game(tmp_path / name)


@pytest.mark.parametrize("game", GAMES)
def test_the_pettingzoo_view(game: tabular.Game) -> None:
    from pettingzoo.test import parallel_api_test

    from mobula.envs.games.pettingzoo import MarkovGameParallelEnv

    env = MarkovGameParallelEnv(game)
    parallel_api_test(env, num_cycles=50)
    mu, nu = policies(game)
    rng, returns = np.random.default_rng(0), []
    env.reset(seed=1)
    for _ in range(1500):
        obs, _ = env.reset()
        total = 0.0
        while env.agents:
            actions = {
                agent: rng.choice(table.shape[-1], p=table[obs[agent][0], obs[agent][1]].numpy())
                for agent, table in (("player_0", mu), ("player_1", nu))
            }
            obs, rewards, _, truncated, infos = env.step(actions)
            assert rewards["player_0"] == -rewards["player_1"]
            total += rewards["player_0"]
        assert all(truncated.values())
        assert infos["player_0"]["step"] == game.r.shape[0]
        returns.append(total)
    error = 4 * float(np.std(returns)) / len(returns) ** 0.5
    assert float(exact.value(game, mu, nu)) == pytest.approx(np.mean(returns), abs=error)
