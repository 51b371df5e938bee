"""`Method` and `MethodConfig`: RLlib's `Algorithm` and `AlgorithmConfig`, with declared hyper-parameters.

A method is a config class with `hyperparameter()`s, and an algorithm class whose `training_step` reads like the
paper's pseudo-code:

    class FooConfig(MethodConfig):
        \"\"\"One line that says what it is (Author et al., venue, arXiv).\"\"\"
        alpha = hyperparameter(2.0, tune.loguniform(0.1, 10.0), "weight of the regulariser", low=0.0)

    class Foo(Method, config=FooConfig):
        def training_step(self):
            self.learn(concatenate(self.sample()))
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import logging
import math
import numbers
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    TIMERS,
    WEIGHTS_SEQ_NO,
)
from ray.tune.registry import _has_trainable, register_trainable

from mobula.errors import ArtifactError, ClusterError, ConfigError, MobulaError, nearest
from mobula.learning.learners import Batch
from mobula.metrics import Meter
from mobula.sampling.rollout import Rollout
from mobula.sampling.runner import TensorEnvRunner

if TYPE_CHECKING:
    from mobula.experiment import Experiment
    from mobula.sampling.tensor_env import TensorEnv


logger = logging.getLogger("mobula")

PROBE_SECONDS = 10.0
"""Time between attempts to take env runners back that have died."""


class Hyperparameter:
    """A declared knob: default, Tune space, meaning, allowed range.  Read from a config, it is the value."""

    name: str

    def __init__(
        self,
        default: Any,
        space: Any,
        help: str,
        low: float | None,
        high: float | None,
        choices: Sequence[Any] | None,
        words: Sequence[str] = (),
    ) -> None:
        self.default, self.space, self.help = default, space, help
        self.low, self.high, self.choices, self.words = low, high, choices, tuple(words)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @property
    def range(self) -> str:
        """The allowed values in words, "" where anything goes."""
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        parts = [repr(word) for word in self.words]
        if self.low is not None and self.high is not None:
            parts.insert(0, f"{self.low:g} to {self.high:g}")
        elif self.low is not None:
            parts.insert(0, f"at least {self.low:g}")
        elif self.high is not None:
            parts.insert(0, f"at most {self.high:g}")
        return " or ".join(parts)

    def check(self, value: Any, where: str) -> Any:
        """`value` as the config stores it.  Raises ConfigError where it is of the wrong type or out of range."""
        allowed = f" (allowed: {self.range})" if self.range else ""
        if self.choices is not None:
            if value not in self.choices:
                raise ConfigError(f"{where}: {self.name} is {value!r}{allowed}")
            return value
        if isinstance(value, str) and value in self.words:
            return value
        if value is None:
            if self.default is None:
                return None
            raise ConfigError(f"{where}: {self.name} is None{allowed}; its default is {self.default!r}")
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {self.name} is {value!r}; it is true or false")
            return value
        bounded = self.low is not None or self.high is not None
        if bounded or isinstance(self.default, int | float):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                if isinstance(value, list | tuple) and isinstance(self.default, int | float):
                    # RLlib's schedules: [[timestep, value], ...].
                    return value
                raise ConfigError(f"{where}: {self.name} is {value!r}; a number is needed{allowed}")
            number = float(value)
            if math.isnan(number) or (
                (self.low is not None and number < self.low) or (self.high is not None and number > self.high)
            ):
                raise ConfigError(f"{where}: {self.name} is {value!r}, out of range{allowed}")
            if isinstance(self.default, int) and number != int(number):
                raise ConfigError(f"{where}: {self.name} is {value!r}; a whole number is needed{allowed}")
            return int(number) if isinstance(self.default, int) else number
        if isinstance(self.default, list | tuple):
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{where}: {self.name} is {value!r}; a list is needed")
            return list(value)
        if isinstance(self.default, str) and not isinstance(value, str):
            raise ConfigError(f"{where}: {self.name} is {value!r}; a word is needed")
        return value


def hyperparameter(
    default: Any,
    space: Any = None,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
    words: Sequence[str] = (),
) -> Any:
    """Declares a knob of a method, in the body of its config class; the one place where it is described.

    default  value of a fresh config; its type is the type that is asked for (None: optional)
    space    Ray Tune search space (`tune.loguniform(...)`), or None if it is not searched over
    help     meaning, one line; shown by --help and in the docs
    low, high, choices  allowed values, inclusive
    words    words that are allowed beside numbers ("auto")
    """
    return Hyperparameter(default, space, help, low, high, choices, words)


class MethodConfig(AlgorithmConfig):
    """Base of every method's config: an `AlgorithmConfig` with declared hyper-parameters, on tensors by default.

    Class attributes that a method may set:

    needs_env      False for methods that learn from data alone (no env runners are made)
    rejected       {RLlib setting: reason} for settings that have no meaning in the method
    citation       BibTeX entry, shown by `mobula cite`
    when           when to use the method and when not (a paragraph of Markdown, shown in the docs)
    effort         what an iteration costs, in operations and in seconds on one core (a paragraph too)
    default_env    registered environment of a fresh config, where the method has a natural one
    headline       (metric, label) of a run's progress and figure, for methods that are not judged by return or reward
    headline_mode  whether a search wants that metric small ("min") or large ("max")
    default_stop   where a run ends if nothing is said (names as in `mobula.results.STOP_NAMES`)
    """

    needs_env: ClassVar[bool] = True
    rejected: ClassVar[Mapping[str, str]] = {}
    citation: ClassVar[str] = ""
    when: ClassVar[str] = ""
    effort: ClassVar[str] = ""
    default_env: ClassVar[str | None] = None
    headline: ClassVar[tuple[str, str] | None] = None
    headline_mode: ClassVar[str] = "min"
    default_stop: ClassVar[Mapping[str, float]] = {"iterations": 50}

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or self.register())
        self.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        self.framework("torch")
        self.env_runners(num_env_runners=0, num_envs_per_env_runner=1, create_env_on_local_worker=False)
        self.env_runner_cls = TensorEnvRunner if self.needs_env else None
        self._is_online = self.needs_env
        if self.default_env is not None:
            self.environment(self.default_env)
        self.evaluation(evaluation_duration=10, evaluation_config={"explore": False})
        # A probe waits for actors that are not there yet; while some are, training goes on without the others.
        self.fault_tolerance(restart_failed_env_runners=True, env_runner_health_probe_timeout_s=2.0)
        for name, knob in self.hyperparameters().items():
            value = knob.default
            setattr(self, name, list(value) if isinstance(value, list | tuple) else value)

    @classmethod
    def register(cls) -> type[Method] | None:
        """Makes the algorithm known to Tune by its name ("MAC"); a config does it when it is made.

        Not when the class is made: Ray ships a class by value while the module that defines it is still being read.
        """
        algorithm = _ALGORITHMS.get(cls)
        # Asked of Tune each time: what it knows ends with the Ray that it was told to.
        if algorithm is not None and not _has_trainable(algorithm.__name__):
            register_trainable(algorithm.__name__, algorithm)
        return algorithm

    @classmethod
    def method_class(cls) -> type[Method]:
        """The algorithm class that goes with this config."""
        return _ALGORITHMS[cls]

    @classmethod
    def hyperparameters(cls) -> dict[str, Hyperparameter]:
        """Every declared knob by name, those of base classes first."""
        found: dict[str, Hyperparameter] = {}
        for base in reversed(cls.__mro__):
            found |= {name: knob for name, knob in vars(base).items() if isinstance(knob, Hyperparameter)}
        return found

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        """The Tune search space: {name: space} of every knob that declares one."""
        return {name: knob.space for name, knob in cls.hyperparameters().items() if knob.space is not None}

    def knobs(self) -> dict[str, Any]:
        """The current value of every hyper-parameter."""
        return {name: getattr(self, name) for name in self.hyperparameters()}

    def training(self, **kwargs: Any) -> Self:
        """Sets hyper-parameters and RLlib's training settings.  Raises ConfigError for an unknown or bad one."""
        knobs = self.hyperparameters()
        where = type(self).__name__
        rest = {}
        for name, value in kwargs.items():
            if name in self.rejected:
                raise ConfigError(f"{where}: {name} cannot be set: {self.rejected[name]}")
            if name in knobs:
                setattr(self, name, knobs[name].check(value, where))
            elif name in _training_arguments(type(self)):
                rest[name] = value
            else:
                raise ConfigError(self._unknown(name, [*knobs, *_training_arguments(type(self))]))
        super().training(**rest)
        return self

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> Self:
        """Sets everything that `config_dict` names (Tune's way).  Raises ConfigError for a name that does not exist."""
        known = {*vars(self), *AlgorithmConfig().to_dict(), *_TRANSLATED}
        for name in config_dict:
            # Tune adds keys of its own, all of them between double underscores.
            if name not in known and not name.startswith("__"):
                raise ConfigError(self._unknown(name, [*self.hyperparameters(), *known]))
        super().update_from_dict({k: v for k, v in config_dict.items() if not k.startswith("__")})
        return self

    def _unknown(self, name: str, options: Sequence[str]) -> str:
        # Names of this method's own knobs come first in the suggestion.
        own = difflib.get_close_matches(name, list(self.hyperparameters()), n=2, cutoff=0.5)
        return f"{type(self).__name__} has no setting {name!r}.{nearest(name, own or options)}"

    def validate(self) -> None:
        """RLlib's checks and ours: every hyper-parameter in range, nothing set that has no meaning here."""
        super().validate()
        where = type(self).__name__
        for name, knob in self.hyperparameters().items():
            setattr(self, name, knob.check(getattr(self, name), where))
        plain = AlgorithmConfig()
        for name, reason in self.rejected.items():
            if getattr(self, name) != getattr(plain, name):
                raise ConfigError(f"{where}: {name} cannot be set: {reason}")
        if self.needs_env and self.env is None:
            raise ConfigError(f"{where}: no environment is set: config.environment(NAME) or --env NAME")

    def adapt_env(self, env: TensorEnv) -> TensorEnv:
        """The environment that the method wants, made of the one that was named.

        Override to wrap it, or to raise ConfigError where its spaces cannot be taken.
        """
        return env


# Config class -> algorithm class.  A table rather than an attribute: Ray looks into the attributes of the classes that
# it ships, and would go round a cycle for ever.
_ALGORITHMS: dict[type[MethodConfig], type[Method]] = {}


_TRANSLATED = frozenset({"multiagent", "callbacks", "num_workers", "lambda", "class", "num_gpus"})
"""Keys of RLlib's dictionaries that are no attributes."""


def _training_arguments(cls: type[AlgorithmConfig]) -> set[str]:
    """Keyword arguments that RLlib's `training` takes, along the bases of `cls`."""
    names: set[str] = set()
    for base in cls.__mro__:
        method = vars(base).get("training")
        if method is not None:
            names |= {
                p.name for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD
            }
    return names - {"self"}


class Method(Algorithm):
    """Base of every method: an RLlib `Algorithm` whose samples and updates stay tensors."""

    config: MethodConfig
    config_class: ClassVar[type[MethodConfig]]
    eval_env_runner_group: EnvRunnerGroup | None

    def __init_subclass__(cls, config: type[MethodConfig] | None = None, **kwargs: Any) -> None:
        """`class Foo(Method, config=FooConfig)` ties the two."""
        super().__init_subclass__(**kwargs)
        if config is not None:
            cls.config_class = config
            _ALGORITHMS[config] = cls

    @classmethod
    def get_default_config(cls) -> MethodConfig:
        return cls.config_class()

    @classmethod
    def experiment(cls) -> Experiment:
        """What the paper claims, as something that can be run and can fail."""
        raise ConfigError(f"{cls.__name__} declares no experiment of its own")

    def setup(self, config: Any) -> None:
        self._weights: Any = None
        self._probed = -math.inf
        self.meter = Meter(self)
        super().setup(config)

    def step(self) -> Any:
        """RLlib's iteration; its result has the mean reward a step too, which tasks without episodes are judged by."""
        with self.meter:
            result = super().step()
        found = result.get(ENV_RUNNER_RESULTS, {})
        if found.get("num_env_steps_sampled") and "reward_sum" in found:
            found["reward_per_step"] = found["reward_sum"] / found["num_env_steps_sampled"]
        self.meter.record(result)
        return result

    def cleanup(self) -> None:
        self.meter.close()
        super().cleanup()

    def figures(self, folder: Path) -> list[str]:
        """Figures of the method's own, written into `folder` at the end of a run; returns their names."""
        return []

    # Sampling --------------------------------------------------------------------------------------------

    def sample(
        self, num_timesteps: int | Sequence[int] | None = None, *, report: bool = True, **kwargs: Any
    ) -> list[Any]:
        """Samples on every env runner with the current weights; one `Rollout` (or reduction) a runner, in their order.

        num_timesteps  environment steps of each runner; a sequence gives every runner its own
        report         False leaves the metrics with the runners until the next call that reports; methods with many
                       short rollouts an iteration save most of the overhead so

        The other arguments are those of `TensorEnvRunner.sample`.
        """
        group = self._runners()
        remote = group.num_remote_env_runners()
        each: list[int | None]
        if isinstance(num_timesteps, Sequence):
            each = list(num_timesteps)
        else:
            each = [num_timesteps] * max(remote, 1)
        if len(each) != max(remote, 1):
            raise ValueError(f"num_timesteps has {len(each)} entries for {max(remote, 1)} env runners")
        with self.meter.timed("sampling"), self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            if remote == 0:
                runner = cast(TensorEnvRunner, group.local_env_runner)
                self._copy_weights_to(runner)
                results = [runner.sample_and_report(report=report, num_timesteps=each[0], **kwargs)]
            else:
                results = self._sample_remotely(group, each, {"report": report, **kwargs})
        self.meter.sampled(results)
        if report:
            self.metrics.aggregate([metrics for *_, metrics in results], key=ENV_RUNNER_RESULTS)
        return [sample for _, samples, _ in results for sample in samples]

    def _sample_remotely(
        self, group: EnvRunnerGroup, each: list[int | None], kwargs: dict[str, Any]
    ) -> list[Any]:
        if self._weights is None:
            state = self.learner_group.get_state(
                components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=True
            )[COMPONENT_LEARNER]
            self._weights = ray.put({name: state[name] for name in (COMPONENT_RL_MODULE, WEIGHTS_SEQ_NO)})
        deadline = time.monotonic() + 3 * self.config.sample_timeout_s
        while time.monotonic() < deadline:
            ids = group.healthy_env_runner_ids()
            calls = [{"weights": self._weights, "num_timesteps": each[i - 1], **kwargs} for i in ids]
            found = (
                group.foreach_env_runner(
                    "sample_and_report",
                    kwargs=calls,
                    local_env_runner=False,
                    remote_worker_ids=ids,
                    timeout_seconds=self.config.sample_timeout_s,
                )
                if ids
                else []
            )
            self._restart_stalled(group, set(ids) - {index for index, _, _ in found})
            for _, samples, _ in found:
                if samples and isinstance(samples[0], MobulaError):
                    raise samples[0]
            if found:
                return found
            # All of them died or stalled: Ray restarts the actors; take those that answer again.
            self._probed = -math.inf
            self.restore_env_runners(group)
        raise ClusterError(
            f"none of {group.num_remote_env_runners()} env runners returned a sample within"
            f" {3 * self.config.sample_timeout_s:g} s; see the Ray logs, or raise sample_timeout_s"
        )

    def _restart_stalled(self, group: EnvRunnerGroup, missing: set[int]) -> None:
        """Ends env runners that neither answered nor died within `sample_timeout_s`; Ray starts them again."""
        manager = group._worker_manager
        for index in sorted(missing & set(group.healthy_env_runner_ids())):
            logger.warning(
                "env runner %d returned nothing within sample_timeout_s = %g s; it is started again",
                index,
                self.config.sample_timeout_s,
            )
            manager.set_actor_state(index, healthy=False)
            ray.kill(manager.actors()[index], no_restart=False)

    def restore_env_runners(self, env_runner_group: EnvRunnerGroup | None) -> list[int]:
        """RLlib's; a runner that cannot come back yet (its machine is gone) is asked for every ten seconds, not in every
        iteration.
        """
        group = env_runner_group
        if group is None or group.num_healthy_remote_workers() == group.num_remote_env_runners():
            return []
        if time.monotonic() - self._probed < PROBE_SECONDS:
            return []
        restored = super().restore_env_runners(group)
        self._probed = time.monotonic()
        return restored

    def _runners(self) -> EnvRunnerGroup:
        if self.env_runner_group is None:
            raise ConfigError(f"{type(self).__name__} has no environment to sample from")
        return self.env_runner_group

    def _copy_weights_to(self, runner: TensorEnvRunner) -> None:
        """The learner's weights to a runner in this process, without a detour through NumPy."""
        if self._weights == "copied":
            return
        if self.learner_group.is_local:
            state = self.learner_group._learner.module[DEFAULT_MODULE_ID].state_dict()
            assert runner.module is not None
            own = runner.module.state_dict()
            with torch.no_grad():
                for name, value in own.items():
                    value.copy_(state[name])
            runner._weights_seq_no = self.learner_group._learner._weights_seq_no
        else:
            group = self._runners()
            group.sync_weights(from_worker_or_learner_group=self.learner_group, inference_only=True)
        self._weights = "copied"

    # Learning --------------------------------------------------------------------------------------------

    def learn(
        self,
        batch: Batch | Sequence[Batch],
        *,
        shard_axis: int | None = None,
        report: bool = True,
        **kwargs: Any,
    ) -> None:
        """One update of the learner (or all of them, each on its shard) from named tensors.

        With several learners the batch is cut along `shard_axis` (default: 1, the environments, of a `Rollout`; else 0),
        as evenly as it can be; or it is given as one batch for each learner.  `report=False` leaves the metrics with the
        learners until the next call that reports.  `kwargs` go to the learner's `learn`.
        """
        timesteps = {
            NUM_ENV_STEPS_SAMPLED_LIFETIME: self.metrics.peek(
                (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0
            )
        }
        with self.meter.timed("learning"), self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            if self.learner_group.is_local:
                learner = self.learner_group._learner
                if not isinstance(batch, Mapping):
                    (batch,) = batch
                results = [learner.update_from_tensors(batch, timesteps=timesteps, report=report, **kwargs)]
            else:
                results = self._learn_remotely(batch, shard_axis, timesteps, {"report": report, **kwargs})
        if report:
            self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self._weights = None

    def _learn_remotely(
        self,
        batch: Batch | Sequence[Batch],
        shard_axis: int | None,
        timesteps: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> list[Any]:
        shards = [
            ray.put(part)
            for part in (self._shards(batch, shard_axis) if isinstance(batch, Mapping) else batch)
        ]

        def update(learner: Any, shards: Any = shards) -> Any:
            shard = ray.get(shards[learner._learner_index])
            try:
                return learner.update_from_tensors(shard, timesteps=timesteps, **kwargs)
            except MobulaError as error:
                # Raised over there it would take the learner out of service, and a page of traces would stand before its one line.
                return error

        results = self.learner_group.foreach_learner(update)
        return _values(results)

    def _shards(self, batch: Batch, shard_axis: int | None) -> list[Rollout]:
        """`batch`, cut for the learners."""
        learners = len(self.learner_group)
        axis = shard_axis if shard_axis is not None else int(isinstance(batch, Rollout))
        parts = {name: value.tensor_split(learners, dim=axis) for name, value in batch.items()}
        if any(part.shape[axis] == 0 for pieces in parts.values() for part in pieces):
            raise ConfigError(
                f"{learners} learners cannot share a batch with {len(next(iter(batch.values())))} rows along axis {axis}:"
                " lower num_learners or sample from more environments"
            )
        return [
            Rollout({name: pieces[i].contiguous() for name, pieces in parts.items()}) for i in range(learners)
        ]

    @property
    def rl_module(self) -> TorchRLModule:
        """The module of a local learner, as it is trained (`get_module()` is the env runner's copy)."""
        if not self.learner_group.is_local:
            raise ConfigError("the learners are remote: use get_state() or get_module()")
        return cast(TorchRLModule, self.learner_group._learner.module[DEFAULT_MODULE_ID].unwrapped())

    def get_module(self, module_id: str = DEFAULT_MODULE_ID) -> Any:
        """The module that acts, with the latest weights."""
        if self.env_runner_group is None or self.env_runner_group.num_remote_env_runners():
            if self.learner_group.is_local:
                return self.rl_module
            found = self.learner_group.foreach_learner(
                lambda learner: None if learner._learner_index else copy.deepcopy(learner.rl_module).cpu()
            )
            return next(module for module in _values(found) if module is not None)
        self._copy_weights_to(cast(TensorEnvRunner, self.env_runner_group.local_env_runner))
        return super().get_module(module_id)

    # Evaluation and checkpoints --------------------------------------------------------------------------

    def evaluate(self, parallel_train_future: Any = None) -> Any:
        """RLlib's `evaluate`, on environments of its own even where no evaluation runs during training."""
        if self.eval_env_runner_group is None:
            assert self.evaluation_config is not None
            if self.evaluation_config.env is None:
                raise ConfigError(f"{type(self).__name__} has no environment to be evaluated in: set one")
            self.eval_env_runner_group = EnvRunnerGroup(
                env_creator=self.env_creator,
                config=self.evaluation_config,
                local_env_runner=self.evaluation_config.create_local_env_runner,
                logdir=self.logdir,
                tune_trial_id=self.trial_id,
                pg_offset=self.config.num_env_runners,
            )
        return super().evaluate(parallel_train_future)

    def get_metadata(self) -> dict[str, Any]:
        return {
            **super().get_metadata(),
            "class_module": type(self).__module__,
            "class_name": type(self).__qualname__,
        }

    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Restores a checkpoint of the same method.  Raises ArtifactError for one of another method."""
        made_by = checkpoint_class(path)
        if made_by is not None and made_by not in {
            f"{c.__module__}:{c.__qualname__}" for c in type(self).__mro__
        }:
            raise ArtifactError(
                f"{path} is a checkpoint of {made_by.rpartition(':')[2]}, not of {type(self).__name__}"
            )
        if self.env_runner_group is None:
            # RLlib would sync weights to env runners that do not exist.
            Checkpointable.restore_from_path(self, path, *args, **kwargs)
        else:
            super().restore_from_path(path, *args, **kwargs)
        self._weights = None

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state, and where every env runner stands: a restored run samples what an uninterrupted one would."""
        state = super().get_state(*args, **kwargs)
        group = self.env_runner_group
        if group is not None and self.config.env_runner_cls is TensorEnvRunner:
            found = group.foreach_env_runner(
                lambda runner: (runner.worker_index or 0, runner.position() if runner.env is not None else {})
            )
            state["runners"] = dict(found)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._weights = None
        positions = state.get("runners")
        if positions and self.env_runner_group is not None:

            def resume(runner: Any, positions: dict[int, Any] = positions) -> None:
                runner.resume_at(positions.get(runner.worker_index or 0, {}))

            self.env_runner_group.foreach_env_runner(resume)


def _values(answers: Any) -> list[Any]:
    """What learners answered.  Raises what one of them raised or, for a user's mistake, returned."""
    values = [answer.get() for answer in answers]
    for value in values:
        if isinstance(value, Exception):
            raise value
    return values


def checkpoint_class(path: str | Path) -> str | None:
    """ "module:Class" of the algorithm that wrote the checkpoint at `path`, or None if it does not say."""
    file = Path(path) / Algorithm.METADATA_FILE_NAME
    if not file.is_file():
        return None
    data = json.loads(file.read_text(encoding="utf-8"))
    return f"{data.get('class_module', '')}:{data.get('class_name', '')}" if "class_name" in data else None
