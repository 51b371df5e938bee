"""EMKF-Bandit: linear bandits with a hidden, temporally correlated context (Zeng, Bhatt, Koppel, Ganesh; arXiv 2409.11521).

The paper's pipeline, in alternation: EM identifies a linear-Gaussian model of the observations, a Kalman filter estimates
the hidden context from them, and linear Thompson sampling acts on the filtered context.  After every refit the history is
filtered again and the bandit's statistics are rebuilt: the coordinates of the context are only fixed up to a linear map, and
filter and bandit must share them.  Decisions and regressions use filtered states, never smoothed ones, which hold the future.

Two variants: payoffs theta . (M_a x) with one theta for all arms, whose features M_a are known (`arm_features`), and a context that known
inputs drive, x_{t+1} = A x_t + D u_t + w_t (`inputs`).  Everything is batched over N streams (seeds, customers).
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED, NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import Tensor

from mobula.algorithms.bandits.emkf_bandit.learner import EMKFLearner, Streams
from mobula.algorithms.bandits.emkf_bandit.math import identified, noise_rows
from mobula.algorithms.bandits.emkf_bandit.module import EMKFModule
from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace
from mobula.errors import ConfigError, EnvironmentFault
from mobula.method import Method, MethodConfig, hyperparameter
from mobula.sampling.tensor_env import TensorEnv


class EMKFBanditConfig(MethodConfig):
    """Bandit on the Kalman-filtered state of a model learned by EM (Zeng et al. 2024, arXiv 2409.11521)."""

    citation = """@article{zeng2024partially,
  title={Partially Observable Contextual Bandits with Linear Payoffs},
  author={Zeng, Sihan and Bhatt, Sujay and Koppel, Alec and Ganesh, Sumitra},
  journal={arXiv preprint arXiv:2409.11521},
  year={2024}
}"""
    when = (
        "Use it to choose among a few actions when the payoff depends on a state that is hidden, has a memory and is seen only"
        " in part or through noise: regimes of a market, a user whose mood drifts. Where a few past observations already show"
        " the state (a short memory, little noise), plain Thompson sampling on stacked lags is as good and simpler. The"
        " context must not depend on the actions; if it does, this is a control problem. On one core, eight streams in a batch take"
        " about 0.4 ms a round, and their refit at 1,000 rounds about 3 s."
    )
    effort = (
        "A round costs O(N (d^3 + K p^2)) for N streams side by side: with the defaults 0.7 ms of one core for one stream, 1.1 ms for 64. A"
        " refit costs O(N T d^3) an EM iteration, in O(log T) steps of tensors: 2 s for one stream and 6 s for 64, of 1,000 rounds and up"
        " to 40 iterations. With `workers` streams and restarts are shared out over Ray tasks, and with"
        " `refit_delay` rounds go on meanwhile."
    )
    default_env = "linear_bandit"
    default_stop = {"env_steps": 2_000}
    rejected = {
        "gamma": "a bandit's choices do not move its context: there is nothing to discount",
        "lr": "the method has closed forms only",
    }

    d = hyperparameter(
        4,
        tune.choice([2, 3, 4, 6]),
        'hidden dimension; "bic" chooses among 1 to 6 at every refit',
        low=1,
        high=64,
        words=["bic"],
    )
    v = hyperparameter(
        0.2,
        tune.loguniform(0.02, 2),
        "width of Thompson sampling: in units of reward; with `inflate` a multiple of the noise (1: the posterior)",
        low=0.0,
    )
    ridge = hyperparameter(1.0, tune.loguniform(1e-3, 10), "ridge of the payoff regressions", low=1e-12)
    em_iters = hyperparameter(40, tune.choice([10, 20, 40, 80]), "EM iterations of a refit, at most", low=1)
    refit = hyperparameter(
        500, tune.choice([250, 500, 1000]), "rounds between refits, after 50, 100, 200, ... below it", low=50
    )
    init = hyperparameter(
        "subspace",
        tune.choice(["subspace", "identity", "random"]),
        "start of EM at the first refit with 100 observations",
        choices=["subspace", "identity", "random"],
    )
    known_C = hyperparameter(
        None, None, "the observation matrix where it is known, as a list of rows; EM then keeps it"
    )
    arm_features = hyperparameter(
        None,
        None,
        "matrices M_a, one an arm, of features M_a x (of M_a [1; x] with `intercept`) whose one parameter all arms share, in the"
        " coordinates of `known_C`; None: each arm has its own parameter",
    )
    inputs = hyperparameter(
        0,
        None,
        "how many numbers at the end of an observation are inputs that move the next context (calendar dummies)",
        low=0,
    )
    policy = hyperparameter(
        "ts",
        tune.choice(["ts", "linucb", "greedy"]),
        "Thompson sampling, LinUCB or epsilon-greedy",
        choices=["ts", "linucb", "greedy"],
    )
    window = hyperparameter(
        None, tune.choice([None, 1000, 3000]), "rounds that EM looks back at (None: all)", low=100
    )
    inflate = hyperparameter(
        False, tune.choice([False, True]), "scale Thompson's width by the noise of reward and filter"
    )
    use_rewards = hyperparameter(
        False,
        tune.choice([False, True]),
        "filter with the rewards as observations too; can mislead while the payoffs are unknown",
    )
    normalise_gauge = hyperparameter(
        False, tune.choice([False, True]), "coordinates in which the stationary covariance is I"
    )
    restarts = hyperparameter(
        1, tune.choice([1, 4]), "starts of EM that compete by likelihood", low=1, high=64
    )
    workers = hyperparameter(0, None, "Ray tasks that share the streams and restarts of a refit", low=0)
    refit_delay = hyperparameter(
        0,
        None,
        "rounds that go on with the old model after a refit has begun; with `workers` it runs beside them",
        low=0,
        high=49,
    )
    forget = hyperparameter(
        1.0,
        tune.choice([1.0, 0.999, 0.995]),
        "factor on the past of the payoff regressions, a round",
        low=0.5,
        high=1.0,
    )
    pool = hyperparameter(False, None, "one model and one set of payoffs for all streams")
    demean = hyperparameter(False, None, "subtract the mean of the observations up to the last refit")
    intercept = hyperparameter(False, None, "a constant beside the context: arms with mean payoffs")
    sigma = hyperparameter(
        None, None, "standard deviation of the reward noise where it is known (`inflate`)", low=0.0
    )
    report_every = hyperparameter(100, None, "rounds of a training iteration (of reports)", low=1)

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self.evaluation(
            evaluation_duration=2_000,
            evaluation_duration_unit="timesteps",
            evaluation_config={"explore": False},
        )

    def get_default_learner_class(self) -> Any:
        return EMKFLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        names = ("d", "v", "ridge", "policy", "intercept", "known_C", "arm_features", "inputs")
        return RLModuleSpec(
            module_class=EMKFModule, model_config={name: getattr(self, name) for name in names}
        )

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}

    def validate(self) -> None:
        super().validate()
        if self.d == "bic" and self.known_C is not None:
            raise ConfigError(
                'EMKFBanditConfig: known_C fixes the hidden dimension: set d to its columns, not "bic"'
            )
        C, maps = (_array(self, name, axes) for name, axes in (("known_C", 2), ("arm_features", 3)))
        if C is not None and self.normalise_gauge:
            raise ConfigError(
                "EMKFBanditConfig: known_C fixes the coordinates of the context: leave normalise_gauge off"
            )
        if maps is not None:
            if C is None:
                raise ConfigError(
                    "EMKFBanditConfig: arm_features need known_C: observations alone fix the context only up to a linear map, so M_a x"
                    " would change its meaning with every refit"
                )
            maps = maps[..., int(self.intercept) :]
            if maps.shape[-1] == C.shape[-1] and not identified(maps, C):
                raise ConfigError(
                    "EMKFBanditConfig: a row of arm_features is no combination of the rows of known_C: that part of the context is fixed"
                    " only up to a linear map, and features of it would change their meaning with every refit"
                )
        if self.num_env_runners or self.num_learners > 1:
            raise ConfigError(
                "EMKFBanditConfig: all streams are one batch in one process: set num_envs_per_env_runner (--num-envs) for"
                " more streams, and run seeds as Tune trials; num_env_runners is 0 and num_learners at most 1"
            )

    def adapt_env(self, env: TensorEnv) -> TensorEnv:
        obs, actions = env.single_observation_space, env.single_action_space
        if not isinstance(obs, spaces.Box) or len(obs.shape) != 1 or not isinstance(actions, spaces.Discrete):
            raise ConfigError(
                f"emkf_bandit takes observations that are vectors and a choice among arms; {self.env} has {obs} ->"
                f" {actions}"
            )
        if self.inputs >= obs.shape[0]:
            raise ConfigError(
                f"EMKFBanditConfig: inputs is {self.inputs}, and the observations of {self.env} have {obs.shape[0]} numbers: one at least"
                " has to be observed"
            )
        if not env.continuing:
            raise ConfigError(f"emkf_bandit follows one endless stream; {self.env} has episodes")
        return env


def _array(config: EMKFBanditConfig, name: str, axes: int) -> Tensor | None:
    """The nested lists of a knob as a tensor."""
    value = getattr(config, name)
    if value is None:
        return None
    try:
        found = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"EMKFBanditConfig: {name} is no array of numbers: {error}") from error
    if found.ndim != axes or not bool(found.isfinite().all()):
        raise ConfigError(
            f"EMKFBanditConfig: {name} has shape {tuple(found.shape)}; {axes} axes of finite numbers are needed"
        )
    return found


class EMKFBandit(Method, config=EMKFBanditConfig):
    """EMKF-Bandit."""

    config: EMKFBanditConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        runner: Any = self._runners().local_env_runner
        self.env: TensorEnv = runner.env
        space: Any = self.env.single_action_space
        seed = torch.seed() % 2**31 if self.config.seed is None else int(self.config.seed)
        self.noise = [torch.Generator().manual_seed(seed + 7919 * i) for i in range(self.env.num_envs)]
        m = self.env.single_observation_space.shape[0] - self.config.inputs
        known, maps = _array(self.config, "known_C", 2), _array(self.config, "arm_features", 3)
        if known is not None and known.shape != (m, self.config.d):
            raise ConfigError(
                f"EMKFBanditConfig: known_C is {tuple(known.shape)}; [m, d] = ({m}, {self.config.d}) is needed"
            )
        if maps is not None:
            wanted = (int(space.n), self.config.d + self.config.intercept)
            if (maps.shape[0], maps.shape[2]) != wanted:
                raise ConfigError(
                    f"EMKFBanditConfig: arm_features is {tuple(maps.shape)}; [arms, features, d] is needed"
                    f" ({wanted[0]} arms, {wanted[1]} columns)"
                )
        knobs = {k: w for k, w in self.config.knobs().items() if k != "report_every"}
        self.streams = Streams(self.env.num_envs, m, int(space.n), **knobs)
        self.obs, _ = self.env.reset(seed=seed)

    def training_step(self) -> None:
        n, bandit = self.env.num_envs, self.streams
        total = 0.0
        for _ in range(self.config.report_every):
            y, u = self.obs.double().split([bandit.m, bandit.inputs], 1)
            if bool(y.isinf().any()):
                raise EnvironmentFault(
                    f"environment {int(y.isinf().any(1).nonzero()[0])} gave an infinite observation in round {bandit.t + 1}"
                )
            if not bool(u.isfinite().all()):
                raise EnvironmentFault(
                    f"environment {int((~u.isfinite()).any(1).nonzero()[0])} gave an input that is no number in round {bandit.t + 1}"
                )
            bandit.observe(y, u)
            arms = bandit.act(noise_rows(self.noise, bandit.draws))
            self.obs, reward, *_ = self.env.step(arms)
            if not bool(reward.isfinite().all()):
                raise EnvironmentFault(
                    f"environment {int((~reward.isfinite()).nonzero()[0])} gave the reward"
                    f" {float(reward[~reward.isfinite()][0])} in round {bandit.t}"
                )
            bandit.reward(reward.double())
            total += float(reward.sum())
        _, _, scale = bandit.estimates()
        batch = {name: part[0] for name, part in zip(StateSpace._fields, bandit.model, strict=True)}
        batch |= {name: getattr(bandit, name)[0] for name in ("B", "f", "offset", "input_offset")}
        batch["scale"] = scale[0].expand(bandit.arms)
        # Without inputs there is nothing to learn of them, and the module keeps no such buffers.
        self.learn({name: part for name, part in batch.items() if part.numel()})
        rounds = self.config.report_every * n
        results: Any = self.metrics
        results.log_value((ENV_RUNNER_RESULTS, "reward_sum"), total, reduce="sum", clear_on_reduce=True)
        results.log_value(
            (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED), rounds, reduce="sum", clear_on_reduce=True
        )
        results.log_value((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), rounds, reduce="lifetime_sum")
        results.log_value("refits", bandit.refits, window=1)
        if bandit.select_order:
            results.log_value("order", float(bandit.order.double().mean()), window=1)
        results.log_value("spectral_radius", float(kalman.spectral_radius(bandit.model.A).max()), window=1)
        if bandit.refits:
            results.log_value("log_likelihood", float(bandit.likelihood.mean()), window=1)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = {
            "streams": self.streams.state_dict(),
            "env": self.env.get_state(),
            "obs": self.obs.clone(),
            "noise": [g.get_state() for g in self.noise],
        }
        return {**super().get_state(*args, **kwargs), "emkf": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "emkf" in state:
            own = state["emkf"]
            self.streams.load_state_dict(own["streams"])
            self.env.set_state(own["env"])
            self.obs = own["obs"].clone()
            for generator, value in zip(self.noise, own["noise"], strict=True):
                generator.set_state(value)

    @classmethod
    def experiment(cls) -> Any:
        from mobula.algorithms.bandits.emkf_bandit.experiment import experiment

        return experiment()
