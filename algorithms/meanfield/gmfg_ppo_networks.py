"""Part B of GMFG-PPO: networks for policy, Q and V, and a population of particles whose flow is damped by thinning.

Also what both modules of the method share: how a position is read from an observation, and what is served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from mobula.algorithms.common.meanfield import solvers
from mobula.algorithms.common.meanfield.spaces import PartlyWhole
from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.graphon import FiniteMFG
from mobula.envs.meanfield.particles import ParticlePopulation
from mobula.errors import DataError
from mobula.learning.learners import Batch, TensorLearner, minibatches
from mobula.learning.modules import TensorModule, mlp

# Modules --------------------------------------------------------------------------------------------------------


class Positions(TensorModule):
    """Buffers of M cells: policy [M, H, S, A], aggregate [M, H, S], forecast [M, H + 1, S], degree [M]."""

    policy: Tensor
    aggregate: Tensor
    forecast: Tensor
    degree: Tensor
    observation_space: Any
    takes_missing = True

    def setup(self) -> None:
        c: dict[str, Any] = dict(self.model_config)
        M, H, S, A = c["M"], c["H"], c["S"], c["A"]
        self.observation_space = PartlyWhole(self.observation_space, [2, 3])
        uniform = torch.full((M, H, S, A), 1 / A, dtype=torch.float64)
        self.register_buffer("policy", uniform)
        self.register_buffer("aggregate", torch.zeros(M, H, S, dtype=torch.float64))
        self.register_buffer("forecast", torch.zeros(M, H + 1, S, dtype=torch.float64))
        self.register_buffer("degree", torch.zeros(M, dtype=torch.float64))

    def _read(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(cell, label, h, state) [...] of observations [..., 4]."""
        M, H, S = self.policy.shape[:3]
        label, degree, h, state = obs.double().unbind(-1)
        by_degree = label.isnan()
        if bool((by_degree & degree.isnan()).any()):
            raise DataError(
                "obs is [label, degree, h, state]: give a label or a degree (the other may be null)"
            )
        place = torch.where(by_degree, degree, label)
        if bool(((place < 0) | (place > 1)).any()):
            raise DataError(f"labels and degrees lie in [0, 1]; got {place.tolist()}")
        for name, value, size in (("h", h, H), ("state", state, S)):
            if bool((value.isnan() | (value < 0) | (value >= size) | (value != value.round())).any()):
                raise DataError(f"{name} is a whole number from 0 to {size - 1}; got {value.tolist()}")
        nearest = (degree.unsqueeze(-1).nan_to_num() - self.degree).abs().argmin(-1)
        cell = torch.where(by_degree, nearest, (label.nan_to_num() * M).long().clamp(0, M - 1))
        label = torch.where(by_degree, (cell + 0.5) / M, label)
        return cell, label, h.long(), state.long()

    def _probabilities(self, cell: Tensor, label: Tensor, h: Tensor, state: Tensor) -> Tensor:
        """[..., A]."""
        raise NotImplementedError

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        p = self._probabilities(*self._read(batch[Columns.OBS]))
        return {Columns.ACTION_DIST_INPUTS: p.clamp_min(1e-300).log()}

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """probs [B, A]; aggregate [B, S] that the cell meets at h; forecast [B, H + 1, S] of the shares of its states."""
        read = self._read(batch[Columns.OBS])
        cell, _, h, _ = read
        return {
            "probs": self._probabilities(*read),
            "aggregate": self.aggregate[cell, h],
            "forecast": self.forecast[cell],
        }


class NetworkModule(Positions):
    """pi(a | s, h / H, label), Q and V as three networks of one-hot state, time and label."""

    def setup(self) -> None:
        super().setup()
        c: dict[str, Any] = dict(self.model_config)
        sizes = [c["S"] + 2, *c["hidden"]]
        self.pi = mlp([*sizes, c["A"]], last_gain=0.01)
        self.q = mlp([*sizes, c["A"]])
        self.v = mlp([*sizes, 1])

    def features(self, label: Tensor, h: Tensor, state: Tensor) -> Tensor:
        """[..., S + 2] float32."""
        H, S = self.policy.shape[1:3]
        one = torch.nn.functional.one_hot(state, S).float()
        return torch.cat([one, torch.stack([2 * h / H - 1, 2 * label - 1], -1).float()], -1)

    def _probabilities(self, cell: Tensor, label: Tensor, h: Tensor, state: Tensor) -> Tensor:
        found: Tensor = self.pi(self.features(label, h, state)).double().softmax(-1)
        return found

    @torch.no_grad()
    def table(self) -> Tensor:
        """The policy on all cells [M, H, S, A]."""
        M, H, S = self.policy.shape[:3]
        cell, h, state = torch.meshgrid(torch.arange(M), torch.arange(H), torch.arange(S), indexing="ij")
        return self._probabilities(cell, (cell + 0.5) / M, h, state)


# Losses ------------------------------------------------------------------------------------------------------------


def policy_loss(
    log_p: Tensor,
    log_old: Tensor,
    Q: Tensor,
    action: Tensor,
    *,
    surrogate: str,
    eta: float,
    lam: float,
    clip: float = 0.2,
) -> Tensor:
    """Loss of log pi_theta [N, A] against log pi_t and Q [N, A], for sampled actions [N].

    closed  E KL(pi_theta || p) with p the proximal step from pi_t in closed form
    kl      -E[rho A] + KL(pi_theta || pi_t) / eta - lam entropy, whose minimiser over all policies is the same p
    clip    -E min(rho A, clip(rho) A) - lam entropy (PPO's, not the paper's)
    """
    p = log_p.exp()
    if surrogate == "closed":
        target = solvers.proximal(Q, log_old.exp(), eta, lam).clamp_min(1e-30).log()
        return (p * (log_p - target)).sum(-1).mean()
    entropy = -(p * log_p).sum(-1)
    advantage = Q - (log_old.exp() * Q).sum(-1, keepdim=True)
    A = advantage.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    rho = (log_p - log_old).gather(-1, action.unsqueeze(-1)).squeeze(-1).exp()
    if surrogate == "kl":
        return (-rho * A + (p * (log_p - log_old)).sum(-1) / eta - lam * entropy).mean()
    clipped = rho.clamp(1 - clip, 1 + clip)
    return (-torch.minimum(rho * A, clipped * A) - lam * entropy).mean()


class NetworkLearner(TensorLearner):
    """Q and V by regression on one another, then the policy on its surrogate; tables of what is served are copied."""

    def learn(  # type: ignore[override]
        self,
        batch: Batch,
        *,
        lam: float = 0.0,
        eta: float = 0.0,
        num_epochs: int = 1,
        minibatch_size: int | None = None,
    ) -> None:
        """Rows label, h, state, action, reward, next_state, last [N]; or the tables of `Positions`."""
        module: Any = self.rl_module
        if "policy" in batch:
            with torch.no_grad():
                for name, value in batch.items():
                    getattr(module, name).copy_(value)
            return
        x = module.features(batch["label"], batch["h"], batch["state"])
        rows = {
            "x": x,
            "x_next": module.features(batch["label"], batch["h"] + 1, batch["next_state"]),
            "action": batch["action"],
            "reward": batch["reward"].float(),
            "goes_on": (~batch["last"]).float(),
        }
        with torch.no_grad():
            rows["log_old"] = module.pi(x).log_softmax(-1)
        for part in minibatches(rows, num_epochs, minibatch_size, self.generator):
            critic = self._critic_loss(part, lam)
            self.descend(critic)
        with torch.no_grad():
            rows["Q"] = module.q(x)
        for part in minibatches(rows, num_epochs, minibatch_size, self.generator):
            actor = policy_loss(
                module.pi(part["x"]).log_softmax(-1),
                part["log_old"],
                part["Q"],
                part["action"],
                surrogate=self.config.surrogate,
                eta=eta,
                lam=lam,
                clip=self.config.clip,
            )
            self.descend(actor)
        self.log({"critic_loss": float(critic.detach()), "policy_loss": float(actor.detach())})

    def _critic_loss(self, part: Batch, lam: float) -> Tensor:
        """E (Q(s, a) - r - V(s'))^2 + E (V(s) - <pi, Q - lam log pi>)^2, targets held."""
        module: Any = self.rl_module
        Q = module.q(part["x"])
        with torch.no_grad():
            after = part["reward"] + part["goes_on"] * module.v(part["x_next"]).squeeze(-1)
            value = (part["log_old"].exp() * (Q - lam * part["log_old"])).sum(-1)
        chosen = Q.gather(-1, part["action"].unsqueeze(-1)).squeeze(-1)
        V = module.v(part["x"]).squeeze(-1)
        return (chosen - after).square().mean() + (V - value).square().mean()


# The population ----------------------------------------------------------------------------------------------------


class Population:
    """n particles with their whole paths [n, H + 1]; their flow is the damped flow of the method.

    actors  Ray actors that move the particles (0: this process); the paths do not depend on their number
    """

    def __init__(self, seed: int, particles: int, paths: Tensor | None = None, *, actors: int = 0) -> None:
        self.seed, self.n, self.actors = seed, particles, actors
        self._moving: ParticlePopulation | None = None
        self.paths = torch.empty(0, 0, dtype=torch.int16) if paths is None else paths

    def _generator(self, *words: int) -> torch.Generator:
        word = np.random.SeedSequence([self.seed, *words]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word >> 1))

    def _simulate(self, game: FiniteMFG, pi: Tensor, t: int) -> Tensor:
        seed = (self.seed * 1_000_003 + t) % 2**63
        if self._moving is None:
            self._moving = ParticlePopulation(game, pi, self.n, seed=seed, actors=self.actors)
        else:
            self._moving.restart(game, pi, seed)
        states = []
        for h in range(game.horizon + 1):
            arrays = self._moving.spread.call("arrays")
            states.append(torch.cat([torch.from_numpy(state.copy()) for _, state in arrays]))
            if h < game.horizon:
                self._moving.advance()
        return torch.stack(states, 1)

    def close(self) -> None:
        """Ends the actors."""
        if self._moving is not None:
            self._moving.close()

    def begin(self, game: FiniteMFG, pi: Tensor) -> None:
        """All particles follow pi."""
        self.paths = self._simulate(game, pi, 0)

    def replace(self, game: FiniteMFG, pi: Tensor, alpha: float, t: int) -> None:
        """Every particle is replaced, with probability alpha, by one of its cell that follows pi: (1 - alpha) mu + alpha Gamma_2(pi)
        in expectation.
        """
        fresh = self._simulate(game, pi, t)
        chosen = torch.rand(self.n, generator=self._generator(t, 1)) < alpha
        self.paths = torch.where(chosen.unsqueeze(1), fresh, self.paths)

    def cells(self, M: int) -> Tensor:
        """The cell [n] of every particle."""
        return (graphon.cells(self.n) * M).long().clamp_max(M - 1)

    def flow(self, game: FiniteMFG) -> Tensor:
        """The empirical flow [M, H + 1, S]."""
        M, S = game.labels, game.states
        one = torch.nn.functional.one_hot(self.paths.long(), S).double()
        mass = torch.zeros(M, *one.shape[1:], dtype=torch.float64).index_add_(0, self.cells(M), one)
        return mass / mass.sum(-1, keepdim=True)

    def transitions(self, game: FiniteMFG, pi: Tensor, count: int, t: int) -> dict[str, Tensor]:
        """`count` transitions (rows label, h, state, ...) of agents that follow pi against the frozen flow."""
        g = self._generator(t, 2)
        mu, M, H = self.flow(game), game.labels, game.horizon
        n = -(-count // H)
        label = torch.rand(n, dtype=torch.float64, generator=g)
        cell = (label * M).long().clamp_max(M - 1)
        state = torch.multinomial(game.mu0[cell], 1, generator=g).squeeze(1)
        rows: list[dict[str, Tensor]] = []
        for h in range(H):
            P, r = game.model(h, graphon.aggregate(game, mu[:, h], h))
            action = torch.multinomial(pi[cell, h, state], 1, generator=g).squeeze(1)
            following = torch.multinomial(P[cell, state, action], 1, generator=g).squeeze(1)
            rows.append(
                {
                    "label": label,
                    "h": torch.full((n,), h),
                    "state": state,
                    "action": action,
                    "reward": r[cell, state, action],
                    "next_state": following,
                    "last": torch.full((n,), h == H - 1),
                }
            )
            state = following
        return {name: torch.cat([row[name] for row in rows])[:count] for name in rows[0]}
