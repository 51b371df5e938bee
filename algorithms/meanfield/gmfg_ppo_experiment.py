"""The experiment of GMFG-PPO: the epidemic on two graphons, known, learned from logs, or taken for constant.

Every exploitability is that of a policy's own flow on the true graphon, at the temperature of the game.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.algorithms.common.meanfield import estimation, solvers
from mobula.algorithms.common.meanfield.solvers import Step
from mobula.algorithms.meanfield.gmfg_ppo import Average, GMFGPPOConfig, step_sizes, without_floor
from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.graphon import FiniteMFG
from mobula.envs.meanfield.logs import simulate
from mobula.envs.meanfield.particles import deviation
from mobula.experiment import (
    Arm,
    Claim,
    Estimate,
    Experiment,
    Task,
    above,
    at_least,
    below,
    check,
    mean_of,
    paired_difference,
    ratio_of_means,
    within,
)
from mobula.experiment.core import Results
from mobula.experiment.statistics import exact, mean
from mobula.experiment.statistics import paired_difference as difference_of
from mobula.files import storage

EVERY = 10


def optimise(
    game: FiniteMFG, truth: FiniteMFG, config: Any, cell: Tensor, step: Step | None = None
) -> dict[str, Any]:
    """Runs part A (or another step) in `game` and scores its policies in `truth`, whose cells follow those of `cell` [M]."""
    lam, state, average = config.temperature(), solvers.initial(game), Average()
    steps, curve, beta = [], [], 0.0

    def score(pi: Tensor) -> float:
        return float(graphon.exploitability(truth, pi[cell], lam).mean())

    for t in range(1, config.T + 1):
        if step is None:
            eta, alpha, beta = step_sizes(
                t, config.T, config.c_eta, config.c_alpha, config.c_beta, config.schedule
            )
            state = solvers.gmfg_ppo(lam, eta, alpha, beta)(game, state)
        else:
            state = step(game, state)
        average.add(state.policy, graphon.flow(game, state.policy))
        if t % EVERY == 0 or t in (1, config.T):
            steps.append(t)
            curve.append(score(state.policy))
    mine = state.policy[cell]
    return {
        "exploitability": curve[-1],
        "exploitability_without_floor": score(without_floor(state.policy, beta)),
        "exploitability_average": score(average.policy),
        "curve_steps": steps,
        "curve_values": curve,
        "protect": mine[:, :, 0, -1].mean(1).tolist(),
        "infected": graphon.flow(truth, mine)[:, :, -1].mean(1).tolist(),
    }


def settings_of(config: Any, task: Task) -> Any:
    """The config on the task."""
    return config.copy(copy_frozen=False).training(**task.env_config)


def learned(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Logs, estimate, plug-in."""
    c = settings_of(config, task)
    truth, cells = c.true_game(), graphon.cells(c.M)
    found = []
    for seed in seeds:
        logs = simulate(truth, c.true_graphon(), c.N, c.L, population=c.population, seed=seed)
        if c.positions == "hidden":
            logs = logs.hidden()
        fit = estimation.learn(
            logs,
            c.graphon_class,
            c.settings(seed),
            candidates=[graphon.named(name) for name in c.candidates],
        )
        cell = torch.arange(c.M)
        if c.positions == "hidden":
            cell = estimation.cell_of(fit, cells, graphon.cells(c.N))
        numbers = optimise(estimation.plug_in(fit, truth, cells), truth, c, cell)
        W = graphon.matrix(fit.graphon, graphon.cells(20))
        shape = fit.shape
        found.append(
            {
                **numbers,
                "class": f"sbm({len(shape.borders) + 1})" if shape.kind == "sbm" else shape.kind,
                "borders": list(shape.borders),
                "graphon": estimation.shown(W).tolist(),
                "held_out": fit.held_out,
            }
        )
    return found


def constant(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A plain mean-field game: the class of constant graphons, the model refitted."""
    c = config.copy(copy_frozen=False)
    plain = replace(task, env_config={**task.env_config, "graphon_class": "const", "positions": "known"})
    return learned(c, plain, seeds)


def told(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The true class of the graphon is known, its parameters are not."""
    kind = {"sbm": "sbm(2)", "exp": "exp"}[str(task.env_config["graphon"])]
    return learned(config, replace(task, env_config={**task.env_config, "graphon_class": kind}), seeds)


def hidden(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The labels of the agents are not observed."""
    return learned(config, replace(task, env_config={**task.env_config, "positions": "hidden"}), seeds)


def known(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The true game; nothing is random in it."""
    return _exactly(config, task, seeds, lambda c: None)


def _exactly(
    config: Any, task: Task, seeds: Sequence[int], step: Callable[[Any], Step | None]
) -> list[dict[str, Any]]:
    c = settings_of(config, task)
    truth = c.true_game()
    numbers = optimise(truth, truth, c, torch.arange(c.M), step(c))
    return [numbers] * len(seeds)


def uniform(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every action with equal probability."""
    return _exactly(config, task, seeds, lambda c: lambda game, s: s)


def fixed_point(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Best response to the flow, undamped."""
    return _exactly(config, task, seeds, lambda c: solvers.fixed_point(c.temperature()))


def boltzmann(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """softmax(Q / lam) of the present policy."""
    return _exactly(config, task, seeds, lambda c: solvers.boltzmann(c.temperature(), c.temperature()))


def fictitious(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Fictitious play with regularised best responses."""
    return _exactly(config, task, seeds, lambda c: solvers.fictitious_play(c.temperature()))


def mirror(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Online mirror descent, which solves the game without entropy."""
    return _exactly(config, task, seeds, lambda c: solvers.mirror_descent(0.1))


def single_loop(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The same loop with the step sizes of a T^(-1/5) rate (our reading of Xie et al. 2021): eta ~ T^(-2/5), alpha ~ T^(-4/5)."""

    def step(c: Any) -> Step:
        eta, alpha = c.c_eta * c.T ** (-2 / 5), min(1.0, c.c_alpha * c.T ** (-4 / 5))
        return solvers.gmfg_ppo(c.temperature(), eta, alpha, c.c_beta / c.T)

    return _exactly(config, task, seeds, step)


# Claims that need no seeds ----------------------------------------------------------------------------------------


@cache
def long_runs() -> dict[str, float]:
    """Exploitability on two graphons after T = 300 iterations with constants of 1, H = 50, true dynamics: played on the graphon
    itself ("sbm", "exp"), or on the constant p = 0.5 ("sbm wrong", "exp wrong").  One batch of three games.
    """
    cells = graphon.cells(40)
    sbm, exponential, flat = (graphon.matrix(graphon.named(name), cells) for name in ("sbm", "exp", "er:0.5"))
    played = graphon.sis(torch.stack([sbm, exponential, flat]), 50)
    eta, alpha, beta = step_sizes(1, 300, 1.0, 1.0, 0.1)
    found = solvers.solve(played, solvers.gmfg_ppo(0.5, eta, alpha, beta), 300, lam=0.5, every=300)
    truth = graphon.sis(torch.stack([sbm, exponential]), 50)
    right, wrong = found.state.policy[:2], found.state.policy[2:].expand(2, *found.state.policy.shape[1:])
    values = [graphon.exploitability(truth, pi, 0.5).mean(-1).tolist() for pi in (right, wrong)]
    return dict(zip(("sbm", "exp", "sbm wrong", "exp wrong"), values[0] + values[1], strict=True))


def finite_slope() -> Estimate:
    """Slope of log max_h |mu^n_h - mu_h|_1 against log n, n = 1e2 to 1e5, 20 populations each at the equilibrium policy."""
    game = graphon.sis(graphon.matrix(graphon.named("sbm"), graphon.cells(40)), 20)
    eta, alpha, beta = step_sizes(1, 100, 5.0, 5.0, 0.1)
    pi = solvers.solve(game, solvers.gmfg_ppo(0.5, eta, alpha, beta), 100, lam=0.5, every=100).state.policy
    sizes = np.array([100, 1000, 10_000, 100_000])
    gaps = np.log(np.stack([deviation(game, pi, int(n), repetitions=20).numpy() for n in sizes], 1))
    x = np.log(sizes) - np.log(sizes).mean()
    return mean((gaps * x).sum(1) / (x**2).sum())


def across_tasks(metric: str, arm: str, first: str, second: str) -> Callable[[Results, str], Estimate]:
    """Mean over common seeds of the arm's metric on one task minus that on another."""

    def gap(results: Results, task: str) -> Estimate:
        a, b = results.cells.get((arm, first), {}), results.cells.get((arm, second), {})
        both = sorted(set(a) & set(b))
        if not both:
            raise KeyError(f"{arm} on {first} and {second}")
        return difference_of([a[s][metric] for s in both], [b[s][metric] for s in both])

    return gap


# Figure ------------------------------------------------------------------------------------------------------------

NAMES = {
    "known": "graphon and model known",
    "told": "learned, class of graphon told",
    "learned": "learned from logs",
    "hidden": "learned, positions hidden",
    "constant": "constant graphon, model refitted",
    "uniform": "uniform policy",
}


def draw(results: Results, folder: Path) -> list[str]:
    """Exploitability of every arm, its course, policies over positions, and true beside learned graphons."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mobula.experiment.figures import COLOURS, band

    colour = dict(zip(NAMES, COLOURS, strict=False))
    tasks = list(results.experiment.tasks)
    figure = plt.figure(figsize=(13.2, 7.4), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    dots, course = figure.add_subplot(grid[0, :2]), figure.add_subplot(grid[0, 2])
    places = figure.add_subplot(grid[0, 3])
    handles: dict[str, Any] = {}
    for row, task in enumerate(tasks):
        if row % 2:
            dots.axhspan(row - 0.5, row + 0.5, color="0.94", zorder=0)
        shown = [arm for arm in NAMES if results[arm, task]]
        for k, arm in enumerate(shown):
            values = np.array([max(c["exploitability"], 1e-6) for c in results[arm, task]])
            y = row + 0.6 * (k / max(len(shown) - 1, 1) - 0.5)
            dots.plot(values, np.full(len(values), y), ".", color=colour[arm], alpha=0.35, markersize=5)
            centre = mean(values) if len(values) > 1 else exact(values[0])
            line = dots.errorbar(
                centre.value,
                y,
                xerr=[[max(centre.value - centre.low, 0)], [max(centre.high - centre.value, 0)]],
                fmt="o",
                color=colour[arm],
                capsize=3,
                markersize=6,
            )
            handles.setdefault(NAMES[arm], line)
    labels = {
        name: f"{name.replace('_', ' ')}\nN={t.env_config.get('N', 40)}, L={t.env_config.get('L', 20)}"
        for name, t in results.experiment.tasks.items()
    }
    dots.set_yticks(range(len(tasks)), [labels[t] for t in tasks], fontsize=8)
    dots.set_ylim(len(tasks) - 0.5, -0.5)
    dots.set_xscale("log")
    dots.set_xlabel(
        "exploitability in the true game (dot: a seed; bar: 95 % interval of the mean)", fontsize=8
    )
    dots.set_title("what an agent can gain by leaving the policy", fontsize=9)
    first = tasks[0]
    for arm in NAMES:
        if cells := results[arm, first]:
            middle, low, high = band(np.asarray([np.maximum(c["curve_values"], 1e-6) for c in cells]))
            course.plot(cells[0]["curve_steps"], middle, color=colour[arm], linewidth=2)
            course.fill_between(
                cells[0]["curve_steps"], low, high, color=colour[arm], alpha=0.18, linewidth=0
            )
    course.set_yscale("log")
    course.set_xlabel("iteration of GMFG-PPO", fontsize=8)
    course.set_title(f"exploitability on {first}", fontsize=9)
    for arm in ("known", "learned", "constant"):
        if cells := results[arm, first]:
            x = graphon.cells(len(cells[0]["protect"])).numpy()
            places.plot(x, np.mean([c["protect"] for c in cells], 0), color=colour[arm], linewidth=2)
            places.plot(x, np.mean([c["infected"] for c in cells], 0), color=colour[arm], linestyle="--")
    places.set_ylim(0, 1)
    places.set_xlabel("position (label)", fontsize=8)
    places.set_title(f"{first}: protecting (solid), infected (dashed)", fontsize=9)
    for axes in (dots, course, places):
        axes.grid(alpha=0.25, axis="x" if axes is dots else "both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    column = 0
    for task in [t for t in ("sbm", "exp") if t in tasks]:
        truth = graphon.matrix(
            graphon.named(str(results.experiment.tasks[task].env_config["graphon"])), graphon.cells(20)
        )
        cells = results["learned", task]
        panels = [(f"{task}: true graphon", estimation.shown(truth).numpy())]
        if cells:
            order = sorted(cells, key=lambda c: c["exploitability"])
            middle_one = order[len(order) // 2]
            panels.append(
                (f"{task}: learned ({middle_one['class']}), median seed", np.array(middle_one["graphon"]))
            )
        for title, W in panels:
            axes = figure.add_subplot(grid[1, column])
            image = axes.imshow(W, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=1, cmap="viridis")
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("position", fontsize=8)
            axes.tick_params(labelsize=8)
            column += 1
            if column in (2, 4):
                figure.colorbar(image, ax=axes, shrink=0.75, label="weight / largest").ax.tick_params(
                    labelsize=8
                )
    shown_arms = [name for name in NAMES.values() if name in handles]
    figure.legend(
        [handles[name] for name in shown_arms],
        shown_arms,
        loc="outside lower center",
        ncols=len(shown_arms),
        frameon=False,
        fontsize=9,
    )
    with storage(folder / "figure.png"):
        figure.savefig(folder / "figure.png", dpi=130)
    plt.close(figure)
    return ["figure.png"]


def experiment() -> Experiment:
    """Arms, tasks, claims; the numbering follows the claims of the method's description."""

    def arm(run: Any, tasks: tuple[str, ...] = (), batch: int | None = None) -> Arm:
        return Arm(GMFGPPOConfig(), run=run, tasks=tasks, batch=batch)

    both, finite = ("sbm", "exp"), ("sbm", "exp", "sbm_L10", "sbm_L40", "sbm_N24")
    exactly = {
        "known": known,
        "uniform": uniform,
        "fixed_point": fixed_point,
        "boltzmann": boltzmann,
        "fictitious_play": fictitious,
        "mirror_descent": mirror,
        "single_loop": single_loop,
    }
    value = "exploitability"
    half = ratio_of_means((value, "learned"), (value, "constant"))
    many = "sbm_continuum_N200"
    return Experiment(
        arms={
            **{name: arm(run, both) for name, run in exactly.items()},
            "learned": arm(learned, batch=1),
            "told": arm(told, both, batch=1),
            "hidden": arm(hidden, ("sbm_N24",), batch=1),
            "constant": arm(constant, batch=4),
        },
        tasks={
            "sbm": Task(seeds=8, env_config={"graphon": "sbm", "N": 40, "L": 20}),
            "exp": Task(seeds=8, env_config={"graphon": "exp", "N": 40, "L": 20}),
            "sbm_L10": Task(seeds=8, env_config={"graphon": "sbm", "N": 40, "L": 10}),
            "sbm_L40": Task(seeds=8, env_config={"graphon": "sbm", "N": 40, "L": 40}),
            "sbm_N24": Task(
                seeds=8, env_config={"graphon": "sbm", "N": 24, "L": 20, "graphon_class": "sbm(2)"}
            ),
            **{
                name: Task(
                    seeds=5,
                    env_config={
                        "graphon": "sbm",
                        "N": N,
                        "L": 20,
                        "population": "continuum",
                        "graphon_class": "sbm(2)",
                    },
                )
                for name, N in (("sbm_continuum", 40), (many, 200))
            },
        },
        smoke={
            "sbm": {
                "seeds": 1,
                "env_config": {
                    "graphon": "sbm",
                    "M": 20,
                    "horizon": 10,
                    "T": 60,
                    "N": 20,
                    "L": 5,
                    "graphon_class": "list",
                    "candidates": ["er:0.5", "exp:3", "sbm", "uniform_attachment", "ranked_attachment"],
                },
            }
        },
        claims=[
            Claim("1a. known graphon: exploitability", mean_of(value, "known"), within(0, 1e-3), both),
            Claim(
                "1b. known SBM, H=50, T=300, constants 1: exploitability",
                check(lambda: long_runs()["sbm"]),
                within(0, 5e-4),
            ),
            Claim(
                "1c. known exponential graphon, H=50, T=300, constants 1: exploitability",
                check(lambda: long_runs()["exp"]),
                within(0, 1e-4),
            ),
            Claim("2a. exploitability, learned over constant graphon (mean)", half, within(0, 0.5), both),
            Claim(
                "2b. learned less exploitable than constant graphon",
                paired_difference(value, "learned", "constant"),
                below(0),
                both,
            ),
            Claim(
                "2c. as 2a, the class of the graphon told",
                ratio_of_means((value, "told"), (value, "constant")),
                within(0, 0.5),
                both,
                exploratory=True,
            ),
            Claim(
                "3a. SBM: constant graphon p = 0.5 with the true dynamics, H=50: exploitability",
                check(lambda: long_runs()["sbm wrong"]),
                at_least(0.5),
            ),
            Claim(
                "3b. exponential graphon: the same",
                check(lambda: long_runs()["exp wrong"]),
                at_least(0.5),
            ),
            Claim(
                "3c. continuum, N=200: exploitability, learned over constant graphon",
                half,
                within(0, 0.5),
                (many,),
            ),
            Claim(
                "3d. continuum, N=40: the same (no gain in the pilot)",
                half,
                within(0, 0.5),
                ("sbm_continuum",),
                exploratory=True,
            ),
            Claim(
                "4. more data helps: L=40 minus L=10, learned",
                across_tasks(value, "learned", "sbm_L40", "sbm_L10"),
                below(0),
                ("sbm_L40",),
            ),
            Claim(
                "5a. hidden positions: less exploitable than constant graphon",
                paired_difference(value, "hidden", "constant"),
                below(0),
                ("sbm_N24",),
            ),
            Claim(
                "5b. hidden positions: more exploitable than known ones",
                paired_difference(value, "hidden", "learned"),
                above(0),
                ("sbm_N24",),
            ),
            Claim(
                "6. finite populations at equilibrium: slope of the flow's deviation in n",
                check(finite_slope),
                within(-0.6, -0.4),
            ),
        ],
        figure=draw,
        notes=(
            "`learned` chooses between constant, exponential and two-block graphons on held-out episodes; N=24 and continuum tasks are"
            " told that there are two blocks. Learned graphons are shown up to scale; where a few directions of z matter, blocks"
            " are distorted and the policy is near equilibrium all the same. `mirror_descent` solves the game without"
            f" entropy. {len(finite)} tasks are finite populations, the others samples of a continuum."
        ),
    )
