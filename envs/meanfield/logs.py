"""Logs of sampled agents of a mean-field game: simulation, and reading and writing them as Parquet.

Nobody observes edges: a log holds what each agent did, saw and earned, and its label where that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
import torch
from torch import Tensor

from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.graphon import FiniteMFG, Graphon
from mobula.errors import ConfigError, DataError
from mobula.files import replaced_folder
from mobula.metrics import gather

CONTINUUM_CELLS = 200


class Episodes:
    """What logs with columns [L, H, N, ...] have in common: state, action, reward, next_state, and labels [N] or None."""

    state: Tensor
    labels: Tensor | None

    @property
    def episodes(self) -> int:
        return self.state.shape[0]

    @property
    def horizon(self) -> int:
        return self.state.shape[1]

    @property
    def agents(self) -> int:
        return self.state.shape[2]

    def select(self, episodes: Any) -> Self:
        """Some episodes of them."""
        return self._mapped(lambda name: getattr(self, name)[episodes])

    def step(self, h: int) -> Self:
        """Step h alone."""
        return self._mapped(lambda name: getattr(self, name)[:, h : h + 1])

    def hidden(self) -> Self:
        """The same logs without the labels."""
        return self._with(labels=None)

    def joined(self, other: Self) -> Self:
        """The episodes of both; the agents are the same."""
        return self._mapped(lambda name: torch.cat([getattr(self, name), getattr(other, name)]))

    def _mapped(self, f: Callable[[str], Tensor]) -> Self:
        return self._with(**{name: f(name) for name in ("state", "action", "reward", "next_state")})

    def _with(self, **columns: Any) -> Self:
        return replace(self, **columns)  # type: ignore[type-var]


@dataclass(frozen=True)
class Logs(Episodes):
    """state, action, next_state [L, H, N] int64 and reward [L, H, N] float64 of N agents in L episodes of H steps.

    labels  [N] in [0, 1], or None where the positions of the agents are unknown
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    states: int
    actions: int
    labels: Tensor | None = None


def positions(N: int) -> Tensor:
    """Labels (i - 1/2) / N of N agents; raises ConfigError below two of them."""
    if N < 2:
        raise ConfigError(f"{N} agents have no neighbours: at least 2 are needed")
    return graphon.cells(N)


def simulate(
    game: FiniteMFG,
    graphon_: Graphon,
    N: int,
    L: int,
    *,
    population: str = "finite",
    seed: int = 0,
    policy: Tensor | None = None,
    workers: int = 0,
    first: int = 0,
) -> Logs:
    """Logs of N agents at the labels (i - 1/2) / N in L episodes of exploration.

    Every episode draws its initial law from a flat Dirichlet and, for each h, action probabilities that are common to all states
    from another (uniform on [0, 1] for two actions): without variation of z across agents and episodes no graphon can be
    estimated.  With a policy [M, H, S, A], its probabilities are mixed in, half and half.

    population  "finite": the N agents are everybody, agent i meets z^i = 1 / (N - 1) sum_{j != i} W(xi_i, xi_j) delta_{s_j}
                "continuum": z is the flow on 200 cells, and the N agents are independent draws given it
    seed, first an episode's numbers depend on the seed and on its index (counted from `first`) alone
    workers     Ray tasks that share the episodes (0: this process); the logs are the same
    """
    labels = positions(N)
    if population not in ("finite", "continuum"):
        raise ConfigError(f"population is {population!r}; it is 'finite' or 'continuum'")
    indices = list(range(first, first + L))
    if workers == 0:
        state, action, reward, following = _episodes(
            game, graphon_, labels, indices, population, seed, policy
        )
    else:
        task = ray.remote(num_cpus=1)(_episodes)
        shares = [indices[i::workers] for i in range(min(workers, L))]
        answers = gather(
            [task.remote(game, graphon_, labels, s, population, seed, policy) for s in shares], "episodes"
        )
        order = torch.tensor([i for share in shares for i in share]).argsort()
        state, action, reward, following = (
            torch.cat(columns)[order] for columns in zip(*answers, strict=True)
        )
    return Logs(state, action, reward, following, game.states, game.actions, labels)


def _episodes(
    game: FiniteMFG,
    graphon_: Graphon,
    labels: Tensor,
    indices: Sequence[int],
    population: str,
    seed: int,
    policy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    L, N, H, S, A = len(indices), len(labels), game.horizon, game.states, game.actions
    # One stream an episode: laws first, so that they do not depend on the number of agents.
    laws, actions, uniforms = [], [], []
    for index in indices:
        word = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        g = torch.Generator().manual_seed(int(word >> 1))
        laws.append(-torch.rand(S, dtype=torch.float64, generator=g).clamp_min(1e-300).log())
        actions.append(-torch.rand(H, A, dtype=torch.float64, generator=g).clamp_min(1e-300).log())
        uniforms.append(torch.rand(2 * H + 1, N, dtype=torch.float64, generator=g))
    law = torch.stack(laws)
    law = law / law.sum(-1, keepdim=True)
    explore = torch.stack(actions)
    explore = explore / explore.sum(-1, keepdim=True)
    u = torch.stack(uniforms)
    cells = graphon.cells(N if population == "finite" else CONTINUUM_CELLS)
    W = graphon.matrix(graphon_, labels if population == "finite" else cells)
    if population == "finite":
        W = W - torch.diag(torch.diagonal(W))
    at_cells = _behaviour(explore, policy, cells, S)
    own = at_cells if population == "finite" else _behaviour(explore, policy, labels, S)
    # The cell whose flow an agent meets in the continuum.
    nearest = (labels * len(cells)).long().clamp_max(len(cells) - 1)
    state = _draw(law.unsqueeze(1).expand(L, N, S), u[:, 0])
    mu = law.unsqueeze(1).expand(L, len(cells), S)
    one = torch.eye(S, dtype=torch.float64)
    rows: list[list[Tensor]] = [[], [], [], []]
    for h in range(H):
        if population == "finite":
            z = W @ one[state] / (N - 1)
            P, r = game.model(h, z)
        else:
            P_cells, r_cells = game.model(h, W @ mu / len(cells))
            joint = mu.unsqueeze(-1) * at_cells[:, h]
            mu = torch.einsum("lmsa,lmsat->lmt", joint, P_cells)
            P, r = P_cells[:, nearest], r_cells[:, nearest]
        pick = state[..., None, None].expand(L, N, 1, A)
        action = _draw(own[:, h].gather(2, pick).squeeze(2), u[:, 2 * h + 1])
        e, i = torch.arange(L)[:, None], torch.arange(N)[None]
        following = _draw(P[e, i, state, action], u[:, 2 * h + 2])
        for column, value in zip(rows, (state, action, r[e, i, state, action], following), strict=True):
            column.append(value)
        state = following
    found = [torch.stack(column, 1) for column in rows]
    return found[0], found[1], found[2], found[3]


def _behaviour(explore: Tensor, policy: Tensor | None, labels: Tensor, states: int) -> Tensor:
    """Action probabilities [L, H, labels, S, A]: exploration [L, H, A], or half of it and half of a policy [M, H, S, A]."""
    L, H, A = explore.shape
    shared = explore[:, :, None, None].expand(L, H, len(labels), states, A)
    if policy is None:
        return shared
    cell = (labels * policy.shape[0]).long().clamp_max(policy.shape[0] - 1)
    return 0.5 * shared + 0.5 * policy[cell].transpose(0, 1)


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draws [...] from laws p [..., K] with uniforms u [...]."""
    return (u.unsqueeze(-1) > p.cumsum(-1)[..., :-1]).sum(-1)


# Files -------------------------------------------------------------------------------------------------------


def save_logs(logs: Logs, path: str | Path) -> Path:
    """Writes the logs as one Parquet file, a row for every (episode, agent, h)."""
    columns = {
        "state": logs.state,
        "action": logs.action,
        "next_state": logs.next_state,
        "reward": logs.reward,
    }
    return write_columns(columns, logs.labels, path)


def write_columns(values: Mapping[str, Tensor], labels: Tensor | None, path: str | Path) -> Path:
    """Writes columns [L, H, N] (and labels [N]) as one Parquet file, which is there whole or not at all."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    L, H, N = values["reward"].shape
    episode, h, agent = torch.meshgrid(torch.arange(L), torch.arange(H), torch.arange(N), indexing="ij")
    columns = {"episode": episode, "agent": agent, "h": h, **values}
    if labels is not None:
        columns["label"] = labels.expand(L, H, N)
    table = pa.table({name: value.flatten().numpy() for name, value in columns.items()})
    path = Path(path)
    with replaced_folder(path.with_name(path.name + ".writing")) as folder:
        pq.write_table(table, folder / path.name)
    made = path.with_name(path.name + ".writing") / path.name
    made.replace(path)
    made.parent.rmdir()
    return path


def load_logs(path: str | Path) -> Logs:
    """Logs from a Parquet file with the columns episode, agent, h, state, action, reward, next_state and perhaps label.

    Raises DataError where a column is missing, a number is not finite or out of range, there are fewer than two agents, episodes
    have unequal sets of agents or steps, or an agent's label changes.
    """
    found = read_columns(Path(path), {"state": 1, "action": 1, "next_state": 1}, whole=True)
    state, action, following = (found[name].squeeze(-1).long() for name in ("state", "action", "next_state"))
    return Logs(
        state,
        action,
        found["reward"],
        following,
        int(max(state.max(), following.max())) + 1,
        int(action.max()) + 1,
        found.get("label"),
    )


def read_columns(path: Path, sizes: Mapping[str, int], whole: bool) -> dict[str, Tensor]:
    """{state, action, next_state [L, H, N, d], reward [L, H, N], label [N] where there is one} of a Parquet file, agents by label.

    sizes  numbers of each of the three: columns `name`, or `name_0`, `name_1`, ... where there are several
    whole  whether these are whole numbers from 0
    Raises DataError as `load_logs` does.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    names = {name: [name] if d == 1 else [f"{name}_{k}" for k in range(d)] for name, d in sizes.items()}
    wanted = ["episode", "agent", "h", "reward", *(column for each in names.values() for column in each)]
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from error
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}"
        )
    data = {}
    for name in (*wanted, *(["label"] if "label" in table.column_names else [])):
        try:
            data[name] = table.column(name).to_numpy().astype(np.float64)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: the column {name} holds no numbers: {error}") from error
        if not np.isfinite(data[name]).all():
            raise DataError(f"{path}: the column {name} has an empty, infinite or NaN entry")
    for name in ("h", *(column for each in names.values() for column in each)) if whole else ("h",):
        if len(data[name]) == 0 or (data[name] != data[name].round()).any() or data[name].min() < 0:
            more = "; for continuous states set game=logs" if name in ("state", "next_state") else ""
            raise DataError(f"{path}: the column {name} must hold whole numbers from 0{more}")
    axes = [np.unique(data[name], return_inverse=True) for name in ("episode", "h", "agent")]
    L, H, N = (len(values) for values, _ in axes)
    if N < 2:
        raise DataError(f"{path} has {N} agent: neighbours are needed, at least 2 agents")
    flat = np.ravel_multi_index(tuple(index for _, index in axes), (L, H, N))
    count = np.bincount(flat, minlength=L * H * N).reshape(L, H, N)
    if not (count == 1).all():
        e, h, i = np.argwhere(count != 1)[0]
        raise DataError(
            f"{path}: episodes of unequal agent sets: episode {axes[0][0][e]:g} has {count[e, h, i]} rows of agent"
            f" {axes[2][0][i]:g} at h={axes[1][0][h]:g}; every episode needs one row of every agent and h"
        )
    order = np.argsort(flat)

    def column(name: str) -> Tensor:
        return torch.from_numpy(data[name][order].reshape(L, H, N).copy())

    labels = None
    if "label" in data:
        values = column("label")
        if float(values.min()) < 0 or float(values.max()) > 1:
            raise DataError(
                f"{path}: labels lie in [0, 1]; these go from {float(values.min()):g} to {float(values.max()):g}"
            )
        if bool((values != values[:1, :1]).any()):
            raise DataError(f"{path}: the label of an agent changes between rows")
        labels = values[0, 0]
        by_label = labels.argsort(stable=True)
    else:
        by_label = torch.arange(N)
    answer = {
        name: torch.stack([column(each) for each in columns], -1)[..., by_label, :]
        for name, columns in names.items()
    }
    answer["reward"] = column("reward")[..., by_label]
    return answer if labels is None else {**answer, "label": labels[by_label]}
