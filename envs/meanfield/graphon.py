"""Finite-state mean-field games on graphons, with exact evaluation by backward induction.

Labels alpha in [0, 1] are cells alpha_m = (m - 1/2) / M of weight 1 / M (midpoint rule: exact for block models whose borders lie
on cell borders).  Tensors are float64: flows mu [..., M, H + 1, S], policies pi [..., M, H, S, A], aggregates z [..., M, H, S]
with z^alpha = integral W(alpha, beta) mu^beta dbeta, a measure of mass at most 1.  Rewards are maximised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mobula.errors import ConfigError

Model = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(h, z [..., S]) -> (P [..., S, A, S], r [..., S, A]); differentiable in z, batched over any leading axes."""


# Graphons ---------------------------------------------------------------------------------------------------


def cells(M: int, rule: str = "midpoint") -> Tensor:
    """Labels of M cells: "midpoint", or "linspace" (equally weighted points from 0 to 1, as some reference code has it)."""
    if rule == "linspace":
        return torch.linspace(0, 1, M, dtype=torch.float64)
    return (torch.arange(M, dtype=torch.float64) + 0.5) / M


def constant(p: float) -> Callable[[Tensor, Tensor], Tensor]:
    """W = p (Erdos-Renyi)."""
    return lambda x, y: torch.full_like(x * y, p)


def block_model(borders: Sequence[float], values: Any) -> Callable[[Tensor, Tensor], Tensor]:
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


def exponential(theta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """W = 2 e^{theta x y} / (1 + e^{theta x y}) - 1 = tanh(theta x y / 2)."""
    return lambda x, y: torch.tanh(theta * x * y / 2)


def uniform_attachment(x: Tensor, y: Tensor) -> Tensor:
    """W = 1 - max(x, y)."""
    return 1 - torch.maximum(x, y)


def ranked_attachment(x: Tensor, y: Tensor) -> Tensor:
    """W = 1 - x y."""
    return 1 - x * y


def matrix(graphon: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> Tensor:
    """W(alpha_i, alpha_j) [M, M].  Raises ConfigError where it leaves [0, 1] or is not symmetric."""
    x, y = torch.broadcast_tensors(labels[:, None], labels[None, :])
    W = graphon(x.contiguous(), y.contiguous())
    if not bool(((W >= 0) & (W <= 1)).all()):
        raise ConfigError(
            f"a graphon has values in [0, 1]; this one reaches {float(W.min()):g} and {float(W.max()):g}"
        )
    if not torch.allclose(W, W.mT, atol=1e-12):
        raise ConfigError("a graphon is symmetric; this one is not")
    return W


# Games -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FiniteMFG:
    """A game: states S, actions A, horizon H, initial law mu0 [M, S], graphon W [..., M, M] at the cells, and its model.

    W may carry leading axes (candidates, games): everything computed from the game carries them too.
    """

    name: str
    states: int
    actions: int
    horizon: int
    mu0: Tensor
    W: Tensor
    model: Model

    @property
    def labels(self) -> int:
        return self.W.shape[-1]

    def with_graphon(self, W: Tensor) -> FiniteMFG:
        """The same game on another graphon [..., M, M]."""
        return replace(self, W=W, mu0=self.mu0[:1].expand(W.shape[-1], -1))


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


# Exact evaluation -------------------------------------------------------------------------------------------


def aggregate(game: FiniteMFG, mu: Tensor) -> Tensor:
    """z of populations mu [..., M, S] at one time: [..., M, S]."""
    return game.W @ mu / game.labels


def uniform_policy(game: FiniteMFG) -> Tensor:
    """[..., M, H, S, A], the leading axes those of the graphon."""
    shape = (*game.W.shape[:-2], game.labels, game.horizon, game.states, game.actions)
    return torch.full(shape, 1.0 / game.actions, dtype=torch.float64)


def flow(game: FiniteMFG, pi: Tensor) -> Tensor:
    """Gamma_2: mu [..., M, H + 1, S] of policies pi [..., M, H, S, A] on the game's graphon."""
    return _rollout(game, pi)[0]


def _rollout(game: FiniteMFG, pi: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The flow, and the model (P, r) that it meets at every step."""
    mu = game.mu0.expand(*pi.shape[:-3], game.states)
    found, models = [mu], []
    for h in range(game.horizon):
        P, r = game.model(h, aggregate(game, mu))
        joint = mu.unsqueeze(-1) * pi[..., h, :, :]
        mu = (joint.flatten(-2).unsqueeze(-2) @ P.flatten(-3, -2)).squeeze(-2)
        found.append(mu)
        models.append((P, r))
    return torch.stack(found, -2), models


def _models(game: FiniteMFG, mu: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [game.model(h, aggregate(game, mu[..., h, :])) for h in range(game.horizon)]


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
    _, models = _rollout(game, pi)
    _, best = _best(models, lam)
    _, own = _evaluate(models, pi, lam)
    gain = (game.mu0 * (best[..., 0, :] - own[..., 0, :])).sum(-1)
    if float(gain.min()) < -1e-9:
        raise ArithmeticError(f"a best response loses {-float(gain.min()):.1e}: the recursions disagree")
    return gain.clamp_min(0.0)
