"""Sensitivity analysis: the derivative of the equilibrium itself, by the implicit function theorem, and descent along it.

Among the used paths a maximal set with linearly independent columns of (Delta; Lambda) is kept; on it equilibrium is c_k = pi_w and
sum f_k = q_w, so
    [Delta' diag(t') Delta   -Lambda'] [f_y ]   [-dc/dy]
    [Lambda                     0    ] [pi_y] = [   0  ],      x_y = Delta f_y.
Any maximal independent set spans the same link flows, so x_y does not depend on which one is kept; it is picked by QR with column
pivoting, paths of much flow first.  Where the set of used paths changes, the derivative jumps: there it is one-sided.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.linalg import qr

from mobula.envs.markets import assignment
from mobula.envs.markets.assignment import Assignment
from mobula.envs.markets.design import Evaluation, Problem, evaluate
from mobula.envs.markets.dynamics import Roads
from mobula.envs.markets.networks import Array, Network

USED = 1e-7
"""Share of a pair's demand below which a path counts as unused."""


def independent_paths(network: Network, found: Assignment) -> tuple[Array, Array]:
    """(Delta_+ [A, k], Lambda_+ [W', k]) of a maximal independent set of used paths, W' the pairs with a demand."""
    columns, pairs, weights = [], [], []
    for w, (paths, flows) in enumerate(zip(found.paths, found.flows, strict=True)):
        total = float(flows.sum())
        for path, f in zip(paths, flows.tolist(), strict=True):
            if total > 0 and f > USED * total:
                column = np.zeros(network.num_links)
                column[list(path)] = 1.0
                columns.append(column)
                pairs.append(w)
                weights.append(f)
    delta = np.stack(columns, axis=1)
    which, row = np.unique(pairs, return_inverse=True)
    lam = np.zeros((len(which), len(pairs)))
    lam[row, np.arange(len(pairs))] = 1.0
    _, R, order = qr(np.vstack([delta, lam]) * np.sqrt(np.asarray(weights)), mode="economic", pivoting=True)
    size = np.abs(np.diag(R))
    rank = int((size > 1e-9 * size[0]).sum())
    kept = np.sort(order[:rank])
    return delta[:, kept], lam[:, kept]


def cost_slopes(problem: Problem, x: Array, y: Array) -> tuple[Array, Array]:
    """(du_a / dx_a [A], du_a / dy_a [m] on the candidates) of the users' link costs u = t + toll at flows x [A] and design y [m]."""
    network, rows = problem.network, problem.links
    _, add = problem.spread(y)
    slope = assignment.travel_time_slope(network, x, add)
    # Capacity: -t' x / (c + y), because t depends on x / (c + y).
    lower = slope[rows] * x[rows] / (network.capacity[rows] + add[rows])
    return slope, np.ones(problem.size) if problem.kind == "toll" else -lower


def value_and_slopes(problem: Problem, x: Array, y: Array) -> tuple[float, Array, Array]:
    """(F, dF / dx [A], dF / dy [m]) of the objective at flows x [A] and design y [m], both free."""
    flows = torch.from_numpy(np.array(x, dtype=np.float64)).requires_grad_()
    design = torch.from_numpy(np.array(y, dtype=np.float64)).requires_grad_()
    times = Roads.of(problem.network).times(flows, problem.spread(design)[1])
    F = problem.value(flows[None], times[None], design[None]).sum()
    F_x, F_y = torch.autograd.grad(F, [flows, design], allow_unused=True, materialize_grads=True)
    return float(F.detach()), F_x.numpy(), F_y.numpy()


def flow_derivative(problem: Problem, y: Array, found: Assignment) -> Array:
    """dx / dy [A, m] at the equilibrium `found` of design y."""
    network = problem.network
    delta, lam = independent_paths(network, found)
    slope, by_design = cost_slopes(problem, found.x, y)
    change = np.zeros((network.num_links, problem.size))
    change[problem.links, np.arange(problem.size)] = by_design
    k, w = delta.shape[1], lam.shape[0]
    H = (delta.T * slope) @ delta
    system = np.block([[H, -lam.T], [lam, np.zeros((w, w))]])
    right = np.vstack([-delta.T @ change, np.zeros((w, problem.size))])
    # Paths without congestion leave H singular: least squares gives the smallest answer.
    answer, *_ = np.linalg.lstsq(system, right, rcond=1e-12)
    return delta @ answer[:k]


def gradient(problem: Problem, y: Array, found: Evaluation) -> Array:
    """dF / dy [m] of the objective at the equilibrium `found`."""
    _, F_x, F_y = value_and_slopes(problem, found.x, y)
    return F_y + F_x @ flow_derivative(problem, y, found.assignment)


def sab(
    problem: Problem,
    start: Any = None,
    *,
    alpha: float,
    beta: float = 10.0,
    xi: float = 1e-3,
    iterations: int = 500,
    gap: float = 1e-8,
) -> tuple[Array, int]:
    """Projected gradient with the implicit derivative, steps alpha beta / (beta + n) (0: constant); returns (y, iterations)."""
    y = np.zeros(problem.size) if start is None else np.asarray(start, dtype=np.float64)
    warm: Assignment | None = None
    for n in range(iterations):
        found = evaluate(problem, y, gap=gap, start=warm)
        warm = found.assignment
        step = alpha if beta == 0 else alpha * beta / (beta + n)
        new = problem.project(torch.from_numpy(y - step * gradient(problem, y, found))).numpy()
        if float(np.abs(new - y).max()) < xi:
            return new, n + 1
        y = new
    return y, iterations
