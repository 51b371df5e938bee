"""Where artefacts come from: folders, and MLflow's runs and model registry."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from mobula.errors import ArtifactError

MLFLOW = re.compile(r"(models|runs):/")


def resolved(uri: str) -> str:
    """The folder that holds the artefact: `uri` itself, or where MLflow put it on this machine.

    Raises ArtifactError where there is none.
    """
    if not MLFLOW.match(uri):
        folder = Path(uri).expanduser()
        if not folder.is_dir():
            raise ArtifactError(
                f"{uri} is no folder; models:/NAME/VERSION and runs:/ID/policy lead to MLflow"
            )
        return str(folder)
    return _downloaded(uri)


@lru_cache(maxsize=256)
def _downloaded(uri: str) -> str:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        folder = Path(download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise ArtifactError(
            f"{uri} cannot be had from MLflow ({first}): MLFLOW_TRACKING_URI says where to look"
        ) from error
    # An MLflow model (`mobula.pyfunc`) holds the artefact among its data.
    inner = [entry for entry in (folder / "data").glob("*") if entry.is_dir()]
    return str(inner[0] if len(inner) == 1 and (folder / "MLmodel").is_file() else folder)
