"""Statistics against known cases; claims; a whole reproduction that is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mobula.errors import ConfigError
from mobula.experiment import core, statistics
from mobula.experiment.core import Arm, Claim, Experiment, Task, above, at_least, below, within
from mobula.experiment.figures import band, learning_curves
from mobula.experiment.statistics import Estimate


def test_the_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = statistics.mean(rng.normal(2.0, 1.0, 30))
        hits += found.low <= 2.0 <= found.high
    # 95 % of 200, within four standard errors and the small-sample shortfall of the bootstrap.
    assert 178 <= hits <= 200


def test_the_interval_of_a_mean_is_near_student_s() -> None:
    data = np.random.default_rng(1).normal(size=200)
    found = statistics.mean(data)
    low, high = stats.t.interval(0.95, 199, data.mean(), stats.sem(data))
    assert found.value == pytest.approx(data.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_equal_values_give_a_point() -> None:
    assert statistics.mean([3.0] * 5) == Estimate(3.0, 3.0, 3.0, 5)
    assert statistics.mean([3.0]) == Estimate(3.0, 3.0, 3.0, 1)


def test_nan_and_empty_data_are_refused() -> None:
    for data in ([], [1.0, float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="statistic"):
            statistics.mean(data)


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert statistics.iqm([0, 1, 2, 3, 4, 5, 6, 100]).value == pytest.approx(3.5)


def test_pairing_removes_what_seeds_share() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 10, 12)
    first, second = shared + rng.normal(1.0, 0.1, 12), shared
    paired, unpaired = statistics.paired_difference(first, second), statistics.difference(first, second)
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.low > 0.9
    assert unpaired.low < 0 < unpaired.high
    with pytest.raises(ValueError, match="equal lengths"):
        statistics.paired_difference([1, 2], [1])


def test_a_ratio_of_means_takes_seeds_together() -> None:
    found = statistics.ratio_of_means([2.0, 4.0, 6.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    mixed = statistics.ratio_of_means([2.0, 3.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    assert mixed.value == pytest.approx(2.0)
    assert mixed.low < 2.0 < mixed.high


def test_the_stratified_bootstrap_resamples_within_tasks() -> None:
    # Tasks differ, seeds within a task do not: there is nothing to be uncertain about.
    found = statistics.stratified({"a": [0.0] * 4, "b": [10.0] * 4}, np.mean)
    assert (found.value, found.low, found.high) == (5.0, 5.0, 5.0)


def test_probability_of_improvement() -> None:
    assert statistics.probability_of_improvement([3, 4], [1, 2]).value == 1.0
    assert statistics.probability_of_improvement([1, 2], [1, 2]).value == 0.5


def test_the_slope_of_a_square_root_regret() -> None:
    steps = np.array([100, 1000, 10_000])
    found = statistics.regret_slope(steps, [3 * steps**0.5, 5 * steps**0.5])
    assert found.value == pytest.approx(0.5)


def test_fractions() -> None:
    found = statistics.fraction([True] * 9 + [False])
    assert found.value == 0.9
    assert found.low == pytest.approx(stats.beta.ppf(0.025, 9, 2))


@pytest.mark.parametrize(
    ("criterion", "interval", "verdict"),
    [
        (above(0), (0.1, 0.2), "holds"),
        (above(0), (0.0, 0.2), "undecided"),
        (above(0), (-0.2, -0.1), "fails"),
        (above(0), (-0.2, 0.1), "undecided"),
        (at_least(0.9), (0.9, 0.9), "holds"),
        (at_least(0.9), (0.8, 0.8), "fails"),
        (below(1), (1.0, 1.0), "fails"),
        (below(1), (0.5, 0.9), "holds"),
        (within(0, 1), (0.5, 1.5), "undecided"),
        (within(0, 1), (1.1, 1.5), "fails"),
    ],
)
def test_verdicts(criterion: Any, interval: tuple[float, float], verdict: str) -> None:
    assert criterion.judge(Estimate(sum(interval) / 2, *interval, 5)) == verdict


def test_windows_of_reward_are_exact_where_iterations_straddle_them() -> None:
    # Reward 1 a step up to step 50, then 3: iterations of 30 steps, windows of 50.
    rows = [
        {"env_steps": 30.0, "env_runners/reward_sum": 30.0},
        {"env_steps": 50.0, "env_runners/reward_sum": 20.0},
        {"env_steps": 90.0, "env_runners/reward_sum": 120.0},
        {"env_steps": 100.0, "env_runners/reward_sum": 30.0},
    ]
    found = core.windows_of_reward(2)(rows)
    assert found["windows"] == pytest.approx([1.0, 3.0])
    assert found["total_reward"] == pytest.approx(2.0)
    assert found["last_window_reward"] == pytest.approx(3.0)


def test_returns() -> None:
    rows = [{"env_steps": float(i), "env_runners/episode_return_mean": 2.0 * i} for i in range(101)]
    found = core.returns(points=11)(rows)
    assert found["final_return"] == pytest.approx(2 * np.mean(range(91, 101)))
    assert found["area"] == pytest.approx(100.0)


def test_the_band_of_equal_curves_has_no_width() -> None:
    middle, low, high = band(np.tile(np.arange(4.0), (5, 1)))
    assert np.array_equal(low, middle)
    assert np.array_equal(high, middle)


# A whole reproduction -----------------------------------------------------------------------------------------


def small(ac_steps: float = 1.0) -> Experiment:
    from mobula.algorithms.policy_gradient.baselines.average_reward import ACFixedConfig, ReinforceAvgConfig

    return Experiment(
        arms={
            "ac": ACFixedConfig().training(report_every=200, lr_actor=ac_steps),
            "random": ReinforceAvgConfig().training(report_every=200, lr_actor=0.0),
            "tuned": Arm(
                ReinforceAvgConfig().training(report_every=200),
                grid={"lr_actor": [0.0, 0.5]},
                select="total_reward",
                tuning_seeds=1,
            ),
        },
        tasks={"grid": Task("goal_grid", 1000, 3, {"size": 3})},
        smoke={"grid": {"env_steps": 400, "seeds": 2}},
        claims=[
            Claim(
                "learning helps", core.paired_difference("total_reward", "ac", "random"), above(0), ("grid",)
            ),
            Claim(
                "nobody beats the optimum", core.mean_of("last_window_reward", "ac"), below(0.26), ("grid",)
            ),
            Claim(
                "a count", core.fraction_at_least("total_reward", "random", lambda task: 9.0), at_least(0.5)
            ),
            Claim("an arm that is not there", core.mean_of("total_reward", "nobody"), above(0)),
        ],
        measure=core.windows_of_reward(4),
        figure=learning_curves("reward per step"),
        probe=lambda algorithm: {"eta": float(algorithm.rl_module.eta)},
        probe_points=4,
    )


def test_a_reproduction_judges_resumes_and_reports(ray_session: None, in_tmp: Path) -> None:
    from mobula.experiment import reproduce
    from mobula.experiment.ledger import claims_table, write_index

    result = reproduce("small", experiment=small(), out="ledger/small", track=False)
    assert [claim["verdict"] for claim in result["claims"]] == ["holds", "holds", "fails", "not run"]
    assert not result["failed_cells"]
    assert result["tuned"]["tuned on grid"]["combinations"] == 2
    on_disk = json.loads((in_tmp / "ledger/small/result.json").read_text())
    numbers = on_disk["numbers"]["ac--grid"]
    assert len(numbers) == 3
    assert len(numbers[0]["probe/eta"]) == 4
    assert (in_tmp / "ledger/small/figure.png").stat().st_size > 10_000
    index = write_index("ledger").read_text()
    assert "| a count | grid | 0 | >= 0.5 | 3 | **FAILS** |" in index
    assert claims_table(result).row_count == 4

    cells = {file: file.stat().st_mtime_ns for file in (in_tmp / "ledger/small/cells").glob("*.json")}
    assert len(cells) == 9 + 2
    missing = sorted(cells)[0]
    missing.unlink()
    again = reproduce("small", experiment=small(), out="ledger/small", track=False)
    assert again["numbers"] == result["numbers"]
    assert {f for f, t in cells.items() if f.stat().st_mtime_ns != t} == {missing}
    # Another setting is another cell.
    changed = reproduce("small", experiment=small(ac_steps=0.0), out="ledger/small", track=False)
    assert changed["numbers"]["ac--grid"] != result["numbers"]["ac--grid"]
    assert changed["numbers"]["random--grid"] == result["numbers"]["random--grid"]


def squares(config: Any, task: Task, seeds: Any) -> list[dict[str, float]]:
    """An arm that computes all of its seeds at once."""
    scale = config.lr_actor * task.env_config["factor"]
    return [{"value": scale * (seed % 1000) ** 2, "batch": float(len(seeds))} for seed in seeds]


def test_an_arm_of_batched_seeds(ray_session: None, in_tmp: Path) -> None:
    from mobula.algorithms.policy_gradient.baselines.average_reward import ReinforceAvgConfig
    from mobula.experiment import reproduce

    one = ReinforceAvgConfig().training(lr_actor=1.0)
    plan = Experiment(
        arms={
            "whole": Arm(one, run=squares),
            "halves": Arm(one, run=squares, batch=2),
            "tuned": Arm(one, run=squares, grid={"lr_actor": [1.0, 3.0]}, select="value", tuning_seeds=2),
        },
        tasks={"squares": Task(seeds=4, env_config={"factor": 10.0})},
        claims=[
            Claim("halves are the whole", core.paired_difference("value", "whole", "halves"), within(0, 0))
        ],
        figure=lambda results, folder: [],
    )
    result = reproduce("batched", experiment=plan, out="out", track=False)
    assert result["claims"][0]["verdict"] == "holds"
    assert [n["value"] for n in result["numbers"]["whole--squares"]] == [0.0, 10.0, 40.0, 90.0]
    assert [n["batch"] for n in result["numbers"]["halves--squares"]] == [2.0] * 4
    assert [n["value"] for n in result["numbers"]["tuned--squares"]] == [0.0, 30.0, 120.0, 270.0]
    assert result["tuned"]["tuned on squares"]["chosen"] == {"lr_actor": 3.0}
    assert sorted(f.stem for f in Path("out/cells").glob("halves*")) == [
        "halves--squares--0-1",
        "halves--squares--2-3",
    ]


def test_a_failing_cell_is_reported_and_the_others_are_judged(ray_session: None, in_tmp: Path) -> None:
    from mobula.experiment import reproduce

    plan = small().at("smoke")
    broken = plan.arms["ac"].copy(copy_frozen=False).training(r_min=0.0, r_max=0.5)
    plan = replace(plan, arms={"ac": broken, "random": plan.arms["random"]})
    result = reproduce("small", experiment=plan, out="out", track=False)
    failed = {entry["cell"] for entry in result["failed_cells"]}
    assert failed == {"ac--grid--0", "ac--grid--1"}
    assert "outside [r_min, r_max]" in result["failed_cells"][0]["error"]
    assert result["claims"][0]["verdict"] == "not run"
    assert result["claims"][2]["verdict"] == "fails"


def test_budgets_and_methods_without_an_experiment() -> None:
    from mobula.experiment import reproduce

    with pytest.raises(ConfigError, match="'paper' or 'smoke'"):
        reproduce("mac", budget="huge")
    with pytest.raises(ConfigError, match="declares no experiment"):
        reproduce("SAC")
    with pytest.raises(ConfigError, match="declares no experiment"):
        reproduce("PPO")
