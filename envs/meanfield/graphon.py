"""Finite-state mean-field games on graphons, with exact evaluation by backward induction.

Labels alpha in [0, 1] are cells alpha_m = (m - 1/2) / M of weight 1 / M (midpoint rule: exact for block models whose borders lie
on cell borders).  Tensors are float64: flows mu [..., M, H + 1, S], policies pi [..., M, H, S, A], aggregates z [..., M, H, S]
with z^alpha = integral W(alpha, beta) mu^beta dbeta, a measure of mass at most 1.  Rewards are maximised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.errors import ConfigError, DataError, nearest

Model = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(h, z [..., S]) -> (P [..., S, A, S], r [..., S, A]); differentiable in z, batched over any leading axes."""

Graphon = Callable[[Tensor, Tensor], Tensor]
"""(x, y) of one shape -> W(x, y) in [0, 1], symmetric."""


# Graphons ---------------------------------------------------------------------------------------------------


def cells(M: int, rule: str = "midpoint") -> Tensor:
    """Labels of M cells: "midpoint", or "linspace" (equally weighted points from 0 to 1, as some reference code has it)."""
    if rule == "linspace":
        return torch.linspace(0, 1, M, dtype=torch.float64)
    return (torch.arange(M, dtype=torch.float64) + 0.5) / M


def constant(p: float) -> Graphon:
    """W = p (Erdos-Renyi)."""
    return lambda x, y: torch.full_like(x * y, p)


def block_model(borders: Sequence[float], values: Any) -> Graphon:
    """Stochastic block model: `borders` between blocks, ascending in (0, 1); `values` the symmetric block matrix."""
    edges, table = (
        torch.tensor(borders, dtype=torch.float64),
        torch.as_tensor(values, dtype=torch.float64),
    )
    if table.shape != (len(edges) + 1, len(edges) + 1):
        raise ConfigError(
            f"a block model with {len(edges)} borders needs {len(edges) + 1} x {len(edges) + 1} values"
        )
    return lambda x, y: table[torch.bucketize(x, edges, right=True), torch.bucketize(y, edges, right=True)]


def exponential(theta: float) -> Graphon:
    """W = 2 e^{theta x y} / (1 + e^{theta x y}) - 1 = tanh(theta x y / 2)."""
    return lambda x, y: torch.tanh(theta * x * y / 2)


def uniform_attachment(x: Tensor, y: Tensor) -> Tensor:
    """W = 1 - max(x, y)."""
    return 1 - torch.maximum(x, y)


def ranked_attachment(x: Tensor, y: Tensor) -> Tensor:
    """W = 1 - x y."""
    return 1 - x * y


def threshold(t: float) -> Graphon:
    """W = 1 where x + y >= t, else 0."""
    return lambda x, y: (x + y >= t).to(x.dtype)


def step_function(values: Any) -> Graphon:
    """The graphon of a symmetric n x n matrix (of weights, or the adjacency of a network) on n equal intervals.

    Raises ConfigError where it is not square, not symmetric, or leaves [0, 1].
    """
    table = torch.as_tensor(values, dtype=torch.float64)
    n = table.shape[0] if table.ndim == 2 else 0
    if table.shape != (n, n) or n == 0:
        raise ConfigError(f"a graphon needs a square matrix, not one of shape {tuple(table.shape)}")
    _check(table)
    return lambda x, y: table[(x * n).long().clamp(0, n - 1), (y * n).long().clamp(0, n - 1)]


NAMED: dict[str, tuple[Callable[..., Graphon], tuple[float, ...]]] = {
    "er": (constant, (0.5,)),
    "exp": (exponential, (3.0,)),
    "sbm": (lambda: block_model([0.7], [[0.9, 0.3], [0.3, 0.1]]), ()),
    "threshold": (threshold, (1.0,)),
    "uniform_attachment": (lambda: uniform_attachment, ()),
    "ranked_attachment": (lambda: ranked_attachment, ()),
}
"""Graphons by name, each with the number that may follow its name ("er:0.3") and that number's default."""


def named(name: str) -> Graphon:
    """The graphon called `name`: one of NAMED ("sbm", "er:0.3", "exp:3"), or the file (.npy, .json) of a symmetric matrix."""
    if name.endswith((".npy", ".json")):
        try:
            values = (
                json.loads(Path(name).read_text(encoding="utf-8"))
                if name.endswith(".json")
                else np.load(name, allow_pickle=False)
            )
            return step_function(np.asarray(values, dtype=np.float64))
        except FileNotFoundError:
            raise DataError(f"{name} does not exist") from None
        except (ValueError, TypeError, OSError) as error:
            raise DataError(f"{name} cannot be read as a matrix of numbers: {error}") from error
    word, _, number = name.partition(":")
    if word not in NAMED:
        raise ConfigError(
            f"unknown graphon {name!r}.{nearest(word, NAMED)} There are {', '.join(NAMED)}, and .npy or .json files"
        )
    make, defaults = NAMED[word]
    try:
        return make(*([float(number)] if number else defaults))
    except (TypeError, ValueError):
        raise ConfigError(f"graphon {name!r}: {word} takes {len(defaults)} number after the colon") from None


def factor(W: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(U [M, q], V [M, q], error): W ~ U V' of rank q by truncated spectrum; error: the largest absolute entry of the rest.

    A block model has as many as it has blocks, ranked attachment two; z = U (V' mu) / M then costs O(M q S).
    """
    values, vectors = torch.linalg.eigh(W)
    kept = values.abs().argsort(descending=True)[:rank]
    U, V = vectors[:, kept] * values[kept], vectors[:, kept]
    return U, V, float((W - U @ V.mT).abs().max())


def network(graphon: Graphon, labels: Tensor, density: float = 1.0, seed: int = 0) -> Tensor:
    """A random network [n, n] of agents at `labels`: edges i < j with probability density W(x_i, x_j), symmetric, no loops.

    Its neighbourhoods over n density estimate those of the graphon to O(1 / sqrt(n density)).
    """
    g = torch.Generator().manual_seed(seed)
    upper = torch.rand(len(labels), len(labels), dtype=torch.float64, generator=g).triu(1)
    edges = ((upper > 0) & (upper < density * matrix(graphon, labels))).double().triu(1)
    return edges + edges.mT


def _check(W: Tensor) -> None:
    if not bool(((W >= 0) & (W <= 1)).all()):
        raise ConfigError(
            f"a graphon has values in [0, 1]; this one reaches {float(W.min()):g} and {float(W.max()):g}"
        )
    if not torch.allclose(W, W.mT, atol=1e-12):
        raise ConfigError("a graphon is symmetric; this one is not")


def matrix(graphon: Graphon, labels: Tensor) -> Tensor:
    """W(alpha_i, alpha_j) [M, M].  Raises ConfigError where it leaves [0, 1] or is not symmetric."""
    x, y = torch.broadcast_tensors(labels[:, None], labels[None, :])
    W = graphon(x.contiguous(), y.contiguous())
    _check(W)
    return W


# Games -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FiniteMFG:
    """A game: states S, actions A, horizon H, initial law mu0 [M, S], graphon W [..., M, M] at the cells, and its model.

    W may carry leading axes (candidates, games): everything computed from the game carries them too.  With `timed` it has an axis
    of steps before its last two: [..., H, M, M].
    """

    name: str
    states: int
    actions: int
    horizon: int
    mu0: Tensor
    W: Tensor
    model: Model
    timed: bool = False

    @property
    def labels(self) -> int:
        return self.W.shape[-1]

    def with_graphon(self, W: Tensor) -> FiniteMFG:
        """The same game on another graphon [..., M, M]."""
        return replace(self, W=W, mu0=self.mu0[:1].expand(W.shape[-1], -1), timed=False)

    def at(self, h: int) -> Tensor:
        """The graphon [..., M, M] of step h."""
        return self.W[..., h, :, :] if self.timed else self.W


def sis(W: Tensor, horizon: int = 50) -> FiniteMFG:
    """Epidemic: healthy 0, infected 1; meet 0, protect 1.  P(1 | 0, u, z) = 0.8 (1 - u) z(1), recovery 0.2, r = -2 1{s = 1} - u / 2."""

    def model(h: int, z: Tensor) -> tuple[Tensor, Tensor]:
        infect = 0.8 * z[..., 1]
        zero, one = torch.zeros_like(infect), torch.ones_like(infect)
        healthy = torch.stack([torch.stack([1 - infect, infect], -1), torch.stack([one, zero], -1)], -2)
        ill = torch.stack([0.2 * one, 0.8 * one], -1).unsqueeze(-2).expand_as(healthy)
        r = torch.tensor([[0.0, -0.5], [-2.0, -2.5]], dtype=z.dtype).expand(*z.shape[:-1], 2, 2)
        return torch.stack([healthy, ill], -3), r

    law = torch.full((W.shape[-1], 2), 0.5, dtype=torch.float64)
    return FiniteMFG("sis", 2, 2, horizon, law, W, model)


def investment(W: Tensor, horizon: int = 50) -> FiniteMFG:
    """Firms of quality 0..9 invest (1) or not: up with probability (9 - s) / 10; r = 0.3 s / (1 + sum s' z(s')) - 2 u."""
    quality = torch.arange(10, dtype=torch.float64)
    up = (9 - quality) / 10
    move = torch.zeros(10, 2, 10, dtype=torch.float64)
    move[:, 0] = torch.eye(10, dtype=torch.float64)
    move[:, 1] = torch.diag(1 - up) + torch.diag(up[:-1], 1)

    def model(h: int, z: Tensor) -> tuple[Tensor, Tensor]:
        share = 0.3 * quality / (1 + (z * quality).sum(-1, keepdim=True))
        r = torch.stack([share, share - 2.0], -1)
        return move.expand(*z.shape[:-1], 10, 2, 10), r

    law = torch.zeros(W.shape[-1], 10, dtype=torch.float64)
    law[:, 0] = 1.0
    return FiniteMFG("investment", 10, 2, horizon, law, W, model)


def beach_bar(W: Tensor, horizon: int = 10) -> FiniteMFG:
    """Ring of ten places with a bar at 5; moves -1, 0, 1 slip by one to either side with 0.05.

    r = -d(s, bar) / 10 - |a| / 10 - log(z(s) + 0.01).
    """
    place = torch.arange(10)
    move = torch.zeros(10, 3, 10, dtype=torch.float64)
    for action in range(3):
        for slip, p in ((-1, 0.05), (0, 0.9), (1, 0.05)):
            move[place, action, (place + action - 1 + slip) % 10] += p
    gap = (place - 5).abs()
    still = -torch.minimum(gap, 10 - gap).double() / 10
    effort = torch.tensor([0.1, 0.0, 0.1], dtype=torch.float64)

    def model(h: int, z: Tensor) -> tuple[Tensor, Tensor]:
        r = (still - (z + 1e-2).log()).unsqueeze(-1) - effort
        return move.expand(*z.shape[:-1], 10, 3, 10), r

    law = torch.full((W.shape[-1], 10), 0.1, dtype=torch.float64)
    return FiniteMFG("beach_bar", 10, 3, horizon, law, W, model)


GAMES: dict[str, Callable[..., FiniteMFG]] = {"sis": sis, "investment": investment, "beach_bar": beach_bar}


def load_game(path: str | Path, W: Tensor, horizon: int | None = None) -> FiniteMFG:
    """A game whose transitions and rewards are affine in z, from a .npz or .json file, on the graphon W [M, M].

    P [S, A, S] and r [S, A] at z = 0; P_z [S, A, S, S] and r_z [S, A, S] (optional): slopes by each z(s), the last axis; mu0 [S];
    horizon.  Raises DataError where one is missing or of another shape, ConfigError where P is no law (see `check_laws`).
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
        else:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in file.files}
        arrays = {
            name: torch.as_tensor(np.asarray(value, dtype=np.float64))
            for name, value in data.items()
            if name != "horizon"
        }
        P, r, law = arrays["P"], arrays["r"], arrays["mu0"]
        steps = int(horizon if horizon is not None else data["horizon"])
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except KeyError as error:
        raise DataError(f"{path} lacks {error.args[0]}; it needs P, r, mu0 and horizon") from error
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"{path} cannot be read as arrays of numbers: {error}") from error
    S, A = (r.shape[0], r.shape[1]) if r.ndim == 2 else (0, 0)
    P_z = arrays.get("P_z", torch.zeros(S, A, S, S, dtype=torch.float64))
    r_z = arrays.get("r_z", torch.zeros(S, A, S, dtype=torch.float64))
    shapes = {"P": (S, A, S), "r": (S, A), "mu0": (S,), "P_z": (S, A, S, S), "r_z": (S, A, S)}
    for (name, wanted), array in zip(shapes.items(), (P, r, law, P_z, r_z), strict=True):
        if tuple(array.shape) != wanted or not bool(array.isfinite().all()):
            raise DataError(f"{path}: {name} is {tuple(array.shape)}; finite numbers {wanted} are needed")
    if abs(float(law.sum()) - 1) > 1e-9 or float(law.min()) < 0:
        raise DataError(f"{path}: mu0 is no law: it sums to {float(law.sum()):g}")

    def model(h: int, z: Tensor) -> tuple[Tensor, Tensor]:
        return P + torch.einsum("satk,...k->...sat", P_z, z), r + torch.einsum("sak,...k->...sa", r_z, z)

    game = FiniteMFG(path.stem, S, A, steps, law.expand(W.shape[-1], S), W, model)
    check_laws(game)
    return game


def check_laws(game: FiniteMFG) -> None:
    """Raises ConfigError (label, h, s, a) where a transition row is no law along the flow of the uniform policy."""
    mu = flow(game, uniform_policy(game))
    for h in range(game.horizon):
        P, _ = game.model(h, aggregate(game, mu[..., h, :], h))
        bad = ((P.sum(-1) - 1).abs() > 1e-9) | (P.amin(-1) < -1e-12)
        if bool(bad.any()):
            m, s, a = (int(i) for i in bad.nonzero()[0, -3:])
            row = P[tuple(bad.nonzero()[0].tolist())]
            raise ConfigError(
                f"{game.name}: the transition row at label {float(cells(game.labels)[m]):g}, h={h}, s={s}, a={a} is no law:"
                f" it sums to {float(row.sum()):g}, its smallest entry is {float(row.min()):g}"
            )


# Exact evaluation -------------------------------------------------------------------------------------------


def aggregate(game: FiniteMFG, mu: Tensor, h: int = 0) -> Tensor:
    """z of populations mu [..., M, S] at step h: [..., M, S]."""
    return game.at(h) @ mu / game.labels


def uniform_policy(game: FiniteMFG) -> Tensor:
    """[..., M, H, S, A], the leading axes those of the graphon."""
    leading = game.W.shape[: -3 if game.timed else -2]
    shape = (*leading, game.labels, game.horizon, game.states, game.actions)
    return torch.full(shape, 1.0 / game.actions, dtype=torch.float64)


def flow(game: FiniteMFG, pi: Tensor) -> Tensor:
    """Gamma_2: mu [..., M, H + 1, S] of policies pi [..., M, H, S, A] on the game's graphon."""
    return _rollout(game, pi)[0]


def _rollout(game: FiniteMFG, pi: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The flow, and the model (P, r) that it meets at every step."""
    mu = game.mu0.expand(*pi.shape[:-3], game.states)
    found, models = [mu], []
    for h in range(game.horizon):
        P, r = game.model(h, aggregate(game, mu, h))
        joint = mu.unsqueeze(-1) * pi[..., h, :, :]
        mu = (joint.flatten(-2).unsqueeze(-2) @ P.flatten(-3, -2)).squeeze(-2)
        found.append(mu)
        models.append((P, r))
    return torch.stack(found, -2), models


def _models(game: FiniteMFG, mu: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [game.model(h, aggregate(game, mu[..., h, :], h)) for h in range(game.horizon)]


def _ahead(P: Tensor, V: Tensor) -> Tensor:
    """P V: [..., S, A, S], [..., S] -> [..., S, A]."""
    return (P.flatten(-3, -2) @ V.unsqueeze(-1)).squeeze(-1).unflatten(-1, P.shape[-3:-1])


def evaluate(game: FiniteMFG, pi: Tensor, mu: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """(Q [..., M, H, S, A], V [..., M, H + 1, S]) of pi against the frozen flow mu at temperature lam.

    Q_h = r_h + P_h V_{h+1},  V_h = <pi, Q_h - lam log pi>.
    """
    return _evaluate(_models(game, mu), pi, lam)


def _evaluate(models: list[tuple[Tensor, Tensor]], pi: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    V = torch.zeros(*pi.shape[:-3], pi.shape[-2], dtype=pi.dtype)
    Qs, Vs = [], [V]
    for h in reversed(range(len(models))):
        P, r = models[h]
        Q, now = r + _ahead(P, V), pi[..., h, :, :]
        V = (now * Q).sum(-1)
        if lam > 0:
            V = V - lam * torch.special.xlogy(now, now).sum(-1)
        Qs.append(Q)
        Vs.append(V)
    return torch.stack(Qs[::-1], -3), torch.stack(Vs[::-1], -2)


def best_response(game: FiniteMFG, mu: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Gamma_1: (pi [..., M, H, S, A], V* [..., M, H + 1, S]) against the frozen flow mu.

    V* = lam logsumexp(Q* / lam), or the maximum for lam = 0 (the first of equal actions).
    """
    Qs, Vs = _best(_models(game, mu), lam)
    if lam > 0:
        return (Qs / lam).softmax(-1), Vs
    return torch.nn.functional.one_hot(Qs.argmax(-1), game.actions).to(Qs.dtype), Vs


def _best(models: list[tuple[Tensor, Tensor]], lam: float) -> tuple[Tensor, Tensor]:
    V = torch.zeros_like(models[0][1][..., 0])
    Qs, Vs = [], [V]
    for P, r in reversed(models):
        Q = r + _ahead(P, V)
        V = lam * torch.logsumexp(Q / lam, -1) if lam > 0 else Q.amax(-1)
        Qs.append(Q)
        Vs.append(V)
    return torch.stack(Qs[::-1], -3), torch.stack(Vs[::-1], -2)


def exploitability(game: FiniteMFG, pi: Tensor, lam: float) -> Tensor:
    """Per label [..., M]: what an agent gains at best by leaving pi, against the flow of pi itself on the game's graphon.

    Zero exactly at an equilibrium; the mean over labels is the number that is reported.  Raises ArithmeticError below -1e-9.
    """
    return _gain(game, _rollout(game, pi)[1], pi, lam)


def deviation_gain(game: FiniteMFG, pi: Tensor, mu: Tensor, lam: float) -> Tensor:
    """Per label [..., M]: what one agent gains at best by leaving pi against the frozen flow mu, such as a finite population's own.

    With mu the flow of pi it is the exploitability.
    """
    return _gain(game, _models(game, mu), pi, lam)


def _gain(game: FiniteMFG, models: list[tuple[Tensor, Tensor]], pi: Tensor, lam: float) -> Tensor:
    _, best = _best(models, lam)
    _, own = _evaluate(models, pi, lam)
    gain = (game.mu0 * (best[..., 0, :] - own[..., 0, :])).sum(-1)
    if float(gain.min()) < -1e-9:
        raise ArithmeticError(f"a best response loses {-float(gain.min()):.1e}: the recursions disagree")
    return gain.clamp_min(0.0)
