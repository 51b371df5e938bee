"""Equilibria of finite mean-field games: fixed point, Boltzmann iteration, fictitious play, online mirror descent, proximal steps.

Each solver is a state and a step: `step(game, policy, ...)`; `solve` runs one and scores it by exploitability, which is apart from
the solvers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.graphon import FiniteMFG
from mobula.errors import ConfigError


class State(NamedTuple):
    """policy [..., M, H, S, A]; flow [..., M, H + 1, S] that it is judged against; extra: logits or other memory; t: step."""

    policy: Tensor
    flow: Tensor
    extra: Tensor
    t: int


Step = Callable[[FiniteMFG, State], State]


@dataclass
class Result:
    """policy, flow of the last state; exploitability [steps, ...] averaged over labels, of every `every`-th step."""

    state: State
    exploitability: Tensor
    steps: list[int] = field(default_factory=list)


def initial(game: FiniteMFG) -> State:
    """The uniform policy and its flow."""
    pi = graphon.uniform_policy(game)
    return State(pi, graphon.flow(game, pi), torch.zeros_like(pi), 0)


def solve(game: FiniteMFG, step: Step, iterations: int, *, lam: float, every: int = 10) -> Result:
    """Runs `iterations` steps from the uniform policy; lam: temperature of the exploitability that is recorded."""
    state, scores, steps = initial(game), [], []
    for t in range(iterations):
        state = step(game, state)
        if (t + 1) % every == 0 or t + 1 == iterations:
            scores.append(graphon.exploitability(game, state.policy, lam).mean(-1))
            steps.append(t + 1)
    return Result(state, torch.stack(scores), steps)


def fixed_point(lam: float, damping: float = 1.0) -> Step:
    """The best response to the flow, then its flow; with damping < 1 the flow moves a part of the way (may cycle at 1)."""

    def step(game: FiniteMFG, s: State) -> State:
        pi, _ = graphon.best_response(game, s.flow, lam)
        return State(pi, (1 - damping) * s.flow + damping * graphon.flow(game, pi), s.extra, s.t + 1)

    return step


def boltzmann(temperature: float, lam: float = 0.0) -> Step:
    """pi = softmax(Q / temperature) with Q of the present policy; converges for a large temperature."""

    def step(game: FiniteMFG, s: State) -> State:
        Q, _ = graphon.evaluate(game, s.policy, s.flow, lam)
        pi = (Q / temperature).softmax(-1)
        return State(pi, graphon.flow(game, pi), s.extra, s.t + 1)

    return step


def mirror_descent(rate: float, lam: float = 0.0) -> Step:
    """Online mirror descent (Perolat et al. 2021, arXiv 2103.00623): y <- y + rate Q, pi = softmax(y)."""

    def step(game: FiniteMFG, s: State) -> State:
        Q, _ = graphon.evaluate(game, s.policy, s.flow, lam)
        y = s.extra + rate * Q
        pi = y.softmax(-1)
        return State(pi, graphon.flow(game, pi), y, s.t + 1)

    return step


def fictitious_play(lam: float = 0.0) -> Step:
    """Best responses to the average flow; the policy that realises the average weighs every response by its own flow."""

    def step(game: FiniteMFG, s: State) -> State:
        pi, _ = graphon.best_response(game, s.flow, lam)
        mu = graphon.flow(game, pi)
        rate = 1.0 / (s.t + 1)
        old = s.flow[..., :-1, :].unsqueeze(-1) * (1 - rate)
        new = mu[..., :-1, :].unsqueeze(-1) * rate
        mixed = old * s.policy + new * pi
        mass = mixed.sum(-1, keepdim=True)
        policy = torch.where(mass > 0, mixed / mass.clamp_min(1e-300), 1.0 / game.actions)
        return State(policy, (1 - rate) * s.flow + rate * mu, s.extra, s.t + 1)

    return step


def proximal(Q: Tensor, pi: Tensor, eta: float, lam: float) -> Tensor:
    """argmax_p eta [<Q, p> - lam <p, log p>] - KL(p || pi), in closed form over the last axis (Zhang et al. 2024, arXiv 2310.17531).

    p ~ pi^{1 / (1 + lam eta)} exp(eta Q / (1 + lam eta)); its fixed point in pi is softmax(Q / lam).
    """
    if lam <= 0:
        raise ConfigError(
            f"the closed proximal step needs a temperature above 0, not {lam:g}: use a small one"
        )
    shrink = 1 / (1 + lam * eta)
    return (shrink * pi.clamp_min(1e-300).log() + shrink * eta * Q).softmax(-1)


def gmfg_ppo(lam: float, eta: float, alpha: float, beta: float) -> Step:
    """GMFG-PPO with an evaluation oracle (Zhang et al. 2024, arXiv 2310.17531): proximal step against the frozen flow, floor, damped flow.

    eta: step; alpha: damping of the flow; beta: share of the uniform policy (the floor of exploration).
    """

    def step(game: FiniteMFG, s: State) -> State:
        Q, _ = graphon.evaluate(game, s.policy, s.flow, lam)
        pi = (1 - beta) * proximal(Q, s.policy, eta, lam) + beta / game.actions
        return State(pi, (1 - alpha) * s.flow + alpha * graphon.flow(game, pi), s.extra, s.t + 1)

    return step
