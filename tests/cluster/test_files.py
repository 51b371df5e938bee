"""The files that start clusters: each is held against the schema of what reads it."""

from __future__ import annotations

import copy
import json
import lzma
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONSTRAINTS = dict(
    line.split("==", 1) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def strict(schema: Any) -> Any:
    """The schema with fields that it does not name refused, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(value) for name, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", found.get("x-kubernetes-preserve-unknown-fields", False))
    if found.get("x-kubernetes-int-or-string"):
        found = {"type": ["integer", "string"]}
    return found


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Of KubeRay's custom resources: its v1.7.0, ray-operator/config/crd/bases, Apache-2.0, descriptions left out."""
    data = lzma.decompress((Path(__file__).parent / "kuberay-1.7.0.json.xz").read_bytes())
    return {kind: strict(schema) for kind, schema in json.loads(data)["schemas"].items()}


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_kuberay_takes_the_manifests(schemas: dict[str, Any], name: str) -> None:
    manifest = yaml.safe_load((ROOT / f"cluster/kuberay/{name}.yaml").read_text())
    schema = schemas[manifest["kind"]]
    # The metadata are Kubernetes' own.
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema)
    wrong = copy.deepcopy(manifest)
    cluster = cluster_of(wrong)
    cluster["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(wrong, schema)
    spec = cluster_of(manifest)
    assert spec["authOptions"]["mode"] == "token" and spec["rayVersion"] == CONSTRAINTS["ray"]
    # Everywhere the same image, as an ordinary user, with the folder of runs.
    templates = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in templates]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods)


def test_serve_takes_the_config_of_the_service(tmp_path: Path) -> None:
    """Serve's own schema, and ours of the application's arguments; what it imports is there."""
    from importlib import import_module

    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    from mobula.serving.app import build, checked

    manifest = yaml.safe_load((ROOT / "cluster/kuberay/rayservice.yaml").read_text())
    schema = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    args = checked(application.args)
    module, _, attribute = application.import_path.partition(":")
    assert getattr(import_module(module), attribute) is build
    for function in schema.grpc_options.grpc_servicer_functions:
        assert callable(import_attr(function))
    # The tokens are where the secret is mounted, on every machine.
    spec = cluster_of(manifest)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (mount,) = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert str(args.tokens).startswith(mount["mountPath"] + "/")


def test_ray_up_takes_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((ROOT / "cluster/ray-up/aws.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(given)))
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config({**copy.deepcopy(given), "max_wrokers": 3}))
    for commands in (given["head_start_ray_commands"], given["worker_start_ray_commands"]):
        assert any("RAY_AUTH_MODE=token" in command for command in commands)
    assert "/home/ubuntu/.ray/auth_token" in given["file_mounts"]


def test_the_image_is_built_from_what_is_there() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
    assert "USER ray" in text and "RAY_AUTH_MODE=token" in text and "constraints.txt" in copied
