"""What a `TensorEnvRunner` returns: named tensors [T, B, ...] that travel between processes as NumPy buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from torch import Tensor


class Rollout(dict[str, Tensor]):
    """T steps of B environments (of A agents each, where there is an agent axis).

    Columns (RLlib's names, `ray.rllib.core.columns.Columns`):

    obs, actions         [T, B, (A,) ...]   actions as the policy drew them, before they are mapped to the action space
    rewards              [T, B, (A)]
    terminateds          [T, B] bool        the state that was reached ends the episode: no bootstrap
    truncateds           [T, B] bool        a time limit cut the episode: bootstrap from `new_obs`
    new_obs              [T, B, (A,) ...]   the true next observation, also where an episode ended
    action_dist_inputs, action_logp         where the module has an action distribution
    state_in             [T, B, ...]        recurrent modules: the state before the step (flattened: "state_in/h")
    loss_mask            [T, B] bool        only where some rows are no transitions (next-step autoreset, or steps past the
                                            last episode asked for)
    """

    @property
    def num_steps(self) -> int:
        """T."""
        return int(self[Columns.REWARDS].shape[0])

    @property
    def num_envs(self) -> int:
        """B."""
        return int(self[Columns.REWARDS].shape[1])

    def env_steps(self) -> int:
        """Transitions held (RLlib's name)."""
        if Columns.LOSS_MASK in self:
            return int(self[Columns.LOSS_MASK].sum())
        return self.num_steps * self.num_envs

    def agent_steps(self) -> int:
        """Transitions times agents (RLlib's name)."""
        rewards = self[Columns.REWARDS]
        return self.env_steps() * (int(rewards.shape[2]) if rewards.ndim > 2 else 1)

    def done(self) -> Tensor:
        """[T, B] bool: an episode ended here, for whichever reason."""
        return self[Columns.TERMINATEDS] | self[Columns.TRUNCATEDS]

    def flatten(self) -> dict[str, Tensor]:
        """All transitions in one leading axis [N, ...] (time-major), without the rows that `loss_mask` leaves out."""
        flat = {name: value.flatten(0, 1) for name, value in self.items()}
        mask = flat.pop(Columns.LOSS_MASK, None)
        return flat if mask is None else {name: value[mask] for name, value in flat.items()}

    def to(self, device: torch.device | str) -> Rollout:
        """The same on another device."""
        return Rollout({name: value.to(device) for name, value in self.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_numpy, ({name: value.cpu().numpy() for name, value in self.items()},)


def _from_numpy(arrays: Mapping[str, Any]) -> Rollout:
    # Buffers from the object store are read-only; torch wants to own what it writes to.
    return Rollout({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Joins rollouts of equal length T along the environment axis."""
    if len(rollouts) == 1:
        return rollouts[0]
    columns: Iterable[str] = rollouts[0].keys()
    return Rollout({name: torch.cat([rollout[name] for rollout in rollouts], dim=1) for name in columns})
