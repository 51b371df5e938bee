"""Agents with continuous states and actions: their logs, and a linear crowd that makes such logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.graphon import Graphon
from mobula.envs.meanfield.logs import Episodes, positions, read_columns, write_columns
from mobula.errors import ConfigError, DataError


@dataclass(frozen=True)
class ContinuousLogs(Episodes):
    """state, next_state [L, H, N, d], action [L, H, N, p], reward [L, H, N], float64, of N agents in L episodes of H steps.

    labels  [N] in [0, 1], or None where the positions of the agents are unknown
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class LinearCrowd:
    """s' = a s + b z + c u + noise N(0, 1), z^i = 1 / (N - 1) sum_{j != i} W(xi_i, xi_j) s^j; r = -track (s - z)^2 - effort u^2."""

    a: float = 0.5
    b: float = 1.0
    c: float = 0.5
    noise: float = 0.1
    track: float = 1.0
    effort: float = 0.1


def simulate_linear(
    crowd: LinearCrowd, graphon_: Graphon, N: int, L: int, H: int, *, seed: int = 0
) -> ContinuousLogs:
    """Logs of a whole population of N agents at labels (i - 1/2) / N, who explore.

    Every episode draws a profile of initial states over the labels, g_0 + g_1 cos(pi x) + g_2 cos(2 pi x) with g ~ N(0, 1), and for
    each h probabilities of the actions -1, 0, 1 that all agents share, from a flat Dirichlet: z must vary between agents and
    episodes, or no graphon can be estimated.  An episode's numbers depend on the seed and on its index alone.
    """
    labels = positions(N)
    W = graphon.matrix(graphon_, labels)
    W = W - torch.diag(torch.diagonal(W))
    wave = torch.cos(torch.pi * torch.arange(3)[:, None] * labels)
    actions = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    starts, pushes, shocks = [], [], []
    for episode in range(L):
        rng = np.random.default_rng([seed, episode])
        starts.append(
            torch.from_numpy(rng.normal(size=3)) @ wave + 0.3 * torch.from_numpy(rng.normal(size=N))
        )
        law, u = rng.dirichlet(np.ones(3), H), rng.random((H, N))
        pushes.append(actions[torch.from_numpy((u[..., None] > law.cumsum(1)[:, None, :-1]).sum(-1))])
        shocks.append(torch.from_numpy(rng.normal(size=(H, N))))
    state, push, shock = torch.stack(starts), torch.stack(pushes), torch.stack(shocks)
    states, rewards = [state], []
    for h in range(H):
        z = state @ W / (N - 1)
        rewards.append(-crowd.track * (state - z).square() - crowd.effort * push[:, h].square())
        state = crowd.a * state + crowd.b * z + crowd.c * push[:, h] + crowd.noise * shock[:, h]
        states.append(state)
    path = torch.stack(states, 1).unsqueeze(-1)
    return ContinuousLogs(path[:, :-1], push.unsqueeze(-1), torch.stack(rewards, 1), path[:, 1:], labels)


def save_continuous_logs(logs: ContinuousLogs, path: str | Path) -> Path:
    """Writes the logs as one Parquet file: columns state, action, next_state, or state_0, state_1, ... where there are several."""
    columns = {"reward": logs.reward}
    for name in ("state", "action", "next_state"):
        value: Tensor = getattr(logs, name)
        one = value.shape[-1] == 1
        columns |= {name if one else f"{name}_{k}": value[..., k] for k in range(value.shape[-1])}
    return write_columns(columns, logs.labels, path)


def load_continuous_logs(path: str | Path) -> ContinuousLogs:
    """Logs that `save_continuous_logs` wrote, or others with those columns.  Raises DataError as `load_logs` does."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    path = Path(path)
    try:
        names = set(pq.read_schema(path).names)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from error

    def size(name: str) -> int:
        count = 0
        while f"{name}_{count}" in names:
            count += 1
        return 1 if name in names else max(count, 1)

    d = size("state")
    found = read_columns(path, {"state": d, "action": size("action"), "next_state": d}, whole=False)
    return ContinuousLogs(
        found["state"], found["action"], found["reward"], found["next_state"], found.get("label")
    )


@dataclass(frozen=True)
class Bins:
    """A line of states cut into B bins: edges [B + 1], of which the outer two stand for infinity; actions [A, p]; law [B] at h = 0."""

    edges: Tensor
    actions: Tensor
    law: Tensor

    @property
    def centres(self) -> Tensor:
        """[B, 1]."""
        return (0.5 * (self.edges[1:] + self.edges[:-1])).unsqueeze(-1)

    def of(self, state: Any) -> Tensor:
        """The bin [...] of states [...]."""
        return torch.bucketize(torch.as_tensor(state, dtype=torch.float64), self.edges[1:-1], right=True)


MOST_ACTIONS = 20


def bins(logs: ContinuousLogs, count: int) -> Bins:
    """`count` equal bins over the range of the states, the actions that occur, and where episodes begin.

    Raises ConfigError where states have several dimensions or there are more than 20 different actions: tables cannot hold a policy.
    """
    d = logs.state.shape[-1]
    tail = (
        "; such logs can be estimated (`estimation.learn`), but a policy for the estimate would need networks over continuous states"
        " and actions, which gmfg_ppo does not have"
    )
    if d != 1:
        raise ConfigError(f"a game on bins needs states of one dimension; these have {d}{tail}")
    actions = logs.action.flatten(0, 2).unique(dim=0)
    if len(actions) > MOST_ACTIONS:
        raise ConfigError(
            f"a game on bins needs at most {MOST_ACTIONS} different actions; these logs have {len(actions)}{tail}"
        )
    every = torch.cat([logs.state.flatten(), logs.next_state.flatten()])
    low, high = float(every.min()), float(every.max())
    if not high > low:
        raise DataError("all states of the logs are the same: there is nothing to cut into bins")
    edges = torch.linspace(low, high, count + 1, dtype=torch.float64)
    cut = Bins(edges, actions, torch.empty(0))
    law = torch.bincount(cut.of(logs.state[:, 0].flatten()), minlength=count).double()
    return Bins(edges, actions, law / law.sum())
