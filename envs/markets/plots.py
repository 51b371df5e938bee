"""Networks drawn with their flows: width is flow, colour is volume over capacity, designs are written on their links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mobula.envs.markets.design import Evaluation, Problem, evaluate
from mobula.envs.markets.networks import Array, Network
from mobula.errors import DataError
from mobula.files import storage


def draw_network(
    axes: Any,
    network: Network,
    x: Array,
    capacity: Array,
    labels: dict[int, str] | None = None,
    *,
    top: float = 1.5,
) -> Any:
    """Draws link flows x [A] into `axes`; `labels`: {row: text}.  Returns what a colour bar needs (colours end at `top`).

    The two directions of a street run side by side, each to the right of its way.
    """
    from matplotlib import patheffects
    from matplotlib.collections import LineCollection
    from matplotlib.markers import MarkerStyle
    from matplotlib.transforms import Affine2D

    if network.xy is None:
        raise DataError(f"{network.name}: no positions of nodes to draw it with (NAME_node.tntp)")
    xy = np.array(network.xy, dtype=np.float64)
    # Longitudes and latitudes, or anything else, to one unit a typical link.
    span = np.ptp(xy, axis=0)
    xy = (xy - xy.min(0)) / np.where(span > 0, span, 1.0)
    wide = float(span[0] / span[1]) if span[1] > 0 else 3.0
    xy[:, 0] *= min(max(wide, 0.6), 2.2)
    start, end = xy[network.tail], xy[network.head]
    way = end - start
    length = np.linalg.norm(way, axis=1, keepdims=True)
    unit = way / np.maximum(length, 1e-12)
    typical = float(np.median(length))
    pairs = set(zip(network.tail.tolist(), network.head.tolist(), strict=True))
    both = np.array(
        [(j, i) in pairs for i, j in zip(network.tail.tolist(), network.head.tolist(), strict=True)]
    )
    seen: dict[tuple[int, int], int] = {}
    order = []
    for pair in zip(network.tail.tolist(), network.head.tolist(), strict=True):
        order.append(seen.get(pair, 0))
        seen[pair] = order[-1] + 1
    aside = (0.06 * both + 0.12 * np.array(order)) * typical
    right = np.stack([unit[:, 1], -unit[:, 0]], axis=1) * aside[:, None]
    gap = 0.12 * typical
    a, b = start + right + unit * gap, end + right - unit * gap
    widest = float(x.max()) if x.max() > 0 else 1.0
    few = network.num_links <= 80
    widths = 0.6 + (7.0 if few else 4.0) * x / widest
    lines = LineCollection(
        np.stack([a, b], axis=1).tolist(),
        linewidths=widths,
        array=x / capacity,
        cmap="viridis_r",
        clim=(0.0, top),
        capstyle="butt",
        zorder=2,
    )
    axes.add_collection(lines)
    colours = lines.cmap(lines.norm(x / capacity))
    for k in np.flatnonzero(x > 0.02 * widest):
        # A triangle along the way, a little beyond its middle.
        turned = MarkerStyle(">", transform=Affine2D().rotate(float(np.arctan2(unit[k, 1], unit[k, 0]))))
        axes.scatter(
            *(0.4 * a[k] + 0.6 * b[k]),
            marker=turned,
            s=(widths[k] + (5.0 if few else 2.5)) ** 2,
            color=colours[k],
            edgecolors="white",
            linewidths=0.7 if few else 0.3,
            zorder=3,
        )
    axes.scatter(*xy.T, s=170 if few else 14, color="white", edgecolors="0.35", linewidths=0.8, zorder=4)
    if few:
        for node, (px, py) in enumerate(xy):
            axes.text(px, py, str(node + 1), ha="center", va="center", fontsize=7, color="0.2", zorder=5)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    for row, text in (labels or {}).items():
        axes.annotate(
            text,
            0.62 * a[row] + 0.38 * b[row],
            xytext=tuple(np.array([unit[row, 1], -unit[row, 0]]) * [18 if few else 12, 11 if few else 8]),
            textcoords="offset points",
            fontsize=8 if few else 6.5,
            color="#b30000",
            ha="center",
            va="center",
            zorder=6,
            path_effects=halo,
        )
    margin = 0.3 * typical
    axes.set_xlim(xy[:, 0].min() - margin, xy[:, 0].max() + margin)
    axes.set_ylim(xy[:, 1].min() - margin, xy[:, 1].max() + margin)
    axes.set_aspect("equal")
    axes.axis("off")
    return lines


def draw_into(axes: Any, problem: Problem, y: Array, found: Evaluation, title: str, top: float = 1.5) -> Any:
    """One design at its equilibrium; returns what a colour bar needs."""
    _, add = problem.spread(y)
    sign = "+" if problem.kind == "capacity" else ""
    labels = {
        int(row): f"{sign}{value:.3g}"
        for row, value in zip(problem.links, y, strict=True)
        if value > 0.01 * max(float(y.max()), 1e-12)
    }
    lines = draw_network(axes, problem.network, found.x, problem.network.capacity + add, labels, top=top)
    axes.set_title(title, fontsize=10)
    return lines


def draw_design(problem: Problem, y: Array, found: Evaluation, path: Path) -> None:
    """Writes a figure of the equilibrium without a design beside that of the design `y`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    none = np.zeros(problem.size)
    before = evaluate(problem, none)
    what = "capacity added" if problem.kind == "capacity" else "tolls"
    top = max(1.0, float(np.quantile(before.x / problem.network.capacity, 0.95)))
    xy = problem.network.xy
    tall = 1.0 if xy is None else float(np.ptp(xy[:, 1]) / max(float(np.ptp(xy[:, 0])), 1e-12))
    height = 1.3 + 5.2 * min(max(tall, 0.45), 1.0)
    figure, panels = plt.subplots(1, 2, figsize=(12, height), layout="constrained")
    draw_into(panels[0], problem, none, before, f"no design: objective {before.objective:.5g}", top)
    title = f"{what} in red: objective {found.objective:.5g}"
    lines = draw_into(panels[1], problem, y, found, title, top)
    figure.suptitle(
        f"{problem.network.name}, {problem.objective}: users' equilibrium, width = flow", fontsize=11
    )
    figure.colorbar(lines, ax=panels, shrink=0.8, extend="max", label="volume / capacity")
    with storage(path):
        figure.savefig(path, dpi=130)
    plt.close(figure)
