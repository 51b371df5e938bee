"""The experiment of DolMD and SilMD: network design and tolls against heuristics, every design judged at an exact equilibrium.

The methods are deterministic.  A "seed" multiplies every OD demand by a factor of its own from U[0.95, 1.05]; seed 0 leaves them as
they are.  Sioux Falls is read from the folder that MOBULA_SIOUXFALLS names; without it those tasks are not run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobula.algorithms.markets.baselines import heuristics
from mobula.algorithms.markets.baselines.cutting_plane import cutting_plane
from mobula.algorithms.markets.baselines.sab import sab
from mobula.algorithms.markets.stackelberg_congestion.method import StackelbergCongestionConfig
from mobula.algorithms.markets.stackelberg_congestion.search import Search, iterate
from mobula.envs.markets import design as designs
from mobula.envs.markets.design import Problem, siouxfalls_folder
from mobula.errors import DataError
from mobula.experiment import (
    Arm,
    Claim,
    Estimate,
    Experiment,
    Task,
    above,
    at_least,
    below,
    mean_of,
    paired_difference,
    ratio_of_means,
    within,
)
from mobula.experiment.core import Results, Statistic
from mobula.experiment.statistics import exact
from mobula.files import storage

ITERATIONS = 1500
POINTS = 60


def problem_of(config: Any, task: Task, seed: int) -> Problem:
    """The task's problem with the demands of that seed."""
    names = ("network", "objective")
    chosen = config.copy(copy_frozen=False).training(
        **{name: task.env_config[name] for name in names if name in task.env_config}
    )
    problem = chosen.problem()
    if seed == 0:
        return problem
    factors = np.random.default_rng(seed).uniform(0.95, 1.05, problem.network.num_ods)
    return replace(problem, network=replace(problem.network, demand=problem.network.demand * factors))


def judged(problem: Problem, y: Any, **more: Any) -> dict[str, Any]:
    """The numbers of a design: objective, travel time, gap, the design itself."""
    found = designs.evaluate(problem, y)
    numbers = {"objective": found.objective, "travel_time": found.travel_time, "gap": found.gap}
    if problem.kind == "toll":
        numbers["normalised"] = designs.bounds(problem).normalised(found.travel_time)
    return {**numbers, "design": np.asarray(y).tolist(), **more}


def run(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """DolMD or SilMD from every start, all seeds and starts side by side; the best start of each seed counts."""
    problems = [problem_of(config, task, seed) for seed in seeds]
    chosen = config.copy(copy_frozen=False).training(**dict(task.env_config))
    settings = chosen.settings(problems[0])
    # Users and designs of all seeds in one batch: [1, seeds x starts, ...], each with demands of its own.
    each = [chosen.starts(problem)[1]() for problem in problems]
    count = len(each[0])
    demand = torch.stack(
        [torch.from_numpy(p.network.demand) for p in problems for _ in range(count)]
    ).unsqueeze(0)
    before = time.perf_counter()
    search = Search(problems[0], settings, demand, torch.cat(each))
    trace = []
    while not search.converged and search.n < ITERATIONS:
        F, _ = iterate(search)
        trace.append(F[0])
    seconds = time.perf_counter() - before
    curves = torch.stack(trace)
    at = np.unique(np.linspace(0, len(trace) - 1, POINTS).round().astype(int))
    found = []
    for j, problem in enumerate(problems):
        rows = [judged(problem, search.y[j * count + i].numpy()) for i in range(count)]
        best = min(range(count), key=lambda i: rows[i]["objective"])
        found.append(
            {
                **rows[best],
                "start": best,
                "starts": [row.get("normalised", row["objective"]) for row in rows],
                "unrolled": float(curves[-1, j * count + best]),
                "iterations": search.n,
                "converged": float(search.converged),
                "paths": len(search.paths),
                "seconds": seconds / len(problems),
                "curve_steps": (at + 1).tolist(),
                "curve_values": curves[at, j * count + best].tolist(),
            }
        )
    return found


def each_seed(function: Any) -> Any:
    """A run of an arm from a function problem -> (design, more numbers)."""

    def go(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
        found = []
        for seed in seeds:
            problem = problem_of(config, task, seed)
            before = time.perf_counter()
            y, more = function(problem)
            seconds = time.perf_counter() - before
            found.append(judged(problem, y, seconds=seconds, **more))
        return found

    return go


def _nothing(problem: Problem) -> Any:
    return np.zeros(problem.size), {}


def _ioa(problem: Problem) -> Any:
    return heuristics.ioa(problem), {}


def _so_design(problem: Problem) -> Any:
    y, value = heuristics.so_design(problem)
    return y, {"lower_bound": value}


def _mct(problem: Problem) -> Any:
    return heuristics.mct(problem), {}


def _emcdt(problem: Problem) -> Any:
    return heuristics.emcdt(problem), {}


def _ct(problem: Problem) -> Any:
    return heuristics.ct(problem), {}


def _sab(problem: Problem) -> Any:
    """From every start that the algorithms have, with the instance's step sizes; the best of them."""
    steps = problem.steps
    starts = [np.zeros(problem.size)]
    if problem.kind == "toll":
        starts.append(heuristics.mct(problem))
    found = [
        sab(problem, start, alpha=steps["alpha"], beta=steps["beta"], xi=steps["xi"], iterations=ITERATIONS)
        for start in starts
    ]
    y, n = min(found, key=lambda pair: designs.evaluate(problem, pair[0]).objective)
    return y, {"iterations": n}


def _annealing(problem: Problem) -> Any:
    top = 3.0 if problem.kind == "capacity" else 8.0
    return heuristics.annealing(problem, top=top, evaluations=500), {}


def _cutting_plane(problem: Problem) -> Any:
    """`restricted` is a lower bound only if the last problem was solved globally, which a local method does not show."""
    found = cutting_plane(problem)
    more = {"restricted": found.values[-1], "cuts": found.cuts, "converged": float(found.converged)}
    return found.y, more


def _best(problem: Problem) -> Any:
    """Best known: a global search, then descent with the exact derivative."""
    y, _ = _annealing(problem)
    steps = problem.steps
    polished, _ = sab(problem, y, alpha=steps["alpha"], beta=0.0, xi=1e-8, iterations=4000)
    return min((y, polished), key=lambda z: designs.evaluate(problem, z).objective), {}


run_nothing, run_ioa, run_so, run_mct = (
    each_seed(_nothing),
    each_seed(_ioa),
    each_seed(_so_design),
    each_seed(_mct),
)
run_emcdt, run_ct, run_sab = each_seed(_emcdt), each_seed(_ct), each_seed(_sab)
run_annealing, run_best = each_seed(_annealing), each_seed(_best)
run_cutting_plane = each_seed(_cutting_plane)


# Statistics -------------------------------------------------------------------------------------------------


def extreme_ratio(first: tuple[str, str], second: tuple[str, str], *, largest: bool = True) -> Statistic:
    """Largest (or smallest) ratio over seeds of one (metric, arm) to another: a count of numbers that are not random."""

    def ratio(results: Results, task: str) -> Estimate:
        a, b = results.values(*first, task), results.values(*second, task)
        if len(a) != len(b):
            raise KeyError(f"{first[1]} and {second[1]} on {task}")
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        return exact(max(ratios) if largest else min(ratios), len(ratios))

    return ratio


def difference_at_first(metric: str, first: str, second: str) -> Statistic:
    """`metric` of one arm minus that of the other at seed 0, the demands of the literature."""

    def gap(results: Results, task: str) -> Estimate:
        return exact(results.values(metric, first, task)[0] - results.values(metric, second, task)[0])

    return gap


# Figures ----------------------------------------------------------------------------------------------------

LABELS = {
    "silmd": "SilMD",
    "silmd_T1": "SilMD, T=1",
    "dolmd": "DolMD",
    "sab": "sensitivity analysis",
    "ioa": "alternation (IOA)",
    "so_design": "joint optimum's design",
    "mct": "marginal-cost tolls",
    "emcdt": "EMCDT",
    "ct": "links in turn",
    "annealing": "dual annealing",
    "cutting_plane": "cutting planes",
    "best": "best known",
    "nothing": "no design",
}
TITLES = {
    "braess": "Braess, capacities",
    "hearn9": "nine nodes, tolls",
    "siouxfalls_cndp": "Sioux Falls, capacities",
    "siouxfalls_both": "Sioux Falls, capacities, with DolMD",
    "siouxfalls_sctp": "Sioux Falls, tolls",
    "grid10": "grid 10 x 10, tolls",
}


def draw(results: Results, folder: Path) -> list[str]:
    """figure.png: every arm on every task; search.png: the objective along the search; networks with their designs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mobula.experiment.figures import COLOURS

    tasks = [t for t in results.experiment.tasks if any(results[a, t] for a in results.experiment.arms)]
    files = ["figure.png", "search.png"]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )
    for axes, task in zip(panels.flat, tasks, strict=False):
        arms = [arm for arm in LABELS if arm in results.experiment.arms and results[arm, task]]
        metric = "normalised" if "normalised" in results[arms[0], task][0] else "objective"
        for place, arm in enumerate(arms):
            values = [cell[metric] for cell in results[arm, task]]
            ours = arm.startswith(("silmd", "dolmd"))
            axes.scatter(values, [place] * len(values), color=COLOURS[1 if ours else 0], alpha=0.6, s=22)
            axes.scatter(np.mean(values), place, marker="|", color="black", s=150)
        axes.set_yticks(range(len(arms)), [LABELS[arm] for arm in arms], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(
            "excess of the system optimum, 1: no toll"
            if metric == "normalised"
            else "objective at equilibrium",
            fontsize=8,
        )
        seeds = max(len(results[arm, task]) for arm in arms)
        axes.set_title(f"{TITLES[task]} ({seeds} demand tables)", fontsize=9)
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    _save(figure, panels, folder / "figure.png")
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )
    for axes, task in zip(panels.flat, tasks, strict=False):
        for colour, arm in zip(COLOURS[1:], ("silmd", "silmd_T1", "dolmd"), strict=False):
            for k, cell in enumerate(results[arm, task] if arm in results.experiment.arms else []):
                axes.plot(
                    cell["curve_steps"],
                    cell["curve_values"],
                    color=colour,
                    linewidth=2 if k == 0 else 0.8,
                    alpha=1 if k == 0 else 0.5,
                    label=LABELS[arm] if k == 0 else None,
                )
        axes.set_xscale("log")
        axes.set_xlabel("iterations of the leader", fontsize=8)
        axes.set_title(f"{TITLES[task]} (thick: demands as published)", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("objective at unrolled flows", fontsize=8)
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    _save(figure, panels, folder / "search.png")
    from mobula.envs.markets.plots import draw_design

    for task in ("hearn9", "siouxfalls_cndp", "grid10"):
        if task in tasks and results["silmd", task]:
            config = results.experiment.arm("silmd").config
            problem = problem_of(config, results.experiment.tasks[task], 0)
            y = np.asarray(results["silmd", task][0]["design"])
            draw_design(problem, y, designs.evaluate(problem, y), folder / f"network_{task}.png")
            files.append(f"network_{task}.png")
    return files


def _save(figure: Any, panels: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    with storage(path):
        figure.savefig(path, dpi=130)
    plt.close(figure)


# Experiment -------------------------------------------------------------------------------------------------


def experiment() -> Experiment:
    """Arms, tasks, claims; the numbering follows the claims of the method's description."""
    try:
        folder, reason = siouxfalls_folder(), ""
    except DataError as error:
        folder, reason = "", str(error)
    cndp, both, sctp = "siouxfalls_cndp", "siouxfalls_both", "siouxfalls_sctp"
    falls = (cndp, both, sctp) if folder else ()

    def arm(run: Any, *tasks: str, config: Any = None, **more: Any) -> Arm:
        kept = tuple(task for task in tasks if task in falls or not task.startswith("siouxfalls"))
        return Arm(config or StackelbergCongestionConfig(), run=run, tasks=kept or ("",), **more)

    silmd = StackelbergCongestionConfig()
    dolmd = StackelbergCongestionConfig().training(algorithm="dolmd")
    arms = {
        "silmd": arm(
            run,
            "braess",
            "hearn9",
            cndp,
            both,
            sctp,
            "grid10",
            config=silmd,
            per_task={sctp: {"T": 20, "init": ["zero"]}},
        ),
        "silmd_T1": arm(run, "braess", config=StackelbergCongestionConfig().training(T=1)),
        "dolmd": arm(
            run, "braess", "hearn9", both, config=dolmd, per_task={both: {"xi": 1e-2}, "hearn9": {"r": 0.02}}
        ),
        "sab": arm(run_sab, "braess", "hearn9", batch=1),
        "ioa": arm(run_ioa, "braess", cndp, both),
        "so_design": arm(run_so, "braess", cndp, both),
        "mct": arm(run_mct, "hearn9", sctp, "grid10"),
        "emcdt": arm(run_emcdt, "hearn9"),
        "ct": arm(run_ct, "hearn9"),
        "annealing": arm(run_annealing, "braess", "hearn9", batch=1),
        "cutting_plane": arm(run_cutting_plane, "braess", "hearn9", batch=1),
        "best": arm(run_best, "braess", batch=1),
        "nothing": arm(run_nothing, "braess", "hearn9", cndp, sctp, "grid10"),
    }
    objective = ("objective",)
    return Experiment(
        arms=arms,
        tasks={
            "braess": Task(seeds=5, env_config={"network": "braess5"}),
            "hearn9": Task(seeds=5, env_config={"network": "hearn9"}),
            cndp: Task(seeds=5, env_config={"network": "siouxfalls", "objective": "cndp"}),
            both: Task(seeds=2, env_config={"network": "siouxfalls", "objective": "cndp"}),
            sctp: Task(seeds=5, env_config={"network": "siouxfalls", "objective": "sctp"}),
            "grid10": Task(seeds=1, env_config={"network": "grid10", "objective": "sctp"}),
        },
        smoke={"braess": {"seeds": 2}},
        claims=[
            Claim(
                "1a. Braess: objective of DolMD over the best known, largest over demands",
                extreme_ratio((*objective, "dolmd"), (*objective, "best")),
                within(0, 1.001),
                ("braess",),
            ),
            Claim(
                "1b. Braess: the same of SilMD with T=5",
                extreme_ratio((*objective, "silmd"), (*objective, "best")),
                within(0, 1.01),
                ("braess",),
            ),
            Claim(
                "1c. Braess: the same of alternation (IOA), smallest over demands",
                extreme_ratio((*objective, "ioa"), (*objective, "best"), largest=False),
                above(1.01),
                ("braess",),
            ),
            Claim(
                "1d. Braess: one step of anticipation ends above five",
                paired_difference("objective", "silmd_T1", "silmd"),
                above(0),
                ("braess",),
            ),
            Claim(
                "1e. Braess: the joint optimum is a lower bound: its value over the best known, largest",
                extreme_ratio(("lower_bound", "so_design"), (*objective, "best")),
                within(0, 1),
                ("braess",),
            ),
            Claim(
                "2a. nine nodes: excess of DolMD, best of two starts",
                mean_of("normalised", "dolmd"),
                within(0, 0.74),
                ("hearn9",),
            ),
            Claim(
                "2b. nine nodes: excess of SilMD, best of two starts",
                mean_of("normalised", "silmd"),
                within(0, 0.78),
                ("hearn9",),
            ),
            Claim(
                "3a. Sioux Falls: DolMD ends below the joint optimum's design (published demands)",
                difference_at_first("objective", "dolmd", "so_design"),
                below(0),
                (both,),
            ),
            Claim(
                "3b. Sioux Falls: the joint optimum's design is below that of alternation (published demands)",
                difference_at_first("objective", "so_design", "ioa"),
                below(0),
                (both,),
            ),
            Claim(
                "3c. Sioux Falls: SilMD ends below alternation",
                paired_difference("objective", "silmd", "ioa"),
                below(0),
                (cndp,),
            ),
            Claim(
                "3d. Sioux Falls: SilMD over alternation, largest over demands",
                extreme_ratio((*objective, "silmd"), (*objective, "ioa")),
                below(1),
                (cndp,),
            ),
            Claim(
                "3e. Sioux Falls: SilMD over DolMD, largest over demands",
                extreme_ratio((*objective, "silmd"), (*objective, "dolmd")),
                within(0, 1.01),
                (both,),
            ),
            Claim(
                "3f. Sioux Falls: seconds of DolMD over those of SilMD",
                ratio_of_means(("seconds", "dolmd"), ("seconds", "silmd")),
                at_least(5),
                (both,),
            ),
            Claim(
                "4a. Sioux Falls: excess of SilMD with T=20 from no tolls",
                mean_of("normalised", "silmd"),
                within(0, 0.3),
                (sctp,),
            ),
            Claim(
                "4b. Sioux Falls: excess of marginal-cost tolls on the same links (1: no toll)",
                mean_of("normalised", "mct"),
                above(1),
                (sctp,),
            ),
            Claim(
                "Braess: objective of cutting planes over the best known, largest over demands",
                extreme_ratio((*objective, "cutting_plane"), (*objective, "best")),
                within(0, 1.001),
                ("braess",),
                exploratory=True,
            ),
            Claim(
                "nine nodes: excess of cutting planes minus that of dual annealing",
                paired_difference("normalised", "cutting_plane", "annealing"),
                below(0),
                ("hearn9",),
                exploratory=True,
            ),
            Claim(
                "grid of 100 nodes: excess of SilMD with tolls on ten links",
                mean_of("normalised", "silmd"),
                below(1),
                ("grid10",),
                exploratory=True,
            ),
        ],
        figure=draw,
        notes=(
            "Objectives are those of an exact equilibrium (relative gap 1e-8). `excess` is (TT - TT_SO) / (TT_UE - TT_SO) in total"
            " travel time. On the nine nodes DolMD runs its dynamic at r = 0.02: at the authors' 0.05 it ends in a cycle under some of"
            " the demand tables, which the code refuses. `best known` is dual annealing polished with the exact derivative of the equilibrium. Cutting planes"
            " are solved by a local method; the other cells are kept from the run of commit d1b75a6c479a."
            + (f" Sioux Falls was not run: {reason}." if reason else "")
        ),
    )
