"""The shape of the repository: four links, no shadowed standard library, everything registered."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("algorithms", "envs", "cluster", "dashboards")


@pytest.mark.parametrize("name", LINKS)
def test_the_top_level_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "platform" / "mobula" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name
    assert (link / "__init__.py").is_file()


def test_the_standard_library_s_platform_module_is_not_shadowed() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import sys; sys.path.insert(0, '.'); import platform; print(platform.python_version())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sys.version.split()[0]


def test_types_are_shipped() -> None:
    assert (ROOT / "platform" / "mobula" / "py.typed").is_file()


def _classes(folder: str, base_suffix: str) -> set[str]:
    """ "module:Class" of the documented classes that derive from a class whose name ends in `base_suffix`."""
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        module = "mobula." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                if any(base.endswith(base_suffix) for base in bases):
                    found.add(f"{module}:{node.name}")
    return found


def test_every_method_is_registered_and_every_registered_one_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    registered = set(project["entry-points"]["mobula.methods"].values())
    configs = _classes("algorithms", "Config")
    # Bases that methods of a family share are no methods: their docstring says so.
    from mobula.registry import summary

    assert registered == {target for target in configs if "(base class)" not in summary(target)}


def test_every_registered_environment_exists() -> None:
    from mobula.registry import summary

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for target in project["entry-points"]["mobula.envs"].values():
        assert not summary(target).startswith("("), target
