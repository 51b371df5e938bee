"""The algorithm of offline methods: the data to the learners, blocks of steps, scores in the environment of the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID

from mobula import registry
from mobula.algorithms.offline.base.config import OfflineConfig, load_data
from mobula.algorithms.offline.base.module import OfflineModule
from mobula.envs import datasets
from mobula.envs.datasets import scores, transforms
from mobula.envs.datasets.dataset import LEARNED_FROM, Dataset
from mobula.errors import ConfigError
from mobula.method import Method
from mobula.sampling.actions import action_map, to_space

EVALUATION_SEED = 1_000_000
"""Environment seeds of evaluations are this plus 1000 a run, the same for all methods."""


def columns_for_learning(dataset: Dataset, gamma: float, scale: tuple[float, float]) -> dict[str, Any]:
    """The columns that learners need, and first rows and discounted (transformed) returns of episodes."""
    a, b = scale
    scaled = Dataset(
        {**dataset.columns, "reward": dataset["reward"].astype(np.float64) * a + b}, dataset.metadata
    )
    about = {"starts": dataset.starts(), "discounted": scaled.returns(gamma)}
    return {**{name: dataset[name] for name in LEARNED_FROM}, **about}


class Offline(Method):
    """Base of the offline algorithms: the data to the learners, blocks of steps, scores."""

    config: OfflineConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.dataset = self.select(load_data(self.config.data, self.config.streaming))
        self.taken = 0
        self._copy: Any = None
        scale = transforms.reward_scale(self.dataset, self.config.reward_transform)
        columns = columns_for_learning(self.dataset, self.config.gamma, scale)
        statistics = None
        if self.config.normalize_observations and self.dataset["obs"].ndim > 1:
            statistics = transforms.obs_statistics(self.dataset)
        stream = self.config.data if self.config.streaming else None
        if stream is not None and not Path(stream).expanduser().exists():
            stream = str(datasets.cached(stream))
        if self.learner_group.is_local:
            self.learner_group._learner.set_data(columns, scale, statistics, stream)
            return
        # One copy in the object store of every node; learners read it where it lies.
        kept = {name: ray.put(value) for name, value in columns.items()}

        def give(learner: Any) -> None:
            learner.set_data({name: ray.get(ref) for name, ref in kept.items()}, scale, statistics, stream)

        for result in self.learner_group.foreach_learner(give):
            result.get()

    def select(self, dataset: Dataset) -> Dataset:
        """The part of the data that is learned from (all of it)."""
        return dataset

    def training_step(self) -> None:
        before = self.taken
        steps = min(self.config.block, max(self.config.steps - before, 1))
        self.learn({}, steps=steps)
        self.taken += steps
        self._copy = None
        self.metrics.log_value("gradient_steps", self.taken, window=1)
        self.metrics.log_value("progress", self.taken / self.config.steps, window=1)
        every = self.config.evaluate_every
        due = self.taken >= self.config.steps or (every and self.taken // every > before // every)
        if due and self.config.env is not None:
            returns = self.play()
            self.metrics.log_value("evaluation_return", float(returns.mean()), window=1)
            score = self.score(float(returns.mean()))
            if score is not None:
                self.metrics.log_value("score", score, window=1)

    def score(self, mean_return: float) -> float | None:
        """Normalised score, where the environment of the evaluation is that of the data's scale."""
        reference = self.dataset.metadata.get("reference")
        if reference is None or self.dataset.metadata.get("env") != self.config.env:
            return None
        return scores.normalised(mean_return, reference)

    def play(self, episodes: int | None = None) -> np.ndarray[Any, Any]:
        """Returns [S, episodes] of the deterministic policies of all seeds, one episode in each of S x episodes worlds."""
        return self.play_out(episodes)[0]

    def play_out(self, episodes: int | None = None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """What `play` gives and the lengths of the same episodes, in steps: two arrays [S, episodes].

        Raises ConfigError where the data name no environment.
        """
        if not isinstance(self.config.env, str):
            raise ConfigError(f"{self.dataset.name} names no environment to play in: set one with --env")
        return play(
            self.rl_module,
            self.config.env,
            self.config.env_config,
            episodes or self.config.evaluation_episodes,
            self.config.seed or 0,
        )

    @property
    def rl_module(self) -> Any:
        """The module as trained: the local learner's own, or a copy of that of remote ones."""
        if self.learner_group.is_local:
            return self.learner_group._learner.module[DEFAULT_MODULE_ID].unwrapped()
        if self._copy is None:
            spec = self.config.get_default_rl_module_spec()
            spec.observation_space, spec.action_space = (
                self.config.observation_space,
                self.config.action_space,
            )
            module = spec.build()
            state = self.learner_group.get_state(components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}")
            module.set_state(state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID])
            self._copy = module.eval()
        return self._copy

    def get_module(self, module_id: str = DEFAULT_MODULE_ID) -> Any:
        return self.rl_module

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().get_state(*args, **kwargs), "offline": {"taken": self.taken}}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "offline" in state:
            self.taken, self._copy = int(state["offline"]["taken"]), None


@torch.no_grad()
def play(
    module: OfflineModule, env: str, env_config: Mapping[str, Any], episodes: int, run: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Undiscounted returns, and lengths in steps to the end or the time limit, of the module's deterministic policies.

    Both [S, episodes]; the seeds meet the same first states.
    """
    S = int(module.about["seeds"])
    world = registry.make_env(env, S * episodes, **dict(env_config))
    scale = to_space(
        world.single_action_space,
        action_map(world.single_action_space, normalize=True, clip=True),
        world.device,
    )
    obs, _ = world.reset(seed=EVALUATION_SEED + 1000 * run)
    if world.state:
        first = {name: value[:episodes] for name, value in world.state.items()}
        world.state = {name: value.repeat(S, *[1] * (value.ndim - 1)) for name, value in first.items()}
        obs = world.observe(world.state)
    total = torch.zeros(S * episodes, dtype=torch.float64)
    length = torch.zeros(S * episodes, dtype=torch.int64)
    alive = torch.ones(S * episodes, dtype=torch.bool)
    while bool(alive.any()):
        action = module.best_action(module.features(obs).unflatten(0, (S, episodes))).flatten(0, 1)
        obs, reward, terminated, truncated, _ = world.step(
            scale(action.float() if not module.discrete else action)
        )
        total += reward.double() * alive
        length += alive
        alive &= ~(terminated | truncated)
    world.close()
    return total.view(S, episodes).numpy(), length.view(S, episodes).numpy()
