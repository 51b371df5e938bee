"""The bandits side by side, which do all the estimation, and RLlib's learner, which copies it into the module."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mobula.algorithms.bandits.emkf_bandit.math import (
    LARGEST_ORDER,
    arm_estimates,
    arm_features,
    bic,
    choose,
    chosen,
    hidden_size,
    naive_start,
    padded,
    random_start,
    refit_times,
    truncated,
)
from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace, mv
from mobula.learning.learners import Learner
from mobula.metrics import spread

logger = logging.getLogger("mobula")


def _em(
    model: StateSpace, y: Tensor, u: Tensor, iterations: int, known_C: Tensor | None, pool: bool
) -> kalman.Fit:
    return kalman.em(model, y, u, iterations=iterations, known_C=known_C, pool=pool)


def em(
    model: StateSpace, y: Tensor, u: Tensor, *, iterations: int, known_C: Tensor | None, workers: int
) -> kalman.Fit:
    """`kalman.em`, its series shared out over Ray tasks (`workers` 0: this process): no series knows of another."""
    jobs = [
        (model.select(part), y[part], u[part], iterations, None if known_C is None else known_C[part], False)
        for part in torch.arange(len(y)).tensor_split(max(1, min(workers, len(y))))
    ]
    found: list[kalman.Fit] = spread(_em, jobs, workers, "refits")
    longest = max(len(fit.trace) for fit in found)
    traces = [
        torch.nn.functional.pad(fit.trace, (0, 0, 0, longest - len(fit.trace)), value=math.nan)
        for fit in found
    ]
    return kalman.Fit(StateSpace.cat([fit.model for fit in found]), torch.cat(traces, 1))


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Refit:
    """A refit under way: the round that takes its model up, the means that were taken off its data, and what it finds.

    result() waits for (fit, order [N]).
    """

    due: int
    offset: Tensor
    input_offset: Tensor
    result: Callable[[], tuple[kalman.Fit, Tensor]]


class Streams:
    """N bandits side by side: what they have seen, their models, their filters and their statistics.

    A round is `context = observe(y)` (with inputs `observe(y, u)`), `arms = act(noise)`, `reward(r)`.

    context  what the arms' payoffs are regressed on: "filter" (filtered state), "obs" (y itself), "lags" (the last four y),
             "none" (a constant: a bandit without context); the last three are baselines
    model    the true models where they are known (oracle), else None: EM
    refit_once  fit at this round alone (a baseline)

    With `refit_delay` the rounds go on with the old model while a refit runs, in the background where it has `workers`; its model is
    taken up exactly that many rounds later, so that what the bandit does never depends on how fast the machine is.

    The other arguments are the hyper-parameters of `EMKFBanditConfig`.
    """

    def __init__(
        self,
        streams: int,
        m: int,
        arms: int,
        *,
        d: int | str = 4,
        v: float = 0.2,
        ridge: float = 1.0,
        em_iters: int = 40,
        refit: int = 500,
        refit_once: int | None = None,
        refit_delay: int = 0,
        init: str = "subspace",
        known_C: Any = None,
        arm_features: Any = None,
        inputs: int = 0,
        policy: str = "ts",
        window: int | None = None,
        inflate: bool = False,
        use_rewards: bool = False,
        normalise_gauge: bool = False,
        restarts: int = 1,
        workers: int = 0,
        forget: float = 1.0,
        pool: bool = False,
        demean: bool = False,
        intercept: bool = False,
        sigma: float | None = None,
        context: str = "filter",
        model: StateSpace | None = None,
    ) -> None:
        self.n, self.m, self.arms, self.inputs = streams, m, arms, inputs
        self.select_order = d == "bic"
        # With an order to be selected, models of all orders are held with LARGEST_ORDER dimensions, the spare ones at zero.
        self.d = hidden_size(d)
        self.order = torch.full((streams,), min(m, LARGEST_ORDER) if self.select_order else self.d)
        self.v, self.ridge, self.forget, self.policy, self.sigma = v, ridge, forget, policy, sigma
        self.em_iters, self.refit_every, self.refit_once, self.init = em_iters, refit, refit_once, init
        self.refit_delay = refit_delay
        self.pending: Refit | None = None
        self._thread: ThreadPoolExecutor | None = None
        self.known_C, self.maps = (
            None if value is None else torch.as_tensor(value, dtype=torch.float64)
            for value in (known_C, arm_features)
        )
        self.inflate, self.use_rewards = inflate, use_rewards
        self.window = None if window is None else int(window)
        self.normalise_gauge, self.restarts, self.pool = normalise_gauge, restarts, pool
        self.demean, self.intercept, self.kind, self.workers = demean, intercept, context, workers
        self.oracle = model is not None
        order = int(self.order[0])
        self.model = padded(naive_start(streams, order, m, inputs), self.d) if model is None else model
        if self.known_C is not None and not self.oracle:
            self.model = self.model._replace(C=self.known_C.expand(streams, m, self.d))
        size = {"filter": self.model.A.shape[-1], "obs": m, "lags": 4 * m, "none": 1}[context]
        self.p = size + (intercept and context != "none")
        self.q = self.p if self.maps is None else self.maps.shape[1]
        self.offset = torch.zeros(streams, m, dtype=torch.float64)
        self.input_offset = torch.zeros(streams, inputs, dtype=torch.float64)
        self.t = 0
        self.subspace_done = False
        self.refits = 0
        self.traces: list[Tensor] = []
        self.likelihood = torch.full((streams,), math.nan, dtype=torch.float64)
        # Histories, doubled in length when they are full.
        self.y = torch.empty(streams, 64, m, dtype=torch.float64)
        self.u = torch.empty(streams, 64, inputs, dtype=torch.float64)
        self.x = torch.empty(streams, 64, self.p, dtype=torch.float64)
        self.a = torch.empty(streams, 64, dtype=torch.int64)
        self.r = torch.empty(streams, 64, dtype=torch.float64)
        self.mean, self.cov = self.model.m0.clone(), self.model.P0.clone()
        self.squares = torch.zeros(streams, dtype=torch.float64)
        self._clear()

    def _clear(self) -> None:
        eye = torch.eye(self.q, dtype=torch.float64)
        shape = (1 if self.pool else self.n, self.arms if self.maps is None else 1, self.q)
        self.B = (self.ridge * eye).expand(*shape, self.q).clone()
        self.f = torch.zeros(shape, dtype=torch.float64)

    @property
    def draws(self) -> int:
        """J: standard normals that a round takes, beside the one that decides whether to explore."""
        return self.arms if self.maps is None else max(self.arms, self.q)

    # A round -----------------------------------------------------------------------------------------------

    def observe(self, y: Tensor, u: Tensor | None = None) -> Tensor:
        """The context [N, p] of the round that begins with y [N, m] (a row with a NaN: nothing was observed).

        u [N, k]: the inputs of this round, which move the context of the next.
        """
        self.t += 1
        if self.t > self.y.shape[1]:
            for name in ("y", "u", "x", "a", "r"):
                setattr(self, name, torch.cat([getattr(self, name)] * 2, 1))
        if self.kind == "filter" and self.due(self.t):
            self.begin_refit()
        if self.pending is not None and self.t == self.pending.due:
            self.take_up()
        self.y[:, self.t - 1] = y
        if u is not None:
            self.u[:, self.t - 1] = u
        if self.kind == "filter":
            mean, cov = self.mean, self.cov
            if self.t > 1:
                mean, cov = self._predict(mean, cov, self.u[:, self.t - 2])
            self.mean, self.cov, _, _ = kalman.update(self.model.C, self.model.R, mean, cov, y - self.offset)
        self.x[:, self.t - 1] = self._context()
        return self.x[:, self.t - 1]

    def _predict(self, mean: Tensor, cov: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        A, Q = self.model.A, self.model.Q
        drive = mv(self.model.D, u - self.input_offset)
        return mv(A, mean) + drive, kalman.symmetric(A @ cov @ A.mT + Q)

    def _context(self) -> Tensor:
        if self.kind == "filter":
            x = self.mean
        elif self.kind == "none":
            return torch.ones(self.n, 1, dtype=torch.float64)
        else:
            depth = 1 if self.kind == "obs" else 4
            rows = torch.nan_to_num(self.y[:, max(0, self.t - depth) : self.t]).flip(1)
            x = torch.zeros(self.n, depth * self.m, dtype=torch.float64)
            x[:, : rows.shape[1] * self.m] = rows.flatten(1)
        return torch.cat([torch.ones(self.n, 1, dtype=torch.float64), x], 1) if self.intercept else x

    def estimates(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mean [N, K], white [N, K, q], scale [N, K] or [N, 1]) of the arms' payoffs at the present context (`arm_estimates`)."""
        B, f = self.B.expand(self.n, *self.B.shape[1:]), self.f.expand(self.n, *self.f.shape[1:])
        mean, white = arm_estimates(B, f, arm_features(self.x[:, self.t - 1], self.maps, self.arms))
        if not self.inflate:
            return mean, white, torch.full((self.n, 1), self.v, dtype=torch.float64)
        if self.sigma is None:
            return mean, white, self.v * self._residual().sqrt().unsqueeze(1)
        theta = torch.cholesky_solve(f.unsqueeze(-1), torch.linalg.cholesky(B)).squeeze(-1)
        if self.maps is not None:
            theta = torch.einsum("kqp,nq->nkp", self.maps, theta.squeeze(1))
        theta = theta[..., -self.mean.shape[-1] :]
        spread = torch.einsum("nki,nij,nkj->nk", theta, self.cov, theta)
        return mean, white, self.v * (self.sigma**2 + spread).sqrt()

    def _residual(self) -> Tensor:
        """Running mean square of r - theta_a . x, 1 at first, [N]."""
        rounds = self.t - 1
        return self.squares / rounds if rounds > 0 else torch.ones(self.n, dtype=torch.float64)

    def act(self, noise: Tensor) -> Tensor:
        """Arms [N]; noise [N, J + 1] standard normal, one row a stream, so that a batch acts as its streams would alone."""
        mean, white, scale = self.estimates()
        arms = choose(self.policy, mean, white, scale, noise, self.t, shared=self.maps is not None)
        self.a[:, self.t - 1] = arms
        self.expected = mean.gather(1, arms[:, None]).squeeze(1)
        return arms

    def reward(self, r: Tensor) -> None:
        """r [N]: payoffs of the chosen arms."""
        t, rows = self.t - 1, torch.arange(self.n)
        x, a = self.x[:, t], self.a[:, t]
        self.r[:, t] = r
        self.squares += (r - self.expected).square()
        if self.use_rewards:
            self.mean, self.cov = self._reward_update(self.mean, self.cov, a, r)
        if self.forget < 1:
            eye = torch.eye(self.q, dtype=torch.float64)
            self.B = self.forget * self.B + (1 - self.forget) * self.ridge * eye
            self.f = self.forget * self.f
        index = (torch.zeros_like(rows) if self.pool else rows, self._regression(a))
        x = self._taken(x, a)
        self.B.index_put_(index, x[:, :, None] * x[:, None, :], accumulate=True)
        self.f.index_put_(index, r[:, None] * x, accumulate=True)

    def _regression(self, a: Tensor) -> Tensor:
        """Which of the G regressions the payoffs of arms `a` belong to."""
        return a if self.maps is None else torch.zeros_like(a)

    def _taken(self, x: Tensor, a: Tensor) -> Tensor:
        """Features [..., q] of the arms a [...] that were chosen in contexts x [..., p]."""
        return x if self.maps is None else mv(self.maps[a], x)

    def _reward_update(self, mean: Tensor, cov: Tensor, a: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The reward as one more observation with row theta_a (M_a' theta where theta is shared).

        Its variance is that of the reward noise and of theta itself, s^2 phi_a' B_a^{-1} phi_a with s^2 the mean square residual:
        without it the filter believes its own early payoffs, and they the filter.
        """
        index = (torch.arange(self.n), self._regression(a))
        B, f = (part.expand(self.n, *part.shape[1:])[index] for part in (self.B, self.f))
        x = torch.cat([mean.new_ones(self.n, 1), mean], 1) if self.intercept else mean
        phi = self._taken(x, a)
        theta, spread = torch.cholesky_solve(torch.stack([f, phi], -1), torch.linalg.cholesky(B)).unbind(-1)
        width = (phi * spread).sum(-1)
        if self.maps is not None:
            theta = mv(self.maps[a].mT, theta)
        residual = self._residual()
        noise = residual if self.sigma is None else torch.full_like(residual, self.sigma**2)
        row = theta[:, -mean.shape[-1] :].unsqueeze(1)
        shift = theta[:, 0] if self.intercept else torch.zeros_like(r)
        variance = (noise + residual * width)[:, None, None]
        mean, cov, _, _ = kalman.update(row, variance, mean, cov, (r - shift).unsqueeze(1))
        return mean, cov

    # Refits ------------------------------------------------------------------------------------------------

    def due(self, t: int) -> bool:
        """Whether the model is fitted before round t."""
        if self.oracle:
            return False
        if self.refit_once is not None:
            return t == self.refit_once
        return t in refit_times(t, self.refit_every)

    def begin_refit(self) -> None:
        """EM on y_{1:t-1}."""
        offset, input_offset = self.offset, self.input_offset
        if self.demean:
            # Means of y and of u go together: x then moves about the mean that the mean input gives it.
            offset = self.y[:, : self.t - 1].nanmean(1)
            input_offset = self.u[:, : self.t - 1].mean(1)
        data, u = self._history(offset, input_offset)
        if self.window is not None:
            data, u = data[:, -self.window :], u[:, -self.window :]
        if self.refit_delay and self.workers:
            # The thread waits for Ray's tasks; nothing that it reads or writes is touched before its result is taken up.
            self._thread = self._thread or ThreadPoolExecutor(1)
            result = self._thread.submit(self._estimate, data, u).result
        else:
            result = partial(_same, self._estimate(data, u))
        self.pending = Refit(self.t + self.refit_delay, offset, input_offset, result)

    def take_up(self) -> None:
        """The model of the refit under way; the whole history is filtered again and the statistics are rebuilt from it."""
        assert self.pending is not None
        best, self.order = self.pending.result()
        self.offset, self.input_offset = self.pending.offset, self.pending.input_offset
        self.pending = None
        self.traces.append(best.trace)
        self.likelihood = best.log_likelihood
        self.model = best.model
        self.refits += 1
        self._rebuild()

    def _estimate(self, data: Tensor, u: Tensor) -> tuple[kalman.Fit, Tensor]:
        """(fit, order [N]) of y [N, T, m], u [N, T, k]."""
        if self.select_order:
            return self._select(data, u)
        return self._fit(data, u, self.d, self.model), self.order

    def _history(self, offset: Tensor, input_offset: Tensor) -> tuple[Tensor, Tensor]:
        """(y [N, T, m], u [N, T, k]) of the rounds before this one, less their offsets."""
        past = slice(self.t - 1)
        return self.y[:, past] - offset.unsqueeze(1), self.u[:, past] - input_offset.unsqueeze(1)

    def _select(self, data: Tensor, u: Tensor) -> tuple[kalman.Fit, Tensor]:
        """Fits every order; (the fit with the smallest BIC, its order), stream by stream (one for all where they are pooled)."""
        steps = (~data.isnan().any(-1)).sum(1).double()
        orders = range(1, LARGEST_ORDER + 1)
        if data.shape[1] < 100:
            orders = range(int(self.order[0]), int(self.order[0]) + 1)
        fits, scores = [], []
        for d in orders:
            start = truncated(self.model, d)
            if data.shape[1] >= 100 and self.init == "subspace":
                start = start.where(self.order == d, kalman.start(data, d, u))
            elif bool((self.order != d).any()):
                start = start.where(self.order == d, self._random(data, d, 0))
            fit = self._fit(data, u, d, start, fresh=False)
            value, seen = fit.log_likelihood, steps
            if self.pool:
                value, seen = value.sum().expand(self.n), seen.sum().expand(self.n)
            scores.append(bic(value, d, self.m, seen, self.inputs))
            fits.append(kalman.Fit(padded(fit.model, self.d), fit.trace))
        pick = torch.stack(scores).argmin(0)
        return chosen(fits, pick), pick + orders[0]

    def _fit(self, data: Tensor, u: Tensor, d: int, start: StateSpace, *, fresh: bool = True) -> kalman.Fit:
        """EM with `d` hidden dimensions from `start` (at the first long enough data, if `fresh`, from `init` instead) and from
        the restarts; the likeliest of them.
        """
        starts = [start]
        if fresh and self.init != "identity" and not self.subspace_done and data.shape[1] >= 100:
            if self.init == "subspace":
                starts = [kalman.start(data, d, u, known_C=self.known_C)]
            else:
                starts = [self._random(data, d, 0)]
            self.subspace_done = True
        starts += [self._random(data, d, i) for i in range(1, self.restarts)]
        if self.pool:
            # The M-step raises the likelihood of one model for all streams, so it has to begin with one.
            starts = [StateSpace(*(part[:1].expand_as(part) for part in start)) for start in starts]
        C = None if self.known_C is None else self.known_C.expand(self.n, self.m, d)
        if self.pool:
            jobs = [(start, data, u, self.em_iters, C, True) for start in starts]
            fits = spread(_em, jobs, self.workers, "refits")
        else:
            copies = len(starts)
            joint = em(
                StateSpace.cat(starts),
                data.repeat(copies, 1, 1),
                u.repeat(copies, 1, 1),
                iterations=self.em_iters,
                known_C=None if C is None else C.repeat(copies, 1, 1),
                workers=self.workers,
            )
            fits = [
                kalman.Fit(joint.model.select(part), joint.trace[:, part])
                for part in torch.arange(copies * self.n).split(self.n)
            ]
        best = fits[0]
        for other in fits[1:]:
            gain = other.log_likelihood - best.log_likelihood
            gain = gain.sum().expand(self.n) if self.pool else gain
            best = chosen([best, other], (gain > 0).long())
        model, unstable = kalman.capped(best.model)
        if bool(unstable.any()):
            logger.warning(
                "the fitted A of stream %d has no spectral radius below 1: rescaled to 0.999",
                int(unstable.nonzero()[0]),
            )
        return kalman.Fit(kalman.unit_gauge(model) if self.normalise_gauge else model, best.trace)

    def _random(self, data: Tensor, d: int, index: int) -> StateSpace:
        generator = torch.Generator().manual_seed(7919 * self.refits + index)
        start = random_start(data, d, generator, self.inputs)
        return (
            start if self.known_C is None else start._replace(C=self.known_C.expand(self.n, self.m, self.d))
        )

    def _rebuild(self) -> None:
        data, u = self._history(self.offset, self.input_offset)
        filtered = kalman.kalman_filter(self.model, data, u)
        self.mean, self.cov = filtered.mean[:, -1], filtered.cov[:, -1]
        self._regress(filtered.mean)
        if self.use_rewards:
            # The payoffs learned so far were in the old coordinates: those of the states filtered without rewards take their place.
            means, self.mean, self.cov = self._filter_with_rewards(data)
            self._regress(means)

    def _regress(self, means: Tensor) -> None:
        """Contexts and statistics of the arms from the filtered states [N, T, d] of the rounds before this one."""
        past = self.t - 1
        self.x[:, :past] = (
            torch.cat([torch.ones(self.n, past, 1, dtype=torch.float64), means], -1)
            if self.intercept
            else means
        )
        phi = self._taken(self.x[:, :past], self.a[:, :past])
        age = torch.arange(past - 1, -1, -1, dtype=torch.float64)
        picked = torch.nn.functional.one_hot(self._regression(self.a[:, :past]), self.B.shape[1]).double()
        weight = picked * (self.forget**age)[None, :, None]
        B = torch.einsum("ntk,nti,ntj->nkij", weight, phi, phi)
        f = torch.einsum("ntk,nt,nti->nki", weight, self.r[:, :past], phi)
        self._clear()
        self.B += B.sum(0, keepdim=True) if self.pool else B
        self.f += f.sum(0, keepdim=True) if self.pool else f

    def _filter_with_rewards(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(means before each reward [N, T, d], last mean, last covariance), with today's theta for all rewards."""
        mean, cov = self.model.m0, self.model.P0
        means = []
        for t in range(data.shape[1]):
            if t > 0:
                mean, cov = self._predict(mean, cov, self.u[:, t - 1])
            mean, cov, _, _ = kalman.update(self.model.C, self.model.R, mean, cov, data[:, t])
            means.append(mean)
            mean, cov = self._reward_update(mean, cov, self.a[:, t], self.r[:, t])
        return torch.stack(means, 1), mean, cov

    # Checkpoints ---------------------------------------------------------------------------------------------

    _KEPT = (
        "offset", "input_offset", "t", "order", "subspace_done", "refits", "y", "u", "x", "a", "r", "mean", "cov", "squares", "B", "f",
        "likelihood",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future depends on; waits for a refit under way."""
        pending = None
        if self.pending is not None:
            fit, order = self.pending.result()
            pending = {
                "due": self.pending.due,
                "offset": self.pending.offset.clone(),
                "input_offset": self.pending.input_offset.clone(),
                "model": tuple(part.clone() for part in fit.model),
                "trace": fit.trace.clone(),
                "order": order.clone(),
            }
        kept = {name: getattr(self, name) for name in self._KEPT}
        copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
        return copied | {"model": tuple(part.clone() for part in self.model), "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        for name in self._KEPT:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        self.model = StateSpace(*(part.clone() for part in state["model"]))
        self.pending = None
        if state.get("pending") is not None:
            under_way = dict(state["pending"])
            fit = kalman.Fit(StateSpace(*under_way.pop("model")), under_way.pop("trace"))
            found = (fit, under_way.pop("order"))
            self.pending = Refit(**under_way, result=partial(_same, found))


class EMKFLearner(Learner):
    """Copies what the streams have learned into the module; all estimation is in `Streams`."""

    @torch.no_grad()
    def learn(self, batch: Any) -> None:
        state = self.rl_module.state_dict()
        for name, value in state.items():
            value.copy_(batch[name])
