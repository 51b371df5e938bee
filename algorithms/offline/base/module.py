"""Networks of offline methods: critics, value and actor of all seeds side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from torch import Tensor

from mobula.learning.batched import BatchedMLP, generators
from mobula.learning.modules import TensorModule


class OfflineModule(TensorModule):
    """Twin critics, value and actor of S seeds; observations as features, normalised where the config says so.

    model_config: hidden, seeds S, first_seed, precision, and of the method: critics (0 or 2), value (bool), value_layernorm,
    value_dropout, actor_dropout, actor ("gaussian": mean tanh, state-independent log-std; "deterministic": tanh; "squashed": 2 m
    outputs, which the method's module reads; categorical for discrete actions).  Acts as its first seed.
    """

    obs_mean: Tensor
    obs_scale: Tensor
    log_std: Tensor | None

    def setup(self) -> None:
        c: dict[str, Any] = {
            "critics": 0,
            "value": False,
            "value_layernorm": False,
            "value_dropout": 0.0,
            "actor_dropout": 0.0,
            "actor": "gaussian",
            **self.model_config,
        }
        self.about, S = c, c["seeds"]
        observation, action = self.observation_space, self.action_space
        self.discrete = isinstance(action, spaces.Discrete)
        self.tabular = isinstance(observation, spaces.Discrete)
        d = (
            int(observation.n)
            if isinstance(observation, spaces.Discrete)
            else int(np.prod(observation.shape))
        )
        m = int(action.n) if isinstance(action, spaces.Discrete) else int(np.prod(action.shape))
        streams = generators([c["first_seed"] + s for s in range(S)])
        hidden = list(c["hidden"])
        self.critics = self.value = None
        if c["critics"]:
            q_sizes = [d, *hidden, m] if self.discrete else [d + m, *hidden, 1]
            self.critics = BatchedMLP(c["critics"] * S, q_sizes, streams)
            self.target_critics = BatchedMLP(c["critics"] * S, q_sizes, generators([0]))
            self.target_critics.load_state_dict(self.critics.state_dict())
            self.target_critics.requires_grad_(False)
        if c["value"]:
            self.value = BatchedMLP(
                S, [d, *hidden, 1], streams, layer_norm=c["value_layernorm"], dropout=c["value_dropout"]
            )
        outputs = 2 * m if c["actor"] == "squashed" else m
        self.actor = BatchedMLP(S, [d, *hidden, outputs], streams, dropout=c["actor_dropout"])
        self.log_std = None
        if not self.discrete and c["actor"] == "gaussian":
            self.log_std = torch.nn.Parameter(torch.zeros(S, 1, m))
        self.register_buffer("obs_mean", torch.zeros(d))
        self.register_buffer("obs_scale", torch.ones(d))
        self.to(torch.float64 if c["precision"] == "float64" else torch.float32)

    # Parts of the mathematics ----------------------------------------------------------------------------

    def features(self, obs: Tensor) -> Tensor:
        """[..., d] of observations: one-hot for indices; flat and normalised for boxes."""
        if isinstance(self.observation_space, spaces.Discrete):
            hot = torch.nn.functional.one_hot(
                obs.long() - int(self.observation_space.start), len(self.obs_mean)
            )
            return hot.to(self.obs_mean.dtype)
        axes = len(self.observation_space.shape or ())
        flat = obs.flatten(-axes) if axes > 1 else obs
        return (flat.to(self.obs_mean.dtype) - self.obs_mean) / self.obs_scale

    def q_values(
        self, features: Tensor, action: Tensor, *, target: bool = False, member: int | None = None
    ) -> Tensor:
        """[S, E, B] values of all E critics: features [S, B, d], action [S, B, m] or indices [S, B].

        member: that seed's alone ([1, E, B], from features [1, B, d]).
        """
        assert self.critics is not None
        net, E = (self.target_critics if target else self.critics), self.about["critics"]
        x = features if self.discrete else torch.cat([features, action.to(features.dtype)], dim=-1)
        if member is not None:
            out = torch.cat([net(x, member=member * E + e) for e in range(E)])
        else:
            out = net(x.repeat_interleave(E, 0))
        out = out.unflatten(0, (-1, E))
        if self.discrete:
            return out.gather(-1, action.long()[:, None, :, None].expand(-1, E, -1, 1)).squeeze(-1)
        return out.squeeze(-1)

    def values(self, features: Tensor, *, member: int | None = None, dropout_from: Any = None) -> Tensor:
        """V [S, B]."""
        assert self.value is not None
        return self.value(features, member=member, dropout_from=dropout_from).squeeze(-1)

    def action_parameters(
        self, features: Tensor, *, member: int | None = None, dropout_from: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """(mean [S, B, m] and log-std [S, 1, m] (None where deterministic), or logits [S, B, n] and None)."""
        out = self.actor(features, member=member, dropout_from=dropout_from)
        if self.discrete:
            return out, None
        log_std = self.log_std
        if log_std is not None:
            log_std = (log_std if member is None else log_std[member : member + 1]).clamp(-5.0, 2.0)
        return out.tanh(), log_std

    def log_prob(self, features: Tensor, action: Tensor, dropout_from: Any = None) -> Tensor:
        """log pi(action | obs) [S, B], up to no constant."""
        out, log_std = self.action_parameters(features, dropout_from=dropout_from)
        if self.discrete:
            return out.log_softmax(-1).gather(-1, action.long().unsqueeze(-1)).squeeze(-1)
        assert log_std is not None
        z = (action - out) * (-log_std).exp()
        return -(0.5 * z.square() + log_std + 0.9189385332046727).sum(-1)

    def best_action(self, features: Tensor) -> Tensor:
        """The action of an evaluation [S, B, m], or its index [S, B]."""
        out, _ = self.action_parameters(features)
        return out.argmax(-1) if self.discrete else out.clamp(-1.0, 1.0)

    # RLlib's part: the first seed acts -------------------------------------------------------------------

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        out, log_std = self.action_parameters(self.features(batch[Columns.OBS]).unsqueeze(0), member=0)
        if self.discrete:
            return {Columns.ACTION_DIST_INPUTS: out[0].float()}
        if log_std is None:
            log_std = torch.full((1, 1, out.shape[-1]), -20.0, dtype=out.dtype)
        return {Columns.ACTION_DIST_INPUTS: torch.cat([out[0], log_std[0].expand_as(out[0])], dim=-1).float()}

    @property
    def scores_actions(self) -> bool:
        """Whether logged actions in a request are answered with their advantage and weight."""
        return self.critics is not None and self.value is not None

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """value [B]; with logged actions (in [-1, 1], or indices) also their advantage [B] and weight [B]."""
        if self.value is None:
            return {}
        features = self.features(batch[Columns.OBS]).unsqueeze(0)
        value = self.values(features, member=0)
        found = {"value": value[0].float()}
        if Columns.ACTIONS in batch:
            q = self.q_values(features, batch[Columns.ACTIONS].unsqueeze(0), member=0).amin(1)
            found |= {"advantage": (q - value)[0].float(), "weight": self.weight(q - value)[0].float()}
        return found

    def weight(self, advantage: Tensor) -> Tensor:
        """What the method multiplies log pi of a row with."""
        return torch.ones_like(advantage)
