"""Bandits whose context is a hidden, temporally correlated state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mobula.errors import ConfigError
from mobula.sampling.tensor_env import State, TensorEnv


@dataclass(frozen=True)
class Instance:
    """N linear-Gaussian bandits: x_{t+1} = A x_t + D u_t + w, y_t = C x_t + v, r_t = theta_a . x_t + sigma eta.

    A, Q [N, d, d], C [N, m, d], R [N, m, m], m0 [N, d], P0 [N, d, d] (law of the first observed state), theta [N, K, d], D [N, d, k]:
    u_t are the dummies of a cycle of k rounds, k = 0 where there is none.
    """

    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor
    theta: Tensor
    sigma: float
    D: Tensor

    @property
    def model(self) -> tuple[Tensor, ...]:
        """(A, C, Q, R, m0, P0, D)."""
        return self.A, self.C, self.Q, self.R, self.m0, self.P0, self.D

    def inputs(self, steps: int) -> Tensor:
        """u [T, k]: round t has a one in column t mod k."""
        k = self.D.shape[-1]
        phase = torch.arange(steps).unsqueeze(1) % max(k, 1)
        return (phase == torch.arange(k)).double()


def draw_instances(
    seeds: Sequence[int],
    *,
    d: int = 4,
    m: int = 2,
    arms: int = 5,
    radius: float = 0.98,
    q: float = 0.04,
    r: float = 1.0,
    sigma: float = 0.1,
    season: int = 0,
) -> Instance:
    """One instance a seed: A = radius O with O random orthogonal (Haar), Q = q I, C = [I_m 0], R = r I, theta random unit vectors.

    The first observed state is drawn from the stationary law without inputs (variance q / (1 - radius^2) in every direction).  With a
    cycle of `season` rounds, D is standard normal, less its mean over the cycle.
    """
    if not 0 < radius < 1 or m > d or season < 0:
        raise ConfigError(
            f"linear_bandit: needs 0 < radius < 1, m <= d and season >= 0; got radius={radius}, m={m}, d={d}, season={season}"
        )
    A, theta, D = [], [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        Z, upper = np.linalg.qr(rng.standard_normal((d, d)))
        A.append(radius * Z * np.sign(np.diag(upper)))
        raw = rng.standard_normal((arms, d))
        theta.append(raw / np.linalg.norm(raw, axis=1, keepdims=True))
        drive = np.random.default_rng([seed, 2]).standard_normal((d, season))
        D.append(drive - drive.mean(axis=1, keepdims=True) if season else drive)
    n, eye = len(seeds), torch.eye(d, dtype=torch.float64)
    return Instance(
        A=torch.tensor(np.array(A)),
        C=eye[:m].expand(n, m, d),
        Q=(q * eye).expand(n, d, d),
        R=(r * eye[:m, :m]).expand(n, m, m),
        m0=torch.zeros(n, d, dtype=torch.float64),
        P0=(q / (1 - radius**2) * eye).expand(n, d, d),
        theta=torch.tensor(np.array(theta)),
        sigma=sigma,
        D=torch.tensor(np.array(D)),
    )


@dataclass(frozen=True)
class Paths:
    """What N bandits show over T rounds, whatever is chosen: x [N, T, d], y [N, T, m], rewards [N, T, K] of every arm; inputs u [T, k]."""

    x: Tensor
    y: Tensor
    rewards: Tensor
    u: Tensor


def draw_paths(instance: Instance, seeds: Sequence[int], steps: int) -> Paths:
    """Contexts and rewards of `steps` rounds, one stream of random numbers a seed (apart from the one of its instance)."""
    n, d, m, arms = (
        len(seeds),
        instance.A.shape[-1],
        instance.C.shape[-2],
        instance.theta.shape[-2],
    )
    draws = [np.random.default_rng([seed, 1]).standard_normal((steps, d + m + 1)) for seed in seeds]
    noise = torch.tensor(np.array(draws))
    state_noise = torch.linalg.cholesky(instance.Q)
    u = instance.inputs(steps)
    x = torch.empty(n, steps, d, dtype=torch.float64)
    x[:, 0] = instance.m0 + torch.einsum("nij,nj->ni", torch.linalg.cholesky(instance.P0), noise[:, 0, :d])
    for t in range(1, steps):
        x[:, t] = torch.einsum("nij,nj->ni", instance.A, x[:, t - 1]) + torch.einsum(
            "nij,nj->ni", state_noise, noise[:, t, :d]
        )
        x[:, t] += instance.D @ u[t - 1]
    y = torch.einsum("nij,ntj->nti", instance.C, x) + torch.einsum(
        "nij,ntj->nti", torch.linalg.cholesky(instance.R), noise[..., d : d + m]
    )
    means = torch.einsum("nkd,ntd->ntk", instance.theta, x)
    return Paths(x, y, means + instance.sigma * noise[..., -1:].expand(n, steps, arms), u)


class LinearBandit(TensorEnv):
    """Linear contextual bandit with a hidden autoregressive context, seen through noise (EMKF-Bandit, arXiv 2409.11521).

    Observation y (Box, m), with a `season` followed by the dummies u of its cycle (m + k numbers); action an arm, reward
    theta_a . x + noise; never ends.  All environments of a batch are copies of one instance, drawn from `instance`, with contexts of
    their own.
    """

    continuing = True

    def __init__(self, num_envs: int = 1, *, instance: int = 0, **kwargs: Any) -> None:
        """instance: seed of A, theta and D.  d, m, arms, radius, q, r, sigma, season: see `draw_instances` (default: a long memory seen
        through much noise).
        """
        names = ("d", "m", "arms", "radius", "q", "r", "sigma", "season")
        about = {name: kwargs.pop(name) for name in names if name in kwargs}
        self.instance = draw_instances([instance], **about)
        m, arms, self._season = (
            self.instance.C.shape[-2],
            self.instance.theta.shape[-2],
            self.instance.D.shape[-1],
        )
        super().__init__(
            num_envs,
            observation_space=spaces.Box(-np.inf, np.inf, (m + self._season,), np.float32),
            action_space=spaces.Discrete(arms),
            **kwargs,
        )
        law = self.instance
        self._A, self._C, self._theta = law.A[0].mT, law.C[0].mT, law.theta[0]
        self._state_noise = torch.linalg.cholesky(law.Q[0]).mT
        self._obs_noise = torch.linalg.cholesky(law.R[0]).mT
        self._start = torch.linalg.cholesky(law.P0[0]).mT

    def _normal(self, n: int, size: int) -> Tensor:
        return torch.randn(n, size, generator=self.generator, dtype=torch.float64)

    def _seen(self, x: Tensor, phase: Tensor) -> State:
        y = x @ self._C + self._normal(len(x), self._C.shape[1]) @ self._obs_noise
        return {"x": x, "y": y, "phase": phase}

    def initial(self, n: int) -> State:
        x = self.instance.m0[0] + self._normal(n, self._A.shape[0]) @ self._start
        return self._seen(x, torch.zeros(n, dtype=torch.int64))

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        x = state["x"]
        noise = self.instance.sigma * self._normal(len(x), 1).squeeze(1)
        reward = (self._theta[action] * x).sum(-1) + noise
        new = x @ self._A + self._normal(len(x), self._A.shape[0]) @ self._state_noise
        phase = state["phase"]
        if self._season:
            new = new + self.instance.D[0].mT[phase]
            phase = (phase + 1) % self._season
        return self._seen(new, phase), reward.float(), torch.zeros(len(x), dtype=torch.bool)

    def observe(self, state: State) -> Tensor:
        y = state["y"]
        if self._season:
            y = torch.cat([y, torch.nn.functional.one_hot(state["phase"], self._season)], 1)
        return y.float()
