"""The artefact as an MLflow model: the same answers, nothing pickled, and back through the registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from mobula.artifact import load_policy
from mobula.errors import ArtifactError
from mobula.pyfunc import register_policy, save_policy
from mobula.serving.sources import resolved


def test_the_model_answers_as_the_policy(artefacts: dict[str, str], tmp_path: Path) -> None:
    save_policy(artefacts["cart"], tmp_path / "model")
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pkl", ".pickle", ".pt")]
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    obs = np.array([[0.1, 0.2, -0.1, 0.0], [0.0, -0.3, 0.05, 0.2]], dtype=np.float32)
    policy = load_policy(artefacts["cart"])
    wanted = policy.answer(obs, explore=True, seed=7)
    found = model.predict(obs, params={"explore": True, "seed": 7})
    assert set(found) == {"action", "log_probability", "value"}
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-6)
    with pytest.raises(MlflowException):
        model.predict(np.zeros((2, 3), dtype=np.float32))


def test_discrete_observations_and_tables(artefacts: dict[str, str], tmp_path: Path) -> None:
    save_policy(artefacts["grid"], tmp_path / "model")
    model: Any = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    policy = load_policy(artefacts["grid"])
    found = model.predict(np.array([[0], [7]]), params={"explore": False})
    np.testing.assert_array_equal(found["action"], policy.answer([0, 7], explore=False)["action"])
    table = model.unwrap_python_model() if False else model._model_impl
    np.testing.assert_array_equal(
        table.predict(pd.DataFrame({"state": [0, 7]}), {"explore": False})["action"], found["action"]
    )


def test_through_the_registry(
    artefacts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert register_policy(artefacts["cart"], "cart", uri) == (uri, "1")
    assert register_policy(artefacts["cart"], "cart", uri) == (uri, "2")
    # Nothing of it stays behind in this process.
    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert load_policy(resolved("models:/cart/2")).version == load_policy(artefacts["cart"]).version
    with pytest.raises(ArtifactError, match="MLFLOW_TRACKING_URI"):
        resolved("models:/cart/3")
