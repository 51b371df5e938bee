"""Learners of offline methods: they draw rows of their own, and take a block of gradient steps an iteration."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from torch import Tensor

from mobula.envs import datasets
from mobula.envs.datasets.dataset import LEARNED_FROM
from mobula.errors import TrainingFault
from mobula.learning.batched import Adam
from mobula.learning.learners import Learner

Rows = Mapping[str, Tensor]
"""obs, action, reward, next_obs, terminated of a batch: [S, B, ...]."""

GATHERED_AT_ONCE = 50
"""Steps whose rows are gathered in one go."""


class OfflineLearner(Learner):
    """Draws rows of the data and takes gradient steps on them; a method gives `step` and `optimizers`."""

    def build(self) -> None:
        super().build()
        first = self.rl_module.about["first_seed"]
        self.streams = [np.random.default_rng([first + s, 71]) for s in range(self.rl_module.about["seeds"])]
        self.taken = 0
        self.columns: dict[str, np.ndarray[Any, Any]] = {}
        self._batches: Iterator[Any] | None = None

    # Data ------------------------------------------------------------------------------------------------

    def set_data(
        self,
        columns: Mapping[str, Any],
        scale: tuple[float, float],
        statistics: Any,
        stream: str | None = None,
    ) -> None:
        """columns: arrays (views of the object store); scale: (a, b) of r <- a r + b; statistics: (mean, scale) of observations
        or None.  stream: a Parquet folder that rows are read from instead, `columns` being a sample for diagnostics."""
        self.columns = dict(columns)
        self.reward_scale = scale
        if statistics is not None:
            for name, value in zip(("obs_mean", "obs_scale"), statistics, strict=True):
                buffer = getattr(self.rl_module, name)
                buffer.copy_(torch.as_tensor(np.asarray(value), dtype=buffer.dtype))
        if stream is not None:
            rows = len(self.streams) * int(self.config.batch) * GATHERED_AT_ONCE
            seed = int(self.config.seed or 0) + 7919 * self._learner_index
            self._batches = datasets.stream(stream, rows, seed=seed)

    def rows_of(self, columns: Mapping[str, Any], index: Any = None) -> dict[str, Tensor]:
        """Tensors of the rows at `index`, rewards transformed, floats in the precision of the networks."""
        dtype = self.rl_module.obs_mean.dtype
        found = {}
        for name in LEARNED_FROM:
            array = np.asarray(columns[name])
            picked = array if index is None else array.take(index, axis=0)
            if not picked.flags.writeable:
                picked = picked.copy()
            tensor = torch.from_numpy(picked)
            found[name] = (
                tensor if name != "terminated" and not tensor.is_floating_point() else tensor.to(dtype)
            )
        a, b = self.reward_scale
        found["reward"] = found["reward"] * a + b
        if self.device is not None and self.device.type != "cpu":
            found = {name: value.to(self.device) for name, value in found.items()}
        return found

    def draw(self, steps: int) -> Iterator[dict[str, Tensor]]:
        """`steps` batches [S, B, ...]."""
        learners, batch = max(1, self.config.num_learners), self.config.batch
        while steps:
            count = min(steps, GATHERED_AT_ONCE)
            if self._batches is None:
                # All learners draw the indices of all; each keeps its own columns of them.
                total, n = batch * learners, len(self.columns["reward"])
                index = np.stack([rng.integers(n, size=(count, total)) for rng in self.streams], axis=1)
                own = index[..., self._learner_index * batch : (self._learner_index + 1) * batch]
                rows = self.rows_of(self.columns, own)
            else:
                flat = self.rows_of(next(self._batches))
                shape = (GATHERED_AT_ONCE, len(self.streams), batch)
                rows = {name: value.unflatten(0, shape)[:count] for name, value in flat.items()}
            for i in range(count):
                yield {name: value[i] for name, value in rows.items()}
            steps -= count

    # Steps -----------------------------------------------------------------------------------------------

    def step(self, rows: Rows) -> dict[str, Tensor]:
        """One gradient step on a batch; returns what is reported of it ([S] or scalars)."""
        raise NotImplementedError

    def descend(self, loss: Tensor, *optimizers: Adam) -> None:
        """A step of `optimizers` along the gradient of `loss`, averaged over all learners."""
        for optimizer in optimizers:
            optimizer.clear()
        loss.backward()
        if self.config.num_learners > 1:
            grads = [
                p.grad for o in optimizers for g in o.param_groups for p in g["params"] if p.grad is not None
            ]
            flat = self.all_reduce(torch.cat([grad.flatten() for grad in grads]))
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        for optimizer in optimizers:
            optimizer.advance()

    def learn(self, batch: Any, *, steps: int = 1) -> None:
        """A block of steps; reports their rate, the last losses and the diagnostics."""
        start = time.perf_counter()
        last: dict[str, Tensor] = {}
        for rows in self.draw(steps):
            last = self.step(rows)
            self.taken += 1
        seconds = time.perf_counter() - start
        values = {name: value.detach().double().mean() for name, value in last.items()}
        for name, value in values.items():
            if not bool(value.isfinite()):
                raise TrainingFault(
                    f"{name} is not finite after {self.taken} gradient steps: lower lr, or look at reward_transform"
                )
        self.log({"gradient_steps_per_second": steps / seconds, **values, **self.diagnose()})

    @torch.no_grad()
    def diagnose(self, most: int = 1024) -> dict[str, float]:
        """Mean Q on data and at the policy's actions, and V at first states beside the discounted return of the data."""
        module = self.rl_module
        found: dict[str, float] = {}
        n = len(self.columns["reward"])
        S = module.about["seeds"]
        if module.critics is not None:
            rows = self.rows_of(self.columns, np.linspace(0, n - 1, min(n, most)).astype(int))
            features = module.features(rows["obs"]).expand(S, -1, -1)
            action = rows["action"].expand(S, *([-1] * rows["action"].ndim))
            found["q_data"] = float(module.q_values(features, action).amin(1).mean())
            found["q_policy"] = float(module.q_values(features, module.best_action(features)).amin(1).mean())
        if module.value is not None and "starts" in self.columns:
            starts = self.rows_of(self.columns, np.asarray(self.columns["starts"])[:most])
            features = module.features(starts["obs"]).expand(S, -1, -1)
            found["v_start"] = float(module.values(features).mean())
            found["return_start"] = float(np.mean(self.columns["discounted"][:most]))
        return found

    # State -----------------------------------------------------------------------------------------------

    def adam(self, name: str, params: Sequence[Tensor], lr: float) -> Adam:
        """Registers an Adam with RLlib under `name`."""
        optimizer = Adam(params, lr)
        self.register_optimizer(
            module_id=DEFAULT_MODULE_ID, optimizer_name=name, optimizer=optimizer, params=list(params)
        )
        return optimizer

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().get_state(*args, **kwargs)
        streams = [stream.bit_generator.state for stream in self.streams]
        own = {"taken": self.taken, "streams": streams, "generator": self.generator.get_state()}
        return {**state, "offline": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "offline" in state:
            own = state["offline"]
            self.taken = int(own["taken"])
            for stream, kept in zip(self.streams, own["streams"], strict=True):
                stream.bit_generator.state = kept
            self.generator.set_state(torch.as_tensor(own["generator"], dtype=torch.uint8))
