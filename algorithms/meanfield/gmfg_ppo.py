"""GMFG-PPO: graphon mean-field games with an unknown graphon (Zhang, Tan, Wang, Yang; JMLR 25, 2024, arXiv 2310.17531).

Agents at labels in [0, 1] meet their neighbourhood's aggregate z^alpha = integral W(alpha, beta) mu^beta.  An equilibrium is found by
one KL-proximal policy step against a frozen flow, then one damped step of that flow (part A).  Where the graphon, the transitions
and the rewards are unknown, a kernel regression estimates all three from logs of sampled agents, who need not know their
labels, and the optimiser runs on the estimate (part C: `algorithms/common/meanfield/estimation`).  In place of tables a network may
hold the policy, with particles for the population (part B: `gmfg_ppo_networks`).

Logs of continuous states and actions are played with `game="logs"`, `kernel="embedding"`: the regression is on mean embeddings, and the
optimiser runs on the estimate with its line of states cut into `bins` (states of one dimension, at most 20 different actions; others
can be estimated, `estimation.learn`, but not played).

Rewards are maximised.  Exploitability is that of the policy's own flow in the TRUE game, where there is one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mobula.algorithms.common.meanfield import estimation, solvers
from mobula.algorithms.common.meanfield.estimation import Learned, Settings
from mobula.algorithms.meanfield import gmfg_ppo_networks as networks
from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.continuous import ContinuousLogs, bins, load_continuous_logs
from mobula.envs.meanfield.graphon import FiniteMFG, Graphon
from mobula.envs.meanfield.logs import Logs, load_logs, simulate
from mobula.errors import ConfigError, DataError
from mobula.learning.learners import Learner
from mobula.method import Method, MethodConfig, hyperparameter

HORIZONS = {"sis": 20, "investment": 50, "beach_bar": 10}
TEMPERATURES = {"sis": 0.5, "investment": 1.0, "beach_bar": 0.3}

# Mathematics ----------------------------------------------------------------------------------------------


def step_sizes(
    t: int, T: int, c_eta: float, c_alpha: float, c_beta: float, schedule: str = "constant"
) -> tuple[float, float, float]:
    """(eta, alpha, beta) = (c_eta n^{-1/3}, c_alpha n^{-2/3}, c_beta n^{-1}) of iteration t = 1..T; n = T, or t for "decay".

    The policy contracts at the rate lam eta, its target drifts by O(alpha), the proximal step errs by O(eta): balancing
    alpha / (lam eta) = eta gives the exponents.  alpha and beta are shares, at most 1.
    """
    n = float(t if schedule == "decay" else T)
    return c_eta * n ** (-1 / 3), min(1.0, c_alpha * n ** (-2 / 3)), min(1.0, c_beta / n)


def without_floor(pi: Tensor, beta: float) -> Tensor:
    """The proximal step before the exploration floor: pi = (1 - beta) p + beta / A solved for p."""
    if beta >= 1:
        return pi
    p = ((pi - beta / pi.shape[-1]) / (1 - beta)).clamp_min(0.0)
    return p / p.sum(-1, keepdim=True)


class Average:
    """The policy that realises the average of the flows of all iterates: pi ~ sum_t mu_t(s) pi_t(a | s)."""

    def __init__(self, joint: Tensor | None = None) -> None:
        self.joint = joint

    def add(self, pi: Tensor, mu: Tensor) -> None:
        """pi [..., M, H, S, A] and its flow mu [..., M, H + 1, S]."""
        joint = mu[..., :-1, :].unsqueeze(-1) * pi
        self.joint = joint if self.joint is None else self.joint + joint

    @property
    def policy(self) -> Tensor:
        """[..., M, H, S, A]; uniform where nobody ever was."""
        assert self.joint is not None
        mass = self.joint.sum(-1, keepdim=True)
        return torch.where(mass > 0, self.joint / mass.clamp_min(1e-300), 1.0 / self.joint.shape[-1])


# Config, module, learner ------------------------------------------------------------------------------------


class GMFGPPOConfig(MethodConfig):
    """Graphon mean-field games, the graphon learned from agents' logs (Zhang et al., JMLR 2024, arXiv 2310.17531)."""

    citation = """@article{zhang2024learning,
  title={Learning Regularized Graphon Mean-Field Games with Unknown Graphons},
  author={Zhang, Fengzhuo and Tan, Vincent Y. F. and Wang, Zhaoran and Yang, Zhuoran},
  journal={Journal of Machine Learning Research},
  volume={25},
  year={2024},
  note={arXiv:2310.17531}
}"""
    when = (
        "Use it for very many strategic agents of different positions (epidemics, pricing, demand response) of whom logs exist but"
        " no network: it finds an equilibrium policy for every position. Logs must vary: if the mix of states that agents meet does"
        " not change between episodes, no method can see the network in them. It needs tens of agents and episodes; agents that"
        " are a small sample of a continuum need many more than agents that are the whole population, because what each one met is"
        " then itself an estimate. With `--set source=known` it is a solver for games with a known graphon. It does not fit"
        " games with few players, where one player moves the crowd. The served policy reads [label, degree, h, state] (one of label"
        " and degree may be null; h and state count from 0) and answers with the action and the probabilities of all actions, the"
        " aggregate of states that this position meets at h, and the forecast of its own shares of states at every step."
    )
    effort = (
        "An iteration on tables costs O(M H (S^2 A + M S)): on one core 4 ms for the epidemic at the defaults (M = 40 cells, H = 20), 10 ms"
        " for investment (S = 10, H = 50); a report, which scores four policies, as much again for each. A loss of the estimate costs"
        " O(n m (m + S)) for n samples (fewer where agents of a block share their z) and m inducing points: all of its search takes 10 s"
        " at the defaults, N = 40, L = 20."
    )
    needs_env = False
    default_stop = {"progress": 1.0}
    headline = ("exploitability", "exploitability in the true game")
    rejected = {
        "num_learners": "fits and logs are what is spread, with workers",
    }

    game = hyperparameter(
        "sis",
        None,
        "sis, investment, beach_bar, the path of a game (.npz or .json), or logs: continuous logs are all that is known",
    )
    graphon = hyperparameter(
        "sbm", None, "er:P, sbm, exp:THETA, threshold:T, uniform_attachment, ranked_attachment, or a matrix"
    )
    horizon = hyperparameter(None, None, "steps of the game (default: 20 SIS, 50 investment, 10 bar)", low=1)
    lam = hyperparameter(
        None,
        tune.loguniform(0.05, 2),
        "temperature of the entropy, above 0 (default: 0.5 SIS, 1.0 investment, 0.3 bar, 0.5 others)",
    )
    c_eta = hyperparameter(5.0, tune.loguniform(0.3, 20), "constant of the policy step T^(-1/3)", low=0.0)
    c_alpha = hyperparameter(5.0, tune.loguniform(0.3, 20), "constant of the flow step T^(-2/3)", low=0.0)
    c_beta = hyperparameter(0.1, tune.loguniform(1e-3, 1), "constant of the exploration floor 1 / T", low=0.0)
    schedule = hyperparameter(
        "constant", None, "steps fixed by T, or decaying in t", choices=["constant", "decay"]
    )
    T = hyperparameter(150, tune.choice([100, 300, 1000]), "iterations", low=1)
    M = hyperparameter(40, tune.choice([20, 40, 100]), "label cells", low=1)
    source = hyperparameter(
        "learned", None, "learn the model from logs, or take the true one", choices=["learned", "known"]
    )
    N = hyperparameter(40, None, "sampled agents of simulated logs", low=0)
    L = hyperparameter(20, None, "episodes of simulated logs", low=1)
    population = hyperparameter(
        "finite",
        tune.choice(["finite", "continuum"]),
        "the sampled agents are everybody, or draws from a continuum",
        choices=["finite", "continuum"],
    )
    positions = hyperparameter("known", None, "labels of the sampled agents", choices=["known", "hidden"])
    logs = hyperparameter(None, None, "Parquet file of logs in place of simulated ones")
    graphon_class = hyperparameter(
        "auto",
        tune.choice(["auto", "const", "exp", "sbm(2)", "sbm(3)"]),
        "const, exp, sbm(k), list (of `candidates`), or auto: by held-out loss",
    )
    candidates = hyperparameter([], None, "graphons of the class list, named as in `graphon`")
    gamma = hyperparameter(
        1e-3,
        tune.loguniform(1e-6, 1e-1),
        "ridge of the regression; wide kernels on continuous logs with little noise want far less, 1e-6 to 1e-9",
        low=1e-12,
    )
    sigma_K = hyperparameter(
        1.0, tune.loguniform(0.2, 5), "width of the kernel, in median distances of z", low=1e-6
    )
    bandwidth = hyperparameter(
        True, None, "choose gamma and sigma_K around their values on held-out episodes"
    )
    inducing = hyperparameter(50, tune.choice([25, 50, 200]), "points of the Nystroem approximation", low=2)
    kernel = hyperparameter(
        "product",
        tune.choice(["product", "embedding"]),
        "a regression for each state and action, or the literal kernel on embeddings (for game=logs)",
        choices=["product", "embedding"],
    )
    ground_width = hyperparameter(
        3.0,
        tune.loguniform(1, 10),
        "width of the kernel on continuous states and actions, in standard deviations of each (game=logs)",
        low=1e-6,
    )
    bins = hyperparameter(25, None, "bins that continuous states are cut into (game=logs)", low=2)
    share_time = hyperparameter(True, None, "one regression and graphon for all steps (stationary games)")
    restarts = hyperparameter(
        4, None, "starts of the search for a graphon; twice as many if labels are hidden", low=1
    )
    held_out = hyperparameter(
        0.2, None, "share of the episodes that choices are judged on", low=0.0, high=0.9
    )
    rounds = hyperparameter(
        1, None, "collections of logs: later ones mix the present policy into the exploration", low=1
    )
    policy = hyperparameter(
        "table", None, "exact tables, or networks and particles", choices=["table", "network"]
    )
    surrogate = hyperparameter(
        "closed",
        tune.choice(["closed", "kl", "clip"]),
        "policy loss of the networks: the closed proximal step, KL-penalised, or clipped (not the paper's)",
        choices=["closed", "kl", "clip"],
    )
    particles = hyperparameter(20_000, None, "particles of the networks' population", low=2)
    transitions = hyperparameter(16_384, None, "transitions that the networks see in an iteration", low=64)
    hidden = hyperparameter([64, 64], None, "hidden layers of the three networks")
    lr = hyperparameter(3e-3, tune.loguniform(1e-4, 1e-2), "step of Adam for the networks", low=0.0)
    epochs = hyperparameter(2, None, "passes over the transitions for Q and V, and for the policy", low=1)
    minibatch = hyperparameter(1024, None, "rows of a gradient step of the networks", low=1)
    clip = hyperparameter(0.2, None, "clip of the ratio for the surrogate clip", low=0.0)
    iters_per_step = hyperparameter(5, None, "iterations of a training iteration (of reports)", low=1)
    workers = hyperparameter(
        0,
        None,
        "Ray tasks that fits and simulated logs are spread over, and actors that hold particles",
        low=0,
    )

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        # An equilibrium is mixed: who acts greedily does not play it.
        self.evaluation(evaluation_config={"explore": True})
        self._spaces()

    def _spaces(self) -> None:
        if self.game == "logs" and self.logs is None:
            return
        game = self.true_game()
        high = np.array([1.0, 1.0, game.horizon - 1, game.states - 1])
        self.environment(
            observation_space=spaces.Box(np.zeros(4), high, dtype=np.float64),
            action_space=spaces.Discrete(game.actions),
        )

    def training(self, **kwargs: Any) -> Any:
        super().training(**kwargs)
        if self.lam is not None and not (isinstance(self.lam, int | float) and self.lam > 0):
            raise ConfigError(
                f"GMFGPPOConfig: lam is {self.lam!r}; the closed proximal step needs a temperature above 0: use a small"
                " positive value"
            )
        if {"game", "horizon", "graphon", "M", "logs", "bins"} & set(kwargs):
            self._spaces()
        return self

    def validate(self) -> None:
        super().validate()
        if self.game == "logs" and (
            self.logs is None or self.kernel != "embedding" or self.source != "learned"
        ):
            raise ConfigError(
                "GMFGPPOConfig: game=logs is learned from continuous logs: it needs logs=FILE, kernel=embedding and source=learned"
            )
        if self.N < 2:
            raise ConfigError(f"GMFGPPOConfig: N is {self.N}; agents need neighbours, at least 2")
        if self.graphon_class != "auto":
            estimation.parse(self.graphon_class)
        if self.graphon_class == "list" and not self.candidates:
            raise ConfigError("GMFGPPOConfig: graphon_class is 'list': name some graphons in candidates")

    def true_graphon(self) -> Graphon:
        """W of the true game."""
        return graphon.named(self.graphon)

    def true_game(self) -> FiniteMFG:
        """The true game on M cells; of continuous logs, what is known before anything is learned: sizes and where agents begin."""
        W = graphon.matrix(self.true_graphon(), graphon.cells(self.M))
        horizon = None if self.horizon is None else int(self.horizon)
        if self.game == "logs":
            return _at_rest(self.continuous_logs(), W, horizon, int(self.bins))
        if self.game in graphon.GAMES:
            return graphon.GAMES[self.game](W, horizon or HORIZONS[self.game])
        if self.game.endswith((".npz", ".json")):
            return graphon.load_game(self.game, W, horizon)
        raise ConfigError(
            f"GMFGPPOConfig: game is {self.game!r}; it is one of {', '.join(graphon.GAMES)}, logs, or a .npz or .json file"
        )

    def continuous_logs(self) -> ContinuousLogs:
        """The logs of game=logs."""
        if self.logs is None:
            raise ConfigError("GMFGPPOConfig: game=logs needs logs=FILE")
        path = Path(self.logs).absolute()
        return _read(path, path.stat().st_mtime_ns if path.exists() else 0)

    def temperature(self) -> float:
        """lam, or the game's own."""
        return float(TEMPERATURES.get(self.game, 0.5) if self.lam is None else self.lam)

    def settings(self, seed: int) -> Settings:
        """How graphons are fitted."""
        return Settings(
            gamma=self.gamma,
            sigma=self.sigma_K,
            inducing=self.inducing,
            kernel=self.kernel,
            ground_width=self.ground_width,
            restarts=self.restarts,
            held_out=self.held_out,
            bandwidth=self.bandwidth,
            seed=seed,
        )

    def get_default_learner_class(self) -> Any:
        return GMFGPPOLearner if self.policy == "table" else networks.NetworkLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        game = self.true_game()
        sizes: dict[str, Any] = {"M": self.M, "H": game.horizon, "S": game.states, "A": game.actions}
        if self.policy == "table":
            return RLModuleSpec(module_class=GMFGPPOModule, model_config=sizes)
        return RLModuleSpec(
            module_class=networks.NetworkModule, model_config={**sizes, "hidden": list(self.hidden)}
        )

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}


@lru_cache(maxsize=2)
def _read(path: Path, changed: int) -> ContinuousLogs:
    """The logs of a file, which a config asks for several times; changed: so that another file of the name is read anew."""
    return load_continuous_logs(path)


def _at_rest(logs: ContinuousLogs, W: Tensor, horizon: int | None, count: int) -> FiniteMFG:
    """A game of the size of the logs in which everybody stays and earns nothing."""
    cut = bins(logs, count)
    A = len(cut.actions)
    stay = torch.eye(count, dtype=torch.float64).unsqueeze(1).expand(count, A, count)

    def model(h: int, z: Tensor) -> tuple[Tensor, Tensor]:
        shape = z.shape[:-1]
        return stay.expand(*shape, count, A, count), z.new_zeros(*shape, count, A)

    law = cut.law.expand(W.shape[-1], -1)
    return FiniteMFG("logs", count, A, horizon or logs.horizon, law, W, model)


class GMFGPPOModule(networks.Positions):
    """A policy for every cell, step and state.

    Observation [label, degree, h, state]; where the label is null (NaN), the cell of the nearest degree is meant.  Served: probs
    [A], the aggregate z [S] that the cell meets at h, and the forecast [H + 1, S] of its own state shares.
    """

    def _probabilities(self, cell: Tensor, label: Tensor, h: Tensor, state: Tensor) -> Tensor:
        found: Tensor = self.policy[cell, h, state]
        return found


class GMFGPPOLearner(Learner):
    """Holds the tables; the step is the algorithm's own."""

    @torch.no_grad()
    def learn(self, batch: Any) -> None:
        for name, value in batch.items():
            getattr(self.rl_module, name).copy_(value)


# Algorithm --------------------------------------------------------------------------------------------------------


class GMFGPPO(Method, config=GMFGPPOConfig):
    """Proximal steps against a damped flow, in the true or in an estimated game."""

    config: GMFGPPOConfig
    learned: Learned | None
    population: networks.Population | None

    def setup(self, config: Any) -> None:
        super().setup(config)
        c = self.config
        self.seed = torch.seed() % 2**31 if c.seed is None else int(c.seed)
        self.truth, self.lam = c.true_game(), c.temperature()
        self.t, self.learned = 0, None
        self.logs: Logs | ContinuousLogs | None = None
        self.game = self.truth
        # The policy that agents of each true cell follow: the identity where positions are known.
        self.cell = torch.arange(c.M)
        self.state = solvers.initial(self.truth)
        self.average, self.scores = Average(), 0.0
        self.population = None

    def training_step(self) -> None:
        c, before = self.config, self.t
        for _ in range(min(c.iters_per_step, c.T - self.t)):
            if c.source == "learned" and self.t in {k * c.T // c.rounds for k in range(c.rounds)}:
                self.fit()
            self.t += 1
            eta, alpha, beta = self.sizes()
            if c.policy == "table":
                self.state = solvers.gmfg_ppo(self.lam, eta, alpha, beta)(self.game, self.state)
            else:
                self.state = self.network_step(eta, alpha, beta)
            self.average.add(self.state.policy, graphon.flow(self.game, self.state.policy))
        self.report(self.sizes()[-1], self.t - before)

    def sizes(self) -> tuple[float, float, float]:
        """(eta, alpha, beta) of the step `t`."""
        c = self.config
        return step_sizes(self.t, c.T, c.c_eta, c.c_alpha, c.c_beta, c.schedule)

    def fit(self) -> None:
        """Logs of a round, and the model that they give; the flow starts anew from the policy's own in that model."""
        c = self.config
        if c.game == "logs":
            logs = c.continuous_logs()
            if not c.share_time and logs.horizon != self.truth.horizon:
                raise DataError(
                    f"{c.logs} has {logs.horizon} steps: set share_time or horizon={logs.horizon}"
                )
            self.logs = logs.hidden() if c.positions == "hidden" else logs
        elif c.logs is not None:
            if self.logs is None:
                self.logs = self.read_logs(Path(c.logs))
        else:
            seen = 0 if self.logs is None else self.logs.episodes
            assert not isinstance(self.logs, ContinuousLogs)
            new = simulate(
                self.truth,
                c.true_graphon(),
                c.N,
                c.L,
                population=c.population,
                seed=self.seed,
                policy=None if self.logs is None else self.state.policy[self.cell],
                workers=c.workers,
                first=seen,
            )
            new = new.hidden() if c.positions == "hidden" else new
            self.logs = new if self.logs is None else self.logs.joined(new)
        self.learned = estimation.learn(
            self.logs,
            c.graphon_class,
            c.settings(self.seed),
            candidates=[graphon.named(name) for name in c.candidates],
            share_time=c.share_time,
            workers=c.workers,
        )
        self.adopt(self.learned)
        self.state = self.state._replace(flow=graphon.flow(self.game, self.state.policy))

    def read_logs(self, path: Path) -> Logs:
        """The logs of a file, checked against the game's states, actions and steps."""
        c, logs = self.config, load_logs(path)
        found = (logs.states, logs.actions, logs.horizon)
        game = self.truth
        if logs.states > game.states or logs.actions > game.actions:
            raise DataError(
                f"{path} has {found[0]} states and {found[1]} actions; the game {c.game} has {game.states} and {game.actions}"
            )
        if not c.share_time and logs.horizon != game.horizon:
            raise DataError(
                f"{path} has {found[2]} steps; the game has {game.horizon}: set share_time or horizon"
            )
        logs = Logs(**{**vars(logs), "states": game.states, "actions": game.actions})
        return logs.hidden() if c.positions == "hidden" else logs

    def adopt(self, learned: Learned) -> None:
        """Plays in the model that was learned."""
        c, cells = self.config, graphon.cells(self.config.M)
        if c.game == "logs":
            cut = bins(c.continuous_logs(), int(c.bins))
            self.game = estimation.plug_in_bins(learned, cut, self.truth.horizon, cells)
        else:
            self.game = estimation.plug_in(learned, self.truth, cells)
        if c.positions == "hidden" and c.logs is None:
            assert self.logs is not None
            self.cell = estimation.cell_of(learned, cells, graphon.cells(self.logs.agents))

    def network_step(self, eta: float, alpha: float, beta: float) -> solvers.State:
        """One iteration of part B: networks on transitions under the frozen flow, then the particles' flow, thinned in."""
        c = self.config
        if self.population is None:
            self.population = networks.Population(self.seed, c.particles, actors=c.workers)
            self.population.begin(self.game, self.state.policy)
        rows = self.population.transitions(self.game, self.state.policy, c.transitions, self.t)
        self.learn(rows, lam=self.lam, eta=eta, num_epochs=c.epochs, minibatch_size=c.minibatch)
        table = self.rl_module.table()
        policy = (1 - beta) * table + beta / table.shape[-1]
        self.population.replace(self.game, policy, alpha, self.t)
        return solvers.State(policy, self.population.flow(self.game), self.state.extra, self.t)

    def report(self, beta: float, taken: int) -> None:
        """Scores the policy in the true game and hands tables, aggregate and forecast to the module.

        taken: iterations since the last report, for which this policy stands in the mean over iterations.
        """
        c, pi = self.config, self.state.policy
        mine = pi[self.cell]
        values: dict[str, float] = {"progress": self.t / c.T}
        judge = self.truth if c.logs is None else self.game
        gain = graphon.exploitability(judge, mine if c.logs is None else pi, self.lam)
        bare = without_floor(pi, beta)
        average = self.average.policy
        if c.logs is None:
            bare, average = bare[self.cell], average[self.cell]
        self.scores += float(gain.mean()) * taken
        values |= {
            "exploitability": float(gain.mean()),
            "exploitability_max": float(gain.max()),
            "exploitability_without_floor": float(graphon.exploitability(judge, bare, self.lam).mean()),
            "exploitability_average": float(graphon.exploitability(judge, average, self.lam).mean()),
            "exploitability_mean": self.scores / self.t,
        }
        if self.learned is not None:
            values["exploitability_in_model"] = float(graphon.exploitability(self.game, pi, self.lam).mean())
            values["fit_loss"] = self.learned.loss
        mu = graphon.flow(self.game, pi)
        z = torch.stack([graphon.aggregate(self.game, mu[:, h], h) for h in range(self.game.horizon)], 1)
        tables = {"policy": pi, "aggregate": z, "forecast": mu, "degree": self.game.at(0).mean(-1)}
        self.learn(tables)
        for name, value in values.items():
            self.metrics.log_value(name, value, window=1)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = {
            "t": self.t,
            "seed": self.seed,
            "state": tuple(self.state),
            "average": self.average.joint,
            "scores": self.scores,
            "logs": self.logs,
            # Graphons are functions; those of the class list are made again from their names.
            "learned": None if self.learned is None else replace(self.learned, candidates=()),
            "particles": None if self.population is None else self.population.paths,
        }
        return {**super().get_state(*args, **kwargs), "gmfg_ppo": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "gmfg_ppo" not in state:
            return
        own = state["gmfg_ppo"]
        self.t, self.seed, self.scores = own["t"], own["seed"], own["scores"]
        self.state = solvers.State(*own["state"])
        self.average = Average(own["average"])
        self.logs, self.learned = own["logs"], own["learned"]
        if self.learned is not None:
            self.learned.candidates = [graphon.named(name) for name in self.config.candidates]
            self.adopt(self.learned)
        if own["particles"] is not None:
            self.population = networks.Population(
                self.seed, self.config.particles, own["particles"], actors=self.config.workers
            )

    def cleanup(self) -> None:
        population = getattr(self, "population", None)
        if population is not None:
            population.close()
        super().cleanup()

    @classmethod
    def experiment(cls) -> Any:
        from mobula.algorithms.meanfield.gmfg_ppo_experiment import experiment

        return experiment()
