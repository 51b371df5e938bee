"""Learners that stay on tensors: `TensorLearner` for gradient methods, `EstimatorLearner` for closed forms.

Both are RLlib `Learner`s: RLlib builds them (one local, or `num_learners` actors in a LearnerGroup), checkpoints and
restores them.  What they leave out is RLlib's per-minibatch conversion of episodes to NumPy and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from ray.rllib.core import COMPONENT_OPTIMIZER, DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from mobula.errors import TrainingFault

Batch = Mapping[str, Tensor]


class Learner(TorchLearner):
    """Base of all: one module, several learners in step, metrics.  A method whose update is no minibatch descent overrides
    `learn` whole, on this class.
    """

    def build(self) -> None:
        super().build()
        # Minibatches are drawn from a stream of the learner's own, the same on every run with the same seed.
        self.generator = torch.Generator()
        seed = torch.seed() if self.config.seed is None else int(self.config.seed)
        self.generator.manual_seed(seed + 7919 * self._learner_index)

    @property
    def rl_module(self) -> TorchRLModule:
        """The module that is trained."""
        return self.module[DEFAULT_MODULE_ID].unwrapped()  # type: ignore[no-any-return]

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().get_state(*args, **kwargs)
        if COMPONENT_OPTIMIZER in state:
            # The stream of minibatches belongs to the position in training, as the optimizers' moments do.
            state["generator"] = self.generator.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "generator" in state:
            self.generator.set_state(torch.as_tensor(state["generator"]))
        # An optimizer's state holds the step size of the run that wrote it; that of this config counts (population based
        # training goes on from another trial's checkpoint with a step size of its own).
        for optimizer, schedule in self._optimizer_lr_schedules.items():
            self._set_optimizer_lr(optimizer, lr=schedule.get_current_value())

    def _make_modules_ddp_if_necessary(self) -> None:
        # DDP averages gradients only where the loss goes through `forward`; these learners reduce explicitly, so a
        # loss may use any part of the module.
        pass

    def all_reduce(self, tensor: Tensor, *, mean: bool = True) -> Tensor:
        """Mean (or sum) of `tensor` over all learners; itself with a single learner.  Every learner must call it."""
        if self.config.num_learners > 1:
            torch.distributed.all_reduce(tensor)
            if mean:
                tensor = tensor / self.config.num_learners
        return tensor

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Reports the latest values under the learner's results."""
        self.metrics.log_dict(dict(values), key=DEFAULT_MODULE_ID, window=1)

    def update_from_tensors(
        self, batch: Batch, *, timesteps: dict[str, Any] | None = None, report: bool = True, **kwargs: Any
    ) -> Any:
        """One update from named tensors; `kwargs` go to `learn`.

        Returns reduced metrics (RLlib's `ResultDict`), or None if not `report`.
        """
        self._check_is_built()
        self.before_gradient_based_update(timesteps=timesteps or {})
        self._weights_seq_no += 1
        moved = batch if self.device is None or self.device.type == "cpu" else _to(batch, self.device)
        self.learn(moved, **kwargs)
        self.after_gradient_based_update(timesteps=timesteps or {})
        return self.metrics.reduce() if report else None

    def learn(self, batch: Batch, *args: Any, **kwargs: Any) -> None:
        """What a learner does with a batch."""
        raise NotImplementedError

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """RLlib's place for optimizers; none here."""

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> Any:
        """RLlib's place for the loss; learners that override `learn` whole have none."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")


class TensorLearner(Learner):
    """Minibatch gradient steps on tensors.

    A method overrides RLlib's `compute_loss_for_module(module_id, config, batch, fwd_out)` (or `loss`, which calls
    it), and `prepare` where a batch needs work before it is cut into minibatches (advantages, targets).  With several
    learners, gradients are averaged over all of them before they are clipped and applied.
    """

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """From what `Method.learn` was given to rows [N, ...] that minibatches are drawn from."""
        return dict(batch)

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of a minibatch."""
        out = self.rl_module.forward_train(batch)
        return self.compute_loss_for_module(  # type: ignore[no-any-return]
            module_id=DEFAULT_MODULE_ID, config=self.config, batch=batch, fwd_out=out
        )

    def learn(self, batch: Batch, *, num_epochs: int = 1, minibatch_size: int | None = None) -> None:
        """`num_epochs` passes in shuffled minibatches of `minibatch_size` rows (None: the whole batch at once)."""
        rows = self.prepare(batch)
        for minibatch in minibatches(rows, num_epochs, minibatch_size, self.generator):
            self.descend(self.loss(minibatch))

    def descend(self, loss: Tensor) -> None:
        """One step of every optimizer along the gradient of `loss`.  Raises TrainingFault if it is not finite."""
        gradients = self.compute_gradients({DEFAULT_MODULE_ID: loss})
        if self.config.num_learners > 1:
            present = [g for g in gradients.values() if g is not None]
            flat = self.all_reduce(torch.cat([g.flatten() for g in present]))
            for gradient, part in zip(present, flat.split([g.numel() for g in present]), strict=True):
                gradient.copy_(part.view_as(gradient))
        self.apply_gradients(self.postprocess_gradients(gradients))

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        params = self.get_parameters(self._module[module_id])
        if params:
            self.register_optimizer(
                module_id=module_id,
                optimizer=torch.optim.Adam(params, fused=True),
                params=params,
                lr_or_lr_schedule=config.lr,
            )

    def apply_gradients(self, gradients_dict: Any) -> None:
        # RLlib sets non-finite gradients to zero and goes on; a user must be able to trust the numbers instead.
        for name, gradient in gradients_dict.items():
            self._params[name].grad = gradient
        norm = torch.nn.utils.get_total_norm([g for g in gradients_dict.values() if g is not None])
        if not bool(norm.isfinite()):
            raise TrainingFault(
                f"the gradient is not finite in update {self._weights_seq_no}: lower the learning rate or set grad_clip,"
                " and look at the scale of rewards and observations"
            )
        for optimizer in self._named_optimizers.values():
            optimizer.step()


class EstimatorLearner(Learner):
    """A learner of closed forms: no optimizer; the module's buffers are its state.

    A method overrides `estimate`: a pure function from the state and a batch to the new state.  With several
    learners, sums over data that are shared between them go through `self.all_reduce(..., mean=False)`.
    """

    def estimate(self, state: dict[str, Tensor], batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(new values of the named buffers and parameters, metrics).  Names that are left out stay as they are."""
        raise NotImplementedError

    @torch.no_grad()
    def learn(self, batch: Batch) -> None:
        """One call of `estimate`; checks that what it returns is finite and fits the module's state."""
        state = dict(self.rl_module.state_dict())
        new, values = self.estimate({name: value.clone() for name, value in state.items()}, batch)
        for name, value in new.items():
            if name not in state or state[name].shape != value.shape:
                expected = tuple(state[name].shape) if name in state else "no such name"
                raise TrainingFault(
                    f"estimate() returned {name} {tuple(value.shape)}; the module has {expected}"
                )
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise TrainingFault(f"{name} is not finite after update {self._weights_seq_no}")
            state[name].copy_(value)
        self.log(values)


def minibatches(
    rows: Batch, num_epochs: int, size: int | None, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Shuffled minibatches of `size` rows, `num_epochs` times over; the last one of an epoch may be smaller."""
    total = len(next(iter(rows.values())))
    if size is None or size >= total:
        for _ in range(num_epochs):
            yield dict(rows)
        return
    for _ in range(num_epochs):
        order = torch.randperm(total, generator=generator)
        for start in range(0, total, size):
            index = order[start : start + size]
            yield {name: value[index] for name, value in rows.items()}


def _to(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
