"""Artefacts of every kind, made once: trained policies, a planner, an auction, a tiny language model."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mobula import registry
from mobula.artifact import export_policy
from mobula.serving import tokens
from mobula.serving.language import save_language_model
from mobula.serving.services import save_service

_spec = importlib.util.spec_from_file_location(
    "tiny_model_example", Path(__file__).parents[2] / "examples" / "tiny_model.py"
)
assert _spec is not None and _spec.loader is not None
_example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_example)
tiny_model = _example.tiny_model

ENTRY_POINTS = "[mobula.services]\ngrid_planner = serving_toys:GridPlanner\nvickrey = serving_toys:Vickrey\n"


@pytest.fixture(scope="session")
def plugged_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the toys as an installed distribution, on the path of this process and of those that it starts."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "serving_toys.py").write_text(Path(__file__).with_name("toys.py").read_text())
    info = folder / "serving_toys-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: serving-toys\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    before = os.environ.get("PYTHONPATH")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    registry._entries.cache_clear()
    yield folder
    sys.path.remove(str(folder))
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    registry._entries.cache_clear()


@pytest.fixture(scope="session")
def artefacts(
    ray_session: None, plugged_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """{name: folder}."""
    from mobula.algorithms.policy_gradient.baselines.ppo import PPOConfig
    from mobula.algorithms.policy_gradient.mac import MACConfig

    folder = tmp_path_factory.mktemp("artefacts")
    configs: Mapping[str, Any] = {
        "cart": PPOConfig().environment("cartpole").training(hidden=[32, 32]),
        "swing": PPOConfig().environment("pendulum").training(hidden=[32, 32], normalize_observations=True),
        "grid": MACConfig().environment("goal_grid"),
        "bandit": registry.config_class("emkf_bandit")(),
    }
    for name, config in configs.items():
        algorithm = config.debugging(seed=0, log_level="ERROR").build_algo()
        algorithm.train()
        export_policy(algorithm, folder / name)
        algorithm.stop()
    save_service(folder / "planner", "grid_planner", {"size": 6}, {"walls.json": b"[[1, 0], [1, 1], [1, 2]]"})
    save_service(folder / "auction", "vickrey", {"reserve": 1.0}, {}, "a second-price auction")
    save_language_model(folder / "tiny", tiny_model(folder / "hf"))
    return {name: str(folder / name) for name in (*configs, "planner", "auction", "tiny")}


@dataclass(frozen=True)
class Keys:
    """Tokens: one for everything, one for each scope, one of one request a second."""

    everything: str
    of: dict[str, str]
    slow: str
    table: dict[str, Any]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    file = tmp_path_factory.mktemp("tokens") / "tokens.json"
    everything, _ = tokens.new(file, "everything")
    of = {scope: tokens.new(file, scope, [scope])[0] for scope in tokens.SCOPES}
    slow, _ = tokens.new(file, "slow", ["*"], 1.0)
    return Keys(everything, of, slow, tokens.as_table(tokens.read(file)))
