"""Mazes: exact values of FourRooms, the point's dynamics by hand, walls."""

from __future__ import annotations

import pytest
import torch

from mobula.envs.datasets.recipes import mean_return, noisy, optimal_policy, waypoint
from mobula.envs.mazes import LAYOUTS, FourRooms, PointMaze2D, distances
from mobula.errors import ConfigError


def test_four_rooms_has_the_published_values() -> None:
    """Optimal value at the start 0.5256, of the uniform policy 0.0011 (gamma 0.97, slip 0.1), 104 free cells."""
    world = FourRooms(1)
    P, r = world.model()
    assert len(P) == 104
    _, best = optimal_policy(world)
    assert float(best[world.start_state]) == pytest.approx(0.5256, abs=5e-5)
    uniform = torch.linalg.solve(torch.eye(104, dtype=torch.float64) - 0.97 * P.mean(1), r.mean(1))
    assert float(uniform[world.start_state]) == pytest.approx(0.0011, abs=5e-5)


def test_four_rooms_plays_its_model() -> None:
    n = 40_000
    world = FourRooms(n)
    P, r = world.model()
    for state, action in ((world.start_state, 1), (world.goal_state - 1, 1), (0, 0)):
        world.generator.manual_seed(state)
        new, reward, terminated = world.transition(
            {"state": torch.full((n,), state)}, torch.full((n,), action)
        )
        seen = torch.bincount(new["state"], minlength=104).double() / n
        expected = P[state, action].clone()
        expected[world.goal_state] += r[state, action]
        assert float((seen - expected).abs().max()) < 0.01
        torch.testing.assert_close(reward > 0, terminated)
        assert float(reward.mean()) == pytest.approx(float(r[state, action]), abs=0.01)


def test_moves_are_up_right_down_left() -> None:
    world = FourRooms(1, slip=0.0)
    middle = world.cells.index((2, 2))
    assert [world.cells[i] for i in world.next[middle].tolist()] == [(1, 2), (2, 3), (3, 2), (2, 1)]
    assert world.next[world.cells.index((1, 1)), 0] == world.cells.index((1, 1))


def test_the_point_moves_as_written() -> None:
    world = PointMaze2D(1)
    state = {
        "position": torch.tensor([[1.5, 3.5]]).double(),
        "velocity": torch.tensor([[0.5, -0.2]]).double(),
    }
    new, reward, terminated = world.transition(state, torch.tensor([[1.0, 2.0]]))
    # v = (0.45 + 0.1, -0.18 + 0.1): the second component of the action is clipped to 1.
    torch.testing.assert_close(new["velocity"], torch.tensor([[0.55, -0.08]]).double())
    torch.testing.assert_close(new["position"], torch.tensor([[1.61, 3.484]]).double())
    assert not bool(terminated)
    assert float(reward) == 0.0


def test_walls_stop_one_coordinate() -> None:
    world = PointMaze2D(1)
    # Below x = 1 there is wall: the move in x is undone and stops, that in y goes on.
    state = {
        "position": torch.tensor([[1.05, 3.5]]).double(),
        "velocity": torch.tensor([[-1.0, 0.5]]).double(),
    }
    new, *_ = world.transition(state, torch.tensor([[-1.0, 0.0]]))
    torch.testing.assert_close(new["position"], torch.tensor([[1.05, 3.59]]).double())
    torch.testing.assert_close(new["velocity"], torch.tensor([[0.0, 0.45]]).double())


def test_reaching_the_goal_ends_with_reward_one() -> None:
    world = PointMaze2D(2)
    goal = world.goal
    state = {
        "position": torch.stack([goal + 0.3, goal + torch.tensor([0.0, 0.6])]),
        "velocity": torch.zeros(2, 2).double(),
    }
    _, reward, terminated = world.transition(state, torch.zeros(2, 2))
    assert reward.tolist() == [1.0, 0.0]
    assert terminated.tolist() == [True, False]


@pytest.mark.parametrize(("layout", "size"), [("umaze", (5, 5)), ("medium", (8, 8)), ("large", (9, 12))])
def test_every_layout_can_be_solved(layout: str, size: tuple[int, int]) -> None:
    world = PointMaze2D(20, layout=layout)
    assert world.free.shape == size
    assert distances(world.free, world.goal_cell)[world.start_cell] > 0
    assert mean_return(world, noisy(waypoint(world), 0.2), 20, 0) > 0.9
    assert LAYOUTS[layout].count("S") == LAYOUTS[layout].count("G") == 1


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'umaze'"):
        PointMaze2D(layout="umase")
    with pytest.raises(ConfigError, match="probability"):
        FourRooms(slip=2.0)
    with pytest.raises(ConfigError, match="corner"):
        FourRooms(start="middle")
