"""Placement: from a config file to RLlib's settings and back, and whether it fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mobula import running
from mobula.cli import app
from mobula.errors import ConfigError
from mobula.placement import Role, apply, given, lacking, roles
from mobula.settings import dump_config, make_config

WANTED = {
    "env_runners": {"count": 8, "cpus": 2, "resources": {"sampling": 0.5}},
    "learners": {"count": 2, "gpus": 1},
    "evaluation": {"count": 1},
}


def test_a_placement_becomes_rllib_s_settings_and_comes_back() -> None:
    config = make_config("PPO", "cartpole", placement=WANTED)
    assert (config.num_env_runners, config.num_cpus_per_env_runner) == (8, 2)
    assert config.custom_resources_per_env_runner == {"sampling": 0.5}
    assert (config.num_learners, config.num_gpus_per_learner, config.evaluation_num_env_runners) == (2, 1, 1)
    kept = yaml.safe_load(dump_config(config))
    again = make_config(
        kept["method"],
        kept["env"],
        num_env_runners=kept["num_env_runners"],
        num_learners=kept["num_learners"],
        placement=kept["placement"],
    )
    assert roles(again) == roles(config) and given(again) == given(config)


def test_what_each_role_asks_for() -> None:
    found = {role.name: role for role in roles(make_config("PPO", "cartpole", placement=WANTED))}
    assert found["env_runners"].each == {"CPU": 2.0, "sampling": 0.5}
    # RLlib's rule: a learner on a GPU takes no CPU, one without takes one.
    assert found["learners"].each == {"GPU": 1.0}
    assert {r.name: r for r in roles(make_config("PPO", "cartpole"))}["learners"].each == {"CPU": 1.0}
    offline = {r.name: r for r in roles(make_config("mrpg", settings={"workers": 3}))}
    assert offline["env_runners"].count == 0 and offline["workers"].count == 3


def test_the_request_is_rllib_s_own() -> None:
    """The bundles that RLlib itself asks Tune for, less its main process."""
    config = make_config("PPO", "cartpole", placement=WANTED)
    bundles = config.algo_class.default_resource_request(config.to_dict()).bundles[1:]
    asked = [{name: float(amount) for name, amount in bundle.items() if amount} for bundle in bundles]
    ours = [role.each for role in roles(config) for _ in range(role.count)]
    assert sorted(asked, key=str) == sorted(ours, key=str)


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        ({"learnrs": {"count": 1}}, "Did you mean 'learners'"),
        ({"learners": {"gpu": 1}}, "Did you mean 'gpus'"),
        ({"learners": 2}, "write it as"),
        ({"learners": {"count": -1}}, "learners.count is -1"),
        ({"learners": {"count": 1.5}}, "learners.count is 1.5"),
        ({"env_runners": {"resources": {"x": "many"}}}, "env_runners.resources"),
        ({"workers": {"count": 2}}, "has no 'count'"),
    ],
)
def test_a_placement_that_makes_no_sense(placement: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        apply(make_config("PPO", "cartpole"), placement)


def test_room_is_counted_node_by_node() -> None:
    two = [Role("env_runners", 2, {"CPU": 2.0}, "")]
    assert lacking(two, [{"CPU": 4.0}]) == ""
    assert lacking(two, [{"CPU": 2.0}, {"CPU": 2.0}]) == ""
    # Four CPUs in all, and yet no node has room for the second one.
    assert "no room for 1 of env_runners" in lacking(two, [{"CPU": 3.0}, {"CPU": 1.0}])
    mixed = [Role("env_runners", 3, {"CPU": 1.0}, ""), Role("learners", 1, {"CPU": 2.0, "GPU": 1.0}, "")]
    assert lacking(mixed, [{"CPU": 3.0}, {"CPU": 2.0, "GPU": 1.0}]) == ""
    assert "0 GPU" in lacking(mixed, [{"CPU": 8.0}])
    # Tasks take turns.
    assert lacking([Role("workers", 99, {"CPU": 1.0}, "")], [{"CPU": 1.0}]) == ""


def test_a_run_that_this_machine_can_never_hold_is_refused_at_once(ray_session: None, tmp_path: Path) -> None:
    config = make_config("PPO", "cartpole", num_env_runners=99)
    with pytest.raises(ConfigError, match=r"asks for 99 CPU and there is 4 CPU.*lower num_env_runners"):
        running.train(config, out=tmp_path, track=False)
    assert not list(tmp_path.iterdir())


def test_dry_run(ray_session: None, in_tmp: Path) -> None:
    arguments = ["train", "PPO", "--env", "cartpole", "--num-env-runners", "3", "--dry-run"]
    done = CliRunner().invoke(app, [*arguments, "--placement", "learners.count=1"])
    assert done.exit_code == 0, done.output
    assert "asks for:   4 CPU" in done.output and "node 1:     4 CPU" in done.output
    assert done.output.rstrip().endswith("verdict:    fits")
    done = CliRunner().invoke(app, [*arguments, "--placement", "learners.gpus=1", "--num-learners", "2"])
    assert "no room for 2 of learners" in done.output
    assert not list(in_tmp.iterdir())
