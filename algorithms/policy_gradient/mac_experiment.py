"""The experiment of MAC: the goal grid against PPGAE and simpler actor-critics (claims of arXiv 2403.11925, section 6)."""

from __future__ import annotations

import numpy as np
import torch

from mobula.algorithms.common import average_reward as exact
from mobula.algorithms.policy_gradient.baselines.average_reward import ACFixedConfig, ReinforceAvgConfig
from mobula.algorithms.policy_gradient.baselines.ppgae import PPGAEConfig
from mobula.algorithms.policy_gradient.mac import (
    MACConfig,
    draw_levels,
    exact_probe,
    expected_length,
    mlmc_weights,
    rollout_length,
)
from mobula.envs.continuing import GoalGrid
from mobula.experiment import (
    Arm,
    Claim,
    Estimate,
    Experiment,
    Task,
    above,
    at_least,
    check,
    fraction_at_least,
    learning_curves,
    paired_difference,
    windows_of_reward,
    within,
)


def optimum(task: Task) -> float:
    """J* = 1 / (2 (n - 1))."""
    return 1 / (2 * (task.env_config["size"] - 1))


def mlmc_bias(draws: int = 200_000, j_max: int = 4, seed: int = 0) -> Estimate:
    """Largest standardised gap, over the coordinates of the actor's direction, between the mean of h^MLMC and the exact
    mean of h^{j_max}, for a fixed policy and start state on the 4 x 4 grid; claim: at most 4 standard errors.

    All draws run side by side: every chain takes 2^j_max steps, an MLMC draw of level J uses the first 2^J of them.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    env = GoalGrid(draws, size=4)
    obs, _ = env.reset(seed=seed)
    states, actions = env.P.shape[:2]
    theta = torch.randn(states, actions, dtype=torch.float64, generator=generator)
    omega = torch.randn(states, dtype=torch.float64, generator=generator)
    eta, pi = 0.05, theta.softmax(-1)
    levels = draw_levels(draws, j_max, generator)
    table = torch.zeros(j_max + 2, 2**j_max, dtype=torch.float64)
    for level in range(1, j_max + 2):
        weights = mlmc_weights(level, j_max)
        table[level, : len(weights)] = weights
    weight = table[levels.clamp(max=j_max + 1)]
    law = torch.zeros(states, dtype=torch.float64)
    law[0] = 1.0
    P, R = env.model()
    P_pi, _ = exact.chain(P, R, pi)
    advantage = R - eta + P @ omega - omega[:, None]
    wanted = torch.zeros(states, actions, dtype=torch.float64)
    # h of one transition is delta (e_a - pi(.|s)) in row s of the table: the first rows are enough, and small.
    first = 4
    sums = torch.zeros(draws, first, actions, dtype=torch.float64)
    for step in range(2**j_max):
        wanted += law[:, None] * pi * (advantage - (pi * advantage).sum(-1, keepdim=True)) / 2**j_max
        law = law @ P_pi
        action = torch.multinomial(pi[obs], 1, generator=generator).squeeze(1)
        new, reward, *_ = env.step(action)
        delta = reward.double() - eta + omega[new] - omega[obs]
        scaled = (weight[:, step] * delta)[:, None]
        direction = -pi[obs] * scaled
        direction.scatter_add_(1, action[:, None], scaled)
        inside = (obs < first).nonzero().flatten()
        sums.index_put_((inside, obs[inside]), direction[inside], accumulate=True)
        obs = new
    standard_error = sums.std(0) / draws**0.5
    gap = ((sums.mean(0) - wanted[:first]).abs() / standard_error.clamp_min(1e-12)).max()
    return Estimate(float(gap), float(gap), float(gap), draws, 1.0)


def mean_length(draws: int = 2_000_000, j_max: int = 4, seed: int = 0) -> Estimate:
    """Mean N over its expectation j_max + 2^-j_max."""
    levels = draw_levels(draws, j_max, torch.Generator().manual_seed(seed)).numpy()
    lengths = np.array([rollout_length(level, j_max) for level in range(j_max + 2)])[
        np.minimum(levels, j_max + 1)
    ]
    ratio = float(lengths.mean() / expected_length(j_max))
    error = 1.96 * float(lengths.std()) / draws**0.5 / expected_length(j_max)
    return Estimate(ratio, ratio - error, ratio + error, draws)


def experiment() -> Experiment:
    """Arms, tasks, claims; the numbering follows the claims of the method's description."""
    grid: dict[str, list[float]] = {
        "epoch_length": [200, 500, 1000],
        "window": [4, 8, 16],
        "lr": [10.0, 50.0, 100.0],
    }
    both = ("n5", "n7")
    return Experiment(
        arms={
            "mac": MACConfig(),
            "ppgae": Arm(PPGAEConfig(), grid=grid, select="last_window_reward", tuning_seeds=2),
            "ac_fixed": ACFixedConfig(),
            "mac_resample": MACConfig().training(resample=True),
            "reinforce_avg": ReinforceAvgConfig(),
            "random": ReinforceAvgConfig().training(lr_actor=0.0),
        },
        tasks={
            "n5": Task("goal_grid", 20_000, 10, {"size": 5}),
            "n7": Task("goal_grid", 80_000, 5, {"size": 7}),
            "n5_small": Task("goal_grid", 10_000, 10, {"size": 5}),
        },
        smoke={"n5": {"env_steps": 4_000, "seeds": 2, "env_config": {"size": 4}}},
        claims=[
            Claim(
                "1a. MAC ends above the best PPGAE",
                paired_difference("last_window_reward", "mac", "ppgae"),
                above(0),
                both,
            ),
            Claim(
                "1b. MAC earns more than the best PPGAE",
                paired_difference("total_reward", "mac", "ppgae"),
                above(0),
                both,
            ),
            Claim(
                "2a. share of seeds whose last window reaches 0.9 J*",
                fraction_at_least("last_window_reward", "mac", lambda task: 0.9 * optimum(task)),
                at_least(0.9),
                ("n5",),
            ),
            Claim(
                "2b. share of seeds whose last window reaches 0.85 J*, same settings",
                fraction_at_least("last_window_reward", "mac", lambda task: 0.85 * optimum(task)),
                at_least(1.0),
                ("n7",),
            ),
            Claim(
                "3a. MLMC direction is unbiased: largest gap in standard errors",
                check(mlmc_bias),
                within(0, 4),
            ),
            Claim("3b. mean rollout length over its expectation", check(mean_length), within(0.99, 1.01)),
            Claim(
                "4. on a small budget MAC earns more than the best PPGAE",
                paired_difference("total_reward", "mac", "ppgae"),
                above(0),
                ("n5_small",),
            ),
            Claim(
                "MAC earns more than an actor-critic with fixed rollouts",
                paired_difference("total_reward", "mac", "ac_fixed"),
                above(0),
                both,
                exploratory=True,
            ),
            Claim(
                "MAC earns more than a random policy",
                paired_difference("total_reward", "mac", "random"),
                above(0),
                both,
            ),
        ],
        measure=windows_of_reward(8),
        figure=learning_curves("reward per step", reference=optimum, reference_label="optimal gain"),
        probe=exact_probe,
        notes=(
            "Claim 5 (the mixing time is never an input): the exact mixing time of the policy along every run is in"
            " result.json under `probe/mixing_time` (null: the chain has become periodic and does not mix), beside"
            " rollouts of 1 to 16 steps."
        ),
    )
