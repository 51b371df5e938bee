"""Markets that are made, not found: a regime-switching factor GARCH universe, and a signal with a known optimal policy."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from gymnasium import spaces
from torch import Tensor

from mobula.envs.finance import schema
from mobula.envs.finance.sources import DataSource
from mobula.errors import ConfigError
from mobula.sampling.tensor_env import State, TensorEnv

# A universe ------------------------------------------------------------------------------------------------------------


def regime_garch(
    days: int, symbols: int, *, seed: int = 0, ic: float = 0.0, steps: int = 8
) -> dict[str, np.ndarray[Any, Any]]:
    """Daily bars of a one-factor market with GARCH(1,1), Student-t(6) shocks and two hidden regimes.

    r = beta f + e; f has variance h, h' = omega + alpha f^2 + b h, omega larger by 4 in the rough regime; the regimes last with
    probability 0.99 (calm) and 0.95 (rough).  A bar is built from `steps` moves inside it, so that low <= open, close <= high;
    volume is lognormal, its log correlated by 0.6 with |return| in the ranks' Gaussian scale.

    ic  correlation of a signal s [days, symbols] (AR(1), coefficient 0.9), known at the close of a day, with the residual e of the
        next day

    Returns open, high, low, close, volume, signal, returns [days, symbols], regime, factor (f) and variance (h) [days].
    """
    if days < 2 or symbols < 1 or not 0 <= ic < 1:
        raise ConfigError("regime_garch: days >= 2, symbols >= 1 and 0 <= ic < 1 are needed")
    rng = np.random.default_rng(seed)
    beta = rng.uniform(0.6, 1.4, symbols)
    own = rng.uniform(0.008, 0.02, symbols)
    alpha, b, calm = 0.08, 0.90, 0.02 * 1e-4
    shocks = rng.standard_t(6, days) / math.sqrt(1.5)
    regime, h, f = np.zeros(days, np.int64), np.zeros(days), np.zeros(days)
    stay = (0.99, 0.95)
    moves = rng.random(days)
    variance = calm / (1 - alpha - b)
    for t in range(days):
        before = regime[t - 1] if t else 0
        regime[t] = before if moves[t] < stay[before] else 1 - before
        h[t] = variance
        f[t] = math.sqrt(variance) * shocks[t] + 3e-4
        variance = calm * (1 + 3 * regime[t]) + alpha * f[t] ** 2 + b * variance
    noise = rng.standard_normal((days, symbols))
    signal = np.empty((days, symbols))
    signal[0] = rng.standard_normal(symbols)
    innovations = rng.standard_normal((days, symbols))
    for t in range(1, days):
        signal[t] = 0.9 * signal[t - 1] + math.sqrt(1 - 0.81) * innovations[t]
    residual = noise.copy()
    residual[1:] = ic * signal[:-1] + math.sqrt(1 - ic**2) * noise[1:]
    returns = np.clip(beta * f[:, None] + own * residual, -0.45, 0.45)
    # A bridge: the moves inside a bar sum to its return.
    inner = (
        rng.standard_normal((days, symbols, steps)) * (np.abs(returns)[..., None] + own[:, None]) / steps**0.5
    )
    inner += (returns - inner.sum(-1))[..., None] / steps
    close = 50.0 * np.exp(np.cumsum(returns, axis=0))
    before = np.vstack([np.full((1, symbols), 50.0), close[:-1]])
    path = np.log(before)[..., None] + np.cumsum(inner, axis=-1)
    path[..., -1] = np.log(close)
    opening = np.exp(path[..., 0])
    high, low = np.exp(path.max(-1)), np.exp(path.min(-1))
    size = np.abs(returns) / (own + np.sqrt(h)[:, None])
    score = (size - size.mean(0)) / size.std(0)
    other = rng.standard_normal((days, symbols))
    volume = np.exp(14.0 + 0.4 * (0.6 * score + 0.8 * other))
    return {
        "open": opening,
        "high": np.maximum(high, np.maximum(opening, close)),
        "low": np.minimum(low, np.minimum(opening, close)),
        "close": close,
        "volume": volume,
        "signal": signal,
        "returns": returns,
        "regime": regime,
        "factor": f,
        "variance": h,
    }


class SyntheticMarket(DataSource):
    """Ten symbols of `regime_garch` from 2000 on, 16 years with opens, highs, lows and volume."""

    name = "synthetic"
    licence = "made by mobula"
    has_ohlc = has_volume = True
    survivorship = "synthetic: none"

    def __init__(self, days: int = 4000, symbols: int = 10, seed: int = 0, ic: float = 0.0) -> None:
        self.settings = (days, symbols, seed, ic)
        self.symbols = tuple(f"S{i}" for i in range(symbols))

    def load(self, symbols: tuple[str, ...]) -> pa.Table:
        return _synthetic_table(*self.settings, symbols)


@lru_cache(maxsize=4)
def _synthetic_table(days: int, count: int, seed: int, ic: float, symbols: tuple[str, ...]) -> pa.Table:
    from mobula.envs.finance.processors import calendar_of

    made = regime_garch(days, count, seed=seed, ic=ic)
    last = str((pd.Timestamp("2000-01-01") + pd.Timedelta(days=int(days * 1.5) + 30)).date())
    closes = calendar_of("XNYS", "2000-01-01", last).closes[:days].dt.tz_localize(None).to_numpy()
    index = [int(name[1:]) for name in symbols]
    columns: dict[str, Any] = {
        "time": np.repeat(closes, len(index)),
        "symbol": np.tile(np.asarray(symbols, dtype=object), days),
    }
    names = ("open", "high", "low", "close", "volume")
    return schema.table_of(columns | {name: made[name][:, index].ravel() for name in names})


# A planted signal --------------------------------------------------------------------------------------------------------

RHO, NOISE = 0.9, 0.01


class PlantedSignal(TensorEnv):
    """One asset whose next return is beta s_t + 0.01 xi for an observed AR(1) signal s; never ends, and the optimum is known.

    Observation [s, a'] (a' the position before); action the position a in [-1, 1].  Reward in percent:
    100 (a (beta s + 0.01 xi) - cost |a - a'|).  Without cost the optimum is a = sgn(s), 100 beta sqrt(2 / pi) a step.
    """

    continuing = True

    def __init__(self, num_envs: int = 1, *, beta: float = 1e-3, cost: float = 0.0, **kwargs: Any) -> None:
        """beta: size of the signal in the return.  cost: proportional, a unit of position."""
        if cost < 0:
            raise ConfigError(f"planted_signal: cost is {cost}; at least 0 is needed")
        super().__init__(
            num_envs,
            observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float32),
            action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
            **kwargs,
        )
        self.beta, self.cost = beta, cost

    def _normal(self, n: int) -> Tensor:
        return torch.randn(n, generator=self.generator, dtype=torch.float64, device=self.device)

    def initial(self, n: int) -> State:
        return {"s": self._normal(n), "position": torch.zeros(n, dtype=torch.float64, device=self.device)}

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        s, before = state["s"], state["position"]
        position = action[:, 0].double().clamp(-1.0, 1.0)
        gain = position * (self.beta * s + NOISE * self._normal(len(s)))
        reward = 100 * (gain - self.cost * (position - before).abs())
        new = RHO * s + math.sqrt(1 - RHO**2) * self._normal(len(s))
        return {"s": new, "position": position}, reward, torch.zeros_like(s, dtype=torch.bool)

    def observe(self, state: State) -> Tensor:
        return torch.stack([state["s"], state["position"]], -1).float()


def signal_paths(steps: int, paths: int, seed: int) -> Tensor:
    """[steps, paths] of s, stationary."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, paths, generator=g, dtype=torch.float64)
    s = torch.empty_like(noise)
    s[0] = noise[0]
    for t in range(1, steps):
        s[t] = RHO * s[t - 1] + math.sqrt(1 - RHO**2) * noise[t]
    return s


def score(policy: Any, s: Tensor, *, beta: float, cost: float) -> Tensor:
    """[paths] mean noise-free reward beta s a - cost |a - a'| of `policy`(s [B], a' [B]) -> a [B] along the paths `s` [T, B]."""
    before = torch.zeros_like(s[0])
    total = torch.zeros_like(s[0])
    for now in s:
        a = policy(now, before)
        total += beta * now * a - cost * (a - before).abs()
        before = a
    return total / len(s)


def sign_optimum(beta: float = 1e-3) -> float:
    """beta E|s|: the reward of sgn(s) without cost."""
    return beta * math.sqrt(2 / math.pi)


def sign_net(beta: float, cost: float) -> float:
    """Reward of sgn(s) with cost: the sign changes with probability arccos(rho) / pi."""
    return sign_optimum(beta) - 2 * cost * math.acos(RHO) / math.pi


def optimal_policy(
    beta: float = 1e-3, cost: float = 5e-4, *, signals: int = 41, positions: int = 21, reach: float = 4.0
) -> tuple[Any, float]:
    """Average-reward value iteration on a grid of (s, position); s moves between cells of equal width by the Gaussian law.

    Returns (policy for `score`: nearest grid point of s and of the position before, gain on the grid).  The gain is biased by the
    grid; score the policy on paths instead.
    """
    grid = torch.linspace(-reach, reach, signals, dtype=torch.float64)
    a = torch.linspace(-1.0, 1.0, positions, dtype=torch.float64)
    edge = (grid[1:] + grid[:-1]) / 2
    scale = math.sqrt(1 - RHO**2)
    below = torch.special.ndtr((edge[None, :] - RHO * grid[:, None]) / scale)
    zero, one = torch.zeros(signals, 1, dtype=torch.float64), torch.ones(signals, 1, dtype=torch.float64)
    P = torch.cat([below, one], 1) - torch.cat([zero, below], 1)
    # reward [s, before, after]
    reward = beta * grid[:, None, None] * a - cost * (a[None, :] - a[:, None]).abs()
    bias, gain = torch.zeros(signals, positions, dtype=torch.float64), 0.0
    for _ in range(10_000):
        q = reward + (P @ bias)[:, None, :]
        new = q.amax(-1)
        step = new - bias
        gain = float((step.max() + step.min()) / 2)
        bias = new - new[signals // 2, positions // 2]
        if float(step.max() - step.min()) < 1e-12:
            break
    choice = a[(reward + (P @ bias)[:, None, :]).argmax(-1)]

    def policy(s: Tensor, before: Tensor) -> Tensor:
        i = ((s + reach) / (2 * reach) * (signals - 1)).round().clamp(0, signals - 1).long()
        j = ((before + 1) / 2 * (positions - 1)).round().clamp(0, positions - 1).long()
        return choice[i, j]

    return policy, gain
