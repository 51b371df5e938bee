"""DolMD and SilMD: differentiable bilevel programming for Stackelberg congestion games (Li et al., arXiv 2209.07618).

A leader sets tolls or capacities, users then route themselves to an equilibrium, and the leader wants the design whose equilibrium is
best.  The equilibrium is replaced by the trajectory of the imitative logit dynamic, which is smooth in the design, and the objective
is differentiated through it:

    DolMD   from uniform shares, run the dynamic to a gap eps, differentiate through all its steps, move the design; again
    SilMD   keep the users' state; differentiate through T steps ahead of it, move the design, move the users; again

Shortest paths are added to the path set as the search goes on.  Both are local: several starting designs run side by side, and
every design is judged at an equilibrium of the reference solver, never at the unrolled flows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import ray
import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mobula.algorithms.markets.baselines import heuristics
from mobula.algorithms.markets.stackelberg_congestion.learner import StackelbergCongestionLearner
from mobula.algorithms.markets.stackelberg_congestion.math import leader_step
from mobula.algorithms.markets.stackelberg_congestion.module import NETWORK, StackelbergCongestionModule
from mobula.algorithms.markets.stackelberg_congestion.search import FOUND, Search, Settings
from mobula.envs.markets import design as designs
from mobula.envs.markets.assignment import Assignment
from mobula.envs.markets.design import OBJECTIVES, Problem, make_problem
from mobula.envs.markets.dynamics import PathSet, Share, cut
from mobula.errors import ConfigError
from mobula.method import Method, MethodConfig, hyperparameter
from mobula.metrics import spread

ZERO_ANTICIPATION = (
    "T=0 is zero anticipation: the leader would take routes as given, and zero anticipation is perilous"
    " (the design ends far from the best one); look ahead by T=1 or more"
)

DEFAULTS: dict[str, Any] = {
    "r": "auto",
    "alpha": None,
    "beta": 10.0,
    "T": 10,
    "advance": "T",
    "eps": 1e-5,
    "xi": 1e-3,
}
STARTS: dict[str, tuple[str | None, Callable[[Problem], Any]]] = {
    "zero": (None, lambda problem: np.zeros(problem.size)),
    "mct": ("toll", heuristics.mct),
    "emcdt": ("toll", heuristics.emcdt),
    "ct": ("toll", heuristics.ct),
    "ioa": ("capacity", heuristics.ioa),
    "so_design": ("capacity", lambda problem: heuristics.so_design(problem)[0]),
}
"""Starting designs by name: (the kind of design that they are, if of one kind, and how they are found)."""
OWN = "; default: the instance's own, else "


@lru_cache(maxsize=4)
def _problem(key: str) -> Problem:
    """The problem of some settings; RLlib asks for it several times, and picking candidates takes an equilibrium."""
    network, objective, _, given, factor = json.loads(key)
    return make_problem(network, objective, **given).with_demand(factor)


class StackelbergCongestionConfig(MethodConfig):
    """Tolls and road capacities against users who re-route: DolMD and SilMD (Li et al. 2022, arXiv 2209.07618)."""

    citation = """@article{li2022differentiable,
  title={Differentiable Bilevel Programming for Stackelberg Congestion Games},
  author={Li, Jiayang and Yu, Jing and Wang, Qianni and Liu, Boyi and Wang, Zhaoran and Nie, Yu Marco},
  journal={arXiv preprint arXiv:2209.07618},
  year={2022}
}"""
    when = (
        "Use it to set tolls, prices or capacities on a network whose users answer by choosing other routes: roads, data networks,"
        " clouds. The objective may be any differentiable function of flows and design. SilMD with a short look-ahead is the one to"
        " start with; DolMD is dearer and finds slightly better designs. Both find local optima: give several starts (`init`)."
        " Where a handful of links can be enumerated on a grid, do that; where every link may be tolled, marginal-cost tolls are"
        " optimal and cost one assignment. Users who do not choose least-cost routes (fixed itineraries, habits) are not modelled."
    )
    effort = (
        "An iteration costs its steps of the dynamic, forward and back, each linear in the entries of the link-path incidence: T steps for"
        " SilMD, some hundreds at the end of a search for DolMD, which runs them forward twice. Measured on one core on Sioux Falls (528"
        " OD pairs, 1,100 paths, capacities): SilMD with T = 10 takes 0.1 s an iteration for five demand tables side by side, DolMD 2.6 s"
        " for two. At the size of Chicago-Sketch (93,000 OD pairs, 500,000 paths) T = 10 takes 3 s on one learner and 1.3 s where two"
        " share the OD pairs; below some 50,000 paths what the learners have to say to each other costs more than they save."
    )
    needs_env = False
    default_stop = {"converged": 1.0, "iterations": 1000}
    headline = ("objective", "objective at the users' equilibrium")
    rejected = {"gamma": "the game has no time", "lr": "the step is alpha beta / (beta + n)"}

    network = hyperparameter(
        "braess5",
        None,
        "braess5, hearn9, pigou, braess, gridN[-sSEED][-zZONES], siouxfalls (folder in MOBULA_SIOUXFALLS), or a folder of TNTP files",
    )
    objective = hyperparameter(
        None,
        None,
        "cndp (capacities), sctp (tolls against travel time), revenue (tolls); default: the instance's",
    )
    links = hyperparameter(None, None, 'candidate links, by name ("1-6") or row (default: the instance\'s)')
    cost = hyperparameter(None, None, "investment costs of the candidates, or length, or free_flow_time")
    eta = hyperparameter(None, None, "weight of investment costs (default: the instance's, else 1)", low=0.0)
    upper = hyperparameter(None, None, "largest value of a design (default: none)", low=0.0)
    demand_scale = hyperparameter(None, None, "unit of demands (default: the instance's, else 1)", low=0.0)
    capacity_scale = hyperparameter(None, None, "unit of capacities", low=0.0)
    time_scale = hyperparameter(None, None, "unit of times", low=0.0)
    algorithm = hyperparameter(
        "silmd", tune.choice(["silmd", "dolmd"]), "single or double loop", choices=["silmd", "dolmd"]
    )
    T = hyperparameter(None, tune.choice([1, 2, 5, 10, 20, 40]), f"look-ahead of SilMD, 1 or more{OWN}10")
    advance = hyperparameter(
        None, tune.choice(["one", "T"]), f"steps of the users for one of the leader: one or T{OWN}T"
    )
    r = hyperparameter(
        None,
        tune.loguniform(0.05, 20),
        f"rate of the dynamic: a number, auto (from the slopes at the start) or safe (descent for sure){OWN}auto",
    )
    alpha = hyperparameter(
        None,
        tune.loguniform(1e-3, 10),
        f"leader's step alpha beta / (beta + n){OWN}a tenth of the mean capacity or time of the candidates at first",
        low=1e-12,
    )
    beta = hyperparameter(
        None, tune.choice([5, 10, 20, 40]), f"decay of the step, 0: constant{OWN}10", low=0.0
    )
    eps = hyperparameter(None, tune.choice([1e-4, 1e-5, 1e-6]), f"relative gap{OWN}1e-5", low=1e-12)
    xi = hyperparameter(None, tune.choice([1e-2, 1e-3, 1e-4]), f"stop at changes below it{OWN}1e-3", low=0.0)
    path_schedule = hyperparameter(
        "release",
        tune.choice(["release", "every", "static_k_shortest"]),
        "when shortest paths are added: often at first then rarely, always, or never (k shortest at free flow)",
        choices=["release", "every", "static_k_shortest"],
    )
    k_shortest = hyperparameter(5, None, "paths of an OD pair where the set is static", low=1)
    mirror = hyperparameter(
        "euclidean",
        None,
        "mirror map of the leader: euclidean or entropic",
        choices=["euclidean", "entropic"],
    )
    init = hyperparameter(
        None,
        None,
        "starting designs: zero, for tolls mct (marginal-cost), emcdt (their multiplicative update), ct (links in turn), for capacities"
        " ioa (alternation), so_design (joint optimum), or lists of numbers (default: zero, and mct for tolls)",
    )
    demand_factor = hyperparameter(1.0, None, "factor on all demands", low=1e-6)
    scenarios = hyperparameter(
        1, None, "demand scenarios whose mean objective is minimised; the first is the demand itself", low=1
    )
    spread = hyperparameter(
        0.1,
        None,
        "scenarios multiply all demands by a draw from U[1 - spread, 1 + spread]",
        low=0.0,
        high=0.99,
    )
    gap_freq = hyperparameter(10, None, "steps of the dynamic between two tests of the gap (DolMD)", low=1)
    truncate = hyperparameter(False, None, "DolMD: differentiate from the gap 10 eps on only (memory)")
    eval_every = hyperparameter(
        None, None, "iterations between two judgements (default: 1 below 100 OD pairs, else 25)", low=1
    )
    eval_gap = hyperparameter(1e-8, None, "relative gap at which designs are judged", low=1e-13)
    workers = hyperparameter(
        0,
        None,
        "Ray tasks that share shortest paths, equilibria at the start and judgements (0: this process)",
        low=0,
    )
    od_shards = hyperparameter(
        1,
        None,
        "learners that share the OD pairs of a scenario (very large networks); num_learners is a multiple of it",
        low=1,
    )

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self.sizes: dict[str, Any] = {}

    def training(self, **kwargs: Any) -> Any:
        super().training(**kwargs)
        self._check()
        return self

    def _check(self) -> None:
        where = type(self).__name__
        if self.T is not None and (
            isinstance(self.T, bool)
            or not isinstance(self.T, int | float)
            or not (self.T >= 1 and float(self.T).is_integer())
        ):
            raise ConfigError(
                f"{where}: {ZERO_ANTICIPATION}"
                if self.T == 0
                else f"{where}: T is {self.T!r}: a whole number of 1 or more is needed"
            )
        if self.advance is not None and self.advance not in ("one", "T"):
            raise ConfigError(f"{where}: advance is {self.advance!r}: it is 'one' or 'T'")
        rate = isinstance(self.r, int | float) and not isinstance(self.r, bool) and 0 < self.r < np.inf
        if not (self.r in (None, "auto", "safe") or rate):
            raise ConfigError(f"{where}: r is {self.r!r}: it is auto, safe, or a number above 0")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise ConfigError(
                f"{where}: objective is {self.objective!r}; it is one of {', '.join(OBJECTIVES)}"
            )

    def validate(self) -> None:
        super().validate()
        self._check()
        problem = self.problem()
        learners, pairs = max(self.num_learners, 1), problem.network.num_ods
        if learners % self.od_shards:
            raise ConfigError(
                f"od_shards is {self.od_shards}, num_learners {self.num_learners}: a multiple of od_shards is needed"
            )
        if self.od_shards > pairs:
            raise ConfigError(f"od_shards is {self.od_shards}: {problem.network.name} has {pairs} OD pairs")
        if learners // self.od_shards > self.scenarios:
            raise ConfigError(
                f"num_learners is {self.num_learners}, od_shards {self.od_shards}: {learners // self.od_shards} groups of learners cannot"
                f" share {self.scenarios} demand scenarios: lower num_learners, or raise od_shards or scenarios"
            )
        names, _ = self.starts(problem)
        self.sizes = {
            "network": problem.network.name,
            "objective": problem.objective,
            "kind": problem.kind,
            "eta": problem.eta,
            "upper": problem.upper,
            "first_thru": problem.network.first_thru,
            "nodes": problem.network.nodes,
            "links": problem.network.num_links,
            "pairs": problem.network.num_ods,
            "m": problem.size,
            "starts": names,
        }
        top = np.inf if problem.upper is None else problem.upper
        m = problem.size
        self.environment(
            observation_space=spaces.Box(0.0, np.r_[np.full(m, top), np.inf], dtype=np.float64),
            action_space=spaces.Box(0.0, top, (m,), np.float64),
        )

    def problem(self) -> Problem:
        """The leader's problem of these settings."""
        names = ("links", "cost", "eta", "upper", "demand_scale", "capacity_scale", "time_scale")
        given = {name: getattr(self, name) for name in names}
        folder = os.environ.get(designs.SIOUXFALLS) if str(self.network).lower() == "siouxfalls" else None
        key = json.dumps([self.network, self.objective, folder, given, self.demand_factor])
        return _problem(key)

    def settings(self, problem: Problem) -> Settings:
        """Knobs that are set; then the instance's own; then the defaults."""
        own = {k: v for k, v in problem.steps.items() if k != "dolmd"}
        if self.algorithm == "dolmd":
            own |= problem.steps.get("dolmd", {})
        chosen = {
            **DEFAULTS,
            **own,
            **{k: getattr(self, k) for k in DEFAULTS if getattr(self, k) is not None},
        }
        names = ("algorithm", "path_schedule", "k_shortest", "mirror", "gap_freq", "truncate")
        chosen["T"] = int(chosen["T"])
        return Settings(**chosen, **{name: getattr(self, name) for name in names})

    def starts(self, problem: Problem) -> tuple[list[str], Any]:
        """(names, function that computes the starting designs [I, m]).  Raises ConfigError for an infeasible one."""
        wanted = self.init
        if wanted is None:
            wanted = ["zero", "mct"] if problem.kind == "toll" else ["zero"]
        if not isinstance(wanted, list | tuple) or not wanted:
            wanted = [wanted]
        names, fixed = [], []
        for i, item in enumerate(wanted):
            if isinstance(item, str) and item not in STARTS:
                raise ConfigError(f"init: {item!r} is neither {', '.join(STARTS)}, nor a list of numbers")
            if isinstance(item, str) and STARTS[item][0] not in (None, problem.kind):
                others = [name for name, (kind, _) in STARTS.items() if kind in (None, problem.kind)]
                raise ConfigError(
                    f"init: {item} sets {'tolls' if problem.kind == 'capacity' else 'capacities'}; the design of this problem is"
                    f" {problem.kind}: use {', '.join(others)} or numbers"
                )
            names.append(item if isinstance(item, str) else f"init[{i}]")
            fixed.append(None if isinstance(item, str) else problem.feasible(item, f"init[{i}]"))
            if fixed[-1] is not None and self.mirror == "entropic" and not (fixed[-1] > 0).all():
                raise ConfigError(f"init[{i}]: the entropic mirror map needs a design above 0 on every link")

        def compute() -> Tensor:
            each = [
                STARTS[name][1](problem) if y is None else y for name, y in zip(names, fixed, strict=True)
            ]
            return problem.project(torch.from_numpy(np.stack(each)))

        return names, compute

    def demands(self, problem: Problem, starts: int) -> Tensor:
        """Demand [S, I, W] of the scenarios."""
        rng = np.random.default_rng([0 if self.seed is None else int(self.seed), 1])
        factors = 1.0 + self.spread * rng.uniform(-1, 1, self.scenarios)
        factors[0] = 1.0
        demand = torch.from_numpy(factors[:, None, None] * problem.network.demand)
        return demand.expand(-1, starts, -1).contiguous()

    def get_default_learner_class(self) -> Any:
        return StackelbergCongestionLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=StackelbergCongestionModule, model_config=dict(self.sizes))

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}


def _bounds(problem: Problem, factor: float, gap: float) -> designs.Bounds:
    return designs.bounds(problem, demand=factor, gap=gap)


def _judged(problem: Problem, y: Any, factor: float, gap: float, start: Any) -> Any:
    return designs.evaluate(problem, y, demand=factor, gap=gap, start=start)


class StackelbergCongestion(Method, config=StackelbergCongestionConfig):
    """One leader iteration is one training step."""

    config: StackelbergCongestionConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        c = self.config
        self.problem = c.problem()
        self.start_names, compute = c.starts(self.problem)
        starts = compute()
        self.demand = c.demands(self.problem, len(starts))
        self.factors = (self.demand[:, 0].sum(-1) / self.problem.network.demand.sum()).tolist()
        self.search = Search(self.problem, c.settings(self.problem), self.demand, starts, workers=c.workers)
        self.eval_every = int(c.eval_every or (1 if self.problem.network.num_ods < 100 else 25))
        self._warm: dict[tuple[int, int], Assignment] = {}
        self._sent: dict[str, Any] = {}
        self._whole: PathSet | None = None
        jobs = [(self.problem, f, c.eval_gap) for f in self.factors]
        self.bounds = spread(_bounds, jobs, c.workers, "references")
        baseline = float(np.mean([b.objective for b in self.bounds]))
        buffers = {"baseline": torch.tensor(baseline, dtype=torch.float64)}
        module = StackelbergCongestionModule(
            observation_space=c.observation_space,
            action_space=c.action_space,
            model_config=dict(c.sizes),
        )
        module.hold(self.problem)
        names = ("candidates", "investment", *NETWORK)
        self._keep({**{name: getattr(module, name) for name in names}, **buffers})
        self.judge()

    # Where the work is done -------------------------------------------------------------------------------

    def _keep(self, state: dict[str, Tensor]) -> None:
        if self.learner_group.is_local:
            self.learner_group._learner.keep(state)
        else:
            self.learner_group.foreach_learner(lambda learner: learner.keep(state))
        self._weights = None

    def _shared(self, name: str, value: Any) -> Any:
        """`value`, or a reference to it where learners are remote; put once as long as it is the same object."""
        if self.learner_group.is_local:
            return value
        if name not in self._sent or self._sent[name][0] is not value:
            self._sent[name] = (value, ray.put(value))
        return self._sent[name][1]

    def _shares(self) -> list[Share]:
        """The present path set, cut for the learners that share it."""
        whole = self.search.paths.flat()
        if self._whole is not whole:
            self._whole, self._cut = whole, cut(whole, self.config.od_shards)
        return self._cut

    def _batches(self, shares: list[Share]) -> list[dict[str, Tensor]]:
        """The work of each learner: its scenarios, and of these its OD pairs."""
        groups = max(self.config.num_learners, 1) // len(shares)
        split = {name: value.tensor_split(groups) for name, value in self.search.ask().items()}
        return [
            {
                "demand": split["demand"][g][..., share.first : share.first + share.paths.pairs].contiguous(),
                "y": split["y"][g],
                "logits": split["logits"][g][..., share.columns],
                "r": split["r"][g],
            }
            for g in range(groups)
            for share in shares
        ]

    def _results(self, shares: list[Share]) -> dict[str, Tensor]:
        """What the learners found, scenarios and paths in order."""
        if self.learner_group.is_local:
            return self.learner_group._learner.result
        answers = self.learner_group.foreach_learner(
            lambda learner: (learner._learner_index, {k: v.numpy() for k, v in learner.result.items()})
        )
        ordered = [
            found for _, found in sorted((answer.get() for answer in answers), key=lambda pair: pair[0])
        ]
        gradient = torch.from_numpy(np.array(ordered[0]["gradient"]))
        groups = []
        for g in range(0, len(ordered), len(shares)):
            each = [
                {name: torch.from_numpy(np.array(v)) for name, v in found.items()}
                for found in ordered[g : g + len(shares)]
            ]
            whole = dict(each[0])
            for name in ("logits", "one"):
                whole[name] = each[0][name].new_empty(*each[0][name].shape[:2], len(self.search.paths))
                for share, found in zip(shares, each, strict=True):
                    whole[name][..., share.columns] = found[name]
            groups.append(whole)
        return {
            **{name: torch.cat([whole[name] for whole in groups]) for name in FOUND},
            "gradient": gradient,
        }

    def training_step(self) -> None:
        search = self.search
        if not search.converged:
            shares = self._shares()
            self.learn(
                self._batches(shares),
                problem=self._shared("problem", self.problem),
                shares=[self._shared(f"share {i}", share) for i, share in enumerate(shares)],
                scenarios=search.S,
                options=search.options(),
            )
            found = self._results(shares)
            gradient = found["gradient"]
            y = leader_step(self.problem, search.y, gradient, search.steps(gradient), search.settings.mirror)
            search.tell(y, found)
            self.unrolled = found["F"].mean(0)
            self._keep({"y": search.y})
            if search.converged or search.n % self.eval_every == 0:
                self.judge()
        self._report()

    def judge(self) -> None:
        """Every design at the equilibrium of every scenario; the means are the objectives that count."""
        c, search = self.config, self.search
        pairs = [(s, i) for s in range(search.S) for i in range(search.I)]
        calls = [
            (self.problem, search.y[i].numpy(), self.factors[s], c.eval_gap, self._warm.get((s, i)))
            for s, i in pairs
        ]
        found = spread(_judged, calls, c.workers, "judgements")
        self._warm = {pair: one.assignment for pair, one in zip(pairs, found, strict=True)}
        table = torch.tensor([one.objective for one in found], dtype=torch.float64).view(search.S, search.I)
        times = np.array([one.travel_time for one in found]).reshape(search.S, search.I)
        self.objectives = table.mean(0)
        best = int(self.objectives.argmin())
        optimum, equilibrium_ = (
            float(np.mean([getattr(b, name) for b in self.bounds])) for name in ("optimum", "equilibrium")
        )
        self.normalised = (float(times[:, best].mean()) - optimum) / (equilibrium_ - optimum)
        self.shown = found[best]
        self._keep({"y": search.y, "value": self.objectives})

    def _report(self) -> None:
        search = self.search
        baseline = float(np.mean([b.objective for b in self.bounds]))
        best = int(self.objectives.argmin())
        for name, value in {
            "objective": float(self.objectives[best]),
            "no_design": baseline,
            "normalised": self.normalised,
            "unrolled": float(self.unrolled[best]),
            "change": float(search.change.max()),
            "gap": float(search.gap.max()),
            "paths": len(search.paths),
            "ild_steps": search.ild_steps,
            "r": float(search.r.mean()),
            "converged": float(search.converged),
            **{
                f"objective_{name}": float(v)
                for name, v in zip(self.start_names, self.objectives, strict=True)
            },
        }.items():
            self.metrics.log_value(name, value, window=1)

    # State, figures, experiment ---------------------------------------------------------------------------

    unrolled = torch.full((1,), torch.nan)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = {
            **self.search.state(),
            "objectives": self.objectives,
            "normalised": self.normalised,
            "unrolled": self.unrolled,
            # Where the next judgement starts from: it decides the digits below its gap.
            "_warm": self._warm,
        }
        return {**super().get_state(*args, **kwargs), "stackelberg_congestion": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "stackelberg_congestion" in state:
            own = dict(state["stackelberg_congestion"])
            for name in ("objectives", "normalised", "unrolled", "_warm"):
                setattr(self, name, own.pop(name))
            self.search.restore(own)

    def figures(self, folder: FilePath) -> list[str]:
        """network.png: flows and design of the best start; no file where the network has no positions."""
        from mobula.envs.markets.plots import draw_design

        if self.problem.network.xy is None:
            return []
        best = int(self.objectives.argmin())
        y = self.search.y[best].numpy()
        draw_design(self.problem, y, designs.evaluate(self.problem, y), folder / "network.png")
        return ["network.png"]

    @classmethod
    def experiment(cls) -> Any:
        from mobula.algorithms.markets.stackelberg_congestion.experiment import experiment

        return experiment()
