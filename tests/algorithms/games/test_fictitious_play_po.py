"""Fictitious-play policy optimisation: recursions against exact answers, bookkeeping against brute force, the whole via RLlib."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from mobula.algorithms.common.games import matrix
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
from mobula.serving.backend import LocalBackend
from mobula.serving.gateway import create_app

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


def uneven(name: str, seed: int = 0) -> tabular.Game:
    """A game whose axes all differ in size, and that starts elsewhere than in state 0."""
    if name == "random_factored":
        return tabular.random_factored(seed, S1=2, S2=3, A=4, B=5, H=3)._replace(start=(1, 2))
    return tabular.random_single_controller(seed, S=3, A=2, B=4, H=3)._replace(start=2)


def gains_by_hand(
    game: tabular.Game, counts: Counts, mu: Tensor, nu: Tensor, K: int, delta: float, c: float, weigh: bool
) -> tuple[Tensor, Tensor, float, float]:
    """Steps 1 to 3 number by number, from the specification's formulas; tables of one instance."""
    n, total = counts.visits[0], counts.rewards[0]
    H, *states, A, B = n.shape
    factored = len(states) == 2
    joint = math.prod(states) * A * B
    P, beta_P = [], []
    for moves in (m[0] for m in counts.moves):
        _, S, own, _ = moves.shape
        kernel, beta = torch.zeros_like(moves), torch.zeros(H, S, own)
        for h, s, a in itertools.product(range(H), range(S), range(own)):
            N = float(moves[h, s, a].sum())
            kernel[h, s, a] = moves[h, s, a] / N if N else 1 / S
            beta[h, s, a] = c * math.sqrt(2 * H * H * S * math.log(2 * S * own * H * K / delta) / max(N, 1))
        P.append(kernel), beta_P.append(beta)
    starts = game.start if isinstance(game.start, tuple) else (game.start,)
    reach = []
    for kernel, policy, start in zip(P, (mu[0], nu[0]), starts, strict=False):
        d = torch.zeros(H, kernel.shape[1], dtype=torch.float64)
        d[0, start] = 1
        for h, s, a in itertools.product(range(H - 1), range(kernel.shape[1]), range(kernel.shape[2])):
            d[h + 1] += d[h, s] * policy[h, s, a] * kernel[h, s, a]
        reach.append(d)
    Q, V = [torch.zeros_like(n), torch.zeros_like(n)], [[torch.zeros(*states).double()] for _ in range(2)]
    low = torch.zeros_like(n)
    for h in reversed(range(H)):
        for side, sign in enumerate((1, -1)):
            value = torch.zeros(*states).double()
            for place in itertools.product(*map(range, states)):
                for a, b in itertools.product(range(A), range(B)):
                    at = (h, *place, a, b)
                    mean = float(total[at] / n[at]) if n[at] else 0.0
                    bonus = c * math.sqrt(4 * math.log(joint * H * K / delta) / max(float(n[at]), 1))
                    low[at] = max(mean - bonus, 0)
                    ahead = 0.0
                    for new in itertools.product(*map(range, states)):
                        p = float(P[0][h, place[0], a, new[0]])
                        p *= float(P[1][h, place[1], b, new[1]]) if factored else 1
                        ahead += p * float(V[side][0][new])
                    bonus += float(beta_P[0][h, place[0], a])
                    bonus += float(beta_P[1][h, place[1], b]) if factored else 0
                    Q[side][at] = min(max(mean + ahead + sign * bonus, 0), H - h)
                    value[place] += mu[0, h, place[0], a] * nu[0, h, place[-1], b] * Q[side][at]
            V[side].insert(0, value)
    first, second = torch.zeros_like(mu[0]), torch.zeros_like(nu[0])
    v_low = 0.0
    for h, a, b in itertools.product(range(H), range(A), range(B)):
        for place in itertools.product(*map(range, states)):
            i, j = place[0], place[-1]
            d1 = float(reach[0][h, i])
            if factored:
                d2 = float(reach[1][h, j]) if weigh else 1 / states[1]
                d1 = d1 if weigh else 1 / states[0]
                first[h, i, a] += d2 * Q[0][h, i, j, a, b] * nu[0, h, j, b]
                second[h, j, b] += d1 * mu[0, h, i, a] * Q[1][h, i, j, a, b]
            else:
                first[h, i, a] += Q[0][h, i, a, b] * nu[0, h, i, b]
                second[h, i, b] += (d1 if weigh else 1) * mu[0, h, i, a] * low[h, i, a, b]
                v_low += d1 * float(mu[0, h, i, a] * nu[0, h, i, b] * low[h, i, a, b])
    return first, second, float(V[1][0][starts]) if factored else v_low, float(V[0][0][starts])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.02, 0.3])
@pytest.mark.parametrize("weigh", [True, False])
def test_gains_from_the_formulas(name: str, scale: float, weigh: bool) -> None:
    """After 40 episodes, where much was not visited: every clip, bonus and weight, on axes of different sizes."""
    game = tabular.stack([uneven(name)])
    play = Play(game, episodes=50)
    mu, nu = random_pair(play, 1)
    counts = Counts.of(game)
    u = torch.rand(1, 40, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    counts.add(fp.play_episodes(game, mu, nu, u))
    found = fp.gains(
        counts, mu, nu, game.start, factored=play.factored, episodes=50, delta=0.2, scale=scale, weigh=weigh
    )
    wanted = gains_by_hand(game, counts, mu, nu, 50, 0.2, scale, weigh)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a[0], b)
    assert [float(v) for v in found[2:]] == pytest.approx(wanted[2:])


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_clipped(name: str) -> None:
    """Under bonuses of a hundred every step: H - h above, 0 below."""
    game = uneven(name)
    mu, nu = (p[0] for p in random_pair(Play(tabular.stack([game]), episodes=2)))
    for sign, wanted in ((1, [3.0, 2.0, 1.0]), (-1, [0.0, 0.0, 0.0])):
        bonus = sign * torch.full_like(game.r, 100.0)
        evaluate: Any = fp.evaluate_factored if isinstance(game, FactoredGame) else fp.evaluate_controlled
        Q, V = evaluate(game.r, *game[:-2], mu, nu, bonus)
        assert [float(q.unique()) for q in Q] == wanted
        torch.testing.assert_close(V, torch.full_like(V, wanted[0]))


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
    factored, single = (tabular.stack([uneven(name)]) for name in NAMES)
    assert fp.step_sizes(factored, 1000, 4.0, 2.0) == pytest.approx(
        (4 * math.sqrt(math.log(4) / 9000), 2 * math.sqrt(math.log(5) / 9000))
    )
    assert fp.step_sizes(single, 1000, 4.0, 1.5) == pytest.approx(
        (4 * math.sqrt(math.log(2) / 9000), 1.5 * math.sqrt(3 * math.log(4) / 1000))
    )
    assert [Play(game, episodes=2).gamma_mult for game in (factored, single)] == [4.0, 1.0]
    policy, gain = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([1.0, 0.0, -1.0]).double()
    wanted = policy * (0.7 * gain).exp()
    torch.testing.assert_close(fp.mirror_step(policy, gain, 0.7), wanted / wanted.sum())


@pytest.mark.parametrize("name", NAMES)
def test_play_and_counts(name: str) -> None:
    """Frequencies of many episodes under fixed policies approach the model; counts add up."""
    one = uneven(name, 5)
    n, H = 20_000, 3
    game = tabular.stack([one] * n)
    play = Play(game, episodes=10)
    mu, nu = random_pair(play)
    mu, nu = mu[:1].expand_as(mu), nu[:1].expand_as(nu)
    counts = Counts.of(game)
    u = torch.rand(n, H, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = fp.play_episodes(game, mu, nu, u.unsqueeze(1))
    counts.add(seen)
    assert float(seen.i[..., 0].double().mean()) == float(
        one.start[0] if isinstance(one.start, tuple) else one.start
    )
    # Actions, moves and rewards of a step are drawn apart: joint frequencies are products.
    where = (seen.i[..., 0], seen.j[..., 0])
    for h in range(H):
        a, b = seen.a[:, 0, h], seen.b[:, 0, h]
        both = (
            torch.zeros(mu.shape[-1], nu.shape[-1]).double().index_put_((a, b), torch.ones(n).double(), True)
            / n
        )
        if h == 0:
            expected = mu[0, 0, where[0][0, 0]].unsqueeze(1) * nu[0, 0, where[1][0, 0]]
            assert bool(((both - expected).abs() < 4.5 * (0.25 / n) ** 0.5).all())
    if isinstance(one, FactoredGame):
        S1, S2 = one.P1.shape[-1], one.P2.shape[-1]
        moved = torch.zeros(S1, S2).double()
        moved.index_put_((seen.i[:, 0, 1], seen.j[:, 0, 1]), torch.ones(n).double(), True)
        d1, d2 = exact.reach(one.P1, mu[0], one.start[0])[1], exact.reach(one.P2, nu[0], one.start[1])[1]
        assert bool(((moved / n - d1.unsqueeze(1) * d2).abs() < 4.5 * (0.25 / n) ** 0.5).all())
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["fixed_K", "doubling", "anytime"])
@pytest.mark.parametrize("feedback", ["observed", "estimated"])
def test_every_update_is_that_of_its_schedule(name: str, schedule: str, feedback: str) -> None:
    """Both from the pair that played; K is 20, the number of episodes so far, or the length 2, 4, 8 of the next episode's epoch."""
    game = tabular.stack([uneven(name)])
    play = Play(game, episodes=20, schedule=schedule, policy_feedback=feedback)
    u = torch.rand(1, 9, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    epochs = [2, 2, 4, 4, 4, 4, 8, 8, 8]
    acted = [torch.zeros_like(play.mu), torch.zeros_like(play.nu)]
    for k in range(9):
        mu, nu = play.mu, play.nu
        seen = fp.play_episodes(game, mu, nu, u[:, k : k + 1])
        play.episode(u[:, k])
        for table, state, action in zip(acted, (seen.i, seen.j), (seen.a, seen.b), strict=True):
            for h in range(3):
                table[0, h, state[0, 0, h], action[0, 0, h]] += 1
        if schedule == "doubling" and k + 2 in (2, 4, 8):
            assert all(float(p.std(-1).max()) < 1e-12 for p in (play.mu, play.nu))
            continue
        K = {"fixed_K": 20, "anytime": k + 1, "doubling": epochs[k]}[schedule]
        told = [mu, nu] if feedback == "observed" else [fp.normalised(table) for table in acted]
        common: dict[str, Any] = {
            "factored": play.factored,
            "episodes": K,
            "delta": 0.1,
            "scale": 0.02,
        }
        first = fp.gains(play.counts, mu, told[1], game.start, **common)[0]
        second = fp.gains(play.counts, told[0], nu, game.start, **common)[1]
        eta, gamma = fp.step_sizes(game, K, 4.0, play.gamma_mult)
        torch.testing.assert_close(play.mu, fp.mirror_step(mu, first, eta))
        torch.testing.assert_close(play.nu, fp.mirror_step(nu, -second, gamma))


def test_the_adversary_answers_the_episode_before() -> None:
    game = tabular.stack([uneven("random_single_controller", seed) for seed in (0, 1)])
    play = Play(game, episodes=8, adversary=True)
    u = torch.rand(2, 8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(8):
        before = play.mu
        play.episode(u[:, k])
        assert not torch.equal(play.mu, before)
        # Nothing is lower against that policy: she does not move the state.
        lowest = exact.gap(game, before, play.nu)[2]
        torch.testing.assert_close(exact.value(game, before, play.nu), lowest)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_averaged_without_the_true_kernels(name: str) -> None:
    """With the occupancies under the counts of each episode, re-computed here; with many episodes, the exact averages."""
    game = tabular.stack([uneven(name)])
    play = Play(game, episodes=30, episodes_per_iteration=20)
    g = torch.Generator().manual_seed(0)
    sums = [torch.zeros_like(play.mu), torch.zeros_like(play.nu)]
    for _ in range(30):
        pair = (play.mu, play.nu)
        play.episode(torch.rand(1, 20, 3, 5, dtype=torch.float64, generator=g))
        _, kernels = play.counts.model()
        starts = game.start if isinstance(game.start, tuple) else (game.start,)
        for k, (policy, total) in enumerate(zip(pair, sums, strict=True)):
            if k < len(kernels):
                total += exact.reach(kernels[k], policy, starts[k]).unsqueeze(-1) * policy
            else:
                total += policy
    for found, total, truth in zip(play.served_averages(), sums, play.averages(), strict=True):
        reached = total.sum(-1) > 0
        torch.testing.assert_close(found[reached], total[reached] / total[reached].sum(-1, keepdim=True))
        assert bool((found[~reached] == 1 / found.shape[-1]).all())
        assert 0 < float((found - truth).abs().max()) < 0.1 or name == "random_single_controller"
    torch.testing.assert_close(
        fp.normalised(torch.tensor([[0.0, 0.0], [1.0, 3.0]])), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    )


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
    fp.check_structure(visits, visits.unsqueeze(-1) * P.mean(-2, keepdim=True).expand_as(P))
    P[1, 2, 0, 1] = torch.tensor([1.0, 0.0, 0.0])
    P[1, 2, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    with pytest.raises(DataError, match=r"at h=1, s=2, a=0, b=\d the next state differs"):
        fp.check_structure(visits, visits.unsqueeze(-1) * P)
    with pytest.raises(DataError, match=r"at h=0, s=0, a=0, b=0 the next state.* by 0.50"):
        # Half the visits of a state went to 0, half to 2: each is half away from the mean.
        fp.check_structure(visits[1:, 2:, :1], (visits.unsqueeze(-1) * P)[1:, 2:, :1])


def test_the_product_structure_of_logged_transitions_is_checked() -> None:
    game = uneven("random_factored")
    H, S1, S2, A, B = game.r.shape
    visits = torch.full((H, S1, S2, A, B), 4000.0, dtype=torch.float64)
    law = torch.einsum("hiak,hjbl->hijabkl", game.P1, game.P2)
    g = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(law.reshape(-1, S1 * S2), 4000, replacement=True, generator=g)
    moves = torch.zeros(len(drawn), S1 * S2).double().scatter_add_(1, drawn, torch.ones_like(drawn).double())
    moves = moves.reshape(*visits.shape, S1, S2)
    fp.check_structure(visits, moves)
    # One place where both components jump together: its margins are right, its law is no product.
    moves[2, 1, 0, 3, 4] = torch.tensor([[2000.0, 0.0, 0.0], [0.0, 0.0, 2000.0]])
    with pytest.raises(
        DataError, match=r"no product.*at h=2, s1=1, s2=0, a=3, b=4 the next state.*factored game"
    ):
        fp.check_structure(visits, moves)


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


def test_independent_learners_want_opposite_things() -> None:
    """Action 1 of player 1 adds a half to the reward, action 0 of player 2 too: he learns to take his, she to leave hers."""
    base = tabular.random_single_controller(0)
    r = torch.zeros_like(base.r)
    r[..., 1, :] += 0.5
    r[..., 0] += 0.5
    play = IndependentQ(tabular.stack([base._replace(r=r)] * 5), episodes=400)
    u = torch.rand(5, 400, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(400):
        play.episode(u[:, k])
    assert play.mu[:, 0, 0].argmax(-1).tolist() == [1] * 5
    assert 0 not in play.nu[:, 0, 0].argmax(-1).tolist()


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
        value, first_step = exact.value(game, both.mu, both.nu), (both.mu[:, 0, 0], both.nu[:, 0, 0])
        both.episode(u[:, k])
        alone.episode(u[1:, k])
    torch.testing.assert_close(both.mu[1:], alone.mu, atol=1e-3, rtol=0)
    # What the value networks fit: all that is to come, but for player 2 of a single controller, who moves nothing, her own step.
    # The two differ by about one here; the networks, which run after moving policies, are within a third of that.
    torch.testing.assert_close(both.bounds[1], value, atol=0.33, rtol=0)
    if both.factored:
        torch.testing.assert_close(both.bounds[0], value, atol=0.33, rtol=0)
    else:
        where = torch.zeros(2, 1, 3 + both.mu.shape[2])
        where[..., 0] = where[..., 3] = 1.0
        once = torch.einsum("nab,na,nb->n", game.r[:, 0, 0], *first_step)
        assert bool((value - once > 0.8).all())
        torch.testing.assert_close(-both._start_value(1, where), once, atol=0.33, rtol=0)
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
    # The same bonus everywhere moves values by it at every step that is left; no clip binds between 0.1 and 0.9 a step.
    inner = 0.1 + 0.8 * game.r
    same = [nash_value_iteration(inner, game[0], torch.full_like(inner, b)) for b in (0.0, 0.02)]
    torch.testing.assert_close(same[1][3], same[0][3] + 0.06)
    torch.testing.assert_close(same[1][2], same[0][2] - 0.06)
    # Each player's own side: she holds the lower game of the last step to its value, he the upper one.
    bonus = 0.1 * torch.rand(game.r.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mu, nu, *_ = nash_value_iteration(inner, game[0], bonus)
    for sign in (1, -1):
        M = (inner + sign * bonus)[:, -1].flatten(0, 1)
        value = matrix.block_lp(M).value
        held = (
            torch.einsum("nab,na->nb", M, mu[:, -1].flatten(0, 1)).amin(1)
            if sign == 1
            else torch.einsum("nab,nb->na", M, nu[:, -1].flatten(0, 1)).amax(1)
        )
        torch.testing.assert_close(held, value, atol=1e-8, rtol=0)
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
    mu, nu = algorithm.play.served_averages()
    np.testing.assert_allclose(policy.answer([0.0, 1.0, 2.0])["probabilities"], mu[0, 1, 2].numpy())
    answer = policy.answer([1.0, 2.0, 1.0])
    np.testing.assert_allclose(answer["probabilities"], nu[0, 2, 1].numpy())
    assert answer["value_bounds"][0] <= answer["value_bounds"][1]
    for bad, says in (
        ([0.0], "shape"),
        ([2.0, 0.0, 0.0], "obs lies outside"),
        ([0.0, 0.5, 0.0], "whole numbers"),
    ):
        with pytest.raises(DataError, match=says):
            policy.act(bad)
    # In the service, with the example that its page shows.
    client = TestClient(create_app(LocalBackend({"game": str(tmp_path / "policy")}), None))
    card = client.get("/v1/models").json()["data"][0]["example"]
    served = client.post("/v1/policies/game/act", json={"obs": [1, 2, 1]})
    assert served.json()["probabilities"] == pytest.approx(nu[0, 2, 1].tolist())
    assert served.json()["value_bounds"] == pytest.approx(answer["value_bounds"].tolist())
    assert client.post("/v1/policies/game/act", json=card["request"]).status_code == 200
    refused = client.post("/v1/policies/game/act", json={"obs": [2, 0, 0]})
    assert refused.status_code == 422 and "obs" in refused.json()["error"]["message"]
    for each in (algorithm, restored):
        each.stop()


def test_a_game_from_a_file_is_served_by_name(ray_session: None, tmp_path: Path) -> None:
    """Players with different states and actions; requests and answers by name; what does not fit is named."""
    game = uneven("random_factored")
    np.savez(tmp_path / "game.npz", P1=game.P1, P2=game.P2, r=game.r, start=[1, 2])
    algorithm = config(
        game=str(tmp_path / "game.npz"), episodes=20, report_every=20, mixture="last"
    ).build_algo()
    algorithm.train()
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    mu, nu = algorithm.play.mu[0], algorithm.play.nu[0]
    for request, table in (
        ({"role": 1, "h": 2, "own_state": 1}, mu[2, 1]),
        ({"role": 2, "h": 1, "state": [0, 2]}, nu[1, 2]),
        (fp.EXAMPLE, mu[0, 0]),
    ):
        answer = fp.answer_request(policy, request)
        assert answer["probabilities"] == pytest.approx(table.tolist())
        assert 0 <= answer["action"] < len(table)
        assert answer["mixture"] == "last"
        assert 0 <= answer["value_bounds"][0] <= answer["value_bounds"][1] <= 3
    for bad, says in (
        ({"role": 0, "h": 0, "own_state": 0}, "role is 0: a whole number from 1 to 2"),
        ({"role": 1, "h": 3, "own_state": 0}, "h is 3: a whole number from 0 to 2"),
        ({"role": 1, "h": 0, "own_state": 2}, "own_state is 2: a whole number from 0 to 1"),
        ({"role": 1, "h": 0}, "own_state is None"),
        ({"role": 1, "h": 0, "state": [0]}, "s1, s2"),
        ({"role": 1, "h": 0, "own_state": 1, "state": [0, 0]}, "not that of player 1"),
        ({"role": 1, "h": True, "own_state": 0}, "h is True"),
        ({"player": 1}, "'player' is unknown"),
    ):
        with pytest.raises(DataError, match=says):
            fp.answer_request(policy, bad)
    # A state that player 1 does not have: her own four actions alike, and none of player 2's.
    assert policy.answer([0, 0, 2])["probabilities"].tolist() == [0.25] * 4 + [0.0]
    algorithm.stop()


@pytest.mark.parametrize("approximation", ["tables", "networks"])
def test_two_tasks_play_what_one_process_plays(ray_session: None, approximation: str) -> None:
    found = []
    for workers in (0, 2):
        made = config(
            approximation=approximation, workers=workers, episodes=6, report_every=3, episodes_per_iteration=5
        )
        algorithm = made.build_algo()
        algorithm.train(), algorithm.train()
        found.append((algorithm.play.mu, algorithm.play.counts.visits, algorithm.play.served_averages()[1]))
        algorithm.stop()
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    assert float(found[0][1].sum()) == 6 * 5 * 3


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="it is one of random_factored"):
        config(game="chess")
    with pytest.raises(ConfigError, match="episodes is None"):
        config(episodes=None)
    game = tabular.stack([tabular.random_factored(0)])
    with pytest.raises(ConfigError, match="needs the number of episodes"):
        Play(game, episodes=None).episode(fp.uniforms([0], 1, 3)[:, 0])
