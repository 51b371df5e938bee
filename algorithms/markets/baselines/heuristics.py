"""Designs without a gradient through the users: toll rules, alternation, joint optimum, and blind search.

Every function takes a `Problem` and returns a design y [m]; judge it with `mobula.envs.markets.design.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import dual_annealing, minimize_scalar

from mobula.envs.markets import assignment
from mobula.envs.markets.assignment import Assignment, LinkCost
from mobula.envs.markets.design import Evaluation, Problem, evaluate
from mobula.envs.markets.networks import Array
from mobula.errors import ConfigError


def _needs(problem: Problem, kind: str, name: str) -> None:
    if problem.kind != kind:
        raise ConfigError(
            f"{name} sets {kind}s; the design of objective {problem.objective!r} is {problem.kind}"
        )


# Tolls ----------------------------------------------------------------------------------------------------


def mct(problem: Problem) -> Array:
    """Marginal-cost tolls x t' of the system optimum, on the links that may be tolled."""
    _needs(problem, "toll", "mct")
    best = assignment.system_optimum(problem.network, gap=1e-6)
    tolls = assignment.marginal_cost_tolls(problem.network, best.x)[problem.links]
    return tolls if problem.upper is None else np.minimum(tolls, problem.upper)


def ct(problem: Problem, *, rounds: int = 1) -> Array:
    """Links in turn, those of the largest marginal-cost toll first: each gets the toll that is best given those before it."""
    _needs(problem, "toll", "ct")
    reference, y = mct(problem), np.zeros(problem.size)
    top = 3.0 * float(reference.max()) if problem.upper is None else problem.upper
    warm: Assignment | None = None
    for _ in range(rounds):
        for i in np.argsort(-reference, kind="stable"):

            def value(toll: float, i: int = int(i)) -> float:
                nonlocal warm
                tried = y.copy()
                tried[i] = toll
                found = evaluate(problem, tried, start=warm)
                warm = found.assignment
                return found.objective

            answer: Any = minimize_scalar(
                value, bounds=(0.0, top), method="bounded", options={"xatol": 1e-3 * top}
            )
            # The search is local: without a toll may be better.
            y[i] = answer.x if answer.fun < value(0.0) else 0.0
    return y


def emcdt(problem: Problem, *, kappa: float | None = None, iterations: int = 100) -> Array:
    """Multiplicative update tau <- tau exp(kappa (x t' - tau^SO)) at the equilibrium of tau, from the marginal-cost tolls tau^SO.

    kappa: default 0.1 over the mean of tau^SO
    """
    _needs(problem, "toll", "emcdt")
    reference = mct(problem)
    kappa = 0.1 / max(float(reference.mean()), 1e-12) if kappa is None else kappa
    y, warm = np.maximum(reference, 1e-6), None
    for _ in range(iterations):
        found = evaluate(problem, y, gap=1e-6, start=warm)
        warm = found.assignment
        now = assignment.marginal_cost_tolls(problem.network, found.x)[problem.links]
        new = y * np.exp(np.clip(kappa * (now - reference), -1.0, 1.0))
        new = new if problem.upper is None else np.minimum(new, problem.upper)
        if float(np.abs(new - y).max()) < 1e-6 * float(reference.max()):
            return new
        y = new
    return y


# Capacities -----------------------------------------------------------------------------------------------


def best_capacity(problem: Problem, x: Array, rows: Any = slice(None)) -> Array:
    """The capacity y [m] that is best at fixed flows x: argmin_y t0 B x^{P+1} / (c + y)^P + eta d y^2, y >= 0, by Newton's method.

    `x` are the flows of the candidates `rows` (default: all).
    """
    n, links = problem.network, problem.links[rows]
    c, P = n.capacity[links], n.power[links]
    weight = P * n.free_flow_time[links] * n.b[links] * np.maximum(x, 0.0) ** (P + 1)
    price = 2.0 * problem.eta * problem.cost[rows]
    # Root of price y (c + y)^{P+1} = weight: the left side is convex and rises, so Newton from above converges.
    free = price <= 0
    safe = np.where(free, 1.0, price)
    z = np.maximum((weight / safe) ** (1.0 / (P + 2)), weight / (safe * c ** (P + 1)))
    z = np.minimum(z, (weight / safe) ** (1.0 / (P + 2)))
    for _ in range(60):
        value = safe * z * (c + z) ** (P + 1) - weight
        slope = safe * (c + z) ** P * (c + z + (P + 1) * z)
        step = value / np.maximum(slope, 1e-300)
        z = np.maximum(z - step, 0.0)
        if float(np.abs(step).max(initial=0.0)) < 1e-14 * (1.0 + float(z.max(initial=0.0))):
            break
    top = np.inf if problem.upper is None else problem.upper
    if bool((free & (weight > 0)).any()) and not np.isfinite(top):
        raise ConfigError(f"{n.name}: capacity that costs nothing has no best value: set cost, eta or upper")
    return np.minimum(np.where(free, np.where(weight > 0, top, 0.0), z), top)


def ioa(problem: Problem, *, iterations: int = 500, tolerance: float = 1e-7) -> Array:
    """Iterative optimisation-assignment: users at equilibrium, then the best capacity at their flows, and so on (no anticipation)."""
    _needs(problem, "capacity", "ioa")
    y, warm = np.zeros(problem.size), None
    for _ in range(iterations):
        found = evaluate(problem, y, start=warm)
        warm = found.assignment
        new = best_capacity(problem, found.x[problem.links])
        if float(np.abs(new - y).max()) < tolerance:
            return new
        y = new
    return y


def joint_cost(problem: Problem) -> LinkCost:
    """Marginal costs of the joint problem min_{x, y} sum x t(x, y) + eta sum d y^2: t + x t' at the best capacity for x."""
    n = problem.network
    place = np.full(n.num_links, -1)
    place[problem.links] = np.arange(problem.size)

    def cost(x: Array, rows: Any) -> tuple[Array, Array]:
        which = place[rows]
        held = which >= 0
        capacity = n.capacity[rows].copy()
        capacity[held] += best_capacity(problem, x[held], which[held])
        t0, b, P = n.free_flow_time[rows], n.b[rows], n.power[rows]
        ratio = (x / capacity) ** (P - 1)
        rise = t0 * b * (P + 1) * ratio / capacity
        # The slope at fixed capacity is above the true one: safe for the projection's step.
        return t0 + rise * x, P * rise

    return cost


def so_design(problem: Problem) -> tuple[Array, float]:
    """(y, joint value): the design of the joint optimum of flows and capacity, and its value, a lower bound of F."""
    _needs(problem, "capacity", "so_design")
    found = assignment.equilibrium(problem.network, cost=joint_cost(problem))
    y = best_capacity(problem, found.x[problem.links])
    _, add = problem.spread(y)
    value = assignment.total_travel_time(problem.network, found.x, add)
    return y, value + problem.eta * float((problem.cost * y * y).sum())


# Blind search ---------------------------------------------------------------------------------------------


def annealing(problem: Problem, *, top: float, evaluations: int = 500, seed: int = 0) -> Array:
    """SciPy's dual annealing on equilibria, in [0, top]^m."""
    judge = _judge(problem)

    def value(y: Any) -> float:
        return judge(y).objective

    answer: Any = dual_annealing(
        value,
        [(0.0, top)] * problem.size,
        maxfun=evaluations,
        rng=np.random.default_rng(seed),
        no_local_search=problem.size > 5,
    )
    return np.asarray(answer.x)


def _judge(problem: Problem) -> Callable[[Array], Evaluation]:
    """`evaluate` that starts each equilibrium from the one before."""
    warm: Assignment | None = None

    def judge(y: Array) -> Evaluation:
        nonlocal warm
        found = evaluate(problem, y, start=warm)
        warm = found.assignment
        return found

    return judge
