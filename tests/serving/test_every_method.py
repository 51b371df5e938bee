"""An artefact of every registered method: it loads in the service and answers the example that the service shows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mobula import registry
from mobula.artifact import export_policy
from mobula.method import MethodConfig
from mobula.serving.backend import LocalBackend
from mobula.serving.gateway import create_app
from mobula.settings import make_config

METHODS = [e.name for e in registry.methods() if issubclass(registry.config_class(e.name), MethodConfig)]
LOGGED: dict[str, Any] = {"data": "pendulum/scripted-mixed-0.5,size=2000"}
SETTINGS = {name: LOGGED for name in ("BC", "CQL", "IQL", "TD3BC", "eql", "sql")}
ENVS = {"PPO": "pendulum", **dict.fromkeys(("mac", "ac_fixed", "ppgae", "reinforce_avg"), "goal_grid")}


@pytest.mark.parametrize("name", METHODS)
def test_an_artefact_answers_its_own_example(name: str, ray_session: None, tmp_path: Path) -> None:
    algorithm: Any = make_config(name, ENVS.get(name), settings=SETTINGS.get(name), seed=0).build_algo()
    export_policy(algorithm, tmp_path / "policy")
    algorithm.stop()
    client = TestClient(create_app(LocalBackend({"it": str(tmp_path / "policy")}), None))
    example = client.get("/v1/models").json()["data"][0]["example"]
    answer = client.post("/v1/policies/it/act", json=example["request"])
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == set(example["answer"])
