"""Imports point one way: families -> core, envs -> core; families never import each other."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imported(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(root: Path) -> list[str]:
    """Imports that go the wrong way, as "file imports module"."""
    found = []
    core = root / "platform" / "mobula"
    linked = {link for link in core.iterdir() if link.is_symlink()} if core.is_dir() else set()
    for file in core.rglob("*.py"):
        if any(link in file.parents for link in linked):
            continue
        for module in imported(file):
            if module.startswith(("mobula.algorithms", "mobula.envs", "mobula.dashboards")):
                found.append(f"{file.relative_to(root)} imports {module}")
    for file in (root / "envs").rglob("*.py"):
        found += [
            f"{file.relative_to(root)} imports {m}"
            for m in imported(file)
            if m.startswith("mobula.algorithms")
        ]
    for file in (root / "algorithms").rglob("*.py"):
        family = file.relative_to(root).parts[1]
        for module in imported(file):
            parts = module.split(".")
            if (
                parts[:2] == ["mobula", "algorithms"]
                and len(parts) > 2
                and parts[2] not in (family, "common")
            ):
                found.append(f"{file.relative_to(root)} imports {module}")
    return sorted(found)


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_the_check_finds_each_kind_of_wrong_import(tmp_path: Path) -> None:
    files = {
        "platform/mobula/method.py": "def f():\n    from mobula.algorithms.games import x\n",
        "envs/grid.py": "import mobula.algorithms.offline.sql\n",
        "algorithms/games/a.py": "from mobula.algorithms import offline\nfrom mobula.algorithms.common import lp\n",
        "algorithms/offline/b.py": "from mobula.algorithms.offline import c\nimport mobula.envs.x\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = violations(tmp_path)
    assert {line.split(" ")[0] for line in found} == {
        "platform/mobula/method.py",
        "envs/grid.py",
        "algorithms/games/a.py",
    }
