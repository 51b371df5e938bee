"""Offline methods through RLlib: the whole way, seeds side by side, several learners, resume, served fields, bad input."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from mobula.algorithms.offline import ivr, tabular
from mobula.algorithms.offline.baselines.bc import BCConfig, best_episodes
from mobula.algorithms.offline.baselines.cql import CQLConfig
from mobula.algorithms.offline.baselines.iql import IQLConfig
from mobula.algorithms.offline.baselines.td3_bc import TD3BCConfig
from mobula.algorithms.offline.ivr import EQLConfig, SQLConfig
from mobula.artifact import export_policy, load_policy
from mobula.envs.datasets import recipes
from mobula.errors import ConfigError, DataError
from mobula.results import flat_metrics
from mobula.serving.backend import LocalBackend
from mobula.serving.gateway import create_app
from mobula.settings import make_config

SWING = "pendulum/scripted-mixed-0.5,size=2000"
ROOMS = "four_rooms/mixed-0.5,size=1500"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBULA_DATA", str(tmp_path_factory.getbasetemp() / "data"))


def make(config_class: Any, *, seed: int = 0, learners: int = 0, **knobs: Any) -> Any:
    settings = {"data": SWING, "steps": 40, "block": 20, "batch": 16, "hidden": [16, 16], "evaluate_every": 0}
    config = config_class().training(**{**settings, **knobs}).debugging(seed=seed, log_level="ERROR")
    if learners:
        config.learners(num_learners=learners)
    return config.build_algo()


def weights(algorithm: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in algorithm.rl_module.state_dict().items()}


@pytest.mark.parametrize("config_class", [SQLConfig, EQLConfig, IQLConfig, TD3BCConfig, CQLConfig, BCConfig])
def test_the_whole_way(ray_session: None, tmp_path: Path, config_class: Any) -> None:
    algorithm = make(config_class)
    first = flat_metrics(algorithm.train())
    restored = type(algorithm).from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    result, again = flat_metrics(algorithm.train()), flat_metrics(restored.train())
    assert result["progress"] == again["progress"] == 1.0
    # The position of the run, of the index streams and of the step sizes are all part of a checkpoint.
    for name, value in weights(algorithm).items():
        torch.testing.assert_close(value, weights(restored)[name])
    assert result["score"] == pytest.approx(again["score"])
    assert first["learners/default_policy/actor_loss"] != result["learners/default_policy/actor_loss"]
    evaluated = flat_metrics(algorithm.evaluate())
    assert -2000 < evaluated["env_runners/episode_return_mean"] < 0
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    obs = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, -1.0]], np.float32)
    module = algorithm.rl_module
    with torch.no_grad():
        wanted = 2 * module.best_action(module.features(torch.tensor(obs)).unsqueeze(0))[0]
    answer = policy.answer(obs)
    np.testing.assert_allclose(answer["action"], wanted.numpy(), rtol=1e-5)
    scores = config_class not in (TD3BCConfig, CQLConfig, BCConfig)
    assert ("value" in answer) == scores
    if scores:
        logged = policy.answer(obs, actions=np.array([[2.0], [-1.0]], np.float32))
        with torch.no_grad():
            features = module.features(torch.tensor(obs)).unsqueeze(0)
            gap = module.q_values(features, torch.tensor([[[1.0], [-0.5]]])).amin(1) - module.values(features)
        np.testing.assert_allclose(logged["advantage"], gap[0].numpy(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(logged["weight"], module.weight(gap)[0].numpy(), rtol=1e-4, atol=1e-6)
        for bad, says in (
            ([[2.0]], "one action an observation"),
            ([[9.0], [0.0]], "outside the action space"),
        ):
            with pytest.raises(DataError, match=says):
                policy.answer(obs, actions=bad)
    else:
        with pytest.raises(DataError, match="does not score actions"):
            policy.answer(obs, actions=[[0.0], [0.0]])
    for bad_obs, says in (([1.0, 2.0], "shape"), ([np.nan, 0.0, 0.0], "NaN")):
        with pytest.raises(DataError, match=says):
            policy.act(bad_obs)
    # Over HTTP, in this process: the example of the card, the same answers, and the field that is wrong by name.
    client = TestClient(create_app(LocalBackend({"swing": str(tmp_path / "policy")}), None))
    (card,) = client.get("/v1/models").json()["data"]
    request = {"obs": obs.tolist()} | ({"actions": [[2.0], [-1.0]]} if scores else {})
    assert client.post("/v1/policies/swing/act", json=card["example"]["request"]).status_code == 200
    served = client.post("/v1/policies/swing/act", json=request).json()
    np.testing.assert_allclose(served["action"], answer["action"], rtol=1e-6)
    for name in ("value", "advantage", "weight") if scores else ():
        np.testing.assert_allclose(served[name], logged[name], rtol=1e-6)
    refused = client.post("/v1/policies/swing/act", json={"obs": [1.0, 2.0]})
    assert refused.status_code == 422 and "obs" in refused.json()["error"]["message"]
    for each in (algorithm, restored):
        each.stop()


@pytest.mark.parametrize("config_class", [SQLConfig, EQLConfig, IQLConfig, CQLConfig, BCConfig])
def test_seeds_side_by_side_are_seeds_alone(ray_session: None, config_class: Any) -> None:
    knobs = {"precision": "float64", "steps": 50, "block": 50}
    both = make(config_class, seed=3, num_seeds_batched=2, **knobs)
    alone = make(config_class, seed=4, **knobs)
    for algorithm in (both, alone):
        algorithm.train()
    for name, value in weights(alone).items():
        found = weights(both)[name]
        if value.ndim == 3:
            found = found[value.shape[0] :]
        torch.testing.assert_close(found, value, atol=1e-4, rtol=0)
    np.testing.assert_allclose(both.play(3).shape, (2, 3))
    for algorithm in (both, alone):
        algorithm.stop()


@pytest.mark.parametrize("config_class", [SQLConfig, EQLConfig, CQLConfig])
def test_two_learners_are_one_with_twice_the_batch(
    ray_session: None, tmp_path: Path, config_class: Any
) -> None:
    one = make(config_class, precision="float64", batch=16)
    two = make(config_class, precision="float64", batch=8, learners=2)
    for algorithm in (one, two):
        algorithm.train()
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, atol=1e-9, rtol=0)
    # What `mobula train --num-learners 2` does at the end.
    assert len(two.play(2)[0]) == 2
    assert load_policy(export_policy(two, tmp_path / "policy")).act([1.0, 0.0, 0.0]).shape == (1,)
    for algorithm in (one, two):
        algorithm.stop()


def test_step_sizes_follow_the_cosine_of_the_whole_run(ray_session: None, tmp_path: Path) -> None:
    algorithm = make(SQLConfig, lr=1e-3)
    algorithm.train()
    learner = algorithm.learner_group._learner
    # The last step of the first block is number 19 of 40.
    assert learner.actor_adam.param_groups[0]["lr"] == pytest.approx(
        1e-3 * 0.5 * (1 + np.cos(np.pi * 19 / 40))
    )
    assert learner.value_adam.param_groups[0]["lr"] == 1e-3
    algorithm.stop()


def batch_of_rows(seed: int = 0) -> dict[str, torch.Tensor]:
    """Six rows [1, 6, ...], two of them terminal."""
    g = torch.Generator().manual_seed(seed)
    return {
        "obs": torch.randn(1, 6, 3, generator=g, dtype=torch.float64),
        "next_obs": torch.randn(1, 6, 3, generator=g, dtype=torch.float64),
        "action": torch.rand(1, 6, 1, generator=g, dtype=torch.float64) * 2 - 1,
        "reward": torch.randn(1, 6, generator=g, dtype=torch.float64),
        "terminated": torch.tensor([[1.0, 0, 0, 1, 0, 0]]).double(),
    }


def critics_at(net: Any, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """[2, B] from rows [B, ...]."""
    pair = torch.cat([obs, action], -1).unsqueeze(0)
    return torch.stack([net(pair, member=i)[0, :, 0] for i in range(2)])


def follow(module: Any, reference: Any, tau: float, *names: str) -> None:
    """The reference's targets take their share, and all of it must be what `module` has become."""
    for name in names:
        slow, fast = (getattr(reference, prefix + name).parameters() for prefix in ("target_", ""))
        for a, b in zip(slow, fast, strict=True):
            a.data = tau * b.data + (1 - tau) * a.data
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, atol=1e-10, rtol=0, msg=name)


def sql_loss(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    z = 1 + (q - v) / 0.6
    return (torch.where(z > 0, z**2, 0.0) + v / 0.3).mean()


def eql_loss(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    z = torch.minimum((q - v) / 0.3, torch.tensor(5.0).double())
    m = max(-1.0, float(z.detach().max()))
    return (torch.exp(z - m) + float(np.exp(-m)) * v / 0.3).mean()


def iql_loss(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.where(q < v, 0.2, 0.8) * (q - v) ** 2).mean()


STEPS: dict[str, tuple[Any, dict[str, Any], Any, Any]] = {
    "sql": (SQLConfig, {"alpha": 0.3}, sql_loss, lambda a: a.clamp(0, 100)),
    "sql, theory": (SQLConfig, {"alpha": 0.3, "weight": "theory"}, sql_loss, lambda a: (1 + a / 0.6).clamp(0, 100)),
    "eql": (EQLConfig, {"alpha": 0.3}, eql_loss, lambda a: (10 * a / 0.3).exp().clamp(0, 100)),
    "eql, theory": (EQLConfig, {"alpha": 0.3, "weight": "theory"}, eql_loss, lambda a: (a / 0.3).exp().clamp(0, 100)),
    "iql": (IQLConfig, {"expectile": 0.8, "beta": 2.0}, iql_loss, lambda a: (2 * a).exp().clamp(0, 100)),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_one_step_is_written_out(ray_session: None, name: str) -> None:
    """A step against the same written with autograd and torch's Adam: order, targets, terminals, polyak."""
    config_class, knobs, loss, weigh = STEPS[name]
    algorithm = make(config_class, precision="float64", reward_transform="none", tau=0.1, **knobs)
    learner, module = algorithm.learner_group._learner, algorithm.rl_module
    # Critics far apart, so that every branch of the losses is met and the smaller is not always the same.
    for p in module.target_critics.parameters():
        p.data += normal(p.numel(), *p.shape)
    reference, rows = copy.deepcopy(module), batch_of_rows()
    report = learner.step(rows)
    obs, following, action = (rows[k][0] for k in ("obs", "next_obs", "action"))
    lr = algorithm.config.lr
    both = critics_at(reference.target_critics, obs, action).detach()
    assert len(set(both.argmin(0).tolist())) == 2
    target = both.amin(0)
    adam = torch.optim.Adam(reference.value.parameters(), lr=lr)
    v = reference.value(obs[None])[0, :, 0]
    # Adam's first step shows the signs of a gradient alone; the losses that are reported show the rest.
    value_loss = loss(target, v)
    torch.testing.assert_close(report["value_loss"], value_loss.detach()[None])
    value_loss.backward()
    adam.step()
    z = (target - v.detach()) / 0.3
    if config_class is SQLConfig:
        assert report["ignored_by_value"].tolist() == [(z <= -2).double().tolist()]
        assert 0 < float(report["ignored_by_value"].mean()) < 1
    if config_class is EQLConfig:
        assert report["capped"].tolist() == [(z > 5).double().tolist()]
        assert 0 < float(report["capped"].mean()) < 1
    with torch.no_grad():
        v, ahead = (reference.value(x[None])[0, :, 0] for x in (obs, following))
        weight = weigh(target - v)
        y = rows["reward"][0] + 0.99 * (1 - rows["terminated"][0]) * ahead
    actor = torch.optim.Adam([*reference.actor.parameters(), reference.log_std], lr=lr)
    mean = reference.actor(obs[None])[0].tanh()
    log_p = torch.distributions.Normal(mean, reference.log_std[0].exp()).log_prob(action).sum(-1)
    actor_loss = -(weight * log_p).mean()
    actor_loss.backward()
    actor.step()
    critic = torch.optim.Adam(reference.critics.parameters(), lr=lr)
    critic_loss = ((critics_at(reference.critics, obs, action) - y) ** 2).mean(1).sum()
    critic_loss.backward()
    critic.step()
    torch.testing.assert_close(report["actor_loss"], actor_loss.detach()[None])
    torch.testing.assert_close(report["critic_loss"], critic_loss.detach()[None])
    follow(module, reference, 0.1, "critics")
    algorithm.stop()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("delay", [1, 2])
def test_a_step_of_td3_bc_is_written_out(ray_session: None, delay: int) -> None:
    algorithm = make(
        TD3BCConfig,
        precision="float64",
        tau=0.1,
        policy_delay=delay,
        policy_noise=0.9,
        normalize_observations=False,
    )
    learner, module = algorithm.learner_group._learner, algorithm.rl_module
    for net in (module.target_critics, module.target_actor):
        for p in net.parameters():
            p.data += normal(p.numel(), *p.shape)
    reference, rows, generator = copy.deepcopy(module), batch_of_rows(), torch.Generator()
    generator.set_state(learner.generator.get_state())
    report = learner.step(rows)
    obs, following, action = (rows[k][0] for k in ("obs", "next_obs", "action"))
    lr = algorithm.config.lr
    noise = 0.9 * torch.randn(1, 6, 1, generator=generator, dtype=torch.float64)[0]
    assert float(noise.abs().max()) > 0.5 > float(noise.abs().min())
    with torch.no_grad():
        ahead = (reference.target_actor(following[None])[0].tanh() + noise.clamp(-0.5, 0.5)).clamp(-1, 1)
        q = critics_at(reference.target_critics, following, ahead)
        assert float((q[0] - q[1]).abs().min()) > 0.1
        y = rows["reward"][0] + 0.99 * (1 - rows["terminated"][0]) * q.amin(0)
    critic = torch.optim.Adam(reference.critics.parameters(), lr=lr)
    critic_loss = ((critics_at(reference.critics, obs, action) - y) ** 2).mean(1).sum()
    torch.testing.assert_close(report["critic_loss"], critic_loss.detach()[None])
    critic_loss.backward()
    critic.step()
    if delay == 1:
        actor = torch.optim.Adam(reference.actor.parameters(), lr=lr)
        pi = reference.actor(obs[None])[0].tanh()
        q = critics_at(reference.critics, obs, pi)[0]
        actor_loss = -2.5 / q.detach().abs().mean() * q.mean() + ((pi - action) ** 2).mean()
        torch.testing.assert_close(report["actor_loss"], actor_loss.detach()[None])
        actor_loss.backward()
        actor.step()
    # Actor and targets wait for every second step.
    follow(module, reference, 0.1 if delay == 1 else 0.0, "critics", "actor")
    algorithm.stop()


def test_dropout_is_where_it_is_asked_for(ray_session: None) -> None:
    """In the loss of V or of the actor alone; what is served and played has none."""
    after = {}
    for part, knobs in (("none", {}), ("value", {"value_dropout": 0.5}), ("actor", {"actor_dropout": 0.5})):
        algorithm = make(SQLConfig, precision="float64", weight="theory", **knobs)
        module, obs = algorithm.rl_module, normal(0, 1, 5, 3)
        torch.testing.assert_close(module.values(obs), module.values(obs))
        torch.testing.assert_close(module.best_action(obs), module.best_action(obs))
        algorithm.learner_group._learner.step(batch_of_rows())
        after[part] = weights(algorithm)
        algorithm.stop()

    def moved(part: str, net: str) -> bool:
        return any(
            not torch.equal(after[part][name], value)
            for name, value in after["none"].items()
            if name.startswith(net + ".")
        )

    assert moved("value", "value")
    assert moved("actor", "actor") and not moved("actor", "value") and not moved("actor", "critics")


def test_rows_are_drawn_from_all_the_data(ray_session: None) -> None:
    algorithm = make(SQLConfig, batch=64)
    data, learner = algorithm.dataset, algorithm.learner_group._learner
    scale = 1000 / np.ptp(data.returns())
    at = {row.tobytes(): i for i, row in enumerate(np.c_[data["obs"], data["action"]])}
    drawn = []
    for rows in learner.draw(60):
        found = torch.cat([rows["obs"], rows["action"]], -1)[0].numpy()
        drawn += [at[row.tobytes()] for row in found]
        index = drawn[-64:]
        np.testing.assert_array_equal(rows["next_obs"][0].numpy(), data["next_obs"][index])
        np.testing.assert_allclose(rows["reward"][0].numpy(), scale * data["reward"][index], rtol=1e-5)
    counts = np.bincount(drawn, minlength=len(data))
    expected = len(drawn) / len(data)
    # Pearson's statistic of uniform draws: mean n - 1, deviation sqrt(2 (n - 1)).
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - len(data)) < 5 * np.sqrt(2 * len(data))
    algorithm.stop()


def test_diagnostics(ray_session: None) -> None:
    """Smaller Q on data and at the policy's actions, V at first states beside the discounted transformed return."""
    algorithm = make(SQLConfig, precision="float64", gamma=0.9)
    found = algorithm.learner_group._learner.diagnose(most=10_000)
    data, module = algorithm.dataset, algorithm.rl_module
    obs, action = (torch.tensor(data[name]).double() for name in ("obs", "action"))
    with torch.no_grad():
        own = module.actor(obs[None])[0].tanh()
        wanted = {
            "q_data": critics_at(module.critics, obs, action).amin(0).mean(),
            "q_policy": critics_at(module.critics, obs, own).amin(0).mean(),
            "v_start": module.value(obs[data["t"] == 0][None]).mean(),
        }
    returns = []
    for episode in np.unique(data["episode_id"]):
        r = data["reward"][data["episode_id"] == episode].astype(float)
        returns.append((r.sum(), (0.9 ** np.arange(len(r)) * r).sum()))
    whole, discounted = np.array(returns).T
    wanted["return_start"] = 1000 / (whole.max() - whole.min()) * discounted.mean()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name
    algorithm.stop()


def test_every_step_size_falls_in_a_line(ray_session: None) -> None:
    algorithm = make(SQLConfig, lr=1e-3, lr_decay="linear")
    algorithm.train()
    learner = algorithm.learner_group._learner
    for adam in (learner.actor_adam, learner.value_adam, learner.critic_adam):
        assert adam.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - 19 / 40))
    algorithm.stop()


@pytest.mark.parametrize("weight", ["release", "indicator"])
def test_discrete_actions(ray_session: None, tmp_path: Path, weight: str) -> None:
    algorithm = make(SQLConfig, data=ROOMS, weight=weight, reward_transform="none", alpha=0.1, gamma=0.97)
    for _ in range(2):
        algorithm.train()
    module = algorithm.rl_module
    obs, action = torch.tensor([[3, 50, 9]]), torch.tensor([[0, 3, 2]])
    features = module.features(obs)
    with torch.no_grad():
        everything = module.critics(features.repeat_interleave(2, 0))
        picked = module.q_values(features, action)
    for b in range(3):
        torch.testing.assert_close(picked[0, :, b], everything[:, b, action[0, b]])
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    answer = policy.answer([3, 50], actions=[1, 2])
    assert set(answer) == {"action", "value", "advantage", "weight"}
    with pytest.raises(DataError, match="outside the action space"):
        policy.answer([3, 50], actions=[1, 2.5])
    algorithm.stop()


@pytest.mark.parametrize("config_class", [SQLConfig, EQLConfig])
def test_the_tabular_mode_finds_the_way(ray_session: None, tmp_path: Path, config_class: Any) -> None:
    knobs = {
        "data": "four_rooms/mixed-0.5,size=4000",
        "alpha": 0.02,
        "gamma": 0.97,
        "reward_transform": "none",
    }
    algorithm = make(config_class, mode="tabular", weight="theory", **knobs)
    result = flat_metrics(algorithm.train())
    assert result["progress"] == 1.0
    assert result["evaluation_return"] == 1.0
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    start = 93  # row 11, column 1
    answer = policy.answer(start, actions=0)
    # The optimum is 0.5256; SQL's practical value is a lower estimate of its regularised one.
    assert 0.2 < float(answer["value"]) < 0.6
    assert answer["weight"] >= 0
    algorithm.stop()


@pytest.mark.parametrize("config_class", [SQLConfig, EQLConfig])
@pytest.mark.parametrize("exact", [False, True])
def test_the_tabular_mode_solves_the_transformed_data(
    ray_session: None, tmp_path: Path, config_class: Any, exact: bool
) -> None:
    """Values of r - 1 at the fixed point of the counts; weights that average 1 over the data's actions; what is served of pairs."""
    kind, alpha = config_class.kind, 0.3
    algorithm = make(
        config_class,
        data="four_rooms/mixed-0.5,size=1500",
        mode="tabular",
        exact=exact,
        weight="theory",
        alpha=alpha,
        gamma=0.9,
        reward_transform="reward_shift(-1)",
    )
    algorithm.train()
    data, module = algorithm.dataset, algorithm.rl_module
    names = ("obs", "action", "next_obs", "terminated")
    rows = {name: torch.tensor(data[name]) for name in names}
    counts = tabular.count(**rows, reward=torch.tensor(data["reward"]).double() - 1, S=104, A=4)
    V, Q = ivr.solve(counts, kind, torch.tensor([alpha]), 0.9, exact)
    seen = counts.mu > 0
    torch.testing.assert_close(module.v, V[0])
    torch.testing.assert_close(module.q[seen], Q[0][seen])
    if exact or kind == "eql":
        mass = (counts.mu * module.weights).sum(-1)[seen.any(-1)]
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)
    else:
        torch.testing.assert_close(
            module.weights[seen], (1 + (Q[0] - V[0, :, None]) / (2 * alpha)).clamp_min(0)[seen]
        )
    torch.testing.assert_close(module.policy, tabular.extract(counts.mu, module.weights))
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    states, actions = (seen.sum(-1) == 3).nonzero()[:2, 0], torch.tensor([0, 0])
    actions[0] = int((~seen[states[0]]).nonzero()[0, 0])
    actions[1] = int(seen[states[1]].nonzero()[0, 0])
    answer = policy.answer(states.numpy(), actions=actions.numpy())
    np.testing.assert_allclose(answer["value"], V[0, states].numpy(), rtol=1e-6)
    # A pair that nobody tried: no weight, and no better than the worst that somebody did (with r < 0, a Q of 0 would be the best of all).
    assert answer["weight"][0] == 0.0
    assert answer["weight"][1] == pytest.approx(float(module.weights[states[1], actions[1]]), rel=1e-6)
    assert answer["advantage"][0] == pytest.approx(float(Q[0][seen].min() - V[0, states[0]]), rel=1e-6)
    assert answer["advantage"][1] == pytest.approx(
        float(Q[0, states[1], actions[1]] - V[0, states[1]]), abs=1e-6
    )
    algorithm.stop()


def test_normalisation_lives_in_the_policy(ray_session: None, tmp_path: Path) -> None:
    algorithm = make(TD3BCConfig)
    data = algorithm.dataset
    np.testing.assert_allclose(
        algorithm.rl_module.obs_mean.numpy(), data["obs"].mean(0), rtol=1e-4, atol=1e-5
    )
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    torch.testing.assert_close(policy.module.obs_scale, algorithm.rl_module.obs_scale)
    algorithm.stop()


def test_lengths_of_played_episodes() -> None:
    """Two seeds against the point stepped by hand in numpy: one walks to the goal, one stands still."""
    from mobula.algorithms.offline.base import method
    from mobula.envs.mazes import PointMaze2D

    episodes, world = 4, PointMaze2D(4)
    lead = recipes.waypoint(world)

    class Scripted:
        about, discrete = {"seeds": 2}, False

        def features(self, obs: torch.Tensor) -> torch.Tensor:
            return obs

        def best_action(self, features: torch.Tensor) -> torch.Tensor:
            return torch.stack([lead(features[0]), torch.zeros(episodes, 2)])

    returns, lengths = method.play(Scripted(), "point_maze", {}, episodes, 3)  # type: ignore[arg-type]
    first, _ = PointMaze2D(2 * episodes).reset(seed=method.EVALUATION_SEED + 3000)
    table, wall = world.waypoints().numpy(), world.wall.numpy()
    wanted = []
    for x, y in first[:episodes, :2].double().numpy():
        u = v = 0.0
        for step in range(1, 301):
            aim = table[int(y), int(x)]
            a, b = np.clip(8 * (0.5 * np.clip(aim - [x, y], -1, 1) - [u, v]), -1, 1)
            u, v = 0.9 * u + 0.1 * a, 0.9 * v + 0.1 * b
            x, u = (x, 0.0) if wall[int(y), int(x + 0.2 * u)] else (x + 0.2 * u, u)
            y, v = (y, 0.0) if wall[int(y + 0.2 * v), int(x)] else (y + 0.2 * v, v)
            if np.hypot(x - 1.5, y - 1.5) <= 0.5:
                wanted.append(step)
                break
    assert len(set(wanted)) > 1
    assert lengths.tolist() == [wanted, [300] * episodes]
    assert returns.tolist() == [[1.0] * episodes, [0.0] * episodes]


def test_streaming_learns_from_parquet(ray_session: None) -> None:
    algorithm = make(
        BCConfig, data="pendulum/scripted,size=2000", streaming=True, block=60, steps=60, lr=1e-2
    )
    module, data = algorithm.rl_module, algorithm.dataset

    def likelihood() -> float:
        with torch.no_grad():
            obs, action = (torch.tensor(data[name]).unsqueeze(0) for name in ("obs", "action"))
            return float(module.log_prob(module.features(obs), action).mean())

    before = likelihood()
    algorithm.train()
    assert likelihood() > before + 0.1
    algorithm.stop()


def test_the_best_episodes() -> None:
    whole = recipes.generate("pendulum/scripted-mixed-0.5,size=4000")
    best = best_episodes(whole, 0.25)
    assert len(best.starts()) == 5
    assert best.returns().min() == np.sort(whole.returns())[-5]


def test_it_learns_from_mixed_data(ray_session: None) -> None:
    """Cloning the better half of episodes (the expert's) reaches the goal of the maze; the mean of all actions does not."""
    data, score = "point_maze/mixed-0.3,size=10000", {}
    knobs = {
        "steps": 800,
        "block": 800,
        "batch": 64,
        "lr": 1e-3,
        "hidden": [64, 64],
        "reward_transform": "none",
    }
    for best in (1.0, 0.5):
        algorithm = make(BCConfig, data=data, best=best, **knobs)
        score[best] = flat_metrics(algorithm.train())["score"]
        algorithm.stop()
    assert score[0.5] > 80
    assert score[1.0] < 50


def test_bad_settings(ray_session: None, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"alpha must be positive \(unit of reward\); got 0"):
        SQLConfig().training(alpha=0)
    with pytest.raises(ConfigError, match="got -1"):
        EQLConfig().training(alpha=-1)
    with pytest.raises(DataError, match=r"takes continuous actions; .* has the action space Discrete\(4\)"):
        make(TD3BCConfig, data=ROOMS)
    with pytest.raises(DataError, match="needs data with finite observations"):
        make(SQLConfig, mode="tabular")
    for config_class, knobs in ((BCConfig, {"best": 0.1}), (SQLConfig, {"mode": "tabular"})):
        with pytest.raises(ConfigError, match="does not go with streaming"):
            make(config_class, streaming=True, **knobs)
    with pytest.raises(ConfigError, match="exact is for mode='tabular'"):
        make(SQLConfig, exact=True)
    with pytest.raises(ConfigError, match="there are none, reward_range"):
        make(SQLConfig, reward_transform="bigger")
    with pytest.raises(DataError, match="four_rooms has Discrete"):
        make_config("sql", "four_rooms", settings={"data": SWING})
    with pytest.raises(ConfigError, match="nothing is sampled"):
        make_config("sql", settings={"data": SWING}, num_env_runners=2)
    with caplog.at_level(logging.WARNING, "mobula"):
        make(EQLConfig, reward_transform="none", alpha=0.01).stop()
    assert "weights will saturate" in caplog.text
