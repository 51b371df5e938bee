"""MRPG: multi-player receding-horizon natural policy gradient (Zaman, Koppel, Lauriere, Basar; arXiv 2403.11345).

Teams of very many agents play a linear-quadratic game.  Its mean-field limit separates into a game of deviations from the
mean and a game of means.  A sweep goes backwards in time: at each step all teams run independent natural policy gradient, from
sampled costs alone, on the gains of that step, later gains frozen.  The cost of a step is exactly quadratic in its gains, so
smoothing over a sphere adds no bias, and the exact natural step is the Richardson iteration K <- K - 2 eta (Phi K - Psi).

Costs are minimised: the update descends.  u = -K y.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.rllib.core.columns import Columns
from torch import Tensor

from mobula.algorithms.meanfield.teams import LQTeamsConfig, LQTeamsModule
from mobula.envs.meanfield import riccati
from mobula.envs.meanfield.lq_teams import LQGame, LQTeams, root
from mobula.errors import TrainingFault
from mobula.learning.learners import Learner
from mobula.method import Method, hyperparameter
from mobula.metrics import gather

logger = logging.getLogger("mobula")

LARGEST_GAIN = 1e4

# Mathematics ----------------------------------------------------------------------------------------------


def sphere(shape: Sequence[int], radius: float, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Points [*shape, N, batch, p, n] uniform on Frobenius spheres of `radius` over the entries that `mask` [..., N, p, n] allows.

    `shape` ends with the batch: (..., N, batch) is what is drawn.
    """
    p, n = mask.shape[-2:]
    raw = torch.randn(*shape, p, n, dtype=torch.float64, generator=generator) * mask.unsqueeze(-3)
    return radius * raw / raw.flatten(-2).norm(dim=-1)[..., None, None]


def costs_to_go(
    game: LQGame, K: Tensor, t: int, e: Tensor, y: Tensor, noise: Tensor, *, shared: bool = False
) -> Tensor:
    """Sampled costs-to-go J^i_t [..., N, batch] where player i plays K^i_t + e and everybody else, and later, the gains K.

    game  leading axes [...]; K [..., N, T, p, n]; e [..., N, batch, p, n]
    y     [..., G, batch, n] states at t; noise [..., G, batch, T - t, n] its shocks.  G = N: each player perturbs in rollouts
          of its own; G = 1 (`shared`): all perturb at once in the same ones
    """
    total = y.new_zeros(*e.shape[:-2])
    players = torch.arange(game.players)
    for s in range(t, game.horizon):
        A, B, Q, R = (
            game.A[..., s, :, :],
            game.B[..., s, :, :],
            game.Q[..., s, :, :],
            game.R[..., s, :, :],
        )
        u = -torch.einsum("...jpn,...gbn->...gbjp", K[..., s, :, :], y)
        if s == t:
            if shared:
                u = u - torch.einsum("...jbpn,...gbn->...gbjp", e, y)
            else:
                own = torch.einsum("...gbpn,...gbn->...gbp", e, y)
                # u[g, :, g] is player g's own input in its own rollouts.
                u = u.movedim(-2, -4)
                u[..., players, players, :, :] -= own
                u = u.movedim(-4, -2)
        if shared:
            total += torch.einsum("...gbn,...inm,...gbm->...ib", y, Q, y)
            total += torch.einsum("...gbjp,...ijpq,...gbjq->...ib", u, R, u)
        else:
            total += torch.einsum("...ibn,...inm,...ibm->...ib", y, Q, y)
            total += torch.einsum("...ibjp,...ijpq,...ibjq->...ib", u, R, u)
        y = (
            torch.einsum("...nm,...gbm->...gbn", A, y)
            + torch.einsum("...jnp,...gbjp->...gbn", B, u)
            + noise[..., s - t, :]
        )
    last = game.Q[..., game.horizon, :, :]
    spec = "...gbn,...inm,...gbm->...ib" if shared else "...ibn,...inm,...ibm->...ib"
    return total + torch.einsum(spec, y, last, y)


def draws(
    teams: LQTeams, t: int, batch: int, radius: float, *, shared: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(e [2, N, batch, p, n], y [2, G, batch, n], noise [2, G, batch, T - t, n]) of one batch of rollouts."""
    game = teams.games
    n, N = game.A.shape[-1], game.players
    groups = 1 if shared else N
    e = sphere((2, N, batch), radius, teams.mask, generator)
    reset, shock = root(teams.reset)[:, None, None], root(teams.noise)[:, None, None, None]
    raw = torch.randn(2, groups, batch, n, dtype=torch.float64, generator=generator)
    later = torch.randn(2, groups, batch, game.horizon - t, n, dtype=torch.float64, generator=generator)
    return e, (reset @ raw.unsqueeze(-1)).squeeze(-1), (shock @ later.unsqueeze(-1)).squeeze(-1)


def gradient_sums(
    game: LQGame,
    K: Tensor,
    t: int,
    drawn: tuple[Tensor, Tensor, Tensor],
    *,
    estimator: str,
    shared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_j J_j e_j, sum_j e_j [..., N, p, n], sum_j J_j [..., N]): all that leaves a worker, whatever its batch.

    With `antithetic`, J_j is (J(K + e_j) - J(K - e_j)) / 2 on the same states and shocks.
    """
    e, y, noise = drawn
    if estimator == "antithetic":
        J = 0.5 * (
            costs_to_go(game, K, t, e, y, noise, shared=shared)
            - costs_to_go(game, K, t, -e, y, noise, shared=shared)
        )
    else:
        J = costs_to_go(game, K, t, e, y, noise, shared=shared)
    return torch.einsum("...ib,...ibpn->...ipn", J, e), e.sum(-3), J.sum(-1)


def gradient(
    sums: tuple[Tensor, Tensor, Tensor], batch: int, radius: float, dimensions: Tensor, estimator: str
) -> Tensor:
    """Estimate of the gradient [..., N, p, n] from the sums over `batch` perturbations.

    D / (batch r^2) sum_j J_j e_j with D free entries (`dimensions` [..., N]); `baseline` subtracts the batch mean of J, with the
    factor batch / (batch - 1) because that mean holds the own sample.
    """
    Je, e, J = sums
    if estimator == "baseline":
        Je = (Je - J[..., None, None] / batch * e) * (batch / (batch - 1))
    return dimensions[..., None, None] / (batch * radius**2) * Je


def exact_gradient(game: LQGame, K: Tensor, t: int, P: Tensor, reset: Tensor) -> Tensor:
    """2 (Phi K - Psi)^i Sigma [..., N, p, n] with P_{t+1} [..., N, n, n] of the present later gains; reset [..., n, n]."""
    Phi, Psi = riccati.stage(game, t, P)
    now = K[..., t, :, :]
    E = (Phi @ now.flatten(-3, -2) - Psi).unflatten(-2, now.shape[-3:-1])
    return 2.0 * E @ reset.unsqueeze(-3)


def safe_step(game: LQGame, P: Tensor) -> float:
    """0.4 / max lambda_max(Phi^{ii}_t) over games, players and steps, at the values P [..., N, T + 1, n, n] of later gains.

    A player's own iteration K <- K - 2 eta Phi^{ii} K converges below 1 / lambda_max.
    """
    N, p, largest = game.players, game.B.shape[-1], 0.0
    for t in range(game.horizon):
        Phi, _ = riccati.stage(game, t, P[..., t + 1, :, :])
        own = Phi.unflatten(-2, (N, p)).unflatten(-1, (N, p)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        largest = max(largest, float(torch.linalg.eigvalsh(own).max()))
    return 0.4 / largest


def natural_step(K: Tensor, t: int, gradient: Tensor, reset: Tensor, eta: float, mask: Tensor) -> None:
    """K_t <- K_t - eta gradient Sigma^{-1}, in place, on the free entries."""
    factor = torch.linalg.cholesky(reset).unsqueeze(-3).expand(*gradient.shape[:-2], *reset.shape[-2:])
    natural = torch.cholesky_solve(gradient.mT, factor).mT
    K[..., t, :, :] -= eta * natural * mask


def zero_gains(game: LQGame) -> Tensor:
    """[..., N, T, p, n]."""
    return torch.zeros(*game.B.shape[:-2], game.B.shape[-1], game.A.shape[-1], dtype=torch.float64)


def solve_exactly(
    game: LQGame, reset: Tensor, eta: float, inner_iters: int, *, receding: bool, warm_start: bool = False
) -> tuple[Tensor, Tensor]:
    """MRPG with the model's own gradients, or (not `receding`) all steps at once: plain simultaneous natural gradient.

    Any leading axes.  Returns (K [..., N, T, p, n], trace): of the inner errors |K_t - fixed point of the stage| for the receding
    sweep [T, inner_iters, ...]; empty for the other.  A run whose gains exceed 1e4 is stopped and holds NaN.
    """
    K, mask = zero_gains(game), torch.ones((), dtype=torch.float64)
    trace: list[Tensor] = []
    if receding:
        P = game.Q[..., -1, :, :]
        for t in reversed(range(game.horizon)):
            if warm_start and t + 1 < game.horizon:
                K[..., t, :, :] = K[..., t + 1, :, :]
            Phi, Psi = riccati.stage(game, t, P)
            goal = torch.linalg.solve(Phi, Psi).unflatten(-2, K.shape[-4:-3] + K.shape[-2:-1])
            errors = []
            for _ in range(inner_iters):
                errors.append((K[..., t, :, :] - goal).abs().amax((-3, -2, -1)))
                natural_step(K, t, exact_gradient(game, K, t, P, reset), reset, eta, mask)
                _discard_the_diverged(K)
            trace.append(torch.stack(errors))
            P = riccati.step_back(game, t, P, K[..., t, :, :])
        return K, torch.stack(trace[::-1])
    for _ in range(inner_iters):
        P = riccati.values(game, K)
        steps = [exact_gradient(game, K, t, P[..., t + 1, :, :], reset) for t in range(game.horizon)]
        for t, step in enumerate(steps):
            natural_step(K, t, step, reset, eta, mask)
        _discard_the_diverged(K)
    return K, torch.empty(0)


def _discard_the_diverged(K: Tensor) -> None:
    wild = ~(K.abs().amax((-4, -3, -2, -1)) <= LARGEST_GAIN)
    K.masked_fill_(wild[..., None, None, None, None], torch.nan)


# Config, module, learner ------------------------------------------------------------------------------------


class MRPGConfig(LQTeamsConfig):
    """Team games of very many agents by backward natural policy gradient (Zaman et al. 2024, arXiv 2403.11345)."""

    citation = """@article{zaman2024independent,
  title={Independent RL for Cooperative-Competitive Agents: A Mean-Field Perspective},
  author={Zaman, Muhammad Aneeq uz and Koppel, Alec and Lauri{\\`e}re, Mathieu and Ba{\\c{s}}ar, Tamer},
  journal={arXiv preprint arXiv:2403.11345},
  year={2024}
}"""
    when = (
        "Use it where teams of many like agents have linear dynamics and quadratic costs, teams see their own costs only, and a"
        " simulator can be reset at any time: rival fleets, charging stations, advertisers. Each step of the sweep is a benign"
        " problem, so it converges where simultaneous policy gradient diverges. Where the matrices are known, solve the coupled"
        " Riccati equations instead (`mobula.envs.meanfield.riccati.nash`). It does not fit costs that are no quadratics, and"
        " where the stage matrices have an eigenvalue with a negative real part independent gradients diverge although an"
        " equilibrium exists: where `margin`, among the results of training and in every answer, is positive, small steps converge. A game of"
        " your own is a file (`--set game=FILE.npz`; `mobula.envs.meanfield.lq_teams.load_game` says which arrays). The served policy"
        " reads [team, t, x, xbar], team and t from 0, and answers with the team's input on each population, its gains, its cost to"
        " go, and a certificate of the step: `sigma_min` and `margin` of both games, and what the team could gain by leaving."
    )
    effort = (
        "A gradient step costs O(N_b N (T - t) (n^2 + n N p)) flops a game for N_b perturbations, N teams, n states and p inputs, in one"
        " batch of tensors: 2 ms on one core for the last of the five steps of G1 at the defaults, 6 ms for the first."
    )
    default_stop = {"sweep": 1.0}
    rejected = {
        "gamma": "the game has a finite horizon without discount",
        "lr": "the step is eta",
    }

    eta = hyperparameter(0.05, tune.loguniform(1e-3, 0.5), "step of the natural gradient", low=0.0)
    inner_iters = hyperparameter(100, tune.choice([50, 100, 300]), "gradient steps at each time", low=1)
    batch = hyperparameter(1000, tune.choice([200, 1000, 10000]), "perturbations of a gradient step", low=2)
    radius = hyperparameter(
        0.5,
        tune.loguniform(0.05, 2),
        "radius of the perturbations: about the size of the gains; it trades variance only",
        low=1e-9,
    )
    estimator = hyperparameter(
        "antithetic",
        tune.choice(["one_point", "baseline", "antithetic"]),
        "the paper's one-point estimate, with the batch mean as baseline, or in pairs K + e, K - e on common shocks",
        choices=["one_point", "baseline", "antithetic"],
    )
    warm_start = hyperparameter(False, tune.choice([False, True]), "begin a step from the next step's gains")
    shared_rollouts = hyperparameter(
        False, tune.choice([False, True]), "all players perturb at once in the same rollouts"
    )
    receding = hyperparameter(
        True, tune.choice([False, True]), "sweep backwards; otherwise update all times at once (baseline)"
    )
    exact = hyperparameter(False, None, "the model's own gradients in place of sampled ones")
    workers = hyperparameter(
        0, None, "Ray tasks that share the rollouts of a gradient step (0: this process)", low=0
    )
    chunk = hyperparameter(
        500, None, "perturbations drawn from one seed: the same numbers for any count of workers", low=1
    )
    report_every = hyperparameter(10, None, "gradient steps of a training iteration (of reports)", low=1)

    def get_default_learner_class(self) -> Any:
        return MRPGLearner

    def module_class(self) -> type[LQTeamsModule]:
        return MRPGModule


class MRPGModule(LQTeamsModule):
    """Linear policies u = -K_t (x - xbar) - Kbar_t xbar of every team.

    Buffers: K [2, N, T, p, n] (deviation, mean), value [2, N, T + 1, n, n] of these gains; exploitability [N] of them, and of the stages
    of the game sigma_min and margin [2, T] (see `riccati.Equilibrium`).
    """

    K: Tensor
    value: Tensor
    exploitability: Tensor
    sigma_min: Tensor
    margin: Tensor

    def setup(self) -> None:
        super().setup()
        c: dict[str, int] = dict(self.model_config)
        self.register_buffer(
            "K", torch.zeros(2, c["players"], c["horizon"], c["p"], c["n"], dtype=torch.float64)
        )
        self.register_buffer(
            "value",
            torch.zeros(2, c["players"], c["horizon"] + 1, c["n"], c["n"], dtype=torch.float64),
        )
        self.register_buffer("exploitability", torch.full((c["players"],), torch.nan, dtype=torch.float64))
        for name in ("sigma_min", "margin"):
            self.register_buffer(name, torch.full((2, c["horizon"]), torch.nan, dtype=torch.float64))

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        team, t, y, mean = self.read(batch[Columns.OBS])
        u = -torch.einsum("...pn,...n->...p", self.K[0][team, t], y)
        return {Columns.ACTIONS: u - torch.einsum("...pn,...n->...p", self.K[1][team, t], mean)}

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """gain, gain_bar [B, p, n] and value [B], the cost to go without noise; the certificate: sigma_min, margin [B, 2] of the step in
        both games, exploitability [B], what the team gains at best by leaving these gains, as a share of its cost.
        """
        team, t, y, mean = self.read(batch[Columns.OBS])
        P = self.value[:, team, t]
        parts = [torch.einsum("bn,bnm,bm->b", z, P[k], z) for k, z in enumerate((y, mean))]
        return {
            "gain": self.K[0][team, t],
            "gain_bar": self.K[1][team, t],
            "value": parts[0] + parts[1],
            "sigma_min": self.sigma_min[:, t].mT,
            "margin": self.margin[:, t].mT,
            "exploitability": self.exploitability[team],
        }


class MRPGLearner(Learner):
    """Holds the gains; the step is the algorithm's own."""

    @torch.no_grad()
    def learn(self, batch: Any) -> None:
        for name, value in batch.items():
            getattr(self.rl_module, name).copy_(value)


def chunk_sums(
    teams: LQTeams,
    K: Tensor,
    t: int,
    words: Sequence[tuple[int, ...]],
    sizes: Sequence[int],
    knobs: dict[str, Any],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`gradient_sums` of several chunks, each from a seed of its own: the work of one worker."""
    found = []
    for word, size in zip(words, sizes, strict=True):
        seed = int(np.random.SeedSequence(word).generate_state(1, np.uint64)[0] >> 1)
        g = torch.Generator().manual_seed(seed)
        drawn = draws(teams, t, size, knobs["radius"], shared=knobs["shared"], generator=g)
        found.append(
            gradient_sums(teams.games, K, t, drawn, estimator=knobs["estimator"], shared=knobs["shared"])
        )
    return found


class MRPG(Method, config=MRPGConfig):
    """Receding-horizon natural policy gradient."""

    config: MRPGConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.teams = self.config.teams()
        self.K = zero_gains(self.teams.games)
        self.t, self.inner = self.teams.games.horizon - 1, 0
        self.seed = torch.seed() % 2**31 if self.config.seed is None else int(self.config.seed)
        self.solution = riccati.nash(self.teams.games)
        if float(self.solution.margin.min()) <= 0:
            logger.warning(
                "the game is not diagonally dominant (margin %.3g): independent gradients may diverge",
                float(self.solution.margin.min()),
            )
        self._work = ray.remote(num_cpus=1)(chunk_sums) if self.config.workers else None

    @property
    def total_steps(self) -> int:
        """Gradient steps of the whole sweep."""
        return self.config.inner_iters * (self.teams.games.horizon if self.config.receding else 1)

    @property
    def done_steps(self) -> int:
        """Gradient steps taken so far."""
        if not self.config.receding:
            return self.inner
        return (self.teams.games.horizon - 1 - self.t) * self.config.inner_iters + self.inner

    def training_step(self) -> None:
        for _ in range(min(self.config.report_every, self.total_steps - self.done_steps)):
            times = [self.t] if self.config.receding else list(range(self.teams.games.horizon))
            if self.config.receding and self.inner == 0 and self.config.warm_start:
                self._warm_start()
            found, before = [self.gradient(t) for t in times], self.K[..., times, :, :].clone()
            for t, g in zip(times, found, strict=True):
                natural_step(self.K, t, g, self.teams.reset, self.config.eta, self.teams.mask)
            self._check(times, before)
            self.inner += 1
            if self.config.receding and self.inner == self.config.inner_iters:
                self.t, self.inner = self.t - 1, 0
        games = self.teams.games
        values = riccati.values(games, self.K)
        cost = riccati.expected_cost(values, self.teams.moments(), self.teams.noise).sum(0)
        gap = riccati.exploitability(games, self.K, self.teams.moments(), self.teams.noise).sum(0) / cost
        self.learn(
            {
                "K": self.K,
                "value": values,
                "exploitability": gap,
                "sigma_min": self.solution.sigma_min,
                "margin": self.solution.margin,
            }
        )
        learned = slice(self.t + (self.inner == 0), None) if self.config.receding else slice(None)
        error = (self.K - self.solution.K)[..., learned, :, :]
        for name, value in {
            "sweep": self.done_steps / self.total_steps,
            "error": float(error.abs().max()) if error.numel() else float("nan"),
            "exploitability": float(gap.max()),
            "margin": float(self.solution.margin.min()),
            **{f"cost_team_{i + 1}": float(c) for i, c in enumerate(cost)},
        }.items():
            self.metrics.log_value(name, value, window=1)

    def gradient(self, t: int) -> Tensor:
        """Gradient [2, N, p, n] at step t: exact, or from rollouts (of this process or of `workers` tasks)."""
        config, teams = self.config, self.teams
        if config.exact:
            P = riccati.values(teams.games, self.K)[..., t + 1, :, :]
            return exact_gradient(teams.games, self.K, t, P, teams.reset)
        sizes = [min(config.chunk, config.batch - start) for start in range(0, config.batch, config.chunk)]
        words = [(self.seed, t, self.inner, index) for index in range(len(sizes))]
        knobs = {
            "radius": config.radius,
            "shared": config.shared_rollouts,
            "estimator": config.estimator,
        }
        if self._work is None:
            parts = chunk_sums(teams, self.K, t, words, sizes, knobs)
        else:
            workers = config.workers
            calls = [
                self._work.remote(teams, self.K, t, words[i::workers], sizes[i::workers], knobs)
                for i in range(min(workers, len(sizes)))
            ]
            answers = gather(calls, "rollouts")
            # In the order of the chunks, so that sums do not depend on the number of workers.
            parts = [answers[i % workers][i // workers] for i in range(len(sizes))]
        sums = tuple(torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        dimensions = teams.mask.sum((-2, -1)).double()
        return gradient(sums, config.batch, config.radius, dimensions, config.estimator)  # type: ignore[arg-type]

    def _warm_start(self) -> None:
        if self.t + 1 < self.teams.games.horizon:
            self.K[..., self.t, :, :] = self.K[..., self.t + 1, :, :]

    def _check(self, times: list[int], before: Tensor) -> None:
        """Raises TrainingFault where a step, from the gains `before` [2, N, times, p, n], made one too large."""
        good = (self.K[..., times, :, :].abs() <= LARGEST_GAIN).all(-1).all(-1).all(0).all(0)
        if not bool(good.all()):
            index = int((~good).nonzero()[-1])
            last = before[:, :, index].flatten(1).round(decimals=2)
            shown = (
                f"last gains {last.tolist()}"
                if last.numel() <= 50
                else f"gains before up to {float(last.abs().max()):g}"
            )
            raise TrainingFault(
                f"the inner loop diverged at t={times[index]} (a gain above {LARGEST_GAIN:g}) with eta={self.config.eta}:"
                f" dominance margin of the game {float(self.solution.margin.min()):.3g}, {shown}; lower eta:"
                f" {safe_step(self.teams.games, self.solution.P):.2g} is safe near the equilibrium"
            )

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = {"K": self.K.clone(), "t": self.t, "inner": self.inner, "seed": self.seed}
        return {**super().get_state(*args, **kwargs), "mrpg": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "mrpg" in state:
            own = state["mrpg"]
            self.K, self.t, self.inner, self.seed = own["K"].clone(), own["t"], own["inner"], own["seed"]

    @classmethod
    def experiment(cls) -> Any:
        from mobula.algorithms.meanfield.mrpg_experiment import experiment

        return experiment()
