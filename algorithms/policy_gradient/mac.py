"""Multi-level actor-critic for average reward (Patel et al., ICML 2024, arXiv 2403.11925; Suttle et al., ICML 2023,
arXiv 2301.12083).

Each update draws a random rollout length N = 2^J, J geometric, and forms multi-level Monte-Carlo (MLMC) estimates of three
directions on the same data: the gain eta, the critic omega and the actor theta.  Their means equal those of a rollout of
T_max steps at an expected cost of log2 T_max steps, so no mixing time has to be known.  AdaGrad-norm steps take
the heavier tail.  Step numbers below are those of the algorithm: 1 draw the length, 2 roll on, 3 directions,
4 MLMC, 5 AdaGrad-norm, 6 updates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from ray import tune
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from torch import Tensor

from mobula.algorithms.common import average_reward as exact
from mobula.algorithms.policy_gradient.chain import ChainConfig, ChainMethod, clip_gain, directions
from mobula.errors import ConfigError, TrainingFault
from mobula.learning.learners import Batch, Learner
from mobula.method import hyperparameter
from mobula.sampling.rollout import Rollout

logger = logging.getLogger("mobula")


# Steps 1 and 4 --------------------------------------------------------------------------------------------


def draw_levels(n: int, j_max: int, generator: torch.Generator, *, resample: bool = False) -> Tensor:
    """n levels J ~ Geom(1/2) on {1, 2, ...}: P(J = j) = 2^-j (int64 [n]).

    resample: draws again until J <= j_max, as the public code does; the estimate is then slightly biased.
    """
    levels = torch.empty(n, dtype=torch.float64).geometric_(0.5, generator=generator).long()
    while resample and bool((levels > j_max).any()):
        again = torch.empty(n, dtype=torch.float64).geometric_(0.5, generator=generator).long()
        levels = torch.where(levels > j_max, again, levels)
    return levels


def rollout_length(level: int, j_max: int) -> int:
    """N = 2^J if J <= j_max, else 1."""
    return 2**level if level <= j_max else 1


def mlmc(q: Tensor, level: int, j_max: int) -> Tensor:
    """Multi-level Monte-Carlo mean of per-sample directions (step 4).

    q: [N, ...] directions of one rollout, N = rollout_length(level, j_max).  Returns [...]:
    q^0 + 2^J (q^J - q^{J-1}), with q^j the mean of the first 2^j samples, and q^0 alone above j_max.  Its expectation
    over J is that of q^{j_max}.
    """
    if level > j_max:
        return q[0]
    prefix = q.cumsum(0)
    half, whole = 2 ** (level - 1), 2**level
    return q[0] + 2**level * (prefix[whole - 1] / whole - prefix[half - 1] / half)


def mlmc_weights(level: int, j_max: int) -> Tensor:
    """The MLMC mean is linear in q: weights [N] with mlmc(q) = weights @ q.

    2^J (q^J - q^{J-1}) is the sum over the second half minus that over the first half; q^0 adds 1 to the first.
    So one backward pass of a weighted sum gives the estimate for all parameters.
    """
    length = rollout_length(level, j_max)
    if length == 1:
        return torch.ones(1, dtype=torch.float64)
    weights = torch.ones(length, dtype=torch.float64)
    weights[: length // 2] = -1.0
    weights[0] += 1.0
    return weights


def expected_length(j_max: int) -> float:
    """E[N] = j_max + 2^-j_max transitions an update."""
    return j_max + 2.0**-j_max


# Step 5 ---------------------------------------------------------------------------------------------------


def adagrad_norm(
    accumulator: Tensor, q: list[Tensor], numerator: float, kappa: float, t: int
) -> tuple[Tensor, Tensor]:
    """(new accumulator G, step size): G <- G + ||q||^2 over all coordinates together, then c (t+1)^-kappa / sqrt(G).

    The current estimate is included; the step is 0 while G = 0 (no reward has been seen yet).
    """
    accumulator = accumulator + sum(part.double().square().sum() for part in q)
    step = numerator * (t + 1) ** -kappa * accumulator.rsqrt()
    return accumulator, torch.where(accumulator > 0, step, torch.zeros_like(step))


class MACConfig(ChainConfig):
    """Multi-level actor-critic for average reward, no mixing time needed (Patel et al., ICML 2024, arXiv 2403.11925)."""

    citation = """@inproceedings{patel2024mac,
  title     = {Towards Global Optimality for Practical Average Reward Reinforcement Learning without Mixing Time Oracles},
  author    = {Patel, Bhrij and Suttle, Wesley A. and Koppel, Alec and Aggarwal, Vaneet and Sadler, Brian M. and
               Bedi, Amrit Singh and Manocha, Dinesh},
  booktitle = {International Conference on Machine Learning},
  series    = {PMLR},
  volume    = {235},
  year      = {2024},
  note      = {arXiv:2403.11925}
}"""
    when = (
        "Use it for tasks that never end (queues, patrols, process and inventory control) whose samples are strongly "
        "correlated and whose mixing time nobody knows. It is on-policy and works from one trajectory. It is not for "
        "tasks where an episode's return is what counts (PPO is), nor for large discounted problems: single multi-level "
        "estimates are noisy, and a long `t_max` makes them noisier."
    )
    effort = (
        "An update costs a rollout of 2^J steps, whose mean length grows with log2(t_max), and one pass over it: the 500 updates of an"
        " iteration on the 5 x 5 grid took 0.24 s of one core."
    )

    t_max = hyperparameter(16, tune.choice([4, 8, 16, 32]), "longest rollout, a power of two", low=2)
    c_actor = hyperparameter(
        10.0, tune.loguniform(0.3, 30), "AdaGrad numerator of the actor (tables)", low=0.0
    )
    c_critic = hyperparameter(
        3.0, tune.loguniform(0.1, 10), "AdaGrad numerator of the critic (tables)", low=0.0
    )
    c_reward = hyperparameter(
        0.05, tune.loguniform(1e-2, 1), "AdaGrad numerator of the gain estimate", low=0.0
    )
    g0 = hyperparameter(100.0, tune.loguniform(1e-2, 1e3), "initial AdaGrad accumulator", low=0.0)
    kappa_actor = hyperparameter(
        0.0, tune.uniform(0, 0.6), "decay of the actor's numerator", low=0.0, high=1.0
    )
    kappa_critic = hyperparameter(
        0.0,
        tune.uniform(0, 0.6),
        "decay of the critic's and the gain's numerators (below kappa_actor in theory)",
        low=0.0,
        high=1.0,
    )
    lr = hyperparameter(0.01, tune.loguniform(1e-4, 1e-1), "per-coordinate Adagrad step (networks)", low=0.0)
    r_omega = hyperparameter(1e3, None, "radius of the critic's projection (tables)", low=0.0)
    entropy_coeff = hyperparameter(
        0.0, tune.loguniform(1e-5, 1e-2), "weight of an entropy bonus (ours, off)", low=0.0
    )
    mlmc_clip = hyperparameter(
        None, None, "largest norm of an MLMC estimate (off: clipping breaks unbiasedness)"
    )
    resample = hyperparameter(
        False, None, "redraws J above the longest level, as the public code does (biased)"
    )

    def validate(self) -> None:
        super().validate()
        power = 2 ** int(math.log2(self.t_max))
        if power != self.t_max:
            logger.warning("t_max=%d is no power of two; taking %d", self.t_max, power)
            self.t_max = power
        if self.mlmc_clip is not None and not self.mlmc_clip > 0:
            raise ConfigError(
                f"mlmc_clip is {self.mlmc_clip!r}; a positive number, or nothing to leave it off"
            )

    @property
    def j_max(self) -> int:
        """Longest level: log2(t_max)."""
        return int(math.log2(self.t_max))

    def get_default_learner_class(self) -> Any:
        return MACLearner


class MACLearner(Learner):
    """Steps 3 to 6: directions at one (eta, omega, theta), MLMC weights, AdaGrad-norm, projections."""

    def build(self) -> None:
        super().build()
        self.t = 0
        self.accumulators = torch.full((3,), float(self.config.g0), dtype=torch.float64)

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self._module[module_id]
        if not module.tabular:
            params = [*module.actor_parameters(), *module.critic_parameters()]
            self.register_optimizer(
                module_id=module_id,
                optimizer=torch.optim.Adagrad(params, lr=config.lr),
                params=params,
                lr_or_lr_schedule=config.lr,
            )

    def learn(
        self, batch: Batch, *, reward_range: tuple[float | None, float | None], level: int, length: int
    ) -> None:
        """batch: rows of all chains with their MLMC `weight`, already divided by the number of chains."""
        module, config = self.rl_module, self.config
        estimates = directions(module, batch, entropy_coeff=config.entropy_coeff)
        # Every learner holds some chains: the estimate is the sum of their parts, before any norm is taken.
        estimates = [[self.all_reduce(part, mean=False) for part in parts] for parts in estimates]
        norms = [float(sum(part.double().square().sum() for part in parts)) ** 0.5 for parts in estimates]
        if not all(math.isfinite(norm) for norm in norms):
            raise TrainingFault(
                f"MLMC estimate is not finite in update {self.t}: J={level}, N={length}, norms of (gain, critic, actor)"
                f" {[f'{norm:g}' for norm in norms]}; lower the steps (c_*, lr) or look at the rewards"
            )
        if config.mlmc_clip is not None:
            estimates = [
                [part * min(1.0, config.mlmc_clip / max(norm, 1e-300)) for part in parts]
                for parts, norm in zip(estimates, norms, strict=True)
            ]
        numerators = (config.c_reward, config.c_critic, config.c_actor)
        decays = (config.kappa_critic, config.kappa_critic, config.kappa_actor)
        steps = []
        for i, (q, c, kappa) in enumerate(zip(estimates, numerators, decays, strict=True)):
            self.accumulators[i], step = adagrad_norm(self.accumulators[i], q, c, kappa, self.t)
            steps.append(step)
        (f,), g, h = estimates
        with torch.no_grad():
            module.eta.copy_(clip_gain(module.eta + steps[0] * f, reward_range))
            if module.tabular:
                module.omega.add_(steps[1] * g[0])
                norm = module.omega.norm()
                if norm > config.r_omega:
                    module.omega.mul_(config.r_omega / norm)
                module.theta.add_(steps[2] * h[0])
        if not module.tabular:
            for parameter, direction in zip(
                [*module.critic_parameters(), *module.actor_parameters()], [*g, *h], strict=True
            ):
                parameter.grad = -direction
            for optimizer in self._named_optimizers.values():
                optimizer.step()
        self.t += 1
        self.log(
            {"eta": module.eta.item(), "actor_norm": norms[2], "critic_norm": norms[1], "updates": self.t}
        )

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().get_state(*args, **kwargs), "mac": (self.t, self.accumulators.clone())}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "mac" in state:
            self.t, self.accumulators = state["mac"][0], state["mac"][1].clone()


class MAC(ChainMethod, config=MACConfig):
    """Multi-level actor-critic."""

    config: MACConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.levels = torch.Generator()
        self.levels.manual_seed(torch.seed() if self.config.seed is None else int(self.config.seed))

    def training_step(self) -> None:
        runners = max(1, self.config.num_env_runners)
        chains = self.config.num_envs_per_env_runner
        j_max, taken, done = self.config.j_max, 0, False
        while not done:
            # Each runner draws its own J; its chains share it, and each of them is unbiased.
            levels = draw_levels(runners, j_max, self.levels, resample=self.config.resample).tolist()
            lengths = [rollout_length(level, j_max) for level in levels]
            taken += sum(lengths) * chains
            done = taken >= self.config.report_every
            rollouts = self.sample([length * chains for length in lengths], report=done)
            batch = weighted_rows(rollouts, j_max)
            self.check_rewards(batch[Columns.REWARDS])
            self.learn(
                batch, reward_range=self.reward_range, level=max(levels), length=max(lengths), report=done
            )
        self._watch(batch)

    def _watch(self, batch: Mapping[str, Tensor]) -> None:
        """Reports a policy that has collapsed: a saturated softmax has no gradient, and without reward it stays."""
        logits = self.get_module().logits(batch[Columns.OBS]).detach()
        entropy = float(torch.distributions.Categorical(logits=logits).entropy().mean())
        self.metrics.log_value("policy_entropy", entropy, window=1)
        eta = self.metrics.peek(("learners", DEFAULT_MODULE_ID, "eta"), default=float("nan"))
        if entropy < 1e-3 and abs(float(eta)) < 1e-3:
            logger.warning(
                "the policy has collapsed (entropy %.1e, gain estimate %.1e): lower c_actor or raise g0",
                entropy,
                eta,
            )

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().get_state(*args, **kwargs), "levels": self.levels.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "levels" in state:
            self.levels.set_state(state["levels"])

    @classmethod
    def experiment(cls) -> Any:
        from mobula.algorithms.policy_gradient.mac_experiment import experiment

        return experiment()


def weighted_rows(rollouts: list[Rollout], j_max: int) -> dict[str, Tensor]:
    """Rows of all chains of all runners, weighted so that their sum is the mean MLMC estimate over the chains."""
    columns = (Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.NEXT_OBS)
    chains = sum(rollout.num_envs for rollout in rollouts)
    rows: dict[str, list[Tensor]] = {name: [] for name in (*columns, "weight")}
    for rollout in rollouts:
        length = rollout.num_steps
        weights = mlmc_weights(int(math.log2(length)) if length > 1 else j_max + 1, j_max) / chains
        rows["weight"].append(weights.repeat_interleave(rollout.num_envs))
        for name in columns:
            rows[name].append(rollout[name].flatten(0, 1))
    batch = {name: torch.cat(parts) for name, parts in rows.items()}
    if batch[Columns.OBS].is_floating_point():
        batch["weight"] = batch["weight"].to(batch[Columns.OBS].dtype)
    return batch


def exact_probe(algorithm: ChainMethod) -> dict[str, float]:
    """Exact gain and mixing time of the current policy, where the environment gives its model."""
    env = algorithm._runners().local_env_runner.env
    P, R = env.model()
    pi = algorithm.get_module().theta.detach().softmax(-1)
    P_pi, _ = exact.chain(P, R, pi)
    return {"exact_gain": float(exact.gain(P, R, pi)), "mixing_time": exact.mixing_time(P_pi)}
