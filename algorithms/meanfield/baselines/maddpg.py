"""MADDPG on team games (Lowe, Wu, Tamar, Harb, Abbeel, Mordatch; NeurIPS 2017, arXiv 1706.02275): neural actors and critics.

What MRPG is measured against where nobody tells the learner that dynamics are linear and costs quadratic.  It has the same
access to the game: resets at any time to a chosen Gaussian, samples of the own cost, and the separation into a game of deviations
and one of means.  Every team has a critic Q^i(t, z, u^1, ..., u^N) of the whole state and all inputs, fitted to
c^i + Q^i'(t + 1, z', mu'(z')) (equation 6, no discount, nothing after the last step), and actors mu^i(t, z) that descend
Q^i along their own input, the others' taken from the replay (equation 5, with costs in place of rewards).

Seeds S, the two games, teams N and, for actors, inputs p are one leading dimension of the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray import tune
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from torch import Tensor

from mobula.algorithms.meanfield.teams import LQTeamsConfig, LQTeamsModule
from mobula.envs.meanfield import riccati
from mobula.envs.meanfield.lq_teams import LQGame, LQTeams, root
from mobula.errors import TrainingFault
from mobula.learning.batched import Adam, BatchedMLP, cosine, generators, polyak
from mobula.learning.learners import Learner
from mobula.method import Method, hyperparameter

Actor = Callable[[Tensor, Tensor], Tensor]
"""(t [..., 2, E], z [..., 2, E, n]) -> inputs of all teams [..., 2, E, N, p]."""

Critic = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(t [..., 2, E], z [..., 2, E, n], u [..., 2, N or 1, E, N, p]: what each critic is shown) -> Q [..., 2, N, E]."""

# Mathematics ----------------------------------------------------------------------------------------------


def transition(games: LQGame, t: Tensor, z: Tensor, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(costs [..., 2, N, E] of a step, next states [..., 2, E, n]) of environments that are each at a time of their own.

    t [..., 2, E] (or [1, 1]: the same for all), z and noise [..., 2, E, n], u [..., 2, E, N, p].  The step to the end of the
    game pays the terminal cost too.
    """
    game = torch.arange(len(games.A))[:, None]
    A, B = games.A[game, t], games.B[game, :, t]
    ahead = torch.einsum("...enm,...em->...en", A, z) + torch.einsum("...ejnp,...ejp->...en", B, u) + noise
    cost = torch.einsum("...en,...einm,...em->...ie", z, games.Q[game, :, t], z)
    cost = cost + torch.einsum("...ejp,...eijpq,...ejq->...ie", u, games.R[game, :, :, t], u)
    end = torch.einsum("...en,...inm,...em->...ie", ahead, games.Q[:, :, -1], ahead)
    return cost + end * (t == games.horizon - 1).unsqueeze(-2), ahead


def critic_errors(
    critic: Critic, target: Critic, actor: Actor, rows: dict[str, Tensor], horizon: int
) -> Tensor:
    """Mean squared errors [..., 2, N] of the critics against c + Q'(t + 1, z', mu'(z')); c alone at the last step.

    rows: t [..., 2, E], z, ahead [..., 2, E, n], u [..., 2, E, N, p], cost [..., 2, N, E].
    """
    with torch.no_grad():
        # There is no time after the last: what is asked there is thrown away.
        after = (rows["t"] + 1).clamp_max(horizon - 1)
        u = actor(after, rows["ahead"])
        goes_on = (rows["t"] < horizon - 1).unsqueeze(-2)
        goal = rows["cost"] + goes_on * target(after, rows["ahead"], u.unsqueeze(-4))
    return (critic(rows["t"], rows["z"], rows["u"].unsqueeze(-4)) - goal).square().mean(-1)


def actor_values(critic: Critic, actor: Actor, rows: dict[str, Tensor]) -> Tensor:
    """Mean Q^i [..., 2, N] where team i plays its actor and all others what the replay holds: i's actor descends it."""
    N = rows["u"].shape[-2]
    own = torch.eye(N, dtype=torch.bool)[:, None, :, None]
    u = torch.where(own, actor(rows["t"], rows["z"]).unsqueeze(-4), rows["u"].unsqueeze(-4))
    return critic(rows["t"], rows["z"], u).mean(-1)


# What policies that are no gains are worth -----------------------------------------------------------------


def linear_part(actor: Actor, teams: LQTeams, seeds: int, points: int = 2048) -> Tensor:
    """Gains K [S, 2, N, T, p, n] of the least-squares fit u ~ -K z of a policy over the reset distribution, at each step.

    The points have the reset covariance exactly, so that gains are returned as they are and a nonlinear policy's do not hang
    on the draw.
    """
    games = teams.games
    n, T = games.A.shape[-1], games.horizon
    g = torch.Generator().manual_seed(0)
    raw, _ = torch.linalg.qr(torch.randn(points, n, dtype=torch.float64, generator=g))
    z = points**0.5 * raw @ torch.linalg.cholesky(teams.reset).mT
    t = torch.arange(T).repeat_interleave(points).expand(seeds, 2, -1)
    u = actor(t, z.repeat(1, T, 1).expand(seeds, -1, -1, -1)).unflatten(2, (T, points))
    moment = torch.einsum("sgtejp,gen->sgjtpn", u, z) / points
    factor = torch.linalg.cholesky(teams.reset)[:, None, None].expand(*moment.shape[:-2], n, n)
    return -torch.cholesky_solve(moment.mT, factor).mT * teams.mask[:, :, None]


def sampled_costs(games: LQGame, play: Callable[[int, Tensor], Tensor], z: Tensor, noise: Tensor) -> Tensor:
    """Costs [..., 2, N, E] of whole plays from z [..., 2, E, n] with noise [..., T, 2, E, n]; `play` maps (t, z) to inputs."""
    total = z.new_zeros(())
    for t in range(games.horizon):
        step = torch.full((1, 1), t)
        cost, z = transition(games, step, z, play(t, z), noise[..., t, :, :, :])
        total = total + cost
    return total


def exploitability(
    actor: Actor, teams: LQTeams, K: Tensor, rollouts: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(gain of each team from answering the others, its cost), both [S, N], of a policy with the linear part K.

    The answer is the best one to the others' linear parts (a linear-quadratic regulator), played against what they really do: a
    lower bound of exploitability, and exactly that where the policy is linear.  Costs and gains of K are exact; plays on common
    draws correct them for what the policy is beyond it.
    """
    games, N, S = teams.games, teams.games.players, len(K)
    batched = LQGame(*(part.expand(S, *part.shape) for part in games))
    answers = torch.stack([riccati.best_response(batched, K, i)[0] for i in range(N)], -4)
    T, n = games.horizon, games.A.shape[-1]
    begin, shock = root(teams.start_cov), root(teams.noise)
    z = torch.stack(
        [
            torch.randn(rollouts, n, dtype=torch.float64, generator=generator) @ begin.mT,
            teams.start_mean.expand(rollouts, n),
        ]
    )
    noise = torch.randn(T, 2, rollouts, n, dtype=torch.float64, generator=generator) @ shock.mT
    # Profile 0: all follow the policy; profile i: team i answers it.
    z = z.repeat(1, N + 1, 1).expand(S, -1, -1, -1)
    noise = noise.repeat(1, 1, N + 1, 1).expand(S, -1, -1, -1, -1)
    deviates = (torch.arange(N + 1)[:, None] == 1 + torch.arange(N)).repeat_interleave(rollouts, 0)

    def gains(K: Tensor, t: int, z: Tensor) -> Tensor:
        return -torch.einsum("sgjpn,sgen->sgejp", K[..., t, :, :], z)

    def with_answers(u: Tensor, t: int, z: Tensor) -> Tensor:
        return torch.where(deviates[:, :, None], gains(answers, t, z), u)

    def policy(t: int, z: Tensor) -> Tensor:
        return with_answers(actor(torch.full(z.shape[:-1], t), z), t, z)

    def linear(t: int, z: Tensor) -> Tensor:
        return with_answers(gains(K, t, z), t, z)

    found = [
        sampled_costs(games, play, z, noise).unflatten(-1, (N + 1, rollouts)).mean(-1)
        for play in (policy, linear)
    ]
    beyond = (found[0] - found[1]).sum(1)
    exact = riccati.exploitability(batched, K, teams.moments(), teams.noise).sum(1)
    cost = riccati.expected_cost(riccati.values(batched, K), teams.moments(), teams.noise).sum(1)
    answered = beyond[..., 1:].diagonal(dim1=-2, dim2=-1)
    return exact + beyond[..., 0] - answered, cost + beyond[..., 0]


# Simulation and replay -----------------------------------------------------------------------------------------


class Streams:
    """Draws [S, ...], those of a seed from a stream of its own: the same alone and among others."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.each = generators(seeds)

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, dtype=torch.float64, generator=g) for g in self.each])

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.stack([torch.randint(high, shape, generator=g) for g in self.each])


class World:
    """E environments of each seed and game; one that ends begins anew at a random time in a draw of the reset distribution."""

    def __init__(self, teams: LQTeams, envs: int, streams: Streams) -> None:
        self.teams, self.streams = teams, streams
        self.shape = (2, envs, teams.games.A.shape[-1])
        self.reset, self.shock = (root(c).mT for c in (teams.reset, teams.noise))
        self.t, self.z = self._begin()

    def _begin(self) -> tuple[Tensor, Tensor]:
        t = self.streams.integers(self.teams.games.horizon, *self.shape[:-1])
        return t, self.streams.normal(*self.shape) @ self.reset

    def step(self, u: Tensor) -> dict[str, Tensor]:
        """The transitions that inputs u [S, 2, E, N, p] bring about: rows of `critic_errors`."""
        noise = self.streams.normal(*self.shape) @ self.shock
        cost, ahead = transition(self.teams.games, self.t, self.z, u, noise)
        rows = {"t": self.t, "z": self.z, "u": u, "cost": cost, "ahead": ahead}
        t, z = self._begin()
        ended = self.t == self.teams.games.horizon - 1
        self.t = torch.where(ended, t, self.t + 1)
        self.z = torch.where(ended.unsqueeze(-1), z, ahead)
        return rows


class Replay:
    """The last `capacity` transitions of every seed and game, a ring of float32 rows [S, 2, capacity, width]."""

    def __init__(self, games: LQGame, seeds: int, capacity: int) -> None:
        n, N, p = games.A.shape[-1], games.players, games.B.shape[-1]
        self.inputs, self.widths = (N, p), (1, n, N * p, N, n)
        self.rows = torch.zeros(seeds, 2, capacity, sum(self.widths))
        self.added = 0

    def add(self, rows: dict[str, Tensor]) -> None:
        """Stores transitions as `World.step` returns them."""
        parts = [rows["t"].unsqueeze(-1), rows["z"], rows["u"].flatten(-2), rows["cost"].mT, rows["ahead"]]
        new = torch.cat([part.float() for part in parts], -1)
        place = (self.added + torch.arange(new.shape[-2])) % self.rows.shape[-2]
        self.rows[:, :, place] = new
        self.added += new.shape[-2]

    def sample(self, batch: int, streams: Streams) -> dict[str, Tensor]:
        """`batch` transitions of each seed and game, drawn with replacement."""
        held = min(self.added, self.rows.shape[-2])
        index = streams.integers(held, 2, batch).unsqueeze(-1).expand(-1, -1, -1, self.rows.shape[-1])
        t, z, u, cost, ahead = self.rows.gather(-2, index).split(self.widths, -1)
        return {
            "t": t.squeeze(-1).long(),
            "z": z,
            "u": u.unflatten(-1, self.inputs),
            "cost": cost.mT,
            "ahead": ahead,
        }


# Config, module, learner ------------------------------------------------------------------------------------


class MADDPGConfig(LQTeamsConfig):
    """Multi-agent actor-critic on team games, neural, with centralised critics (Lowe et al., NeurIPS 2017, arXiv 1706.02275)."""

    citation = """@inproceedings{lowe2017multi,
  title={Multi-Agent Actor-Critic for Mixed Cooperative-Competitive Environments},
  author={Lowe, Ryan and Wu, Yi and Tamar, Aviv and Harb, Jean and Abbeel, Pieter and Mordatch, Igor},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017},
  note={arXiv:1706.02275}
}"""
    when = (
        "The neural baseline of MRPG. It knows nothing of linear dynamics and quadratic costs, so it is what to fall back on where they"
        " do not hold. Where they do, MRPG with antithetic estimates comes nearer to an equilibrium from the same samples at a small part"
        " of the computation, and with a certificate; MRPG with one-point estimates does not. Simultaneous steps of all teams have no"
        " guarantee of convergence."
    )
    default_stop = {"progress": 1.0}
    rejected = {
        "gamma": "the game has a finite horizon without discount",
        "num_learners": "the replay and its learner live in one process",
    }

    steps = hyperparameter(10_000, None, "gradient steps of the whole run", low=1)
    envs = hyperparameter(
        300, None, "environments of each game: transitions that are drawn between two gradient steps", low=1
    )
    batch = hyperparameter(256, tune.choice([128, 256, 512]), "transitions of a gradient step", low=1)
    capacity = hyperparameter(100_000, None, "transitions that the replay of a game holds", low=1)
    lr = hyperparameter(
        1e-3, tune.loguniform(3e-4, 1e-2), "step of Adam for the critics, decaying by a cosine", low=0.0
    )
    actor_lr = hyperparameter(
        3e-4, tune.loguniform(1e-4, 3e-3), "step of Adam for the actors, decaying by a cosine", low=0.0
    )
    tau = hyperparameter(
        0.01, tune.loguniform(1e-3, 0.1), "share that the targets take in a step", low=0.0, high=1.0
    )
    noise = hyperparameter(
        0.3, tune.loguniform(0.05, 1.0), "deviation of the exploration noise on inputs", low=0.0
    )
    cost_scale = hyperparameter(
        0.1, tune.choice([0.01, 0.1, 1.0]), "factor on costs before the critics see them", low=1e-9
    )
    hidden = hyperparameter([64, 64], tune.choice([[64, 64], [128, 128]]), "hidden layers of every network")
    rollouts = hyperparameter(500, None, "plays of a report's estimate of exploitability", low=2)
    num_seeds_batched = hyperparameter(
        1,
        None,
        "S: independent seeds trained side by side (seed, seed + 1, ...); the first one is exported",
        low=1,
    )
    report_every = hyperparameter(500, None, "gradient steps of a training iteration (of reports)", low=1)

    def get_default_learner_class(self) -> Any:
        return MADDPGLearner

    def module_class(self) -> type[LQTeamsModule]:
        return MADDPGModule

    def model_settings(self) -> dict[str, Any]:
        return {
            "hidden": list(self.hidden),
            "seeds": self.num_seeds_batched,
            "first_seed": self.seed or 0,
            "cost_scale": self.cost_scale,
            "mask": self.teams().mask.tolist(),
        }


class MADDPGModule(LQTeamsModule):
    """Actors and critics of S seeds, two games and N teams, each with a target; the first seed acts.

    An actor network gives one input, from what the game's mask lets it see.  Policies are made odd, (f(z) - f(-z)) / 2: the inputs
    of a population's deviations then average to zero, without which they were no deviations.
    """

    mask: Tensor

    def setup(self) -> None:
        super().setup()
        c: dict[str, Any] = dict(self.model_config)
        self.about = c
        S, N, p, n, T, hidden = (c[name] for name in ("seeds", "players", "p", "n", "horizon", "hidden"))
        self.register_buffer("mask", torch.tensor(c["mask"], dtype=torch.float32))
        streams = generators([c["first_seed"] + s for s in range(S)])
        sizes = [T + n, *hidden, 1], [T + n + N * p, *hidden, 1]
        self.actor = BatchedMLP(S * 2 * N * p, sizes[0], streams, last_gain=0.01)
        self.critic = BatchedMLP(S * 2 * N, sizes[1], streams, last_gain=1.0)
        self.target_actor = BatchedMLP(S * 2 * N * p, sizes[0], generators([0]))
        self.target_critic = BatchedMLP(S * 2 * N, sizes[1], generators([0]))
        for target, net in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
            target.load_state_dict(net.state_dict())
            target.requires_grad_(False)

    def act(self, t: Tensor, z: Tensor, *, target: bool = False) -> Tensor:
        """Inputs [S, 2, E, N, p] at times t [S, 2, E] and states z [S, 2, E, n]; float64 for float64 states."""
        S, N, p, T = (self.about[name] for name in ("seeds", "players", "p", "horizon"))
        net = self.target_actor if target else self.actor
        time = torch.nn.functional.one_hot(t, T).float()[:, :, None, None].expand(-1, -1, N, p, -1, -1)
        seen = z.float()[:, :, None, None] * self.mask.unsqueeze(-2)
        x = torch.cat([torch.cat([time, seen], -1), torch.cat([time, -seen], -1)], -2).flatten(0, 3)
        ahead, behind = net(x).view(S, 2, N, p, -1).chunk(2, -1)
        return (0.5 * (ahead - behind)).permute(0, 1, 4, 2, 3).to(z.dtype)

    def q(self, t: Tensor, z: Tensor, u: Tensor, *, target: bool = False) -> Tensor:
        """Scaled values [S, 2, N, E] at inputs u [S, 2, N or 1, E, N, p], what each team's critic is shown."""
        S, N, T = (self.about[name] for name in ("seeds", "players", "horizon"))
        net = self.target_critic if target else self.critic
        state = torch.cat([torch.nn.functional.one_hot(t, T).float(), z.float()], -1).unsqueeze(2)
        x = [part.expand(-1, -1, N, -1, -1) for part in (state, u.flatten(-2).float())]
        return net(torch.cat(x, -1).flatten(0, 2)).view(S, 2, N, -1)

    def _play(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(team, t [1, 2, B], z [1, 2, B, n], inputs [2, B, N, p] of the first seed) for observations [B, 2 + 2 n]."""
        S = self.about["seeds"]
        team, t, y, mean = self.read(obs)
        z, t = torch.stack([y, mean]).expand(S, -1, -1, -1), t.expand(S, 2, -1)
        return team, t, z, self.act(t, z)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        team, *_, u = self._play(batch[Columns.OBS])
        return {Columns.ACTIONS: u[0, :, torch.arange(len(team)), team].sum(0)}

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """value [B], the critics' cost to go of both games."""
        team, t, z, u = self._play(batch[Columns.OBS])
        q = self.q(t, z, u.unsqueeze(2))[0, :, team, torch.arange(len(team))]
        return {"value": q.sum(0) / self.about["cost_scale"]}


class MADDPGLearner(Learner):
    """A step of all critics, then of all actors, then of the targets."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self.module[module_id].unwrapped()
        self.critic_adam = self._adam("critic", list(module.critic.parameters()), self.config.lr)
        self.actor_adam = self._adam("actor", list(module.actor.parameters()), self.config.actor_lr)

    def _adam(self, name: str, params: list[Tensor], lr: float) -> Adam:
        optimizer = Adam(params, lr)
        self.register_optimizer(
            module_id=DEFAULT_MODULE_ID, optimizer_name=name, optimizer=optimizer, params=params
        )
        return optimizer

    def _descend(self, loss: Tensor, optimizer: Adam, lr: float) -> None:
        (group,) = optimizer.param_groups
        group["lr"] = lr
        # Only the gradients of these parameters: an actor's loss goes through its critic.
        for parameter, slope in zip(group["params"], torch.autograd.grad(loss, group["params"]), strict=True):
            parameter.grad = slope
        optimizer.advance()

    def learn(self, batch: Any, *, share: float = 1.0) -> None:
        """One step on rows of `critic_errors`, costs unscaled, with `share` of the step sizes."""
        module, config = self.rl_module, self.config
        rows = {**batch, "cost": batch["cost"] * config.cost_scale}

        def target_critic(*x: Tensor) -> Tensor:
            return module.q(*x, target=True)

        def target_actor(*x: Tensor) -> Tensor:
            return module.act(*x, target=True)

        # Members share nothing, so the gradient of the sum is every member's own.
        errors = critic_errors(module.q, target_critic, target_actor, rows, module.about["horizon"])
        self._descend(errors.sum(), self.critic_adam, share * config.lr)
        values = actor_values(module.q, module.act, rows)
        self._descend(values.sum(), self.actor_adam, share * config.actor_lr)
        polyak(list(module.target_critic.parameters()), list(module.critic.parameters()), config.tau)
        polyak(list(module.target_actor.parameters()), list(module.actor.parameters()), config.tau)
        self.log({"critic_loss": errors.detach().mean(), "actor_value": values.detach().mean()})


class MADDPG(Method, config=MADDPGConfig):
    """Neural actor-critic a team, off-policy."""

    config: MADDPGConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        c = self.config
        self.teams = c.teams()
        self.solution = riccati.nash(self.teams.games)
        S, seed = c.num_seeds_batched, torch.seed() % 2**31 if c.seed is None else int(c.seed)
        self.streams = Streams([seed + s for s in range(S)])
        self.world = World(self.teams, c.envs, self.streams)
        self.replay = Replay(self.teams.games, S, c.capacity)
        self.taken = 0

    def training_step(self) -> None:
        c, games = self.config, self.teams.games
        last = min(self.taken + c.report_every, c.steps)
        while self.taken < last:
            with torch.no_grad():
                u = self.rl_module.act(self.world.t, self.world.z)
            explored = u + c.noise * self.streams.normal(*u.shape[1:])
            self.replay.add(self.world.step(explored))
            self.taken += 1
            rows = self.replay.sample(c.batch, self.streams)
            self.learn(rows, share=cosine(self.taken - 1, c.steps), report=self.taken == last)
        gains, gap, cost = self.measure(c.rollouts)
        error = (gains - self.solution.K)[0]
        for name, value in {
            "progress": self.taken / c.steps,
            "transitions": float(self.taken * c.envs),
            "error": float(error.abs().max()),
            "exploitability": float((gap / cost)[0].max()),
            **{f"cost_team_{i + 1}": float(cost[0, i]) for i in range(games.players)},
        }.items():
            self.metrics.log_value(name, value, window=1)

    @torch.no_grad()
    def measure(self, rollouts: int) -> tuple[Tensor, Tensor, Tensor]:
        """(linear part of the policies [S, 2, N, T, p, n], `exploitability` and cost [S, N] from `rollouts` plays)."""
        act = self.rl_module.act
        K = linear_part(act, self.teams, self.config.num_seeds_batched)
        if not bool(K.isfinite().all()):
            raise TrainingFault(
                f"the policy is not finite after {self.taken} gradient steps: lower lr or actor_lr"
            )
        return K, *exploitability(act, self.teams, K, rollouts, torch.Generator().manual_seed(0))

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        held = min(self.replay.added, self.replay.rows.shape[-2])
        own = {
            "taken": self.taken,
            "streams": [g.get_state() for g in self.streams.each],
            "world": (self.world.t, self.world.z),
            "replay": (self.replay.added, self.replay.rows[:, :, :held].clone()),
        }
        return {**super().get_state(*args, **kwargs), "maddpg": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "maddpg" not in state:
            return
        own = state["maddpg"]
        self.taken = own["taken"]
        for g, kept in zip(self.streams.each, own["streams"], strict=True):
            g.set_state(kept)
        self.world.t, self.world.z = own["world"]
        self.replay.added, rows = own["replay"]
        self.replay.rows[:, :, : rows.shape[-2]] = rows
