"""Portfolios without learning: targets at each bar from the past alone, and their backtest on one ledger.

Every strategy trades by the same rules as `PortfolioAllocation`: the order of bar t fills by the environment's rule, costs by the
remainder factor, positions carried through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.envs.finance.portfolio import PortfolioAllocation
from mobula.errors import ConfigError, nearest

Array = np.ndarray[Any, Any]


def equal_weight(past: Array) -> Array:
    """1 / N (skfolio's EqualWeighted)."""
    from skfolio.optimization import EqualWeighted  # type: ignore[import-untyped]

    return _fit(EqualWeighted(), past)


def inverse_volatility(past: Array) -> Array:
    """Weights in proportion to 1 / volatility."""
    from skfolio.optimization import InverseVolatility  # type: ignore[import-untyped]

    return _fit(InverseVolatility(), past)


def min_variance(past: Array) -> Array:
    """Long-only minimum variance."""
    from skfolio.optimization import MeanRisk  # type: ignore[import-untyped]

    return _fit(MeanRisk(), past)


def max_sharpe(past: Array) -> Array:
    """Long-only maximum ratio of mean to deviation; equal weights where no mean is positive."""
    from skfolio.optimization import MeanRisk, ObjectiveFunction  # type: ignore[import-untyped]

    if (past.mean(axis=0) <= 0).all():
        return np.full(past.shape[1], 1 / past.shape[1])
    return _fit(MeanRisk(objective_function=ObjectiveFunction.MAXIMIZE_RATIO), past)


def momentum(past: Array) -> Array:
    """The third of the symbols with the largest return of the last year without its last month, equally weighted."""
    score = np.prod(1 + past[:-21], axis=0) if len(past) > 42 else np.prod(1 + past, axis=0)
    kept = max(1, past.shape[1] // 3)
    weights = np.zeros(past.shape[1])
    weights[np.argsort(-score, kind="stable")[:kept]] = 1 / kept
    return weights


def _fit(model: Any, past: Array) -> Array:
    # A symbol that has not moved at all has no covariance to speak of.
    moves = past.std(axis=0) > 1e-12
    weights = np.zeros(past.shape[1])
    if not moves.any():
        return np.full(past.shape[1], 1 / past.shape[1])
    weights[moves] = np.asarray(model.fit(past[:, moves]).weights_)
    return np.clip(weights, 0, None) / np.clip(weights, 0, None).sum()


FITTED: dict[str, Callable[[Array], Array]] = {
    "equal_weight": equal_weight,
    "inverse_volatility": inverse_volatility,
    "min_variance": min_variance,
    "max_sharpe": max_sharpe,
    "momentum": momentum,
}
NAMES = (*FITTED, "buy_and_hold", "cash", "random")


@dataclass(frozen=True)
class Backtest:
    """Paths of K strategies over the bars of an environment's range.

    dates [T], value [T, K], weights [T, K, N + 1] (cash first), paid [K] and traded [K] in currency.
    """

    names: tuple[str, ...]
    dates: Any
    value: Tensor
    weights: Tensor
    paid: Tensor
    traded: Tensor

    def returns(self, name: str) -> Array:
        """[T - 1] simple returns of a strategy."""
        value = self.value[:, self.names.index(name)]
        return (value[1:] / value[:-1] - 1).numpy()  # type: ignore[no-any-return]


def backtest(
    env: PortfolioAllocation,
    names: Sequence[str] = NAMES,
    *,
    every: int = 21,
    lookback: int = 252,
    seed: int = 0,
    weights: Mapping[str, Array] | None = None,
) -> Backtest:
    """Plays baselines over the range of `env` (made with `training=False`), all of them side by side.

    every     bars between rebalancings (random draws new weights at every bar; buy_and_hold buys equal weights once)
    lookback  returns that a fit sees, all of them up to and with the bar of the decision
    weights   {name: [N] or [N + 1]} fixed targets of your own, rebalanced alike
    """
    own = dict(weights or {})
    for name in names:
        if name not in NAMES and name not in own:
            raise ConfigError(f"unknown baseline {name!r}.{nearest(name, NAMES)}")
    T, N = env.T, env.N
    past = env.whole.returns.numpy()
    if any(name in FITTED and name != "equal_weight" for name in names) and env.first + 1 < lookback:
        raise ConfigError(f"baselines need {lookback} returns before the range and there are {env.first}")
    state = env.fresh(torch.arange(len(names), device=env.device))
    state["t"] = torch.zeros_like(state["t"])
    rng = np.random.default_rng(seed)
    values, held = [state["value"]], [state["weights"]]
    target = torch.zeros(len(names), N + 1, dtype=torch.float64)
    for t in range(T - 1):
        due = t % every == 0
        trade = torch.zeros(len(names), dtype=torch.bool)
        for k, name in enumerate(names):
            if name == "random":
                target[k], trade[k] = torch.from_numpy(rng.dirichlet(np.ones(N + 1))), True
            elif name in ("buy_and_hold", "cash"):
                if t == 0:
                    # Symbols that begin later cannot be bought yet.
                    live = env.tradable[0].double() if name == "buy_and_hold" else torch.zeros(N).double()
                    target[k] = torch.cat([(live.sum() == 0).double()[None], live / live.sum().clamp_min(1)])
                    trade[k] = True
            elif due:
                if name in own:
                    fixed = torch.as_tensor(own[name], dtype=torch.float64)
                    target[k] = fixed if len(fixed) == N + 1 else torch.cat([1 - fixed.sum()[None], fixed])
                else:
                    seen = past[env.first + t + 1 - min(lookback, env.first + t) : env.first + t + 1]
                    target[k, 1:] = torch.from_numpy(FITTED[name](seen))
                    target[k, 0] = 1 - target[k, 1:].sum()
                trade[k] = True
        state, _, _ = env.move(state, target, trade)
        values.append(state["value"])
        held.append(state["weights"])
    return Backtest(
        tuple(names), env.dates, torch.stack(values), torch.stack(held), state["paid"], state["traded"]
    )
