"""The experiment of fictitious-play policy optimisation: regret, duality gap and value against linear programming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mobula.algorithms.games.baselines.ind_q import IndependentQ
from mobula.algorithms.games.baselines.nash_vi import NashVI
from mobula.algorithms.games.fictitious_play_po import (
    FictitiousPlayPOConfig,
    Play,
    make_play,
    uniforms,
)
from mobula.envs.games import exact, tabular
from mobula.experiment import (
    Arm,
    Claim,
    Experiment,
    Task,
    at_least,
    fraction_at_least,
    learning_curves,
    mean_of,
    ratio_of_means,
    within,
)

POINTS = 40


def run(
    config: Any, task: Task, seeds: Sequence[int], player: type[Play] = Play, adversary: bool = False
) -> list[dict[str, Any]]:
    """Plays K episodes in the games of all seeds at once; regrets, gaps and the value of every game."""
    name, K = task.env_config["game"], task.env_config["episodes"]
    games = [tabular.make_game(name, seed) for seed in seeds]
    game = tabular.stack(games)
    knobs = config.knobs()
    for unused in ("game", "instance", "mixture", "report_every", "workers"):
        knobs.pop(unused)
    m = knobs["episodes_per_iteration"]
    iterations = K // m
    more = {"adversary": True} if adversary else {}
    play = make_play(game, {**knobs, "episodes": iterations}, tuple(seeds), player, **more)
    H = play.mu.shape[1]
    uniform_gap = exact.gap(game, *(torch.full_like(p, 1 / p.shape[-1]) for p in (play.mu, play.nu)))[0]
    u = uniforms(seeds, K, H).unflatten(1, (iterations, m))
    marks = {round(iterations * (i + 1) / POINTS) for i in range(POINTS)}
    marks |= {iterations // 4, iterations // 2, iterations}
    curve: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for k in range(iterations):
        play.episode(u[:, k])
        if k + 1 in marks:
            first, second = play.regrets()
            curve.append(((k + 1) * m, m * first, m * second))
    mu, nu = play.averages()
    gap, upper, lower = exact.gap(game, mu, nu)
    value = exact.value(game, mu, nu)
    by_step = {k: (first + second, first) for k, first, second in curve}
    found = []
    for i, one in enumerate(games):
        optimum = exact.equilibrium_value(one)
        total = float(by_step[K][0][i])
        slack = min(optimum - float(lower[i]), float(upper[i]) - optimum)
        found.append(
            {
                "regret": total,
                "regret_1": float(by_step[K][1][i]),
                "regret_half": float(by_step[iterations // 2 * m][0][i]),
                "gap": float(gap[i]),
                "gap_over_uniform": float(gap[i] / uniform_gap[i]),
                "identity_error": abs(total / K - float(gap[i])),
                "sandwich_slack": slack,
                "value_slack": float(gap[i]) - abs(float(value[i]) - optimum),
                "equilibrium_value": optimum,
                "curve_steps": [k for k, *_ in curve],
                "curve_values": [float(by_step[k][0][i]) for k, *_ in curve],
            }
        )
    return found


def attacked(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Player 1 against a player 2 who best-replies to the episode before."""
    return run(config, task, seeds, adversary=True)


def centralised(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Optimistic Nash value iteration."""
    return run(config, task, seeds, player=NashVI)


def independent(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Independent Q-learning, both players."""
    return run(config, task, seeds, player=IndependentQ)


def growth(metric: str, arm: str, short: str, long: str) -> Any:
    """Statistic: mean of `metric` on the long task over that on the short one, seeds resampled together."""

    def ratio(results: Any, task: str) -> Any:
        from mobula.experiment import statistics

        return statistics.ratio_of_means(
            results.values(metric, arm, long), results.values(metric, arm, short)
        )

    return ratio


def experiment() -> Experiment:
    """Arms, tasks, claims; the numbering follows the claims of the method's description."""

    def arm(**knobs: Any) -> Arm:
        return Arm(FictitiousPlayPOConfig().training(**knobs), run=run)

    def task(game: str, episodes: int) -> Task:
        return Task(seeds=10, env_config={"game": game, "episodes": episodes})

    tasks = {
        "I_1000": task("random_factored", 1000),
        "I_4000": task("random_factored", 4000),
        "II_1000": task("random_single_controller", 1000),
        "II_4000": task("random_single_controller", 4000),
    }
    single = ("II_1000", "II_4000")
    every = tuple(tasks)
    claims = []
    for setting in ("I", "II"):
        short, long = f"{setting}_1000", f"{setting}_4000"
        claims += [
            Claim(
                f"1. regret grows like sqrt(K) in {setting}: regret at 4,000 over that at 1,000 (linear: 4)",
                growth("regret", "fp", short, long),
                within(0, 2.6),
                (long,),
            ),
            Claim(
                "2a. duality gap of the averaged pair over that of the uniform pair",
                mean_of("gap_over_uniform", "fp"),
                within(0, 0.3),
                (long,),
            ),
            Claim("2b. duality gap of the averaged pair", mean_of("gap", "fp"), within(0, 0.2), (long,)),
        ]
    claims += [
        Claim(
            "3a. the equilibrium value lies between the best replies to the averaged pair (share of seeds, to 1e-8)",
            fraction_at_least("sandwich_slack", "fp", -1e-8),
            at_least(1.0),
            every,
        ),
        Claim(
            "3b. the averaged pair's value is within its gap of the equilibrium value (share of seeds)",
            fraction_at_least("value_slack", "fp", -1e-8),
            at_least(1.0),
            every,
        ),
        Claim(
            "4. (Reg_1 + Reg_2) / K is the duality gap of the averaged pair: difference",
            mean_of("identity_error", "fp"),
            within(0, 1e-8),
            every,
        ),
        Claim(
            "5. no regret against an adversary: Reg_1 at 4,000 over that at 1,000",
            growth("regret_1", "fp_attacked", *single),
            within(0, 2.8),
            ("II_4000",),
        ),
        *(
            Claim(
                f"6. regret without {what} over that with it",
                ratio_of_means(("regret", name), ("regret", "fp")),
                within(0.9, 1.1),
                ("I_4000", "II_4000"),
                exploratory=True,
            )
            for name, what in (("no_bonus", "bonuses"), ("no_reach", "reach weights"))
        ),
        Claim(
            "regret of fixed uniform play over that of the method",
            ratio_of_means(("regret", "uniform"), ("regret", "fp")),
            at_least(1.0),
            ("I_4000", "II_4000"),
        ),
    ]
    return Experiment(
        arms={
            "fp": arm(),
            "fp_attacked": Arm(FictitiousPlayPOConfig(), run=attacked, tasks=single),
            "nash_vi": Arm(FictitiousPlayPOConfig(), run=centralised, tasks=("II_1000",)),
            # Networks need batches: 40 episodes with one pair, so a fortieth of the updates.
            "networks": arm(approximation="networks", episodes_per_iteration=40, lr=3e-3),
            "ind_q": Arm(FictitiousPlayPOConfig(), run=independent),
            "no_bonus": arm(bonus_scale=0.0),
            "no_reach": arm(weigh=False),
            "theory_bonus": arm(bonus_scale=1.0),
            "uniform": arm(eta_mult=0.0, gamma_mult=0.0),
        },
        tasks=tasks,
        smoke={
            "I_1000": {"seeds": 2, "env_config": {"game": "random_factored", "episodes": 150}},
            "II_1000": {"seeds": 2, "env_config": {"game": "random_single_controller", "episodes": 150}},
        },
        claims=claims,
        figure=learning_curves(
            "Reg_1 + Reg_2",
            xlabel="episodes",
            labels={
                "fp": "method",
                "uniform": "uniform play",
                "theory_bonus": "theory's bonuses",
                "nash_vi": "Nash VI",
                "ind_q": "independent Q-learning",
            },
            arms=("fp", "no_bonus", "no_reach", "theory_bonus", "uniform", "nash_vi", "ind_q", "networks"),
        ),
        notes=(
            "The specification states claim 1 as a ratio of at most 2.6 with an interval below 3.2; here the whole interval must lie below"
            " 2.6. Claim 6 states no order: ablations are expected within a tenth, as the specification's prototype found. In setting I that"
            " fails for the reach weights. A step a third as long, which is what constant weights are where one state of three is reached,"
            " is not all of it: with three times the step (eta_mult 12) the regret at 1,000 episodes over six games is 352 without weights,"
            " 377 at the default step, and 227 with weights."
        ),
    )
