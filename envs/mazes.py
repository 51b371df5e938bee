"""Mazes of offline learning: a point with inertia among walls (`PointMaze2D`) and the tabular `FourRooms`."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mobula.errors import ConfigError, nearest
from mobula.sampling.tensor_env import State, TensorEnv

LAYOUTS = {
    "umaze": "#####/#G  #/### #/#S  #/#####",
    "medium": "########/#S ##  #/#  #   #/##   ###/#  #   #/# #  # #/#   # G#/########",
    "large": (
        "############/#S   #     #/# ## # # # #/#      #   #/# #### ### #/#  # #     #/## # # # ###/#  #   # G #"
        "/############"
    ),
}
"""Rows of unit cells, "/" between them: "#" wall, "S" start cell, "G" goal cell (walls: D4RL's maze2d)."""

FOUR_ROOMS = """#############
#     #     #
#     #     #
#           #
#     #     #
#     #     #
## ####     #
#     ### ###
#     #     #
#     #     #
#           #
#     #     #
#############"""


def distances(free: np.ndarray[Any, Any], goal: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Steps from every cell to `goal` (row, column) through free cells [rows, columns]; -1 where there is no way."""
    found = np.full(free.shape, -1)
    found[goal] = 0
    queue = deque([goal])
    while queue:
        row, column = queue.popleft()
        for near in ((row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)):
            if free[near] and found[near] < 0:
                found[near] = found[row, column] + 1
                queue.append(near)
    return found


class PointMaze2D(TensorEnv):
    """A point with inertia in a maze: reward 1 within 0.5 of the goal, which ends the episode, else 0.

    Observation (x, y, v_x, v_y, goal_x, goal_y), position (column, row) in cells; action: acceleration in [-1, 1]^2.
    v <- clip(0.9 v + 0.1 a, -1, 1), then x <- x + 0.2 v_x, then y: a move into a wall is undone and stops that coordinate.
    """

    max_episode_steps = 300
    reward_range = (0.0, 1.0)
    REACH = 0.5

    def __init__(self, num_envs: int = 1, *, layout: str = "umaze", **kwargs: Any) -> None:
        """layout: umaze (5 x 5), medium (8 x 8) or large (9 x 12)."""
        if layout not in LAYOUTS:
            raise ConfigError(
                f"point_maze: no layout {layout!r}.{nearest(layout, LAYOUTS)} There are {', '.join(LAYOUTS)}."
            )
        rows = LAYOUTS[layout].split("/")
        grid = np.array([list(row) for row in rows])
        height, width = grid.shape
        high = np.array([width, height, 1, 1, width, height], dtype=np.float32)
        low = np.array([0, 0, -1, -1, 0, 0], dtype=np.float32)
        super().__init__(
            num_envs,
            observation_space=spaces.Box(low, high, dtype=np.float32),
            action_space=spaces.Box(-1.0, 1.0, (2,), dtype=np.float32),
            **kwargs,
        )
        self.layout, self.free = layout, grid != "#"
        (start,), (goal,) = np.argwhere(grid == "S").tolist(), np.argwhere(grid == "G").tolist()
        self.start_cell: tuple[int, int] = (start[0], start[1])
        self.goal_cell: tuple[int, int] = (goal[0], goal[1])
        self.wall = torch.as_tensor(~self.free, device=self.device)
        row, column = self.goal_cell
        self.goal = torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64, device=self.device)

    def initial(self, n: int) -> State:
        row, column = self.start_cell
        corner = torch.tensor([column, row], dtype=torch.float64, device=self.device)
        place = torch.rand(n, 2, generator=self.generator, dtype=torch.float64, device=self.device)
        return {"position": corner + place, "velocity": torch.zeros_like(place)}

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        push = action.double().clamp(-1.0, 1.0)
        velocity = (0.9 * state["velocity"] + 0.1 * push).clamp(-1.0, 1.0)
        (x, y), (v_x, v_y) = state["position"].unbind(1), velocity.unbind(1)
        new_x = x + 0.2 * v_x
        hit = self.wall[y.long(), new_x.long()]
        x, v_x = torch.where(hit, x, new_x), torch.where(hit, 0.0, v_x)
        new_y = y + 0.2 * v_y
        hit = self.wall[new_y.long(), x.long()]
        y, v_y = torch.where(hit, y, new_y), torch.where(hit, 0.0, v_y)
        position = torch.stack([x, y], dim=1)
        terminated = (position - self.goal).square().sum(1) <= self.REACH**2
        return (
            {"position": position, "velocity": torch.stack([v_x, v_y], dim=1)},
            terminated.float(),
            terminated,
        )

    def observe(self, state: State) -> Tensor:
        goal = self.goal.expand_as(state["position"])
        return torch.cat([state["position"], state["velocity"], goal], dim=1).float()

    def waypoints(self) -> Tensor:
        """[rows, columns, 2]: the point (x, y) to steer at from each cell, along a shortest way to the goal."""
        steps = distances(self.free, self.goal_cell)
        found = np.zeros((*steps.shape, 2))
        for row, column in np.argwhere(self.free):
            near = [(row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)]
            ahead = [cell for cell in near if steps[cell] == steps[row, column] - 1 and self.free[cell]]
            target = ahead[0] if ahead else (row, column)
            found[row, column] = target[1] + 0.5, target[0] + 0.5
        return torch.as_tensor(found, device=self.device)

    def render(self) -> Any:
        scale = 32
        frame = np.where(self.free[..., None], 235, 60).astype(np.uint8).repeat(3, 2)
        frame[self.goal_cell] = (0, 158, 115)
        image = frame.repeat(scale, axis=0).repeat(scale, axis=1)
        x, y = (self.state["position"][0].cpu().numpy() * scale).astype(int)
        image[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5] = (0, 114, 178)
        return image


class FourRooms(TensorEnv):
    """Four rooms on a 13 x 13 grid with slips: reward 1 for entering the far corner, which ends the episode.

    State: index of the 104 free cells in reading order; actions up, right, down, left; a move into a wall stays.  With
    probability `slip` the action is replaced by a uniform one.
    """

    max_episode_steps = 200
    reward_range = (0.0, 1.0)
    MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
    START, GOAL = (11, 1), (1, 11)

    def __init__(self, num_envs: int = 1, *, slip: float = 0.1, start: str = "corner", **kwargs: Any) -> None:
        """slip: 0 to 1.  start: "corner" (row 11, column 1), or "uniform" over the free cells other than the goal."""
        if not 0.0 <= slip <= 1.0:
            raise ConfigError(f"four_rooms: slip is {slip}; a probability is needed")
        if start not in ("corner", "uniform"):
            raise ConfigError(f"four_rooms: start is {start!r}; it is 'corner' or 'uniform'")
        grid = np.array([list(row) for row in FOUR_ROOMS.splitlines()])
        self.cells = [(int(row), int(column)) for row, column in np.argwhere(grid == " ")]
        index = {cell: i for i, cell in enumerate(self.cells)}
        super().__init__(
            num_envs,
            observation_space=spaces.Discrete(len(self.cells)),
            action_space=spaces.Discrete(4),
            **kwargs,
        )
        self.grid, self.slip = grid, slip
        self.start_state, self.goal_state = index[self.START], index[self.GOAL]
        self.next = torch.tensor(
            [
                [index.get((row + down, column + right), i) for down, right in self.MOVES]
                for i, (row, column) in enumerate(self.cells)
            ],
            device=self.device,
        )
        others = [i for i in range(len(self.cells)) if i != self.goal_state]
        self.starts = torch.tensor([self.start_state] if start == "corner" else others, device=self.device)

    def initial(self, n: int) -> State:
        drawn = torch.randint(len(self.starts), (n,), generator=self.generator, device=self.device)
        return {"state": self.starts[drawn]}

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        old = state["state"]
        uniform = torch.rand(len(old), 2, generator=self.generator, dtype=torch.float64, device=self.device)
        other = (uniform[:, 1] * 4).long()
        new = self.next[old, torch.where(uniform[:, 0] < self.slip, other, action)]
        terminated = new == self.goal_state
        return {"state": new}, terminated.float(), terminated

    def observe(self, state: State) -> Tensor:
        return state["state"]

    def model(self) -> tuple[Tensor, Tensor]:
        """(P [S, A, S], r [S, A]), float64; nothing follows the goal: its rows are 0."""
        S = len(self.next)
        moves = torch.nn.functional.one_hot(self.next, S).double()
        P = (1 - self.slip) * moves + self.slip * moves.mean(1, keepdim=True)
        r = P[..., self.goal_state].clone()
        P[self.goal_state] = 0.0
        r[self.goal_state] = 0.0
        P[..., self.goal_state] = 0.0
        return P, r

    def render(self) -> Any:
        frame = np.where((self.grid == "#")[..., None], 60, 235).astype(np.uint8).repeat(3, 2)
        frame[self.GOAL] = (0, 158, 115)
        frame[self.cells[int(self.state["state"][0])]] = (0, 114, 178)
        return frame.repeat(24, axis=0).repeat(24, axis=1)
