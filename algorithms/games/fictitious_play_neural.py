"""Fictitious play with networks in place of tables: PPO steps against the opponent's last snapshot.

The structure is that of `fictitious_play_po`: both players update from the episodes of one frozen pair, policies read the own
state, rewards carry a bonus in the player's own favour.  The reach of the opponent's component enters by sampling: an advantage
is averaged over the opponent's states as often as they come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mobula.algorithms.games.fictitious_play_po import Play, Trajectories, bonuses
from mobula.learning.batched import BatchedMLP, generators


def clipped_surrogate(log_p: Tensor, old_log_p: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip) A), elementwise, rho = p / p_old (PPO, Schulman et al. 2017, eq. 7)."""
    ratio = (log_p - old_log_p).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def own_rewards(play: Play, seen: Trajectories) -> tuple[Tensor, Tensor]:
    """What each player's return is made of, [N, m, H]: r + beta for player 1, beta - r for player 2.

    beta is the sum of the count bonuses at the visited steps.
    """
    reward, moving = bonuses(play.counts, play.factored, play._horizon(), play.delta, play.scale)
    N, _, H = seen.a.shape
    rows, h = torch.arange(N)[:, None, None], torch.arange(H)
    i, j = seen.i[..., :-1], seen.j[..., :-1]
    beta = moving[0][rows, h, i, seen.a]
    if play.factored:
        beta = beta + moving[1][rows, h, j, seen.b] + reward[rows, h, i, j, seen.a, seen.b]
    else:
        beta = beta + reward[rows, h, i, seen.a, seen.b]
    return seen.reward + beta, beta - seen.reward


class NeuralPlay(Play):
    """`Play` with a policy and a value network a player and instance; `mu`, `nu` are the networks' policies at every state.

    clip, lr, epochs  of PPO; hidden: widths; seeds: of the networks, one an instance
    """

    def __init__(
        self,
        *args: Any,
        clip: float = 0.2,
        lr: float = 3e-4,
        epochs: int = 10,
        hidden: tuple[int, ...] = (64, 64),
        seeds: tuple[int, ...] = (0,),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        N, H = self.mu.shape[:2]
        self.clip, self.epochs = clip, epochs
        streams = generators(seeds)
        joint = self.mu.shape[2] + (self.nu.shape[2] if self.factored else 0)
        self.policies, self.values = [], []
        for table in (self.mu, self.nu):
            self.policies.append(
                BatchedMLP(N, [H + table.shape[2], *hidden, table.shape[3]], streams, last_gain=0.01)
            )
            self.values.append(BatchedMLP(N, [H + joint, *hidden, 1], streams, last_gain=1.0))
        networks = [*self.policies, *self.values]
        self.optimizer = torch.optim.Adam([p for net in networks for p in net.parameters()], lr=lr)
        self._tabulate()

    @torch.no_grad()
    def _tabulate(self) -> None:
        found = []
        for table, net in zip((self.mu, self.nu), self.policies, strict=True):
            N, H, S, A = table.shape
            h, s = torch.meshgrid(torch.arange(H), torch.arange(S), indexing="ij")
            logits = net(_one_hot((h.flatten(), H), (s.flatten(), S)).unsqueeze(0))
            found.append(logits.double().softmax(-1).reshape(N, H, S, A))
        self.mu, self.nu = found

    def _update(self, seen: Trajectories) -> None:
        N, m, H = seen.a.shape
        i, j = seen.i[..., :-1].reshape(N, -1), seen.j[..., :-1].reshape(N, -1)
        h = torch.arange(H).expand(N, m, H).reshape(N, -1)
        S1, S2 = self.mu.shape[2], self.nu.shape[2]
        joint = ((i, S1), (j, S2)) if self.factored else ((i, S1),)
        where = _one_hot((h, H), *joint)
        jobs = []
        for player, reward in enumerate(own_rewards(self, seen)):
            # Player 2 of a single controller does not move the state: her action earns its own step alone.
            myopic = player == 1 and not self.factored
            ahead = reward if myopic else reward.flip(-1).cumsum(-1).flip(-1)
            gain = ahead.reshape(N, -1).float()
            own, action = ((i, S1), seen.a) if player == 0 else ((j, S2), seen.b)
            features = _one_hot((h, H), own)
            chosen = action.reshape(N, -1, 1)
            with torch.no_grad():
                old = self.policies[player](features).log_softmax(-1).gather(-1, chosen).squeeze(-1)
                advantage = gain - self.values[player](where).squeeze(-1)
                spread = advantage.std(1, correction=0, keepdim=True)
                advantage = (advantage - advantage.mean(1, keepdim=True)) / (spread + 1e-4)
            jobs.append((player, features, chosen, old, advantage, gain))
        for _ in range(self.epochs):
            loss = torch.zeros(())
            for player, features, chosen, old, advantage, gain in jobs:
                log_p = self.policies[player](features).log_softmax(-1).gather(-1, chosen).squeeze(-1)
                surrogate = clipped_surrogate(log_p, old, advantage, self.clip)
                error = (self.values[player](where).squeeze(-1) - gain).square()
                # Means over the steps of an instance, sums over instances: they do not share a parameter.
                loss = loss + (surrogate + 0.5 * error).mean(1).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self._tabulate()
        self.bounds = torch.stack(
            [-self._start_value(1, where), self._start_value(0, where)]
            if self.factored
            else [self.bounds[0], self._start_value(0, where)]
        )

    @torch.no_grad()
    def _start_value(self, player: int, where: Tensor) -> Tensor:
        """The value network at the start, [N] (the first row of every instance is the start of an episode)."""
        return self.values[player](where[:, :1]).double()[:, 0, 0]

    def _restart(self) -> None:
        """Networks are not restarted with an epoch of the schedule: its horizon scales the bonuses alone."""

    def state_dict(self) -> dict[str, Any]:
        networks = [net.state_dict() for net in (*self.policies, *self.values)]
        return super().state_dict() | {
            "networks": [{k: v.clone() for k, v in net.items()} for net in networks],
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for net, values in zip((*self.policies, *self.values), state["networks"], strict=True):
            net.load_state_dict(values)
        self.optimizer.load_state_dict(state["optimizer"])


def _one_hot(*parts: tuple[Tensor, int]) -> Tensor:
    """One-hot columns of several indices side by side: each (index [...], size) -> [..., sum of sizes]."""
    return torch.cat([torch.nn.functional.one_hot(index, size).float() for index, size in parts], -1)
