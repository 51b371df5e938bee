"""Artefacts that were damaged, by accident or on purpose, are refused in one line and never half loaded."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobula.artifact import load_policy, sealed
from mobula.errors import ArtifactError, ConfigError
from mobula.serving.app import build, identified
from mobula.serving.backend import LocalBackend
from mobula.serving.services import load_service, save_service


def copied(source: str, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@pytest.mark.parametrize("name", ["cart", "bandit", "planner", "tiny"])
def test_flipped_bits_truncation_and_lost_files(name: str, artefacts: dict[str, str], tmp_path: Path) -> None:
    """What loads in spite of a changed byte is the same to the last bit (a blank in the JSON, say)."""
    draws = random.Random(name)
    load: Any = load_policy if name in ("cart", "bandit") else load_service
    files = sorted(file for file in Path(artefacts[name]).rglob("*") if file.is_file())
    refused = 0
    for trial in range(120):
        folder = copied(artefacts[name], tmp_path / str(trial))
        file = folder / draws.choice(files).relative_to(artefacts[name])
        data = bytearray(file.read_bytes())
        how = draws.choice(["flip", "flip", "flip", "cut", "grow", "lose"])
        if how == "flip":
            place = draws.randrange(len(data))
            data[place] ^= 1 << draws.randrange(8)
        elif how == "cut":
            del data[draws.randrange(len(data)) :]
        elif how == "grow":
            data += bytes(draws.randrange(1, 9))
        file.write_bytes(bytes(data))
        if how == "lose":
            file.unlink()
        try:
            found = load(folder)
        except ArtifactError:
            refused += 1
        else:
            version = found.version if load is load_policy else found[1].version
            assert version == (
                load(artefacts[name]).version if load is load_policy else load(artefacts[name])[1].version
            )
            assert how == "flip" and file.suffix == ".json"
        shutil.rmtree(folder)
    assert refused > 100


def forged(source: str, target: Path, change: Any) -> Path:
    """A copy whose manifest `change` has altered, sealed again as somebody who knows the format would."""
    folder = copied(source, target)
    file = next(file for name in ("policy.json", "service.json") if (file := folder / name).is_file())
    manifest = json.loads(file.read_text())
    manifest.pop("digest")
    change(manifest)
    file.write_text(json.dumps(sealed(manifest)))
    return folder


WRONG: list[Any] = [None, [], {}, "x", -1, 1e300, 2**70, True, [[]], {"type": "Box"}]


def test_forged_manifests_of_policies(artefacts: dict[str, str], tmp_path: Path) -> None:
    """Every field with values of every wrong kind: refused, or harmless where the field is a note."""
    original = json.loads((Path(artefacts["cart"]) / "policy.json").read_text())
    notes = {
        "env",
        "env_config",
        "training_iteration",
        "versions",
        "explore",
        "hyperparameters",
        "model_config",
    }
    for field in original.keys() - {"digest"}:
        for number, value in enumerate([*WRONG, "missing"]):

            def change(manifest: dict[str, Any], field: str = field, value: Any = value) -> None:
                if value == "missing":
                    del manifest[field]
                else:
                    manifest[field] = value

            folder = forged(artefacts["cart"], tmp_path / f"{field}{number}", change)
            try:
                policy = load_policy(folder)
            except ArtifactError:
                continue
            # Python takes True for 1.
            assert field in notes or (field, value) == ("format_version", True), (field, value)
            policy.check([0.0, 0.0, 0.0, 0.0])


def test_a_manifest_cannot_name_code(artefacts: dict[str, str], tmp_path: Path) -> None:
    for method in ("os.system", "mobula.pyfunc", "../mac", "builtins", "mac"):
        folder = forged(
            artefacts["cart"], tmp_path / method.replace("/", "_"), lambda m, n=method: m.update(method=n)
        )
        with pytest.raises(ArtifactError):
            load_policy(folder)
    for number, loader in enumerate(["os:system", "subprocess.Popen", "nobody", 3]):
        folder = forged(
            artefacts["planner"], tmp_path / f"loader{number}", lambda m, n=loader: m.update(loader=n)
        )
        with pytest.raises(ArtifactError):
            load_service(folder)


@pytest.mark.parametrize("how", ["dtype", "shape", "missing", "name"])
def test_weights_that_do_not_fit(how: str, artefacts: dict[str, str], tmp_path: Path) -> None:
    folder = copied(artefacts["cart"], tmp_path / "p")
    weights = load_file(folder / "weights.safetensors")
    name = sorted(weights)[0]
    value = weights.pop(name)
    if how == "dtype":
        weights[name] = value.half()
    elif how == "shape":
        weights[name] = torch.zeros(*value.shape, 2)
    elif how == "name":
        weights[f"{name}.x"] = value
    save_file(weights, folder / "weights.safetensors")
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    with pytest.raises(ArtifactError, match="has been changed"):
        load_policy(folder)
    folder = forged(str(folder), tmp_path / "q", lambda m: m.update(weights_sha256=digest))
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        load_policy(folder)


def test_policies_of_another_method(artefacts: dict[str, str], tmp_path: Path) -> None:
    folder = copied(artefacts["cart"], tmp_path / "mixed")
    shutil.copy(Path(artefacts["swing"]) / "weights.safetensors", folder)
    with pytest.raises(ArtifactError, match="has been changed"):
        load_policy(folder)


NAMES = ["../out", "/etc/passwd", "a/../../out", "a//b", "", ".", "a\\b", "c:x", "a\nb", "x" * 600]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_of_the_folder(name: str, artefacts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no name of a file"):
        save_service(tmp_path / "new", "vickrey", {"reserve": 1.0}, {name: b"x"})
    assert not (tmp_path / "new").exists() and not (tmp_path / "out").exists()
    folder = forged(artefacts["planner"], tmp_path / "forged", lambda m: m["files"].update({name: "0" * 64}))
    with pytest.raises(ArtifactError, match="no name of a file"):
        load_service(folder)


def test_links_that_lead_out_of_the_folder(artefacts: dict[str, str], tmp_path: Path) -> None:
    folder = copied(artefacts["planner"], tmp_path / "linked")
    (tmp_path / "outside.json").write_bytes((folder / "walls.json").read_bytes())
    (folder / "walls.json").unlink()
    (folder / "walls.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ArtifactError, match="no file of the artefact's own"):
        load_service(folder)


def test_settings_that_the_service_does_not_take(artefacts: dict[str, str], tmp_path: Path) -> None:
    for number, value in enumerate(WRONG):
        folder = forged(artefacts["planner"], tmp_path / str(number), lambda m, v=value: m.update(settings=v))
        with pytest.raises(ArtifactError):
            load_service(folder)[0]


def test_deployment_is_refused_before_anything_runs(artefacts: dict[str, str], tmp_path: Path) -> None:
    """`build` needs no cluster: a bad artefact or argument ends there."""
    bad = copied(artefacts["cart"], tmp_path / "bad")
    (bad / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cart is not served"):
        identified("cart", str(bad))
    for args, error, said in (
        ({}, ConfigError, "artefacts"),
        ({"artefacts": {}, "tokens": None}, ConfigError, "artefacts"),
        ({"artefacts": {"../x": artefacts["cart"]}, "tokens": None}, ConfigError, "name"),
        ({"artefacts": {"cart": artefacts["cart"]}, "tokens": {}}, ConfigError, "token new"),
        ({"artefacts": {"cart": artefacts["cart"]}, "tokens": None, "timeout": 3}, ConfigError, "timeout"),
        ({"artefacts": {"cart": str(bad)}, "tokens": None}, ArtifactError, "cart is not served"),
        ({"artefacts": {"cart": str(tmp_path / "none")}, "tokens": None}, ArtifactError, "no folder"),
        ({"artefacts": {"cart": str(tmp_path)}, "tokens": None}, ArtifactError, "no artefact"),
        ({"artefacts": {"cart": "models:/nobody/1"}, "tokens": None}, ArtifactError, "MLflow"),
    ):
        with pytest.raises(error, match=said):
            build(args)
    with pytest.raises(ArtifactError):
        LocalBackend({"cart": str(bad)})
