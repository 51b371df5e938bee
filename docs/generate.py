"""Writes docs/methods/ and docs/ledger.md before the site is built: a page a method, from its config class and the ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent


def on_pre_build(config: Any) -> None:
    """mkdocs calls this first."""
    from mobula import registry
    from mobula.method import MethodConfig

    folder = DOCS / "methods"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = ["# Methods", "", "| name | what it is |", "| --- | --- |"]
    for entry in registry.methods():
        cls: Any = registry.config_class(entry.name)
        if issubclass(cls, MethodConfig):
            (folder / f"{entry.name}.md").write_text(page(entry, cls, folder), encoding="utf-8")
            lines.append(f"| [{entry.name}]({entry.name}.md) | {entry.summary} |")
        else:
            lines.append(f"| {entry.name} | {entry.summary} (RLlib's own) |")
    (folder / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ledger = (ROOT / "reproductions" / "README.md").read_text(encoding="utf-8")
    for figure in (ROOT / "reproductions").glob("*/*.png"):
        target = DOCS / "methods" / f"{figure.parent.name}-{figure.name}"
        shutil.copy(figure, target)
        ledger = ledger.replace(f"({figure.parent.name}/{figure.name})", f"(methods/{target.name})")
    (DOCS / "ledger.md").write_text(ledger.replace("# Reproductions", "# Ledger", 1), encoding="utf-8")


def page(entry: Any, cls: Any, folder: Path) -> str:
    """One method's page."""
    from mobula.tuning import describe

    lines = [f"# {entry.name}", "", entry.summary, ""]
    if cls.when:
        lines += ["## When to use it, and when not", "", cls.when, ""]
    lines += ["```", f"mobula train {entry.name} --help", "```", "", "## Hyper-parameters", ""]
    lines += ["| name | default | allowed | search space | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, knob in cls.hyperparameters().items():
        lines.append(
            f"| `{name}` | {knob.default} | {knob.range} | {'' if knob.space is None else describe(knob.space)} | {knob.help} |"
        )
    if cls.effort:
        lines += ["", "## What an iteration costs", "", cls.effort]
    result = ROOT / "reproductions" / entry.name / "result.json"
    if result.is_file():
        from mobula.experiment.ledger import MARKS, interval

        found = json.loads(result.read_text(encoding="utf-8"))
        lines += [
            "",
            "## What its experiment found",
            "",
            "| claim | task | value [95 %] | wanted | verdict |",
        ]
        lines.append("| --- | --- | --- | --- | --- |")
        for claim in found["claims"]:
            verdict = MARKS[claim["verdict"]] + (" (exploratory)" if claim["exploratory"] else "")
            lines.append(
                f"| {claim['statement']} | {claim['task']} | {interval(claim)} | {claim['criterion']} | {verdict} |"
            )
        if found["notes"]:
            lines += ["", found["notes"]]
        lines += [""] + [f"![{entry.name}]({entry.name}-{figure})" for figure in found["figures"]]
        lines += ["", f"`mobula reproduce {entry.name}` runs it again."]
    if cls.citation:
        lines += ["", "## Citation", "", "```bibtex", cls.citation, "```"]
    return "\n".join(lines) + "\n"
