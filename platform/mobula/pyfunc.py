"""Policies as MLflow models: `mlflow models serve` and the model registry take the same artefact.

    log_policy("runs/mac_goal_grid_1", registered_model_name="grid")
    mlflow.pyfunc.load_model("models:/grid/1").predict([[0], [3]])

The MLmodel file names this module as its loader, so that nothing is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from mobula.artifact import load_policy, policy_folder
from mobula.policy import Policy

LOADER = "mobula.pyfunc"


class PolicyModel:
    """What MLflow calls.  Inputs: observations [N, ...]; a table is one observation a row."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """{field: array [N, ...]}; params: explore, seed.  Raises DataError for observations that do not fit."""
        space = self.policy.observation_space
        shape = tuple(space.shape or ())
        array = np.asarray(data)
        if not shape and array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        elif array.ndim == 2 and len(shape) > 1:
            # A table holds an image or a matrix as its numbers, row by row.
            array = array.reshape(-1, *shape) if array.shape[1] == int(np.prod(shape)) else array
        given = {name: value for name, value in (params or {}).items() if value is not None}
        asked = self.policy.check(array, bounds=True, **given)
        answer: dict[str, Any] = self.policy.answers([asked])[0]
        answer.pop("state", None)
        return answer


def _load_pyfunc(path: str) -> PolicyModel:
    """MLflow's entry point."""
    return PolicyModel(load_policy(path))


def _signature(policy: Policy) -> Any:
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ParamSchema, ParamSpec, Schema, TensorSpec

    space = policy.observation_space
    shape = (-1, *(space.shape or (1,)))
    inputs = Schema([TensorSpec(np.dtype(space.dtype), shape)])
    params = ParamSchema([ParamSpec("explore", "boolean", None), ParamSpec("seed", "long", None)])
    return ModelSignature(inputs=inputs, params=params)


def _arguments(path: str | Path) -> dict[str, Any]:
    folder = policy_folder(path)
    policy = load_policy(folder)
    space = policy.observation_space
    space.seed(0)
    example = np.asarray([space.sample()], dtype=space.dtype)
    if isinstance(space, spaces.Discrete):
        example = example[:, None]
    return {
        "loader_module": LOADER,
        "data_path": str(folder),
        "signature": _signature(policy),
        "input_example": np.nan_to_num(example, posinf=10.0, neginf=-10.0),
        "pip_requirements": _requirements(policy.manifest["versions"]),
    }


def _requirements(versions: dict[str, str]) -> Sequence[str]:
    return [
        f"{name}=={versions[name]}"
        for name in ("mobula", "ray", "torch", "gymnasium", "numpy")
        if name in versions
    ]


def save_policy(path: str | Path, model: str | Path) -> None:
    """Writes the policy at `path` (a run's folder, or an exported one) as an MLflow model to the folder `model`."""
    import mlflow

    mlflow.pyfunc.save_model(str(model), **_arguments(path))


def log_policy(path: str | Path, name: str = "policy", registered_model_name: str | None = None) -> Any:
    """Logs it to the active MLflow run, and registers it under a name if one is given.  Returns MLflow's ModelInfo."""
    import mlflow

    return mlflow.pyfunc.log_model(name=name, registered_model_name=registered_model_name, **_arguments(path))


def register_policy(path: str | Path, name: str, tracking_uri: str | None = None) -> tuple[str, str]:
    """Gives the registered model `name` a new version, from a run of its own.  Returns (tracking URI, version).

    tracking_uri: default MLFLOW_TRACKING_URI, else the file `mlflow.db` beside the run's folder, as training has it.
    Raises ArtifactError, ClusterError.
    """
    import mlflow

    from mobula.tracking import Tracker

    arguments = _arguments(path)
    folder = Path(path).resolve()
    beside = folder.parent.parent if folder.name == "policy" else folder.parent
    with Tracker.start("exports", f"export {name}", uri=tracking_uri, folder=beside) as tracker:
        # MLflow keeps this for the whole process, and in its environment.
        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(tracker.uri)
        try:
            with mlflow.start_run(run_id=tracker.run_id):
                info = mlflow.pyfunc.log_model(name="policy", registered_model_name=name, **arguments)
        finally:
            mlflow.set_tracking_uri(before)  # None: as it was
            if before is None:
                os.environ.pop("MLFLOW_TRACKING_URI", None)
    return tracker.uri, str(info.registered_model_version)
