"""The congestion game as an environment: conformance, its equilibrium, its rewards."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from mobula.envs.markets.congestion import CongestionGame
from mobula.envs.markets.design import evaluate
from mobula.envs.markets.pettingzoo import CongestionParallelEnv
from mobula.errors import ConfigError, DataError
from mobula.sampling.conformance import check_env


@pytest.mark.parametrize(
    "settings", [{}, {"network": "hearn9"}, {"network": "hearn9", "objective": "revenue"}]
)
def test_conformance(settings: dict[str, str]) -> None:
    check_env(functools.partial(CongestionGame, **settings), steps=40, num_envs=3)


def test_users_end_at_the_equilibrium_of_a_design_that_stays() -> None:
    env = CongestionGame(2, network="braess5", spread=0.0, days=300)
    env.reset(seed=0)
    y = np.array([[0.9309, 0.0162, 0.0162, 0.0, 0.9309], [0.5, 0.1, 0.0, 1.0, 0.2]])
    for _ in range(3):
        obs, reward, *_ = env.step(torch.as_tensor(y))
    for i in range(2):
        wanted = evaluate(env.problem, y[i])
        np.testing.assert_allclose(
            obs[i].numpy(), wanted.x / (env.problem.network.capacity + y[i]), atol=2e-3
        )
        gain = (env.bounds.objective - wanted.objective) / env.bounds.objective
        assert float(reward[i]) == pytest.approx(gain, abs=1e-3)


def test_nothing_set_nothing_gained() -> None:
    env = CongestionGame(1, spread=0.0)
    env.reset(seed=0)
    _, reward, *_ = env.step(torch.zeros(1, 5))
    assert abs(float(reward)) < 1e-3
    best = torch.tensor([[0.9309, 0.0162, 0.0162, 0.0, 0.9309]])
    for _ in range(40):
        _, reward, *_ = env.step(best)
    assert float(reward) == pytest.approx((33.182950 - 28.919781) / 33.182950, abs=1e-3)


def test_demands_are_drawn_on_both_sides() -> None:
    env = CongestionGame(500, spread=0.2)
    env.reset(seed=0)
    factor = env.state["factor"]
    # 500 draws from U[0.8, 1.2]: none within 0.02 of an end has probability 0.95 ** 500.
    assert 0.8 <= float(factor.min()) < 0.82 and 1.18 < float(factor.max()) <= 1.2


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="days >= 1"):
        CongestionGame(days=0)


# PettingZoo ---------------------------------------------------------------------------------------------------


def players(order: str = "leader", **knobs: Any) -> CongestionParallelEnv:
    return CongestionParallelEnv(CongestionGame(1, **{"network": "hearn9", "days": 3, **knobs}), order)


@pytest.mark.parametrize("order", ["leader", "simultaneous"])
@pytest.mark.parametrize("network", ["braess5", "hearn9"])
def test_the_pettingzoo_view_conforms(network: str, order: str) -> None:
    from pettingzoo.test import parallel_api_test

    env = players(order, network=network, days=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        parallel_api_test(env, num_cycles=100)
    obs, _ = env.reset(seed=0)
    for _ in range(7):
        for agent, space in env.observation_spaces.items():
            assert space.contains(obs[agent]), agent
        obs, *_ = env.step({agent: space.sample() for agent, space in env.action_spaces.items()})


def designs(env: CongestionGame, count: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(5)
    return [rng.uniform(0, env.upper, env.problem.size).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("travellers", ["left out", "explicit"])
def test_both_faces_give_the_same_trajectories(travellers: str) -> None:
    """Two episodes from one seed: the planner's environment, and the game of all parties in the leader's order.

    Travellers who are left out follow the dynamic inside: equal to the last bit.  Travellers who compute the same step from what they
    see, p exp(-r c) with their own shares and costs, differ by rounding.
    """
    face = CongestionGame(1, network="hearn9", days=3, spread=0.2, max_episode_steps=4)
    env = players(spread=0.2, max_episode_steps=4)
    rate = float(env.env.rate)
    wanted, _ = face.reset(seed=11)
    obs, _ = env.reset(seed=11)
    factors = []
    for t, y in enumerate(designs(face, 8)):
        if not env.agents:
            # A second episode goes on in the same stream of draws.
            obs, _ = env.reset()
        factors.append(float(env.state()[1]))
        assert factors[-1] == float(face.state["factor"])
        np.testing.assert_allclose(
            obs["planner"], np.r_[0, wanted[0]], rtol=0 if travellers == "left out" else 1e-5
        )
        wanted, reward, _, truncated, info = face.step(torch.from_numpy(y)[None])
        obs, rewards, *_ = env.step({"planner": y})
        assert set(rewards.values()) == {0.0}
        for day in range(3):
            assert obs["planner"][0] == day + 1
            assert rewards["planner"] == 0
            actions = {"planner": -y}
            if travellers == "explicit":
                for agent in env.agents[1:]:
                    shares, costs = np.split(obs[agent][1:], 2)
                    actions[agent] = shares * np.exp(-rate * (costs - costs.min()))
            obs, rewards, _, over, _ = env.step(actions)
        np.testing.assert_array_equal(env.state()[2:5], y)
        if travellers == "left out":
            assert rewards["planner"] == float(reward)
            np.testing.assert_array_equal(obs["planner"][1:], info["final_obs"][0])
        else:
            assert rewards["planner"] == pytest.approx(float(reward), abs=1e-6)
            np.testing.assert_allclose(obs["planner"][1:], info["final_obs"][0], rtol=1e-5)
        assert over["planner"] == bool(truncated) == (t % 4 == 3)
    assert len(set(factors)) == 2


def test_the_order_of_moves() -> None:
    """Braess, one day a round: in the leader's order travellers react to today's design, in simultaneous order to yesterday's."""
    y = np.array([1.0, 0.0, 0.0, 0.5, 1.0])
    lead, both = (
        players("leader", network="braess5", days=1),
        players("simultaneous", network="braess5", days=1),
    )
    for env in (lead, both):
        env.reset(seed=3)
    start = lead.state()[2 + 5 :]
    lead.step({"planner": y})
    obs, *_ = lead.step({})
    game = lead.env
    users = game.users({"design": torch.from_numpy(y)[None], "factor": torch.tensor([lead.state()[1]])})
    logits = torch.from_numpy(start).log()[None]

    def stepped(design_add: torch.Tensor) -> np.ndarray[Any, Any]:
        # The dynamic by hand: shares times exp(-r c) at the old flows under the given capacities.
        x = users.paths.link_flows(users.demand[:, users.paths.od] * torch.from_numpy(start)[None])
        c = users.paths.path_costs(game.roads.times(x, design_add))
        weight = (logits - game.rate * c).exp()[0]
        return (weight / weight.sum()).numpy()

    np.testing.assert_allclose(lead.state()[7:], stepped(users.capacity_add), rtol=1e-9)
    both.step({"planner": y})
    np.testing.assert_allclose(both.state()[7:], stepped(torch.zeros(1, 5).double()), rtol=1e-9)
    assert float(np.abs(lead.state()[7:] - both.state()[7:]).max()) > 1e-3
    np.testing.assert_array_equal(both.state()[2:7], y)
    # A design that stays leads both to the same place.
    for _ in range(60):
        lead.step({"planner": y}), lead.step({}), both.step({"planner": y})
        if not both.agents:
            for env in (lead, both):
                env.reset(seed=3)
    np.testing.assert_allclose(lead.state()[1:], both.state()[1:], atol=1e-2)
    assert obs["travellers_1-4"].shape == (7,)


def test_travellers_are_told_their_own_costs_and_pay_them() -> None:
    """By hand from flows and link times: tolls included, other pairs' shares not shown; one pair that deviates moves all costs."""
    env = players("simultaneous", days=1)
    env.reset(seed=2)
    y = np.array([3.0, 1.0, 2.0])
    names = env.possible_agents[1:]
    rng = np.random.default_rng(0)
    mixes = {name: rng.dirichlet(np.ones(env.action_space(name).shape[0])) for name in names}
    obs, rewards, *_ = env.step({"planner": y, **{name: 3.0 * mix for name, mix in mixes.items()}})
    game, network = env.env, env.env.problem.network
    incidence = game.paths.delta.numpy()
    factor = env.state()[1]
    flows = np.zeros(network.num_links)
    columns = {name: np.flatnonzero(game.paths.od.numpy() == w) for w, name in enumerate(names)}
    for w, name in enumerate(names):
        flows += incidence[:, columns[name]] @ (factor * network.demand[w] * mixes[name])
    toll = np.zeros(network.num_links)
    toll[game.problem.links] = y
    u = network.free_flow_time * (1 + network.b * (flows / network.capacity) ** network.power) + toll
    for name in names:
        c = incidence[:, columns[name]].T @ u
        np.testing.assert_allclose(obs[name][1:], np.r_[mixes[name], c], rtol=1e-9)
        assert rewards[name] == pytest.approx(-float(mixes[name] @ c))
    np.testing.assert_allclose(obs["planner"][1:], flows / network.capacity, rtol=1e-6)
    F = float(flows @ (u - toll))
    assert rewards["planner"] == pytest.approx((game.bounds.objective - F) / game.bounds.objective, rel=1e-5)
    # Weights of 0 mean all paths alike; a path that nobody takes stays empty under the dynamic.
    K = env.action_space(names[0]).shape[0]
    obs, *_ = env.step({names[0]: np.zeros(K), names[1]: np.eye(env.action_space(names[1]).shape[0])[0]})
    np.testing.assert_allclose(obs[names[0]][1 : K + 1], 1 / K)
    obs, *_ = env.step({})
    assert obs[names[1]][1] == 1.0
    assert np.isfinite(np.concatenate([*obs.values()])).all()


def test_what_the_pettingzoo_view_refuses() -> None:
    with pytest.raises(ConfigError, match="set num_envs=1"):
        CongestionParallelEnv(CongestionGame(2))
    with pytest.raises(ConfigError, match="one of leader, simultaneous"):
        players("last")
    env = players("simultaneous", network="braess5")
    env.reset(seed=0)
    for action, says in (
        ({"planner": [0.0]}, "planner: .* 5 finite numbers"),
        ({"travellers_1-4": [0.5, 0.6, -0.1]}, "travellers_1-4: .* a weight is negative"),
        ({"travellers_1-4": [0.5, np.nan, 0.5]}, "3 finite numbers"),
    ):
        before = env.state()
        with pytest.raises(DataError, match=says):
            env.step(action)
        np.testing.assert_array_equal(env.state(), before)
