"""Advantage estimation on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lambda_: float,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al., ICLR 2016, arXiv 1506.02438, eq. 16).

    rewards, values      [T, B, ...]
    next_values          [T, B, ...] value of the state that step t reached (before any reset)
    terminated, done     [T, B] bool: no bootstrap after a terminated step; no sum across a done one

    Returns advantages [T, B, ...].  delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lambda A_{t+1}.
    """
    shape = (*done.shape, *[1] * (rewards.ndim - done.ndim))
    alive = (~terminated).view(shape).to(rewards.dtype)
    carry = gamma * lambda_ * (~done).view(shape).to(rewards.dtype)
    delta = rewards + gamma * alive * next_values - values
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for t in range(delta.shape[0] - 1, -1, -1):
        running = torch.addcmul(delta[t], carry[t], running)
        advantages[t] = running
    return advantages
