"""Small networks side by side: seeds, ensemble members or agents as a leading dimension, one optimizer step for all.

A tiny network spends its time in the calls, not in the arithmetic: N of them in one `baddbmm` a layer cost little more than
one.  Every member is initialised from a generator of its own, so that it is the same alone and among others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One random stream a seed."""
    found = []
    for seed in seeds:
        generator = torch.Generator()
        generator.manual_seed(seed)
        found.append(generator)
    return found


class BatchedMLP(nn.Module):
    """`members` fully connected networks `sizes[0] -> ... -> sizes[-1]` with ReLU between, no activation at the end.

    weight[i] [N, in, out], bias[i] [N, 1, out].  Orthogonal weights (gain sqrt(2), the last layer `last_gain`), biases 0.
    Optionally LayerNorm before and dropout after each ReLU.

    streams: random streams of the initialisation; member n draws from streams[n * len(streams) // members], so that with S
    streams the members of seed s are the block s of N / S.
    """

    def __init__(
        self,
        members: int,
        sizes: Sequence[int],
        streams: Sequence[torch.Generator],
        *,
        layer_norm: bool = False,
        dropout: float = 0.0,
        last_gain: float = 2**0.5,
    ) -> None:
        super().__init__()
        if members % len(streams):
            raise ValueError(f"{members} members cannot be shared between {len(streams)} streams")
        self.members, self.sizes, self.dropout = members, tuple(sizes), dropout
        layers = len(sizes) - 1
        weights = [torch.empty(members, a, b) for a, b in pairwise(sizes)]
        for n in range(members):
            stream = streams[n * len(streams) // members]
            for i, weight in enumerate(weights):
                gain = last_gain if i == layers - 1 else 2**0.5
                # Orthogonal matrices are drawn as torch.nn.Linear holds them: [out, in].
                drawn = torch.empty(weight.shape[2], weight.shape[1])
                weight[n] = nn.init.orthogonal_(drawn, gain=gain, generator=stream).T
        self.weight = nn.ParameterList(weights)
        self.bias = nn.ParameterList(torch.zeros(members, 1, b) for b in sizes[1:])
        self.scale: nn.ParameterList | None = None
        self.shift: nn.ParameterList | None = None
        if layer_norm:
            self.scale = nn.ParameterList(torch.ones(members, 1, b) for b in sizes[1:-1])
            self.shift = nn.ParameterList(torch.zeros(members, 1, b) for b in sizes[1:-1])

    def forward(
        self, x: Tensor, *, member: int | None = None, dropout_from: torch.Generator | None = None
    ) -> Tensor:
        """x [N, B, in] (or [1, B, in] for all) -> [N, B, out].

        member: that one alone, [1, B, out].  dropout_from: the stream of the masks; without one nothing is dropped.
        """
        # Slicing costs a node of the graph a layer: only where it is asked for.
        pick = (lambda p: p) if member is None else (lambda p: p[member : member + 1])
        last = len(self.weight) - 1
        weight, bias = list(self.weight), list(self.bias)
        scale = (
            None
            if self.scale is None or self.shift is None
            else list(zip(self.scale, self.shift, strict=True))
        )
        if member is None and x.shape[0] == 1 and self.members > 1:
            x = x.expand(self.members, -1, -1)
        for i in range(last + 1):
            x = torch.baddbmm(pick(bias[i]), x, pick(weight[i]))
            if i == last:
                return x
            if scale is not None:
                x = torch.addcmul(pick(scale[i][1]), torch.layer_norm(x, x.shape[-1:]), pick(scale[i][0]))
            x = torch.relu(x)
            if self.dropout and dropout_from is not None:
                kept = torch.rand(x.shape, generator=dropout_from, dtype=x.dtype) >= self.dropout
                x = x * kept / (1 - self.dropout)
        return x


class Adam(torch.optim.Adam):
    """torch's fused Adam without what surrounds it: for tiny networks `step` alone costs more than the networks.

    `advance` in place of `step`: the same numbers and the same `state_dict`; no weight decay, no closures, no hooks, and every
    parameter must have a gradient.
    """

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, lr=lr, fused=True)
        self._plan: list[tuple[Any, ...]] | None = None

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._plan = None

    def clear(self) -> None:
        """Forgets the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _prepare(self) -> list[tuple[Any, ...]]:
        plan = []
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {
                        "step": torch.zeros((), dtype=torch.float32, device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            states = [self.state[p] for p in group["params"]]
            # All have taken the same number of steps: one counter, and one addition, for all.
            count = states[0]["step"]
            for state in states:
                state["step"] = count
            moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
            plan.append((group, list(group["params"]), *moments, count, [count] * len(states)))
        return plan

    @torch.no_grad()
    def advance(self) -> None:
        """One step along the gradients that the parameters hold."""
        if self._plan is None:
            self._plan = self._prepare()
        for group, params, first, second, count, counts in self._plan:
            count.add_(1)
            torch._fused_adam_(
                params,
                [p.grad for p in params],
                first,
                second,
                [],
                counts,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=0.0,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


@torch.no_grad()
def polyak(targets: Sequence[Tensor], sources: Sequence[Tensor], tau: float) -> None:
    """targets <- tau sources + (1 - tau) targets, in place."""
    torch._foreach_lerp_(list(targets), [source.detach() for source in sources], tau)


def cosine(step: int, total: int) -> float:
    """Cosine decay from 1 at step 0 to 0 at `total`, 0 after it."""
    return 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))
