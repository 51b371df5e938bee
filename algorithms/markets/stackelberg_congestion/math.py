"""The leader's look ahead: the objective and its gradient through the users' dynamic (Li et al., arXiv 2209.07618)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.envs.markets.assignment import Path, ShortestPaths, as_paths
from mobula.envs.markets.design import Problem
from mobula.envs.markets.dynamics import (
    Followers,
    Part,
    PathSet,
    Roads,
    adjoint,
    centred,
    settle,
    unroll,
)
from mobula.envs.markets.networks import Network

CHECKPOINTED = 200
"""Unrolled steps above which stretches are run again in the backward pass."""

ENTRY = 1e-6
"""Trips with which a new path enters."""

FLOOR = 1e-3
"""Where the entropic mirror map, which cannot leave 0, starts in place of 0."""


def step_size(alpha: Tensor, beta: float, n: int) -> Tensor:
    """alpha beta / (beta + n); beta = 0 means a constant step."""
    return alpha if beta == 0 else alpha * beta / (beta + n)


def leader_step(problem: Problem, y: Tensor, gradient: Tensor, step: Tensor, mirror: str) -> Tensor:
    """The next design [I, m] (step 3): y - step g, projected; or y exp(-step g) under the entropic map.  step [I]."""
    if mirror == "entropic":
        return problem.project(y * (-step[:, None] * gradient).exp())
    return problem.project(y - step[:, None] * gradient)


@dataclass(frozen=True)
class Anticipation:
    """What the leader learns from one look ahead; leading axis B.

    F [B] objective at the flows that were reached; gradient [B, m] of F in the design
    logits [B, K] reached; one [B, K] after the first step; before, after [B] gap of the path set; steps [B]
    rose [B]: gap and potential both grew on the way, as they do where r is too large
    """

    F: Tensor
    gradient: Tensor
    logits: Tensor
    one: Tensor
    before: Tensor
    after: Tensor
    steps: Tensor
    rose: Tensor


def anticipate(
    problem: Problem,
    paths: PathSet,
    demand: Tensor,
    y: Tensor,
    logits: Tensor,
    r: Tensor,
    *,
    algorithm: str = "silmd",
    T: int = 10,
    eps: float = 1e-5,
    every: int = 10,
    truncate: bool = False,
    part: Part | None = None,
) -> Anticipation:
    """F and its gradient through the dynamic, for B problems side by side.

    demand [B, W]; y [B, m]; logits [B, K] where SilMD's users stand (DolMD starts from uniform shares); r [B, 1]
    SilMD unrolls T steps; DolMD until each element's gap is below eps, tested every `every` steps; `truncate`: the way to 10 eps
    is run without gradient.
    part: paths, demand and logits are those of one part of the OD pairs; the others must call this with theirs at the same time, and
    all find the same but for the logits, of which each has its own.
    """
    y = y.detach().requires_grad_()
    toll, add = problem.spread(y)
    followers = Followers(Roads.of(problem.network, y.device), paths, demand, toll, add, part)
    logits = logits.detach()
    trail: list[tuple[Tensor, Tensor]] = []
    if algorithm == "dolmd":
        logits = torch.zeros_like(logits)
        before = one = logits
        where = f"{problem.network.name}: the inner loop"
        if truncate:
            logits, _, _ = settle(followers, logits, r, gap=10 * eps, every=every, where=where)
        logits, steps, trail = settle(followers, logits, r, gap=eps, every=every, keep=True, where=where)
        with torch.no_grad():
            before = after = followers.gap(logits)
        rose = torch.zeros_like(after, dtype=torch.bool)
    else:
        with torch.no_grad():
            before, height = followers.gap(logits), followers.potential(logits)
        steps = torch.full((len(logits),), T, device=logits.device)
        if T > CHECKPOINTED:
            every = max(int(T**0.5), 1)
            with torch.no_grad():
                one = followers.step(logits, r)
                for _ in range(T // every):
                    trail.append((logits, r))
                    logits = unroll(followers, logits, r, every)
    if algorithm == "silmd" and T <= CHECKPOINTED:
        first = unroll(followers, logits, r, 1)
        end = unroll(followers, first, r, T - 1)
        one = first.detach()
    else:
        left = 0 if algorithm == "dolmd" else T % every
        start = logits.requires_grad_()
        end = unroll(followers, start, r, left)
    x = followers.flows(end)
    F = problem.value(x, followers.roads.times(x, add), y)
    leaves = [y, start] if trail else [y]
    # Tolls do not enter F themselves; a run that begins at rest has no step at all.
    direct, *carried = torch.autograd.grad(
        F.sum(), leaves, retain_graph=bool(trail), allow_unused=True, materialize_grads=True
    )
    gradient = direct
    if trail:
        gradient = direct + adjoint(followers, trail, every, carried[0], [y])[0]
    end = end.detach()
    if algorithm == "silmd":
        with torch.no_grad():
            after, level = followers.gap(end), followers.potential(end)
            # A NaN is no descent either.
            rose = ~(after <= before) & ~(level <= height + 1e-12 * height.abs())
    return Anticipation(
        F.detach(), gradient, centred(paths, end), centred(paths, one), before, after, steps, rose
    )


def generates(n: int, schedule: str, kind: str, algorithm: str) -> bool:
    """Whether iteration n (from 0) adds shortest paths (step 4)."""
    if schedule != "release":
        return schedule == "every"
    late = 50 if kind == "capacity" and algorithm == "silmd" else 25
    return n < 10 or (n % 5 == 0 if n < 50 else n % late == 0)


def shortest(
    network: Network, ods: Sequence[int], costs: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], list[list[Path]]]:
    """(pi [B, W'], shortest paths of each element) of the OD pairs `ods` at link costs [B, A]: one share of the work."""
    router = ShortestPaths(network, np.asarray(ods))
    found = [router(row) for row in costs]
    return np.stack([pi for pi, _ in found]), [as_paths(links) for _, links in found]
