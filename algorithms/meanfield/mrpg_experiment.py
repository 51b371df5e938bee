"""The experiment of MRPG: sampled and exact gradients on small games against the coupled Riccati equations.

All seeds of an arm, both games of each and all perturbations are one batch of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobula.algorithms.meanfield.baselines.maddpg import MADDPGConfig
from mobula.algorithms.meanfield.mrpg import (
    MRPGConfig,
    draws,
    gradient,
    gradient_sums,
    natural_step,
    solve_exactly,
    zero_gains,
)
from mobula.envs.meanfield import lq_teams, riccati
from mobula.envs.meanfield.lq_teams import LQGame
from mobula.experiment import (
    Arm,
    Claim,
    Estimate,
    Experiment,
    Task,
    above,
    at_least,
    check,
    mean_of,
    paired_difference,
    within,
)
from mobula.experiment.core import Results
from mobula.experiment.statistics import exact
from mobula.files import storage

TRANSITIONS = 6_000_000
"""Of a game and seed on G1: 2 signs x 2 players x 1000 perturbations x 100 gradient steps x (1 + ... + 5) steps of the rollouts."""


def run(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Sampled MRPG on the task's game: errors and exploitability of every seed."""
    teams = config.copy(copy_frozen=False).training(**task.env_config).teams()
    S, games = len(seeds), teams.games
    batched = LQGame(*(part.expand(S, *part.shape) for part in games))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    solution = riccati.nash(games)
    K, dimensions = zero_gains(batched), teams.mask.sum((-2, -1)).double()
    curve = []

    def step_at(t: int) -> torch.Tensor:
        shared = config.shared_rollouts
        each = [draws(teams, t, config.batch, config.radius, shared=shared, generator=g) for g in generators]
        e, y, noise = (torch.stack(parts) for parts in zip(*each, strict=True))
        sums = gradient_sums(batched, K, t, (e, y, noise), estimator=config.estimator, shared=shared)
        return gradient(sums, config.batch, config.radius, dimensions, config.estimator)

    for t in reversed(range(games.horizon)):
        for _ in range(config.inner_iters):
            natural_step(K, t, step_at(t), teams.reset, config.eta, teams.mask)
        curve.append((K - solution.K)[..., t, :, :].abs().amax((-3, -2, -1)))
    error = (K - solution.K).abs().amax((-4, -3, -2, -1))
    cost = riccati.expected_cost(riccati.values(batched, K), teams.moments(), teams.noise).sum(-2)
    gap = riccati.exploitability(batched, K, teams.moments(), teams.noise).sum(-2) / cost
    return [
        {
            "error_deviation": float(error[i, 0]),
            "error_mean": float(error[i, 1]),
            "exploitability": float(gap[i].max()),
            "curve_steps": list(range(games.horizon - 1, -1, -1)),
            "curve_values": [float(c[i].max()) for c in curve],
        }
        for i in range(S)
    ]


def run_maddpg(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The neural baseline on the task's game, all seeds side by side, until each has drawn the task's `env_steps` transitions of a
    game: errors are those of the linear parts of its policies, exploitability its lower bound.  score: what it is tuned by.
    """
    chosen = config.copy(copy_frozen=False).training(**task.env_config, num_seeds_batched=len(seeds))
    steps = max(1, task.env_steps // chosen.envs)
    chosen.training(steps=steps, report_every=steps).debugging(seed=seeds[0], log_level="ERROR")
    algorithm = chosen.build_algo()
    try:
        algorithm.train()
        K, gap, cost = algorithm.measure(5000)
        error = (K - algorithm.solution.K).abs().amax((-1, -2))
    finally:
        algorithm.stop()
    by_step, gap = error.amax((1, 2)).flip(-1), (gap / cost).amax(-1)
    return [
        {
            "error_deviation": float(error[i, 0].max()),
            "error_mean": float(error[i, 1].max()),
            "exploitability": float(gap[i]),
            "score": -float(gap[i]),
            "curve_steps": list(range(error.shape[-1] - 1, -1, -1)),
            "curve_values": by_step[i].tolist(),
        }
        for i in range(len(seeds))
    ]


# Exact gradients: claims that need no seeds ---------------------------------------------------------------------


def exact_errors(
    rho: float, horizon: int, eta: float, game: int, *, receding: bool, iterations: int = 200
) -> float:
    """Largest error of the gains after exact gradient steps from zero; infinite where they diverged."""
    teams = lq_teams.g1(horizon, rho)
    one = LQGame(*(part[game] for part in teams.games))
    K, _ = solve_exactly(one, teams.reset[game], eta, iterations, receding=receding)
    error = float((K - riccati.nash(one).K).abs().max())
    return error if np.isfinite(error) else float("inf")


SETTINGS = [(rho, T, eta, 0) for rho in (1.3, 1.5) for T in (10, 20) for eta in (0.02, 0.05, 0.1)] + [
    (rho, T, eta, 1) for rho in (1.3, 1.5) for T in (10, 20) for eta in (0.02, 0.05)
]


def worst_receding() -> Estimate:
    """Largest error of MRPG over all settings."""
    return exact(max(exact_errors(*s, receding=True) for s in SETTINGS), len(SETTINGS))


def share_that_diverges() -> Estimate:
    """Share of the settings where simultaneous natural gradient diverges: gains above 1e4, or an error above 1."""
    lost = [exact_errors(*s, receding=False) > 1.0 for s in SETTINGS]
    return exact(sum(lost) / len(lost), len(lost))


def sharp_step_bound() -> Estimate:
    """Share of (rho, T) where MRPG itself diverges in the mean game at eta = 0.1, above 1 / lambda_max(Phi)."""
    lost = [
        not np.isfinite(exact_errors(rho, T, 0.1, 1, receding=True)) for rho in (1.3, 1.5) for T in (10, 20)
    ]
    return exact(sum(lost) / len(lost), len(lost))


def benign_case() -> Estimate:
    """At rho = 1, T = 5 both converge in the deviation game: the larger of the two errors after 1,000 iterations."""
    return exact(max(exact_errors(1.0, 5, 0.05, 0, receding=r, iterations=1000) for r in (True, False)))


def rate_ratio() -> Estimate:
    """Fitted decay of the inner error over the spectral radius of I - 2 eta Phi_t: mean, smallest and largest over steps."""
    ratios = []
    eta = 0.05
    for game in (0, 1):
        teams = lq_teams.g1(5, 1.0)
        one = LQGame(*(part[game] for part in teams.games))
        _, trace = solve_exactly(one, teams.reset[game], eta, 300, receding=True)
        P = riccati.nash(one).P
        for t in range(one.horizon):
            Phi, _ = riccati.stage(one, t, P[..., t + 1, :, :])
            eye = torch.eye(Phi.shape[-1], dtype=Phi.dtype)
            wanted = float(torch.linalg.eigvals(eye - 2 * eta * Phi).abs().max())
            errors = trace[t].numpy()
            kept = np.flatnonzero((errors > 1e-10) & (errors < 1e-3))
            slope = np.polyfit(kept, np.log(errors[kept]), 1)[0]
            ratios.append(float(np.exp(slope)) / wanted)
    return Estimate(float(np.mean(ratios)), min(ratios), max(ratios), len(ratios), 1.0)


def finite_constant() -> Estimate:
    """Spread of M (J_M - J_inf) over M, relative: zero if the cost of being finite is exactly of order 1 / M."""
    teams = lq_teams.g3()
    K = riccati.nash(teams.games).K
    args = (teams.games, K, teams.noise, teams.start_cov, teams.start_mean)
    limit = riccati.finite_costs(*args, float("inf"))
    scaled = torch.stack([M * (riccati.finite_costs(*args, M) - limit) for M in (2, 10, 100, 1000)])
    return exact(float(((scaled - scaled[0]) / scaled[0]).abs().max()))


def finite_play(rollouts: int = 2000) -> Estimate:
    """Largest gap between simulated and exact costs of 2, 10 and 100 agents a team, in standard errors."""
    teams = lq_teams.g3()
    K = riccati.nash(teams.games).K
    gaps = []
    for M in (2, 10, 100):
        cost = lq_teams.play(teams, K, M, rollouts=rollouts, seed=M)
        wanted = riccati.finite_costs(teams.games, K, teams.noise, teams.start_cov, teams.start_mean, M)
        gaps.append(((cost.mean(0) - wanted).abs() / (cost.std(0) / rollouts**0.5)).max())
    return exact(float(torch.stack(gaps).max()), rollouts)


def draw(results: Results, folder: Path) -> list[str]:
    """Errors of the sampled sweeps, and of exact gradients: receding horizon against all steps at once."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mobula.experiment.figures import COLOURS, band

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    task = next(iter(results.experiment.tasks))
    cells: list[dict[str, Any]] = []
    for colour, arm in zip(COLOURS, results.experiment.arms, strict=False):
        if results[arm, task]:
            cells = results[arm, task]
            middle, low, high = band(np.asarray([c["curve_values"] for c in cells]))
            left.plot(cells[0]["curve_steps"], middle, color=colour, linewidth=2, label=arm)
            left.fill_between(cells[0]["curve_steps"], low, high, color=colour, alpha=0.18, linewidth=0)
    left.set_yscale("log")
    left.invert_xaxis()
    if cells:
        left.set_xticks(cells[0]["curve_steps"])
    left.set_xlabel("step of the game, in the order of the sweep")
    left.set_ylabel("largest error of a gain of that step, both games")
    left.set_title(f"sampled gradients on {task}", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    teams = lq_teams.g1(10, 1.3)
    one = LQGame(*(part[0] for part in teams.games))
    solution = riccati.nash(one).K
    for receding, label, colour in (
        (True, "receding horizon", COLOURS[0]),
        (False, "all steps at once", COLOURS[1]),
    ):
        counts = [1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200]
        errors = [
            float((solve_exactly(one, teams.reset[0], 0.05, k, receding=receding)[0] - solution).abs().max())
            for k in counts
        ]
        right.plot(counts, errors, color=colour, linewidth=2, marker=".", label=label)
    right.set_yscale("log")
    right.set_xlabel("gradient steps at each time (a line ends where it diverges)")
    right.set_ylabel("largest error of a gain")
    right.set_title("exact gradients on G1, T=10, rho=1.3, deviation game", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with storage(folder / "figure.png"):
        figure.savefig(folder / "figure.png", dpi=140)
    plt.close(figure)
    return ["figure.png"]


def experiment() -> Experiment:
    """Arms, tasks, claims; the numbering follows the claims of the method's description."""

    def arm(**knobs: Any) -> Arm:
        return Arm(MRPGConfig().training(**knobs), run=run)

    one = ("G1",)
    return Experiment(
        arms={
            "one_point": arm(estimator="one_point"),
            "baseline": arm(estimator="baseline"),
            "antithetic": arm(estimator="antithetic"),
            "antithetic_shared": arm(estimator="antithetic", shared_rollouts=True),
            "maddpg": Arm(
                MADDPGConfig().training(envs=600),
                grid={"lr": [1e-3, 3e-3]},
                select="score",
                tuning_seeds=1,
                tasks=one,
                run=run_maddpg,
            ),
        },
        tasks={
            "G1": Task(seeds=5, env_steps=TRANSITIONS, env_config={"game": "G1", "horizon": 5}),
            "G2": Task(seeds=5, env_config={"game": "G2"}),
        },
        smoke={
            "G1": {"seeds": 2, "env_steps": 120_000, "env_config": {"game": "G1", "horizon": 2}},
        },
        claims=[
            Claim(
                "1a. error, one point, deviation game",
                mean_of("error_deviation", "one_point"),
                within(0, 0.10),
                one,
            ),
            Claim(
                "1b. error, one point, mean game", mean_of("error_mean", "one_point"), within(0, 0.15), one
            ),
            Claim(
                "1c. error, antithetic, deviation game",
                mean_of("error_deviation", "antithetic"),
                within(0, 0.02),
                one,
            ),
            Claim(
                "1d. error, antithetic, mean game", mean_of("error_mean", "antithetic"), within(0, 0.02), one
            ),
            Claim(
                "1e. one point errs more than antithetic, deviation game",
                paired_difference("error_deviation", "one_point", "antithetic"),
                above(0),
                one,
            ),
            Claim(
                "1f. one point errs more than antithetic, mean game",
                paired_difference("error_mean", "one_point", "antithetic"),
                above(0),
                one,
            ),
            Claim(
                "2. relative exploitability, antithetic",
                mean_of("exploitability", "antithetic"),
                within(0, 1e-3),
                one,
            ),
            Claim(
                "3a. exact gradients: largest error of MRPG in 20 settings",
                check(worst_receding),
                within(0, 1e-9),
            ),
            Claim(
                "3b. exact gradients: share of those settings where all steps at once diverge",
                check(share_that_diverges),
                at_least(1.0),
            ),
            Claim(
                "3c. above the step bound MRPG diverges too (share of settings)",
                check(sharp_step_bound),
                at_least(1.0),
            ),
            Claim("3d. in a benign game both converge: larger error", check(benign_case), within(0, 1e-6)),
            Claim(
                "4. fitted rate over the spectral radius of I - 2 eta Phi (all steps, both games)",
                check(rate_ratio),
                within(0.95, 1.05),
            ),
            Claim(
                "5a. M (J_M - J_inf) is the same for all M: relative spread",
                check(finite_constant),
                within(0, 1e-8),
            ),
            Claim(
                "5b. simulated finite teams: largest gap in standard errors", check(finite_play), within(0, 3)
            ),
            Claim(
                "relative exploitability on a random game of three teams, antithetic",
                mean_of("exploitability", "antithetic"),
                within(0, 1e-3),
                ("G2",),
                exploratory=True,
            ),
            Claim(
                "the neural baseline is more exploitable than antithetic MRPG at equal samples",
                paired_difference("exploitability", "maddpg", "antithetic"),
                above(0),
                one,
                exploratory=True,
            ),
            Claim(
                "the neural baseline is more exploitable than one-point MRPG, which draws half its samples",
                paired_difference("exploitability", "maddpg", "one_point"),
                above(0),
                one,
                exploratory=True,
            ),
        ],
        figure=draw,
        notes=(
            "Errors are the largest over steps, players and entries, against the coupled Riccati equations. `antithetic_shared`"
            " perturbs all players in the same rollouts, with half of them in this game of two. `maddpg` is a neural actor-critic a team"
            " that knows nothing of linearity; it draws as many transitions of each game as `antithetic` (6,000,000 on G1), from the"
            " same resets, a tenth of that in the smoke budget, and its step size is chosen on a seed of its own. Its errors are those"
            " of the least-squares linear part of its policies; its exploitability is a lower bound: the gain of the best answer to the"
            " others' linear parts."
        ),
    )
