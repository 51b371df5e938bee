"""Linear-Gaussian state-space models in a batch: Kalman filter, Rauch-Tung-Striebel smoother, EM, subspace identification.

    x_1 ~ N(m0, P0),  x_{t+1} = A x_t + D u_t + w_t, w_t ~ N(0, Q),  y_t = C x_t + v_t, v_t ~ N(0, R)

with known inputs u_t, or none.  Every tensor carries a leading axis N (seeds, streams, restarts) and is float64.  A row of y with a NaN is a missing
observation: the prediction is then the filtered state.  Covariances converge geometrically; once they have, the gains are
frozen and the means are computed by a parallel scan, so that a pass costs O(T log T d^2) on tensors and no loop over time.

Kalman 1960; Rauch, Tung, Striebel 1965; EM: Shumway and Stoffer, J. Time Series Analysis 3 (1982); subspace
identification by the covariance Hankel matrix: Katayama, Subspace Methods for System Identification (2005), ch. 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mobula.errors import DataError, TrainingFault


class _Parts(NamedTuple):
    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor
    D: Tensor


class StateSpace(_Parts):
    """Parameters of N models: A [N, d, d], C [N, m, d], Q [N, d, d], R [N, m, m], m0 [N, d], P0 [N, d, d], D [N, d, k].

    D may be left out: no inputs, k = 0.
    """

    __slots__ = ()

    def __new__(
        cls, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, m0: Tensor, P0: Tensor, D: Tensor | None = None
    ) -> Self:
        return super().__new__(cls, A, C, Q, R, m0, P0, A[..., :0] if D is None else D)

    def select(self, rows: Tensor) -> StateSpace:
        """The models at `rows`, an index or mask over N."""
        return StateSpace(*(part[rows] for part in self))

    def where(self, mask: Tensor, other: StateSpace) -> StateSpace:
        """These models where `mask` [N] is true, `other`'s elsewhere."""
        return StateSpace(
            *(torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(self, other, strict=True))
        )

    @staticmethod
    def cat(models: Iterable[StateSpace]) -> StateSpace:
        """Batches joined along N."""
        return StateSpace(*(torch.cat(parts) for parts in zip(*models, strict=True)))


@dataclass
class Filtered:
    """mean, predicted_mean [N, T, d]; cov, predicted_cov [N, T, d, d]; log_likelihood [N].

    From step `steady` on the covariances are constant (T where they never are).
    """

    mean: Tensor
    cov: Tensor
    predicted_mean: Tensor
    predicted_cov: Tensor
    log_likelihood: Tensor
    steady: int


@dataclass
class Smoothed:
    """mean [N, T, d] and cov [N, T, d, d] given all data; lag_one [N, T-1, d, d]: Cov(x_{t+1}, x_t)."""

    mean: Tensor
    cov: Tensor
    lag_one: Tensor


def symmetric(x: Tensor) -> Tensor:
    """(X + X') / 2."""
    return (x + x.mT) / 2


def mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix-vector product over leading axes."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def spectral_radius(A: Tensor) -> Tensor:
    """Largest modulus of an eigenvalue, [...]."""
    return torch.linalg.eigvals(A).abs().amax(-1)


def stationary_covariance(A: Tensor, Q: Tensor) -> Tensor:
    """Solution of S = A S A' + Q, [N, d, d]; needs a spectral radius below 1."""
    d = A.shape[-1]
    eye = torch.eye(d * d, dtype=A.dtype)
    kron = torch.einsum("nij,nkl->nikjl", A, A).reshape(len(A), d * d, d * d)
    solved = torch.linalg.solve(eye - kron, Q.reshape(len(A), d * d))
    return symmetric(solved.reshape(len(A), d, d))


def update(C: Tensor, R: Tensor, mean: Tensor, cov: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """One measurement update (Joseph form) of predictions mean [N, d], cov [N, d, d] by y [N, m].

    Returns (mean, cov, gain [N, d, m], log-likelihood [N]); rows of y with a NaN leave the prediction as it is.
    """
    seen = ~y.isnan().any(-1)
    S = symmetric(C @ cov @ C.mT + R)
    factor = torch.linalg.cholesky(S)
    gain = torch.cholesky_solve(C @ cov, factor).mT * seen[:, None, None]
    error = torch.where(seen[:, None], y - mv(C, mean), 0.0)
    rest = torch.eye(cov.shape[-1], dtype=cov.dtype) - gain @ C
    new_cov = symmetric(rest @ cov @ rest.mT + gain @ R @ gain.mT)
    return mean + mv(gain, error), new_cov, gain, _log_density(factor, error) * seen


def _log_density(factor: Tensor, error: Tensor) -> Tensor:
    """log N(error; 0, L L') for factor L [N, m, m] and error [N, ..., m], summed over the axes between."""
    flat = error.reshape(len(error), -1, error.shape[-1])
    white = torch.linalg.solve_triangular(factor, flat.mT, upper=False)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = 0.5 * error.shape[-1] * math.log(2 * math.pi)
    return -0.5 * white.square().sum((-1, -2)) - flat.shape[1] * (log_det + constant)


def scan(F: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """x_t = F x_{t-1} + b_t with x_{-1} = start: F [N, d, d], b [N, T, d], start [N, d] -> [N, T, d], by doubling."""
    x = b.clone()
    if x.shape[1]:
        x[:, 0] += mv(F, start)
    shift, power = 1, F
    while shift < x.shape[1] and bool(power.abs().max() > 1e-40):
        moved = x[:, :-shift] @ power.mT
        x[:, shift:] = x[:, shift:] + moved
        shift, power = 2 * shift, power @ power
    return x


def kalman_filter(model: StateSpace, y: Tensor, u: Tensor | None = None, *, tol: float = 1e-10) -> Filtered:
    """Filters y [N, T, m]; the first step has no prediction: x_1 ~ N(m0, P0) is the prior of y_1.

    u: inputs [N, T, k] of models that have any; the last one acts after the data.
    tol: change of the filtered covariance below which the gains are frozen (only where nothing later is missing).
    """
    A, C, Q, R, m0, P0, D = model
    N, T, _ = y.shape
    drive = (y[..., :0] if u is None else u) @ D.mT
    d = A.shape[-1]
    mean, predicted_mean = y.new_empty(N, T, d), y.new_empty(N, T, d)
    cov, predicted_cov = y.new_empty(N, T, d, d), y.new_empty(N, T, d, d)
    total = y.new_zeros(N)
    missing = y.isnan().any(-1).any(0).nonzero().flatten()
    complete_from = int(missing[-1]) + 1 if len(missing) else 0
    m, P = m0, P0
    steady = T
    for t in range(T):
        if t > 0:
            m, P = mv(A, m) + drive[:, t - 1], symmetric(A @ P @ A.mT + Q)
        predicted_mean[:, t], predicted_cov[:, t] = m, P
        m, P, gain, log_density = update(C, R, m, P, y[:, t])
        mean[:, t], cov[:, t] = m, P
        total += log_density
        if t > complete_from and float((cov[:, t] - cov[:, t - 1]).abs().max()) < tol:
            steady = t
            break
    if steady < T - 1:
        rest = slice(steady + 1, T)
        predicted_cov[:, rest] = symmetric(A @ P @ A.mT + Q)[:, None]
        cov[:, rest] = P[:, None]
        closed, past = A - gain @ C @ A, drive[:, steady:-1]
        mean[:, rest] = scan(closed, y[:, rest] @ gain.mT + (past - past @ C.mT @ gain.mT), m)
        predicted_mean[:, rest] = mean[:, steady:-1] @ A.mT + past
        S = symmetric(C @ predicted_cov[:, -1] @ C.mT + R)
        error = y[:, rest] - predicted_mean[:, rest] @ C.mT
        total = total + _log_density(torch.linalg.cholesky(S), error)
    return Filtered(mean, cov, predicted_mean, predicted_cov, total, steady)


def smoother(model: StateSpace, filtered: Filtered, *, tol: float = 1e-10) -> Smoothed:
    """Rauch-Tung-Striebel pass: J_t = P_t A' P_{t+1|t}^{-1}, and the lag-one covariances P_{t+1|n} J_t'."""
    A = model.A
    f = filtered
    N, T, d = f.mean.shape
    steady = min(f.steady, T - 1)
    factors = torch.linalg.cholesky(f.predicted_cov[:, 1 : steady + 2])
    J_head = torch.cholesky_solve(A[:, None] @ f.cov[:, : factors.shape[1]], factors).mT
    J = torch.cat([J_head, J_head[:, -1:].expand(N, T - 1 - J_head.shape[1], d, d)], 1) if T > 1 else J_head
    cov = f.cov.clone()
    t = T - 2
    while t >= 0:
        cov[:, t] = symmetric(
            f.cov[:, t] + J[:, t] @ (cov[:, t + 1] - f.predicted_cov[:, t + 1]) @ J[:, t].mT
        )
        # Inside the steady stretch the recursion backwards has a limit too.
        if t > steady and float((cov[:, t] - cov[:, t + 1]).abs().max()) < tol:
            cov[:, steady:t] = cov[:, t : t + 1]
            t = steady
        t -= 1
    base = f.mean[:, :-1] - (J @ f.predicted_mean[:, 1:].unsqueeze(-1)).squeeze(-1)
    mean = f.mean.clone()
    if steady < T - 1:
        mean[:, steady : T - 1] = scan(J[:, -1], base[:, steady:].flip(1), f.mean[:, -1]).flip(1)
    for t in range(min(steady, T - 1) - 1, -1, -1):
        mean[:, t] = base[:, t] + mv(J[:, t], mean[:, t + 1])
    return Smoothed(mean, cov, cov[:, 1:] @ J.mT)


def floored(cov: Tensor, share: float = 1e-8) -> tuple[Tensor, Tensor]:
    """(symmetric `cov` with eigenvalues of at least `share` of its trace, mask [N] of where that changed it)."""
    values, vectors = torch.linalg.eigh(symmetric(cov))
    low = share * values.sum(-1, keepdim=True).clamp_min(1e-300)
    active = (values < low).any(-1)
    lifted = (vectors * torch.maximum(values, low)[..., None, :]) @ vectors.mT
    return torch.where(active[:, None, None], symmetric(lifted), symmetric(cov)), active


def whitening(second: Tensor, share: float = 1e-10) -> tuple[Tensor, Tensor]:
    """(W [N, k, k] with W' S W = diag(1 or 0), mask [N, k] of the zeros) for second moments S [N, k, k].

    The zeros are directions that hold less than `share` of the trace: inputs that were always 0, or that others determine.
    """
    values, vectors = torch.linalg.eigh(symmetric(second))
    absent = values <= share * values.sum(-1, keepdim=True)
    return vectors * torch.where(absent, 0.0, values.clamp_min(1e-300).rsqrt()).unsqueeze(-2), absent


def m_step(
    y: Tensor,
    smoothed: Smoothed,
    known_C: Tensor | None,
    u: Tensor | None = None,
    *,
    ridge: bool,
    pool: bool,
) -> tuple[StateSpace, Tensor]:
    """Maximiser of the expected log-likelihood (Shumway and Stoffer); also a mask [N] of models with a floored covariance.

    [A D] is the regression of x_t on z_{t-1} = [x_{t-1}; u_{t-1}], S1z Szz^{-1}; where the inputs seen do not determine D, it is
    the one without a part along the directions that they never took (in the whitened coordinates of `whitening`).

    ridge  A = S10 (S00 + eps I)^{-1} with eps = 1e-2 tr(S00) / d, for short data (Q is its own optimum given that A)
    pool   one set of parameters for all N series: the sufficient statistics are summed over N
    """
    x, P = smoothed.mean, smoothed.cov
    N, T, d = x.shape
    seen = ~y.isnan().any(-1)
    data = torch.where(seen[..., None], y, 0.0)
    weight = seen.to(y.dtype)
    second = x[..., :, None] * x[..., None, :] + P
    S11, S00 = second[:, 1:].sum(1), second[:, :-1].sum(1)
    S10 = torch.einsum("nti,ntj->nij", x[:, 1:], x[:, :-1]) + smoothed.lag_one.sum(1)
    Syx = torch.einsum("nti,ntj->nij", data, x)
    Sxx = torch.einsum("nt,ntij->nij", weight, second)
    Syy = torch.einsum("nti,ntj->nij", data, data)
    past = (y[..., :0] if u is None else u)[:, :-1]
    S1u, S0u, Suu = (torch.einsum("nti,ntj->nij", a, past) for a in (x[:, 1:], x[:, :-1], past))
    count, steps = weight.sum(1), x.new_full((N,), float(T - 1))
    m0, P0 = x[:, 0], P[:, 0]
    if pool:
        S11, S00, S10, Syx, Sxx, Syy, S1u, S0u, Suu = (
            s.sum(0, keepdim=True).expand_as(s) for s in (S11, S00, S10, Syx, Sxx, Syy, S1u, S0u, Suu)
        )
        count, steps = count.sum().expand(N), steps.sum().expand(N)
        first = m0.mean(0, keepdim=True)
        spread = m0 - first
        P0 = (P0 + spread[..., :, None] * spread[..., None, :]).mean(0, keepdim=True).expand_as(P0)
        m0 = first.expand_as(m0)
    penalty = 1e-2 * S00.diagonal(dim1=-2, dim2=-1).mean(-1) if ridge else torch.zeros(N, dtype=y.dtype)
    W, absent = whitening(Suu)
    S0v = S0u @ W
    S1z = torch.cat([S10, S1u @ W], -1)
    Szz = torch.cat([torch.cat([S00, S0v], -1), torch.cat([S0v.mT, W.mT @ Suu @ W], -1)], -2)
    # A direction that no input took gets a unit of its own: its coefficient is then 0.
    lift = torch.cat([penalty[:, None].expand(N, d), absent.to(y.dtype)], -1)
    AD = torch.cholesky_solve(S1z.mT, torch.linalg.cholesky(symmetric(Szz) + torch.diag_embed(lift))).mT
    A, D = AD[..., :d], AD[..., d:] @ W.mT
    Q = (S11 - AD @ S1z.mT - S1z @ AD.mT + AD @ Szz @ AD.mT) / steps[:, None, None]
    if known_C is None:
        C = torch.cholesky_solve(Syx.mT, torch.linalg.cholesky(symmetric(Sxx))).mT
    else:
        C = known_C
    R = (Syy - C @ Syx.mT - Syx @ C.mT + C @ Sxx @ C.mT) / count[:, None, None]
    Q, low_Q = floored(Q)
    R, low_R = floored(R)
    P0, low_P = floored(P0)
    return StateSpace(A, C, Q, R, m0, P0, D), low_Q | low_R | low_P


@dataclass
class Fit:
    """Result of `em`: the models, log-likelihood of each iterate [iterations, N] (NaN once a series has stopped)."""

    model: StateSpace
    trace: Tensor

    @property
    def log_likelihood(self) -> Tensor:
        """Of the returned models, [N]."""
        best = torch.where(self.trace.isnan(), -math.inf, self.trace)
        return best.amax(0)


def em(
    model: StateSpace,
    y: Tensor,
    u: Tensor | None = None,
    *,
    iterations: int = 40,
    known_C: Tensor | None = None,
    pool: bool = False,
    tol: float = 1e-6,
) -> Fit:
    """At most `iterations` EM steps from `model` on y [N, T, m], inputs u [N, T, k]; a series stops at a relative gain below `tol`.

    The likelihood must not fall by more than 1e-8 of itself while neither a floor nor the ridge is active (TrainingFault):
    that would be an error in the recursions.  The ridge on A is active while T < 20 d.
    """
    N, T, _ = y.shape
    ridge = 20 * model.A.shape[-1] > T
    active = torch.ones(N, dtype=torch.bool)
    previous = torch.full((N,), -math.inf, dtype=y.dtype)
    excused = torch.ones(N, dtype=torch.bool)
    trace: list[Tensor] = []
    for _ in range(iterations + 1):
        filtered = kalman_filter(model, y, u)
        value = filtered.log_likelihood
        total = value.sum().expand(N) if pool else value
        before = previous.sum().expand(N) if pool else previous
        gain = (total - before) / before.abs().clamp_min(1.0)
        fell = active & ~excused & (gain < -1e-8)
        if bool(fell.any()):
            raise TrainingFault(
                f"EM lost likelihood in series {int(fell.nonzero()[0])}: relative change {float(gain[fell].min()):.1e}"
            )
        trace.append(torch.where(active, value, math.nan))
        active = active & ~(gain.abs() < tol)
        if len(trace) > iterations or not bool(active.any()):
            break
        new, low = m_step(y, smoother(model, filtered), known_C, u, ridge=ridge, pool=pool)
        model = new.where(active, model)
        excused = (low.any().expand(N) if pool else low) | ridge
        previous = value
    return Fit(model, torch.stack(trace))


def capped(model: StateSpace, radius: float = 0.999) -> tuple[StateSpace, Tensor]:
    """(the models with A rescaled to spectral radius `radius` where it was at least 1, mask [N] of those)."""
    rho = spectral_radius(model.A)
    over = rho >= 1.0
    scale = torch.where(over, radius / rho, 1.0)
    return model._replace(A=model.A * scale[:, None, None]), over


def input_matrix(A: Tensor, C: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Least-squares D [N, d, k] of y_t = C x_t, x_{t+1} = A x_t + D u_t, x_1 = 0, given A and C (of minimum norm if it is not unique).

    y [N, T, m], u [N, T, k]; rows of y with a NaN are left out.
    """
    N, T = y.shape[:2]
    d, k = A.shape[-1], u.shape[-1]
    # y is linear in D: column (j, i) is what it would be, were D[i, j] 1 and the rest 0.
    shift = torch.nn.functional.pad(u, (0, 0, 1, -1)).mT[:, :, None, :, None]
    unit = (shift * torch.eye(d, dtype=y.dtype)[:, None]).flatten(0, 2)
    state = scan(A.repeat_interleave(k * d, 0), unit, unit.new_zeros(len(unit), d))
    response = state.view(N, k * d, T, d) @ C.mT[:, None]
    seen = (~y.isnan().any(-1)).to(y.dtype)[..., None]
    target = (torch.nan_to_num(y) * seen).flatten(1).unsqueeze(-1)
    design = (response * seen[:, None]).flatten(2).mT
    return torch.linalg.lstsq(design, target, driver="gelsd").solution.view(N, k, d).mT


def _without_inputs(z: Tensor, u: Tensor, seen: Tensor, lags: int) -> Tensor:
    """Residual of z [N, T, m] on a constant and the last `lags` inputs, in the rows `seen` [N, T, 1]; 0 in the others."""
    past = [torch.nn.functional.pad(u, (0, 0, lag, -lag)) for lag in range(1, lags + 1)]
    design = torch.cat([torch.ones_like(seen), *past], -1) * seen
    return z - design @ torch.linalg.lstsq(design, z, driver="gelsd").solution


def subspace(
    y: Tensor,
    d: int,
    u: Tensor | None = None,
    *,
    rows: int = 6,
    radius: float = 0.98,
    known_C: Tensor | None = None,
    projected: bool = False,
) -> tuple[StateSpace, Tensor]:
    """Start for EM from autocovariances of y [N, T, m] (over the pairs of rows that were seen); also singular values.

    H_ij = Lambda_{i+j+1} with `rows` block rows; O = U_d S_d^(1/2); C its first m rows, A from its shift, rescaled to a
    spectral radius of at most `radius`.  Then Q = 0.1 I, R = Cov(y) / 2, m0 = 0, P0 = I.  With a known C the model is moved
    into a gauge that has it.  What the last `rows` inputs u [N, T, k] explain is taken out of y first, since a cycle in them would pass
    for a memory of the state; D is then the least-squares one for A and C.  Returns (models, singular values [N, rows * m]).

    projected: with inputs, O from what the past tells of the future (`_predictable`) in place of H.  The memory of the state then
    shows in what inputs leave behind too, which is most of y where they are large; for inputs that do not repeat themselves.
    """
    N, T, m = y.shape
    if d > rows * m:
        raise DataError(
            f"d={d} hidden dimensions cannot be told from {m} observed ones: at most {rows * m}; lower d"
        )
    seen = (~y.isnan().any(-1)).to(y.dtype)
    mean = torch.nan_to_num(y).mul(seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[:, None, None]
    z = (torch.nan_to_num(y) - mean) * seen[..., None]
    if bool((z.abs().amax(1) == 0).any()):
        series, column = (z.abs().amax(1) == 0).nonzero()[0].tolist()
        raise DataError(f"observation column {column} of series {series} is constant: leave it out")
    inputs = u if u is not None and u.shape[-1] else None
    rest = z if inputs is None else _without_inputs(z, inputs, seen[..., None], rows)
    # Gaps that follow a pattern leave more pairs at some lags than at others.
    pairs = [(seen[:, k:] * seen[:, : T - k]).sum(1).clamp_min(1.0)[:, None, None] for k in range(2 * rows)]
    blocks = [
        torch.einsum("nti,ntj->nij", rest[:, k:], rest[:, : T - k]) / count for k, count in enumerate(pairs)
    ]
    if projected and inputs is not None:
        target = _predictable(z, inputs, seen[..., None], rows)
    else:
        target = torch.cat([torch.cat([blocks[i + j + 1] for j in range(rows)], -1) for i in range(rows)], -2)
    U, values, _ = torch.linalg.svd(target)
    observability = U[..., :d] * values[:, None, :d].sqrt()
    C = observability[:, :m]
    A = torch.linalg.pinv(observability[:, : (rows - 1) * m]) @ observability[:, m : rows * m]
    A = A * (radius / spectral_radius(A)).clamp(max=1.0)[:, None, None]
    eye = torch.eye(d, dtype=y.dtype).expand(N, d, d)
    Q = 0.1 * eye
    if known_C is not None:
        known = known_C.expand(N, m, d)
        S = torch.linalg.pinv(known) @ C + _null(known) @ _null(C).mT
        A = S @ A @ torch.linalg.inv(S)
        C, Q = known, symmetric(0.1 * S @ S.mT)
    D = None if inputs is None else input_matrix(A, C, y - mean, inputs)
    return StateSpace(A, C, Q, 0.5 * blocks[0], torch.zeros(N, d, dtype=y.dtype), eye, D), values


def _predictable(z: Tensor, u: Tensor, seen: Tensor, rows: int) -> Tensor:
    """M [N, rows * m, rows * m] with M M' the covariance of what the past tells of `rows` outputs to come; its columns span that of O.

    y_t, ..., y_{t+rows-1} are regressed on the `rows` outputs and inputs before t, once the inputs from t on (and a constant)
    are taken out of both: the projection of PO-MOESP (Verhaegen, Automatica 30, 1994).  Windows with a gap are left out.
    """
    count = z.shape[1] - 2 * rows + 1

    def windows(x: Tensor, first: int) -> Tensor:
        return torch.cat([x[:, first + i : first + i + count] for i in range(rows)], -1)

    whole = torch.cat([windows(seen, 0), windows(seen, rows)], -1).amin(-1, keepdim=True)
    ahead = torch.cat([whole, windows(u, rows) * whole], -1)

    def residual(x: Tensor) -> Tensor:
        x = x * whole
        return x - ahead @ torch.linalg.lstsq(ahead, x, driver="gelsd").solution

    past, future = residual(torch.cat([windows(z, 0), windows(u, 0)], -1)), residual(windows(z, rows))
    fit = past @ torch.linalg.lstsq(past, future, driver="gelsd").solution
    values, vectors = torch.linalg.eigh(fit.mT @ fit / whole.sum(1, keepdim=True).clamp_min(1.0))
    return vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)


def start(
    y: Tensor, d: int, u: Tensor | None = None, *, known_C: Tensor | None = None, trial: int = 5
) -> StateSpace:
    """Where EM begins: the subspace model of y [N, T, m]; with inputs u [N, T, k], of the two there are the likelier one after `trial` steps.

    Which of them is better hangs on the size of the inputs and on whether they repeat themselves.
    """
    plain = subspace(y, d, u, known_C=known_C)[0]
    if u is None or not u.shape[-1]:
        return plain
    C = None if known_C is None else known_C.expand(*plain.C.shape)
    first, second = (
        em(model, y, u, iterations=trial, known_C=C)
        for model in (plain, subspace(y, d, u, known_C=known_C, projected=True)[0])
    )
    return second.model.where(second.log_likelihood > first.log_likelihood, first.model)


def _null(C: Tensor) -> Tensor:
    """Orthonormal basis of the null space of C [N, m, d] of full row rank, [N, d, d - m]."""
    return torch.linalg.svd(C).Vh[:, C.shape[-2] :].mT


def unit_gauge(model: StateSpace) -> StateSpace:
    """The same law with coordinates of x in which the stationary covariance (without inputs) is I."""
    factor = torch.linalg.cholesky(stationary_covariance(model.A, model.Q))

    def whiten(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, x, upper=False)

    return StateSpace(
        whiten(model.A @ factor),
        model.C @ factor,
        symmetric(whiten(whiten(model.Q).mT)),
        model.R,
        whiten(model.m0.unsqueeze(-1)).squeeze(-1),
        symmetric(whiten(whiten(model.P0).mT)),
        whiten(model.D),
    )
