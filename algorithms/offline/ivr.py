"""Implicit value regularisation: SQL and EQL (Xu et al., ICLR 2023, arXiv 2303.15810).

Both maximise E sum gamma^t (r - alpha f(pi / mu)) with regression on data actions alone.  With h(x) = x f(x) and g = (h')^-1,
    pi*(a|s) = mu(a|s) max(g((Q - U) / alpha), 0),    V = U + alpha E_mu[w^2 f'(w)],    Q = r + gamma E V(s'),
w = pi* / mu and U(s) the number that makes E_mu w = 1.

SQL  f(x) = x - 1:    w = (1/2 + (Q - U) / 2 alpha)_+.  The practical method sets U = V - alpha, that is E_mu w^2 = 1, its least
     value: V is the minimiser of (1), where samples with Q <= V - 2 alpha have no part.
EQL  f(x) = log x:    w = exp((Q - V) / alpha), V = alpha log E_mu exp(Q / alpha), exactly; (2) is the Gumbel regression of XQL.

Neural or, on finite data, tabular (`mode="tabular"`): the fixed point itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mobula.algorithms.offline import tabular
from mobula.algorithms.offline.base.config import load_data
from mobula.algorithms.offline.base.learner import OfflineLearner
from mobula.algorithms.offline.base.method import Offline
from mobula.algorithms.offline.base.module import OfflineModule
from mobula.algorithms.offline.in_sample import InSampleConfig, InSampleLearner
from mobula.errors import ConfigError, DataError
from mobula.learning.modules import TensorModule
from mobula.method import hyperparameter

if TYPE_CHECKING:
    from mobula.experiment import Experiment

logger = logging.getLogger("mobula")

# Divergences ----------------------------------------------------------------------------------------------------


class ChiSquare:
    """f(x) = x - 1, h'(x) = 2x - 1: SQL."""

    def f(self, x: Tensor) -> Tensor:
        """f."""
        return x - 1

    def df(self, x: Tensor) -> Tensor:
        """f'."""
        return torch.ones_like(x)

    def g(self, y: Tensor) -> Tensor:
        """(h')^-1."""
        return (1 + y) / 2


class KL:
    """f(x) = log x, h'(x) = log x + 1: EQL."""

    def f(self, x: Tensor) -> Tensor:
        """f."""
        return x.log()

    def df(self, x: Tensor) -> Tensor:
        """f'."""
        return 1 / x

    def g(self, y: Tensor) -> Tensor:
        """(h')^-1."""
        return (y - 1).exp()


def regularised_value(
    Q: Tensor, mu: Tensor, alpha: Tensor | float, divergence: Any, iterations: int = 200
) -> tuple[Tensor, Tensor]:
    """(V [..., S], w [..., S, A]) for any divergence with f, df and g: U by bisection on E_mu w = 1, which falls in U.

    Q, mu [..., S, A]; alpha broadcasts against them.  States without data get V = 0, w = 0.
    """
    mu = mu.expand_as(Q)
    alpha = torch.as_tensor(alpha, dtype=Q.dtype)
    seen = mu > 0
    empty = ~seen.any(-1, keepdim=True)
    best = Q.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).masked_fill(empty, 0.0)

    def weights(U: Tensor) -> Tensor:
        w = divergence.g((Q.masked_fill(~seen, 0.0) - U) / alpha).clamp_min(0.0)
        return w.masked_fill(~seen, 0.0)

    # w is 1 where Q - U = alpha h'(1): at the best action, E w >= 1 there once mu w alone reaches 1; doubling brackets it.
    step = alpha * torch.ones_like(best)
    low, high = best - step, best + step
    for _ in range(60):
        low = torch.where((mu * weights(low)).sum(-1, keepdim=True) < 1, low - step, low)
        high = torch.where((mu * weights(high)).sum(-1, keepdim=True) > 1, high + step, high)
        step = 2 * step
    for _ in range(iterations):
        middle = (low + high) / 2
        above = (mu * weights(middle)).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    U = (low + high) / 2
    w = weights(U)
    # w^2 f'(w) goes to 0 with w.
    term = torch.where(w > 0, w.square() * divergence.df(w.clamp_min(1e-300)), 0.0)
    V = (U + alpha * (mu * term).sum(-1, keepdim=True)).squeeze(-1)
    return V.masked_fill(empty.squeeze(-1), 0.0), w


def sparse_value(Q: Tensor, mu: Tensor, alpha: Tensor | float) -> Tensor:
    """SQL's practical V [..., S]: the minimiser of (1) under mu, in closed form.

    With Q in falling order, V = (sum_{i<=k} mu_i Q_i + 2 alpha (sum_{i<=k} mu_i - 1)) / sum_{i<=k} mu_i for the largest k with
    1 + (Q_k - V) / 2 alpha > 0 (the condition holds up to some k and never after it).
    """
    values, order = Q.masked_fill(mu == 0, -torch.inf).sort(-1, descending=True)
    p = mu.expand_as(Q).gather(-1, order)
    alpha = torch.as_tensor(alpha, dtype=Q.dtype)
    mass = p.cumsum(-1)
    top = torch.where(p > 0, p * values, 0.0).cumsum(-1)
    V = (top + 2 * alpha * (mass - 1)) / mass.clamp_min(1e-300)
    holds = (1 + (values - V) / (2 * alpha) > 0) & (p > 0)
    k = holds.sum(-1, keepdim=True).clamp_min(1) - 1
    return V.gather(-1, k).squeeze(-1)


def log_sum_exp_value(Q: Tensor, mu: Tensor, alpha: Tensor | float) -> Tensor:
    """EQL's V [..., S] = alpha log E_mu exp(Q / alpha), the largest exponent subtracted."""
    alpha = torch.as_tensor(alpha, dtype=Q.dtype)
    scaled = Q / alpha + mu.clamp_min(1e-300).log()
    found = alpha.expand_as(Q)[..., 0] * scaled.masked_fill(mu == 0, -torch.inf).logsumexp(-1)
    return found


# Losses and weights on samples ------------------------------------------------------------------------------------


def sparse_value_loss(q: Tensor, value: Tensor, alpha: float) -> Tensor:
    """Eq. (1): mean over the batch of 1[z > 0] z^2 + V / alpha, z = 1 + (q - V) / 2 alpha.  q, value [..., B] -> [...]."""
    z = 1 + (q - value) / (2 * alpha)
    return (z.clamp_min(0.0).square() + value / alpha).mean(-1)


def exponential_value_loss(q: Tensor, value: Tensor, alpha: float, peak: Tensor, cap: float = 5.0) -> Tensor:
    """Eq. (2): mean of exp(z - m) + exp(-m) V / alpha with z = min((q - V) / alpha, cap) and m = max(-1, peak).

    peak [...]: the largest z of the batch, without gradient (of all learners' batches): m scales the loss and nothing else.
    """
    z = ((q - value) / alpha).clamp_max(cap)
    m = peak.clamp_min(-1.0).unsqueeze(-1)
    return ((z - m).exp() + (-m).exp() * value / alpha).mean(-1)


def sparse_weight(advantage: Tensor, alpha: float, kind: str, w_max: float) -> Tensor:
    """SQL's weight of log pi: release A_+, theory (1 + A / 2 alpha)_+, indicator 1[A > 0]; at most w_max."""
    if kind == "indicator":
        return (advantage > 0).to(advantage.dtype)
    weight = advantage if kind == "release" else 1 + advantage / (2 * alpha)
    return weight.clamp(0.0, w_max)


def exponential_weight(advantage: Tensor, alpha: float, kind: str, w_max: float) -> Tensor:
    """EQL's weight: release exp(10 A / alpha), theory exp(A / alpha), indicator 1[A > 0]; at most w_max."""
    if kind == "indicator":
        return (advantage > 0).to(advantage.dtype)
    return ((10.0 if kind == "release" else 1.0) * advantage / alpha).exp().clamp(0.0, w_max)


@dataclass(frozen=True)
class Kind:
    """What differs between the two: tabular operator, weight, divergence."""

    operator: Any
    weight: Any
    divergence: Any


KINDS = {
    "sql": Kind(sparse_value, sparse_weight, ChiSquare()),
    "eql": Kind(log_sum_exp_value, exponential_weight, KL()),
}


# Configs ----------------------------------------------------------------------------------------------------------


class IVRConfig(InSampleConfig):
    """What SQL and EQL share (base class)."""

    citation = """@inproceedings{xu2023offline,
  title={Offline {RL} with No {OOD} Actions: In-Sample Learning via Implicit Value Regularization},
  author={Xu, Haoran and Jiang, Li and Li, Jianxiong and Yang, Zhuoran and Wang, Zhaoran and Chan, Victor Wai Kin and Zhan, Xianyuan},
  booktitle={International Conference on Learning Representations},
  year={2023}
}"""
    kind: Any = ""

    weight = hyperparameter(
        "release",
        tune.choice(["release", "theory"]),
        "actor weight: as in the released code, as in the theory, or 1[A > 0] (discrete actions)",
        choices=["release", "theory", "indicator"],
    )
    mode = hyperparameter(
        "neural",
        None,
        "networks, or the exact fixed point on counts (finite data)",
        choices=["neural", "tabular"],
    )
    exact = hyperparameter(
        False, None, "tabular: the exact regularised value in place of SQL's practical lower one"
    )

    def training(self, **kwargs: Any) -> Any:
        if "alpha" in kwargs:
            self._check_alpha(kwargs["alpha"])
        return super().training(**kwargs)

    def validate(self) -> None:
        self._check_alpha(self.alpha)
        if self.exact and self.mode != "tabular":
            raise ConfigError(
                f"{type(self).__name__}: exact is for mode='tabular'; the neural value is the practical one"
            )
        if self.streaming and self.mode == "tabular":
            raise ConfigError(
                f"{type(self).__name__}: mode='tabular' counts all rows; it does not go with streaming"
            )
        super().validate()
        if self.mode == "tabular" and not (
            isinstance(self.observation_space, spaces.Discrete)
            and isinstance(self.action_space, spaces.Discrete)
        ):
            raise DataError(
                f"{type(self).__name__}: mode='tabular' needs data with finite observations and actions; {self.data} has"
                f" {self.observation_space} -> {self.action_space}"
            )

    def _check_alpha(self, alpha: Any) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
            raise ConfigError(
                f"{type(self).__name__}: alpha must be positive (unit of reward); got {alpha!r}"
            )

    def weighting(self) -> dict[str, Any]:
        return {"kind": self.kind, "alpha": self.alpha, "weight": self.weight, "w_max": self.w_max}

    def get_module_class(self) -> Any:
        return IVRModule

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        if self.mode == "tabular":
            return RLModuleSpec(module_class=TabularModule, model_config=self.weighting())
        return super().get_default_rl_module_spec()

    def get_default_learner_class(self) -> Any:
        if self.mode == "tabular":
            return TabularLearner
        return {"sql": SQLLearner, "eql": EQLLearner}[self.kind]


EFFORT = (
    "An iteration is `block` gradient steps, and a step samples no action: four networks forward and back on `batch` rows, about 4 ms of one"
    " core with 2 x 64 networks and 128 rows, 19 ms with 2 x 256 and 256 rows. `num_seeds_batched` seeds side by side cost less than as"
    " many runs."
)


class SQLConfig(IVRConfig):
    """Sparse Q-learning: offline RL on data actions alone, bad actions get weight 0 (Xu et al., ICLR 2023, arXiv 2303.15810)."""

    when = (
        "Use it for a fixed log of control data without a simulator, above all where most of the data are poor: actions well below"
        " the best get the weight 0, so they neither drag the value down nor get cloned. Set `alpha` together with `reward_transform`: it has the unit of the"
        " transformed reward. Where the data hold no good actions, no in-sample method finds any; where a simulator can be stepped, an"
        " online method will do better."
    )
    effort = EFFORT
    kind = "sql"
    alpha = hyperparameter(
        1.0,
        tune.loguniform(1e-2, 10),
        "regularisation strength, in units of the transformed reward (mujoco 1, antmaze 0.1, kitchen 0.5)",
    )


class EQLConfig(IVRConfig):
    """Exponential Q-learning: offline RL on data actions alone, log-sum-exp values (Xu et al., ICLR 2023, arXiv 2303.15810)."""

    when = (
        "Use it as SQL's smooth sibling: a fixed log of control data, values as soft maxima over data actions. Every action keeps a"
        " positive weight, so it forgets less and is more moved by poor data than SQL. Watch `capped`"
        " (the share of rows at the cap of the exponent): above 1 %, raise `alpha` or set a `reward_transform`. With few good transitions"
        " among many poor ones SQL scores higher (FourRooms, a tenth of good data); where a simulator can be stepped, an online method"
        " will do better than either."
    )
    effort = EFFORT
    kind = "eql"
    alpha = hyperparameter(
        2.0,
        tune.loguniform(1e-2, 10),
        "regularisation strength, in units of the transformed reward (mujoco 2, antmaze 0.5, kitchen 2)",
    )

    def validate(self) -> None:
        super().validate()
        largest = float(abs(load_data(self.data, self.streaming)["reward"]).max())
        if self.reward_transform == "none" and largest > 100 * self.alpha:
            logger.warning(
                "EQL: rewards reach %g, over 100 alpha, without a reward transform: weights will saturate at the clip;"
                " set reward_transform to reward_range",
                largest,
            )


# Neural -----------------------------------------------------------------------------------------------------------


class IVRModule(OfflineModule):
    """Twin critics, value and actor, with the method's weight."""

    def weight(self, advantage: Tensor) -> Tensor:
        c = self.about
        found: Tensor = KINDS[c["kind"]].weight(advantage, c["alpha"], c["weight"], c["w_max"])
        return found


class SQLLearner(InSampleLearner):
    """Value by loss (1)."""

    def value_loss(self, q: Tensor, value: Tensor) -> Tensor:
        return sparse_value_loss(q, value, self.config.alpha)

    def extra(self, q: Tensor, value: Tensor) -> dict[str, Tensor]:
        return {"ignored_by_value": (q <= value - 2 * self.config.alpha).double()}


class EQLLearner(InSampleLearner):
    """Value by loss (2)."""

    def value_loss(self, q: Tensor, value: Tensor) -> Tensor:
        peak = ((q - value.detach()) / self.config.alpha).clamp_max(5.0).amax(-1)
        if self.config.num_learners > 1:
            torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        return exponential_value_loss(q, value, self.config.alpha, peak)

    def extra(self, q: Tensor, value: Tensor) -> dict[str, Tensor]:
        return {"capped": ((q - value) / self.config.alpha > 5.0).double()}


# Tabular ----------------------------------------------------------------------------------------------------------


class TabularModule(TensorModule):
    """V [S], Q [S, A], weights [S, A] and the policy [S, A] on counts, as buffers.

    Pairs without data have the weight 0, and the least Q of those with data.
    """

    def setup(self) -> None:
        observation, action = self.observation_space, self.action_space
        assert isinstance(observation, spaces.Discrete) and isinstance(action, spaces.Discrete)
        S, A = int(observation.n), int(action.n)
        self.register_buffer("v", torch.zeros(S, dtype=torch.float64))
        self.register_buffer("q", torch.zeros(S, A, dtype=torch.float64))
        self.register_buffer("weights", torch.zeros(S, A, dtype=torch.float64))
        self.register_buffer("policy", torch.full((S, A), 1.0 / A, dtype=torch.float64))

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        p = self.policy[batch[Columns.OBS].long()]
        return {Columns.ACTION_DIST_INPUTS: p.clamp_min(1e-30).log().float()}

    scores_actions = True

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """value [B]; with logged actions also advantage [B] and weight [B]."""
        obs = batch[Columns.OBS].long()
        found = {"value": self.v[obs]}
        if Columns.ACTIONS in batch:
            pair = obs, batch[Columns.ACTIONS].long()
            found |= {"advantage": self.q[pair] - self.v[obs], "weight": self.weights[pair]}
        return found


def solve(
    counts: tabular.Counts, kind: str, alpha: Tensor, gamma: float, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(V [..., K, S], Q [..., K, S, A]) of the tabular method for strengths alpha [K]."""
    strength = alpha.double().view(-1, 1, 1)

    def operator(Q: Tensor, mu: Tensor) -> Tensor:
        if exact:
            return regularised_value(Q, mu, strength, KINDS[kind].divergence)[0]
        found: Tensor = KINDS[kind].operator(Q, mu, strength)
        return found

    return tabular.iterate(counts, operator, gamma, settings=len(alpha))


class TabularLearner(OfflineLearner):
    """The fixed point in one go; nothing is drawn, nothing descends."""

    def build(self) -> None:
        super(OfflineLearner, self).build()
        self.taken, self.streams, self.columns = 0, [], {}

    def set_data(self, columns: Any, scale: Any, statistics: Any, stream: Any = None) -> None:
        self.columns, self.reward_scale = dict(columns), scale

    @torch.no_grad()
    def learn(self, batch: Any, *, steps: int = 1) -> None:
        module, config = self.rl_module, self.config
        a, b = self.reward_scale
        rows = {
            name: torch.tensor(self.columns[name])
            for name in ("obs", "action", "reward", "next_obs", "terminated")
        }
        rows["reward"] = rows["reward"].double() * a + b
        counts = tabular.count(**rows, S=module.q.shape[0], A=module.q.shape[1])
        V, Q = solve(counts, config.kind, torch.tensor([config.alpha]), config.gamma, config.exact)
        kind, seen = KINDS[config.kind], counts.mu > 0
        if config.exact and config.weight == "theory":
            # w = g((Q - U) / alpha) with the U of the exact value; the practical weights take U = V - alpha.
            _, weight = regularised_value(Q[0], counts.mu, config.alpha, kind.divergence)
            weight = weight.clamp_max(config.w_max)
        else:
            gap = Q[0] - V[0].unsqueeze(-1)
            weight = kind.weight(gap, config.alpha, config.weight, config.w_max)
        weight = weight.masked_fill(~seen, 0.0)
        module.v.copy_(V[0])
        module.q.copy_(Q[0].masked_fill(~seen, Q[0][seen].min()))
        module.weights.copy_(weight)
        module.policy.copy_(tabular.extract(counts.mu, weight))
        self.taken += steps
        self.log({"value": float(V.mean()), "zero_weights": float((weight[seen] == 0).double().mean())})


# Algorithms -------------------------------------------------------------------------------------------------------


class IVR(Offline):
    """What SQL and EQL share: the tabular mode is solved in a single iteration."""

    config: IVRConfig

    def training_step(self) -> None:
        if self.config.mode == "tabular":
            self.learn({}, steps=self.config.steps)
            self.taken = self.config.steps
            self.metrics.log_value("progress", 1.0, window=1)
            self.metrics.log_value("gradient_steps", 0, window=1)
            self._evaluate_table()
            return
        super().training_step()

    def _evaluate_table(self) -> None:
        results = self.evaluate() if self.config.env is not None else None
        if results:
            found = float(results["env_runners"]["episode_return_mean"])
            self.metrics.log_value("evaluation_return", found, window=1)
            score = self.score(found)
            if score is not None:
                self.metrics.log_value("score", score, window=1)

    @classmethod
    def experiment(cls) -> Experiment:
        from mobula.algorithms.offline import ivr_experiment

        return ivr_experiment.experiment(cls.config_class.kind)


class SQL(IVR, config=SQLConfig):
    """Sparse Q-learning."""

    config: SQLConfig


class EQL(IVR, config=EQLConfig):
    """Exponential Q-learning."""

    config: EQLConfig
