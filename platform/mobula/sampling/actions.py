"""From a module's output to an action: drawing from the distribution, mapping onto the action space.

Training, evaluation and exported policies all pass through here, so that they act alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchCategorical,
    TorchDiagGaussian,
    TorchDistribution,
)
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

ActionMap = Literal["unsquash", "clip", "none"]
"""How a drawn action reaches the action space: RLlib's `normalize_actions`, `clip_actions`, or neither."""


def draw(
    distribution: type[TorchDistribution], inputs: Tensor, *, explore: bool, generator: torch.Generator
) -> Tensor:
    """Actions [...] drawn from `distribution` with parameters `inputs` [..., K]; its mode if not `explore`.

    Categorical and diagonal Gaussian draws use `generator` alone; any other distribution draws from torch's global
    stream, which RLlib seeds.
    """
    if distribution is TorchCategorical:
        if not explore:
            return inputs.argmax(-1)
        # The exponential race: argmax of p / Exp(1) has law p.  In logs, no softmax is needed.
        race = torch.empty_like(inputs).exponential_(generator=generator).log_()
        return (inputs - race).argmax(-1)
    if distribution is TorchDiagGaussian:
        mean, log_std = inputs.chunk(2, dim=-1)
        if not explore:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return torch.addcmul(mean, log_std.exp(), noise)
    dist: Any = distribution.from_logits(inputs)
    return dist.sample() if explore else dist.to_deterministic().sample()  # type: ignore[no-any-return]


def log_probability(distribution: type[TorchDistribution], inputs: Tensor, actions: Tensor) -> Tensor:
    """log p(actions) under `distribution` with parameters `inputs` [..., K]; shape [...]."""
    if distribution is TorchCategorical:
        logits = inputs.log_softmax(-1)
        return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return distribution.from_logits(inputs).logp(actions)  # type: ignore[no-any-return]


def act(
    module: TorchRLModule, batch: dict[str, Any], *, explore: bool, generator: torch.Generator
) -> dict[str, Any]:
    """One forward pass and a draw.  The module must be in eval mode (`module.eval()`).

    batch: obs [B, ...] and, for recurrent modules, state_in.  Returns the module's outputs with `actions` added.
    """
    # The underscored methods are the ones that modules override; the public ones switch the train flag back and
    # forth through all sub-modules at each call.
    out = module._forward_exploration(batch) if explore else module._forward_inference(batch)
    if Columns.ACTIONS not in out:
        cls = module.get_exploration_action_dist_cls() if explore else module.get_inference_action_dist_cls()
        out[Columns.ACTIONS] = draw(
            cls, out[Columns.ACTION_DIST_INPUTS], explore=explore, generator=generator
        )
    return out


def action_map(space: gymnasium.Space[Any], *, normalize: bool, clip: bool) -> ActionMap:
    """What RLlib's two settings mean for `space`: only bounded boxes are unsquashed or clipped."""
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        return "none"
    if normalize and space.is_bounded():
        return "unsquash"
    return "clip" if clip or normalize else "none"


def to_space(
    space: gymnasium.Space[Any], how: ActionMap, device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """The function that maps drawn actions [..., D] onto `space` (RLlib's NormalizeAndClipActions)."""
    if isinstance(space, spaces.Discrete) and int(space.start) != 0:
        start = int(space.start)
        return lambda actions: actions + start
    if how == "none" or not isinstance(space, spaces.Box):
        return lambda actions: actions
    low = torch.as_tensor(space.low, device=device)
    high = torch.as_tensor(space.high, device=device)
    if how == "clip":
        return lambda actions: actions.clamp(low, high)
    half, middle = (high - low) / 2, (high + low) / 2
    return lambda actions: middle + half * actions.clamp(-1.0, 1.0)


def from_space(space: gymnasium.Space[Any], how: ActionMap) -> Callable[[Tensor], Tensor]:
    """The inverse of `to_space`: actions [..., D] of `space` as a policy would have drawn them."""
    if isinstance(space, spaces.Discrete) and int(space.start) != 0:
        start = int(space.start)
        return lambda actions: actions - start
    if how != "unsquash" or not isinstance(space, spaces.Box):
        return lambda actions: actions
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    return lambda actions: (2 * actions - low - high) / (high - low)


def random_actions(
    space: gymnasium.Space[Any],
    how: ActionMap,
    shape: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str,
) -> Tensor:
    """Drawn actions with leading `shape` that `to_space` makes uniform on `space`; N(0, 1) where it has no bounds."""
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), shape, generator=generator, device=device)
    if isinstance(space, spaces.MultiDiscrete):
        counts = torch.as_tensor(np.asarray(space.nvec), device=device)
        return (torch.rand((*shape, *counts.shape), generator=generator, device=device) * counts).long()
    if isinstance(space, spaces.MultiBinary):
        return torch.randint(2, (*shape, *space.shape), generator=generator, device=device)
    if isinstance(space, spaces.Box):
        full = (*shape, *space.shape)
        if not space.is_bounded():
            return torch.randn(full, generator=generator, device=device)
        uniform = torch.rand(full, generator=generator, device=device)
        if how == "unsquash":
            return 2 * uniform - 1
        low = torch.as_tensor(space.low, device=device)
        return low + (torch.as_tensor(space.high, device=device) - low) * uniform
    raise TypeError(f"no uniform draw for the action space {space}")
