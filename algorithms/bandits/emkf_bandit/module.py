"""The learned model and payoffs as a policy for a new stream."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from mobula.algorithms.bandits.emkf_bandit.math import (
    arm_estimates,
    arm_features,
    hidden_size,
    naive_start,
    shared_thompson_probabilities,
    thompson_probabilities,
    widths,
)
from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace, mv
from mobula.errors import DataError
from mobula.learning.modules import TensorModule


class EMKFModule(TensorModule):
    """The first stream's model and payoffs as a policy for a new stream: a recurrent module whose state is its filter.

    Its action distribution is Thompson sampling's (greedy without exploration).  An observation is [y (m), inputs (k)]; y may be missing
    (NaN), an input is known.  Buffers: the StateSpace, B [G, q, q], f [G, q], scale (of Thompson sampling), offset [m],
    input_offset [k].
    """

    takes_missing = True
    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor
    D: Tensor
    B: Tensor
    f: Tensor
    maps: Tensor | None
    offset: Tensor
    input_offset: Tensor
    scale: Tensor

    def setup(self) -> None:
        config: dict[str, Any] = dict(self.model_config)
        self.inputs = int(config["inputs"])
        m, arms = int(self.observation_space.shape[0]) - self.inputs, int(self.action_space.n)
        d = hidden_size(config["d"])
        maps = config["arm_features"]
        # Part of the config, not of what is learned.
        self.register_buffer(
            "maps", None if maps is None else torch.tensor(maps, dtype=torch.float64), persistent=False
        )
        groups, q = (arms, d + bool(config["intercept"])) if maps is None else (1, len(maps[0]))
        learned = dict(
            zip(StateSpace._fields, (x[0] for x in naive_start(1, d, m, self.inputs)), strict=True)
        )
        learned |= {
            "B": (config["ridge"] * torch.eye(q).double()).repeat(groups, 1, 1),
            "f": torch.zeros(groups, q, dtype=torch.float64),
            "offset": torch.zeros(m, dtype=torch.float64),
            "input_offset": torch.zeros(self.inputs, dtype=torch.float64),
            "scale": torch.full((arms,), float(config["v"]), dtype=torch.float64),
        }
        for name, value in learned.items():
            self.register_buffer(name, value, persistent=value.numel() > 0)

    def get_initial_state(self) -> dict[str, Tensor]:
        d = self.A.shape[0]
        state = {
            "mean": torch.zeros(d, dtype=torch.float64),
            "cov": torch.zeros(d, d, dtype=torch.float64),
            "age": torch.zeros((), dtype=torch.float64),
        }
        return state | ({"input": torch.zeros_like(self.input_offset)} if self.inputs else {})

    def _step(self, obs: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after one filter step of observations [N, m + k] (age 0: the prior itself)."""
        n = len(obs)
        y, u = obs.double().split([len(self.offset), self.inputs], 1)
        if not bool(u.isfinite().all()):
            raise DataError(
                f"obs: its last {self.inputs} numbers are inputs, known in advance; only the ones before may be missing"
            )
        fresh = state["age"] == 0
        A, Q = self.A.expand(n, -1, -1), self.Q.expand(n, -1, -1)
        moved_mean = mv(A, state["mean"])
        if self.inputs:
            moved_mean = moved_mean + state["input"] @ self.D.mT
        mean = torch.where(fresh[:, None], self.m0, moved_mean)
        moved = kalman.symmetric(A @ state["cov"] @ A.mT + Q)
        cov = torch.where(fresh[:, None, None], self.P0, moved)
        C, R = self.C.expand(n, -1, -1), self.R.expand(n, -1, -1)
        mean, cov, _, _ = kalman.update(C, R, mean, cov, y - self.offset)
        state = {"mean": mean, "cov": cov, "age": state["age"] + 1}
        return state | ({"input": u - self.input_offset} if self.inputs else {})

    def _payoffs(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """`arm_estimates` at filtered states [N, d]."""
        x = torch.cat([mean.new_ones(len(mean), 1), mean], 1) if self.model_config["intercept"] else mean
        return arm_estimates(self.B, self.f, arm_features(x, self.maps, len(self.scale)))

    def _thompson(self, payoff: Tensor, white: Tensor) -> Tensor:
        """Probabilities [N, K] of the arms under Thompson sampling."""
        if self.maps is None:
            return thompson_probabilities(payoff, self.scale * widths(white).sqrt())
        return shared_thompson_probabilities(payoff, self.scale[:, None] * white)

    def _forward(self, batch: dict[str, Any], *, explore: bool = False, **kwargs: Any) -> dict[str, Any]:
        obs, state = batch[Columns.OBS], batch[Columns.STATE_IN]
        logits = []
        # Observations of a sequence come as [N, T, m]; acting has T = 1.
        for t in range(obs.shape[1]):
            state = self._step(obs[:, t], state)
            payoff, white = self._payoffs(state["mean"])
            if self.model_config["policy"] == "linucb":
                payoff = payoff + widths(white).sqrt()
            if explore and self.model_config["policy"] == "ts":
                p = self._thompson(payoff, white)
            else:
                p = torch.nn.functional.one_hot(payoff.argmax(-1), payoff.shape[-1]).double()
            logits.append(p.clamp_min(1e-30).log().float())
        return {Columns.ACTION_DIST_INPUTS: torch.stack(logits, 1), Columns.STATE_OUT: state}

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._forward(batch, explore=True)

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """x_hat, P_trace, p_best for the present observations, given the filter's `state_out` (or a fresh start)."""
        state = batch.get(Columns.STATE_OUT)
        if state is None:
            obs = batch[Columns.OBS]
            initial = {k: v.expand(len(obs), *v.shape) for k, v in self.get_initial_state().items()}
            state = self._step(obs, initial)
        return {
            "x_hat": state["mean"],
            "P_trace": state["cov"].diagonal(dim1=-2, dim2=-1).sum(-1),
            "p_best": self._thompson(*self._payoffs(state["mean"])),
        }
