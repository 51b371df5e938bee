"""Kernel regression of transitions and rewards on the neighbourhood aggregate, for one graphon or a batch of candidates.

For a candidate graphon W, agent i of an episode meets z^i = 1 / (N - 1) sum_{j != i} W(xi_i, xi_j) delta_{s^j}: N - 1 and no self,
as N is finite.  Targets are Y = (one-hot of the next state, reward).  Rows with the same z, state and action are one row with
a weight: agents of one block of a block model in one state share their z, so its rows do not grow with N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobula.envs.meanfield.logs import Logs
from mobula.errors import ConfigError, DataError

JITTER = 1e-9
PAIRS = 2000


@dataclass(frozen=True)
class Table:
    """Logs as weighted rows, padded to G groups of n rows; a padding row has weight 0.

    time, unit, state, action [G, n]: which (episode, step), which unit (agent or block), what it was and did
    weight [G, n], target [G, n, S + 1]: agents in the row, the mean of their Y
    counts [T, U, S]: agents of every unit in every state at every time
    within: what no regression on z can explain, sum over rows of the squares about the row's mean
    pairs [2, K]: rows (of the flattened groups) whose distances set the width of the kernel
    anchors [m]: rows whose z are the inducing points
    """

    time: Tensor
    unit: Tensor
    state: Tensor
    action: Tensor
    weight: Tensor
    target: Tensor
    counts: Tensor
    agents: int
    within: float
    pairs: Tensor
    anchors: Tensor
    states: int
    actions: int

    @property
    def samples(self) -> float:
        return float(self.weight.sum())


def tabulate(
    logs: Logs, units: Tensor, *, inducing: int = 50, kernel: str = "product", seed: int = 0
) -> Table:
    """Rows of the logs for the units [N] of the agents (numbers from 0: the blocks, or every agent its own).

    kernel  "product": a regression a pair (s, a), the groups; "embedding": one for all
    """
    L, H, N = logs.state.shape
    S, A, U = logs.states, logs.actions, int(units.max()) + 1
    time = torch.arange(L * H).view(L, H, 1).expand(L, H, N)
    unit = units.expand(L, H, N)
    key = ((time * U + unit) * S + logs.state) * A + logs.action
    rows, index = key.flatten().unique(return_inverse=True)
    weight = torch.bincount(index, minlength=len(rows)).double()
    Y = torch.cat([torch.nn.functional.one_hot(logs.next_state, S).double(), logs.reward.unsqueeze(-1)], -1)
    Y = Y.flatten(0, 2)
    mean = torch.zeros(len(rows), S + 1, dtype=torch.float64).index_add_(0, index, Y) / weight.unsqueeze(1)
    within = float((Y - mean[index]).square().sum())
    action, rest = rows % A, rows // A
    state, rest = rest % S, rest // S
    unit_of, time_of = rest % U, rest // U
    counts = torch.zeros(L * H * U * S, dtype=torch.float64)
    counts.index_add_(
        0, ((time * U + unit) * S + logs.state).flatten(), torch.ones(L * H * N, dtype=torch.float64)
    )
    groups = state * A + action if kernel == "product" else torch.zeros_like(state)
    G = S * A if kernel == "product" else 1
    order = groups.argsort(stable=True)
    size = torch.bincount(groups, minlength=G)
    place = torch.arange(len(rows)) - (size.cumsum(0) - size)[groups[order]]
    width = int(size.max())
    slot = groups[order] * width + place

    def padded(x: Tensor) -> Tensor:
        out = x.new_zeros(G * width, *x.shape[1:])
        out[slot] = x[order]
        return out.view(G, width, *x.shape[1:])

    g = torch.Generator().manual_seed(seed)
    flat = padded(weight).flatten()
    pairs = torch.multinomial(flat, 2 * PAIRS, replacement=True, generator=g).view(2, PAIRS)
    anchors = torch.multinomial(flat, min(inducing, len(rows)), generator=g)
    return Table(
        padded(time_of),
        padded(unit_of),
        padded(state),
        padded(action),
        padded(weight),
        padded(mean),
        counts.view(L * H, U, S),
        N,
        within,
        pairs,
        anchors,
        S,
        A,
    )


def aggregates(table: Table, W: Tensor) -> Tensor:
    """z [..., G, n, S] of every row for graphons W [..., U, U] between units."""
    met = W.unsqueeze(-3) @ table.counts
    own = torch.nn.functional.one_hot(table.state, table.states).double()
    self_weight = torch.diagonal(W, dim1=-2, dim2=-1)[..., table.unit].unsqueeze(-1)
    return (met[..., table.time, table.unit, :] - self_weight * own) / (table.agents - 1)


@dataclass(frozen=True)
class Fit:
    """A fitted regression: anchors [..., m, S] (z) with their actions and states [m], width [...], weights [..., G, m, S + 1],
    offsets [..., G, S + 1], and the range [2, ..., S] of the z that it was fitted on.
    """

    anchors: Tensor
    anchor_state: Tensor
    anchor_action: Tensor
    width: Tensor
    weights: Tensor
    offsets: Tensor
    low: Tensor
    high: Tensor
    states: int
    actions: int
    kernel: str

    def predict(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(P [..., S, A, S], r [..., S, A]) at z [..., S]: z is clipped to the range of the fit, rows of P become laws."""
        S, A, leading = self.states, self.actions, z.shape[:-1]
        z = torch.minimum(torch.maximum(z, self.low), self.high).reshape(-1, S)
        if self.kernel == "product":
            K = gaussian(z, self.anchors, self.width)
            Y = (K @ self.weights.permute(1, 0, 2).flatten(1)).unflatten(-1, (S * A, S + 1)) + self.offsets
        else:
            state = torch.arange(S).repeat_interleave(A)
            action = torch.arange(A).repeat(S)
            every = z.unsqueeze(-2).expand(*z.shape[:-1], S * A, S)
            K = embedding_kernel(
                every, state, action, self.anchors, self.anchor_state, self.anchor_action, self.width
            )
            Y = K @ self.weights[0] + self.offsets[0]
        Y = Y.reshape(*leading, S, A, S + 1)
        P = Y[..., :S].clamp(0.0, 1.0)
        mass = P.sum(-1, keepdim=True)
        return torch.where(mass > 0, P / mass.clamp_min(1e-300), 1.0 / S), Y[..., S]


def gaussian(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 width^2)): x [..., n, S], y [..., m, S], width [...] -> [..., n, m]."""
    square = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2) - 2 * x @ y.mT
    return (square.clamp_min(0.0) / (-2 * width[..., None, None].square())).exp()


def embedding_kernel(
    x: Tensor, x_state: Tensor, x_action: Tensor, y: Tensor, y_state: Tensor, y_action: Tensor, width: Tensor
) -> Tensor:
    """K(omega, omega') = exp(-|omega - omega'|^2_H / (2 width^2)) for mean embeddings omega = sum_s z(s) k(., (s^i, a^i, s)).

    k is the delta kernel on S x A x S, so <omega, omega'> = 1{s^i = s'^i, a^i = a'^i} z . z'.  x [..., n, S], y [..., m, S].
    """
    same = ((x_state.unsqueeze(-1) == y_state) & (x_action.unsqueeze(-1) == y_action)).double()
    square = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2) - 2 * same * (x @ y.mT)
    return (square.clamp_min(0.0) / (-2 * width[..., None, None].square())).exp()


def solve(
    table: Table, W: Tensor, *, gamma: float, sigma: float, kernel: str = "product"
) -> tuple[Tensor, Fit]:
    """Variable projection: (objective [...], fit) of the graphons W [..., U, U].

    min over c, b of sum_rows w |Y - K c - b|^2 + n gamma c' K_mm c, group by group, divided by n, all samples; b is the offset of a
    group.  c and b solve it exactly and are constants to autograd: by the envelope theorem the gradient in W is
    that of the objective at fixed c and b.  Inducing points are the z of fixed rows, so they move with W, as does the width, `sigma`
    times the median distance of z.
    """
    z = aggregates(table, W)
    S = table.states
    flat = z.flatten(-3, -2)
    first, second = flat[..., table.pairs[0], :], flat[..., table.pairs[1], :]
    distance = (first - second).square().sum(-1)
    # Identical pairs say nothing about the scale; where all are, any width will do.
    scale = torch.where(distance > 1e-24, distance, torch.nan).nanmedian(-1).values.nan_to_num(1.0).sqrt()
    width = sigma * scale
    anchors = flat[..., table.anchors, :]
    a_state, a_action = table.state.flatten()[table.anchors], table.action.flatten()[table.anchors]

    def kernels(z: Tensor, anchors: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        if kernel == "product":
            return gaussian(z, anchors.unsqueeze(-3), width.unsqueeze(-1)), gaussian(anchors, anchors, width)
        K = embedding_kernel(
            z[..., 0, :, :], table.state[0], table.action[0], anchors, a_state, a_action, width
        )
        mm = embedding_kernel(anchors, a_state, a_action, anchors, a_state, a_action, width)
        return K.unsqueeze(-3), mm

    if kernel not in ("product", "embedding"):
        raise ConfigError(f"kernel is {kernel!r}; it is 'product' or 'embedding'")
    K, Kmm = kernels(z, anchors, width)
    Kmm = Kmm + JITTER * torch.eye(Kmm.shape[-1], dtype=Kmm.dtype)
    w, Y = table.weight, table.target
    n = w.sum(-1)
    # One regression with a block-diagonal kernel: the ridge of every group is that of all samples.
    ridge = torch.full_like(n, gamma * table.samples)
    with torch.no_grad():
        share = n.clamp_min(1.0).unsqueeze(-1)
        wK = K * w.unsqueeze(-1)
        mean_K, mean_Y = wK.sum(-2) / share, (w.unsqueeze(-1) * Y).sum(-2) / share
        gram = wK.mT @ K - share.unsqueeze(-1) * mean_K.unsqueeze(-1) * mean_K.unsqueeze(-2)
        moment = wK.mT @ Y - share.unsqueeze(-1) * mean_K.unsqueeze(-1) * mean_Y.unsqueeze(-2)
        # In the coordinates of the Cholesky factor of K_mm the penalty is the identity.
        factor = torch.linalg.cholesky(Kmm).unsqueeze(-3)
        half = torch.linalg.solve_triangular(factor, gram, upper=False)
        white = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        white = 0.5 * (white + white.mT) + ridge[:, None, None] * torch.eye(
            white.shape[-1], dtype=white.dtype
        )
        right = torch.linalg.solve_triangular(factor, moment, upper=False)
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(white))
        c = torch.linalg.solve_triangular(factor.mT, solution, upper=True)
        b = mean_Y - (mean_K.unsqueeze(-2) @ c).squeeze(-2)
    residual = Y - K @ c - b.unsqueeze(-2)
    loss = (w.unsqueeze(-1) * residual.square()).sum((-3, -2, -1)) + table.within
    penalty = (ridge * (c * (Kmm.unsqueeze(-3) @ c)).sum((-2, -1))).sum(-1)
    # A group that was never seen is told what its state does on average, a state that was never seen stays.
    b, c = _fill(b, c, n, table)
    seen = (w > 0).unsqueeze(-1)
    low = z.detach().masked_fill(~seen, torch.inf).amin((-3, -2))
    high = z.detach().masked_fill(~seen, -torch.inf).amax((-3, -2))
    fit = Fit(anchors.detach(), a_state, a_action, width.detach(), c, b, low, high, S, table.actions, kernel)
    return (loss + penalty) / table.samples, fit


def _fill(b: Tensor, c: Tensor, n: Tensor, table: Table) -> tuple[Tensor, Tensor]:
    if len(n) == 1 or bool((n > 0).all()):
        return b, c
    S, A = table.states, table.actions
    b, c = b.clone(), c.clone()
    counts = n.view(S, A)
    for s, a in (counts == 0).nonzero().tolist():
        group, total = s * A + a, counts[s].sum()
        if total > 0:
            share = counts[s] / total
            b[..., group, :] = (share.unsqueeze(-1) * b[..., s * A : (s + 1) * A, :]).sum(-2)
            c[..., group, :, :] = (share[:, None, None] * c[..., s * A : (s + 1) * A, :, :]).sum(-3)
        else:
            b[..., group, :] = torch.nn.functional.one_hot(torch.tensor(s), S + 1).double()
            b[..., group, S] = float(table.target[..., S].min())
    return b, c


def loss_on(table: Table, W: Tensor, fit: Fit) -> Tensor:
    """Mean squared error [...] of a fit on other rows (held-out episodes), without its clipping."""
    z = aggregates(table, W)
    if fit.kernel == "product":
        K = gaussian(z, fit.anchors.unsqueeze(-3), fit.width.unsqueeze(-1))
    else:
        K = embedding_kernel(
            z[..., 0, :, :],
            table.state[0],
            table.action[0],
            fit.anchors,
            fit.anchor_state,
            fit.anchor_action,
            fit.width,
        ).unsqueeze(-3)
    residual = table.target - K @ fit.weights - fit.offsets.unsqueeze(-2)
    return ((table.weight.unsqueeze(-1) * residual.square()).sum((-3, -2, -1)) + table.within) / table.samples


def check_excitation(table: Table, W: Tensor) -> None:
    """Raises DataError where z does not vary between the rows: nothing about the graphon can be learned from them."""
    z = aggregates(table, W)
    w = table.weight.unsqueeze(-1)
    mean = (w * z).sum((-3, -2), keepdim=True) / table.samples
    spread = float(((w * (z - mean).square()).sum((-3, -2)) / table.samples).sum(-1).sqrt())
    if spread < 1e-4:
        raise not_identifiable(spread)


def not_identifiable(spread: float) -> DataError:
    """The error for logs in which z varies by `spread` only."""
    return DataError(
        f"graphon not identifiable from these logs: the neighbourhood aggregate varies by {spread:.1e} only; vary initial laws"
        " and actions between episodes"
    )


def own_errors(table: Table, W: Tensor, fit: Fit, agents: int) -> Tensor:
    """Squared errors [N] of every agent's own rows at z of W, whose units are the agents."""
    z = aggregates(table, W)
    if fit.kernel == "product":
        K = gaussian(z, fit.anchors.unsqueeze(-3), fit.width.unsqueeze(-1))
        residual = table.target - K @ fit.weights - fit.offsets.unsqueeze(-2)
    else:
        K = embedding_kernel(
            z[0], table.state[0], table.action[0], fit.anchors, fit.anchor_state, fit.anchor_action, fit.width
        )
        residual = (table.target[0] - K @ fit.weights[0] - fit.offsets[0]).unsqueeze(0)
    square = table.weight * residual.square().sum(-1)
    out = torch.zeros(agents, dtype=torch.float64)
    return out.index_add_(0, table.unit.flatten(), square.flatten())
