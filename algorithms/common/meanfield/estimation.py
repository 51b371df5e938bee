"""Estimating a graphon from logs of sampled agents, positions known or not (Zhang et al. 2024, arXiv 2310.17531, part C).

The inner regression (`regression`) is solved exactly for every candidate, so that only the graphon's few parameters are searched:
L-BFGS on the projected loss from several starts, classes compared on held-out episodes (agents of one episode share their z).
The scale of a graphon is not identified where the regression is free: W and c W with another f are the same model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from mobula.algorithms.common.meanfield import embedding, regression
from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.continuous import Bins, ContinuousLogs
from mobula.envs.meanfield.graphon import FiniteMFG, Graphon
from mobula.envs.meanfield.logs import Logs
from mobula.errors import ConfigError, DataError
from mobula.metrics import spread

LARGEST_EXACT = 8
"""Agents up to which every permutation of unknown positions is tried."""


@dataclass(frozen=True)
class Settings:
    """How a graphon is fitted.

    gamma, sigma  ridge, and width of the kernel in median distances of z
    inducing, kernel  points of the Nystroem approximation; "product" or "embedding" (for continuous logs: embedding)
    ground_width  continuous logs: width of the Gaussian kernel k on states and actions, in standard deviations of each coordinate
    ground    continuous logs: another kernel k in its place
    restarts  starts of the search; hidden positions get twice as many
    held_out  share of the episodes that classes, gamma and sigma are judged on
    bandwidth whether gamma and sigma are chosen (by factors of 10 and 2) on the held-out episodes
    """

    gamma: float = 1e-3
    sigma: float = 1.0
    inducing: int = 50
    kernel: str = "product"
    restarts: int = 4
    held_out: float = 0.2
    bandwidth: bool = True
    iterations: int = 60
    seed: int = 0
    ground_width: float = 3.0
    ground: embedding.Ground | None = None


@dataclass(frozen=True)
class Shape:
    """A graphon of some class: what is searched over.

    kind       "const", "exp", "sbm" or "list"
    borders    sbm: block borders in (0, 1), ascending
    values     parameters: sbm the upper triangle of logits, exp [log theta], else empty
    candidate  list: the index of the graphon
    """

    kind: str
    borders: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    candidate: int = -1


@dataclass
class Learned:
    """What was learned: shape, its graphon, positions [N] of the agents, the regressions (one, or one a step), losses.

    steps     the shape of every step, where steps have models of their own; they share class, borders and positions
    held_out  {class: held-out loss} of every class that was tried; of the fit itself under "final" where it was tuned
    """

    shape: Shape
    positions: Tensor
    fits: list[Any]
    loss: float
    held_out: dict[str, float] = field(default_factory=dict)
    gamma: float = 0.0
    sigma: float = 0.0
    candidates: Sequence[Graphon] = ()
    steps: list[Shape] = field(default_factory=list)

    @property
    def graphon(self) -> Graphon:
        return as_graphon(self.shape, self.candidates)


def as_graphon(shape: Shape, candidates: Sequence[Graphon] = ()) -> Graphon:
    """The function W(x, y) of a shape."""
    if shape.kind == "const":
        return graphon.constant(1.0)
    if shape.kind == "exp":
        return graphon.exponential(math.exp(shape.values[0]))
    if shape.kind == "list":
        return candidates[shape.candidate]
    return graphon.block_model(shape.borders, block_values(torch.tensor(shape.values, dtype=torch.float64)))


def block_values(u: Tensor) -> Tensor:
    """The symmetric block matrix [k, k] of logits u [k (k + 1) / 2], by rows of the upper triangle."""
    k = int((math.isqrt(8 * len(u) + 1) - 1) // 2)
    rows, columns = torch.triu_indices(k, k)
    out = u.new_zeros(k, k)
    out = out.index_put((rows, columns), u.sigmoid())
    return torch.where(torch.ones(k, k).tril(-1).bool(), out.mT, out)


def unit_graphon(shape: Shape, u: Tensor, labels: Tensor, candidates: Sequence[Graphon] = ()) -> Tensor:
    """W between the units of `units_of`, differentiable in the parameters u."""
    if shape.kind == "const":
        return torch.ones(1, 1, dtype=torch.float64)
    if shape.kind == "sbm":
        return block_values(u)
    if shape.kind == "exp":
        return torch.tanh(u[0].exp() * labels[:, None] * labels[None] / 2)
    return graphon.matrix(candidates[shape.candidate], labels)


def units_of(shape: Shape, labels: Tensor) -> Tensor:
    """The unit [N] of every agent: one for all, its block, or itself."""
    if shape.kind == "const":
        return torch.zeros(len(labels), dtype=torch.int64)
    if shape.kind == "sbm":
        return torch.bucketize(labels, torch.tensor(shape.borders, dtype=torch.float64), right=True)
    return torch.arange(len(labels))


# Search over the parameters of one class ---------------------------------------------------------------------------


class Search:
    """The projected loss of shapes and positions on some logs."""

    def __init__(
        self, logs: Logs | ContinuousLogs, settings: Settings, candidates: Sequence[Graphon] = ()
    ) -> None:
        self.logs, self.settings, self.candidates = logs, settings, candidates
        # Two regressions behind the same functions: on the aggregate, or on mean embeddings.
        self.model: Any = embedding if isinstance(logs, ContinuousLogs) else regression
        self._tables: dict[tuple[int, ...], Any] = {}
        self._rows: embedding.Table | None = None

    def table(self, shape: Shape, labels: Tensor) -> Any:
        """Rows of the logs for the shape's units."""
        return self.rows(units_of(shape, labels))

    def rows(self, units: Tensor) -> Any:
        """Rows of the logs for the units [N] of the agents."""
        s = self.settings
        if isinstance(self.logs, ContinuousLogs):
            if self._rows is None:
                ground = s.ground or embedding.gaussian_ground(self.logs, s.ground_width)
                self._rows = embedding.tabulate(
                    self.logs, units, inducing=s.inducing, kernel=s.kernel, seed=s.seed, ground=ground
                )
            # Rows of agents, whatever their units: the kernel values are shared.
            return replace(self._rows, units=units)
        key = tuple(units.tolist())
        if key not in self._tables:
            if len(self._tables) > 400:
                self._tables.clear()
            self._tables[key] = regression.tabulate(
                self.logs, units, inducing=s.inducing, kernel=s.kernel, seed=s.seed
            )
        return self._tables[key]

    def solve(self, shape: Shape, labels: Tensor, u: Tensor | None = None) -> tuple[Tensor, Any]:
        """(objective, fit) at the shape's parameters, or at u."""
        s = self.settings
        at = torch.tensor(shape.values, dtype=torch.float64) if u is None else u
        W = unit_graphon(shape, at, labels, self.candidates)
        found: tuple[Tensor, Any] = self.model.solve(
            self.table(shape, labels), W, gamma=s.gamma, sigma=s.sigma, kernel=s.kernel
        )
        return found

    def loss_on(self, shape: Shape, labels: Tensor, fit: Any) -> float:
        """Mean squared error of a fit to other logs on these."""
        at = torch.tensor(shape.values, dtype=torch.float64)
        W = unit_graphon(shape, at, labels, self.candidates)
        with torch.no_grad():
            return float(self.model.loss_on(self.table(shape, labels), W, fit))

    def value(self, shape: Shape, labels: Tensor) -> float:
        """The objective."""
        with torch.no_grad():
            return float(self.solve(shape, labels)[0])

    def descend(self, shape: Shape, labels: Tensor, iterations: int | None = None) -> tuple[float, Shape]:
        """L-BFGS over the parameters from those of the shape."""
        if not shape.values:
            return self.value(shape, labels), shape

        # In sums over samples, so that a first step of unit length is neither tiny nor wild.
        n = self.table(shape, labels).samples

        def objective(x: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            u = torch.tensor(x, dtype=torch.float64, requires_grad=True)
            value, _ = self.solve(shape, labels, u)
            (gradient,) = torch.autograd.grad(value, u)
            return n * float(value.detach()), n * gradient.numpy()

        # Logits beyond 8 are block values of 0 and 1; log theta of -5 and 5 are the shape x y and a step.
        bound = 8.0 if shape.kind == "sbm" else 5.0
        found = minimize(
            objective,
            np.array(shape.values),
            jac=True,
            method="L-BFGS-B",
            bounds=[(-bound, bound)] * len(shape.values),
            options={"maxiter": iterations or self.settings.iterations, "ftol": 1e-6, "gtol": 5e-2},
        )
        shape = replace(shape, values=tuple(float(x) for x in found.x))
        return float(found.fun) / n, shape

    def fit_known(self, shape: Shape, labels: Tensor) -> tuple[float, Shape]:
        """Parameters, and for block models the borders, by turns: each border to its best place, until none moves."""
        loss, shape = self.descend(shape, labels)
        if shape.kind != "sbm" or not shape.borders:
            return loss, shape
        places = _places(labels)
        for _ in range(10):
            before = loss
            for k in range(len(shape.borders)):
                low = shape.borders[k - 1] if k else 0.0
                high = shape.borders[k + 1] if k + 1 < len(shape.borders) else 1.0
                options = [p for p in places if low < p < high]
                moved = [
                    replace(shape, borders=(*shape.borders[:k], p, *shape.borders[k + 1 :])) for p in options
                ]
                values = [self.value(option, labels) for option in moved]
                if values and min(values) < loss - 1e-12:
                    loss, shape = self.descend(moved[int(np.argmin(values))], labels)
            if loss >= before - 1e-9 * abs(before):
                break
        return loss, shape

    # Unknown positions -------------------------------------------------------------------------------------------

    def fit_hidden(self, shape: Shape, generator: torch.Generator) -> tuple[float, Shape, Tensor]:
        """Parameters and positions (a permutation of the grid) by turns, from random positions."""
        N = self.logs.agents
        grid = graphon.cells(N)
        labels = grid[torch.randperm(N, generator=generator)]
        loss, shape = self.descend(shape, labels, 15)
        for _ in range(10):
            before = loss
            if N <= LARGEST_EXACT:
                value, moved = self.best_permutation(shape, grid)
                accepted = value < loss - 1e-12
                labels, loss = (moved, value) if accepted else (labels, loss)
            elif shape.kind == "sbm":
                loss, shape, labels = self.move_between_blocks(loss, shape, labels)
            elif shape.kind in ("exp", "list"):
                loss, labels = self.sort_by_degree(loss, shape, labels)
            loss, shape = self.descend(shape, labels, 10)
            if loss >= before - 1e-9 * abs(before):
                break
        return loss, shape, labels

    def move_between_blocks(self, loss: float, shape: Shape, labels: Tensor) -> tuple[float, Shape, Tensor]:
        """A sweep over the agents: each goes to the block with the smallest loss of all agents, if that is a decrease.

        A move changes z of the agent and of everybody else, and the sizes of two blocks; borders follow the sizes.
        """
        blocks = units_of(shape, labels)
        k, N = len(shape.borders) + 1, len(labels)
        for i in range(N):
            own = int(blocks[i])
            if int((blocks == own).sum()) == 1:
                continue
            options = []
            for b in range(k):
                if b != own:
                    moved = blocks.clone()
                    moved[i] = b
                    new, places = arranged(shape, moved)
                    options.append((self.value(new, places), new, places, moved))
            value, new, places, moved = min(options, key=lambda option: option[0])
            if value < loss - 1e-12:
                loss, shape, labels, blocks = value, new, places, moved
        return loss, shape, labels

    def sort_by_degree(self, loss: float, shape: Shape, labels: Tensor) -> tuple[float, Tensor]:
        """For a graphon that is monotone in x: agents sorted by the degree that fits their own rows best.

        Every agent is tried at every position of the grid, everybody else held; the order of the best ones (their mean under
        exp(-loss / smallest loss), so that ties do not matter) is the new permutation, if it lowers the loss.
        """
        N = len(labels)
        grid = graphon.cells(N)
        with torch.no_grad():
            _, fit = self.solve(shape, labels)
            table = self.table(shape, labels)
            error = torch.empty(N, N, dtype=torch.float64)
            for k, place in enumerate(grid.tolist()):
                # Row i of the graphon as if agent i stood at the place: only its own z is read.
                W = self.at_place(shape, place, labels)
                error[:, k] = self.model.own_errors(table, W, fit, N)
        weight = (-(error - error.amin(1, keepdim=True)) / error.amin().clamp_min(1e-12)).softmax(1)
        order = (weight @ grid).argsort(stable=True)
        moved = torch.empty_like(labels)
        moved[order] = grid
        value = self.value(shape, moved)
        return (value, moved) if value < loss - 1e-12 else (loss, labels)

    def at_place(self, shape: Shape, place: float, labels: Tensor) -> Tensor:
        """W [N, N] whose row i is W(place, labels): what every agent would meet at the place."""
        x = torch.full_like(labels, place)
        return as_graphon(shape, self.candidates)(x, labels).expand(len(labels), -1)

    def best_permutation(self, shape: Shape, grid: Tensor) -> tuple[float, Tensor]:
        """The best of all N! positions on the grid at fixed parameters (N <= 8), in batches."""
        N = len(grid)
        every = torch.tensor(list(itertools.permutations(range(N))))
        s = self.settings
        table = self.rows(torch.arange(N))
        W = graphon.matrix(as_graphon(shape, self.candidates), grid)
        best, chosen = float("inf"), every[0]
        size = max(1, int(2e6 // (table.samples * s.inducing)))
        with torch.no_grad():
            for part in every.split(size):
                moved = W[part[:, :, None], part[:, None, :]]
                losses, _ = self.model.solve(table, moved, gamma=s.gamma, sigma=s.sigma, kernel=s.kernel)
                index = int(losses.argmin())
                if float(losses[index]) < best - 1e-12:
                    best, chosen = float(losses[index]), part[index]
        # The same objective as everywhere else, whose rows may be merged.
        return self.value(shape, grid[chosen]), grid[chosen]


def arranged(shape: Shape, blocks: Tensor) -> tuple[Shape, Tensor]:
    """Positions [N] for block numbers [N] with every block a stretch of the grid, and the shape with those borders."""
    N = len(blocks)
    size = torch.bincount(blocks, minlength=len(shape.borders) + 1)
    labels = torch.empty(N, dtype=torch.float64)
    labels[blocks.argsort(stable=True)] = graphon.cells(N)
    return replace(shape, borders=tuple((size.cumsum(0)[:-1].double() / N).tolist())), labels


def _places(labels: Tensor, most: int = 50) -> list[float]:
    """Where a border may stand: between two neighbours, at most `most` of them."""
    between = 0.5 * (labels.sort().values[1:] + labels.sort().values[:-1])
    between = between[torch.linspace(0, len(between) - 1, min(most, len(between))).round().long()]
    return [float(x) for x in between]


def parse(kind: str) -> tuple[str, int]:
    """("sbm", k) of "sbm(k)"; ("const" | "exp" | "list", 0)."""
    if kind in ("const", "exp", "list"):
        return kind, 0
    if kind.startswith("sbm(") and kind.endswith(")") and kind[4:-1].isdigit() and 1 <= int(kind[4:-1]) <= 20:
        return "sbm", int(kind[4:-1])
    raise ConfigError(
        f"graphon_class is {kind!r}; it is auto, const, exp, list or sbm(k) with k from 1 to 20"
    )


def start(kind: str, generator: torch.Generator, labels: Tensor) -> Shape:
    """A random start of a class: blocks of random logits with borders at random gaps, theta log-uniform on [0.3, 10]."""
    name, k = parse(kind)
    if name == "exp":
        low, high = math.log(0.3), math.log(10.0)
        return Shape(
            "exp", (), (low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64)),)
        )
    if name == "sbm":
        logits = torch.randn(k * (k + 1) // 2, generator=generator, dtype=torch.float64)
        places = _places(labels)
        if len(places) < k - 1:
            raise DataError(f"{len(labels)} agents cannot be split into {k} blocks")
        # One border in each of k - 1 equal stretches of the places, so that starts spread over the interval.
        borders = []
        for part in np.array_split(np.arange(len(places)), max(k - 1, 1)):
            if k > 1:
                borders.append(places[int(part[int(torch.randint(len(part), (), generator=generator))])])
        return Shape("sbm", tuple(borders), tuple(logits.tolist()))
    return Shape("const") if name == "const" else Shape("list", candidate=0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of tensors in one order, so that a task on another process gives the same numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attempt(
    logs: Logs | ContinuousLogs, settings: Settings, kind: str, index: int, candidates: Sequence[Graphon]
) -> tuple[float, Shape, Tensor]:
    """(loss, shape, positions) from start number `index` of a class, or of candidate number `index`: the work of one task."""
    with one_thread():
        word = np.random.SeedSequence([settings.seed, index, sum(map(ord, kind))]).generate_state(
            1, np.uint64
        )[0]
        g = torch.Generator().manual_seed(int(word >> 1))
        search = Search(logs, settings, candidates)
        grid = graphon.cells(logs.agents)
        labels = grid if logs.labels is None else logs.labels
        shape = start(kind, g, labels)
        if kind == "list":
            shape = replace(shape, candidate=index % len(candidates))
        if logs.labels is None and kind != "const":
            if shape.kind == "sbm":
                # Balanced blocks.
                k = len(shape.borders) + 1
                shape = replace(
                    shape, borders=tuple(round(N / k * logs.agents) / logs.agents for N in range(1, k))
                )
            # Hundreds of moves are scored: with half the inducing points, and the result once more with all.
            rough = Search(logs, replace(settings, inducing=max(2, settings.inducing // 2)), candidates)
            _, shape, labels = rough.fit_hidden(shape, g)
            loss, shape = search.descend(shape, labels)
        else:
            loss, shape = search.fit_known(shape, labels)
        return loss, shape, labels


def learn(
    logs: Logs | ContinuousLogs,
    kind: str = "auto",
    settings: Settings | None = None,
    *,
    candidates: Sequence[Graphon] = (),
    share_time: bool = True,
    workers: int = 0,
) -> Learned:
    """Fits transitions, rewards and graphon to logs.

    kind     "const", "exp", "sbm(k)", "list" (of `candidates`), or "auto": the best of const, exp and sbm(2) on held-out episodes
    share_time  one model for all steps; otherwise a regression and a graphon a step, searched from the one of all steps
    workers  0: starts and candidates run in this process; else as Ray tasks.  The result is the same

    Raises DataError where z does not vary or there are too few episodes to hold any out.
    """
    settings = settings or Settings()
    kinds = ["const", "exp", "sbm(2)"] if kind == "auto" else [kind]
    for one in kinds:
        parse(one)
    if "list" in kinds and not candidates:
        raise ConfigError("graphon_class is 'list', but there are no candidates: name some graphons")
    if logs.agents < 2:
        raise DataError(f"{logs.agents} agent has no neighbours: at least 2 are needed")
    whole = Search(logs, settings)
    flat = whole.table(Shape("const"), graphon.cells(logs.agents))
    whole.model.check_excitation(flat, torch.ones(1, 1, dtype=torch.float64))
    train, held = split(logs, settings)
    if held is None and (kind == "auto" or settings.bandwidth):
        raise DataError(
            f"{logs.episodes} episode cannot be split for choosing {'a class' if kind == 'auto' else 'the kernel'}:"
            " log at least 2, or fix graphon_class and bandwidth"
        )
    starts = settings.restarts * (2 if logs.labels is None else 1)
    jobs = []
    for one in kinds:
        tries = {"const": 1, "list": len(candidates)}.get(one, starts)
        if one == "list" and logs.labels is None:
            tries *= starts
        jobs += [(one, i) for i in range(tries)]
    found = spread(attempt, [(train, settings, one, i, candidates) for one, i in jobs], workers, "fits")
    best: dict[str, tuple[float, Shape, Tensor]] = {}
    for (one, _), answer in zip(jobs, found, strict=True):
        if one not in best or answer[0] < best[one][0] - 1e-12:
            best[one] = answer
    with one_thread():
        chosen, scores = kinds[0], {}
        if held is not None:
            scores = {one: _held_out(train, held, settings, best[one], candidates) for one in kinds}
            # Within a hair the simpler class, which comes first.
            chosen = min(kinds, key=lambda one: scores[one] + 1e-9 * kinds.index(one))
        _, shape, labels = best[chosen]
        if held is not None and settings.bandwidth:
            settings, scores["final"] = _bandwidth(train, held, settings, best[chosen], candidates)
        search = Search(logs, settings, candidates)
        loss, shape = search.descend(shape, labels)
        steps, fits = [], []
        for part in [logs] if share_time else [logs.step(h) for h in range(logs.horizon)]:
            search = Search(part, settings, candidates)
            steps.append(shape if share_time else search.descend(shape, labels)[1])
            with torch.no_grad():
                fits.append(search.solve(steps[-1], labels)[1])
    return Learned(
        shape,
        labels,
        fits,
        loss,
        scores,
        settings.gamma,
        settings.sigma,
        candidates,
        [] if share_time else steps,
    )


def split(logs: Any, settings: Settings) -> tuple[Any, Any]:
    """(training, held-out) episodes; None where there is only one."""
    L = logs.episodes
    if L < 2 or settings.held_out <= 0:
        return logs, None
    order = torch.randperm(L, generator=torch.Generator().manual_seed(settings.seed))
    size = min(max(1, round(settings.held_out * L)), L - 1)
    return logs.select(order[size:]), logs.select(order[:size])


def _held_out(
    train: Any,
    held: Any,
    settings: Settings,
    found: tuple[float, Shape, Tensor],
    candidates: Sequence[Graphon],
) -> float:
    _, shape, labels = found
    with torch.no_grad():
        _, fit = Search(train, settings, candidates).solve(shape, labels)
    return Search(held, settings, candidates).loss_on(shape, labels, fit)


def _bandwidth(
    train: Any,
    held: Any,
    settings: Settings,
    found: tuple[float, Shape, Tensor],
    candidates: Sequence[Graphon],
) -> tuple[Settings, float]:
    options = [
        replace(settings, gamma=settings.gamma * a, sigma=settings.sigma * b)
        for a, b in itertools.product((1.0, 0.1, 10.0), (1.0, 0.5, 2.0))
    ]
    scores = [_held_out(train, held, option, found, candidates) for option in options]
    return options[int(np.argmin(scores))], min(scores)


# Plug-in --------------------------------------------------------------------------------------------------------


def plug_in(learned: Learned, like: FiniteMFG, labels: Tensor) -> FiniteMFG:
    """The game of a fitted model on cells at `labels` [M], with the initial law and horizon of `like`.

    Here z is the integral over cells, 1 / M with the own cell, as in the limit; N - 1 without self was for the finite data.
    """
    M = len(labels)
    fits = learned.fits

    def model(h: int, z: Tensor) -> tuple[Tensor, Tensor]:
        return fits[h if len(fits) > 1 else 0].predict(z)

    W, timed = _graphons(learned, labels)
    law = like.mu0[:1].expand(M, -1)
    return FiniteMFG(f"{like.name} (learned)", like.states, like.actions, like.horizon, law, W, model, timed)


def plug_in_bins(learned: Learned, bins: Bins, horizon: int, labels: Tensor) -> FiniteMFG:
    """The game of a model fitted to continuous logs, its line of states cut into bins, on cells at `labels` [M].

    The aggregate z on bins is a population at their centres; from a centre, the next state is Gaussian about f with the covariance of
    the residuals, and goes to a bin with its probability there.  Bins are an approximation of the order of their width.
    """
    fits, centres = learned.fits, bins.centres
    B, A = len(centres), len(bins.actions)
    own = torch.cat([centres.repeat_interleave(A, 0), bins.actions.repeat(B, 1)], -1)
    width = bins.edges[1] - bins.edges[0]

    def model(h: int, z: Tensor) -> tuple[Tensor, Tensor]:
        fit = fits[h if len(fits) > 1 else 0]
        mean, r = fit.predict(own, centres, z)
        # Noise far below the width of a bin is no noise: a step between bins.
        deviation = fit.noise[0, 0].sqrt().clamp_min(1e-3 * width)
        below = torch.special.ndtr((bins.edges[1:-1] - mean) / deviation)
        zero = torch.zeros_like(below[..., :1])
        P = torch.cat([zero, below, zero + 1.0], -1).diff(dim=-1)
        return P.unflatten(-2, (B, A)), r.unflatten(-1, (B, A))

    W, timed = _graphons(learned, labels)
    return FiniteMFG("bins (learned)", B, A, horizon, bins.law.expand(len(labels), -1), W, model, timed)


def _graphons(learned: Learned, labels: Tensor) -> tuple[Tensor, bool]:
    """(W [M, M], False), or (W [H, M, M], True) where every step has its own."""
    if not learned.steps:
        return graphon.matrix(learned.graphon, labels), False
    each = [graphon.matrix(as_graphon(s, learned.candidates), labels) for s in learned.steps]
    return torch.stack(each), True


def shown(values: Tensor) -> Tensor:
    """Graphon values divided by the largest, so that they can be compared: the scale is not identified."""
    return values / values.max().clamp_min(1e-300)


def cell_of(learned: Learned, cells: Tensor, agents: Tensor) -> Tensor:
    """The cell [M] whose learned policy an agent of true label `cells` [M] follows: that of the sampled agent nearest to it.

    agents [N]: true labels of the sampled agents.  The identity where positions were known and on the same grid.
    """
    nearest = (cells[:, None] - agents[None]).abs().argmin(1)
    found: Tensor = (learned.positions[nearest] * len(cells)).long().clamp_max(len(cells) - 1)
    return found
