"""Kernel regression on mean embeddings, for continuous states and actions (Zhang et al. 2024, arXiv 2310.17531, part C).

Agent i, in state s^i with action a^i among agents in states s^j, is the embedding

    omega^i(W) = 1 / (N - 1) sum_{j != i} W(xi_i, xi_j) k(., (s^i, a^i, s^j)),     k = own((s, a), (s, a)') other(s, s'),

and f is a function of it in the space of K(omega, omega') = exp(-|omega - omega'|^2 / (2 sigma^2)).  Inner products are double sums of k,

    <omega^i, omega^l> = own(i, l) / (N - 1)^2 sum_{j, m} W_ij other(s^j, s^m) W_lm :

quadratic forms in W, whatever the dimension of the states.  The model is s' = f(omega) + noise and r = g(omega); the law of the noise
is taken to be Gaussian with the covariance of the residuals.

Rows are read in blocks of times, and for gradients computed once more in the backward pass, so that memory does not grow with the
number of samples.  Cost of one loss: O(T m N^2) evaluations of the kernel for T = episodes x steps and m inducing points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mobula.algorithms.common.meanfield.regression import JITTER, not_identifiable
from mobula.envs.meanfield.continuous import ContinuousLogs
from mobula.errors import ConfigError

BLOCK = 2**22
"""Numbers of a kernel matrix that are held at once."""

KEPT = 2**24
"""Kernel values up to which a table keeps them, as they do not depend on W."""

PROBES = 20
"""Times whose distances set the width of the kernel."""

Kernel = Callable[[Tensor, Tensor], Tensor]
"""x [..., n, d], y [..., m, d] -> [..., n, m]."""


# Kernels on states and actions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """exp(-sum_k ((x_k - y_k) / widths_k)^2 / 2)."""

    widths: tuple[float, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        scale = torch.tensor(self.widths, dtype=torch.float64)
        x, y = x / scale, y / scale
        square = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * x @ y.mT
        return (-0.5 * square.clamp_min(0.0)).exp()


@dataclass(frozen=True)
class Delta:
    """1 where x = y, else 0: finite states and actions."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(-2) == y.unsqueeze(-3)).all(-1).double()


@dataclass(frozen=True)
class Polynomial:
    """(offset + <x, y>)^degree; degree 1 and offset 0 keep of a population its mean alone."""

    degree: int = 1
    offset: float = 1.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.offset + x @ y.mT) ** self.degree


@dataclass(frozen=True)
class Ground:
    """k((s, a, s^j), (s, a, s^j)') = own((s, a), (s, a)') other(s^j, s^j')."""

    own: Kernel
    other: Kernel


def gaussian_ground(logs: ContinuousLogs, width: float = 3.0) -> Ground:
    """Gaussian kernels whose widths are `width` standard deviations of each coordinate over the logs."""

    def widths(x: Tensor) -> tuple[float, ...]:
        spread = x.flatten(0, -2).std(0, correction=0)
        # A coordinate that never moves has no scale: any width will do.
        return tuple((width * torch.where(spread > 0, spread, 1.0)).tolist())

    return Ground(Gaussian(widths(torch.cat([logs.state, logs.action], -1))), Gaussian(widths(logs.state)))


# Logs as rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Logs by time t = (episode, step): state [T, N, d], own [T, N, d + p] = (s, a), target [T, N, d + 1] = (s', r).

    units [N]     the unit of each agent, between which graphons are given
    at, who [m]   time and agent of the rows that are inducing points
    probes [P]    times whose distances set the width
    cross         other(s_t, s_at) [T, m, N, N], or None where it is too large to be kept
    """

    state: Tensor
    own: Tensor
    target: Tensor
    units: Tensor
    at: Tensor
    who: Tensor
    probes: Tensor
    ground: Ground
    cross: Tensor | None = None

    @property
    def agents(self) -> int:
        return self.state.shape[1]

    @property
    def samples(self) -> float:
        return float(self.target.shape[0] * self.target.shape[1])

    def weights(self, W: Tensor) -> Tensor:
        """W between agents over N - 1, without self: [..., U, U] -> [..., N, N]."""
        each = W[..., self.units, :][..., self.units]
        return each * (1 - torch.eye(self.agents, dtype=W.dtype)) / (self.agents - 1)

    def blocks(self, points: int, times: Tensor | None = None) -> Iterator[Tensor]:
        """`times` (default: all) in blocks [c] whose kernel matrices [c, points, N, N] are small enough."""
        size = max(1, BLOCK // (max(points, 1) * self.agents**2))
        yield from (torch.arange(len(self.state)) if times is None else times).split(size)


def tabulate(
    logs: ContinuousLogs,
    units: Tensor,
    *,
    inducing: int = 50,
    kernel: str = "embedding",
    seed: int = 0,
    ground: Ground | None = None,
) -> Table:
    """Rows of the logs; ground: the kernel k, by default `gaussian_ground`.  Raises ConfigError for another kernel than "embedding"."""
    if kernel != "embedding":
        raise ConfigError(
            f"kernel is {kernel!r}: it is a regression for each state and action; continuous ones need 'embedding'"
        )
    T, N = logs.episodes * logs.horizon, logs.agents
    own = torch.cat([logs.state, logs.action], -1).flatten(0, 1)
    target = torch.cat([logs.next_state, logs.reward.unsqueeze(-1)], -1).flatten(0, 1)
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(T * N, generator=g)[:inducing]
    probes = torch.randperm(T, generator=g)[:PROBES]
    ground = ground or gaussian_ground(logs)
    table = Table(logs.state.flatten(0, 1), own, target, units, rows // N, rows % N, probes, ground)
    if T * len(rows) * N * N > KEPT:
        return table
    cross = ground.other(table.state.unsqueeze(1), table.state[table.at].unsqueeze(0))
    return Table(**{**vars(table), "cross": cross})


# Inner products ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchors:
    """m inducing points: their populations state [m, N, d], own (s, a) [m, d + p], weights [..., m, N] and square norms [..., m]."""

    state: Tensor
    own: Tensor
    weights: Tensor
    square: Tensor


def norms(ground: Ground, own: Tensor, state: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(|omega|^2, that of its part without own) [..., c, n] of populations state [c, K, d] seen by n with weights [..., n, K], own [c, n, .]."""
    K = ground.other(state, state)
    met = ((weights.unsqueeze(-3) @ K) * weights.unsqueeze(-3)).sum(-1)
    alone = ground.own(own.unsqueeze(-2), own.unsqueeze(-2)).squeeze(-1).squeeze(-1)
    return alone * met, met


def products(
    ground: Ground, own: Tensor, state: Tensor, weights: Tensor, anchors: Anchors, cross: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(<omega, omega'>, that of their parts without own) [..., c, n, m] of rows (as in `norms`) and anchors."""
    K = ground.other(state.unsqueeze(1), anchors.state.unsqueeze(0)) if cross is None else cross
    # [c, m, K, N] times weights [..., m, N]: what each member means to the anchor's population.
    meant = (K @ anchors.weights.unsqueeze(-3).unsqueeze(-1)).squeeze(-1)
    met = weights.unsqueeze(-3) @ meant.mT
    return ground.own(own, anchors.own) * met, met


def anchors_of(table: Table, weights: Tensor) -> Anchors:
    """The table's inducing points under weights [..., N, N]."""
    state, own = table.state[table.at], table.own[table.at, table.who]
    mine = weights[..., table.who, :]
    # A population with one who looks at it: each anchor is a block of its own.
    K = table.ground.other(state, state)
    met = ((mine.unsqueeze(-2) @ K).squeeze(-2) * mine).sum(-1)
    alone = table.ground.own(own.unsqueeze(-2), own.unsqueeze(-2)).squeeze(-1).squeeze(-1)
    return Anchors(state, own, mine, alone * met)


def distances(
    table: Table, weights: Tensor, anchors: Anchors, times: Tensor, cross: Tensor | None = None
) -> Tensor:
    """|omega - omega'|^2 [..., c, N, m] of all agents at `times` [c] to the anchors."""
    own, state = table.own[times], table.state[times]
    square, _ = norms(table.ground, own, state, weights)
    inner, _ = products(table.ground, own, state, weights, anchors, cross)
    return (square.unsqueeze(-1) + anchors.square[..., None, None, :] - 2 * inner).clamp_min(0.0)


# Regression --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A fitted regression: anchors, width [...], weights [..., m, d + 1], offsets [..., d + 1] of (s', r); noise [..., d, d] of s'.

    mass [2, ...]: range of the weights that agents met in all, sum_j W_ij / (N - 1)
    """

    ground: Ground
    anchors: Anchors
    width: Tensor
    weights: Tensor
    offsets: Tensor
    noise: Tensor
    mass: Tensor

    def predict(self, own: Tensor, others: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(mean of s' [..., n, d], reward [..., n]) at own (s, a) [n, d + p] before a population others [K, d] with weights [..., K].

        Weights are what W / (N - 1) is in the logs: on bins, the aggregate z.  Their sum is scaled into the range of the fit.
        """
        met = weights.sum(-1, keepdim=True)
        inside = torch.minimum(torch.maximum(met, self.mass[0]), self.mass[1])
        w = weights * torch.where(met > 0, inside / met.clamp_min(1e-300), 0.0)
        K = self.ground.other(others.unsqueeze(0), self.anchors.state)
        # [m, K]: what a member at each of the others' states means to each anchor.
        meant = (K @ self.anchors.weights.unsqueeze(-1)).squeeze(-1)
        alone = self.ground.own(own.unsqueeze(-2), own.unsqueeze(-2)).squeeze(-1).squeeze(-1)
        square = alone * ((w @ self.ground.other(others, others)) * w).sum(-1, keepdim=True)
        inner = self.ground.own(own, self.anchors.own) * (w @ meant.mT).unsqueeze(-2)
        apart = (square.unsqueeze(-1) + self.anchors.square - 2 * inner).clamp_min(0.0)
        Y = (apart / (-2 * self.width.square())).exp() @ self.weights + self.offsets
        return Y[..., :-1], Y[..., -1]


def solve(
    table: Table, W: Tensor, *, gamma: float, sigma: float, kernel: str = "embedding"
) -> tuple[Tensor, Fit]:
    """Variable projection: (objective [...], fit) of graphons W [..., U, U] between units.

    min over c, b of sum_rows |Y - K c - b|^2 + n gamma c' K_mm c, divided by n, as in `regression.solve`, whose remarks on gradients,
    inducing points and width hold here too.
    """
    weights = table.weights(W)
    anchors = anchors_of(table, weights)
    seen = torch.cat(
        [
            _twice(_distances, weights, anchors.weights, anchors.square, anchors, table, times).flatten(-3)
            for times in table.blocks(len(table.at), table.probes)
        ],
        -1,
    )
    # What rounding leaves of the distance of a row to itself is no distance.
    apart = torch.where(seen > 1e-12 * anchors.square.mean(-1, keepdim=True), seen, torch.nan)
    width = sigma * apart.nanmedian(-1).values.nan_to_num(1.0).sqrt()
    Kmm = _among(table, weights, anchors, width)
    n, q, m = table.samples, table.target.shape[-1], len(table.at)

    def features(times: Tensor, weights: Tensor, mine: Tensor, square: Tensor, width: Tensor) -> Tensor:
        apart = _distances(weights, mine, square, anchors, table, times)
        return (apart / (-2 * width[..., None, None, None].square())).exp().flatten(-3, -2)

    moved = (weights, anchors.weights, anchors.square, width)
    leading = W.shape[:-2]
    with torch.no_grad():
        # Features in the coordinates of the Cholesky factor of K_mm, where the penalty is the identity: their Gram matrix stays
        # positive where K_mm is nearly singular, as it is for wide kernels.
        factor = torch.linalg.cholesky(Kmm)
        gram = torch.zeros(*leading, m, m, dtype=torch.float64)
        moment, sum_K = gram.new_zeros(*leading, m, q), gram.new_zeros(*leading, m)
        for times in table.blocks(m):
            K = features(times, *moved)
            K = torch.linalg.solve_triangular(factor.mT, K, upper=True, left=False)
            gram, sum_K = gram + K.mT @ K, sum_K + K.sum(-2)
            moment = moment + K.mT @ table.target[times].flatten(0, 1)
        mean_K, mean_Y = sum_K / n, table.target.mean((0, 1))
        gram = gram - n * mean_K.unsqueeze(-1) * mean_K.unsqueeze(-2)
        gram = gram + gamma * n * torch.eye(m, dtype=torch.float64)
        moment = moment - n * mean_K.unsqueeze(-1) * mean_Y
        white = torch.cholesky_solve(moment, torch.linalg.cholesky(gram))
        c = torch.linalg.solve_triangular(factor.mT, white, upper=True)
        b = mean_Y - (mean_K.unsqueeze(-2) @ white).squeeze(-2)

    def residuals(weights: Tensor, mine: Tensor, square: Tensor, width: Tensor, times: Tensor) -> Tensor:
        K = features(times, weights, mine, square, width)
        rest = table.target[times].flatten(0, 1) - K @ c - b.unsqueeze(-2)
        return rest.mT @ rest

    scatter = torch.zeros(*leading, q, q, dtype=torch.float64)
    for times in table.blocks(m):
        scatter = scatter + _twice(residuals, *moved, times)
    loss = torch.diagonal(scatter, dim1=-2, dim2=-1).sum(-1)
    penalty = gamma * n * (c * (Kmm @ c)).sum((-2, -1))
    still = Anchors(anchors.state, anchors.own, anchors.weights.detach(), anchors.square.detach())
    mass = weights.detach().sum(-1)
    noise = scatter.detach()[..., :-1, :-1] / n
    fit = Fit(table.ground, still, width.detach(), c, b, noise, torch.stack([mass.amin(-1), mass.amax(-1)]))
    return (loss + penalty) / n, fit


def _twice(function: Callable[..., Tensor], weights: Tensor, *args: Any) -> Tensor:
    """function(weights, *args), computed again in the backward pass, so that nothing of it is kept until then."""
    if not weights.requires_grad:
        return function(weights, *args)
    found: Tensor = checkpoint(function, weights, *args, use_reentrant=False)
    return found


def _distances(
    weights: Tensor, mine: Tensor, square: Tensor, anchors: Anchors, table: Table, times: Tensor
) -> Tensor:
    """`distances` to the table's own inducing points, with their weights and square norms as arguments."""
    cross = None if table.cross is None else table.cross[times]
    return distances(table, weights, Anchors(anchors.state, anchors.own, mine, square), times, cross)


def _met(weights: Tensor, seen: Tensor, ground: Ground, state: Tensor, part: Tensor) -> Tensor:
    """Inner products [..., c, m], without own, of the anchors `part` [c] (weights [..., c, K]) with all of them (seen [..., m, K])."""
    K = ground.other(state[part].unsqueeze(1), state.unsqueeze(0))
    meant = (K @ seen.unsqueeze(-3).unsqueeze(-1)).squeeze(-1)
    return (meant @ weights.unsqueeze(-1)).squeeze(-1)


def _among(table: Table, weights: Tensor, anchors: Anchors, width: Tensor) -> Tensor:
    """K between the inducing points [..., m, m], with jitter."""
    m = len(table.at)
    rows = [
        _twice(_met, anchors.weights[..., part, :], anchors.weights, table.ground, anchors.state, part)
        for part in torch.arange(m).split(max(1, BLOCK // (m * table.agents**2)))
    ]
    inner = table.ground.own(anchors.own, anchors.own) * torch.cat(rows, -2)
    apart = anchors.square.unsqueeze(-1) + anchors.square.unsqueeze(-2) - 2 * inner
    # Rounding leaves the distance of a point to itself, whose root has no derivative, away from 0.
    apart = apart.clamp_min(0.0) * (1 - torch.eye(m, dtype=torch.float64))
    K = (apart / (-2 * width[..., None, None].square())).exp()
    return 0.5 * (K + K.mT) + JITTER * torch.eye(m, dtype=torch.float64)


def _rest(table: Table, W: Tensor, fit: Fit) -> Iterator[Tensor]:
    """Residuals [..., c, N, d + 1] of other rows than those of the fit, block by block, under the kernel k of the fit."""
    table, weights = replace(table, ground=fit.ground), table.weights(W)
    for times in table.blocks(len(fit.anchors.own)):
        apart = distances(table, weights, fit.anchors, times)
        K = (apart / (-2 * fit.width[..., None, None, None].square())).exp()
        yield table.target[times] - K @ fit.weights.unsqueeze(-3) - fit.offsets[..., None, None, :]


def loss_on(table: Table, W: Tensor, fit: Fit) -> Tensor:
    """Mean squared error [...] of a fit on other rows (held-out episodes) at the graphon W [..., U, U]."""
    parts = [rest.square().sum((-3, -2, -1)) for rest in _rest(table, W, fit)]
    return torch.stack(parts).sum(0) / table.samples


def own_errors(table: Table, W: Tensor, fit: Fit, agents: int) -> Tensor:
    """Squared errors [N] of every agent's own rows at the rows of W [N, N]."""
    return torch.stack([rest.square().sum((0, 2)) for rest in _rest(table, W, fit)]).sum(0)


def check_excitation(table: Table, W: Tensor) -> None:
    """Raises DataError where what agents meet does not vary between the rows: nothing can be learned about the graphon from them."""
    weights = table.weights(W)
    anchors, times = anchors_of(table, weights), table.probes
    own, state = table.own[times], table.state[times]
    _, square = norms(table.ground, own, state, weights)
    _, inner = products(table.ground, own, state, weights, anchors)
    alone = table.ground.own(anchors.own.unsqueeze(-2), anchors.own.unsqueeze(-2)).squeeze(-1).squeeze(-1)
    apart = square.unsqueeze(-1) + anchors.square / alone - 2 * inner
    spread = float(0.5 * apart.mean().clamp_min(0.0)) ** 0.5
    if spread < 1e-4:
        raise not_identifiable(spread)
