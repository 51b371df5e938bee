"""One very large population of a linear-quadratic team game, spread over Ray actors.

A block of agents (see `blocks`) returns two small sums a step, of x and of x x'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mobula.envs.meanfield.blocks import BLOCK, Spread, generator, sizes
from mobula.envs.meanfield.lq_teams import LQTeams, root
from mobula.errors import ConfigError


class Blocks:
    """The agents of some blocks of a population: advances them, returns the sums of x and of x x' of each block."""

    def __init__(self, blocks: Sequence[tuple[int, int]], teams: LQTeams, K: Tensor, seed: int) -> None:
        """blocks: (index, agents) of each."""
        self.teams, self.blocks, self.seed = teams, list(blocks), seed
        games = teams.games
        self.closed = games.A[0] - (games.B[0] @ K[0]).sum(0)
        self.own = root(teams.noise[0])
        begin = root(teams.start_cov)
        self.x = [
            teams.start_mean + self._normal(index, 0, agents) @ begin.mT for index, agents in self.blocks
        ]

    def _normal(self, block: int, step: int, agents: int) -> Tensor:
        g = generator(self.seed, block, step)
        return torch.randn(agents, self.teams.start_mean.shape[0], dtype=torch.float64, generator=g)

    def sums(self) -> list[tuple[Tensor, Tensor]]:
        """(sum of x [n], sum of x x' [n, n]) of each block."""
        return [(x.sum(0), x.mT @ x) for x in self.x]

    def step(self, t: int, mean: Tensor, carried: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Moves every agent from t to t + 1, given the mean at t and the next mean without idiosyncratic noise; then `sums`."""
        for k, (index, agents) in enumerate(self.blocks):
            noise = self._normal(index, t + 1, agents) @ self.own.mT
            self.x[k] = (self.x[k] - mean) @ self.closed[t].mT + carried + noise
        return self.sums()


def play_sharded(
    teams: LQTeams, K: Tensor, agents: int, *, actors: int = 0, seed: int = 0, block: int = BLOCK
) -> dict[str, Tensor]:
    """One play of `agents` agents (every population of that size) under the gains K [2, N, T, p, n].

    actors  Ray actors that share the blocks; 0: this process.  Returns {"means" [T + 1, n], "covariances" [T + 1, n, n] (of the
    deviations), "costs" [N]}, the same to the last bit for any number of actors.
    """
    if agents < 2:
        raise ConfigError(
            f"a population of {agents} agents has no deviation from its mean: at least 2 are needed"
        )
    games, horizon = teams.games, teams.games.horizon
    spread = Spread(Blocks, sizes(agents, block), actors, teams, K, seed)

    def gather(name: str, *args: Any) -> tuple[Tensor, Tensor]:
        parts = spread.call(name, *args)
        first, second = (torch.stack(x).sum(0) / agents for x in zip(*parts, strict=True))
        return first, second - torch.outer(first, first)

    g = torch.Generator().manual_seed(seed)
    common = root(teams.noise[1])
    mean, cov = gather("sums")
    means, covs = [mean], [cov]
    costs = torch.zeros(games.players, dtype=torch.float64)
    for t in range(horizon + 1):
        costs += (games.Q[0, :, t] * cov).sum((-2, -1)) + mean @ games.Q[1, :, t] @ mean
        if t == horizon:
            break
        inputs = K[0, :, t] @ cov @ K[0, :, t].mT
        u = -K[1, :, t] @ mean
        costs += torch.einsum("ijpq,jpq->i", games.R[0, :, :, t], inputs)
        costs += torch.einsum("ijpq,jp,jq->i", games.R[1, :, :, t], u, u)
        shock = common @ torch.randn(len(mean), dtype=torch.float64, generator=g)
        carried = games.A[1, t] @ mean + torch.einsum("jnp,jp->n", games.B[1, :, t], u) + shock
        mean, cov = gather("step", t, mean, carried)
        means.append(mean)
        covs.append(cov)
    spread.close()
    return {"means": torch.stack(means), "covariances": torch.stack(covs), "costs": costs}
