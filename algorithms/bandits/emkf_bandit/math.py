"""Arms, orders and starts: the pure functions of EMKF-Bandit (Zeng et al., arXiv 2409.11521)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace

LARGEST_ORDER = 6


def hidden_size(d: int | str) -> int:
    """Dimensions of the tensors that hold the model: d itself, the largest order where it is to be selected."""
    return LARGEST_ORDER if isinstance(d, str) else d


def arm_features(context: Tensor, maps: Tensor | None, arms: int) -> Tensor:
    """What each arm's payoff is regressed on, [..., K, q]: phi_a = M_a context (variant i), or the context itself, q = p.

    context [..., p]; maps M [K, q, p] where the arms share one parameter, None where each has its own.
    """
    if maps is None:
        return context.unsqueeze(-2).expand(*context.shape[:-1], arms, context.shape[-1])
    return torch.einsum("kqp,...p->...kq", maps, context)


def identified(maps: Tensor, C: Tensor) -> bool:
    """Whether M_a x is the same in all coordinates of x in which y = C x + v: the rows of M [K, q, d] are combinations of those of
    C [m, d].

    A map x -> S x that keeps C moves x along the null space of C only, and the law of y and r does not tell such S apart.
    """
    rows = maps.flatten(0, 1)
    fitted = C.mT @ torch.linalg.lstsq(C.mT, rows.mT, driver="gelsd").solution
    return bool((fitted - rows.mT).norm() <= 1e-9 * rows.norm())


def arm_estimates(B: Tensor, f: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge estimates of the payoffs, and the posterior along the features (step 2).

    B [..., G, q, q], f [..., G, q], features phi [..., K, q]; G = K parameters, or G = 1 that the arms share.  By Cholesky, B = L L':
    returns (theta . phi_a [..., K] with theta = B^{-1} f, L^{-1} phi_a [..., K, q]); the posterior's width phi_a' B^{-1} phi_a is the
    squared norm of the latter, and its inner products are the posterior's covariances where theta is shared.
    """
    factor = torch.linalg.cholesky(B)
    theta = torch.cholesky_solve(f.unsqueeze(-1), factor).squeeze(-1)
    white = torch.linalg.solve_triangular(factor, features.unsqueeze(-1), upper=False)
    return (theta * features).sum(-1), white.squeeze(-1)


def widths(white: Tensor) -> Tensor:
    """phi_a' B_a^{-1} phi_a [..., K] of `arm_estimates`' second answer [..., K, q]."""
    return white.square().sum(-1)


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


@lru_cache(maxsize=8)
def _normal_nodes(size: int, nodes: int) -> Tensor:
    """Quasi-random points of N(0, I), [nodes, size] (scrambled Sobol); one point where size is 0."""
    if size == 0:
        return torch.zeros(1, 0, dtype=torch.float64)
    points = torch.quasirandom.SobolEngine(size, scramble=True, seed=0).draw(nodes, dtype=torch.float64)
    return torch.special.ndtri(points.clamp(1e-12, 1 - 1e-12))


def shared_thompson_probabilities(mean: Tensor, spread: Tensor, *, nodes: int = 1024) -> Tensor:
    """P(arm a has the largest of mean_a + spread_a . z), one z ~ N(0, I_q) for all arms: mean [..., K], spread [..., K, q] -> [..., K].

    Given z but for its part along the axis on which the arms differ most, the draws are lines in that part, each the largest on one
    interval, whose probability is exact; the mean over the rest of z is a quasi-random one.  Equal draws go to the first arm.
    """
    arms = mean.shape[-1]
    # What all arms have in common moves none past another, and leaves K - 1 axes at most.
    centred = spread - spread.mean(-2, keepdim=True)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[..., : max(arms - 1, 1), :]
    slopes = centred @ axes.mT
    rest = _normal_nodes(slopes.shape[-1] - 1, nodes).to(mean.device)
    level = mean.unsqueeze(-2) + rest @ slopes[..., 1:].mT
    slope = slopes[..., 0].unsqueeze(-2)
    # [..., nodes, a, b]: a passes b where rise z > gap.
    rise = slope.unsqueeze(-1) - slope.unsqueeze(-2)
    gap = level.unsqueeze(-2) - level.unsqueeze(-1)
    bound = gap / rise
    low = torch.where(rise > 0, bound, -math.inf).amax(-1)
    high = torch.where(rise < 0, bound, math.inf).amin(-1)
    earlier = torch.ones(arms, arms, dtype=torch.bool, device=mean.device).tril(-1)
    beaten = ((rise == 0) & ((gap > 0) | ((gap == 0) & earlier))).any(-1)
    inside = (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp_min(0.0).masked_fill(beaten, 0.0)
    p = inside.mean(-2)
    return p / p.sum(-1, keepdim=True)


def choose(
    policy: str,
    mean: Tensor,
    white: Tensor,
    scale: Tensor,
    noise: Tensor,
    step: int,
    *,
    shared: bool = False,
    alpha: float = 1.0,
) -> Tensor:
    """Arms [N] from `arm_estimates` mean [N, K] and white [N, K, q], scales [N, K] (or [N, 1]) and standard normal noise [N, J + 1].

    ts      argmax of mean + scale |white| noise, J = K: a draw of every arm's own theta, along the context;
            `shared`: argmax of mean + scale white . noise, J >= max(K, q): one draw of the theta that all arms have in common
    linucb  argmax of mean + alpha |white|
    greedy  epsilon-greedy with epsilon_t = min(1, 5 K / t), t counted from 1; the last column of `noise` decides whether to
            explore, the first K which arm
    """
    arms, size = white.shape[-2:]
    if policy == "ts":
        draw = (
            torch.einsum("nkq,nq->nk", white, noise[:, :size])
            if shared
            else widths(white).sqrt() * noise[:, :arms]
        )
        return (mean + scale * draw).argmax(-1)
    if policy == "linucb":
        return (mean + alpha * widths(white).sqrt()).argmax(-1)
    explore = torch.special.ndtr(noise[:, -1]) < min(1.0, 5 * arms / step)
    return torch.where(explore, noise[:, :arms].argmax(-1), mean.argmax(-1))


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


def naive_start(streams: int, d: int, m: int, inputs: int = 0) -> StateSpace:
    """A = 0.5 I, C = [I 0], Q = 0.5 I, R = 0.5 I, m0 = 0, P0 = I, D = 0."""
    eye = torch.eye(d, dtype=torch.float64)
    C = torch.zeros(m, d, dtype=torch.float64)
    C[: min(m, d), : min(m, d)] = torch.eye(min(m, d), dtype=torch.float64)
    parts = (
        0.5 * eye,
        C,
        0.5 * eye,
        0.5 * torch.eye(m, dtype=torch.float64),
        eye[0] * 0,
        eye,
        torch.zeros(d, inputs, dtype=torch.float64),
    )
    return StateSpace(*(part.expand(streams, *part.shape).clone() for part in parts))


def padded(model: StateSpace, d: int) -> StateSpace:
    """The same law with `d` hidden dimensions: the added ones are zero for ever, so filter and bandit do not see them."""
    extra = d - model.A.shape[-1]
    square = (0, extra, 0, extra)
    pads = {
        "A": square,
        "C": (0, extra),
        "Q": square,
        "R": (0, 0),
        "m0": (0, extra),
        "P0": square,
        "D": (0, 0, 0, extra),
    }
    return StateSpace(**{k: torch.nn.functional.pad(getattr(model, k), pad) for k, pad in pads.items()})


def truncated(model: StateSpace, d: int) -> StateSpace:
    """The first `d` hidden dimensions."""
    A, C, Q, R, m0, P0, D = model
    return StateSpace(A[:, :d, :d], C[:, :, :d], Q[:, :d, :d], R, m0[:, :d], P0[:, :d, :d], D[:, :d])


def bic(log_likelihood: Tensor, d: int, m: int, steps: Tensor, inputs: int = 0) -> Tensor:
    """-2 log-likelihood + (2 d m + d k + m (m + 1) / 2) log steps with k inputs; smaller is better.

    The laws of m observations with d hidden dimensions and k inputs form a set of that many free parameters: those of the innovation
    form, less the d^2 of its coordinates (Hannan and Deistler, The Statistical Theory of Linear Systems, 1988, ch. 2).
    """
    return -2 * log_likelihood + (2 * d * m + d * inputs + m * (m + 1) / 2) * steps.log()


def chosen(fits: Sequence[kalman.Fit], pick: Tensor) -> kalman.Fit:
    """The fit number pick[n] of each stream n; shorter traces end in NaN."""
    longest = max(len(fit.trace) for fit in fits)
    trace = fits[0].trace.new_full((longest, len(pick)), math.nan)
    model = fits[0].model
    for i, fit in enumerate(fits):
        model = fit.model.where(pick == i, model)
        trace[: len(fit.trace), pick == i] = fit.trace[:, pick == i]
    return kalman.Fit(model, trace)


def random_start(y: Tensor, d: int, generator: torch.Generator, inputs: int = 0) -> StateSpace:
    """A random rotation times 0.9, random C: a start that competes by likelihood."""
    N, _, m = y.shape
    orthogonal, _ = torch.linalg.qr(torch.randn(N, d, d, dtype=y.dtype, generator=generator))
    start = naive_start(N, d, m, inputs)
    R = 0.5 * torch.diag_embed(torch.nan_to_num(y).var(1).clamp_min(1e-6))
    return start._replace(A=0.9 * orthogonal, C=torch.randn(N, m, d, dtype=y.dtype, generator=generator), R=R)


def noise_rows(generators: Sequence[torch.Generator], draws: int) -> Tensor:
    """One row of J + 1 standard normals from each stream's own generator, [N, J + 1]."""
    return torch.stack([torch.randn(draws + 1, dtype=torch.float64, generator=g) for g in generators])
