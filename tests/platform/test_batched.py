"""Batched small networks against the same networks one by one; the lean Adam against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mobula.learning.batched import Adam, BatchedMLP, cosine, generators, polyak


def one_by_one(net: BatchedMLP, n: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    last = len(net.weight) - 1
    for i, weight in enumerate(net.weight):
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data, linear.bias.data = weight[n].T.clone(), net.bias[i][n, 0].clone()
        layers.append(linear)
        if i < last:
            if net.scale is not None and net.shift is not None:
                norm = nn.LayerNorm(weight.shape[2])
                norm.weight.data, norm.bias.data = net.scale[i][n, 0].clone(), net.shift[i][n, 0].clone()
                layers.append(norm)
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_members_are_ordinary_networks(layer_norm: bool) -> None:
    net = BatchedMLP(3, [4, 16, 8, 2], generators([0, 1, 2]), layer_norm=layer_norm)
    if net.scale is not None:
        for scale in net.scale:
            scale.data.uniform_(0.5, 1.5)
    x = torch.randn(3, 7, 4)
    out = net(x)
    for n in range(3):
        torch.testing.assert_close(out[n], one_by_one(net, n)(x[n]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(x[n : n + 1], member=n)[0], out[n], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(net(x[:1])[2], net(x[:1].expand(3, -1, -1))[2])


def test_initialisation_is_orthogonal_and_the_same_alone_and_among_others() -> None:
    streams = generators([5, 6])
    net = BatchedMLP(4, [6, 6, 6], streams)
    alone = BatchedMLP(2, [6, 6, 6], generators([6]))
    for mine, other in zip(net.weight, alone.weight, strict=True):
        torch.testing.assert_close(mine[2:], other)
        for weight in mine:
            torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(6), atol=1e-5, rtol=0)
    assert not torch.equal(net.weight[0][0], net.weight[0][1])
    with pytest.raises(ValueError, match="cannot be shared"):
        BatchedMLP(3, [2, 2], generators([0, 1]))


def test_dropout_drops_the_share_and_keeps_the_mean() -> None:
    net = BatchedMLP(1, [1, 20_000, 1], generators([0]), dropout=0.25)
    net.weight[0].data.fill_(1.0)
    net.weight[1].data.fill_(1 / 20_000)
    x = torch.ones(1, 1, 1)
    (stream,) = generators([3])
    assert float(net(x)) == pytest.approx(1.0, abs=1e-4)
    assert float(net(x, dropout_from=stream)) == pytest.approx(1.0, abs=0.02)
    assert float(net(x, dropout_from=stream)) != float(net(x, dropout_from=stream))


def test_adam_is_torch_s_adam_and_resumes() -> None:
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5)]
    mine, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    own, reference = Adam(mine, 1e-2), torch.optim.Adam(theirs, lr=1e-2)

    def steps(count: int, optimizer: Adam) -> None:
        for _ in range(count):
            optimizer.clear()
            sum((p.square() * 0.5 + p.sin()).sum() for p in mine).backward()  # type: ignore[union-attr]
            optimizer.advance()
            reference.zero_grad()
            sum((p.square() * 0.5 + p.sin()).sum() for p in theirs).backward()  # type: ignore[union-attr]
            reference.step()

    steps(5, own)
    again = Adam(mine, 1e-2)
    again.load_state_dict(own.state_dict())
    again.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 3e-3
    steps(5, again)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_polyak_and_cosine() -> None:
    target, source = torch.zeros(3), torch.ones(3)
    polyak([target], [source], 0.1)
    polyak([target], [source], 0.1)
    torch.testing.assert_close(target, torch.full((3,), 0.19))
    assert [cosine(k, 4) for k in (0, 2, 4, 9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
