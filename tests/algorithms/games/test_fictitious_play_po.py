"""Fictitious-play policy optimisation: recursions against exact answers, bookkeeping against brute force, the whole via RLlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mobula.algorithms.games import fictitious_play_po as fp
from mobula.algorithms.games.baselines.nash_vi import NashVI, nash_value_iteration
from mobula.algorithms.games.fictitious_play_po import (
    Counts,
    FictitiousPlayPO,
    FictitiousPlayPOConfig,
    Play,
)
from mobula.artifact import export_policy, load_policy
from mobula.envs.games import exact, tabular
from mobula.envs.games.tabular import FactoredGame
from mobula.errors import ConfigError, DataError

NAMES = ("random_factored", "random_single_controller")


def random_pair(play: Play, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    pair = [torch.rand(p.shape, dtype=torch.float64, generator=g) ** 2 for p in (play.mu, play.nu)]
    return pair[0] / pair[0].sum(-1, keepdim=True), pair[1] / pair[1].sum(-1, keepdim=True)


def known(game: tabular.Game) -> Counts:
    """Counts that give the true model, and bonuses of nearly nothing."""
    big = 1e16
    visits = torch.full_like(game.r, big)
    tables = [game.P1, game.P2] if isinstance(game, FactoredGame) else [game.P]
    return Counts(visits, visits * game.r, [big * P for P in tables])


@pytest.mark.parametrize("name", NAMES)
def test_gains_are_derivatives_of_the_value(name: str) -> None:
    """With the model known: d V / d mu_h(a|s) = d^mu_h(s) gain_h(s, a), and for player 2 with her own reach (I) or none (II)."""
    game = tabular.stack([tabular.make_game(name, seed) for seed in (0, 1)])
    play = Play(game, episodes=10)
    mu, nu = random_pair(play)
    first, second, low, high = fp.gains(
        known(game), mu, nu, game.start, factored=play.factored, episodes=10, delta=0.1, scale=1.0
    )
    mu_, nu_ = mu.clone().requires_grad_(), nu.clone().requires_grad_()
    value = exact.value(game, mu_, nu_)
    d_mu, d_nu = torch.autograd.grad(value.sum(), (mu_, nu_))
    if isinstance(game, FactoredGame):
        d1, d2 = exact.reach(game.P1, mu, 0), exact.reach(game.P2, nu, 0)
        torch.testing.assert_close(d1.unsqueeze(-1) * first, d_mu, atol=1e-4, rtol=0)
        torch.testing.assert_close(d2.unsqueeze(-1) * second, d_nu, atol=1e-4, rtol=0)
    else:
        d = exact.reach(game.P, mu, 0)
        torch.testing.assert_close(d.unsqueeze(-1) * first, d_mu, atol=1e-4, rtol=0)
        torch.testing.assert_close(second, d_nu, atol=1e-4, rtol=0)
    torch.testing.assert_close(high, value.detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(low, value.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_estimates_bracket_the_value(name: str) -> None:
    """Upper and lower estimates with the theory's bonuses hold the true value in every instance (confidence 0.9)."""
    game = tabular.stack([tabular.make_game(name, seed) for seed in range(10)])
    play = Play(game, episodes=300, bonus_scale=1.0)
    u = fp.uniforms(range(10), 300, 3)
    for k in range(300):
        mu, nu = play.mu, play.nu
        play.episode(u[:, k])
        value = exact.value(game, mu, nu)
        assert bool((play.bounds[0] <= value + 1e-9).all())
        assert bool((play.bounds[1] >= value - 1e-9).all())


def test_bonuses_are_the_formulas() -> None:
    game = tabular.stack([tabular.random_factored(0, S1=2, S2=3, A=2, B=4, H=5)])
    counts = Counts.of(game)
    counts.visits[0, 1, 1, 2, 0, 3] = 9.0
    counts.moves[0][0, 1, 1, 0, 1] = 4.0
    reward, (first, second) = fp.bonuses(counts, True, 100, 0.1, 0.5)
    assert float(reward[0, 1, 1, 2, 0, 3]) == pytest.approx(
        0.5 * math.sqrt(4 * math.log(2 * 3 * 2 * 4 * 5 * 100 / 0.1) / 9)
    )
    assert float(first[0, 1, 1, 0]) == pytest.approx(
        0.5 * math.sqrt(2 * 25 * 2 * math.log(2 * 2 * 2 * 5 * 100 / 0.1) / 4)
    )
    assert float(second[0, 0, 0, 0]) == pytest.approx(
        0.5 * math.sqrt(2 * 25 * 3 * math.log(2 * 3 * 4 * 5 * 100 / 0.1))
    )
    one = tabular.stack([tabular.random_single_controller(0)])
    reward, (moving,) = fp.bonuses(Counts.of(one), False, 100, 0.1, 1.0)
    assert float(reward[0, 0, 0, 0, 0]) == pytest.approx(math.sqrt(4 * math.log(4 * 3 * 3 * 3 * 100 / 0.1)))
    assert float(moving[0, 0, 0, 0]) == pytest.approx(
        math.sqrt(2 * 9 * 4 * math.log(2 * 4 * 3 * 3 * 100 / 0.1))
    )


def test_step_sizes_and_mirror_steps() -> None:
    factored = tabular.stack([tabular.random_factored(0)])
    single = tabular.stack([tabular.random_single_controller(0)])
    theory = math.sqrt(math.log(3) / 1000) / 3
    assert fp.step_sizes(factored, 1000, 4.0, 2.0) == pytest.approx((4 * theory, 2 * theory))
    assert fp.step_sizes(single, 1000, 4.0, 1.0) == pytest.approx(
        (4 * theory, math.sqrt(4 * math.log(3) / 1000))
    )
    policy, gain = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([1.0, 0.0, -1.0]).double()
    wanted = policy * (0.7 * gain).exp()
    torch.testing.assert_close(fp.mirror_step(policy, gain, 0.7), wanted / wanted.sum())


@pytest.mark.parametrize("name", NAMES)
def test_play_and_counts(name: str) -> None:
    """Frequencies of many episodes under fixed policies approach the model; counts add up."""
    one = tabular.make_game(name, 5)
    n, H = 20_000, 3
    game = tabular.stack([one] * n)
    play = Play(game, episodes=10)
    mu, nu = random_pair(play)
    mu, nu = mu[:1].expand_as(mu), nu[:1].expand_as(nu)
    counts = Counts.of(game)
    u = torch.rand(n, H, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = fp.play_episode(game, mu, nu, u, counts)
    value = exact.value(one, mu[0], nu[0])
    assert float(total.mean()) == pytest.approx(float(value), abs=4 * float(total.std()) / n**0.5)
    pooled = Counts(counts.visits.sum(0), counts.rewards.sum(0), [moves.sum(0) for moves in counts.moves])
    assert float(pooled.visits.sum()) == n * H
    r, kernels = pooled.model()
    seen = pooled.visits > 300
    error = 4.5 * (0.25 / pooled.visits[seen]).sqrt()
    assert bool(((r - one.r)[seen].abs() < error).all())
    for kernel, truth, moves in zip(kernels, [one[0], one[1]], pooled.moves, strict=False):
        often = moves.sum(-1) > 300
        gap = (kernel - truth)[often].abs().amax(-1)
        assert bool((gap < 4.5 * (0.25 / moves.sum(-1)[often]).sqrt()).all())
    empty = Counts.of(tabular.stack([one]))
    r, kernels = empty.model()
    assert float(r.abs().max()) == 0.0
    torch.testing.assert_close(kernels[0], torch.full_like(kernels[0], 1 / kernels[0].shape[-1]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"schedule": "doubling"}, {"schedule": "anytime"}, {"policy_feedback": "estimated"}]
)
def test_hindsight_and_averages_are_exact(name: str, options: dict[str, Any]) -> None:
    """Regrets from all policies that were played; their sum over K is the duality gap of the averaged pair."""
    game = tabular.stack([tabular.make_game(name, seed) for seed in (0, 1)])
    play = Play(game, episodes=60, **options)
    u = fp.uniforms([0, 1], 60, 3)
    pairs = []
    for k in range(60):
        pairs.append((play.mu, play.nu))
        play.episode(u[:, k])
    values = torch.stack([exact.value(game, mu, nu) for mu, nu in pairs])
    torch.testing.assert_close(play.sum_value, values.sum(0))
    mu_bar, nu_bar = play.averages()
    torch.testing.assert_close(
        exact.value(game, *random_pair(play)[:1], nu_bar),
        torch.stack([exact.value(game, random_pair(play)[0], nu) for _, nu in pairs]).mean(0),
    )
    torch.testing.assert_close(
        exact.value(game, mu_bar, random_pair(play)[1]),
        torch.stack([exact.value(game, mu, random_pair(play)[1]) for mu, _ in pairs]).mean(0),
    )
    first, second = play.regrets()
    gap, upper, lower = exact.gap(game, mu_bar, nu_bar)
    torch.testing.assert_close((first + second) / 60, gap)
    for i, seed in enumerate((0, 1)):
        optimum = exact.equilibrium_value(tabular.make_game(name, seed))
        assert float(lower[i]) - 1e-8 <= optimum <= float(upper[i]) + 1e-8


@pytest.mark.parametrize("name", [*NAMES, "patrol"])
def test_it_learns(name: str) -> None:
    seeds = list(range(4))
    game = tabular.stack([tabular.make_game(name, seed) for seed in seeds])
    play = Play(game, episodes=600)
    uniform = exact.gap(game, play.mu, play.nu)[0]
    H = play.mu.shape[1]
    u = fp.uniforms(seeds, 600, H)
    for k in range(600):
        play.episode(u[:, k])
    assert float(exact.gap(game, *play.averages())[0].mean()) < 0.7 * float(uniform.mean())


def test_a_batch_plays_as_its_members() -> None:
    for name in NAMES:
        games = [tabular.make_game(name, seed) for seed in (3, 4)]
        u = fp.uniforms([3, 4], 40, 3)
        both, alone = Play(tabular.stack(games), episodes=40), Play(tabular.stack(games[1:]), episodes=40)
        for k in range(40):
            both.episode(u[:, k])
            alone.episode(u[1:, k])
        torch.testing.assert_close(both.mu[1:], alone.mu)
        torch.testing.assert_close(both.regrets()[0][1:], alone.regrets()[0])


def test_the_structure_of_logged_transitions_is_checked() -> None:
    g = torch.Generator().manual_seed(0)
    P = torch.rand(2, 3, 2, 2, 3, dtype=torch.float64, generator=g)
    P = P / P.sum(-1, keepdim=True)
    visits = torch.full((2, 3, 2, 2), 5000.0, dtype=torch.float64)
    fp.check_structure(tabular.patrol(), visits, visits.unsqueeze(-1) * P.mean(-2, keepdim=True).expand_as(P))
    P[1, 2, 0, 1] = torch.tensor([1.0, 0.0, 0.0])
    P[1, 2, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    with pytest.raises(DataError, match=r"at h=1, s=2, a=0, b=\d the next state differs"):
        fp.check_structure(tabular.patrol(), visits, visits.unsqueeze(-1) * P)


def test_nash_value_iteration_solves_a_known_game_and_learns_an_unknown_one() -> None:
    games = [tabular.random_single_controller(seed) for seed in range(3)]
    game = tabular.stack(games)
    mu, nu, low, high = nash_value_iteration(game.r, game[0], torch.zeros_like(game.r))
    torch.testing.assert_close(low, high)
    assert float(exact.gap(game, mu, nu)[0].abs().max()) < 1e-9
    for i, one in enumerate(games):
        assert float(low[i, 0]) == pytest.approx(exact.equilibrium_value(one), abs=1e-8)
    play = NashVI(game, episodes=200)
    uniform = exact.gap(game, play.mu, play.nu)[0]
    u = fp.uniforms(range(3), 200, 3)
    for k in range(200):
        play.episode(u[:, k])
    assert float(exact.gap(game, *play.averages())[0].mean()) < 0.9 * float(uniform.mean())


# Through RLlib --------------------------------------------------------------------------------------------------


def config(**knobs: Any) -> Any:
    made = FictitiousPlayPOConfig().training(**{"episodes": 200, "report_every": 50, **knobs})
    return made.debugging(seed=0, log_level="ERROR")


@pytest.mark.parametrize("game", [*NAMES, "patrol"])
def test_the_whole_way(ray_session: None, tmp_path: Path, game: str) -> None:
    algorithm = config(game=game).build_algo()
    first = algorithm.train()
    restored = FictitiousPlayPO.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    for _ in range(3):
        result, again = algorithm.train(), restored.train()
    assert result["progress"] == 1.0
    assert result["duality_gap"] == again["duality_gap"]
    assert result["duality_gap"] < first["duality_gap"]
    assert result["regret_1"] + result["regret_2"] == pytest.approx(200 * result["duality_gap"])
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    mu, nu = algorithm.play.averages()
    np.testing.assert_allclose(policy.answer([0.0, 1.0, 2.0])["probabilities"], mu[0, 1, 2].numpy())
    answer = policy.answer([1.0, 2.0, 1.0])
    np.testing.assert_allclose(answer["probabilities"], nu[0, 2, 1].numpy())
    assert answer["value_bounds"][0] <= answer["value_bounds"][1]
    with pytest.raises(DataError, match="shape"):
        policy.act([0.0])
    for each in (algorithm, restored):
        each.stop()


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of 'random_factored'"):
        config(game="chess")
    with pytest.raises(ConfigError, match="episodes is None"):
        config(episodes=None)
    game = tabular.stack([tabular.random_factored(0)])
    with pytest.raises(ConfigError, match="needs the number of episodes"):
        Play(game, episodes=None).episode(fp.uniforms([0], 1, 3)[:, 0])
