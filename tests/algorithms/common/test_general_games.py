"""General-sum and regularised matrix games: definitions, known games, inclusions, and one method against another."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import Tensor

from mobula.algorithms.common.games import general, matrix
from mobula.algorithms.common.games.regularised import quantal_response
from mobula.errors import ConfigError, DataError


def games(count: int, *sizes: int, seed: int = 0, integers: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    U = torch.randn(count, len(sizes), *sizes, dtype=torch.float64, generator=g)
    return (1.5 * U).round() if integers else U


def gains_by_hand(U: Tensor, p: Tensor, coarse: bool) -> float:
    """The best deviation of one game, sum by sum from the definition."""
    sizes, best = p.shape, -math.inf
    for i in range(len(sizes)):
        for new in range(sizes[i]):
            for advice in [None] if coarse else range(sizes[i]):
                total = 0.0
                for joint in itertools.product(*map(range, sizes)):
                    if advice in (None, joint[i]):
                        moved = (*joint[:i], new, *joint[i + 1 :])
                        total += float(p[joint] * (U[(i, *moved)] - U[(i, *joint)]))
                best = max(best, total)
    return best


@pytest.mark.parametrize("coarse", [False, True])
def test_gaps_are_those_of_the_definition(coarse: bool) -> None:
    for sizes in ((2, 3), (2, 3, 2)):
        U = games(3, *sizes)
        p = torch.rand(3, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        p = p / p.flatten(1).sum(1).view(3, *[1] * len(sizes))
        found = general.gap(U, p, coarse=coarse)
        for k in range(3):
            assert float(found[k]) == pytest.approx(gains_by_hand(U[k], p[k], coarse))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("select", general.SELECTIONS)
def test_nash_is_correlated_is_coarse(sizes: tuple[int, ...], select: str) -> None:
    """The larger the set, the larger what is maximised over it; nothing gains by deviating."""
    U = games(25, *sizes, integers=True)
    ce, gap = general.correlated(U, select=select, chunk=10)
    cce, coarse_gap = general.correlated(U, coarse=True, select=select)
    assert float(gap.max()) < 1e-8 and float(coarse_gap.max()) < 1e-8
    assert float(general.gap(U, ce, coarse=True).max()) < 1e-8

    def value(p: Tensor) -> Tensor:
        payoffs = (U * p.unsqueeze(1)).flatten(2).sum(2)
        return payoffs.sum(1) if select == "welfare" else payoffs.amin(1)

    torch.testing.assert_close(ce.flatten(1).sum(1), torch.ones(25, dtype=torch.float64))
    assert float(ce.min()) >= 0
    assert bool((value(cce) >= value(ce) - 1e-8).all())
    other = general.correlated(U, select=general.SELECTIONS[1 - general.SELECTIONS.index(select)])[0]
    assert bool((value(ce) >= value(other) - 1e-8).all())
    if len(sizes) == 2:
        pair = general.nash(U, select="welfare")
        p = torch.einsum("na,nb->nab", pair.x, pair.y)
        assert float(general.gap(U, p, coarse=False).max()) < 1e-7
        assert bool((value(ce) >= value(p) - 1e-7).all())


def test_chicken() -> None:
    """Aumann's example (1974): the best correlated equilibrium is 1/2, 1/4, 1/4 with payoffs 5 1/4 each; no Nash pair has as much."""
    row = torch.tensor([[6.0, 2.0], [7.0, 0.0]]).double()
    U = torch.stack([row, row.T])[None]
    p, _ = general.correlated(U)
    torch.testing.assert_close(p[0], torch.tensor([[0.5, 0.25], [0.25, 0.0]]).double())
    assert float((U[0, 0] * p[0]).sum()) == pytest.approx(5.25)
    pair = general.nash(U, select="welfare")
    # Two pure pairs with 2 + 7, and the mixed one (2/3, 1/3) with 14/3 each.
    torch.testing.assert_close(pair.x[0], torch.tensor([2 / 3, 1 / 3]).double())
    torch.testing.assert_close(pair.payoffs[0], torch.full((2,), 14 / 3).double())
    first = general.nash(U)
    assert sorted(first.payoffs[0].tolist()) == [2.0, 7.0]


def test_welfare_counts_payoffs_as_they_are() -> None:
    """Two pure pairs with 10 + 1 and 9 + 1.5, although the second is better in shares of each player's best."""
    U = torch.tensor([[[[10.0, 0.0], [0.0, 9.0]], [[1.0, 0.0], [0.0, 1.5]]]]).double()
    assert general.nash(U, select="welfare").payoffs[0].tolist() == [10.0, 1.0]


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (3, 3), (4, 4), (2, 4), (4, 3)])
@pytest.mark.parametrize("integers", [False, True])
def test_nash_pairs_have_no_regret(sizes: tuple[int, int], integers: bool) -> None:
    """Degenerate games too: small integers, and copies of a row."""
    U = games(60, *sizes, integers=integers, seed=3)
    if integers and sizes[0] > 2:
        U[:, :, 1] = U[:, :, 0]
    found = general.nash(U)
    row = torch.einsum("nab,nb->na", U[:, 0], found.y)
    column = torch.einsum("nab,na->nb", U[:, 1], found.x)
    for best, payoff in ((row.amax(1), found.payoffs[:, 0]), (column.amax(1), found.payoffs[:, 1])):
        assert float((best - payoff).max()) < 1e-7
    for strategy in (found.x, found.y):
        assert float(strategy.min()) >= 0
        torch.testing.assert_close(strategy.sum(1), torch.ones(60, dtype=torch.float64))
    # On zero-sum games the value is that of the linear program, whichever pair is found.
    M = games(60, *sizes, seed=4, integers=integers)[:, 0]
    zero = general.nash(torch.stack([M, -M], 1))
    torch.testing.assert_close(zero.payoffs[:, 0], matrix.block_lp(M).value, atol=1e-7, rtol=0)


def test_a_player_who_does_not_care() -> None:
    """Player 2 has the same payoff everywhere: every y is a reply, row 1 is best against all of them, welfare picks the column."""
    U = torch.tensor([[[[0.0, 0.0], [1.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]]]).double()
    found = general.nash(U, select="welfare")
    assert found.x[0].tolist() == [0.0, 1.0]
    assert found.y[0].tolist() == [0.0, 1.0]
    assert found.payoffs[0].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("shape", [(2, 2), (5, 5), (3, 6)])
@pytest.mark.parametrize("tau", [3.0, 0.3, 0.05])
def test_quantal_responses(shape: tuple[int, int], tau: float) -> None:
    """A fixed point of both softmaxes, by definition; the value is within tau log of the game's, on both sides."""
    M = games(200, *shape)[:, 0]
    tau *= 0.5 * float(M.abs().max())
    found = quantal_response(M, tau)
    x = (torch.einsum("nab,nb->na", M, found.y) / tau).softmax(-1)
    y = (-torch.einsum("nab,na->nb", M, found.x) / tau).softmax(-1)
    torch.testing.assert_close(found.x, x, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.y, y, atol=1e-9, rtol=0)
    assert float(found.residual.max()) < 1e-10
    entropy = [-torch.special.xlogy(p, p).sum(1) for p in (found.x, found.y)]
    plain = torch.einsum("nab,na,nb->n", M, found.x, found.y)
    torch.testing.assert_close(found.value, plain + tau * (entropy[0] - entropy[1]))
    exact = matrix.solve(M).value
    assert bool((found.value >= exact - tau * math.log(shape[1]) - 1e-9).all())
    assert bool((found.value <= exact + tau * math.log(shape[0]) + 1e-9).all())
    # Players change places.
    torch.testing.assert_close(quantal_response(-M.mT, tau).value, -found.value, atol=1e-8, rtol=0)


def test_newton_and_extragradient_agree_and_what_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    M = games(50, 3, 4)[:, 0]
    tau = torch.linspace(0.3, 2.0, 50).double()
    newton, prox = quantal_response(M, tau), quantal_response(M, tau, method="extragradient")
    torch.testing.assert_close(newton.x, prox.x, atol=1e-8, rtol=0)
    torch.testing.assert_close(newton.value, prox.value, atol=1e-8, rtol=0)
    rough = 0.5 * torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]).double()
    torch.testing.assert_close(quantal_response(rough, 0.1).x, torch.full((1, 2), 0.5).double())
    with caplog.at_level(logging.WARNING):
        left = quantal_response(M, 0.3, method="extragradient", iterations=2)
    assert "residual above" in caplog.text and float(left.residual.max()) > 1e-10
    with pytest.raises(ConfigError, match="tau is 0; above 0"):
        quantal_response(M, 0.0)
    with pytest.raises(ConfigError, match="one of newton, extragradient"):
        quantal_response(M, 1.0, method="sgd")
    U = games(3, 2, 2)
    U[2, 1, 0, 1] = math.nan
    for refused in (general.correlated, general.nash):
        with pytest.raises(DataError, match=r"game 2: player 1 has the payoff nan at \(0, 1\)"):
            refused(U)
    with pytest.raises(DataError, match="game 2 has the payoff nan"):
        quantal_response(U[:, 1], 1.0)
    with pytest.raises(DataError, match="at most 4 actions"):
        general.nash(games(1, 5, 5))
    with pytest.raises(DataError, match="actions of 1"):
        general.correlated(torch.zeros(2, 3, 2, 2))
    with pytest.raises(ConfigError, match="welfare, egalitarian"):
        general.correlated(games(1, 2, 2), select="entropy")
