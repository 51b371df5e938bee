"""Tracking with MLflow: a SQLite file by default, nested runs, parameters, metrics, figures, artefacts, model registry."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse

from mobula.errors import ClusterError
from mobula.files import storage
from mobula.versions import commit, versions

logger = logging.getLogger("mobula")

LONGEST_PARAM = 500

RETRY_SECONDS = (5.0, 60.0)
"""First and longest time between attempts to reach a server that is away."""

PATIENCE_SECONDS = 60.0
"""How long the end of a run waits for a server that is away."""


class Tracker:
    """One MLflow run.  Made by `start`, closed by `end` or a `with` block; `child` opens a run nested in it.

    A server that goes away while a run is on does not stop it: what is logged waits here, in order, and is sent when the server
    answers again.
    """

    def __init__(self, client: Any, experiment_id: str, run_id: str, uri: str) -> None:
        self.client, self.experiment_id, self.run_id, self.uri = client, experiment_id, run_id, uri
        self._metrics: list[Any] = []
        self._artifacts: list[tuple[Path, str | None]] = []
        self._pause, self._retry_at = 0.0, 0.0

    @property
    def waiting(self) -> int:
        """Metrics and files that have not reached the server yet."""
        return len(self._metrics) + len(self._artifacts)

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

    @classmethod
    def reopen(cls, uri: str, run_id: str) -> Tracker:
        """The run of an earlier process, to be gone on with.  Raises ClusterError where a tracking server does not answer."""
        _require_answer(uri)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.update_run(run_id, status="RUNNING")
        return cls(client, client.get_run(run_id).info.experiment_id, run_id, uri)

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
        self._metrics += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._flush()

    def log_curve(self, name: str, steps: Sequence[float], values: Sequence[float]) -> None:
        """One metric at many steps, in few calls."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [Metric(name, float(v), now, int(at)) for at, v in zip(steps, values, strict=True)]
        self._flush()

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, or a folder with everything in it."""
        self._artifacts.append((Path(path), folder))
        self._flush()

    def _flush(self) -> None:
        """Sends what waits; keeps it where the server is away."""
        if time.monotonic() < self._retry_at:
            return
        try:
            _require_answer(self.uri)
            while self._metrics:
                self.client.log_batch(self.run_id, metrics=self._metrics[:1000])
                del self._metrics[:1000]
            while self._artifacts:
                path, folder = self._artifacts[0]
                if path.is_dir():
                    self.client.log_artifacts(self.run_id, str(path), folder or path.name)
                else:
                    self.client.log_artifact(self.run_id, str(path), folder)
                del self._artifacts[0]
        except _away() as error:
            if not _is_away(error):
                raise
            if not self._pause:
                logger.warning("%s; training goes on, and what is logged waits", str(error).split("\n")[0])
            self._pause = min(max(2 * self._pause, RETRY_SECONDS[0]), RETRY_SECONDS[1])
            self._retry_at = time.monotonic() + self._pause
        else:
            if self._pause:
                logger.warning("the MLflow server at %s answers again; nothing was lost", self.uri)
            self._pause = 0.0

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

    def end(self, status: str = "FINISHED", *, patience: float = PATIENCE_SECONDS) -> None:
        """FINISHED, FAILED or KILLED.  Waits for a server that is away, `patience` seconds; then says how to send the rest."""
        deadline = time.monotonic() + patience
        while True:
            self._retry_at = 0.0
            self._flush()
            if not self._pause:
                self.client.set_terminated(self.run_id, status)
                return
            if time.monotonic() > deadline:
                logger.warning(
                    "the MLflow server at %s is still away: %d metrics and files of run %s have not been sent; `mobula track RUN`"
                    " sends them from the run's folder",
                    self.uri,
                    self.waiting,
                    self.run_id,
                )
                return
            time.sleep(min(self._pause, max(deadline - time.monotonic(), 0.1)))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            self.end("KILLED", patience=0.0)
        else:
            self.end("FINISHED" if kind is None else "FAILED")


def _away() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    return ClusterError, MlflowException, RequestException


def _is_away(error: Exception) -> bool:
    """Whether an error says that the server cannot be reached, rather than that it refuses what it was sent."""
    code = getattr(error, "error_code", None)
    text = str(error)
    return (
        code is None
        or "Max retries exceeded" in text
        or code in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
        or any(
            f"error code {number}" in text or f"{number} Server Error" in text for number in range(500, 505)
        )
    )


def _require_answer(uri: str) -> None:
    """Raises ClusterError where an http tracking server does not take connections, before MLflow retries for minutes."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("http", "https"):
        return
    # MLflow's own retries take minutes, in which training would stand still.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    try:
        socket.create_connection((parsed.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"the MLflow server at {uri} does not answer ({error}): start it, or unset MLFLOW_TRACKING_URI"
        ) from error
