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
from mobula.algorithms.games.baselines.ind_q import IndependentQ, q_step
from mobula.algorithms.games.baselines.nash_vi import NashVI, nash_value_iteration
from mobula.algorithms.games.fictitious_play_neural import NeuralPlay, clipped_surrogate, own_rewards
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
    seen = fp.play_episodes(game, mu, nu, u.unsqueeze(1))
    counts.add(seen)
    total = seen.reward.sum((1, 2))
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


@pytest.mark.parametrize("name", NAMES)
def test_several_episodes_an_iteration(name: str) -> None:
    """Counts are those of the episodes one by one; the step is m times as long; the bookkeeping counts iterations."""
    game = tabular.stack([tabular.make_game(name, seed) for seed in (0, 1)])
    u = torch.rand(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together, single = Play(game, episodes=10, episodes_per_iteration=4), Counts.of(game)
    mu, nu = together.mu, together.nu
    together.episode(u)
    for e in range(4):
        single.add(fp.play_episodes(game, mu, nu, u[:, e : e + 1]))
    torch.testing.assert_close(together.counts.visits, single.visits)
    torch.testing.assert_close(together.counts.moves[0], single.moves[0])
    gain, *_ = fp.gains(
        single, mu, nu, game.start, factored=together.factored, episodes=10, delta=0.1, scale=0.02
    )
    eta = fp.step_sizes(game, 10, 4.0, 4.0)[0]
    torch.testing.assert_close(together.mu, fp.mirror_step(mu, gain, 4 * eta))
    assert together.k == 1


def test_independent_q_learning_solves_a_game_against_a_fixed_opponent() -> None:
    """With exploring starts of one player and a fixed other, Q approaches the best reply's values by dynamic programming."""
    one = tabular.random_single_controller(3)
    game = tabular.stack([one] * 50)
    shape = one.P.shape[:-1]
    Q = torch.zeros(50, *shape, dtype=torch.float64)
    visits = torch.zeros_like(Q)
    uniform = torch.full((50, *shape), 1 / shape[-1], dtype=torch.float64)
    nu = torch.full((50, 3, 4, 3), 1 / 3, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for _ in range(4000):
        seen = fp.play_episodes(game, uniform, nu, torch.rand(50, 1, 3, 5, dtype=torch.float64, generator=g))
        Q, visits = q_step(Q, visits, seen.i[:, 0], seen.a[:, 0], seen.reward[:, 0])
    exact_Q, V = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
    for h in reversed(range(3)):
        exact_Q[h] = one.r[h].mean(-1) + one.P[h] @ V
        V = exact_Q[h].amax(-1)
    often = visits.mean(0) > 100
    assert int(often.sum()) > 15
    torch.testing.assert_close(Q.mean(0)[often], exact_Q[often], atol=0.05, rtol=0)
    play = IndependentQ(tabular.stack([one]), episodes=20)
    for k in range(20):
        play.episode(fp.uniforms([0], 20, 3)[:, k])
    assert float(play.mu.sum(-1).max()) == pytest.approx(1.0) and play.k == 20


def test_the_clipped_surrogate() -> None:
    old = torch.tensor([0.5, 0.5, 0.5, 0.5]).log()
    new = torch.tensor([0.8, 0.8, 0.2, 0.5]).log()
    A = torch.tensor([2.0, -2.0, 2.0, 1.0])
    # Ratios 1.6, 1.6, 0.4, 1: gains are clipped from above, losses are not.
    torch.testing.assert_close(clipped_surrogate(new, old, A, 0.2), torch.tensor([-2.4, 3.2, -0.8, -1.0]))


@pytest.mark.parametrize("name", NAMES)
def test_networks_learn_and_a_batch_learns_as_its_members(name: str) -> None:
    game = tabular.stack([tabular.make_game(name, seed) for seed in (0, 1)])
    about: dict[str, Any] = {"episodes": 40, "episodes_per_iteration": 64, "lr": 3e-3}
    both = NeuralPlay(game, seeds=(0, 1), **about)
    alone = NeuralPlay(tabular.stack([tabular.make_game(name, 1)]), seeds=(1,), **about)
    before = exact.gap(game, both.mu, both.nu)[0]
    u = torch.rand(2, 40, 64, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(40):
        both.episode(u[:, k])
        alone.episode(u[1:, k])
    torch.testing.assert_close(both.mu[1:], alone.mu, atol=1e-3, rtol=0)
    after = exact.gap(game, *both.averages())[0]
    assert bool((after < 0.85 * before).all())
    # A bonus makes both players' rewards larger than the plain ones.
    seen = fp.play_episodes(game, both.mu, both.nu, u[:, 0])
    first, second = own_rewards(both, seen)
    assert bool((first > seen.reward).all()) and bool((second > -seen.reward).all())
    torch.testing.assert_close(first - seen.reward, second + seen.reward)


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


@pytest.mark.parametrize("game", [*NAMES, "patrol", "networks"])
def test_the_whole_way(ray_session: None, tmp_path: Path, game: str) -> None:
    networks = {"approximation": "networks", "episodes_per_iteration": 8, "lr": 3e-3}
    algorithm = (config(game=game) if game != "networks" else config(**networks)).build_algo()
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
    for bad, says in (([0.0], "shape"), ([2.0, 0.0, 0.0], "whole numbers below"), ([0.0, 0.5, 0.0], "whole")):
        with pytest.raises(DataError, match=says):
            policy.act(bad)
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
