"""Network parts and the standard actor-critic module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from mobula.errors import ConfigError
from mobula.sampling.spaces import Indexed, expand

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def mlp(sizes: Sequence[int], activation: str = "tanh", *, last_gain: float = 1.0) -> nn.Sequential:
    """Fully connected layers `sizes[0] -> ... -> sizes[-1]`, orthogonal weights, no activation at the end."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, gain=last_gain if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class TensorModule(TorchRLModule):
    """An RLModule whose state keeps its precision: RLlib's own turns float64 into float32 on the way to a checkpoint, an env
    runner or a learner.  Every module of a method derives from it.
    """

    def get_state(
        self, components: Any = None, *, inference_only: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        state = super().get_state(components, inference_only=inference_only, **kwargs)
        exact = self.state_dict()
        return {name: exact[name].detach().cpu().numpy().copy() for name in state}

    def set_state(self, state: dict[str, Any]) -> None:
        own = self.state_dict()
        with torch.no_grad():
            for name, value in own.items():
                if name not in state:
                    raise KeyError(f"{type(self).__name__}: the state lacks {name}")
                value.copy_(torch.as_tensor(np.array(state[name])))


class Encoder(nn.Module):
    """Observations as flat float features: boxes flattened, discrete ones one-hot, indexed ones expanded; optionally normalised.

    The running mean and variance are buffers, so they are checkpointed, sent to env runners and exported with the
    weights; they change only in `update_statistics`.
    """

    table: Tensor | None
    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, space: gymnasium.Space[Any], *, normalize: bool = False, clip: float = 10.0) -> None:
        super().__init__()
        # No part of the state: it comes with the space, and what is learnt is what would be learnt without it.
        self.register_buffer("table", space.table if isinstance(space, Indexed) else None, persistent=False)
        if isinstance(space, Indexed):
            self.places, space = space.places, space.full
        self.space, self.normalize, self.clip = space, normalize, clip
        if isinstance(space, spaces.Box):
            self.size = int(np.prod(space.shape))
        elif isinstance(space, spaces.Discrete):
            self.size = int(space.n)
        else:
            raise ConfigError(
                f"the observation space {space} is neither a Box nor Discrete: flatten it with a gymnasium wrapper"
            )
        if normalize:
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))
            self.register_buffer("mean", torch.zeros(self.size, dtype=torch.float64))
            self.register_buffer("square", torch.ones(self.size, dtype=torch.float64))

    def features(self, obs: Tensor) -> Tensor:
        """[..., size] float32 before normalisation."""
        if self.table is not None:
            return expand(obs, self.table, self.places)
        if isinstance(self.space, spaces.Discrete):
            return nn.functional.one_hot(obs.long() - int(self.space.start), self.size).float()
        axes = len(self.space.shape or ())
        if axes == 0:
            return obs.unsqueeze(-1).float()
        return obs.flatten(-axes).float()

    def forward(self, obs: Tensor) -> Tensor:
        features = self.features(obs)
        if not self.normalize:
            return features
        scale = self.square.clamp_min(1e-8).rsqrt().float()
        return ((features - self.mean.float()) * scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update_statistics(self, count: Tensor, total: Tensor, squares: Tensor) -> None:
        """Merges `count` rows with sum `total` [size] and sum of squares `squares` [size] (float64; Chan et al. 1979)."""
        mean = total / count
        variance = (squares / count - mean**2).clamp_min(0.0)
        whole = self.count + count
        delta = mean - self.mean
        share = count / whole
        self.square.copy_(
            self.square * (1 - share) + variance * share + delta**2 * share * (1 - share)
            if self.count > 0
            else variance
        )
        self.mean.add_(delta * share)
        self.count.copy_(whole)


class ActorCritic(TensorModule, ValueFunctionAPI):
    """Separate policy and value networks; categorical or diagonal Gaussian with a state-independent log-std.

    model_config: hidden (layer sizes), activation, normalize_observations, initial_log_std.
    """

    def setup(self) -> None:
        config: dict[str, Any] = dict(self.model_config)
        hidden, activation = list(config["hidden"]), config["activation"]
        self.encoder = Encoder(self.observation_space, normalize=config["normalize_observations"])
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            outputs, self.log_std = int(space.n), None
        elif isinstance(space, spaces.Box) and len(space.shape) == 1:
            outputs = int(space.shape[0])
            self.log_std = nn.Parameter(torch.full((outputs,), float(config["initial_log_std"])))
        else:
            raise ConfigError(
                f"the action space {space} is neither Discrete nor a Box with one axis: this module cannot act in it"
            )
        self.pi = mlp([self.encoder.size, *hidden, outputs], activation, last_gain=0.01)
        self.vf = mlp([self.encoder.size, *hidden, 1], activation)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        out = self.pi(self.encoder(batch[Columns.OBS]))
        if self.log_std is not None:
            out = torch.cat([out, self.log_std.expand_as(out)], dim=-1)
        return {Columns.ACTION_DIST_INPUTS: out}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """V(obs), shape of the batch [...]."""
        values: Tensor = self.vf(self.encoder(batch[Columns.OBS])).squeeze(-1)
        return values
