"""Settings of offline methods; environment and spaces come from the data."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from gymnasium import spaces
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from mobula import registry
from mobula.algorithms.offline.base.module import OfflineModule
from mobula.envs import datasets
from mobula.envs.datasets.dataset import Dataset
from mobula.errors import ConfigError, DataError
from mobula.method import MethodConfig, hyperparameter
from mobula.sampling.runner import TensorEnvRunner


@functools.lru_cache(maxsize=4)
def load_data(name: str, streaming: bool = False) -> Dataset:
    """`mobula.envs.datasets.load` (or `head`, where rows are streamed), kept in this process."""
    return datasets.head(name) if streaming else datasets.load(name)


class OfflineConfig(MethodConfig):
    """Settings that every offline method has (base class)."""

    needs_env = False
    default_stop = {"progress": 1.0}
    headline = ("score", "normalised score")
    action_kind: ClassVar[str] = "any"
    """ "any", "continuous" or "discrete": the actions that the method takes."""

    data = hyperparameter(
        "pendulum/scripted-mixed-0.1",
        None,
        "logged data: a recipe (mobula data list), an .hdf5 file (D4RL), a Minari or a Parquet folder",
    )
    steps = hyperparameter(8000, None, "gradient steps of the whole run", low=1)
    block = hyperparameter(250, None, "gradient steps of a training iteration", low=1)
    batch = hyperparameter(
        128, tune.choice([128, 256, 512]), "rows of a gradient step, of each learner", low=1
    )
    gamma = hyperparameter(0.99, tune.choice([0.99, 0.995]), "discount", low=0.0, high=1.0)
    lr = hyperparameter(3e-4, tune.loguniform(1e-4, 1e-3), "step size of Adam, all networks", low=0.0)
    hidden = hyperparameter([64, 64], tune.choice([[64, 64], [256, 256]]), "hidden layers of every network")
    num_seeds_batched = hyperparameter(
        1,
        None,
        "S: independent seeds trained side by side (seed, seed + 1, ...); the first one is exported",
        low=1,
    )
    reward_transform = hyperparameter(
        "reward_range", None, "none, reward_range, reward_unit or reward_shift(c)"
    )
    normalize_observations = hyperparameter(
        False, tune.choice([False, True]), "subtract the data's mean, divide by its deviation + 1e-3"
    )
    precision = hyperparameter("float32", None, "of all networks", choices=["float32", "float64"])
    evaluate_every = hyperparameter(
        1000, None, "gradient steps between evaluations in the environment; 0: at the end alone", low=0
    )
    evaluation_episodes = hyperparameter(10, None, "episodes of each seed in an evaluation", low=1)
    streaming = hyperparameter(
        False, None, "read Parquet through Ray Data, shuffled every epoch, instead of holding it in memory"
    )

    def __init__(self, algo_class: type | None = None) -> None:
        self._env_of_data: str | None = None
        super().__init__(algo_class=algo_class)
        # Evaluation runs in tensor environments; training samples nothing.
        self.env_runner_cls = TensorEnvRunner

    def training(self, **kwargs: Any) -> Any:
        if "data" in kwargs and self._env_of_data is not None:
            # The environment of the earlier data goes with them.
            self.environment(env=None, env_config={}, observation_space=None, action_space=None)
            self._env_of_data = None
        return super().training(**kwargs)

    def validate(self) -> None:
        """Loads the data (once a process) and takes environment and spaces from them."""
        if self.num_env_runners:
            raise ConfigError(
                f"{type(self).__name__}: num_env_runners is {self.num_env_runners}, but nothing is sampled"
            )
        if not self.hidden or any(not isinstance(n, int) or n < 1 for n in self.hidden):
            raise ConfigError(
                f"{type(self).__name__}: hidden is {self.hidden}; a list of layer sizes is needed"
            )
        self.adopt(load_data(self.data, self.streaming))
        super().validate()

    def adopt(self, dataset: Dataset) -> None:
        """Spaces and, unless one is set, the environment of the data.  Raises where they do not fit the method."""
        kind = "discrete" if dataset.discrete else "continuous"
        if self.action_kind not in ("any", kind):
            raise DataError(
                f"{type(self).__name__} takes {self.action_kind} actions; {dataset.name} has the action space"
                f" {dataset.action_space()}"
            )
        observation_space, action_space = dataset.observation_space(), dataset.action_space()
        if not isinstance(observation_space, spaces.Box | spaces.Discrete):
            raise DataError(
                f"{dataset.name}: observations of {observation_space} are neither a Box nor Discrete"
            )
        if self.env is None and dataset.metadata.get("env"):
            name = str(dataset.metadata["env"])
            self.environment(registry.env_name(name), env_config=dict(dataset.metadata.get("env_config", {})))
            self._env_of_data = name
        if isinstance(self.env, str):
            world = registry.make_env(self.env, 1, **dict(self.env_config))
            observation, action = world.single_observation_space, world.single_action_space
            world.close()
            if "observation_space" in dataset.metadata and (
                observation.shape != observation_space.shape
                or action.shape != action_space.shape
                or isinstance(action, spaces.Discrete) != dataset.discrete
            ):
                raise DataError(
                    f"{dataset.name} holds {observation_space} -> {action_space}; {self.env} has {observation} -> {action}"
                )
            observation_space, action_space = observation, action
        self.environment(observation_space=observation_space, action_space=action_space)

    def parts(self) -> dict[str, Any]:
        """What the module is made of (`OfflineModule`)."""
        return {}

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        about = {
            "hidden": self.hidden,
            "seeds": self.num_seeds_batched,
            "first_seed": self.seed or 0,
            "precision": self.precision,
            **self.parts(),
        }
        return RLModuleSpec(module_class=self.get_module_class(), model_config=about)

    def get_module_class(self) -> Any:
        """The class of the module."""
        return OfflineModule

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}
