"""EMKF-Bandit: linear bandits with a hidden, temporally correlated context (Zeng, Bhatt, Koppel, Ganesh; arXiv 2409.11521).

The paper's pipeline, in alternation: EM identifies a linear-Gaussian model of the observations, a Kalman filter estimates
the hidden context from them, and linear Thompson sampling acts on the filtered context.  After every refit the history is
filtered again and the bandit's statistics are rebuilt: the coordinates of the context are only fixed up to a linear map, and
filter and bandit must share them.  Decisions and regressions use filtered states, never smoothed ones, which hold the future.

Everything is batched over N streams (seeds, customers).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED, NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import Tensor

from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace, mv
from mobula.errors import ConfigError, EnvironmentFault
from mobula.learning.learners import Learner
from mobula.learning.modules import TensorModule
from mobula.method import Method, MethodConfig, hyperparameter
from mobula.sampling.tensor_env import TensorEnv

logger = logging.getLogger("mobula")

# Mathematics ----------------------------------------------------------------------------------------------


def arm_estimates(B: Tensor, f: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge estimates and the posterior's width along the context.

    B [..., K, p, p], f [..., K, p], context [..., p].  Returns (theta_a . context [..., K], context' B_a^{-1} context [..., K])
    with theta_a = B_a^{-1} f_a, by Cholesky.
    """
    factor = torch.linalg.cholesky(B)
    theta = torch.cholesky_solve(f.unsqueeze(-1), factor).squeeze(-1)
    white = torch.linalg.solve_triangular(
        factor, context[..., None, :, None].expand(*f.shape, 1), upper=False
    )
    return (theta * context.unsqueeze(-2)).sum(-1), white.square().sum((-1, -2))


def thompson_probabilities(mean: Tensor, scale: Tensor, *, nodes: int = 64) -> Tensor:
    """P(arm a has the largest draw) for independent draws N(mean_a, scale_a^2): mean, scale [..., K] -> [..., K].

    p_a = integral of phi(z) prod_{b != a} Phi((mean_a + scale_a z - mean_b) / scale_b) dz, by Gauss-Hermite quadrature.
    Only these projections of theta matter to the choice, so drawing an arm from p is linear Thompson sampling.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    z = torch.tensor(points, dtype=mean.dtype)
    w = torch.tensor(weights / math.sqrt(2 * math.pi), dtype=mean.dtype)
    scale = scale.clamp_min(1e-300)
    draws = mean.unsqueeze(-1) + scale.unsqueeze(-1) * z
    gaps = (draws.unsqueeze(-2) - mean[..., None, :, None]) / scale[..., None, :, None]
    below = torch.special.log_ndtr(gaps)
    own = torch.eye(mean.shape[-1], dtype=torch.bool).unsqueeze(-1)
    p = (below.masked_fill(own, 0.0).sum(-2).exp() * w).sum(-1)
    return p / p.sum(-1, keepdim=True)


def choose(
    policy: str, mean: Tensor, width: Tensor, scale: Tensor, noise: Tensor, step: int, alpha: float = 1.0
) -> Tensor:
    """Arms [N] from estimates mean [N, K], posterior widths [N, K], scales [N, K] (or [N, 1]) and noise [N, K + 1].

    ts      argmax of mean + scale sqrt(width) noise
    linucb  argmax of mean + alpha sqrt(width)
    greedy  epsilon-greedy with epsilon_t = min(1, 5 K / t), t counted from 1; the last column of `noise` decides whether to
            explore, the others which arm
    """
    if policy == "ts":
        return (mean + scale * width.sqrt() * noise[:, :-1]).argmax(-1)
    if policy == "linucb":
        return (mean + alpha * width.sqrt()).argmax(-1)
    explore = torch.special.ndtr(noise[:, -1]) < min(1.0, 5 * mean.shape[-1] / step)
    return torch.where(explore, noise[:, :-1].argmax(-1), mean.argmax(-1))


def regrets(means: Tensor, arms: Tensor) -> Tensor:
    """max_a means - means of the chosen arm: means [..., K], arms [...] -> [...]."""
    return means.amax(-1) - means.gather(-1, arms.unsqueeze(-1)).squeeze(-1)


def refit_times(horizon: int, every: int, first: int = 50) -> list[int]:
    """first, 2 first, 4 first, ... while below `every`, then every `every` rounds."""
    times, t = [], first
    while t < min(every, horizon + 1):
        times.append(t)
        t *= 2
    return times + list(range(every, horizon + 1, every))


def naive_start(streams: int, d: int, m: int) -> StateSpace:
    """A = 0.5 I, C = [I 0], Q = 0.5 I, R = 0.5 I, m0 = 0, P0 = I."""
    eye = torch.eye(d, dtype=torch.float64)
    C = torch.zeros(m, d, dtype=torch.float64)
    C[: min(m, d), : min(m, d)] = torch.eye(min(m, d), dtype=torch.float64)
    parts = (0.5 * eye, C, 0.5 * eye, 0.5 * torch.eye(m, dtype=torch.float64), eye[0] * 0, eye)
    return StateSpace(*(part.expand(streams, *part.shape).clone() for part in parts))


def random_start(y: Tensor, d: int, generator: torch.Generator) -> StateSpace:
    """A random rotation times 0.9, random C: a start that competes by likelihood."""
    N, _, m = y.shape
    orthogonal, _ = torch.linalg.qr(torch.randn(N, d, d, dtype=y.dtype, generator=generator))
    start = naive_start(N, d, m)
    R = 0.5 * torch.diag_embed(torch.nan_to_num(y).var(1).clamp_min(1e-6))
    return start._replace(A=0.9 * orthogonal, C=torch.randn(N, m, d, dtype=y.dtype, generator=generator), R=R)


# The bandit ------------------------------------------------------------------------------------------------


class Streams:
    """N bandits side by side: what they have seen, their models, their filters and their statistics.

    A round is `context = observe(y)`, `arms = act(noise)`, `reward(r)`.

    context  what the arms' payoffs are regressed on: "filter" (filtered state), "obs" (y itself), "lags" (the last four y),
             "none" (a constant: a bandit without context); the last three are baselines
    model    the true models where they are known (oracle), else None: EM
    """

    def __init__(
        self,
        streams: int,
        m: int,
        arms: int,
        *,
        d: int = 4,
        v: float = 0.2,
        ridge: float = 1.0,
        em_iters: int = 40,
        refit: int = 500,
        refit_once: int | None = None,
        init: str = "subspace",
        known_C: Tensor | None = None,
        policy: str = "ts",
        window: int | None = None,
        inflate: bool = False,
        use_rewards: bool = False,
        normalise_gauge: bool = False,
        restarts: int = 1,
        forget: float = 1.0,
        pool: bool = False,
        demean: bool = False,
        intercept: bool = False,
        sigma: float | None = None,
        context: str = "filter",
        model: StateSpace | None = None,
    ) -> None:
        self.n, self.m, self.arms, self.d = streams, m, arms, d
        self.v, self.ridge, self.forget, self.policy, self.sigma = v, ridge, forget, policy, sigma
        self.em_iters, self.refit_every, self.refit_once, self.init = em_iters, refit, refit_once, init
        self.known_C, self.inflate, self.use_rewards = known_C, inflate, use_rewards
        self.window = None if window is None else int(window)
        self.normalise_gauge, self.restarts, self.pool = normalise_gauge, restarts, pool
        self.demean, self.intercept, self.kind = demean, intercept, context
        self.oracle = model is not None
        self.model = naive_start(streams, d, m) if model is None else model
        if known_C is not None and not self.oracle:
            self.model = self.model._replace(C=known_C.expand(streams, m, d))
        size = {"filter": self.model.A.shape[-1], "obs": m, "lags": 4 * m, "none": 1}[context]
        self.p = size + (intercept and context != "none")
        self.offset = torch.zeros(streams, m, dtype=torch.float64)
        self.t = 0
        self.subspace_done = False
        self.refits = 0
        self.traces: list[Tensor] = []
        # Histories, doubled in length when they are full.
        self.y = torch.empty(streams, 64, m, dtype=torch.float64)
        self.x = torch.empty(streams, 64, self.p, dtype=torch.float64)
        self.a = torch.empty(streams, 64, dtype=torch.int64)
        self.r = torch.empty(streams, 64, dtype=torch.float64)
        self.mean, self.cov = self.model.m0.clone(), self.model.P0.clone()
        self.squares = torch.zeros(streams, dtype=torch.float64)
        self._clear()

    def _clear(self) -> None:
        eye = torch.eye(self.p, dtype=torch.float64)
        shared = 1 if self.pool else self.n
        self.B = (self.ridge * eye).expand(shared, self.arms, self.p, self.p).clone()
        self.f = torch.zeros(shared, self.arms, self.p, dtype=torch.float64)

    # A round -----------------------------------------------------------------------------------------------

    def observe(self, y: Tensor) -> Tensor:
        """The context [N, p] of the round that begins with y [N, m] (a row with a NaN: nothing was observed)."""
        self.t += 1
        if self.t > self.y.shape[1]:
            self.y, self.x, self.a, self.r = (torch.cat([h, h], 1) for h in (self.y, self.x, self.a, self.r))
        if self.kind == "filter" and self.due(self.t):
            self.refit()
        self.y[:, self.t - 1] = y
        if self.kind == "filter":
            mean, cov = self.mean, self.cov
            if self.t > 1:
                mean, cov = self._predict(mean, cov)
            self.mean, self.cov, _, _ = kalman.update(self.model.C, self.model.R, mean, cov, y - self.offset)
        self.x[:, self.t - 1] = self._context()
        return self.x[:, self.t - 1]

    def _predict(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        A, Q = self.model.A, self.model.Q
        return mv(A, mean), kalman.symmetric(A @ cov @ A.mT + Q)

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
        """(mean [N, K], width [N, K], scale [N, K] or [N, 1]) of the arms' payoffs at the present context."""
        x = self.x[:, self.t - 1]
        B, f = self.B.expand(self.n, *self.B.shape[1:]), self.f.expand(self.n, *self.f.shape[1:])
        mean, width = arm_estimates(B, f, x)
        if not self.inflate:
            return mean, width, torch.full((self.n, 1), self.v, dtype=torch.float64)
        if self.sigma is None:
            return mean, width, self.v * self._residual().sqrt().unsqueeze(1)
        theta = torch.cholesky_solve(f.unsqueeze(-1), torch.linalg.cholesky(B)).squeeze(-1)
        theta = theta[..., -self.mean.shape[-1] :]
        spread = torch.einsum("nki,nij,nkj->nk", theta, self.cov, theta)
        return mean, width, self.v * (self.sigma**2 + spread).sqrt()

    def _residual(self) -> Tensor:
        """Running mean square of r - theta_a . x, 1 at first, [N]."""
        rounds = self.t - 1
        return self.squares / rounds if rounds > 0 else torch.ones(self.n, dtype=torch.float64)

    def act(self, noise: Tensor) -> Tensor:
        """Arms [N]; noise [N, K + 1] standard normal, one row a stream, so that a batch acts as its streams would alone."""
        mean, width, scale = self.estimates()
        arms = choose(self.policy, mean, width, scale, noise, self.t)
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
            eye = torch.eye(self.p, dtype=torch.float64)
            self.B = self.forget * self.B + (1 - self.forget) * self.ridge * eye
            self.f = self.forget * self.f
        index = (torch.zeros_like(rows) if self.pool else rows, a)
        self.B.index_put_(index, x[:, :, None] * x[:, None, :], accumulate=True)
        self.f.index_put_(index, r[:, None] * x, accumulate=True)

    def _reward_update(self, mean: Tensor, cov: Tensor, a: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The reward as one more observation with row theta_a.

        Its variance is that of the reward noise and of theta_a itself, s^2 x' B_a^{-1} x with s^2 the mean square residual:
        without it the filter believes its own early payoffs, and they the filter.
        """
        rows = torch.arange(self.n)
        B, f = (
            self.B.expand(self.n, *self.B.shape[1:])[rows, a],
            self.f.expand(self.n, *self.f.shape[1:])[rows, a],
        )
        x = torch.cat([mean.new_ones(self.n, 1), mean], 1) if self.intercept else mean
        factor = torch.linalg.cholesky(B)
        theta, spread = torch.cholesky_solve(torch.stack([f, x], -1), factor).unbind(-1)
        width = (x * spread).sum(-1)
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

    def refit(self) -> None:
        """EM on y_{1:t-1}; then the whole history is filtered again and the statistics are rebuilt from it."""
        seen = self.y[:, : self.t - 1]
        if self.demean:
            self.offset = seen.nanmean(1)
        data = seen - self.offset.unsqueeze(1)
        if self.window is not None:
            data = data[:, -self.window :]
        starts = [self.model]
        if self.init != "identity" and not self.subspace_done and data.shape[1] >= 100:
            if self.init == "subspace":
                starts = [kalman.subspace(data, self.d, known_C=self.known_C)[0]]
            else:
                starts = [self._random(data, 0)]
            self.subspace_done = True
        starts += [self._random(data, i) for i in range(1, self.restarts)]
        C = None if self.known_C is None else self.known_C.expand(self.n, self.m, self.d)
        if self.pool or len(starts) == 1:
            fits = [kalman.em(s, data, iterations=self.em_iters, known_C=C, pool=self.pool) for s in starts]
        else:
            copies = len(starts)
            joint = kalman.em(
                StateSpace.cat(starts),
                data.repeat(copies, 1, 1),
                iterations=self.em_iters,
                known_C=None if C is None else C.repeat(copies, 1, 1),
            )
            fits = [
                kalman.Fit(joint.model.select(part), joint.trace[:, part])
                for part in torch.arange(copies * self.n).split(self.n)
            ]
        best = fits[0]
        for other in fits[1:]:
            better = best.log_likelihood >= other.log_likelihood
            best = kalman.Fit(
                best.model.where(better, other.model),
                best.trace if bool(better.all()) else other.trace,
            )
        self.traces.append(best.trace)
        self.model, unstable = kalman.capped(best.model)
        if bool(unstable.any()):
            logger.warning(
                "the fitted A of stream %d has no spectral radius below 1: rescaled to 0.999",
                int(unstable.nonzero()[0]),
            )
        if self.normalise_gauge:
            self.model = kalman.unit_gauge(self.model)
        self.refits += 1
        self._rebuild()

    def _random(self, data: Tensor, index: int) -> StateSpace:
        generator = torch.Generator().manual_seed(7919 * self.refits + index)
        start = random_start(data, self.d, generator)
        return (
            start if self.known_C is None else start._replace(C=self.known_C.expand(self.n, self.m, self.d))
        )

    def _rebuild(self) -> None:
        past = self.t - 1
        data = self.y[:, :past] - self.offset.unsqueeze(1)
        if self.use_rewards:
            means, self.mean, self.cov = self._filter_with_rewards(data)
        else:
            filtered = kalman.kalman_filter(self.model, data)
            means, self.mean, self.cov = filtered.mean, filtered.mean[:, -1], filtered.cov[:, -1]
        self.x[:, :past] = (
            torch.cat([torch.ones(self.n, past, 1, dtype=torch.float64), means], -1)
            if self.intercept
            else means
        )
        x = self.x[:, :past]
        age = torch.arange(past - 1, -1, -1, dtype=torch.float64)
        picked = torch.nn.functional.one_hot(self.a[:, :past], self.arms).double()
        weight = picked * (self.forget**age)[None, :, None]
        B = torch.einsum("ntk,nti,ntj->nkij", weight, x, x)
        f = torch.einsum("ntk,nt,nti->nki", weight, self.r[:, :past], x)
        self._clear()
        self.B += B.sum(0, keepdim=True) if self.pool else B
        self.f += f.sum(0, keepdim=True) if self.pool else f

    def _filter_with_rewards(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(means before each reward [N, T, d], last mean, last covariance), with today's theta for all rewards."""
        mean, cov = self.model.m0, self.model.P0
        means = []
        for t in range(data.shape[1]):
            if t > 0:
                mean, cov = self._predict(mean, cov)
            mean, cov, _, _ = kalman.update(self.model.C, self.model.R, mean, cov, data[:, t])
            means.append(mean)
            mean, cov = self._reward_update(mean, cov, self.a[:, t], self.r[:, t])
        return torch.stack(means, 1), mean, cov

    # Checkpoints ---------------------------------------------------------------------------------------------

    _KEPT = (
        "offset", "t", "subspace_done", "refits", "y", "x", "a", "r", "mean", "cov", "squares", "B", "f",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future depends on."""
        kept = {name: getattr(self, name) for name in self._KEPT}
        copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
        return copied | {"model": tuple(part.clone() for part in self.model)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        for name in self._KEPT:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        self.model = StateSpace(*(part.clone() for part in state["model"]))


def noise_rows(generators: Sequence[torch.Generator], arms: int) -> Tensor:
    """One row of K + 1 standard normals from each stream's own generator, [N, K + 1]."""
    return torch.stack([torch.randn(arms + 1, dtype=torch.float64, generator=g) for g in generators])


# Config, module, learner, algorithm --------------------------------------------------------------------------


class EMKFBanditConfig(MethodConfig):
    """Bandit on the Kalman-filtered state of a model learned by EM (Zeng et al. 2024, arXiv 2409.11521)."""

    citation = """@article{zeng2024partially,
  title={Partially Observable Contextual Bandits with Linear Payoffs},
  author={Zeng, Sihan and Bhatt, Sujay and Koppel, Alec and Ganesh, Sumitra},
  journal={arXiv preprint arXiv:2409.11521},
  year={2024}
}"""
    when = (
        "Use it to choose among a few actions when the payoff depends on a state that is hidden, has a memory and is seen only"
        " in part or through noise: regimes of a market, a user whose mood drifts. Where a few past observations already show"
        " the state (a short memory, little noise), plain Thompson sampling on stacked lags is as good and simpler. The"
        " context must not depend on the actions; if it does, this is a control problem. On one core, eight streams in a batch take"
        " about 0.4 ms a round, and their refit at 1,000 rounds about 3 s."
    )
    default_env = "linear_bandit"
    default_stop = {"env_steps": 2_000}
    rejected = {
        "gamma": "a bandit's choices do not move its context: there is nothing to discount",
        "lr": "the method has closed forms only",
    }

    d = hyperparameter(4, tune.choice([2, 3, 4, 6]), "hidden dimension", low=1, high=64)
    v = hyperparameter(
        0.2,
        tune.loguniform(0.02, 2),
        "width of Thompson sampling: in units of reward; a multiple of the noise with `inflate`",
        low=0.0,
    )
    ridge = hyperparameter(1.0, tune.loguniform(1e-3, 10), "ridge of the payoff regressions", low=1e-12)
    em_iters = hyperparameter(40, tune.choice([10, 20, 40, 80]), "EM iterations of a refit, at most", low=1)
    refit = hyperparameter(
        500, tune.choice([250, 500, 1000]), "rounds between refits, after 50, 100, 200, ... below it", low=50
    )
    init = hyperparameter(
        "subspace",
        tune.choice(["subspace", "identity", "random"]),
        "start of EM at the first refit with 100 observations",
        choices=["subspace", "identity", "random"],
    )
    known_C = hyperparameter(
        None, None, "the observation matrix where it is known, as a list of rows; EM then keeps it"
    )
    policy = hyperparameter(
        "ts",
        tune.choice(["ts", "linucb", "greedy"]),
        "Thompson sampling, LinUCB or epsilon-greedy",
        choices=["ts", "linucb", "greedy"],
    )
    window = hyperparameter(
        None, tune.choice([None, 1000, 3000]), "rounds that EM looks back at (None: all)", low=100
    )
    inflate = hyperparameter(
        False, tune.choice([False, True]), "scale Thompson's width by the noise of reward and filter"
    )
    use_rewards = hyperparameter(
        False,
        tune.choice([False, True]),
        "filter with the rewards as observations too; can mislead while the payoffs are unknown",
    )
    normalise_gauge = hyperparameter(
        False, tune.choice([False, True]), "coordinates in which the stationary covariance is I"
    )
    restarts = hyperparameter(
        1, tune.choice([1, 4]), "starts of EM that compete by likelihood", low=1, high=64
    )
    forget = hyperparameter(
        1.0,
        tune.choice([1.0, 0.999, 0.995]),
        "factor on the past of the payoff regressions, a round",
        low=0.5,
        high=1.0,
    )
    pool = hyperparameter(False, None, "one model and one set of payoffs for all streams")
    demean = hyperparameter(False, None, "subtract the mean of the observations up to the last refit")
    intercept = hyperparameter(False, None, "a constant beside the context: arms with mean payoffs")
    sigma = hyperparameter(
        None, None, "standard deviation of the reward noise where it is known (`inflate`)", low=0.0
    )
    report_every = hyperparameter(100, None, "rounds of a training iteration (of reports)", low=1)

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self.evaluation(
            evaluation_duration=2_000,
            evaluation_duration_unit="timesteps",
            evaluation_config={"explore": False},
        )

    def get_default_learner_class(self) -> Any:
        return EMKFLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        names = ("d", "v", "ridge", "policy", "intercept", "known_C")
        return RLModuleSpec(
            module_class=EMKFModule, model_config={name: getattr(self, name) for name in names}
        )

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}

    def validate(self) -> None:
        super().validate()
        if self.num_env_runners or self.num_learners > 1:
            raise ConfigError(
                "EMKFBanditConfig: all streams are one batch in one process: set num_envs_per_env_runner (--num-envs) for"
                " more streams, and run seeds as Tune trials; num_env_runners is 0 and num_learners at most 1"
            )

    def adapt_env(self, env: TensorEnv) -> TensorEnv:
        obs, actions = env.single_observation_space, env.single_action_space
        if not isinstance(obs, spaces.Box) or len(obs.shape) != 1 or not isinstance(actions, spaces.Discrete):
            raise ConfigError(
                f"emkf_bandit takes observations that are vectors and a choice among arms; {self.env} has {obs} ->"
                f" {actions}"
            )
        if not env.continuing:
            raise ConfigError(f"emkf_bandit follows one endless stream; {self.env} has episodes")
        return env


class EMKFModule(TensorModule):
    """The first stream's model and payoffs as a policy for a new stream: a recurrent module whose state is its filter.

    Its action distribution is Thompson sampling's (greedy without exploration).  Buffers: the StateSpace, B [K, p, p],
    f [K, p], scale (of Thompson sampling), offset [m].
    """

    takes_missing = True
    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor
    B: Tensor
    f: Tensor
    offset: Tensor
    scale: Tensor

    def setup(self) -> None:
        config: dict[str, Any] = dict(self.model_config)
        m, arms, d = int(self.observation_space.shape[0]), int(self.action_space.n), int(config["d"])
        p = d + bool(config["intercept"])
        for name, part in zip(StateSpace._fields, naive_start(1, d, m), strict=True):
            self.register_buffer(name, part[0])
        self.register_buffer("B", (config["ridge"] * torch.eye(p).double()).repeat(arms, 1, 1))
        self.register_buffer("f", torch.zeros(arms, p, dtype=torch.float64))
        self.register_buffer("offset", torch.zeros(m, dtype=torch.float64))
        self.register_buffer("scale", torch.full((arms,), float(config["v"]), dtype=torch.float64))

    def get_initial_state(self) -> dict[str, Tensor]:
        d = self.A.shape[0]
        return {
            "mean": torch.zeros(d, dtype=torch.float64),
            "cov": torch.zeros(d, d, dtype=torch.float64),
            "age": torch.zeros((), dtype=torch.float64),
        }

    def _step(self, y: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One filter step of y [N, m] from state (age 0: the prior itself)."""
        n = len(y)
        fresh = state["age"] == 0
        A, Q = self.A.expand(n, -1, -1), self.Q.expand(n, -1, -1)
        mean = torch.where(fresh[:, None], self.m0, mv(A, state["mean"]))
        moved = kalman.symmetric(A @ state["cov"] @ A.mT + Q)
        cov = torch.where(fresh[:, None, None], self.P0, moved)
        C, R = self.C.expand(n, -1, -1), self.R.expand(n, -1, -1)
        mean, cov, _, _ = kalman.update(C, R, mean, cov, y.double() - self.offset)
        return mean, cov

    def _payoffs(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([mean.new_ones(len(mean), 1), mean], 1) if self.model_config["intercept"] else mean
        n = len(x)
        return arm_estimates(self.B.expand(n, *self.B.shape), self.f.expand(n, *self.f.shape), x)

    def _forward(self, batch: dict[str, Any], *, explore: bool = False, **kwargs: Any) -> dict[str, Any]:
        obs, state = batch[Columns.OBS], batch[Columns.STATE_IN]
        logits = []
        # Observations of a sequence come as [N, T, m]; acting has T = 1.
        for t in range(obs.shape[1]):
            mean, cov = self._step(obs[:, t], state)
            state = {"mean": mean, "cov": cov, "age": state["age"] + 1}
            payoff, width = self._payoffs(mean)
            if self.model_config["policy"] == "linucb":
                payoff = payoff + width.sqrt()
            if explore and self.model_config["policy"] == "ts":
                p = thompson_probabilities(payoff, self.scale * width.sqrt())
            else:
                p = torch.nn.functional.one_hot(payoff.argmax(-1), payoff.shape[-1]).double()
            logits.append(p.clamp_min(1e-30).log().float())
        return {Columns.ACTION_DIST_INPUTS: torch.stack(logits, 1), Columns.STATE_OUT: state}

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._forward(batch, explore=True)

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """x_hat, P_trace, p_best for the present observations, given the filter's `state_out` (or a fresh start)."""
        state = batch.get(Columns.STATE_OUT)
        if state is None:
            obs = batch[Columns.OBS]
            initial = {k: v.expand(len(obs), *v.shape) for k, v in self.get_initial_state().items()}
            mean, cov = self._step(obs, initial)
        else:
            mean, cov = state["mean"], state["cov"]
        payoff, width = self._payoffs(mean)
        return {
            "x_hat": mean,
            "P_trace": cov.diagonal(dim1=-2, dim2=-1).sum(-1),
            "p_best": thompson_probabilities(payoff, self.scale * width.sqrt()),
        }


class EMKFLearner(Learner):
    """Copies what the streams have learned into the module; all estimation is in `Streams`."""

    @torch.no_grad()
    def learn(self, batch: Any) -> None:
        state = self.rl_module.state_dict()
        for name, value in batch.items():
            state[name].copy_(value)


class EMKFBandit(Method, config=EMKFBanditConfig):
    """EMKF-Bandit."""

    config: EMKFBanditConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        runner: Any = self._runners().local_env_runner
        self.env: TensorEnv = runner.env
        space: Any = self.env.single_action_space
        seed = torch.seed() % 2**31 if self.config.seed is None else int(self.config.seed)
        self.noise = [torch.Generator().manual_seed(seed + 7919 * i) for i in range(self.env.num_envs)]
        known = self.config.known_C
        m = self.env.single_observation_space.shape[0]
        if known is not None:
            known = torch.tensor(known, dtype=torch.float64)
            if known.shape != (m, self.config.d):
                raise ConfigError(
                    f"EMKFBanditConfig: known_C is {tuple(known.shape)}; [m, d] = ({m}, {self.config.d}) is needed"
                )
        knobs = {k: w for k, w in self.config.knobs().items() if k not in ("known_C", "report_every")}
        self.streams = Streams(self.env.num_envs, m, int(space.n), known_C=known, **knobs)
        self.obs, _ = self.env.reset(seed=seed)

    def training_step(self) -> None:
        n, bandit = self.env.num_envs, self.streams
        total = 0.0
        for _ in range(self.config.report_every):
            y = self.obs.double()
            if bool(y.isinf().any()):
                raise EnvironmentFault(
                    f"environment {int(y.isinf().any(1).nonzero()[0])} gave an infinite observation in round {bandit.t + 1}"
                )
            bandit.observe(y)
            arms = bandit.act(noise_rows(self.noise, bandit.arms))
            self.obs, reward, *_ = self.env.step(arms)
            if not bool(reward.isfinite().all()):
                raise EnvironmentFault(
                    f"environment {int((~reward.isfinite()).nonzero()[0])} gave the reward"
                    f" {float(reward[~reward.isfinite()][0])} in round {bandit.t}"
                )
            bandit.reward(reward.double())
            total += float(reward.sum())
        _, _, scale = bandit.estimates()
        batch = {name: part[0] for name, part in zip(StateSpace._fields, bandit.model, strict=True)}
        batch |= {"B": bandit.B[0], "f": bandit.f[0], "offset": bandit.offset[0]}
        batch["scale"] = scale[0].expand(bandit.arms)
        self.learn(batch)
        rounds = self.config.report_every * n
        results: Any = self.metrics
        results.log_value((ENV_RUNNER_RESULTS, "reward_sum"), total, reduce="sum", clear_on_reduce=True)
        results.log_value(
            (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED), rounds, reduce="sum", clear_on_reduce=True
        )
        results.log_value((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), rounds, reduce="lifetime_sum")
        results.log_value("refits", bandit.refits, window=1)
        results.log_value("spectral_radius", float(kalman.spectral_radius(bandit.model.A).max()), window=1)
        if bandit.traces:
            results.log_value("log_likelihood", float(bandit.traces[-1][0].mean()), window=1)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = {
            "streams": self.streams.state_dict(),
            "env": self.env.get_state(),
            "obs": self.obs.clone(),
            "noise": [g.get_state() for g in self.noise],
        }
        return {**super().get_state(*args, **kwargs), "emkf": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "emkf" in state:
            own = state["emkf"]
            self.streams.load_state_dict(own["streams"])
            self.env.set_state(own["env"])
            self.obs = own["obs"].clone()
            for generator, value in zip(self.noise, own["noise"], strict=True):
                generator.set_state(value)

    @classmethod
    def experiment(cls) -> Any:
        from mobula.algorithms.bandits.emkf_experiment import experiment

        return experiment()
