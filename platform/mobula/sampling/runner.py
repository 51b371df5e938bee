"""`TensorEnvRunner`: an RLlib `EnvRunner` that steps a batched `TensorEnv` and returns tensors [T, B, ...]."""

from __future__ import annotations

import logging
import pickle
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from typing import Any

import gymnasium
import numpy as np
import ray
import torch
from gymnasium.vector import AutoresetMode
from ray import cloudpickle
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_AGENT_ID, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.framework import get_device
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MAX,
    EPISODE_LEN_MEAN,
    EPISODE_LEN_MIN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    NUM_AGENT_STEPS_SAMPLED,
    NUM_AGENT_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    NUM_EPISODES_LIFETIME,
    NUM_MODULE_STEPS_SAMPLED,
    NUM_MODULE_STEPS_SAMPLED_LIFETIME,
    SAMPLE_TIMER,
    WEIGHTS_SEQ_NO,
)
from torch import Tensor

from mobula import registry
from mobula.errors import ConfigError, DataError, EnvironmentFault, MobulaError
from mobula.learning.modules import Encoder
from mobula.sampling.actions import act, action_map, log_probability, random_actions, to_space
from mobula.sampling.rollout import Rollout
from mobula.sampling.spaces import Indexed
from mobula.sampling.tensor_env import TensorEnv

logger = logging.getLogger("mobula")

RESTARTS_IN_A_ROW = 3
"""Times that faulty environments are made anew within one call of `sample` before the fault is the user's to mend."""

ENV_RESTARTS = "num_env_restarts_lifetime"
"""Metric: times that a batch of environments was made anew after a fault."""

REWARD_SUM = "reward_sum"
"""Metric: rewards of all steps of an iteration, summed over environments and agents."""

Until = Callable[[dict[str, Tensor]], bool]
"""A trigger: gets the columns of the step just taken ([B, ...] each); sampling stops when it returns True."""

Reduce = Callable[[Rollout, TorchRLModule], Any]
"""A method's own reduction on the runner: what it returns is sent instead of the rollout."""


class TensorEnvRunner(EnvRunner, Checkpointable):
    """Samples from `num_envs_per_env_runner` tensor environments at once.

    Selected by `config.env_runners(env_runner_cls=TensorEnvRunner)`, the default of every mobula method.  Discrete
    and continuous actions, an agent axis (shared policy), recurrent modules, both autoreset modes.  Episodes go on
    across calls of `sample` unless whole episodes are asked for.
    """

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.spaces = kwargs.get("spaces") or {}
        self.device = get_device(self.config, self.config.num_gpus_per_env_runner if self.worker_index else 0)
        self.num_envs = int(self.config.num_envs_per_env_runner)
        entropy = torch.seed() if self.config.seed is None else int(self.config.seed)
        # Independent streams for the environments and for the actions, and for every runner; one that Ray has started again
        # must not repeat what it has sampled.
        again = [time.time_ns()] if ray.is_initialized() and _was_restarted() else []
        stream = np.random.SeedSequence(
            [entropy, self.worker_index or 0, int(self.config.in_evaluation), *again]
        )
        self._env_seed, action_seed = (
            int(word) for word in stream.generate_state(2, np.uint64) >> np.uint64(1)
        )
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(action_seed)
        self.env: TensorEnv | None = None
        if (
            not self.worker_index
            and self.config.num_env_runners
            and not self.config.create_env_on_local_worker
        ):
            if self.worker_index is None:
                self.make_env()
        else:
            self.make_env()
        self.module: TorchRLModule | None = None
        self.make_module()
        self._weights_seq_no = 0
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._new_episodes: list[tuple[Tensor, Tensor]] = []
        smoothing = self.config.metrics_num_episodes_for_smoothing
        self._smoothing = max(1, -(-smoothing // max(1, self.config.num_env_runners)))
        self._last_episodes: deque[tuple[float, float]] = deque(maxlen=self._smoothing)

    # Environment and module ------------------------------------------------------------------------------

    def make_env(self) -> None:
        """(Re)creates the environments from `config.env` and `config.env_config`."""
        if self.env is not None:
            self.env.close()
        if self.config.env is None:
            raise ConfigError("no environment is set: config.environment(NAME) or --env NAME")
        settings = dict(self.config.env_config)
        if self.device.type != "cpu":
            settings.setdefault("device", self.device)
        if isinstance(self.config.env, str):
            env = registry.make_env(self.config.env, self.num_envs, **settings)
        elif isinstance(self.config.env, type) and issubclass(self.config.env, TensorEnv):
            env = self.config.env(self.num_envs, **settings)
        else:
            raise ConfigError(
                f"{self.config.env!r} is no tensor environment: give a registered name, gymnasium:ID or a TensorEnv class"
            )
        adapt = getattr(self.config, "adapt_env", None)
        self.env = adapt(env) if adapt is not None else env
        how = action_map(
            self.env.single_action_space,
            normalize=self.config.normalize_actions,
            clip=self.config.clip_actions,
        )
        self._action_map = how
        self._to_space = to_space(self.env.single_action_space, how, self.device)
        self._obs: Tensor | None = None

    def make_module(self) -> None:
        """(Re)creates the module that acts."""
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        self.module = spec.build()
        indexed = isinstance(self.module.observation_space, Indexed)
        if indexed and not any(isinstance(part, Encoder) for part in self.module.modules()):
            raise ConfigError(
                f"{type(self.module).__name__} reads whole observations, and this environment sends the rows of a table:"
                " turn that off in its settings"
            )
        self.module.to(self.device)
        self.module.eval()

    def get_spaces(self) -> dict[str, tuple[gymnasium.Space[Any], gymnasium.Space[Any]]]:
        if self.env is None:
            return self.spaces  # type: ignore[no-any-return]
        single = (self.env.single_observation_space, self.env.single_action_space)
        return {
            INPUT_ENV_SPACES: (self.env.observation_space, self.env.action_space),
            INPUT_ENV_SINGLE_SPACES: single,
            DEFAULT_MODULE_ID: single,
        }

    # Sampling --------------------------------------------------------------------------------------------

    def sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        until: Until | None = None,
        reduce: Reduce | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[Any]:
        """Steps the environments and returns a list with one `Rollout` (or what `reduce` makes of it).

        num_timesteps  environment steps over all B environments: ceil(num_timesteps / B) steps of the batch
                       (default: `rollout_fragment_length` steps of the batch)
        num_episodes   whole episodes from a fresh reset, the same number from each environment (one more from the
                       first few): taking the first to finish would favour short episodes
        until          stops after the step at which it returns True; together with `num_timesteps`, whichever is first

        Raises EnvironmentFault for a NaN or infinite observation or reward, with environment index and step.
        """
        assert self.env is not None and self.module is not None
        explore = self.config.explore if explore is None else explore
        quota = None
        if num_episodes is not None:
            if self.env.continuing:
                raise ConfigError(
                    f"{self.config.env} never ends, so it has no episodes to count: sample or evaluate by time steps"
                    " (evaluation_duration_unit='timesteps')"
                )
            base, extra = divmod(num_episodes, self.num_envs)
            quota = torch.full((self.num_envs,), base, dtype=torch.int64, device=self.device)
            quota[:extra] += 1
            steps = None
        elif num_timesteps is not None:
            steps = -(-num_timesteps // self.num_envs)
        elif until is not None:
            steps = None
        else:
            steps = self.config.get_rollout_fragment_length(self.worker_index or 0)
        with self.metrics.log_time(SAMPLE_TIMER):
            if force_reset or quota is not None or self._obs is None:
                self._reset()
            rollout = self._survive(lambda: self._roll(steps, quota, until, explore, random_actions))
            self._count(rollout, quota)
            if quota is not None:
                self._obs = None
        return [rollout if reduce is None else reduce(rollout, self.module)]

    def sample_and_report(
        self, weights: Any = None, *, report: bool = True, **kwargs: Any
    ) -> tuple[int, list[Any], Any]:
        """One call for what an iteration needs: takes the weights, samples, reports metrics.

        Returns (index of this runner, what `sample` returned, metrics or None if not `report`).  A fault that the user can
        mend comes back as a value: RLlib swallows what an actor raises and goes on.
        """
        if weights is not None:
            self.set_state(ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights)
        index = self.worker_index or 0
        try:
            samples = self.sample(**kwargs)
        except MobulaError as fault:
            if not index:
                raise
            return index, [fault], None
        return index, samples, self.get_metrics() if report else None

    def _reset(self) -> None:
        assert self.env is not None and self.module is not None
        # The seed is used once; later resets go on in the same stream.
        seed, self._env_seed = self._env_seed, None  # type: ignore[assignment]
        self._obs, _ = self.env.reset(seed=seed)
        self._over = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._return = torch.zeros(self.num_envs, dtype=torch.float64, device=self.device)
        self._length = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self._state: dict[str, Tensor] | None = None
        if self.module.is_stateful():
            self._initial = {
                name: torch.as_tensor(value, device=self.device).expand(self.num_envs, *value.shape).clone()
                for name, value in self.module.get_initial_state().items()
            }
            self._state = self._initial

    def _survive(self, roll: Callable[[], Rollout]) -> Rollout:
        """`roll()`; where the config wants it, faulty environments are made anew and the rollout begins again."""
        for _ in range(RESTARTS_IN_A_ROW if self.config.restart_failed_sub_environments else 0):
            try:
                return roll()
            except EnvironmentFault as fault:
                logger.warning("%s; its environments are made anew", fault)
                self._counts["env_restarts"] += 1
                self._env_seed = int(torch.randint(2**62, (), generator=self.generator))
                self.make_env()
                self._reset()
        return roll()

    @torch.no_grad()
    def _roll(
        self, steps: int | None, quota: Tensor | None, until: Until | None, explore: bool, at_random: bool
    ) -> Rollout:
        assert self.env is not None and self.module is not None and self._obs is not None
        env, module, obs, state = self.env, self.module, self._obs, self._state
        next_step = env.autoreset_mode is AutoresetMode.NEXT_STEP
        axes = (self.num_envs,) if env.num_agents is None else (self.num_envs, env.num_agents)
        columns: defaultdict[str, list[Tensor]] = defaultdict(list)
        finished = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        taken = 0
        while steps is None or taken < steps:
            step: dict[str, Tensor] = {Columns.OBS: obs}
            if at_random:
                actions = random_actions(
                    env.single_action_space, self._action_map, axes, self.generator, self.device
                )
            else:
                batch: dict[str, Any] = {Columns.OBS: obs}
                if state is not None:
                    # RLlib's recurrent modules take a time axis: [B, 1, ...].
                    batch = {Columns.OBS: obs.unsqueeze(1), Columns.STATE_IN: state}
                    step |= {f"{Columns.STATE_IN}/{name}": value for name, value in state.items()}
                try:
                    out = act(module, batch, explore=explore, generator=self.generator)
                except (ValueError, RuntimeError) as error:
                    # NaN observations end as NaN logits, which torch refuses in its own words.
                    self._check_finite(columns, obs, taken)
                    raise error
                new_state = out.pop(Columns.STATE_OUT, None)
                actions = out.pop(Columns.ACTIONS)
                if state is not None:
                    actions = actions.squeeze(1)
                    out = {name: value.squeeze(1) for name, value in out.items()}
                step |= {name: value for name, value in out.items() if isinstance(value, Tensor)}
            obs, reward, terminated, truncated, info = self._step(self._to_space(actions), taken)
            step[Columns.ACTIONS] = actions
            step[Columns.REWARDS] = reward
            step[Columns.TERMINATEDS] = terminated
            step[Columns.TRUNCATEDS] = truncated
            step[Columns.NEXT_OBS] = info.get("final_obs", obs)
            done = terminated | truncated
            if next_step:
                step[Columns.LOSS_MASK] = ~self._over
                self._over = done
            if quota is not None:
                within = finished < quota
                step[Columns.LOSS_MASK] = within & step.get(Columns.LOSS_MASK, within)
                finished += done
            if state is not None and not at_random:
                state = {
                    name: torch.where(done.view(-1, *[1] * (value.ndim - 1)), self._initial[name], value)
                    for name, value in new_state.items()
                }
            for name, value in step.items():
                columns[name].append(value)
            taken += 1
            if quota is not None and bool((finished >= quota).all()):
                break
            if until is not None and until(step):
                break
        self._check_finite(columns, obs, taken)
        self._obs, self._state = obs, state
        rollout = Rollout({name: torch.stack(values) for name, values in columns.items()})
        if Columns.ACTION_DIST_INPUTS in rollout and Columns.ACTION_LOGP not in rollout:
            cls = (
                module.get_exploration_action_dist_cls()
                if explore
                else module.get_inference_action_dist_cls()
            )
            rollout[Columns.ACTION_LOGP] = log_probability(
                cls, rollout[Columns.ACTION_DIST_INPUTS], rollout[Columns.ACTIONS]
            )
        return rollout

    def _step(self, actions: Tensor, taken: int) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """A step of the environments; what they raise comes out as an EnvironmentFault that says where."""
        assert self.env is not None
        try:
            return self.env.step(actions)
        except MobulaError:
            raise
        except Exception as error:
            said = " ".join(str(error).split()) or "nothing said"
            raise EnvironmentFault(
                f"{self.config.env} raised {type(error).__name__} ({said}) at step {self._steps_before() + taken} of env"
                f" runner {self.worker_index or 0}: mend it, or start it anew after a fault with --set"
                " restart_failed_sub_environments=true"
            ) from error

    def _steps_before(self) -> int:
        """Steps of the batch that were counted before this call of `sample`."""
        return int(self.num_env_steps_sampled_lifetime) // self.num_envs

    def _check_finite(self, columns: dict[str, list[Tensor]], obs: Tensor, taken: int) -> None:
        observations = [*columns.get(Columns.OBS, []), obs]
        for what, values in (("observation", observations), ("reward", columns.get(Columns.REWARDS, []))):
            if not values or not values[0].is_floating_point():
                continue
            bad = ~torch.stack(values).isfinite()
            if bool(bad.any()):
                step, index = bad.nonzero()[0, :2].tolist()
                # Observation t was returned by step t - 1 of this call.
                at = step - (what == "observation")
                total = self._steps_before() + max(at, 0)
                raise EnvironmentFault(
                    f"{self.config.env} returned a {what} that is not finite: environment index {index},"
                    f" step {total} of env runner {self.worker_index or 0}; mend the environment, or wrap it to clean its output"
                )

    # Metrics ---------------------------------------------------------------------------------------------

    def _count(self, rollout: Rollout, quota: Tensor | None) -> None:
        reward = rollout[Columns.REWARDS].double()
        mask = rollout.get(Columns.LOSS_MASK)
        if reward.ndim == 3:
            reward = reward.sum(-1)
        done = rollout.done()
        if mask is not None:
            reward, done = reward * mask, done & mask
        steps = rollout.env_steps()
        self.num_env_steps_sampled_lifetime += steps
        self._counts["env_steps"] += steps
        self._counts["agent_steps"] += rollout.agent_steps()
        self._counts["reward"] += float(reward.sum())
        if not self.env.continuing:  # type: ignore[union-attr]
            ones = torch.ones_like(done, dtype=torch.int64) if mask is None else mask.long()
            ends, returns, self._return = _segments(reward, done, self._return)
            _, lengths, self._length = _segments(ones, done, self._length)
            if ends:
                self._new_episodes.append((returns, lengths))

    def get_metrics(self) -> Any:
        """What was sampled since the last call, reduced for RLlib's `MetricsLogger`."""
        log = self.metrics.log_value
        counts, self._counts = self._counts, defaultdict(float)
        fresh = [
            pair
            for returns, lengths in self._new_episodes
            for pair in zip(returns.tolist(), lengths.tolist(), strict=True)
        ]
        self._new_episodes.clear()
        episodes = len(fresh)
        env_steps, agent_steps = int(counts["env_steps"]), int(counts["agent_steps"])
        log(NUM_ENV_STEPS_SAMPLED, env_steps, reduce="sum")
        log(NUM_ENV_STEPS_SAMPLED_LIFETIME, env_steps, reduce="lifetime_sum", with_throughput=True)
        log((NUM_AGENT_STEPS_SAMPLED, DEFAULT_AGENT_ID), agent_steps, reduce="sum")
        log((NUM_AGENT_STEPS_SAMPLED_LIFETIME, DEFAULT_AGENT_ID), agent_steps, reduce="lifetime_sum")
        log((NUM_MODULE_STEPS_SAMPLED, DEFAULT_MODULE_ID), agent_steps, reduce="sum")
        log((NUM_MODULE_STEPS_SAMPLED_LIFETIME, DEFAULT_MODULE_ID), agent_steps, reduce="lifetime_sum")
        log(NUM_EPISODES, episodes, reduce="sum")
        log(NUM_EPISODES_LIFETIME, episodes, reduce="lifetime_sum")
        log(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
        log(REWARD_SUM, counts["reward"], reduce="sum")
        if self.config.restart_failed_sub_environments:
            log(ENV_RESTARTS, int(counts["env_restarts"]), reduce="lifetime_sum")
        # In training, the last `metrics_num_episodes_for_smoothing` episodes, also in iterations in which none ended; in
        # evaluation, every episode that was asked for and no other.
        self._last_episodes.extend(fresh)
        shown = fresh if self.config.in_evaluation else list(self._last_episodes)
        if shown:
            window = len(shown) if self.config.in_evaluation else self._smoothing
            for value, length in shown:
                log(EPISODE_RETURN_MEAN, value, window=window)
                log(EPISODE_LEN_MEAN, length, window=window)
            returns, lengths = zip(*shown, strict=True)
            log(EPISODE_RETURN_MIN, min(returns), reduce="min", window=window)
            log(EPISODE_RETURN_MAX, max(returns), reduce="max", window=window)
            log(EPISODE_LEN_MIN, min(lengths), reduce="min", window=window)
            log(EPISODE_LEN_MAX, max(lengths), reduce="max", window=window)
        return self.metrics.reduce()

    # State -----------------------------------------------------------------------------------------------

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        assert self.module is not None
        state: dict[str, Any] = {NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps_sampled_lifetime}
        if self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = self.module.get_state(**kwargs)
            state[WEIGHTS_SEQ_NO] = self._weights_seq_no
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        if COMPONENT_RL_MODULE in state:
            number = state.get(WEIGHTS_SEQ_NO, 0)
            # 0 means: whatever the number, take it (a restored checkpoint).
            if number == 0 or number > self._weights_seq_no:
                weights = state[COMPONENT_RL_MODULE]
                if isinstance(weights, ray.ObjectRef):
                    weights = ray.get(weights)
                assert self.module is not None
                self.module.set_state(weights.get(DEFAULT_MODULE_ID, weights))
                self._weights_seq_no = max(number, self._weights_seq_no)
        if NUM_ENV_STEPS_SAMPLED_LIFETIME in state:
            self.num_env_steps_sampled_lifetime = state[NUM_ENV_STEPS_SAMPLED_LIFETIME]

    def position(self) -> dict[str, Any]:
        """Everything that later samples depend on but the weights: random streams, environments, unfinished episodes.

        {} where the environments cannot be copied or written (simulators in other processes): a resumed run begins new
        episodes then.
        """
        assert self.env is not None
        kept: dict[str, Any] = {"generator": self.generator.get_state(), "env_seed": self._env_seed}
        kept["counts"], kept["new_episodes"] = dict(self._counts), list(self._new_episodes)
        kept["last_episodes"] = list(self._last_episodes)
        if self._obs is None:
            return kept
        try:
            kept["env"] = self.env.get_state()
            # A simulator of somebody else's may be copied and yet not be written.
            cloudpickle.dumps(kept["env"])
        except (DataError, TypeError, AttributeError, NotImplementedError, pickle.PicklingError):
            return {}
        return kept | {name: getattr(self, name) for name in _CARRIED}

    def resume_at(self, position: dict[str, Any]) -> None:
        """Puts back what `position` returned, for the same environment and number of environments."""
        if not position:
            return
        assert self.env is not None
        self.generator.set_state(position["generator"])
        self._env_seed = position["env_seed"]
        self._counts = defaultdict(float, position["counts"])
        self._new_episodes = list(position["new_episodes"])
        self._last_episodes.clear()
        self._last_episodes.extend(position["last_episodes"])
        if "env" in position:
            self._reset()
            self._env_seed = None  # type: ignore[assignment]
            self.env.set_state(position["env"])
            for name in _CARRIED:
                setattr(self, name, position[name])

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        return [(COMPONENT_RL_MODULE, self.module)]  # type: ignore[list-item]

    def assert_healthy(self) -> None:
        assert self.module is not None

    def stop(self) -> None:
        if self.env is not None:
            self.env.close()


_CARRIED = ("_obs", "_over", "_return", "_length", "_state")


def _was_restarted() -> bool:
    """Whether this process is an actor that Ray has started in the place of one that died."""
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and context.was_current_actor_reconstructed


def _segments(values: Tensor, ends: Tensor, carried: Tensor) -> tuple[int, Tensor, Tensor]:
    """Sums of `values` [T, B] over the stretches that end where `ends` [T, B] is True.

    `carried` [B] is what an unfinished stretch had before the first row.  Returns (number of ends, sums of the finished
    stretches in order of time, the new `carried`).
    """
    running = values.cumsum(0) + carried
    if not bool(ends.any()):
        return 0, running.new_empty(0), running[-1]
    env, time = ends.T.nonzero(as_tuple=True)
    at_end = running[time, env]
    before = torch.zeros_like(at_end)
    same = env[1:] == env[:-1]
    before[1:][same] = at_end[:-1][same]
    last = torch.zeros_like(running[-1])
    # Ends of one environment are in order of time: the last write is the latest end.
    latest = torch.ones_like(env, dtype=torch.bool)
    latest[:-1] = ~same
    last[env[latest]] = at_end[latest]
    order = time.argsort(stable=True)
    return len(env), (at_end - before)[order], running[-1] - last
