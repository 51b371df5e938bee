"""Ways to a design side by side: SilMD, DolMD, descent along the exact derivative (sensitivity analysis), alternation.

One run, one thread, the same network, starts and steps: seconds as multiples of SilMD's, and the objective that each reaches at an
exact equilibrium.  The network is Sioux Falls where MOBULA_SIOUXFALLS names its folder, else a grid of 36 nodes.
Results: benchmarks/results/congestion.{json,md}.  Run by `python -m benchmarks.congestion`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobula.algorithms.markets.baselines import heuristics
from mobula.algorithms.markets.baselines.sab import sab
from mobula.algorithms.markets.stackelberg_congestion.method import StackelbergCongestionConfig
from mobula.algorithms.markets.stackelberg_congestion.search import Search, iterate
from mobula.envs.markets.design import SIOUXFALLS, Problem, evaluate
from mobula.files import write_json, write_text
from mobula.versions import machine, versions

RESULTS = Path(__file__).parent / "results"
XI, LIMIT = 1e-2, 100


def searched(problem: Problem, **knobs: Any) -> Any:
    """DolMD or SilMD from no design, until the design changes by less than XI."""
    config = StackelbergCongestionConfig().training(xi=XI, **knobs)
    demand = torch.from_numpy(problem.network.demand).expand(1, 1, -1)
    search = Search(
        problem, config.settings(problem), demand, torch.zeros(1, problem.size, dtype=torch.float64)
    )
    while not search.converged and search.n < LIMIT:
        iterate(search)
    return search.y[0].numpy(), search.n


def main() -> None:
    torch.set_num_threads(1)
    name = "siouxfalls" if os.environ.get(SIOUXFALLS) else "grid6"
    problem = StackelbergCongestionConfig().training(network=name, objective="cndp").problem()
    steps = {"alpha": 0.5, "beta": 10.0, **problem.steps}
    common = {} if problem.steps else {"alpha": 0.5, "beta": 10.0}

    def descent() -> Any:
        return sab(problem, alpha=steps["alpha"], beta=steps["beta"], xi=XI, iterations=LIMIT, gap=1e-7)

    ways: dict[str, Callable[[], Any]] = {
        "SilMD": lambda: searched(problem, **common),
        "DolMD": lambda: searched(problem, algorithm="dolmd", **common),
        "sensitivity analysis": descent,
        "alternation": lambda: (heuristics.ioa(problem), None),
    }
    rows = []
    for label, way in ways.items():
        start = time.process_time()
        y, count = way()
        seconds = time.process_time() - start
        objective = evaluate(problem, y).objective
        rows.append({"way": label, "seconds": seconds, "iterations": count, "objective": objective})
    first = rows[0]["seconds"]
    for row in rows:
        row["ratio"] = row["seconds"] / first
    nothing = evaluate(problem, np.zeros(problem.size)).objective
    write_json(
        RESULTS / "congestion.json",
        {
            "network": problem.network.name,
            "no_design": nothing,
            "rows": rows,
            "machine": machine(),
            "versions": versions(),
        },
    )
    lines = [
        f"Capacities on {problem.size} links of {problem.network.name} ({problem.network.num_links} links,"
        f" {problem.network.num_ods} OD pairs), from no design until a step changes it by less than {XI:g}; CPU seconds of one thread"
        f" ({machine()['architecture']}), torch {torch.__version__}. Objective without a design {nothing:.4f}.",
        "",
        "| | objective at equilibrium | iterations | seconds | times SilMD |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['way']} | {r['objective']:.4f} | {r['iterations'] or ''} | {r['seconds']:.1f} | {r['ratio']:.1f} |"
            for r in rows
        ),
    ]
    write_text(RESULTS / "congestion.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
