"""CQL: the estimated integral against quadrature, the penalty by hand, a step written out, what the penalty does to Q."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mobula.algorithms.offline.baselines import cql
from mobula.algorithms.offline.baselines.cql import CQLConfig
from mobula.envs.datasets.sac import squash


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBULA_DATA", str(tmp_path_factory.getbasetemp() / "data"))


def make(**knobs: Any) -> Any:
    settings = {"data": "pendulum/scripted-mixed-0.5,size=2000", "steps": 40, "block": 20, "batch": 16}
    chosen = {**settings, "hidden": [16, 16], "evaluate_every": 0, **knobs}
    return CQLConfig().training(**chosen).debugging(seed=0, log_level="ERROR").build_algo()


def test_the_log_integral_is_unbiased_for_every_proposal() -> None:
    """exp of the estimate is the integral of exp Q over [-1, 1]^2, from uniform and from two tanh-Gaussian actions."""

    def value(a: Tensor) -> Tensor:
        return 1.5 * a[..., 0] - 2.0 * (a[..., 1] - 0.4).square() + a.prod(-1)

    n, g = 400_000, torch.Generator().manual_seed(0)
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 500 - 1
    grid = torch.cartesian_prod(middles, middles)
    wanted = float(value(grid).exp().mean().log()) + 2 * math.log(2.0)
    uniform = 2 * torch.rand(n, 2, generator=g, dtype=torch.float64) - 1
    actions, densities = [uniform], [torch.full((n,), -2 * math.log(2.0), dtype=torch.float64)]
    for mean, log_std in (((0.3, -0.2), -0.1), ((0.0, 0.5), 0.2)):
        noise = torch.randn(n, 2, generator=g, dtype=torch.float64)
        action, log_p = squash(torch.tensor(mean).double(), torch.full((2,), log_std).double(), noise)
        actions.append(action)
        densities.append(log_p)
    for action, log_p in zip(actions, densities, strict=True):
        assert float(cql.log_integral(value(action), log_p)) == pytest.approx(wanted, abs=0.01)
    together = cql.log_integral(value(torch.cat(actions)), torch.cat(densities))
    assert float(together) == pytest.approx(wanted, abs=0.01)


def test_the_penalty_by_hand() -> None:
    q = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]], dtype=torch.float64, requires_grad=True)
    log_density = torch.tensor([[[math.log(0.5), math.log(0.25)]]], dtype=torch.float64)
    q_data = torch.tensor([[[2.0], [5.0]]], dtype=torch.float64, requires_grad=True)
    first, second = 2 * math.e, 4 * math.e**3
    wanted = math.log((first + second) / 2) - 2 + math.log((2 + 4) / 2) - 5
    penalty = cql.conservative_penalty(q, log_density, q_data)
    assert penalty.tolist() == pytest.approx([wanted])
    penalty.sum().backward()
    # Down where exp Q / density is large, up on the data.
    assert q.grad is not None and q_data.grad is not None
    assert q.grad[0, 0, 0].tolist() == pytest.approx([first / (first + second), second / (first + second)])
    assert q_data.grad.flatten().tolist() == [-1.0, -1.0]


def test_the_density_of_logged_actions() -> None:
    mean, log_std = torch.tensor([0.3, -1.0]).double(), torch.tensor([-0.5, 0.4]).double()
    action = torch.tensor([[0.9, -0.2], [-0.99, 0.5]]).double()
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    torch.testing.assert_close(
        cql.squashed_log_prob(mean, log_std, action), squashed.log_prob(action).sum(-1)
    )


@pytest.mark.parametrize(("max_backup", "cloning"), [(False, 0.0), (True, 1.0)])
def test_one_step_is_written_out(ray_session: None, max_backup: bool, cloning: float) -> None:
    """A step against the same written with autograd and torch's Adam: order, targets, terminals, densities, polyak."""
    B, N, alpha, tau = 6, 3, 0.7, 0.1
    algorithm = make(
        precision="float64", num_actions=N, alpha=alpha, tau=tau, max_backup=max_backup, cloning=cloning
    )
    learner, module = algorithm.learner_group._learner, algorithm.rl_module
    # Target critics far from each other, so that the smaller of the two is not the same at every action.
    shifts = torch.Generator().manual_seed(1)
    for p in module.target_critics.weight:
        p.data = torch.randn(p.shape, generator=shifts, dtype=torch.float64)
    reference, (rng,) = copy.deepcopy(module), copy.deepcopy(learner.streams)
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    obs, following, reward = normal(B, 3), normal(B, 3), normal(B)
    action = 2 * torch.rand(B, 1, generator=g, dtype=torch.float64) - 1
    terminated = torch.tensor([1.0, 0, 0, 1, 0, 0]).double()
    rows = {"obs": obs, "next_obs": following, "action": action, "reward": reward, "terminated": terminated}
    report = learner.step({name: value.unsqueeze(0) for name, value in rows.items()})

    def q(net: Any, s: Tensor, a: Tensor) -> Tensor:
        pair = torch.cat([s, a], -1)
        return torch.stack([net(pair.unsqueeze(0), member=i)[0, :, 0] for i in range(2)])

    def policy(s: Tensor) -> Any:
        mean, log_std = reference.actor(s.unsqueeze(0))[0].chunk(2, -1)
        base = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        return (
            mean,
            log_std.clamp(-5, 2).exp(),
            torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform()),
        )

    def drawn(kind: str, count: int) -> Tensor:
        return torch.as_tensor(getattr(rng, kind)((B, count, 1), dtype=np.float32)).double()

    uniform = 2 * drawn("random", N) - 1
    tried = [(uniform[:, n], torch.tensor(0.5).double().log()) for n in range(N)]
    mean, std, density = policy(obs)
    noise = drawn("standard_normal", N)
    for n in range(N):
        a = (mean + std * noise[:, n]).tanh().detach()
        tried.append((a, density.log_prob(a).sum(-1).detach()))
    with torch.no_grad():
        centre, spread, _ = policy(following)
        noise = drawn("standard_normal", N if max_backup else 1)
        ahead = torch.stack(
            [
                q(reference.target_critics, following, (centre + spread * noise[:, n]).tanh())
                for n in range(noise.shape[1])
            ]
        )
        if max_backup:
            swapped = (1 - terminated) * (ahead.amin(1).amax(0) - ahead.amax(0).amin(0))
            assert float(swapped.abs().max()) > 0.01
        target = reward + 0.99 * (1 - terminated) * ahead.amin(1).amax(0)
    own = (mean + std * drawn("standard_normal", 1)[:, 0]).tanh()
    log_p = density.log_prob(own).sum(-1)
    heat = torch.optim.Adam([reference.log_temperature], lr=1e-4)
    (-reference.log_temperature * (log_p.detach() - 1)).mean().backward()
    heat.step()
    gain = density.log_prob(action).sum(-1) if cloning else q(reference.critics, obs, own).amin(0)
    actor = torch.optim.Adam(reference.actor.parameters(), lr=1e-4)
    actor_loss = (reference.log_temperature.exp().detach().squeeze() * log_p - gain).mean()
    actor_loss.backward()
    actor.step()
    critic = torch.optim.Adam(reference.critics.parameters(), lr=3e-4)
    critic.zero_grad()
    data = q(reference.critics, obs, action)
    ratios = [q(reference.critics, obs, a).exp() / d.exp() for a, d in tried]
    penalty = (torch.stack(ratios).mean(0).log() - data).mean(1).sum()
    critic_loss = ((data - target) ** 2).mean(1).sum()
    (critic_loss + alpha * penalty).backward()
    critic.step()
    # Adam's first step shows the signs of a gradient alone; the losses that are reported show the rest.
    wanted = {"actor_loss": actor_loss, "critic_loss": critic_loss, "penalty": penalty}
    for name, loss in wanted.items():
        torch.testing.assert_close(report[name], loss.detach()[None], msg=name)
    for slow, fast in zip(reference.target_critics.parameters(), reference.critics.parameters(), strict=True):
        slow.data = tau * fast.data + (1 - tau) * slow.data
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, atol=1e-9, rtol=0, msg=name)
    algorithm.stop()


def test_the_penalty_lowers_q_off_the_data(ray_session: None) -> None:
    """Mean Q on data minus that at uniform actions: larger with the penalty than without."""
    gap = {}
    for alpha in (0.0, 5.0):
        data = "pendulum/scripted,size=2000"
        algorithm = make(data=data, alpha=alpha, steps=300, block=300, lr=1e-3, num_actions=4)
        algorithm.train()
        module, rows = algorithm.rl_module, algorithm.dataset
        obs, logged = (torch.tensor(rows[name][::4]).unsqueeze(0) for name in ("obs", "action"))
        other = 2 * torch.rand(logged.shape, generator=torch.Generator().manual_seed(0)) - 1
        with torch.no_grad():
            features = module.features(obs)
            gap[alpha] = float((module.q_values(features, logged) - module.q_values(features, other)).mean())
        algorithm.stop()
    assert gap[5.0] > gap[0.0] + 0.1
