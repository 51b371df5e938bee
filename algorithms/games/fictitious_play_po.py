"""Optimistic fictitious-play policy optimisation for zero-sum Markov games with structured transitions.

Qiu, Wei, Ye, Wang, Yang; ICML 2021, arXiv 2207.12463.  Both players learn at once in an unknown game.  Each makes one step of
exponentiated gradient an episode against the other's policy of that episode, with estimates from counts: optimistic for
player 1 (who maximises), pessimistic in value and so optimistic for herself for player 2.  No equilibrium is ever solved.

Setting I, factored transitions: each player moves a component of her own; policies read it.
Setting II, single controller: player 1 alone moves the state.

Steps are counted h = 0 .. H - 1 here, so that a value at h is at most H - h.  All tensors are float64 with leading axes for
instances (seeds); K episodes are the only loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mobula.envs.games import exact, tabular
from mobula.envs.games.tabular import FactoredGame, Game, SingleControllerGame
from mobula.errors import ConfigError, DataError
from mobula.learning.learners import Learner
from mobula.learning.modules import TensorModule
from mobula.method import Method, MethodConfig, hyperparameter
from mobula.metrics import gather

# Estimates from counts -------------------------------------------------------------------------------------


@dataclass
class Counts:
    """Visits and sums of rewards over (h, state, a, b), and of the transitions of each moving component.

    rewards, visits: shape of the game's r.  moves: one tensor a component, shape of its P.
    """

    visits: Tensor
    rewards: Tensor
    moves: list[Tensor]

    @staticmethod
    def of(game: Game) -> Counts:
        """No visits yet."""
        tables = [game.P1, game.P2] if isinstance(game, FactoredGame) else [game.P]
        return Counts(
            torch.zeros_like(game.r), torch.zeros_like(game.r), [torch.zeros_like(P) for P in tables]
        )

    def add(self, seen: Trajectories) -> None:
        """Counts every step of the episodes, in place."""
        N, m, H = seen.a.shape
        rows, h = torch.arange(N)[:, None, None].expand(N, m, H), torch.arange(H).expand(N, m, H)
        i, j, new_i, new_j = seen.i[..., :-1], seen.j[..., :-1], seen.i[..., 1:], seen.j[..., 1:]
        factored = len(self.moves) == 2
        where = (rows, h, i, j, seen.a, seen.b) if factored else (rows, h, i, seen.a, seen.b)
        one = torch.ones_like(seen.reward)
        self.visits.index_put_(where, one, accumulate=True)
        self.rewards.index_put_(where, seen.reward, accumulate=True)
        self.moves[0].index_put_((rows, h, i, seen.a, new_i), one, accumulate=True)
        if factored:
            self.moves[1].index_put_((rows, h, j, seen.b, new_j), one, accumulate=True)

    def model(self) -> tuple[Tensor, list[Tensor]]:
        """(mean rewards, 0 where nothing was seen; kernels, uniform where nothing was seen)."""
        r = self.rewards / self.visits.clamp_min(1.0)
        return r, [normalised(moves) for moves in self.moves]


def bonuses(
    counts: Counts, factored: bool, episodes: int, delta: float, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """(beta^r in the shape of r; beta^P of each component [..., H, S, A]), both times `scale`.

    beta^r = sqrt(4 log(S A B H K / delta) / N), S the number of joint states;
    beta^P = sqrt(2 H^2 S_c log(2 S_c A_c H K / delta) / N_c) of each component c.
    """
    shape = counts.visits.shape
    H = shape[-5] if factored else shape[-4]
    joint = math.prod(shape[-4:] if factored else shape[-3:])
    reward = (4 * math.log(joint * H * episodes / delta) / counts.visits.clamp_min(1.0)).sqrt()
    moving = []
    for moves in counts.moves:
        S, A = moves.shape[-3], moves.shape[-2]
        log = math.log(2 * S * A * H * episodes / delta)
        moving.append((2 * H**2 * S * log / moves.sum(-1).clamp_min(1.0)).sqrt())
    return scale * reward, [scale * beta for beta in moving]


# Backward recursions and gains -----------------------------------------------------------------------------------


def evaluate_factored(
    r: Tensor, P1: Tensor, P2: Tensor, mu: Tensor, nu: Tensor, bonus: Tensor
) -> tuple[Tensor, Tensor]:
    """(Q [..., H, S1, S2, A, B], V_0 [..., S1, S2]) with Q_h = clip(r + (P1 x P2) V_{h+1} + bonus, 0, H - h).

    bonus, negative for the lower estimate, has the shape of Q.  One factor is contracted at a time: the product kernel is
    never made.
    """
    H = r.shape[-5]
    V = torch.zeros_like(r[..., 0, :, :, 0, 0])
    Q = []
    for h in reversed(range(H)):
        half = torch.einsum("...iak,...kl->...ial", P1[..., h, :, :, :], V)
        ahead = torch.einsum("...jbl,...ial->...ijab", P2[..., h, :, :, :], half)
        q = (r[..., h, :, :, :, :] + ahead + bonus[..., h, :, :, :, :]).clamp(0.0, H - h)
        V = torch.einsum("...ia,...ijab,...jb->...ij", mu[..., h, :, :], q, nu[..., h, :, :])
        Q.append(q)
    return torch.stack(Q[::-1], -5), V


def evaluate_controlled(r: Tensor, P: Tensor, mu: Tensor, nu: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """(Q [..., H, S, A, B], V_0 [..., S]) with Q_h = clip(r + P V_{h+1} + bonus, 0, H - h); bonus in the shape of r."""
    H = r.shape[-4]
    V = torch.zeros_like(r[..., 0, :, 0, 0])
    Q = []
    for h in reversed(range(H)):
        ahead = torch.einsum("...sat,...t->...sa", P[..., h, :, :, :], V)
        q = (r[..., h, :, :, :] + ahead.unsqueeze(-1) + bonus[..., h, :, :, :]).clamp(0.0, H - h)
        V = torch.einsum("...sa,...sab,...sb->...s", mu[..., h, :, :], q, nu[..., h, :, :])
        Q.append(q)
    return torch.stack(Q[::-1], -4), V


def gains(
    counts: Counts,
    mu: Tensor,
    nu: Tensor,
    start: Any,
    *,
    factored: bool,
    episodes: int,
    delta: float,
    scale: float,
    weigh: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What both players' log-policies are moved along, from the pair of one episode.

    Returns (gain of player 1 [..., H, S, A], loss of player 2 [..., H, S, B], lower and upper estimate of the value at the
    start).  Setting I weighs by the reach of the opponent's component, for both; setting II by that of the state, for player 2
    alone, whose part needs no dynamic programming.  `weigh=False` replaces the reach by a constant (ablation).
    """
    r, kernels = counts.model()
    reward, moving = bonuses(counts, factored, episodes, delta, scale)
    if factored:
        bonus = reward + moving[0][..., :, :, None, :, None] + moving[1][..., :, None, :, None, :]
        P1, P2 = kernels
        upper, V_up = evaluate_factored(r, P1, P2, mu, nu, bonus)
        lower, V_low = evaluate_factored(r, P1, P2, mu, nu, -bonus)
        d1, d2 = exact.reach(P1, mu, start[0]), exact.reach(P2, nu, start[1])
        if not weigh:
            d1, d2 = torch.full_like(d1, 1 / d1.shape[-1]), torch.full_like(d2, 1 / d2.shape[-1])
        first = torch.einsum("...hj,...hijab,...hjb->...hia", d2, upper, nu)
        second = torch.einsum("...hi,...hijab,...hia->...hjb", d1, lower, mu)
        return first, second, V_low[..., start[0], start[1]], V_up[..., start[0], start[1]]
    (P,) = kernels
    upper, V_up = evaluate_controlled(r, P, mu, nu, reward + moving[0].unsqueeze(-1))
    first = torch.einsum("...hsab,...hsb->...hsa", upper, nu)
    d = exact.reach(P, mu, start)
    weight = d if weigh else torch.ones_like(d)
    low = (r - reward).clamp_min(0.0)
    second = torch.einsum("...hs,...hsab,...hsa->...hsb", weight, low, mu)
    V_low = torch.einsum("...hs,...hsab,...hsa,...hsb->...", d, low, mu, nu)
    return first, second, V_low, V_up[..., start]


def mirror_step(policy: Tensor, gain: Tensor, step: float) -> Tensor:
    """policy exp(step gain), normalised over the last axis."""
    return (policy.clamp_min(1e-300).log() + step * gain).softmax(-1)


def normalised(total: Tensor) -> Tensor:
    """Probabilities [..., A] in proportion to `total`; uniform where there is nothing."""
    mass = total.sum(-1, keepdim=True)
    return torch.where(mass > 0, total / mass.clamp_min(1e-300), 1.0 / total.shape[-1])


def step_sizes(game: Game, episodes: float, eta_mult: float, gamma_mult: float) -> tuple[float, float]:
    """(eta, gamma): sqrt(log A / (K H^2)) for both in I; in II gamma = sqrt(S log B / K)."""
    if isinstance(game, FactoredGame):
        H, A, B = game.P1.shape[-4], game.P1.shape[-2], game.P2.shape[-2]
        return tuple(  # type: ignore[return-value]
            m * math.sqrt(math.log(n) / episodes) / H for m, n in ((eta_mult, A), (gamma_mult, B))
        )
    H, S, A, B = game.r.shape[-4:]
    eta = eta_mult * math.sqrt(math.log(A) / episodes) / H
    return eta, gamma_mult * math.sqrt(S * math.log(B) / episodes)


# Play and bookkeeping ------------------------------------------------------------------------------------------


def pick(p: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draws: p [N, n], u [N] in [0, 1) -> [N]."""
    return (p.cumsum(-1) <= u.unsqueeze(-1)).sum(-1).clamp_max(p.shape[-1] - 1)


@dataclass
class Trajectories:
    """m episodes of N instances: own states of both players (of setting II the one state, twice) [N, m, H + 1], actions a, b and
    rewards [N, m, H].
    """

    i: Tensor
    j: Tensor
    a: Tensor
    b: Tensor
    reward: Tensor


def play_episodes(game: Game, mu: Tensor, nu: Tensor, u: Tensor) -> Trajectories:
    """Episodes of every instance with a frozen pair and Bernoulli rewards; u [N, m, H, 5] uniform: draws of a, b, reward, moves."""
    N, m, H = u.shape[:3]
    rows = torch.arange(N).unsqueeze(1)
    starts = game.start if isinstance(game, FactoredGame) else (game.start, game.start)
    i, j = (torch.full((N, m), s) for s in starts)
    states: list[tuple[Tensor, Tensor]] = [(i, j)]
    moves: list[tuple[Tensor, Tensor, Tensor]] = []
    for h in range(H):
        a = pick(mu[rows, h, i], u[:, :, h, 0])
        b = pick(nu[rows, h, j], u[:, :, h, 1])
        where = (rows, h, i, j, a, b) if isinstance(game, FactoredGame) else (rows, h, i, a, b)
        moves.append((a, b, (u[:, :, h, 2] < game.r[where]).double()))
        if isinstance(game, FactoredGame):
            i, j = (
                pick(game.P1[rows, h, i, a], u[:, :, h, 3]),
                pick(game.P2[rows, h, j, b], u[:, :, h, 4]),
            )
        else:
            i = j = pick(game.P[rows, h, i, a], u[:, :, h, 3])
        states.append((i, j))
    first, second = (torch.stack(parts, -1) for parts in zip(*states, strict=True))
    return Trajectories(first, second, *(torch.stack(parts, -1) for parts in zip(*moves, strict=True)))


def _played(given: tuple[Game, Tensor, Tensor], u: Tensor) -> Trajectories:
    return play_episodes(*given, u)


Rollout = Callable[[Game, Tensor, Tensor, Tensor], Trajectories]
"""What `play_episodes` is: (game, mu, nu, u) -> episodes."""


def shared_rollout(workers: int) -> Rollout:
    """`play_episodes` with the episodes shared out over Ray tasks: the same ones, for any number of tasks."""
    task: Any = ray.remote(num_cpus=1)(_played)

    def rollout(game: Game, mu: Tensor, nu: Tensor, u: Tensor) -> Trajectories:
        given = ray.put((game, mu, nu))
        parts = gather((task.remote(given, part) for part in u.chunk(workers, 1)), "workers")
        names = ("i", "j", "a", "b", "reward")
        return Trajectories(*(torch.cat([getattr(part, name) for part in parts], 1) for name in names))

    return rollout


def best_reply(game: SingleControllerGame, mu: Tensor) -> Tensor:
    """The myopic reply nu [..., H, S, B] of player 2 to mu in a single-controller game: she does not move the state."""
    loss = torch.einsum("...hsab,...hsa->...hsb", game.r, mu)
    return torch.nn.functional.one_hot(loss.argmin(-1), loss.shape[-1]).double()


class Play:
    """Both players in N instances: policies, counts, averages and hindsight.

    adversary  player 2 answers mu of the episode before with a best reply in place of learning (setting II)
    rollout    who plays the episodes: this process, or tasks (`shared_rollout`)
    episodes_per_iteration  m: episodes that are played with one pair before both players make one step, m times as long; `k`,
               `episodes` and the horizon of the bonuses count iterations
    """

    def __init__(
        self,
        game: Game,
        *,
        episodes: int | None,
        eta_mult: float = 4.0,
        gamma_mult: float | None = None,
        bonus_scale: float = 0.02,
        delta: float = 0.1,
        schedule: str = "fixed_K",
        policy_feedback: str = "observed",
        episodes_per_iteration: int = 1,
        weigh: bool = True,
        adversary: bool = False,
        rollout: Rollout = play_episodes,
    ) -> None:
        self.rollout = rollout
        self.m = episodes_per_iteration
        self.game, self.K, self.eta_mult = game, episodes, eta_mult
        self.factored = isinstance(game, FactoredGame)
        self.gamma_mult = gamma_mult if gamma_mult is not None else (4.0 if self.factored else 1.0)
        self.scale, self.delta, self.schedule = bonus_scale, delta, schedule
        self.feedback, self.weigh, self.adversary = policy_feedback, weigh, adversary
        self.counts = Counts.of(game)
        if isinstance(game, FactoredGame):
            shapes = [game.P1.shape[:-1], game.P2.shape[:-1]]
        else:
            shapes = [game.P.shape[:-1], game.r[..., 0, :].shape]
        self.mu, self.nu = (torch.full(tuple(s), 1.0 / s[-1], dtype=torch.float64) for s in shapes)
        self.k = 0
        self.sum_mu, self.sum_nu = torch.zeros_like(self.mu), torch.zeros_like(self.nu)
        self.served_mu, self.served_nu = torch.zeros_like(self.mu), torch.zeros_like(self.nu)
        self.sum_first, self.sum_second = torch.zeros_like(self.mu), torch.zeros_like(self.nu)
        self.sum_value = torch.zeros(self.mu.shape[0], dtype=torch.float64)
        self.bounds = torch.zeros(2, self.mu.shape[0], dtype=torch.float64)

    def episode(self, u: Tensor) -> Tensor:
        """Plays, records, updates both players from the same pair; returns the mean reward of the episodes [N].

        u [N, H, 5], or [N, m, H, 5] for m episodes.
        """
        self._record(self.mu, self.nu)
        seen = self.rollout(self.game, self.mu, self.nu, u if u.ndim == 4 else u.unsqueeze(1))
        self.counts.add(seen)
        self._record_served(self.mu, self.nu)
        self.k += 1
        self._update(seen)
        if self.schedule == "doubling" and (self.k + 1) & self.k == 0:
            self._restart()
        return seen.reward.sum(-1).mean(-1)

    def _restart(self) -> None:
        self.mu, self.nu = (torch.full_like(p, 1.0 / p.shape[-1]) for p in (self.mu, self.nu))

    def _update(self, seen: Trajectories) -> None:
        """Both players' steps from the pair that played; baselines put theirs in its place."""
        game, mu, nu = self.game, self.mu, self.nu
        K = self._horizon()
        seen_nu, seen_mu = (nu, mu) if self.feedback == "observed" else self._estimated()
        common: dict[str, Any] = {
            "factored": self.factored,
            "episodes": K,
            "delta": self.delta,
            "scale": self.scale,
            "weigh": self.weigh,
        }
        first, second, low, high = gains(self.counts, mu, seen_nu, game.start, **common)
        if self.feedback == "estimated":
            _, second, low, _ = gains(self.counts, seen_mu, nu, game.start, **common)
        self.bounds = torch.stack([low, high])
        eta, gamma = (self.m * step for step in step_sizes(game, K, self.eta_mult, self.gamma_mult))
        self.mu = mirror_step(mu, first, eta)
        if self.adversary:
            assert isinstance(game, SingleControllerGame)
            self.nu = best_reply(game, mu)
        else:
            self.nu = mirror_step(nu, second, -gamma)

    def _horizon(self) -> int:
        """K of the step sizes and bonuses: known, the end of the present epoch of 2^j episodes, or the present episode."""
        if self.schedule == "fixed_K":
            if self.K is None:
                raise ConfigError("schedule='fixed_K' needs the number of episodes: set episodes")
            return self.K
        return 2 ** int(math.log2(self.k + 1)) if self.schedule == "doubling" else self.k

    def _estimated(self) -> tuple[Tensor, Tensor]:
        """Empirical policies (nu, mu) from the counts of actions; uniform where nothing was seen."""
        visits = self.counts.visits
        if self.factored:
            tables = visits.sum((-4, -2)), visits.sum((-3, -1))
        else:
            tables = visits.sum(-2), visits.sum(-1)
        return normalised(tables[0]), normalised(tables[1])

    def _record(self, mu: Tensor, nu: Tensor) -> None:
        game = self.game
        first, second = exact.effective(game, mu, nu)
        self.sum_first += first
        self.sum_second += second
        if isinstance(game, FactoredGame):
            d1, d2 = exact.reach(game.P1, mu, game.start[0]), exact.reach(game.P2, nu, game.start[1])
            self.sum_value += torch.einsum("nhia,nhi,nhia->n", first, d1, mu)
            self.sum_mu += d1.unsqueeze(-1) * mu
            self.sum_nu += d2.unsqueeze(-1) * nu
        else:
            d = exact.reach(game.P, mu, game.start)
            self.sum_value += torch.einsum("nhsb,nhsb->n", second, nu)
            self.sum_mu += d.unsqueeze(-1) * mu
            self.sum_nu += nu

    def _record_served(self, mu: Tensor, nu: Tensor) -> None:
        """The same sums with the kernels that are known from counts: what players who do not know the game can average with."""
        _, kernels = self.counts.model()
        if isinstance(self.game, FactoredGame):
            i, j = self.game.start
            self.served_mu += exact.reach(kernels[0], mu, i).unsqueeze(-1) * mu
            self.served_nu += exact.reach(kernels[1], nu, j).unsqueeze(-1) * nu
        else:
            self.served_mu += exact.reach(kernels[0], mu, self.game.start).unsqueeze(-1) * mu
            self.served_nu += nu

    def averages(self) -> tuple[Tensor, Tensor]:
        """The averaged pair: weighted by occupancy where the player moves a state, plain for player 2 of a single controller.

        Its value is the mean of the values of the episodes, against anybody.  Uniform where no episode comes.  Occupancies are those
        of the true kernels: this is the pair of the regrets, for evaluation.
        """
        return normalised(self.sum_mu), normalised(self.sum_nu)

    def served_averages(self) -> tuple[Tensor, Tensor]:
        """The averaged pair with the occupancies that were estimated after each episode: what is exported."""
        return normalised(self.served_mu), normalised(self.served_nu)

    def regrets(self) -> tuple[Tensor, Tensor]:
        """(Reg_1, Reg_2) against the best fixed policies in hindsight, each [N]."""
        upper, lower = exact.best_values(self.game, self.sum_first, self.sum_second)
        return upper - self.sum_value, self.sum_value - lower

    _KEPT = (
        *("mu", "nu", "k", "sum_mu", "sum_nu", "served_mu", "served_nu"),
        *("sum_first", "sum_second", "sum_value", "bounds"),
    )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future depends on."""
        kept = {name: getattr(self, name) for name in self._KEPT}
        counts = [self.counts.visits, self.counts.rewards, *self.counts.moves]
        copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
        return copied | {"counts": [x.clone() for x in counts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        for name in self._KEPT:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        visits, rewards, *moves = (x.clone() for x in state["counts"])
        self.counts = Counts(visits, rewards, moves)


def check_structure(visits: Tensor, joint_moves: Tensor, threshold: float = 0.05) -> None:
    """Raises DataError where logged transitions contradict the structure that the method needs, naming the worst place.

    Counts of setting II: visits [H, S, A, B] and joint_moves [H, S, A, B, S], whose law may not depend on b; of setting I: visits
    [H, S1, S2, A, B] and joint_moves [H, S1, S2, A, B, S1, S2], whose law is the product of that given (s1, a) and that given
    (s2, b).  The total variation between the law of every (h, s, a, b) and the one that the structure allows, pooled over what may not
    matter, is compared with `threshold` plus twice its sampling error sqrt(n / N), n next states after N visits.
    """
    factored = visits.ndim == 5
    n = joint_moves.shape[visits.ndim :].numel()
    if factored:
        first, second = (
            normalised(joint_moves.sum(axes))  # [H, S1, A, S1] and [H, S2, B, S2]
            for axes in ((2, 4, 6), (1, 3, 5))
        )
        wanted = torch.einsum("hiak,hjbl->hijabkl", first, second).flatten(-2)
    else:
        wanted = normalised(joint_moves.sum(-2)).unsqueeze(-2)
    own = joint_moves.flatten(visits.ndim) / visits.unsqueeze(-1).clamp_min(1.0)
    distance = 0.5 * (own - wanted).abs().sum(-1)
    slack = threshold + 2 * (n / visits.clamp_min(1.0)).sqrt()
    excess = torch.where(visits > 0, distance - slack, -1.0)
    if bool((excess > 0).any()):
        index = tuple(int(x) for x in np.unravel_index(int(excess.argmax()), excess.shape))
        names = ("h", "s1", "s2", "a", "b") if factored else ("h", "s", "a", "b")
        where = ", ".join(f"{name}={x}" for name, x in zip(names, index, strict=True))
        raise DataError(
            (
                "transitions are no product of the players' own"
                if factored
                else "transitions depend on player 2's action"
            )
            + f": at {where} the next state differs from the pooled law by {float(distance[index]):.2f} in total variation;"
            + f" this is no {'factored' if factored else 'single-controller'} game"
        )


# Config, module, learner, algorithm -------------------------------------------------------------------------------


class FictitiousPlayPOConfig(MethodConfig):
    """Two players learn a zero-sum Markov game by optimistic mirror steps (Qiu et al., ICML 2021, arXiv 2207.12463)."""

    citation = """@inproceedings{qiu2021provably,
  title={Provably Efficient Fictitious Play Policy Optimization for Zero-Sum Markov Games with Structured Transitions},
  author={Qiu, Shuang and Wei, Xiaohan and Ye, Jieping and Wang, Zhaoran and Yang, Zhuoran},
  booktitle={International Conference on Machine Learning},
  year={2021}
}"""
    when = (
        "Use it for two players with opposite interests in a small unknown game where each moves a state of her own, or one"
        " alone moves the state: patrol and inspection, attack and defence on separate systems. It is decentralised, cheap (one"
        " backward pass an episode) and solves no matrix games; the averaged pair is what converges, the last one may cycle."
        " Where both players move one state together the guarantee is lost: `check_structure` of the method's module looks for that in"
        " logged counts. The theory's bonuses (`bonus_scale` 1) are far too large below millions of episodes. A game of your own is a"
        " file of arrays (`--game FILE.npz`). Networks in place of tables carry no guarantee, and in the ledger's runs of 4,000 episodes"
        " their regret is near to linear: watch `duality_gap` and stop early. An exported policy acts for both players on [role, h, own"
        ' state]; `answer_request` of the method\'s module takes the same by name, `{"role": 2, "h": 0, "own_state": 1}`, and answers'
        " action, probabilities, mixture and bounds of the value."
    )
    effort = (
        "An episode costs O(H S1 S2 A B (S1 + S2)) in setting I, one factor contracted at a time, and O(H S^2 A + H S A B) in II."
        " Measured: 3 ms of one core for six instances of the default game, a third of it for hindsight and the exact averages, which"
        " only evaluation needs."
    )
    needs_env = False
    default_stop = {"progress": 1.0}
    headline = ("duality_gap", "duality gap of the averaged pair")
    rejected = {
        "gamma": "the game has a finite horizon without discount (the step of player 2 is gamma_mult)",
    }

    game = hyperparameter(
        "random_factored",
        None,
        "random_factored, random_single_controller, patrol, or a file FILE.npz with the arrays P1, P2, r (factored) or P, r"
        " (single controller); the game's structure is the setting",
    )
    instance = hyperparameter(0, None, "seed of a random game", low=0)
    episodes = hyperparameter(2000, None, "K: episodes of the run", low=2)
    eta_mult = hyperparameter(
        4.0, tune.loguniform(0.5, 16), "multiple of the theory's step of player 1", low=0.0
    )
    gamma_mult = hyperparameter(
        None,
        tune.loguniform(0.25, 8),
        "multiple of the theory's step of player 2 (default: 4 factored, 1 single controller)",
        low=0.0,
    )
    bonus_scale = hyperparameter(
        0.02, tune.loguniform(1e-3, 1), "multiple of the theory's bonuses; 0: no bonus", low=0.0
    )
    delta = hyperparameter(0.1, None, "confidence of the bonuses", low=1e-12, high=1.0)
    schedule = hyperparameter(
        "fixed_K",
        tune.choice(["fixed_K", "doubling", "anytime"]),
        "steps for a known K, in epochs of 2^j episodes with restart, or falling as k^(-1/2)",
        choices=["fixed_K", "doubling", "anytime"],
    )
    policy_feedback = hyperparameter(
        "observed",
        tune.choice(["observed", "estimated"]),
        "whether the opponent's policy is told after an episode, or estimated from counts of actions",
        choices=["observed", "estimated"],
    )
    weigh = hyperparameter(
        True, None, "weigh the steps by the probability of reaching a state (False: ablation)"
    )
    episodes_per_iteration = hyperparameter(
        1,
        tune.choice([1, 8, 64]),
        "episodes with one pair; counts add, then both make one step, this many times as long (K counts iterations)",
        low=1,
    )
    approximation = hyperparameter(
        "tables",
        None,
        "the method itself, or networks with PPO steps in place of mirror steps",
        choices=["tables", "networks"],
    )
    clip_ppo = hyperparameter(0.2, tune.choice([0.1, 0.2, 0.3]), "clip of PPO (networks)", low=0.0)
    lr = hyperparameter(3e-4, tune.loguniform(1e-5, 1e-3), "step size of Adam (networks)", low=0.0)
    epochs = hyperparameter(10, tune.choice([1, 4, 10]), "gradient steps an iteration (networks)", low=1)
    hidden = hyperparameter([64, 64], None, "hidden widths (networks)")
    mixture = hyperparameter("average", None, "the pair that is exported", choices=["average", "last"])
    report_every = hyperparameter(50, None, "iterations between two reports", low=1)
    workers = hyperparameter(
        0, None, "Ray tasks that share the episodes of an iteration (0: this process)", low=0
    )

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self._set_spaces()

    def training(self, **kwargs: Any) -> Any:
        super().training(**kwargs)
        if "game" in kwargs:
            self._set_spaces()
        return self

    def _set_spaces(self) -> None:
        H, (S1, A), (S2, B) = self._sizes()
        self.environment(
            observation_space=spaces.MultiDiscrete([2, H, max(S1, S2)]),
            action_space=spaces.Discrete(max(A, B)),
        )

    def _sizes(self) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """(H, states and actions of player 1, of player 2)."""
        game = tabular.make_game(self.game, self.instance)
        H, *states, A, B = game.r.shape
        return H, (states[0], A), (states[-1], B)

    def get_default_learner_class(self) -> Any:
        return FictitiousPlayLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        H, first, second = self._sizes()
        sizes = {"steps": H, "states": [first[0], second[0]], "actions": [first[1], second[1]]}
        return RLModuleSpec(
            module_class=FictitiousPlayModule, model_config={**sizes, "mixture": self.mixture}
        )

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}


class FictitiousPlayModule(TensorModule):
    """Both players' policies in tables: observation [role, h, own state], role 0 for player 1 and 1 for player 2.

    policy [2, H, S, A]; actions that a player does not have get probability 0, in states that she does not have her own are uniform.
    value_bounds [2]: lower and upper estimate of
    the game's value.
    """

    policy: Tensor
    value_bounds: Tensor

    def setup(self) -> None:
        c = dict(self.model_config)
        shape = (2, c["steps"], max(c["states"]), max(c["actions"]))
        policy = torch.zeros(shape, dtype=torch.float64)
        for role, A in enumerate(c["actions"]):
            policy[role, :, :, :A] = 1.0 / A
        self.register_buffer("policy", policy)
        self.register_buffer("value_bounds", torch.zeros(2, dtype=torch.float64))

    def _probabilities(self, obs: Tensor) -> Tensor:
        role, h, state = obs.long().unbind(-1)
        found: Tensor = self.policy[role, h, state]
        return found

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        p = self._probabilities(batch[Columns.OBS])
        return {Columns.ACTION_DIST_INPUTS: p.clamp_min(1e-30).log().float()}

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """probabilities [B, A] and value_bounds [B, 2]."""
        obs = batch[Columns.OBS]
        return {
            "probabilities": self._probabilities(obs),
            "value_bounds": self.value_bounds.expand(len(obs), 2),
        }


EXAMPLE: dict[str, Any] = {"role": 1, "h": 0, "own_state": 0}
"""A named request: role 1 maximises, 2 minimises; steps from 0.  `state` [s1, s2] may stand in place of `own_state`."""


def answer_request(policy: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of an exported policy to a named request: action, probabilities (of the player's own actions), mixture
    ("average" or "last"), value_bounds [lower, upper].

    Raises DataError for what does not fit, naming it.
    """
    c = dict(policy.module.model_config)
    if not isinstance(request, Mapping):
        raise DataError(f"a request is an object such as {EXAMPLE}")
    extra = set(request) - {"role", "h", "own_state", "state"}
    if extra:
        raise DataError(f"request: {sorted(extra)[0]!r} is unknown: it may hold role, h, own_state, state")

    def whole(value: Any, where: str, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise DataError(f"{where} is {value!r}: a whole number from {low} to {high} is needed")
        return value

    role = whole(request.get("role"), "role", 1, 2)
    h = whole(request.get("h"), "h", 0, c["steps"] - 1)
    own, top = request.get("own_state"), c["states"][role - 1] - 1
    if "state" in request:
        pair = request["state"]
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"state is {pair!r}: [s1, s2] is needed")
        if own not in (None, pair[role - 1]):
            raise DataError(f"own_state is {own!r}, which is not that of player {role} in state {pair!r}")
        own = pair[role - 1]
    answer = policy.answer([role - 1, h, whole(own, "own_state", 0, top)])
    return {
        "action": int(answer["action"]),
        "probabilities": answer["probabilities"][: c["actions"][role - 1]].tolist(),
        "mixture": c["mixture"],
        "value_bounds": answer["value_bounds"].tolist(),
    }


class FictitiousPlayLearner(Learner):
    """Holds the policies; the steps are the algorithm's own."""

    @torch.no_grad()
    def learn(self, batch: Any) -> None:
        self.rl_module.policy.copy_(batch["policy"])
        self.rl_module.value_bounds.copy_(batch["value_bounds"])


class FictitiousPlayPO(Method, config=FictitiousPlayPOConfig):
    """Optimistic fictitious-play policy optimisation."""

    config: FictitiousPlayPOConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        knobs = self.config.knobs()
        game = tabular.make_game(knobs.pop("game"), knobs.pop("instance"))
        for name in ("mixture", "report_every"):
            knobs.pop(name)
        workers = knobs.pop("workers")
        seed = torch.seed() % 2**31 if self.config.seed is None else int(self.config.seed)
        rollout = shared_rollout(workers) if workers else play_episodes
        self.play = make_play(tabular.stack([game]), knobs, (seed,), rollout=rollout)
        self.generator = torch.Generator()
        self.generator.manual_seed(seed)

    def training_step(self) -> None:
        play, H = self.play, self.play.mu.shape[1]
        m = self.config.episodes_per_iteration
        left = self.config.episodes - play.k
        total = 0.0
        count = min(self.config.report_every, left)
        for _ in range(count):
            total += float(
                play.episode(torch.rand(1, m, H, 5, dtype=torch.float64, generator=self.generator))
            )
        pair = play.served_averages() if self.config.mixture == "average" else (play.mu, play.nu)
        policy = self.rl_module.policy.clone()
        for role, table in enumerate(pair):
            policy[role, :, : table.shape[-2], : table.shape[-1]] = table[0]
        self.learn({"policy": policy, "value_bounds": play.bounds[:, 0]})
        first, second = play.regrets()
        gap, upper, lower = exact.gap(play.game, *play.averages())
        for name, value in {
            "progress": play.k / self.config.episodes,
            "regret_1": float(first),
            "regret_2": float(second),
            "duality_gap": float(gap),
            "value_upper": float(upper),
            "value_lower": float(lower),
            "reward": total / max(count, 1),
        }.items():
            self.metrics.log_value(name, value, window=1)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = {"play": self.play.state_dict(), "generator": self.generator.get_state()}
        return {**super().get_state(*args, **kwargs), "fictitious_play": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "fictitious_play" in state:
            self.play.load_state_dict(state["fictitious_play"]["play"])
            self.generator.set_state(state["fictitious_play"]["generator"])

    @classmethod
    def experiment(cls) -> Any:
        from mobula.algorithms.games.fictitious_play_experiment import experiment

        return experiment()


def make_play(
    game: Game, knobs: dict[str, Any], seeds: tuple[int, ...], player: type[Play] = Play, **more: Any
) -> Play:
    """The play that a config's knobs describe: tables, or networks with one seed an instance."""
    knobs = dict(knobs)
    network = {name: knobs.pop(name) for name in ("approximation", "clip_ppo", "lr", "epochs", "hidden")}
    if network["approximation"] == "tables":
        return player(game, **knobs, **more)
    from mobula.algorithms.games.fictitious_play_neural import NeuralPlay

    return NeuralPlay(
        game,
        **knobs,
        **more,
        clip=network["clip_ppo"],
        lr=network["lr"],
        epochs=network["epochs"],
        hidden=tuple(network["hidden"]),
        seeds=seeds,
    )


def uniforms(seeds: Sequence[int], episodes: int, steps: int) -> Tensor:
    """[N, episodes, steps, 5] uniform draws, one stream a seed (apart from that of its game)."""
    return torch.tensor(
        np.stack([np.random.default_rng([seed, 1]).random((episodes, steps, 5)) for seed in seeds])
    )
