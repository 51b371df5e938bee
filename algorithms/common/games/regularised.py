"""Zero-sum matrix games with entropy: logit quantal response equilibria in a batch.

    max_x min_y  x'My + tau H(x) - tau H(y)

has one solution, the fixed point x = softmax(My / tau), y = softmax(-M'x / tau) (McKelvey and Palfrey 1995).  Its value lies between
val(M) - tau log B and val(M) + tau log A.  M [N, A, B] float64.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from mobula.errors import ConfigError, DataError

logger = logging.getLogger("mobula")

METHODS = ("newton", "extragradient")


class Response(NamedTuple):
    """value [N] with the entropies, x [N, A], y [N, B], residual [N]: largest distance of a strategy from its response."""

    value: Tensor
    x: Tensor
    y: Tensor
    residual: Tensor


def quantal_response(
    M: Tensor,
    tau: float | Tensor,
    *,
    method: str = "newton",
    tolerance: float = 1e-10,
    iterations: int | None = None,
) -> Response:
    """The regularised equilibrium of every game at temperature tau (a number, or [N]).

    newton         damped Newton steps on tau log sum exp(My / tau) + tau sum y log y over the simplex, at temperatures that are halved
                   from the size of M down to tau: a few dozen steps (at most 100 a temperature)
    extragradient  mirror prox in logits with the step 1 / (2 |M| + tau); linear, with rate 1 - tau step (at most 100,000 steps)

    Where rounding or the number of steps leaves a residual above `tolerance`, as at tau far below 0.03 |M|, it is returned and a warning
    logged: the linear program (`matrix.solve`) is the one for such games.  Raises DataError for a payoff that is no number.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; it is one of {', '.join(METHODS)}")
    if not bool(M.isfinite().all()):
        game, a, b = (~M.isfinite()).nonzero()[0].tolist()
        raise DataError(f"game {game} has the payoff {float(M[game, a, b])} at ({a}, {b})")
    temperature = torch.as_tensor(tau, dtype=torch.float64).expand(len(M)).unsqueeze(1)
    if not bool((temperature > 0).all()):
        raise ConfigError(f"tau is {float(temperature.min()):g}; above 0 is needed")
    log_y = (_newton if method == "newton" else _extragradient)(M, temperature, tolerance, iterations)
    found = response(M, temperature, log_y)
    late = int((found.residual > tolerance).sum())
    if late:
        logger.warning(
            "%d of %d regularised games have a residual above %.0e, up to %.1e",
            *(late, len(M), tolerance, float(found.residual.max())),
        )
    return found


def response(M: Tensor, tau: Tensor, log_y: Tensor) -> Response:
    """x = softmax(My / tau) to y, and how far y is from its own response to that; tau [N, 1], log_y [N, B]."""
    y = log_y.exp()
    scaled = torch.einsum("nab,nb->na", M, y) / tau
    x = scaled.softmax(-1)
    residual = (y - (-torch.einsum("nab,na->nb", M, x) / tau).softmax(-1)).abs().amax(-1)
    return Response(_objective(M, tau, log_y), x, y, residual)


def _objective(M: Tensor, tau: Tensor, log_y: Tensor) -> Tensor:
    """tau log sum exp(My / tau) + tau sum y log y, [N]: what x answers with, the most, as a function of y."""
    y = log_y.exp()
    scaled = torch.einsum("nab,nb->na", M, y) / tau
    return tau[:, 0] * (scaled.logsumexp(-1) + (y * log_y).sum(-1))


def _newton(M: Tensor, tau: Tensor, tolerance: float, iterations: int | None) -> Tensor:
    N, _, B = M.shape
    log_y = M.new_full((N, B), 1.0 / B).log()
    now = M.abs().amax((1, 2)).unsqueeze(1).maximum(tau)
    while True:
        last = bool((now <= tau).all())
        for _ in range(iterations or 100):
            found = response(M, now, log_y)
            # On the way a rough answer is enough.
            if bool((found.residual <= (0.1 * tolerance if last else 1e-3)).all()):
                break
            moved = _newton_step(M, now, log_y, found)
            if torch.equal(moved, log_y):
                break
            log_y = moved
        if last:
            return log_y
        now = (0.5 * now).maximum(tau)


def _newton_step(M: Tensor, tau: Tensor, log_y: Tensor, found: Response) -> Tensor:
    N, B, x, y = len(M), M.shape[2], found.x, found.y
    root = y.sqrt()
    gradient = torch.einsum("nab,na->nb", M, x) + tau * (log_y + 1.0)
    # In z = dy / sqrt(y) the Hessian is tau I + M~'(D_x - xx')M~ / tau, M~ = M diag(sqrt y); sum dy = 0 takes one multiplier.
    scaled = M * root.unsqueeze(1)
    mean = torch.einsum("nab,na->nb", scaled, x)
    H = torch.einsum("nab,na,nac->nbc", scaled, x, scaled) - mean.unsqueeze(2) * mean.unsqueeze(1)
    system = M.new_zeros(N, B + 1, B + 1)
    system[:, :B, :B] = H / tau.unsqueeze(2) + tau.unsqueeze(2) * torch.eye(B, dtype=M.dtype)
    system[:, :B, B] = system[:, B, :B] = root
    right = torch.cat([-root * gradient, M.new_zeros(N, 1)], 1)
    z = torch.linalg.solve(system, right.unsqueeze(2)).squeeze(2)[:, :B]
    way = z / root.clamp_min(1e-150)
    slope = (root * gradient * z).sum(1)
    step = (2.0 / way.abs().amax(1).clamp_min(1e-300)).clamp_max(1.0)
    before, size = found.value, found.value.abs().clamp_min(1.0)
    moved = log_y
    waiting = torch.ones(N, dtype=torch.bool)
    for _ in range(40):
        tried = (log_y + step.unsqueeze(1) * way).log_softmax(-1)
        # To rounding: at the end the objective has no digits left to fall in.
        falls = _objective(M, tau, tried) <= before + 1e-4 * step * slope + 1e-15 * size
        take = waiting & falls
        moved = torch.where(take.unsqueeze(1), tried, moved)
        waiting &= ~falls
        if not bool(waiting.any()):
            break
        step = torch.where(waiting, 0.5 * step, step)
    return moved


def _extragradient(M: Tensor, tau: Tensor, tolerance: float, iterations: int | None) -> Tensor:
    N, A, B = M.shape
    # |M| is the largest entry: the norm of both M: l1 -> l-infinity and of its transpose.
    step = 1.0 / (2.0 * M.abs().amax((1, 2)).unsqueeze(1) + tau)
    p, q = M.new_zeros(N, A), M.new_zeros(N, B)
    for k in range(iterations or 100_000):
        x, y = p.softmax(-1), q.softmax(-1)
        kept = 1.0 - step * tau
        half_p = kept * p + step * torch.einsum("nab,nb->na", M, y)
        half_q = kept * q - step * torch.einsum("nab,na->nb", M, x)
        x, y = half_p.softmax(-1), half_q.softmax(-1)
        p = kept * p + step * torch.einsum("nab,nb->na", M, y)
        q = kept * q - step * torch.einsum("nab,na->nb", M, x)
        if k % 50 == 0 and bool((response(M, tau, q.log_softmax(-1)).residual <= 0.1 * tolerance).all()):
            break
    return q.log_softmax(-1)
