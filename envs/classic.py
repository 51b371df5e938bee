"""gymnasium's classic control problems on tensors; trajectories equal gymnasium's own step for step."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mobula.sampling.tensor_env import State, TensorEnv


class _Drawn(TensorEnv):
    """Draws itself with the renderer of the gymnasium environment that it mirrors."""

    gymnasium_id: str
    _mirror: gymnasium.Env[Any, Any] | None = None

    def render(self) -> Any:
        if self._mirror is None:
            self._mirror = gymnasium.make(self.gymnasium_id, render_mode="rgb_array")
            self._mirror.reset(seed=0)
        self._mirror.unwrapped.state = self.state["state"][0].cpu().numpy()  # type: ignore[attr-defined]
        frame: Any = self._mirror.render()
        return np.asarray(frame)

    def close_extras(self, **kwargs: Any) -> None:
        if self._mirror is not None:
            self._mirror.close()


class CartPole(_Drawn):
    """Balance a pole on a cart: gymnasium's CartPole-v1 on tensors."""

    gymnasium_id = "CartPole-v1"
    max_episode_steps = 500
    reward_range = (0.0, 1.0)
    X_LIMIT, ANGLE_LIMIT = 2.4, 12 * 2 * math.pi / 360

    def __init__(self, num_envs: int = 1, *, gravity: float = 9.8, **kwargs: Any) -> None:
        high = np.array([self.X_LIMIT * 2, np.inf, self.ANGLE_LIMIT * 2, np.inf], dtype=np.float32)
        super().__init__(
            num_envs,
            observation_space=spaces.Box(-high, high, dtype=np.float32),
            action_space=spaces.Discrete(2),
            **kwargs,
        )
        self.gravity = gravity

    def initial(self, n: int) -> State:
        uniform = torch.rand(n, 4, generator=self.generator, dtype=torch.float64, device=self.device)
        return {"state": uniform * 0.1 - 0.05}

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        old = state["state"]
        angle, spin = old[:, 2], old[:, 3]
        cos, sin = angle.cos(), angle.sin()
        force = action * 20.0 - 10.0
        # Masses 1 (cart) and 0.1 (pole), half length 0.5: 0.05 is mass times half length, 1.1 the total mass.
        push = (force + 0.05 * spin.square() * sin) / 1.1
        spin_rate = (self.gravity * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos.square() / 1.1))
        speed_rate = push - 0.05 * spin_rate * cos / 1.1
        rates = torch.stack([old[:, 1], speed_rate, spin, spin_rate], dim=1)
        new = torch.add(old, rates, alpha=0.02)
        terminated = (new[:, 0].abs() > self.X_LIMIT) | (new[:, 2].abs() > self.ANGLE_LIMIT)
        return {"state": new}, torch.ones(len(old), device=self.device), terminated

    def observe(self, state: State) -> Tensor:
        return state["state"].float()


class Pendulum(_Drawn):
    """Swing a pendulum up and hold it: gymnasium's Pendulum-v1 on tensors."""

    gymnasium_id = "Pendulum-v1"
    max_episode_steps = 200
    reward_range = (-(math.pi**2 + 0.1 * 8**2 + 0.001 * 2**2), 0.0)

    def __init__(self, num_envs: int = 1, *, gravity: float = 10.0, **kwargs: Any) -> None:
        high = np.array([1.0, 1.0, 8.0], dtype=np.float32)
        super().__init__(
            num_envs,
            observation_space=spaces.Box(-high, high, dtype=np.float32),
            action_space=spaces.Box(-2.0, 2.0, (1,), dtype=np.float32),
            **kwargs,
        )
        self.gravity = gravity

    def initial(self, n: int) -> State:
        uniform = torch.rand(n, 2, generator=self.generator, dtype=torch.float64, device=self.device)
        high = torch.tensor([math.pi, 1.0], dtype=torch.float64, device=self.device)
        return {"state": (2 * uniform - 1) * high}

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        angle, speed = state["state"].unbind(1)
        # gymnasium multiplies the torque in the action's own single precision.
        torque = action[:, 0].clamp(-2.0, 2.0)
        upright = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = upright.square() + 0.1 * speed.square() + (0.001 * torque.square()).double()
        # Mass and length 1, time step 0.05.
        speed = (speed + (1.5 * self.gravity * angle.sin() + (3.0 * torque).double()) * 0.05).clamp(-8.0, 8.0)
        new = torch.stack([angle + speed * 0.05, speed], dim=1)
        return {"state": new}, -cost.float(), torch.zeros(len(cost), dtype=torch.bool, device=self.device)

    def observe(self, state: State) -> Tensor:
        angle, speed = state["state"].unbind(1)
        return torch.stack([angle.cos(), angle.sin(), speed], dim=1).float()

    def render(self) -> Any:
        if self._mirror is not None:
            self._mirror.unwrapped.last_u = None  # type: ignore[attr-defined]
        return super().render()


class Acrobot(_Drawn):
    """Swing the tip of a two-link pendulum above a line: gymnasium's Acrobot-v1 on tensors."""

    gymnasium_id = "Acrobot-v1"
    max_episode_steps = 500
    reward_range = (-1.0, 0.0)

    def __init__(self, num_envs: int = 1, *, gravity: float = 9.8, **kwargs: Any) -> None:
        high = np.array([1.0, 1.0, 1.0, 1.0, 4 * math.pi, 9 * math.pi], dtype=np.float32)
        super().__init__(
            num_envs,
            observation_space=spaces.Box(-high, high, dtype=np.float32),
            action_space=spaces.Discrete(3),
            **kwargs,
        )
        self.gravity = gravity
        self._speed_limits = torch.tensor([4 * math.pi, 9 * math.pi], dtype=torch.float64, device=self.device)

    def initial(self, n: int) -> State:
        uniform = torch.rand(n, 4, generator=self.generator, dtype=torch.float64, device=self.device)
        # gymnasium draws its start in single precision.
        return {"state": (uniform * 0.2 - 0.1).float().double()}

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        old, torque = state["state"], action.double() - 1.0
        k1 = self._rates(old, torque)
        k2 = self._rates(torch.add(old, k1, alpha=0.1), torque)
        k3 = self._rates(torch.add(old, k2, alpha=0.1), torque)
        k4 = self._rates(torch.add(old, k3, alpha=0.2), torque)
        new = old + (0.2 / 6.0) * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = torch.remainder(new[:, :2] + math.pi, 2 * math.pi) - math.pi
        speeds = torch.maximum(torch.minimum(new[:, 2:], self._speed_limits), -self._speed_limits)
        new = torch.cat([angles, speeds], dim=1)
        terminated = -new[:, 0].cos() - (new[:, 0] + new[:, 1]).cos() > 1.0
        return {"state": new}, terminated.float() - 1.0, terminated

    def _rates(self, state: Tensor, torque: Tensor) -> Tensor:
        """Time derivatives [B, 4] (Sutton and Barto's equations; masses, lengths, inertias 1, centres of mass at 0.5)."""
        a1, a2, v1, v2 = state.unbind(1)
        cos2, sin2 = a2.cos(), a2.sin()
        d1 = 0.25 + (1.25 + cos2) + 2.0
        d2 = 0.25 + 0.5 * cos2 + 1.0
        phi2 = 0.5 * self.gravity * (a1 + a2).sin()
        phi1 = -0.5 * v2 * sin2 * (v2 + 2 * v1) + 1.5 * self.gravity * a1.sin() + phi2
        r2 = (torque + d2 / d1 * phi1 - 0.5 * v1.square() * sin2 - phi2) / (1.25 - d2.square() / d1)
        return torch.stack([v1, v2, -(d2 * r2 + phi1) / d1, r2], dim=1)

    def observe(self, state: State) -> Tensor:
        s = state["state"]
        cos, sin = s[:, :2].cos(), s[:, :2].sin()
        return torch.cat([torch.stack([cos, sin], dim=2).flatten(1), s[:, 2:]], dim=1).float()
