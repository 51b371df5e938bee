"""MLflow: runs, nested runs, artefacts, the model registry, and servers that do not answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobula.errors import ClusterError, StorageError
from mobula.tracking import Tracker


def test_a_run_with_a_child(tmp_path: Path) -> None:
    with Tracker.start("exp", "parent", folder=tmp_path, params={"alpha": 2.0, "long": "x" * 900}) as parent:
        parent.log_metrics({"loss": 1.0}, 1)
        parent.log_metrics({"loss": 0.5}, 2)
        with parent.child("child", {"seed": 3}) as child:
            child.log_metrics({"loss": 0.1}, 1)
        policy = tmp_path / "policy"
        policy.mkdir()
        (policy / "policy.json").write_text("{}")
        parent.log_artifact(policy)
        assert parent.register("policy", "my-policy") == "1"
        assert parent.register("policy", "my-policy") == "2"
    client = parent.client
    run = client.get_run(parent.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["alpha"] == "2.0"
    assert len(run.data.params["long"]) == 500
    assert [point.value for point in client.get_metric_history(parent.run_id, "loss")] == [1.0, 0.5]
    nested = client.search_runs([parent.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert [found.info.run_id for found in nested] == [child.run_id]
    assert [file.path for file in client.list_artifacts(parent.run_id, "policy")] == ["policy/policy.json"]
    assert (tmp_path / "mlflow.db").is_file()


def test_a_failure_is_recorded(tmp_path: Path) -> None:
    tracker = Tracker.start("exp", "run", folder=tmp_path)
    with pytest.raises(RuntimeError), tracker:
        raise RuntimeError("no")
    assert tracker.client.get_run(tracker.run_id).info.status == "FAILED"


def test_a_server_that_does_not_answer() -> None:
    with pytest.raises(ClusterError, match="does not answer") as caught:
        Tracker.start("exp", "run", uri="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Tracker.start("exp", "run", folder=tmp_path / "file" / "runs")
