"""GMFG-PPO: its steps in closed form, its networks against the tables, the whole through RLlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from mobula.algorithms.common.meanfield import solvers
from mobula.algorithms.meanfield import gmfg_ppo, gmfg_ppo_experiment
from mobula.algorithms.meanfield import gmfg_ppo_networks as networks
from mobula.algorithms.meanfield.gmfg_ppo import GMFGPPO, GMFGPPOConfig
from mobula.artifact import export_policy, load_policy
from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.continuous import LinearCrowd, bins, save_continuous_logs, simulate_linear
from mobula.envs.meanfield.logs import save_logs, simulate
from mobula.envs.meanfield.particles import ParticlePopulation
from mobula.errors import ConfigError, DataError
from mobula.experiment import Task
from mobula.serving.backend import LocalBackend
from mobula.serving.gateway import create_app

NAN = float("nan")


def test_step_sizes() -> None:
    assert gmfg_ppo.step_sizes(3, 1000, 5.0, 5.0, 0.1) == pytest.approx((0.5, 0.05, 1e-4))
    assert gmfg_ppo.step_sizes(8, 1000, 1.0, 1.0, 0.1, "decay") == pytest.approx((0.5, 0.25, 0.0125))
    assert gmfg_ppo.step_sizes(1, 10, 5.0, 5.0, 3.0, "decay")[1:] == (1.0, 1.0)


def test_the_floor_is_taken_off() -> None:
    p = torch.tensor([[0.7, 0.3], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gmfg_ppo.without_floor(0.9 * p + 0.1 / 2, 0.1), p)


def test_the_average_policy_realises_the_average_flow() -> None:
    """Where transitions do not depend on z, so that the flow is linear in the occupation."""
    game = graphon.beach_bar(graphon.matrix(graphon.ranked_attachment, graphon.cells(3)), 5)
    average, flows, g = gmfg_ppo.Average(), [], torch.Generator().manual_seed(0)
    for _ in range(4):
        pi = torch.rand(3, 5, 10, 3, dtype=torch.float64, generator=g) ** 3
        pi = pi / pi.sum(-1, keepdim=True)
        flows.append(graphon.flow(game, pi))
        average.add(pi, flows[-1])
    torch.testing.assert_close(graphon.flow(game, average.policy), torch.stack(flows).mean(0))


@pytest.mark.parametrize("surrogate", ["closed", "kl"])
def test_the_policy_losses_are_stationary_at_the_proximal_step(surrogate: str) -> None:
    """Rows hold every action as often as the old policy would, so the mean over rows is the expectation."""
    old = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    action = torch.tensor([0, 1, 2, 2])
    Q = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    eta, lam = 0.8, 0.4

    def gradient(p: torch.Tensor) -> torch.Tensor:
        logits = p.log().requires_grad_()
        log_p = logits.log_softmax(-1).expand(4, 3)
        loss = networks.policy_loss(
            log_p, old.log().expand(4, 3), Q.expand(4, 3), action, surrogate=surrogate, eta=eta, lam=lam
        )
        (found,) = torch.autograd.grad(loss, logits)
        return found

    best = solvers.proximal(Q, old, eta, lam)
    torch.testing.assert_close(gradient(best), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(gradient(old).abs().max()) > 1e-2


def test_clipping_stops_the_ratio() -> None:
    old = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    Q, action = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])

    def loss(p: float) -> float:
        log_p = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
        return float(
            networks.policy_loss(log_p, old, Q, action, surrogate="clip", eta=1.0, lam=1e-12, clip=0.2)
        )

    assert loss(0.55) == pytest.approx(-1.1 * 0.5)
    assert loss(0.9) == pytest.approx(loss(0.7)) == pytest.approx(-1.2 * 0.5)


def test_thinning_mixes_flows() -> None:
    """Three tenths of the way from one flow to a very different one, to five deviations of the thinned cells."""
    game = graphon.sis(graphon.matrix(graphon.named("sbm"), graphon.cells(5)), 6)
    meet, protect = (torch.zeros(5, 6, 2, 2, dtype=torch.float64) for _ in range(2))
    meet[..., 0], protect[..., 1] = 1.0, 1.0
    population = networks.Population(0, 50_000)
    population.begin(game, meet)
    population.replace(game, protect, 0.3, 1)
    wanted = 0.7 * graphon.flow(game, meet) + 0.3 * graphon.flow(game, protect)
    assert float((population.flow(game) - wanted).abs().max()) < 5 * 0.5 / 10_000**0.5


def test_transitions_meet_the_frozen_flow() -> None:
    game = graphon.sis(graphon.matrix(graphon.named("er:0.8"), graphon.cells(4)), 5)
    population = networks.Population(0, 40_000)
    # The crowd always meets; who is sampled does so half of the time.
    pi, meet = graphon.uniform_policy(game), torch.zeros(4, 5, 2, 2, dtype=torch.float64)
    meet[..., 0] = 1.0
    population.begin(game, meet)
    rows = population.transitions(game, pi, 50_000, 3)
    z = graphon.aggregate(game, population.flow(game)[:, 2])[0, 1]
    at = (rows["h"] == 2) & (rows["state"] == 0) & (rows["action"] == 0)
    share = rows["next_state"][at].double().mean()
    assert abs(float(share - 0.8 * z)) < 4.5 * 0.5 / float(at.sum()) ** 0.5
    assert bool((rows["last"] == (rows["h"] == 4)).all())


# Through RLlib --------------------------------------------------------------------------------------------------


def config(**knobs: Any) -> Any:
    small = {
        "M": 10,
        "horizon": 6,
        "T": 20,
        "N": 12,
        "L": 6,
        "graphon_class": "exp",
        "restarts": 1,
        "inducing": 10,
        "bandwidth": False,
        "iters_per_step": 10,
        **knobs,
    }
    return GMFGPPOConfig().training(**small).debugging(seed=0, log_level="ERROR")


def run(algorithm: Any) -> dict[str, Any]:
    while True:
        result: dict[str, Any] = algorithm.train()
        if result["progress"] >= 1:
            return result


def test_the_whole_way(ray_session: None, tmp_path: Path) -> None:
    algorithm = config().build_algo()
    first = algorithm.train()
    assert first["progress"] == 0.5
    restored = GMFGPPO.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    result, again = run(algorithm), run(restored)
    for name in (
        "exploitability",
        "exploitability_average",
        "exploitability_mean",
        "exploitability_in_model",
    ):
        assert result[name] == again[name]
    assert result["exploitability_in_model"] < 1e-2
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    pi, game = algorithm.state.policy, algorithm.game
    mu = graphon.flow(game, pi)
    answer = policy.answer([0.31, NAN, 4, 1])
    np.testing.assert_allclose(answer["probs"], pi[3, 4, 1])
    np.testing.assert_allclose(answer["aggregate"], graphon.aggregate(game, mu[:, 4])[3])
    np.testing.assert_allclose(answer["forecast"], mu[3])
    assert answer["action"] in (0, 1)
    degree = game.W.mean(-1)
    by_degree = policy.answer([[NAN, float(degree[7]) + 1e-4, 2, 0], [0.75, NAN, 2, 0]])
    np.testing.assert_allclose(by_degree["probs"][0], by_degree["probs"][1])
    # It plays the mixed policy, not its most likely action.
    policy.seed(0)
    actions = policy.act(np.tile([0.31, NAN, 4, 0], (4000, 1)))
    assert abs(actions.mean() - float(pi[3, 4, 0, 1])) < 4.5 * 0.5 / 4000**0.5
    for bad, says in (
        ([NAN, NAN, 0, 0], "give a label or a degree"),
        ([1.5, NAN, 0, 0], r"lie in \[0, 1\]"),
        ([0.5, NAN, 6, 0], "h is a whole number from 0 to 5"),
        ([0.5, NAN, 0, 0.5], "state is a whole number"),
        ([0.5, NAN, NAN, 0], "h is a whole number"),
        ([0.5, 0.5, 0], "shape"),
    ):
        with pytest.raises(DataError, match=says):
            policy.act(bad)
    # Served: the example is a question that it answers, and null stands for the label that is not known.
    client = TestClient(create_app(LocalBackend({"crowd": str(tmp_path / "policy")}), None))
    (card,) = client.get("/v1/models").json()["data"]
    for obs in (card["example"]["request"]["obs"], [None, float(degree[7]) + 1e-4, 2, 0]):
        served = client.post("/v1/policies/crowd/act", json={"obs": obs}).json()
        np.testing.assert_allclose(served["probs"], policy.answer(obs)["probs"])
    refused = client.post("/v1/policies/crowd/act", json={"obs": [0.5, None, 0, 0.5]})
    assert refused.status_code == 422 and "state is a whole number" in refused.json()["error"]["message"]
    for each in (algorithm, restored):
        each.stop()


@pytest.mark.parametrize("game", ["sis", "investment", "beach_bar"])
def test_a_known_graphon_is_solved(ray_session: None, game: str) -> None:
    """To 1e-2 in 60 steps; without the floor, and on average, it comes down too."""
    algorithm = config(game=game, source="known", horizon=None, T=60, iters_per_step=60).build_algo()
    start = float(graphon.exploitability(algorithm.truth, algorithm.state.policy, algorithm.lam).mean())
    result = run(algorithm)
    assert result["exploitability"] < 1e-2
    assert result["exploitability_without_floor"] < 1e-2
    assert result["exploitability_average"] < 0.25 * start
    assert result["exploitability_max"] >= result["exploitability"]
    algorithm.stop()


@pytest.mark.parametrize(
    "knobs",
    [
        {"positions": "hidden", "graphon_class": "sbm(2)", "L": 40},
        {"population": "continuum"},
        {"kernel": "embedding"},
        {"share_time": False, "L": 40},
        {"rounds": 2},
        {"graphon_class": "list", "candidates": ["er:0.5", "sbm"]},
        {"graphon_class": "auto", "bandwidth": True},
        {"schedule": "decay"},
    ],
    ids=lambda knobs: next(iter(knobs)),
)
def test_every_option_improves_on_the_uniform_policy(ray_session: None, knobs: dict[str, Any]) -> None:
    algorithm = config(**knobs).build_algo()
    start = float(graphon.exploitability(algorithm.truth, algorithm.state.policy, algorithm.lam).mean())
    result = run(algorithm)
    assert result["exploitability"] < 0.8 * start
    if "positions" in knobs:
        # Agents follow the policy of the place where they were put, in the true game.
        assert algorithm.cell.tolist() != list(range(10))
        mine = algorithm.state.policy[algorithm.cell]
        gain = graphon.exploitability(algorithm.truth, mine, algorithm.lam)
        assert result["exploitability"] == pytest.approx(float(gain.mean()))
        assert float((mine - algorithm.state.policy).abs().max()) > 1e-3
    algorithm.stop()


def test_actors_move_particles_as_one_process_does(ray_session: None) -> None:
    """Two blocks of particles, held by nobody else or by two actors, over two iterations: the same paths."""
    game = graphon.sis(graphon.matrix(graphon.named("sbm"), graphon.cells(4)), 3)
    first, second = graphon.uniform_policy(game), torch.zeros(4, 3, 2, 2, dtype=torch.float64)
    second[..., 0] = 1.0
    found = []
    for actors in (0, 2):
        population = networks.Population(5, 70_000, actors=actors)
        population.begin(game, first)
        population.replace(game, second, 0.3, 1)
        found.append(population.paths)
        population.close()
    assert torch.equal(*found)
    # Who begins anew is who would begin in a new population.
    kept = ParticlePopulation(game, first, 500, seed=1)
    kept.run()
    kept.restart(game, second, 2)
    assert torch.equal(kept.run(), ParticlePopulation(game, second, 500, seed=2).run())


def test_the_mean_over_iterations_weighs_reports_by_their_iterations(ray_session: None) -> None:
    """Reports after 8, 16 and 20 of 20 iterations; asked again at the end, nothing is added."""
    algorithm = config(source="known", iters_per_step=8).build_algo()
    results = [algorithm.train() for _ in range(4)]
    a, b, c, _ = (r["exploitability"] for r in results)
    for result in results[2:]:
        assert result["exploitability_mean"] == pytest.approx((8 * a + 8 * b + 4 * c) / 20)
    algorithm.stop()


def test_rounds_are_spread_over_the_iterations(ray_session: None) -> None:
    """Three of four iterations: at the first, the second and the third, each adding its episodes."""
    algorithm = config(rounds=3, T=4, iters_per_step=1, horizon=2, L=3).build_algo()
    episodes = []
    for _ in range(4):
        algorithm.train()
        episodes.append(algorithm.logs.episodes)
    assert episodes == [3, 6, 9, 9]
    algorithm.stop()


def test_workers_change_nothing(ray_session: None) -> None:
    policies = []
    for workers in (0, 2):
        algorithm = config(workers=workers, restarts=2).build_algo()
        algorithm.train()
        policies.append(algorithm.state.policy)
        algorithm.stop()
    assert torch.equal(*policies)


@pytest.mark.parametrize("surrogate", ["closed", "kl", "clip"])
def test_networks_come_near_the_tables(ray_session: None, surrogate: str) -> None:
    """The exact method ends below 1e-4 here, the uniform policy has 0.4.

    Particles (500 a cell) and networks leave a tenth of that: 0.04 is asked of the closed and the KL surrogate, and half of the
    start of PPO's clipping, which is another method.
    """
    algorithm = config(
        policy="network",
        source="known",
        surrogate=surrogate,
        T=60,
        iters_per_step=60,
        M=5,
        particles=2500,
        transitions=3000,
        minibatch=500,
        hidden=[32],
        lr=1e-2,
    ).build_algo()
    start = float(graphon.exploitability(algorithm.truth, algorithm.state.policy, algorithm.lam).mean())
    result = run(algorithm)
    assert result["exploitability"] < (0.5 * start if surrogate == "clip" else 0.04)
    algorithm.stop()


def test_networks_are_saved_and_served(ray_session: None, tmp_path: Path) -> None:
    small = {"M": 4, "particles": 400, "transitions": 300, "minibatch": 100, "hidden": [8], "T": 4}
    algorithm = config(policy="network", source="known", iters_per_step=2, **small).build_algo()
    algorithm.train()
    restored = GMFGPPO.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    assert torch.equal(restored.rl_module.table(), algorithm.rl_module.table())
    assert torch.equal(restored.population.paths, algorithm.population.paths)
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    answer = policy.answer([0.4, NAN, 1, 1])
    want = algorithm.rl_module._probabilities(
        torch.tensor(1), torch.tensor(0.4).double(), torch.tensor(1), torch.tensor(1)
    )
    np.testing.assert_allclose(answer["probs"], want.detach(), atol=1e-6)
    assert answer["forecast"].shape == (7, 2)
    assert policy.example()["answer"]["action"] in (0, 1)
    assert run(restored)["progress"] == 1.0
    for each in (algorithm, restored):
        each.stop()


def test_logs_from_a_file(ray_session: None, tmp_path: Path) -> None:
    """The same logs from a file give the same policy as when they are simulated."""
    simulated = config(L=8).build_algo()
    simulated.train()
    logs = simulate(simulated.truth, graphon.named("sbm"), 12, 8, seed=0)
    file = save_logs(logs, tmp_path / "logs.parquet")
    read = config(logs=str(file)).build_algo()
    result = read.train()
    torch.testing.assert_close(read.state.policy, simulated.state.policy)
    assert result["exploitability"] == pytest.approx(result["exploitability_in_model"])
    other = config(logs=str(file), game="beach_bar", lam=0.3).build_algo()
    other.train()
    bar = simulate(other.truth, graphon.named("sbm"), 4, 2)
    refused = config(logs=str(save_logs(bar, tmp_path / "bar.parquet"))).build_algo()
    with pytest.raises(DataError, match="the game sis has 2 and 2"):
        refused.training_step()
    for each in (simulated, read, other, refused):
        each.stop()


def test_continuous_logs(ray_session: None, tmp_path: Path) -> None:
    """The crowd wants to be where others are, and moving costs: learned from a file, solved on bins, better than the uniform policy
    in the TRUE crowd cut into the same bins.
    """
    crowd = LinearCrowd(a=0.5, b=0.5, c=0.5, noise=0.3, track=0.2, effort=0.4)
    logs = simulate_linear(crowd, graphon.named("sbm"), 10, 20, 3)
    file = str(save_continuous_logs(logs, tmp_path / "crowd.parquet"))
    knobs = {"game": "logs", "logs": file, "kernel": "embedding", "bins": 15, "gamma": 1e-6, "inducing": 40}
    knobs |= {"horizon": None, "graphon_class": "sbm(2)", "T": 40, "iters_per_step": 20, "lam": 0.3}
    algorithm = config(**knobs).build_algo()
    algorithm.train()
    restored = GMFGPPO.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    result, again = run(algorithm), run(restored)
    assert result["exploitability"] == again["exploitability"] < 0.02
    cut, W = bins(logs, 15), graphon.matrix(graphon.named("sbm"), graphon.cells(10))
    x, u = cut.centres, cut.actions.flatten()

    def model(h: int, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        met = (z @ x).unsqueeze(-1)
        mean = (0.5 * x + 0.5 * met + 0.5 * u).unsqueeze(-1)
        below = torch.special.ndtr((cut.edges[1:-1] - mean) / 0.3)
        P = torch.cat([0 * below[..., :1], below, 0 * below[..., :1] + 1], -1).diff(dim=-1)
        return P, -0.2 * (x - met).square() - 0.4 * u.square()

    truth = graphon.FiniteMFG("crowd", 15, 3, 3, cut.law.expand(10, -1), W, model)
    uniform = float(graphon.exploitability(truth, graphon.uniform_policy(truth), 0.3).mean())
    found = float(graphon.exploitability(truth, algorithm.state.policy, 0.3).mean())
    assert found < 0.3 * uniform
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    answer = policy.answer([0.31, NAN, 1, 7])
    np.testing.assert_allclose(answer["probs"], algorithm.state.policy[3, 1, 7])
    for wrong, says in (
        ({"kernel": "product"}, "needs logs=FILE, kernel=embedding and source=learned"),
        ({"source": "known"}, "needs logs=FILE, kernel=embedding and source=learned"),
        ({"logs": None}, "needs logs=FILE"),
    ):
        with pytest.raises(ConfigError, match=says):
            config(**{**knobs, **wrong}).validate()
    with pytest.raises(DataError, match="does not exist"):
        config(**{**knobs, "logs": str(tmp_path / "none.parquet")})
    for each in (algorithm, restored):
        each.stop()


def test_what_is_refused(ray_session: None, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array([[0.5, 1.2], [1.2, 0.5]]))
    np.save(tmp_path / "v.npy", np.array([[0.5, 0.2], [0.1, 0.5]]))
    for knobs, says in (
        ({"lam": 0.0}, "needs a temperature above 0: use a small positive value"),
        ({"lam": -1.0}, "temperature above 0"),
        ({"game": "sir"}, "it is one of sis, investment, beach_bar"),
        ({"graphon": str(tmp_path / "w.npy")}, r"values in \[0, 1\]"),
        ({"graphon": str(tmp_path / "v.npy")}, "symmetric"),
        ({"graphon": "exp:x"}, "takes 1 number"),
        ({"N": 1}, "at least 2"),
        ({"graphon_class": "sbm"}, "it is auto, const, exp, list or sbm"),
        ({"graphon_class": "list"}, "name some graphons in candidates"),
        ({"gamma": 0.0}, "out of range"),
    ):
        with pytest.raises(ConfigError, match=says):
            config(**knobs).validate()


def test_the_experiment_in_small(ray_session: None) -> None:
    """The smoke instance: a list of five graphons, and the learned one is less exploitable than the constant."""
    plan = gmfg_ppo_experiment.experiment().at("smoke")
    task: Task = plan.tasks["sbm"]
    numbers = {
        name: plan.arm(name).run(plan.arm(name).config, task, [0])[0]  # type: ignore[misc]
        for name in ("learned", "constant", "known", "uniform")
    }
    values = {name: found["exploitability"] for name, found in numbers.items()}
    assert values["known"] < 1e-3
    assert values["known"] < values["learned"] < values["constant"] < values["uniform"]
