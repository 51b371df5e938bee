"""Steps a second of `StockTrading` beside the reference stock environment's dynamics written the ordinary way.

The peer is one account in NumPy with a Python loop over the symbols that are traded, as FinRL-Meta writes it (our own port of the
published rules, with the purchase fee in what can be afforded).  Both play the same actions first and must agree; then both are
timed in one run, with whole and with compact observations (`compact_obs`).  Results: benchmarks/results/finance.{json,md}.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mobula.envs.finance.trading import StockTrading
from mobula.files import write_json, write_text
from mobula.versions import machine, versions

RESULTS = Path(__file__).parent / "results"
THREADS = 1
SIZES, ROUNDS, PEER_STEPS = (1, 100, 1024, 10_000), 5, 1500
RULES: dict[str, dict[str, Any]] = {
    "scaled buys": {},
    "the reference's rules": {"obs": "reference", "sequential_buys": True},
}
MARKET: dict[str, Any] = {"universe": "us20", "start": "2000-01-01", "end": "2018-01-01"}


class PlainStocks:
    """One account, NumPy, a loop over symbols: the reference's observation, fills and reward."""

    def __init__(self, env: StockTrading) -> None:
        self.price = env.price.numpy()
        self.features = env.whole.feat[env.first : env.stop].nan_to_num(0.0).numpy().reshape(env.T, -1)
        self.turbulence, self.limit = env.turbulence.numpy(), env.threshold
        self.flag = env.alarm.numpy() > 0
        self.cost, self.cash0, self.scale = 1e-3, env.first_value, env.reward_scale
        self.reset()

    def reset(self) -> Any:
        self.day, self.cash = 0, self.cash0
        self.shares = np.zeros(self.price.shape[1])
        self.wait = np.zeros(self.price.shape[1])
        self.total = self.cash
        return self.observe()

    def observe(self) -> Any:
        tau = self.turbulence[self.day]
        squashed = self.limit * (1 / (1 + np.exp(-np.e * tau / self.limit)) - 0.5)
        head = np.array([self.cash * 2**-12, squashed * 2**-5, self.flag[self.day]], np.float32)
        return np.hstack(
            (
                head,
                (self.price[self.day] * 2**-6).astype(np.float32),
                (self.shares * 2**-6).astype(np.float32),
                self.wait.astype(np.float32),
                (self.features[self.day] * 2**-7).astype(np.float32),
            )
        )

    def step(self, action: Any) -> tuple[Any, float, bool]:
        order = (action * np.float32(100)).astype(int)
        danger = self.flag[self.day]
        self.day += 1
        price = self.price[self.day]
        self.wait += 1
        if danger:
            self.cash += (self.shares * price).sum() * (1 - self.cost)
            self.shares[:] = 0
            self.wait[:] = 0
        else:
            for i in np.where(order < -10)[0]:
                sold = min(self.shares[i], -order[i])
                if sold > 0:
                    self.shares[i] -= sold
                    self.cash += price[i] * sold * (1 - self.cost)
                    self.wait[i] = 0
            for i in np.where(order > 10)[0]:
                bought = min(self.cash // (price[i] * (1 + self.cost)), order[i])
                if bought > 0:
                    self.shares[i] += bought
                    self.cash -= price[i] * bought * (1 + self.cost)
                    self.wait[i] = 0
        total = self.cash + (self.shares * price).sum()
        reward = (total - self.total) * self.scale
        self.total = total
        return self.observe(), reward, self.day == len(self.price) - 1


def agreement(steps: int = 1000) -> float:
    """Largest relative difference of values and observations over `steps` bars of the same random actions."""
    env = StockTrading(1, **MARKET, obs="reference", sequential_buys=True, training=False, cash=2e5)
    peer, rng, worst = PlainStocks(env), np.random.default_rng(0), 0.0
    env.reset(seed=0)
    peer.reset()
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.N).astype(np.float32)
        obs, reward, *_ = env.step(torch.from_numpy(action)[None])
        wanted, gain, _ = peer.step(action)
        worst = max(
            worst,
            abs(float(env.state["value"]) / peer.total - 1),
            float(np.abs(obs[0].numpy() - wanted).max() / (1 + np.abs(wanted).max())),
            abs(float(reward) - gain) / (1 + abs(gain)),
        )
    return worst


def ours(size: int, **options: Any) -> Any:
    """A function that steps `size` environments for a while and returns steps a second."""
    env = StockTrading(size, **MARKET, **options)
    env.reset(seed=0)
    actions = [2 * torch.rand(size, env.N, generator=torch.Generator().manual_seed(i)) - 1 for i in range(4)]
    repeats = max(5, min(400, 100_000 // size))
    for i in range(3):
        env.step(actions[i])

    def run() -> float:
        start = time.perf_counter()
        for i in range(repeats):
            env.step(actions[i % 4])
        return size * repeats / (time.perf_counter() - start)

    return run


def theirs() -> Any:
    """The same for the peer."""
    env = StockTrading(1, **MARKET, obs="reference", training=False)
    peer, rng = PlainStocks(env), np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (PEER_STEPS, env.N)).astype(np.float32)

    def run() -> float:
        peer.reset()
        start = time.perf_counter()
        for action in actions:
            peer.step(action)
        return PEER_STEPS / (time.perf_counter() - start)

    return run


def main() -> None:
    torch.set_num_threads(THREADS)
    load = os.getloadavg()[0]
    difference = agreement()
    if difference > 1e-6:
        sys.exit(f"the two disagree by {difference:.1e}: there is nothing to time")
    runs = {"NumPy, one account": theirs()}
    for rules, options in RULES.items():
        for what, compact in (("whole observations", False), ("compact ones", True)):
            for size in SIZES:
                runs[f"mobula, {size:,}, {rules}, {what}"] = ours(size, compact_obs=compact, **options)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            rates[name].append(run())
    middle = {name: median(values) for name, values in rates.items()}
    # Each round's own ratio: what else the machine does falls on both.
    ratios = {
        name: median(a / b for a, b in zip(values, rates["NumPy, one account"], strict=True))
        for name, values in rates.items()
    }
    write_json(
        RESULTS / "finance.json",
        {
            "steps_per_second": middle,
            "ratio": ratios,
            "largest_difference": difference,
            "load_average_before": load,
            "machine": machine(),
            "versions": versions(),
        },
    )
    lines = [
        f"Steps of the stock environment a second, 20 symbols, median of {ROUNDS} rounds, one thread, {machine()['cores']} cores"
        f" ({machine()['architecture']}), torch {torch.__version__}. Played on the same actions, values and observations of the two"
        f" agree to {difference:.0e}. Compact observations are the index of the bar and what belongs to the account: whoever learns"
        " gathers the features. Load average of the machine when this began: "
        f"{load:.1f}.",
        "",
        "| | steps/s | times NumPy's speed |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {middle[name]:,.0f} | {ratios[name]:.1f} |" for name in middle),
        "",
        "Aims: 100 times the ordinary way, and 300,000 steps a second. A whole observation is 203 numbers (163 by the reference's rules), and"
        " writing them is two fifths of the step of 10,000 environments; of few environments the step is its hundred calls of torch.",
    ]
    write_text(RESULTS / "finance.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
