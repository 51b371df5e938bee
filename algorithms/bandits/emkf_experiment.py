"""The experiment of EMKF-Bandit: hidden contexts of short and of long memory, all seeds of an arm in one batch.

Regret is that against the oracle's filter: x*_t = E[x_t | y_{1:t}] under the true model; no policy that sees y alone can do
better than argmax_a theta_a . x*_t.  Against the hidden state itself every policy has linear regret.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mobula.algorithms.bandits.emkf_bandit import EMKFBanditConfig, Streams, regrets
from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace
from mobula.envs.bandits import Instance, Paths, draw_instances, draw_paths
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


@cache
def world(seeds: tuple[int, ...], rounds: int, about: tuple[tuple[str, Any], ...]) -> tuple[Instance, Paths]:
    """Instances and paths of the seeds: every arm of the experiment meets the same ones."""
    instance = draw_instances(seeds, **dict(about))
    return instance, draw_paths(instance, seeds, rounds)


def play(
    streams: Streams, paths: Paths, seeds: Sequence[int], uniform: bool = False
) -> tuple[Tensor, Tensor]:
    """(arms [N, T], contexts [N, T, p]) of a bandit on given paths; noise comes from one generator a seed."""
    N, T, arms = paths.rewards.shape
    noise = torch.stack(
        [
            torch.randn(T, arms + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )
    if uniform:
        return noise[..., :-1].argmax(-1), torch.empty(N, T, 0)
    rows = torch.arange(N)
    chosen = torch.empty(N, T, dtype=torch.int64)
    for t in range(T):
        streams.observe(paths.y[:, t])
        chosen[:, t] = streams.act(noise[:, t])
        streams.reward(paths.rewards[rows, t, chosen[:, t]])
    return chosen, streams.x[:, :T]


def run(config: Any, task: Task, seeds: Sequence[int], **options: Any) -> list[dict[str, Any]]:
    """Regret, reward and diagnostics of every seed."""
    about = dict(task.env_config)
    rounds = about.pop("rounds")
    instance, paths = world(tuple(seeds), rounds, tuple(sorted(about.items())))
    truth = StateSpace(*instance.model)
    best = kalman.kalman_filter(truth, paths.y).mean
    means = torch.einsum("nkd,ntd->ntk", instance.theta, best)
    arms, m = paths.rewards.shape[-1], paths.y.shape[-1]
    knobs = {k: w for k, w in config.knobs().items() if k not in ("known_C", "report_every")}
    if options.pop("oracle", False):
        options["model"] = truth
    uniform = options.pop("uniform", False)
    streams = Streams(len(seeds), m, arms, **knobs, **options)
    chosen, contexts = play(streams, paths, seeds, uniform)
    regret = regrets(means, chosen).cumsum(1)
    full = regrets(torch.einsum("nkd,ntd->ntk", instance.theta, paths.x), chosen).sum(1)
    reward = paths.rewards.gather(2, chosen.unsqueeze(-1)).squeeze(-1).sum(1)
    steps = torch.linspace(rounds / POINTS, rounds, POINTS).round().long() - 1
    worst = likelihood_steps(streams.traces)
    gap = filter_gap(contexts, best) if streams.kind == "filter" and not uniform else None
    return [
        {
            "regret": float(regret[i, -1]),
            "regret_half": float(regret[i, rounds // 2 - 1]),
            "full_information_regret": float(full[i]),
            "reward": float(reward[i]),
            **({} if gap is None else {"filter_gap": float(gap[i])}),
            **({} if worst is None else {"worst_likelihood_step": float(worst[i])}),
            "curve_steps": (steps + 1).tolist(),
            "curve_values": regret[i, steps].tolist(),
        }
        for i in range(len(seeds))
    ]


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

    def emkf(**knobs: Any) -> Arm:
        return Arm(EMKFBanditConfig().training(**knobs), run=run, batch=4)

    return Experiment(
        arms={
            "emkf": emkf(),
            "oracle": Arm(config, run=oracle),
            "lags": Arm(config, run=lags),
            "obs": Arm(config, run=observed),
            "none": Arm(config, run=blind),
            "random": Arm(config, run=uniform),
            "emkf_linucb": emkf(policy="linucb"),
            "emkf_greedy": emkf(policy="greedy"),
            "emkf_inflate": emkf(inflate=True, v=1.0),
            "emkf_identity": emkf(init="identity"),
            "emkf_once": Arm(config, run=once, batch=4),
        },
        tasks={"E1": Task(seeds=8, env_config=short), "E2": Task(seeds=8, env_config=long)},
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
            "regret against the oracle's filter",
            xlabel="rounds",
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
            " `filter_gap` is the distance of the learned filter from the true one, up to a linear map."
        ),
    )
