"""MarketRL: thresholds, copies of agents, windows that do not look ahead, the whole way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from mobula import registry
from mobula.algorithms.finance import agents, market_rl, market_rl_experiment
from mobula.algorithms.finance.market_rl import MarketRL, MarketRLConfig
from mobula.artifact import export_policy, load_policy
from mobula.envs.finance import metrics, synthetic, tensors
from mobula.envs.finance.serving import export_agent
from mobula.errors import ConfigError, DataError
from mobula.evaluation import evaluate_policy
from mobula.learning.modules import TensorModule
from mobula.serving.backend import run_mechanism
from mobula.serving.services import load_service

SPAN = {"start": "2018-01-01", "end": "2019-01-01"}


def config(env: str = "portfolio", **knobs: Any) -> Any:
    small = {"steps": 500, "rebalance": 40, "validation": 40, "num_envs": 16, "hidden": [16], **knobs}
    made = MarketRLConfig().environment(env, env_config=dict(SPAN)).training(**small)
    return made.debugging(seed=0, log_level="ERROR")


def test_thresholds_come_from_the_initial_range() -> None:
    tau = torch.arange(1.0, 201.0, dtype=torch.float64)

    def rule(at: int, **knobs: Any) -> float:
        return market_rl.threshold(tau, 100, at, **{"q": 0.99, "rule": "quantile", **knobs})

    assert rule(150) == pytest.approx(float(tau[:100].quantile(0.99)))
    assert rule(150, q=0.0) == float("inf")
    assert rule(150, rule="adaptive") == pytest.approx(float(tau[:100].quantile(0.9)))
    # The mean of the 63 bars up to 100 is 69, below the 0.90 quantile: the in-sample maximum.
    assert rule(100, rule="adaptive") == 100.0
    # Zeros are bars before the turbulence is known.
    begun = torch.cat([torch.zeros(50, dtype=torch.float64), tau[:150]])
    assert market_rl.threshold(begun, 100, 150, q=0.5, rule="quantile") == pytest.approx(25.5)
    # Nothing after the initial range, or after the start of validation, has a part.
    later = tau.clone()
    later[150:] = 1e9
    assert market_rl.threshold(later, 100, 150, q=0.9, rule="adaptive") == rule(150, q=0.9, rule="adaptive")


def test_the_best_of_families() -> None:
    assert market_rl.best({"ppo": 0.0, "a2c": 1.2, "sac": -3.0}) == "a2c"
    assert market_rl.best({"ppo": 0.0, "a2c": 0.0}) == "ppo"


def test_the_whole_way(ray_session: None, tmp_path: Path) -> None:
    algorithm = config(algo_families=["ppo", "a2c"]).build_algo()
    assert len(algorithm.windows) == 1
    assert algorithm.accounts == ("ensemble", "ppo", "a2c", "random")
    wider = config(algo_families=["ppo", "a2c"], train_share=0.3).build_algo()
    first = wider.train()
    assert first["progress"] == 1 / len(wider.windows)
    # A restored run goes on exactly, from the account that the first block left.
    other = MarketRL.from_checkpoint(wider.save_to_path(str(tmp_path / "checkpoint")))
    second, again = wider.train(), other.train()
    assert second["wealth"] == again["wealth"]
    assert len(wider.log) == 2 and wider.log == other.log
    entry = wider.log[1]
    assert entry["train"][1] < entry["validation"][0] <= entry["validation"][1] < entry["trade"][0]
    assert set(entry["validation_sharpe"]) == {"ppo", "a2c"}
    assert entry["selected"] == market_rl.best(entry["validation_sharpe"])
    # Blocks join without a gap, and the ensemble's block is that of the chosen family where it held the same account.
    dates = wider.traded_dates()
    assert len(dates) == len(wider.paths["ensemble"]) == 2 * 40 + 1 == len(wider.weights)
    assert str(dates[-1]) == entry["trade"][1]
    chosen = wider.log[0]["selected"]
    # To float32: the last bits of an action depend on the row of the batch.
    assert wider.paths["ensemble"][:41] == pytest.approx(wider.paths[chosen][:41], rel=1e-6)
    report = wider.report()
    assert report["accounts"]["ensemble"]["bars"] == 80
    assert 0 <= report["deflated_sharpe"] <= 1
    assert sum(report["wins"].values()) == 2
    assert wider.evaluate()["walk_forward"]["sharpe"] == pytest.approx(metrics.sharpe(wider.returns()))
    assert wider.figures(tmp_path) == ["backtest.png"]
    policy = load_policy(export_policy(wider, tmp_path / "policy"))
    obs = np.random.default_rng(0).normal(size=policy.observation_space.shape).astype(np.float32)
    answer = policy.answer(obs)
    assert answer["action"].shape == (6,)
    assert int(answer["agent"]) == ["ppo", "a2c"].index(entry["selected"])
    assert float(answer["threshold"]) == pytest.approx(entry["threshold"])
    with torch.no_grad():
        wanted = wider.rl_module.act_as(entry["selected"], torch.from_numpy(obs)[None])[0]
    np.testing.assert_allclose(answer["action"], wanted, rtol=1e-6)
    with pytest.raises(DataError, match="shape"):
        policy.answer(obs[:-1])
    for each in (algorithm, wider, other):
        each.stop()


def test_what_comes_later_changes_nothing(ray_session: None) -> None:
    """The first block's path is the same where the range ends right after it: no scale, threshold or choice saw the rest."""
    long = config(train_share=0.3).build_algo()
    long.train()
    stop = long.span.dates[long.windows[0].trade[1]]
    short = config(train_share=75 / 155)
    short.environment("portfolio", env_config={**SPAN, "end": str(stop)})
    bars = long.windows[0].trade[1]
    short.training(train_share=long.initial / bars + 1e-9)
    cut = short.build_algo()
    assert cut.windows[0] == long.windows[0]
    cut.train()
    assert cut.paths["ensemble"] == long.paths["ensemble"]
    for each in (long, cut):
        each.stop()


@pytest.mark.parametrize("warm", [False, True])
def test_workers_change_nothing(ray_session: None, warm: bool, tmp_path: Path) -> None:
    """Tasks train this window's agents and, where windows do not depend on each other, those of the next one."""
    found = []
    for workers in (0, 3):
        c = config(algo_families=["ppo", "a2c"], train_share=0.2, warm_start=warm, workers=workers)
        algorithm = c.build_algo()
        for roll in range(2):
            algorithm.train()
            ahead = [roll + 1] if workers and not warm and roll % 2 == 0 else []
            assert list(algorithm.ready) == ahead
            if roll == 0:
                path = algorithm.save_to_path(str(tmp_path / f"checkpoint{workers}"))
                algorithm.stop()
                algorithm = MarketRL.from_checkpoint(path)
        state = {k: v.clone() for k, v in algorithm.rl_module.state_dict().items()}
        found.append((algorithm.log, algorithm.paths, state))
        algorithm.stop()
    (log, paths, state), (other_log, other_paths, other_state) = found
    assert len(log) == 2
    assert other_log == log
    assert other_paths == paths
    for name, value in state.items():
        assert torch.equal(other_state[name], value), name


@pytest.mark.parametrize("name", ["stock_trading", "portfolio"])
def test_accounts_side_by_side_are_accounts_alone(name: str) -> None:
    settings = {"start": "2015-01-01", "end": "2015-04-01", "fit_start": "2014-01-01", "training": False}
    alone: Any = registry.make_env(name, 1, **settings)
    beside: Any = registry.make_env(name, 3, **settings)
    shape = alone.single_action_space.shape
    g = torch.Generator().manual_seed(0)
    actions = [2 * torch.rand(3, *shape, generator=g) - 1 for _ in range(2 * (alone.T - 1))]

    def player(rows: slice) -> Any:
        given = iter(actions)
        return lambda obs: next(given)[rows]

    act = player(slice(None))
    both = agents.play(beside, act)
    again = agents.play(beside, act, both["account"])
    for b in range(3):
        act = player(slice(b, b + 1))
        one = agents.play(alone, act)
        np.testing.assert_allclose(both["value"][:, b], one["value"][:, 0], rtol=1e-12)
        np.testing.assert_allclose(both["weights"][:, b], one["weights"][:, 0], atol=1e-12)
        more = agents.play(alone, act, one["account"])
        np.testing.assert_allclose(again["value"][:, b], more["value"][:, 0], rtol=1e-12)
        # Costs are those of the pass alone, not of the account's life.
        for what in ("paid", "traded"):
            assert float(again[what][b]) == pytest.approx(float(more[what][0]))
            total = float(more["account"][what][0])
            assert float(one[what][0]) + float(more[what][0]) == pytest.approx(total)


def test_a_ruined_account_is_out_for_good() -> None:
    """One account pays its value away in costs; the other never trades."""
    settings = {"start": "2015-01-01", "end": "2015-04-01", "fit_start": "2014-01-01", "training": False}
    env: Any = registry.make_env("portfolio", 2, **settings, cost_bps=5000, ruin=0.5, concentration=50.0)
    cash = -torch.ones(2, 6)
    cash[:, 0] = 1.0
    steps = iter(range(1000))

    def act(obs: torch.Tensor) -> torch.Tensor:
        wanted = cash.clone()
        wanted[0] = wanted[0].roll(next(steps) % 2 + 1)
        return wanted

    found = agents.play(env, act)
    value = found["value"]
    ruined = int((value[:, 0] <= 5e5).argmax())
    assert 0 < ruined < 5
    assert (value[ruined:, 0] == value[ruined, 0]).all()
    assert (found["weights"][ruined:, 0] == found["weights"][ruined, 0]).all()
    assert value[:, 1] == pytest.approx(1e6)
    later = agents.play(env, act, found["account"])
    assert (later["value"][:, 0] == value[ruined, 0]).all()
    assert float(later["paid"][0]) == 0.0


def test_shares_and_seeds_and_warm_starts(ray_session: None) -> None:
    algorithm = config(
        "stock_trading", train_share=0.4, n_seeds=2, warm_start=True, sliding=60, embargo=5, turbulence_q=0.0
    ).build_algo()
    result = algorithm.train()
    assert algorithm.windows[0].train[1] - algorithm.windows[0].train[0] == 60
    assert set(algorithm.warm) == {"ppo.0", "ppo.1"}
    assert algorithm.log[0]["threshold"] is None
    ensemble = algorithm.accounts.index("ensemble")
    assert float(algorithm.held["value"][ensemble]) / 1e6 == pytest.approx(result["wealth"])
    module: Any = algorithm.rl_module
    obs = torch.randn(3, *algorithm.span.single_observation_space.shape)
    with torch.no_grad():
        each = [actor(obs) for actor in module.actors["ppo"]]
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(module._forward({Columns.OBS: obs})[Columns.ACTIONS], (each[0] + each[1]) / 2)
    algorithm.train()
    algorithm.stop()


def test_an_agent_s_copy_acts_as_the_agent(ray_session: None) -> None:
    """RLlib's SAC and the tensor PPO: the mean of the squashed, and of the clipped, distribution."""
    c = config(sac_steps=100)
    obs = torch.randn(7, 107)
    settings = {**SPAN, "episode_length": 50}
    for family in ("sac", "ppo"):
        algorithm = agents.build_agent(family, "portfolio", settings, c, seed=1)
        algorithm.train()
        module: Any = algorithm.learner_group._learner.module["default_policy"].unwrapped()
        actor = agents.actor_of(family, module, [16])
        with torch.no_grad():
            if family == "sac":
                from ray.rllib.core.models.base import ENCODER_OUT

                mean = module.pi(module.pi_encoder({Columns.OBS: obs})[ENCODER_OUT])[:, :6].tanh()
            else:
                mean = module.pi(obs).clamp(-1, 1)
        torch.testing.assert_close(actor(obs), mean)
        algorithm.stop()


def test_what_is_refused(ray_session: None) -> None:
    with pytest.raises(ConfigError, match="unknown family 'ddqn'"):
        config(algo_families=["ppo", "ddqn"]).validate()
    with pytest.raises(ConfigError, match="names each family once"):
        config(algo_families=[]).validate()
    with pytest.raises(ConfigError, match="more than the 251"):
        config(rebalance=200).build_algo()
    with pytest.raises(ConfigError, match="environment 'cartpole' does not take these settings"):
        config("cartpole").build_algo()
    plain = config("pendulum")
    plain.env_config = {}
    with pytest.raises(ConfigError, match="stock_trading or portfolio, not in pendulum"):
        plain.build_algo()


def test_ppo_finds_the_planted_signal(ray_session: None) -> None:
    made: Any = registry.config_class("PPO")()
    made.environment("planted_signal").env_runners(num_envs_per_env_runner=64)
    made.training(lr=2e-3, gamma=0.0, rollout_length=32, num_epochs=8, minibatch_size=256)
    algorithm = made.debugging(seed=0, log_level="ERROR").build_algo()
    for _ in range(15):
        algorithm.train()
    s = synthetic.signal_paths(1000, 128, 5)

    def acts(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            module: Any = algorithm.rl_module
            return module.pi(torch.stack([now, before], -1).float())[:, 0].clamp(-1, 1).double()

    share = float(synthetic.score(acts, s, beta=1e-3, cost=0.0).mean()) / synthetic.sign_optimum()
    algorithm.stop()
    assert share > 0.5


@pytest.mark.parametrize("env", ["stock_trading", "portfolio"])
def test_ppo_learns_the_same_from_compact_observations(env: str, ray_session: None, tmp_path: Path) -> None:
    """Same seed, same draws: outputs, losses and weights agree, and nothing that is kept holds the market."""
    found, results, sizes, policies = [], [], [], []
    for compact in (False, True):
        made: Any = registry.config_class("PPO")()
        made.environment(env, env_config={**SPAN, "compact_obs": compact})
        made.env_runners(num_envs_per_env_runner=16)
        made.training(rollout_length=16, num_epochs=2, minibatch_size=64, normalize_observations=True)
        algorithm = made.debugging(seed=0, log_level="ERROR").build_algo()
        # Actions that trade.
        with torch.no_grad():
            algorithm.learner_group._learner.rl_module.pi[-1].weight.mul_(50.0)
        for _ in range(2):
            result = algorithm.train()
        results.append({k: float(v) for k, v in result["learners"]["default_policy"].items() if "loss" in k})
        found.append(algorithm.learner_group._learner.rl_module)
        folder = Path(algorithm.save_to_path(str(tmp_path / f"checkpoint{compact}")))
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
        policies.append(export_policy(algorithm, tmp_path / f"policy{compact}"))
        restored = type(algorithm).from_checkpoint(str(folder))
        for name, value in restored.learner_group._learner.rl_module.state_dict().items():
            assert torch.equal(value, found[-1].state_dict()[name]), name
        again, on = (a.train()["learners"]["default_policy"]["policy_loss"] for a in (restored, algorithm))
        assert float(again) == float(on)
        for each in (algorithm, restored):
            each.stop()
    whole, compact_module = found
    assert len(results[0]) >= 3
    assert results[1] == pytest.approx(results[0], abs=1e-6)
    assert set(whole.state_dict()) == set(compact_module.state_dict())
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(compact_module.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    # On the same states.
    worlds = [registry.make_env(env, 32, **SPAN, compact_obs=c) for c in (False, True)]
    seen = [w.reset(seed=4)[0] for w in worlds]
    assert seen[0].shape[1] > 3 * seen[1].shape[1]
    outputs = [m._forward({Columns.OBS: o})["action_dist_inputs"] for m, o in zip(found, seen, strict=True)]
    values = [m.compute_values({Columns.OBS: o}) for m, o in zip(found, seen, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-6)
    assert float(outputs[0].detach().std()) > 0.1
    # The table is in no checkpoint, and an exported policy takes whole observations.
    assert abs(sizes[1] - sizes[0]) < 20_000
    one, other = (load_policy(p) for p in policies)
    assert one.observation_space == other.observation_space == worlds[0].single_observation_space
    np.testing.assert_allclose(other.act(seen[0].numpy()), one.act(seen[0].numpy()), atol=1e-5)
    settings = {**SPAN, "compact_obs": True, "training": False}
    played = [
        evaluate_policy(other, env, episodes=1, seed=0, env_config={**settings, "compact_obs": c})
        for c in (True, False)
    ]
    assert played[0] == played[1]


def test_compact_observations_in_other_processes(ray_session: None) -> None:
    made: Any = registry.config_class("PPO")()
    made.environment("portfolio", env_config={**SPAN, "compact_obs": True})
    made.env_runners(num_env_runners=1, num_envs_per_env_runner=8).learners(num_learners=1)
    made.training(rollout_length=8, num_epochs=1, minibatch_size=32)
    algorithm = made.debugging(seed=0, log_level="ERROR").build_algo()
    assert algorithm.train()["env_runners"]["num_env_steps_sampled"] == 64
    algorithm.stop()


def test_modules_without_an_encoder_refuse_compact_observations(ray_session: None) -> None:
    made = config()
    made.env_config = {**SPAN, "compact_obs": True}
    with pytest.raises(ConfigError, match="leave compact_obs out"):
        made.build_algo()

    class Bare(TensorModule):
        def setup(self) -> None:
            self.layer = torch.nn.Linear(self.observation_space.shape[0], 6)

    plain: Any = registry.config_class("PPO")()
    plain.environment("portfolio", env_config={**SPAN, "compact_obs": True})
    plain.rl_module(rl_module_spec=RLModuleSpec(module_class=Bare))
    with pytest.raises(ConfigError, match="Bare reads whole observations"):
        plain.build_algo()


def test_many_environments_are_compact(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    build = registry.config_class("PPO").build_algo

    def spy(self: Any) -> Any:
        seen.append(self.env_config["compact_obs"])
        return build(self)

    monkeypatch.setattr(registry.config_class("PPO"), "build_algo", spy)
    results = []
    for count in (1023, 1024):
        c = config(num_envs=count, steps=1)
        _, weights, steps = agents.train_agent("a2c", "portfolio", dict(SPAN), c, seed=1)
        assert steps == 8 * count
        results.append(weights["pi.0.weight"].shape)
    assert seen == [False, True]
    assert results[0] == results[1]


def test_the_last_window_s_agent_is_served(ray_session: None, tmp_path: Path) -> None:
    algorithm = config("stock_trading", algo_families=["a2c", "ppo"], train_share=0.4).build_algo()
    policy = export_policy(algorithm, tmp_path / "untrained")
    with pytest.raises(ConfigError, match="has traded no window yet"):
        export_agent(policy, tmp_path / "agent")
    algorithm.train()
    policy = export_policy(algorithm, tmp_path / "policy")
    window, entry = algorithm.windows[0], algorithm.log[0]
    service, _ = load_service(export_agent(policy, tmp_path / "agent"))
    span = algorithm.span
    # Scale and threshold of what was traded: nothing after the training range has a part.
    rows = tensors.relative(span.whole)[span.first + window.train[0] : span.first + window.train[1]].flatten(
        0, 1
    )
    np.testing.assert_allclose(service.settings["scale"]["mean"], rows.mean(0), rtol=1e-9)
    np.testing.assert_allclose(service.settings["scale"]["deviation"], rows.std(0, correction=0), rtol=1e-9)
    assert service.settings["turbulence_threshold"] == pytest.approx(entry["threshold"])
    assert service.agent == entry["selected"]
    assert service.settings["turbulence_stop"] is True
    # At the end of the block, the account that the block left: what the block's own environment shows.
    world = algorithm._world((window.trade[0] - 1, window.trade[1]), window, entry["threshold"])
    ensemble = algorithm.accounts.index("ensemble")
    held = {name: value[ensemble : ensemble + 1] for name, value in algorithm.held.items()}
    world.carry_on(held)
    world.state["t"] += world.T - 1
    obs = world.observe(world.state)
    with torch.no_grad():
        wanted = algorithm.rl_module.act_as(entry["selected"], obs)[0]
    stop = world.first + world.T
    bars = [
        {"time": f"{str(span.whole.time[k])[:19]}Z", "symbol": s, "close": float(span.whole.close[k, i])}
        for k in range(stop)
        for i, s in enumerate(span.symbols)
    ]
    account = {
        "cash": float(held["cash"]),
        "shares": dict(zip(span.symbols, held["shares"][0].tolist(), strict=True)),
        "bars_since_trade": {
            s: int(n) for s, n in zip(span.symbols, held["cooldown"][0].tolist(), strict=True)
        },
    }
    answer = run_mechanism(service, {"time": bars[-1]["time"], "account": account, "bars": bars}, None)
    np.testing.assert_allclose(answer.audit["action"], wanted, rtol=1e-5, atol=1e-5)
    assert answer.audit["value"] == pytest.approx(float(held["value"]))
    assert answer.outcome["agent"] == entry["selected"]
    algorithm.stop()


def test_the_experiment_is_whole() -> None:
    made = market_rl_experiment.experiment()
    names = {arm for arm in made.arms}
    assert names == {"ppo", "ppo_execution", "market_rl", "without_learning"}
    for claim in made.claims:
        assert set(claim.tasks) <= set(made.tasks)
