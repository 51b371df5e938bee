"""MADDPG on team games: its losses with exact critics against Riccati answers, its estimates of exploitability, the whole way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mobula.algorithms.meanfield import mrpg, mrpg_experiment
from mobula.algorithms.meanfield.baselines import maddpg
from mobula.algorithms.meanfield.baselines.maddpg import MADDPG, MADDPGConfig
from mobula.artifact import export_policy, load_policy
from mobula.envs.meanfield import lq_teams, riccati
from mobula.envs.meanfield.lq_teams import LQTeams
from mobula.errors import ConfigError, DataError
from mobula.experiment import Task


def game(name: str = "g2", horizon: int = 3) -> LQTeams:
    """A game whose matrices differ at every step and where every player pays for every other's input."""
    teams: LQTeams = getattr(lq_teams, name)(horizon=horizon)
    g = torch.Generator().manual_seed(3)
    N = teams.games.players
    teams.games.R.copy_(
        teams.games.R + 0.1 * torch.arange(float(N * N), dtype=torch.float64).view(N, N, 1, 1, 1)
    )
    for part in teams.games:
        axis = 1 if part is teams.games.A else 2 if part is not teams.games.R else 3
        shape = [1] * part.ndim
        shape[axis] = part.shape[axis]
        part *= 1 + 0.3 * torch.rand(shape, dtype=torch.float64, generator=g)
    return teams


def some_gains(teams: LQTeams) -> Tensor:
    g = torch.Generator().manual_seed(1)
    K = mrpg.zero_gains(teams.games)
    return 0.4 * torch.randn(K.shape, dtype=torch.float64, generator=g) * teams.mask[:, :, None]


def linear_actor(K: Tensor) -> maddpg.Actor:
    """u^j = -K^j_t z, an environment at a time, from K [2, N, T, p, n]."""

    def act(t: Tensor, z: Tensor) -> Tensor:
        gains = torch.stack([K[k][:, t[k]].movedim(0, 1) for k in range(2)])
        return -(gains @ z[..., None, :, None]).squeeze(-1)

    return act


def exact_critic(teams: LQTeams, K: Tensor) -> maddpg.Critic:
    """Q^i(t, z, u) = z'Q^i z + sum_j u^j'R^{ij}u^j + (A z + sum_j B^j u^j)' P^i_{t+1} (...) under later gains K, without noise.

    Entry by entry in loops over games, teams and environments.
    """
    games, P = teams.games, riccati.values(teams.games, K)

    def q(t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        N, E = games.players, z.shape[-2]
        u = u.expand(*u.shape[:-4], N, -1, -1, -1)
        found = []
        for k in range(2):
            for i in range(N):
                for e in range(E):
                    s, x, v = int(t[k, e]), z[k, e], u[k, i, e]
                    ahead = games.A[k, s] @ x + sum(games.B[k, j, s] @ v[j] for j in range(N))
                    paid = sum(v[j] @ games.R[k, i, j, s] @ v[j] for j in range(N))
                    found.append(x @ games.Q[k, i, s] @ x + paid + ahead @ P[k, i, s + 1] @ ahead)
        return torch.stack(found).view(2, N, E)

    return q


def rows_of(teams: LQTeams, envs: int = 12, noise: float = 0.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    games = teams.games
    n, N, p, T = games.A.shape[-1], games.players, games.B.shape[-1], games.horizon
    t = torch.arange(envs).expand(2, envs) % T
    z = torch.randn(2, envs, n, dtype=torch.float64, generator=g)
    u = torch.randn(2, envs, N, p, dtype=torch.float64, generator=g)
    shock = noise * torch.randn(2, envs, n, dtype=torch.float64, generator=g)
    cost, ahead = maddpg.transition(games, t, z, u, shock)
    return {"t": t, "z": z, "u": u, "cost": cost, "ahead": ahead}


@pytest.mark.parametrize("name", ["g2", "g3"])
def test_the_values_of_fixed_gains_have_no_error(name: str) -> None:
    """Bellman: with the exact critic of gains K as critic and target, and K as actor, every error is zero, at every time."""
    teams = game(name)
    K = some_gains(teams)
    q, rows = exact_critic(teams, K), rows_of(teams)
    errors = maddpg.critic_errors(q, q, linear_actor(K), rows, teams.games.horizon)
    assert errors.shape == (2, teams.games.players)
    assert float(errors.max()) < 1e-20
    # Other gains ahead, or a step of another time, are no fixed point.
    assert float(maddpg.critic_errors(q, q, linear_actor(1.1 * K), rows, teams.games.horizon).min()) > 1e-6
    moved = {**rows, "t": (rows["t"] + 1) % 3}
    assert float(maddpg.critic_errors(q, q, linear_actor(K), moved, teams.games.horizon).min()) > 1e-6


@pytest.mark.parametrize("name", ["g2", "g3"])
def test_the_actor_s_gradient_is_the_exact_one(name: str) -> None:
    """With the exact critic, the others' inputs those of K, and states of covariance Sigma, it is 2 (Phi K - Psi)^i Sigma."""
    teams = game(name)
    games, reset = teams.games, torch.tensor([[[2.0]], [[0.5]]], dtype=torch.float64) * teams.reset
    n, N = games.A.shape[-1], games.players
    K = some_gains(teams)
    # 2 n points with covariance Sigma exactly.
    root = torch.linalg.cholesky(reset) * n**0.5
    z = torch.cat([root.mT, -root.mT], -2)
    for t in range(games.horizon):
        at = torch.full((2, 2 * n), t)
        free = K.clone().requires_grad_()
        u = linear_actor(K)(at, z)
        rows = {"t": at, "z": z, "u": u}
        values = maddpg.actor_values(exact_critic(teams, K), linear_actor(free), rows)
        P = riccati.values(games, K)[..., t + 1, :, :]
        wanted = mrpg.exact_gradient(games, K, t, P, reset)
        for i in range(N):
            (found,) = torch.autograd.grad(values[:, i].sum(), free, retain_graph=True)
            torch.testing.assert_close(found[:, i, t], wanted[:, i])
            # Team i's value moves nobody else's actor.
            others = found.clone()
            others[:, i, t] = 0.0
            assert float(others.abs().max()) == 0.0


def test_transitions_add_up_to_the_cost_of_a_play() -> None:
    """Whole plays from sigma points of the start, without noise: the sum of costs is that of the Lyapunov recursion."""
    teams = game("g2", horizon=4)
    K, n = some_gains(teams), 3
    z = n**0.5 * torch.eye(n, dtype=torch.float64)
    z = torch.cat([z, -z]).expand(2, -1, -1)
    noise = torch.zeros(4, 2, 2 * n, n, dtype=torch.float64)
    act = linear_actor(K)
    found = maddpg.sampled_costs(
        teams.games, lambda t, z: act(torch.full(z.shape[:-1], t), z), z, noise
    ).mean(-1)
    eye = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    torch.testing.assert_close(
        found, riccati.expected_cost(riccati.values(teams.games, K), eye, torch.zeros_like(eye))
    )


def test_the_linear_part_of_gains_is_themselves_and_of_a_cube_is_its_regression() -> None:
    """E z^3 z / E z^2 = 3 s^2 for a Gaussian of variance s^2, which the points are up to sampling."""
    teams = game("g3")
    K = some_gains(teams)
    act = linear_actor(K)
    found = maddpg.linear_part(lambda t, z: act(t[0], z[0])[None], teams, 1)
    torch.testing.assert_close(found[0], K)
    wide = LQTeams(**{**vars(lq_teams.g1(2)), "reset": 4.0 * lq_teams.g1(2).reset})

    def cube(t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([z[..., :1] ** 3, z[..., 1:]], -2)

    K = maddpg.linear_part(cube, wide, 2, points=200_000)
    assert K.shape == (2, 2, 2, 2, 1, 2)
    wanted = -torch.tensor([[[12.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(K, wanted[:, None].expand_as(K), atol=0.25, rtol=0)


def test_exploitability_of_gains_is_the_exact_one_and_a_bend_adds_to_it() -> None:
    teams = lq_teams.g2(horizon=3)
    solution = riccati.nash(teams.games).K
    K = torch.stack([solution, some_gains(teams)])
    actors = [linear_actor(k) for k in K]

    def act(t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([actors[s](t[s], z[s]) for s in range(2)])

    def measured(actor: maddpg.Actor, rollouts: int = 50) -> tuple[Tensor, Tensor]:
        return maddpg.exploitability(actor, teams, K, rollouts, torch.Generator().manual_seed(0))

    gap, cost = measured(act)
    for s in range(2):
        wanted = riccati.exploitability(teams.games, K[s], teams.moments(), teams.noise).sum(0)
        torch.testing.assert_close(gap[s], wanted, atol=1e-12, rtol=1e-9)
        values = riccati.values(teams.games, K[s])
        torch.testing.assert_close(
            cost[s], riccati.expected_cost(values, teams.moments(), teams.noise).sum(0)
        )

    # At the equilibrium, a bend of team 2's input alone: it alone gains by dropping it, and by no less than its cost grew.
    def bent(t: Tensor, z: Tensor) -> Tensor:
        u = act(t, z)
        u[..., 1, :] += 0.3 * torch.sin(3 * z[..., :1])
        return u

    bent_gap, bent_cost = measured(bent, 4000)
    grown = bent_cost - cost
    assert float(grown[0, 1]) > 0.05
    torch.testing.assert_close(bent_gap[0, 1], grown[0, 1])
    assert float(bent_gap[0, 0].abs()) < 0.1 * float(grown[0, 1])


def test_the_replay_is_a_ring() -> None:
    teams = lq_teams.g3(horizon=4)
    replay = maddpg.Replay(teams.games, 1, 10)
    rows = {k: v[None] for k, v in rows_of(teams, envs=7).items()}
    for shift in range(2):
        replay.add({**rows, "z": rows["z"] + 100 * shift})
    assert replay.added == 14
    found = replay.sample(4000, maddpg.Streams([5]))
    # The first four of the first seven rows were written over; every row that is left comes up, and whole.
    held = {(shift, e) for shift in range(2) for e in range(7) if shift or e >= 4}
    for k in range(2):
        keys = {(int(z[0] > 50), round(float(z[0]), 3)) for z in found["z"][0, k]}
        wanted = {(s, round(float(rows["z"][0, k, e, 0] + 100 * s), 3)) for s, e in held}
        assert {a for a, _ in keys} == {0, 1} and len(keys) == len(wanted) == 10
        for s, e in held:
            z = (rows["z"][0, k, e] + 100 * s).float()
            (at,) = torch.nonzero((found["z"][0, k] - z).abs().amax(-1) < 1e-3, as_tuple=True)
            assert len(at) > 200
            one = at[0]
            torch.testing.assert_close(found["u"][0, k, one], rows["u"][0, k, e].float())
            torch.testing.assert_close(found["cost"][0, k, :, one], rows["cost"][0, k, :, e].float())
            torch.testing.assert_close(found["ahead"][0, k, one], rows["ahead"][0, k, e].float())
            assert int(found["t"][0, k, one]) == int(rows["t"][0, k, e])


def test_the_world_steps_in_time_and_begins_anew() -> None:
    teams = lq_teams.g1(horizon=3)
    world = maddpg.World(teams, 4000, maddpg.Streams([0, 1]))
    u = torch.zeros(2, 2, 4000, 2, 1, dtype=torch.float64)
    before, z = world.t, world.z
    rows = world.step(u)
    assert torch.equal(rows["t"], before) and torch.equal(rows["z"], z)
    going = before < 2
    assert torch.equal(world.t[going], before[going] + 1)
    torch.testing.assert_close(world.z[going], rows["ahead"][going])
    shock = rows["ahead"] - torch.einsum("gnm,sgem->sgen", teams.games.A[:, 0], z)
    for k in range(2):
        noise = shock[:, k].flatten(0, 1).T.cov()
        torch.testing.assert_close(noise, teams.noise[k], atol=0.006, rtol=0)
        begun = world.z[:, k][~going[:, k]].T.cov()
        torch.testing.assert_close(begun, teams.reset[k], atol=0.1, rtol=0)
    share = torch.bincount(world.t[~going], minlength=3) / (~going).sum()
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.03, rtol=0)


# The module and the whole way -------------------------------------------------------------------------------------


def config(**knobs: Any) -> Any:
    small = {
        "horizon": 2,
        "steps": 40,
        "report_every": 20,
        "envs": 50,
        "batch": 64,
        "capacity": 1500,
        **knobs,
    }
    return MADDPGConfig().training(**small).debugging(seed=0, log_level="ERROR")


def to_the_end(algorithm: Any) -> dict[str, Any]:
    while True:
        result: dict[str, Any] = algorithm.train()
        if result["progress"] >= 1:
            return result


def test_policies_are_odd_and_see_what_the_game_lets_them(ray_session: None) -> None:
    algorithm = config(game="G3", num_seeds_batched=2).build_algo()
    module = algorithm.rl_module
    # Away from the small first weights, so that an input that is seen shows.
    with torch.no_grad():
        module.actor.weight[-1].mul_(100)
    z = torch.randn(2, 2, 30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(2, 2, 30, dtype=torch.int64)
    z.requires_grad_()
    u = module.act(t, z)
    assert u.shape == (2, 2, 30, 2, 2)
    torch.testing.assert_close(module.act(t, -z), -u, atol=1e-6, rtol=1e-5)
    for k in range(2):
        for i in range(2):
            for j in range(2):
                (slope,) = torch.autograd.grad(u[:, k, :, i, j].sum(), z, retain_graph=True)
                seen = slope[:, k].abs().amax((0, 1)) > 1e-4
                assert seen.tolist() == algorithm.teams.mask[k, i, j].tolist()
                assert float(slope[:, 1 - k].abs().max()) == 0.0
    algorithm.stop()


def test_a_seed_learns_the_same_alone_and_among_others(ray_session: None) -> None:
    both = config(num_seeds_batched=2).build_algo()
    alone = config().debugging(seed=1).build_algo()
    for each in (both, alone):
        to_the_end(each)
    t = torch.zeros(1, 2, 9, dtype=torch.int64)
    z = torch.randn(1, 2, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    among = both.rl_module.act(t.expand(2, -1, -1), z.expand(2, -1, -1, -1))
    torch.testing.assert_close(among[1:], alone.rl_module.act(t, z), atol=1e-4, rtol=1e-3)
    assert float((among[0] - among[1]).detach().abs().max()) > 1e-3
    for each in (both, alone):
        each.stop()


def test_it_comes_near_the_equilibrium(ray_session: None) -> None:
    algorithm = config(steps=600, report_every=600, batch=128, lr=3e-3, actor_lr=1e-3, envs=200).build_algo()
    _, gap, cost = algorithm.measure(500)
    start = float((gap / cost).max())
    result = algorithm.train()
    assert start > 0.2
    assert result["exploitability"] < 0.1 * start
    assert result["transitions"] == 120_000
    algorithm.stop()


def test_the_whole_way(ray_session: None, tmp_path: Path) -> None:
    algorithm = config().build_algo()
    assert algorithm.train()["progress"] == 0.5
    # A restored run goes on exactly: networks, moments, targets, environments, replay and streams.
    restored = MADDPG.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    result, again = to_the_end(algorithm), to_the_end(restored)
    assert result["error"] == again["error"]
    assert result["exploitability"] == again["exploitability"]
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    x, mean = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 0.25]).double()
    t, z = torch.ones(1, 2, 1, dtype=torch.int64), torch.stack([x - mean, mean])[None, :, None]
    with torch.no_grad():
        u = algorithm.rl_module.act(t, z)
        q = algorithm.rl_module.q(t, z, u.unsqueeze(2)) / 0.1
    for team in range(2):
        answer = policy.answer(np.concatenate([[team, 1], x, mean]))
        np.testing.assert_allclose(answer["action"], u[0, :, 0, team].sum(0), rtol=1e-5)
        assert answer["value"] == pytest.approx(float(q[0, :, team].sum()), rel=1e-5)
    with pytest.raises(DataError, match="whole numbers below"):
        policy.act(np.concatenate([[2, 0], x, mean]))
    # What a service asks when it loads a policy.
    assert np.isfinite(policy.example()["answer"]["value"])
    for each in (algorithm, restored):
        each.stop()


def test_the_arm_of_the_experiment_draws_what_the_antithetic_one_draws(ray_session: None) -> None:
    plan = mrpg_experiment.experiment()
    about, task = plan.arm("antithetic").config, plan.tasks["G1"]
    T = task.env_config["horizon"]
    lengths = sum(T - t for t in range(T))
    assert task.env_steps == 2 * 2 * about.batch * about.inner_iters * lengths
    arm, small = plan.arm("maddpg"), Task(env_steps=6000, env_config={"game": "G1", "horizon": 2})
    found = arm.run(arm.config.copy().training(batch=32), small, [3, 4])  # type: ignore[misc]
    assert len(found) == 2 and found[0]["exploitability"] != found[1]["exploitability"]
    for numbers in found:
        worst = max(numbers["error_deviation"], numbers["error_mean"])
        assert max(numbers["curve_values"]) == worst and numbers["curve_steps"] == [1, 0]
        assert numbers["exploitability"] == -numbers["score"] > 0


def test_what_is_refused(ray_session: None) -> None:
    with pytest.raises(ConfigError, match="MADDPGConfig: game is 'G9'; it is one of G1, G2, G3"):
        config(game="G9")
    with pytest.raises(ConfigError, match="out of range"):
        config(tau=1.5)
    with pytest.raises(ConfigError, match="without discount"):
        config(gamma=0.9)
