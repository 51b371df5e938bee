"""Tracking with MLflow: a SQLite file by default, nested runs, parameters, metrics, figures, artefacts, model registry."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse

from mobula.errors import ClusterError
from mobula.files import storage
from mobula.versions import commit, versions

LONGEST_PARAM = 500


class Tracker:
    """One MLflow run.  Made by `start`, closed by `end` or a `with` block; `child` opens a run nested in it."""

    def __init__(self, client: Any, experiment_id: str, run_id: str, uri: str) -> None:
        self.client, self.experiment_id, self.run_id, self.uri = client, experiment_id, run_id, uri

    @classmethod
    def start(
        cls,
        experiment: str,
        run_name: str,
        *,
        uri: str | None = None,
        folder: str | Path = "runs",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
    ) -> Tracker:
        """Opens a run.

        uri     MLflow tracking URI; default: MLFLOW_TRACKING_URI, else the file `mlflow.db` in `folder`
        parent  ID of the run that this one is nested in

        Raises ClusterError where a tracking server does not answer, StorageError where the file cannot be written.
        """
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        location = None
        if uri is None:
            base = Path(folder).resolve()
            with storage(base):
                base.mkdir(parents=True, exist_ok=True)
                (base / "mlflow.db").open("a").close()
            uri, location = f"sqlite:///{base / 'mlflow.db'}", (base / "mlartifacts").as_uri()
        _require_answer(uri)
        from mlflow import MlflowClient

        # MLflow sets its loggers when it is imported, and talks while it makes a new database.
        for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.ERROR)

        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = client.get_experiment_by_name(experiment)
        experiment_id = (
            found.experiment_id if found else client.create_experiment(experiment, artifact_location=location)
        )
        kept = {"mlflow.parentRunId": parent} if parent else {}
        run = client.create_run(
            experiment_id,
            run_name=run_name,
            tags={
                **kept,
                "commit": str(commit()),
                **{f"version.{k}": v for k, v in versions().items()},
                **(tags or {}),
            },
        )
        tracker = cls(client, experiment_id, run.info.run_id, uri)
        tracker.log_params(params or {})
        return tracker

    def child(
        self, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None
    ) -> Tracker:
        """A run nested in this one."""
        run = self.client.create_run(
            self.experiment_id, run_name=run_name, tags={"mlflow.parentRunId": self.run_id, **(tags or {})}
        )
        tracker = Tracker(self.client, self.experiment_id, run.info.run_id, self.uri)
        tracker.log_params(params)
        return tracker

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; values longer than MLflow takes are cut."""
        from mlflow.entities import Param

        entries = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in params.items()]
        for start in range(0, len(entries), 100):
            self.client.log_batch(self.run_id, params=entries[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        for start in range(0, len(entries), 1000):
            self.client.log_batch(self.run_id, metrics=entries[start : start + 1000])

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, or a folder with everything in it."""
        path = Path(path)
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder or path.name)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def register(self, artifact: str, name: str) -> str:
        """Enters a logged folder into the model registry under `name`; returns its version."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self.client.get_run(self.run_id).info.artifact_uri}/{artifact}"
        return str(self.client.create_model_version(name, source, self.run_id).version)

    def end(self, status: str = "FINISHED") -> None:
        """FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
        self.end(status)


def _require_answer(uri: str) -> None:
    """Raises ClusterError where an http tracking server does not take connections, before MLflow retries for minutes."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("http", "https"):
        return
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    try:
        socket.create_connection((parsed.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"the MLflow server at {uri} does not answer ({error}): start it, or unset MLFLOW_TRACKING_URI"
        ) from error
