"""Zero-sum matrix games: kernels against linear programming, certificates, and laws of the value."""

from __future__ import annotations

import pytest
import torch

from mobula.algorithms.common.games.matrix import block_lp, shapley_snow, solve
from mobula.errors import DataError


def games(count: int, rows: int, columns: int, *, integers: bool = False, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(count, rows, columns, dtype=torch.float64, generator=g)
    return (2 * M).round() if integers else M


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (4, 4), (2, 6), (5, 3)])
@pytest.mark.parametrize("integers", [False, True])
def test_kernels_agree_with_linear_programs(shape: tuple[int, int], integers: bool) -> None:
    M = games(200, *shape, integers=integers)
    kernels, programs = shapley_snow(M), block_lp(M, chunk=64)
    torch.testing.assert_close(kernels.value, programs.value, atol=1e-9, rtol=0)
    for solution in (kernels, programs):
        assert float(solution.gap.abs().max()) < 1e-8
        for strategy in (solution.x, solution.y):
            assert float(strategy.min()) >= 0.0
            torch.testing.assert_close(strategy.sum(1), torch.ones(200, dtype=torch.float64))


def test_two_by_two_in_closed_form() -> None:
    M = games(500, 2, 2)
    a, b, c, d = M[:, 0, 0], M[:, 0, 1], M[:, 1, 0], M[:, 1, 1]
    mixed = (M.amin(2).amax(1) - M.amax(1).amin(1)).abs() > 1e-12
    wanted = torch.where(mixed, (a * d - b * c) / (a + d - b - c), M.amin(2).amax(1))
    torch.testing.assert_close(solve(M).value, wanted)
    assert 0 < int(mixed.sum()) < 500


def test_known_games_and_ties() -> None:
    rock = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]).double()[None]
    found = solve(rock)
    assert float(found.value.abs()) < 1e-12
    torch.testing.assert_close(found.x, torch.full((1, 3), 1 / 3, dtype=torch.float64))
    flat = solve(torch.full((1, 3, 4), 2.5, dtype=torch.float64))
    assert float(flat.value) == pytest.approx(2.5)
    assert flat.x.tolist() == [[1.0, 0.0, 0.0]]
    assert flat.y.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_laws_of_the_value() -> None:
    M = games(100, 3, 4)
    value = solve(M).value
    torch.testing.assert_close(solve(M + 7.0).value, value + 7.0)
    torch.testing.assert_close(solve(3.0 * M).value, 3.0 * value)
    torch.testing.assert_close(solve(-M.mT).value, -value)
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    moved = solve(M[:, rows][:, :, columns])
    torch.testing.assert_close(moved.value, value)


def test_large_games_go_to_the_program_and_a_nan_is_named() -> None:
    M = games(5, 8, 7)
    found = solve(M)
    assert float(found.gap.abs().max()) < 1e-8
    M[3, 1, 2] = float("nan")
    with pytest.raises(DataError, match=r"game 3 has the payoff nan at \(1, 2\)"):
        solve(M)
