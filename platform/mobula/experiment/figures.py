"""Figures of experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobula.experiment.core import Results, Task
from mobula.files import storage

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def band(curves: np.ndarray[Any, Any], seed: int = 0) -> tuple[Any, Any, Any]:
    """(mean, low, high) of curves [seeds, points]: 95 % percentile bootstrap over seeds, at each point."""
    rng = np.random.default_rng(seed)
    drawn = curves[rng.integers(len(curves), size=(2000, len(curves)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return curves.mean(axis=0), low, high


def learning_curves(
    ylabel: str,
    *,
    reference: Callable[[Task], float] | None = None,
    reference_label: str = "optimum",
    labels: Mapping[str, str] | None = None,
    xlabel: str = "environment steps",
    arms: Sequence[str] | None = None,
    gain_over: Mapping[str, tuple[str, str]] | None = None,
    file: str = "figure.png",
) -> Callable[[Results, Path], list[str]]:
    """One panel a task: mean over seeds of "curve_values" against "curve_steps", with a 95 % bootstrap band, an arm a colour
    (`arms`: which of them; default all).

    gain_over: {task: (arm, label of the axis)} where curves lie so close that what they save on that arm's mean is drawn instead.
    """

    def draw(results: Results, folder: Path) -> list[str]:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        tasks = results.experiment.tasks
        figure, panels = plt.subplots(
            1, len(tasks), figsize=(4.6 * len(tasks), 3.9), layout="constrained", squeeze=False
        )
        handles: dict[str, Any] = {}
        for axes, (name, task) in zip(panels[0], tasks.items(), strict=True):
            for place, arm in enumerate(arms or results.experiment.arms):
                colour, style = COLOURS[place % len(COLOURS)], "-" if place < len(COLOURS) else "--"
                cells = results[arm, name]
                if not cells:
                    continue
                steps = np.asarray(cells[0]["curve_steps"])
                curves = np.asarray([np.interp(steps, c["curve_steps"], c["curve_values"]) for c in cells])
                if name in (gain_over or {}):
                    base = results[gain_over[name][0], name]  # type: ignore[index]
                    curves = (
                        np.mean([np.interp(steps, c["curve_steps"], c["curve_values"]) for c in base], 0)
                        - curves
                    )
                middle, low, high = band(curves)
                (line,) = axes.plot(steps, middle, style, color=colour, linewidth=2)
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
                handles.setdefault((labels or {}).get(arm, arm), line)
            if reference is not None:
                line = axes.axhline(reference(task), color="0.35", linestyle="--", linewidth=1)
                handles.setdefault(reference_label, line)
            about = ", ".join(f"{k}={v}" for k, v in task.env_config.items())
            what = f"{task.env} {about}".strip()
            axes.set_title(f"{name}: {what} ({task.seeds} seeds)", fontsize=9)
            axes.set_xlabel(xlabel)
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            if name in (gain_over or {}):
                axes.set_ylabel(gain_over[name][1])  # type: ignore[index]
            axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 4), useMathText=True)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylabel(ylabel)
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(3 * len(tasks), len(handles)),
            frameon=False,
        )
        with storage(folder / file):
            figure.savefig(folder / file, dpi=140)
        plt.close(figure)
        return [file]

    return draw
