"""The experiment of SQL and EQL: its time score, the data of its small-data tasks, how drops are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobula.algorithms.offline import ivr, ivr_experiment, tabular
from mobula.algorithms.offline.baselines.bc import BCConfig
from mobula.algorithms.offline.baselines.iql import IQLConfig
from mobula.algorithms.offline.ivr import EQLConfig, SQLConfig
from mobula.envs.datasets import recipes
from mobula.envs.mazes import FourRooms, PointMaze2D
from mobula.experiment.core import Experiment, Results, Task


def test_the_time_return_sums_r_minus_one() -> None:
    """Two goals after 3 and 5 steps, one miss of 7: against sums of r - 1 written out."""
    episodes = [[0.0, 0.0, 1.0], [0.0] * 4 + [1.0], [0.0] * 7]
    wanted = np.mean([sum(r - 1 for r in rewards) for rewards in episodes])
    returns = np.array([sum(rewards) for rewards in episodes])
    found = ivr_experiment.time_return(returns, np.array([len(rewards) for rewards in episodes]))
    assert found == pytest.approx(float(wanted))
    assert found == pytest.approx(-(2 + 4 + 7) / 3)


def test_the_small_data_are_what_their_tasks_say() -> None:
    tasks = ivr_experiment.experiment("sql").tasks
    about = tasks["timed_k0.05"].env_config
    pack, quality, options = recipes.parse(about["data"])
    assert (pack, quality) == ("point_maze", "medium")
    assert options == {"layout": "medium", "size": 200_000, "sub_goal": about["kept"]}
    assert recipes.parse(tasks["maze_k0.05"].env_config["data"]) == (
        "point_maze",
        "medium",
        {"sub_goal": 0.05},
    )
    # A tenth of the size, to be quick: the medium maze's goal, and shares kept by hand for every row.
    whole = recipes.generate("point_maze/medium,layout=medium,size=20000")
    thin = recipes.generate("point_maze/medium,layout=medium,size=20000,sub_goal=0.05")
    world = PointMaze2D(1, layout="medium")
    assert thin.metadata["env_config"] == {"layout": "medium"}
    goal = [world.goal_cell[1] + 0.5, world.goal_cell[0] + 0.5]
    np.testing.assert_allclose(thin["obs"][:, 4:], np.tile(goal, (len(thin), 1)))
    gap = np.hypot(whole["next_obs"][:, 0] - goal[0], whole["next_obs"][:, 1] - goal[1])
    share = 0.05 * gap / gap.max()
    assert abs(len(thin) - share.sum()) < 4 * np.sqrt((share * (1 - share)).sum())
    # The nearer half of the rows keeps fewer than the farther one, in the ratio of the distances.
    near = gap < np.median(gap)
    kept = np.hypot(thin["next_obs"][:, 0] - goal[0], thin["next_obs"][:, 1] - goal[1])
    part = share[near].sum() / share.sum()
    assert abs((kept < np.median(gap)).mean() - part) < 4 * np.sqrt(part * (1 - part) / len(thin))


def results(values: dict[tuple[str, str], list[float]]) -> Results:
    """Cells with the metric "x"."""

    def draw(found: Results, folder: Any) -> list[str]:
        return []

    plan = Experiment(arms={}, tasks={"easy": Task(), "hard": Task()}, claims=[], figure=draw)
    return Results(plan, {key: {s: {"x": v} for s, v in enumerate(row)} for key, row in values.items()})


def test_a_smaller_drop_is_a_positive_difference() -> None:
    found = ivr_experiment.minus("x", "mine", "other", "easy", "hard")(
        results(
            {
                ("mine", "easy"): [10.0, 12.0],
                ("mine", "hard"): [9.0, 10.0],
                ("other", "easy"): [20.0, 20.0],
                ("other", "hard"): [15.0, 13.0],
            }
        ),
        "hard",
    )
    # Drops 1 and 2 of mine, 5 and 7 of the other.
    assert found.value == pytest.approx(((5 - 1) + (7 - 2)) / 2)
    assert found.n == 2


@pytest.mark.parametrize("config_class", [SQLConfig, EQLConfig, IQLConfig, BCConfig])
def test_scores_at_equal_sharpness(config_class: Any) -> None:
    """Each method's policy at d log w / d A = kappa (at w = 1), its value by iteration over that of the optimum, zeros by hand."""
    task = Task("four_rooms", env_config={"share": 0.3, "size": 400})
    (found,) = ivr_experiment.tabular_run(config_class(), task, [5])
    counts = ivr_experiment.four_rooms_counts(0.3, 400, [5])
    counts = tabular.Counts(*(part[0] for part in counts))
    world, gamma = FourRooms(1), 0.97
    P, r = world.model()

    def value(pi: Any) -> float:
        V = torch.zeros(104, dtype=torch.float64)
        for _ in range(800):
            V = (pi * (r + gamma * P @ V)).sum(-1)
        return float(V[world.start_state]) / 0.5256

    def weights_of(kappa: float) -> list[Any]:
        if config_class is BCConfig:
            return [torch.ones_like(counts.mu)]
        if config_class is IQLConfig:
            tables = [
                tabular.iterate(counts, lambda Q, mu, tau=tau: tabular.expectile(Q, mu, tau), gamma)
                for tau in (0.7, 0.9)
            ]
            return [(kappa * (Q[0] - V[0, :, None])).exp() for V, Q in tables]
        alpha = {"sql": 1 / (2 * kappa), "eql": 1 / kappa}[config_class.kind]
        V, Q = ivr.solve(counts, config_class.kind, torch.tensor([alpha]), gamma)
        gap = Q[0] - V[0, :, None]
        return [(1 + gap / (2 * alpha)).clamp_min(0) if config_class is SQLConfig else (gap / alpha).exp()]

    for kappa in (10.0, 100.0):
        wanted = max(value(tabular.extract(counts.mu, weight)) for weight in weights_of(kappa))
        name = "score" if config_class is BCConfig else f"score_{kappa:g}"
        assert found[name] == pytest.approx(wanted, rel=2e-4)
    if config_class is SQLConfig:
        seen, shares = counts.mu > 0, []
        for alpha in (1.0, 0.1, 0.01):
            weight = weights_of(1 / (2 * alpha))[0]
            shares.append(float((weight[seen] == 0).double().mean()))
            assert found[f"zeros_{alpha:g}"] == pytest.approx(shares[-1])
        assert shares[2] > 0
        assert found["zeros_rise"] == pytest.approx(min(np.diff(shares)))
    elif config_class is not BCConfig:
        assert found["zeros_0.01"] == 0.0


@pytest.mark.parametrize("kind", ["sql", "eql"])
def test_claims_and_figure_name_what_is_run(kind: str, tmp_path: Path) -> None:
    """Every claim finds its numbers, and the figure is drawn, on made-up cells that hold what the arms report."""
    plan = ivr_experiment.experiment(kind)
    rng = np.random.default_rng(0)
    names = ["score", "time_return", "gap_max", "gap_mean", "zeros_rise"]
    names += [f"score_{kappa:g}" for kappa in ivr_experiment.KAPPAS]
    names += [f"zeros_{alpha:g}" for alpha in ivr_experiment.SPARSITY_ALPHAS]
    cells = {
        (arm, task): {
            seed: {
                **{name: float(rng.random()) for name in names},
                "curve_steps": [1, 2],
                "curve_values": rng.random(2).tolist(),
            }
            for seed in range(about.seeds)
        }
        for arm in plan.arms
        for task, about in plan.tasks.items()
        if task in plan.arm(arm).tasks
    }
    found = Results(plan, cells)
    verdicts = [claim.judge(found, task)["verdict"] for claim in plan.claims for task in claim.tasks]
    assert "not run" not in verdicts
    assert plan.figure(found, tmp_path) == ["figure.png"]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
