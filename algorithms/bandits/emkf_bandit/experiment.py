"""The experiment of EMKF-Bandit: hidden contexts of short and of long memory, and a replay of daily strategies on real prices;
all seeds of an arm in one batch.

Regret is that against the oracle's filter: x*_t = E[x_t | y_{1:t}] under the true model; no policy that sees y alone can do
better than argmax_a theta_a . x*_t.  Against the hidden state itself every policy has linear regret.  In the replay the true
model is not known: regret there is against the best strategy of every day, which nobody could have picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mobula.algorithms.bandits.emkf_bandit.learner import Streams
from mobula.algorithms.bandits.emkf_bandit.math import regrets
from mobula.algorithms.bandits.emkf_bandit.method import EMKFBanditConfig
from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace
from mobula.envs.bandits import Paths, draw_instances, draw_paths
from mobula.experiment import (
    Arm,
    Claim,
    Experiment,
    Task,
    above,
    at_least,
    below,
    learning_curves,
    mean_of,
    paired_difference,
    ratio_of_means,
    within,
)

POINTS = 50


@dataclass(frozen=True)
class World:
    """What the bandits of N seeds meet: y [N, T, m], rewards [N, T, K] of every arm, means [N, T, K] that regret is counted from.

    Where it was simulated: the true models, the oracle's filter `best` [N, T, d], the means given the hidden state `full` and inputs u [T, k].
    """

    y: Tensor
    rewards: Tensor
    means: Tensor
    truth: StateSpace | None = None
    best: Tensor | None = None
    full: Tensor | None = None
    u: Tensor | None = None


@cache
def world(seeds: tuple[int, ...], about: tuple[tuple[str, Any], ...]) -> World:
    """The same for every arm of the experiment; a replay differs between seeds by Thompson's draws alone."""
    settings = dict(about)
    rounds = settings.pop("rounds")
    if "universe" in settings:
        from mobula.envs.finance.strategies import strategy_replay

        found = strategy_replay(**settings)
        y, payoffs = (x[:rounds].expand(len(seeds), -1, -1) for x in (found.y, found.payoffs))
        return World(y, payoffs, payoffs)
    instance = draw_instances(seeds, **settings)
    paths = draw_paths(instance, seeds, rounds)
    truth = StateSpace(*instance.model)
    best = kalman.kalman_filter(truth, paths.y, paths.u.expand(len(seeds), -1, -1)).mean
    means, full = (torch.einsum("nkd,ntd->ntk", instance.theta, x) for x in (best, paths.x))
    return World(paths.y, paths.rewards, means, truth, best, full, paths.u)


def play(
    streams: Streams, paths: Paths | World, seeds: Sequence[int], uniform: bool = False
) -> tuple[Tensor, Tensor]:
    """(arms [N, T], contexts [N, T, p]) of a bandit on given paths; noise comes from one generator a seed."""
    N, T, arms = paths.rewards.shape
    noise = torch.stack(
        [
            torch.randn(
                T, streams.draws + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            for seed in seeds
        ]
    )
    if uniform:
        return noise[..., :arms].argmax(-1), torch.empty(N, T, 0)
    rows = torch.arange(N)
    chosen = torch.empty(N, T, dtype=torch.int64)
    u = paths.u if streams.inputs else None
    for t in range(T):
        streams.observe(paths.y[:, t], None if u is None else u[t])
        chosen[:, t] = streams.act(noise[:, t])
        streams.reward(paths.rewards[rows, t, chosen[:, t]])
    return chosen, streams.x[:, :T]


def run(config: Any, task: Task, seeds: Sequence[int], **options: Any) -> list[dict[str, Any]]:
    """Regret, reward and diagnostics of every seed."""
    met = world(tuple(seeds), tuple(sorted(task.env_config.items())))
    rounds, arms = met.rewards.shape[1:]
    knobs = {k: w for k, w in config.knobs().items() if k != "report_every"}
    if options.pop("oracle", False):
        options["model"] = met.truth
    uniform = options.pop("uniform", False)
    streams = Streams(len(seeds), met.y.shape[-1], arms, **knobs, **options)
    chosen, contexts = play(streams, met, seeds, uniform)
    regret = regrets(met.means, chosen).cumsum(1)
    reward = met.rewards.gather(2, chosen.unsqueeze(-1)).squeeze(-1)
    steps = torch.linspace(rounds / POINTS, rounds, POINTS).round().long() - 1
    worst = likelihood_steps(streams.traces)
    numbers = []
    for i in range(len(seeds)):
        numbers.append(
            {
                "regret": float(regret[i, -1]),
                "regret_half": float(regret[i, rounds // 2 - 1]),
                "reward": float(reward[i].sum()),
                **({} if worst is None else {"worst_likelihood_step": float(worst[i])}),
                "curve_steps": (steps + 1).tolist(),
                "curve_values": regret[i, steps].tolist(),
            }
        )
        if met.full is None:
            numbers[-1] |= earnings(reward[i])
        else:
            numbers[-1]["full_information_regret"] = float(regrets(met.full[i], chosen[i]).sum())
        if met.best is not None and streams.kind == "filter" and not uniform:
            numbers[-1]["filter_gap"] = float(filter_gap(contexts, met.best)[i])
    return numbers


def earnings(payoffs: Tensor) -> dict[str, float]:
    """Sharpe ratio (252 days a year) of daily payoffs [T], with its interval by the stationary bootstrap."""
    from mobula.envs.finance.metrics import sharpe_interval

    found = sharpe_interval(payoffs.numpy())
    return {"sharpe": found.value, "sharpe_low": found.low, "sharpe_high": found.high}


def likelihood_steps(traces: list[Tensor]) -> Tensor | None:
    """Smallest relative change of the log-likelihood in any EM step of any refit, [N]; the first refit has the ridge on."""
    steps = [
        ((trace[1:] - trace[:-1]) / trace[:-1].abs()).nan_to_num(nan=float("inf")).amin(0)
        for trace in traces[1:]
        if len(trace) > 1
    ]
    return torch.stack(steps).amin(0) if steps else None


def filter_gap(contexts: Tensor, best: Tensor) -> Tensor:
    """Mean distance between the oracle's filter and the best linear image of the learned one, [N], second half of the run."""
    half = best.shape[1] // 2
    x, y = contexts[:, half:], best[:, half:]
    fitted = x @ torch.linalg.lstsq(x, y).solution
    return (fitted - y).norm(dim=-1).mean(-1)


def oracle(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The true model's filter with Thompson sampling."""
    return run(config, task, seeds, oracle=True)


def observed(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Thompson sampling on y alone."""
    return run(config, task, seeds, context="obs")


def lags(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Thompson sampling on the last four observations."""
    return run(config, task, seeds, context="lags")


def blind(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Thompson sampling without a context."""
    return run(config, task, seeds, context="none")


def uniform(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """An arm at random."""
    return run(config, task, seeds, uniform=True)


def once(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """EM at round 200 alone."""
    return run(config, task, seeds, refit_once=200)


def experiment() -> Experiment:
    """Arms, tasks, claims; the numbering follows the claims of the method's description."""
    config = EMKFBanditConfig()
    both = ("E1", "E2")
    short = {"radius": 0.95, "q": 0.09, "r": 0.09, "rounds": 2000}
    long = {"radius": 0.98, "q": 0.04, "r": 1.0, "rounds": 2000}

    replay = {"universe": "us20", "train_end": "2000-01-01", "rounds": 6000}
    # Arms have mean payoffs, markets change, and a posterior in units of the noise fits payoffs of any size.
    real = {"F1": {"intercept": True, "demean": True, "window": 1000, "inflate": True, "v": 1.0}}
    simulated = ("E1", "E2")

    def emkf(tasks: tuple[str, ...] = simulated, **knobs: Any) -> Arm:
        return Arm(EMKFBanditConfig().training(**knobs), run=run, batch=4, per_task=real, tasks=tasks)

    def plain(function: Any, tasks: tuple[str, ...] = ()) -> Arm:
        return Arm(config, run=function, per_task=real, tasks=tasks)

    return Experiment(
        arms={
            "emkf": emkf(()),
            "oracle": plain(oracle, simulated),
            "lags": plain(lags),
            "obs": plain(observed),
            "none": plain(blind),
            "random": plain(uniform),
            "emkf_bic": emkf(("E2",), d="bic"),
            "emkf_linucb": emkf(policy="linucb"),
            "emkf_greedy": emkf(policy="greedy"),
            "emkf_inflate": emkf(inflate=True, v=1.0),
            "emkf_identity": emkf(init="identity"),
            "emkf_once": Arm(config, run=once, batch=4, tasks=simulated),
        },
        tasks={
            "E1": Task(seeds=8, env_config=short),
            "E2": Task(seeds=8, env_config=long),
            "F1": Task(seeds=8, env_config=replay),
        },
        smoke={"E2": {"seeds": 2, "env_config": {**long, "rounds": 400}}},
        claims=[
            Claim(
                "1a. Thompson sampling on y alone has the larger regret",
                paired_difference("regret", "obs", "emkf"),
                above(0),
                both,
            ),
            Claim(
                "1b. regret of EMKF over that of Thompson sampling on y",
                ratio_of_means(("regret", "emkf"), ("regret", "obs")),
                within(0, 0.35),
                both,
            ),
            Claim(
                "2. with a long memory, four lags have the larger regret",
                paired_difference("regret", "lags", "emkf"),
                above(0),
                ("E2",),
            ),
            Claim(
                "3a. regret at T over that at T/2, EMKF (2: linear)",
                ratio_of_means(("regret", "emkf"), ("regret_half", "emkf")),
                within(0, 1.4),
                both,
            ),
            Claim(
                "3b. the same, Thompson sampling on y",
                ratio_of_means(("regret", "obs"), ("regret_half", "obs")),
                at_least(1.8),
                both,
            ),
            Claim(
                "4. reward of EMKF over that of the oracle's filter",
                ratio_of_means(("reward", "emkf"), ("reward", "oracle")),
                at_least(0.9),
                ("E2",),
            ),
            Claim(
                "5. EM's likelihood never falls: smallest relative step",
                mean_of("worst_likelihood_step", "emkf"),
                at_least(-1e-8),
                both,
            ),
            Claim(
                "with a short memory, four lags have the smaller regret (allowed)",
                paired_difference("regret", "lags", "emkf"),
                below(0),
                ("E1",),
                exploratory=True,
            ),
            Claim(
                "the subspace start has less regret than the naive one",
                paired_difference("regret", "emkf_identity", "emkf"),
                above(0),
                both,
                exploratory=True,
            ),
            Claim(
                "with the order chosen by BIC, regret over that with the true order",
                ratio_of_means(("regret", "emkf_bic"), ("regret", "emkf")),
                within(0, 1.25),
                ("E2",),
                exploratory=True,
            ),
            Claim(
                "F1, a report: Sharpe ratio of EMKF on the replay of daily strategies (spread over Thompson's draws)",
                mean_of("sharpe", "emkf"),
                above(0),
                ("F1",),
                exploratory=True,
            ),
            Claim(
                "F1, a report: Sharpe ratio of EMKF less that of Thompson sampling without a context",
                paired_difference("sharpe", "emkf", "none"),
                above(0),
                ("F1",),
                exploratory=True,
            ),
            Claim(
                "EMKF earns more than an arm at random",
                paired_difference("reward", "emkf", "random"),
                above(0),
                both,
            ),
            Claim(
                "EMKF earns more than Thompson sampling on y",
                paired_difference("reward", "emkf", "obs"),
                above(0),
                both,
            ),
        ],
        figure=learning_curves(
            "regret",
            xlabel="rounds",
            gain_over={"F1": ("random", "regret saved on an arm at random")},
            arms=("emkf", "oracle", "lags", "obs", "none", "random", "emkf_identity"),
            labels={
                "obs": "TS on y",
                "lags": "TS on 4 lags",
                "none": "TS, no context",
                "oracle": "TS, true filter",
                "emkf": "EMKF",
                "emkf_identity": "EMKF, naive start",
                "random": "arm at random",
            },
        ),
        notes=(
            "`full_information_regret` in result.json is against the hidden state itself; it is linear for every policy."
            " `filter_gap` is the distance of the learned filter from the true one, up to a linear map. F1 replays six daily"
            " strategies on the prices of 20 US shares that survived to 2022 (biased by that: strategies are compared with each"
            " other on the same days) without costs, and claims no profit; `sharpe_low` and `sharpe_high` are the 95 % interval over"
            " days by the stationary bootstrap, which is wide where that over Thompson's draws is narrow."
        ),
    )
