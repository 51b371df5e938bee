"""Particles, logs and game files: against the exact flow, by the law of what was drawn, and over any number of actors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobula.envs.meanfield import graphon, logs
from mobula.envs.meanfield.graphon import FiniteMFG
from mobula.envs.meanfield.particles import ParticlePopulation, deviation
from mobula.envs.meanfield.pettingzoo import PopulationParallelEnv
from mobula.errors import ConfigError, DataError

SBM = graphon.named("sbm")


def epidemic(M: int = 10, H: int = 8) -> FiniteMFG:
    return graphon.sis(graphon.matrix(SBM, graphon.cells(M)), H)


def some_policy(game: FiniteMFG) -> torch.Tensor:
    raw = torch.rand(
        graphon.uniform_policy(game).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    return raw / raw.sum(-1, keepdim=True)


@pytest.mark.parametrize("make", [graphon.sis, graphon.beach_bar])
def test_many_particles_follow_the_exact_flow(make: Any) -> None:
    game = make(graphon.matrix(SBM, graphon.cells(10)), 6)
    pi, n = some_policy(game), 200_000
    mass = ParticlePopulation(game, pi, n, seed=1).run()
    torch.testing.assert_close(mass.sum((1, 2)), torch.ones(7, dtype=torch.float64))
    # Each cell holds n / 10 draws; five of the largest binomial deviations.
    gap = (10 * mass.transpose(0, 1) - graphon.flow(game, pi)).abs()
    assert float(gap.max()) < 5 * 0.5 / (n / 10) ** 0.5


def test_any_number_of_actors_gives_the_same_particles(ray_session: None, tmp_path: Path) -> None:
    game, found = epidemic(), []
    for actors in (0, 1, 2):
        population = ParticlePopulation(game, some_policy(game), 5000, seed=2, actors=actors, block=512)
        for _ in range(4):
            population.advance()
        population.save(tmp_path / f"at-{actors}")
        found.append((population.run(), population.spread.call("arrays")))
        population.close()
    for flow, arrays in found[1:]:
        assert torch.equal(flow, found[0][0])
        for (label, state), (label_0, state_0) in zip(arrays, found[0][1], strict=True):
            np.testing.assert_array_equal(label, label_0)
            np.testing.assert_array_equal(state, state_0)
    # What was saved half way goes on to the same end, on another number of actors.
    again = ParticlePopulation(game, some_policy(game), 5000, seed=2, block=512)
    again.load(tmp_path / "at-2")
    assert torch.equal(again.run(), found[0][0])
    with pytest.raises(DataError, match="another population"):
        ParticlePopulation(game, some_policy(game), 5001, seed=2, block=512).load(tmp_path / "at-2")
    with pytest.raises(DataError, match="is missing"):
        again.load(tmp_path)


def test_the_deviation_of_finite_populations_falls_like_the_root_of_n() -> None:
    """Slope within [-0.6, -0.4]: over three decades and 20 populations its standard error is about 0.02."""
    game = epidemic(20, 10)
    sizes = np.array([100, 1000, 10_000])
    gaps = [float(deviation(game, some_policy(game), int(n), repetitions=20).mean()) for n in sizes]
    assert -0.6 < np.polyfit(np.log(sizes), np.log(gaps), 1)[0] < -0.4


def test_what_one_agent_gains_in_a_finite_population_tends_to_the_exploitability() -> None:
    game = epidemic()
    pi = some_policy(game)
    limit = graphon.exploitability(game, pi, 0.5).mean()
    errors = []
    for n in (1000, 100_000):
        mass = ParticlePopulation(game, pi, n).run().transpose(0, 1)
        gain = graphon.deviation_gain(game, pi, mass / mass.sum(-1, keepdim=True), 0.5).mean()
        errors.append(abs(float(gain - limit)))
    assert errors[1] < 0.01 * float(limit)
    assert errors[1] < errors[0]


def values_of_two(game: FiniteMFG, W: torch.Tensor, pi: torch.Tensor) -> list[float]:
    """What two agents earn under pi [2, H, S, A], by the chain of their joint states."""
    S, A = game.states, game.actions
    law, total = torch.outer(game.mu0[0], game.mu0[0]), [0.0, 0.0]
    for h in range(game.horizon):
        after = torch.zeros_like(law)
        for s in range(S):
            for t in range(S):
                z = torch.zeros(2, S, dtype=torch.float64)
                z[0, t], z[1, s] = W[0, 1], W[1, 0]
                P, r = game.model(h, z)
                for a in range(A):
                    for b in range(A):
                        p = law[s, t] * pi[0, h, s, a] * pi[1, h, t, b]
                        total[0] += float(p * r[0, s, a])
                        total[1] += float(p * r[1, t, b])
                        after += p * torch.outer(P[0, s, a], P[1, t, b])
        law = after
    return total


def test_agents_one_by_one_earn_what_their_joint_chain_says() -> None:
    """Two agents of unlike policies and an initial law that is not even, over 1,000 episodes: within 4.5 standard errors."""
    from pettingzoo.test import parallel_api_test

    game, W = epidemic(2, 3), graphon.named("ranked_attachment")
    game = FiniteMFG(**{**vars(game), "mu0": torch.tensor([[0.3, 0.7]] * 2, dtype=torch.float64)})
    env, pi = PopulationParallelEnv(game, W, 2), some_policy(game)
    parallel_api_test(env, num_cycles=5)
    rng, earned = np.random.default_rng(0), np.zeros((1000, 2))
    seen, _ = env.reset(seed=1)
    for episode in range(1000):
        seen, _ = env.reset()
        while env.agents:
            actions = {}
            for i, agent in enumerate(env.possible_agents):
                label, degree, h, state = seen[agent]
                assert label == (i + 0.5) / 2 and degree == pytest.approx(1 - 0.25 * 0.75)
                actions[agent] = int(rng.random() < pi[i, int(h), int(state), 1])
            seen, rewards, _, ended, _ = env.step(actions)
            earned[episode] += list(rewards.values())
    assert all(ended.values()) and env.state()[0] == 3
    wanted = values_of_two(game, graphon.matrix(W, graphon.cells(2)), pi)
    assert bool((abs(earned.mean(0) - wanted) < 4.5 * earned.std(0) / 1000**0.5).all())
    for agents in (1, 65):
        with pytest.raises(ConfigError, match="2 to 64"):
            PopulationParallelEnv(game, W, agents)


def test_nobody_meets_itself_and_a_seed_is_a_course() -> None:
    env = PopulationParallelEnv(epidemic(4, 5), SBM, 7)
    courses = []
    for _ in range(2):
        env.reset(seed=3)
        states = [env.state().tolist()]
        z = env.aggregate()
        for i in range(7):
            wanted = by_hand(env.states, i)
            assert float(z[i, 1]) == pytest.approx(wanted)
        while env.agents:
            env.step(dict.fromkeys(env.agents, 0))
            states.append(env.state().tolist())
        courses.append(states)
    assert courses[0] == courses[1] and len(courses[0]) == 6


def by_hand(states: torch.Tensor, i: int) -> float:
    """The infected neighbourhood of agent i: all others, over N - 1."""
    N = len(states)
    x = (np.arange(N) + 0.5) / N
    block = lambda v: int(v >= 0.7)  # noqa: E731
    table = [[0.9, 0.3], [0.3, 0.1]]
    return sum(table[block(x[i])][block(x[j])] * float(states[j] == 1) for j in range(N) if j != i) / (N - 1)


# Logs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("population", ["finite", "continuum"])
def test_logs_follow_the_law_of_the_game(population: str) -> None:
    one = logs.simulate(epidemic(10, 5), SBM, 12, 60, population=population, seed=4)
    torch.testing.assert_close(one.next_state[:, :-1], one.state[:, 1:])
    recovered = (one.next_state == 0)[one.state == 1].double()
    assert abs(float(recovered.mean()) - 0.2) < 4.5 * 0.4 / len(recovered) ** 0.5
    r = -2.0 * (one.state == 1) - 0.5 * (one.action == 1)
    torch.testing.assert_close(one.reward, r.double())
    assert not bool(((one.state == 0) & (one.action == 1) & (one.next_state == 1)).any())
    if population == "finite":
        at = ((one.state == 0) & (one.action == 0)).nonzero().tolist()
        p = np.array([0.8 * by_hand(one.state[e, h], i) for e, h, i in at])
        y = np.array([int(one.next_state[tuple(index)]) for index in at])
        for weight in (np.ones_like(p), p):
            assert abs((weight * (y - p)).sum()) < 4.5 * np.sqrt((weight**2 * p * (1 - p)).sum())


def revealing(H: int) -> FiniteMFG:
    """The epidemic, whose agents are told z(1): it is their reward."""
    game = epidemic(10, H)

    def model(h: int, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return game.model(h, z)[0], z[..., 1, None, None].expand(*z.shape[:-1], 2, 2)

    return FiniteMFG(**{**vars(game), "model": model})


def test_what_agents_of_logs_meet() -> None:
    """Finite: all others, over N - 1, to the last digit.  Continuum: the flow itself, which the agents follow up to its noise."""
    one = logs.simulate(revealing(3), SBM, 12, 4, seed=2)
    for e, h, i in ((0, 0, 0), (1, 1, 5), (3, 2, 11), (2, 2, 8)):
        assert float(one.reward[e, h, i]) == pytest.approx(by_hand(one.state[e, h], i))
    N = 4000
    many = logs.simulate(revealing(5), graphon.constant(1.0), N, 3, population="continuum", seed=2)
    shares = (many.state == 1).double().mean(-1)
    assert float((many.reward - shares.unsqueeze(-1)).abs().max()) < 5 * 0.5 / N**0.5
    assert float((shares[:, -1] - shares[:, 0]).abs().max()) > 0.1


def test_a_policy_is_mixed_in_half_and_half() -> None:
    """Protection always, and with a probability uniform on [0, 1] otherwise: 3/4, to 4.5 deviations of the 300 draws of it."""
    game, policy = epidemic(10, 5), torch.zeros(10, 5, 2, 2, dtype=torch.float64)
    policy[..., 1] = 1.0
    one = logs.simulate(game, SBM, 30, 60, policy=policy, seed=1)
    assert abs(float(one.action.double().mean()) - 0.75) < 4.5 * 0.5 * 12**-0.5 / 300**0.5


def test_episodes_do_not_depend_on_who_simulates_them(ray_session: None) -> None:
    game = epidemic()
    args = {"seed": 5, "policy": some_policy(game)}
    one = logs.simulate(game, SBM, 8, 5, **args)  # type: ignore[arg-type]
    for other in (
        logs.simulate(game, SBM, 8, 5, workers=2, **args),  # type: ignore[arg-type]
        logs.simulate(game, SBM, 8, 2, **args).joined(logs.simulate(game, SBM, 8, 3, first=2, **args)),  # type: ignore[arg-type]
    ):
        for name in ("state", "action", "reward", "next_state"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert not torch.equal(one.state, logs.simulate(game, SBM, 8, 5, seed=6).state)


def test_logs_as_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    one = logs.simulate(epidemic(), SBM, 6, 3)
    file = logs.save_logs(one, tmp_path / "logs.parquet")
    read = logs.load_logs(file)
    for name in ("state", "action", "reward", "next_state", "labels"):
        torch.testing.assert_close(getattr(read, name), getattr(one, name))
    table = pq.read_table(file).to_pandas()
    assert logs.load_logs(_written(table.sample(frac=1.0, random_state=0), tmp_path)).state.equal(one.state)
    assert logs.load_logs(_written(table.drop(columns="label"), tmp_path)).labels is None
    wrong = {
        "lacks the columns reward": table.drop(columns="reward"),
        "unequal agent sets: episode 2": table[(table.episode != 2) | (table.agent != 5)],
        "labels lie in": table.assign(label=table.label + 0.5),
        "label of an agent changes": table.assign(label=table.label.where(table.h != 3, 0.0)),
        "NaN": table.assign(reward=np.nan),
        "whole numbers": table.assign(state=table.state + 0.5),
        "has 1 agent": table[table.agent == 0],
    }
    for says, data in wrong.items():
        with pytest.raises(DataError, match=says):
            logs.load_logs(_written(data, tmp_path))
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match="no Parquet file"):
        logs.load_logs(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="does not exist"):
        logs.load_logs(tmp_path / "y.parquet")
    with pytest.raises(ConfigError, match="at least 2"):
        logs.simulate(epidemic(), SBM, 1, 3)
    assert pa.__version__


def _written(table: Any, folder: Path) -> Path:
    table.to_parquet(folder / "other.parquet", index=False)
    return folder / "other.parquet"


# Graphons and games by name and from files -----------------------------------------------------------------------


def test_graphons_by_name(tmp_path: Path) -> None:
    x = graphon.cells(10)
    torch.testing.assert_close(
        graphon.matrix(graphon.named("exp:2"), x), graphon.matrix(graphon.exponential(2.0), x)
    )
    assert float(graphon.matrix(graphon.named("er:0.3"), x).max()) == 0.3
    torch.testing.assert_close(
        graphon.matrix(graphon.named("threshold:1"), x), (x[:, None] + x[None] >= 1).double()
    )
    np.save(tmp_path / "w.npy", graphon.matrix(SBM, x).numpy())
    torch.testing.assert_close(
        graphon.matrix(graphon.named(str(tmp_path / "w.npy")), graphon.cells(20)),
        graphon.matrix(SBM, graphon.cells(20)),
    )
    U, V, error = graphon.factor(graphon.matrix(SBM, x), 2)
    assert error < 1e-12
    torch.testing.assert_close(U @ V.mT, graphon.matrix(SBM, x))
    assert graphon.factor(graphon.matrix(graphon.uniform_attachment, x), 2)[2] > 1e-3
    for values, says in (([[0.5, 2.0], [2.0, 0.5]], "values in"), ([[0.5, 0.1], [0.2, 0.5]], "symmetric")):
        (tmp_path / "w.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=says):
            graphon.named(str(tmp_path / "w.json"))
    with pytest.raises(ConfigError, match="Did you mean 'sbm'"):
        graphon.named("sbn")


def test_random_networks_have_the_degrees_of_the_graphon() -> None:
    n, density = 2000, 0.5
    x = graphon.cells(n)
    A = graphon.network(SBM, x, density, seed=1)
    assert torch.equal(A, A.mT)
    assert float(torch.diagonal(A).sum()) == 0
    wanted = graphon.matrix(SBM, x).mean(1)
    assert float((A.sum(1) / (n * density) - wanted).abs().max()) < 5 * (1 / (n * density)) ** 0.5
    graphon.matrix(graphon.step_function(A), graphon.cells(50))


def test_a_game_from_a_file_is_the_game(tmp_path: Path) -> None:
    W = graphon.matrix(SBM, graphon.cells(4))
    P, P_z = np.zeros((2, 2, 2)), np.zeros((2, 2, 2, 2))
    P[0, :, 0], P[1] = 1.0, [0.2, 0.8]
    P_z[0, 0, :, 1] = [-0.8, 0.8]
    data: dict[str, Any] = {
        "P": P,
        "P_z": P_z,
        "r": [[0.0, -0.5], [-2.0, -2.5]],
        "mu0": [0.5, 0.5],
        "horizon": 6,
    }
    np.savez(tmp_path / "sis.npz", **data)
    game, wanted = graphon.load_game(tmp_path / "sis.npz", W), graphon.sis(W, 6)
    pi = some_policy(wanted)
    torch.testing.assert_close(graphon.exploitability(game, pi, 0.5), graphon.exploitability(wanted, pi, 0.5))
    P[1, 1] = [0.2, 0.9]
    np.savez(tmp_path / "bad.npz", **data)
    with pytest.raises(ConfigError, match=r"label 0.125, h=0, s=1, a=1 is no law: it sums to 1.1"):
        graphon.load_game(tmp_path / "bad.npz", W)
    np.savez(tmp_path / "less.npz", P=P)
    with pytest.raises(DataError, match="lacks r"):
        graphon.load_game(tmp_path / "less.npz", W)


def test_a_graphon_that_changes_with_time() -> None:
    """Where all steps have the same graphon it is the game without time; else the flow feels each step's own."""
    game = epidemic(6, 4)
    same = FiniteMFG(**{**vars(game), "W": game.W.expand(4, 6, 6), "timed": True})
    pi = some_policy(game)
    torch.testing.assert_close(graphon.flow(same, pi), graphon.flow(game, pi))
    assert graphon.uniform_policy(same).shape == pi.shape
    W = torch.stack([game.W, 0 * game.W, game.W, game.W])
    mu = graphon.flow(FiniteMFG(**{**vars(same), "W": W}), pi)
    torch.testing.assert_close(mu[:, 1], graphon.flow(game, pi)[:, 1])
    torch.testing.assert_close(mu[:, 2, 1], 0.8 * mu[:, 1, 1])
