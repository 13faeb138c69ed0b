"""A convolution and its norm in one call: the numbers of two, whoever watches, whatever changes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import conv_norms, fused_norms, ops, skipping, trace_channels
from lightning_prune.gates.attach import GateHooks
from lightning_prune.skipping import DeadChannelSkipper
from lightning_prune.weights import WeightKeeper

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU()
        self.blocks = nn.Sequential(Block(6, 6), Block(6, 9))
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.act(self.bn(self.stem(x)))).mean((2, 3)))


PAIRS = 6  # stem, two of each block, and a shortcut
X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compiled kernels win every comparison, at any size; the activations of the calls of pairs."""
    found: list[str] = []
    plain = conv_norms.together

    def together(pair: Any, norm: Any, activation: str, *tensors: Any) -> Tensor:
        found.append(activation)
        return plain(pair, norm, activation, *tensors)

    monkeypatch.setattr(fused_norms, "together", together)
    monkeypatch.setattr(fused_norms, "_measure", lambda *a: True)
    monkeypatch.setattr(fused_norms, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(skipping, "_measure", lambda *a: skipping.Choice(1, 1, 1))
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)
    return found


def gated(dead: float, compact: bool = True) -> tuple[Net, Net, DeadChannelSkipper, list[nn.Parameter]]:
    """A network with the skipper, its plain twin, and the gates of both."""
    torch.manual_seed(0)
    model = Net().double()
    graph = trace_channels(model, X[:1])
    mask = np.random.default_rng(1).random(graph.num_channels) >= dead
    for group in graph.groups:
        mask[group.start] = True
    keeper = WeightKeeper(model, graph)
    keeper.set_mask(mask)
    keeper.zero_dead()
    twin, gates = copy.deepcopy(model), []
    for net in (model, twin):
        gate = nn.Parameter(torch.linspace(0.5, 1.5, graph.num_channels, dtype=torch.float64))
        gates.append(gate)
        GateHooks(net, graph, lambda training, gate=gate: gate).attach()
    skipper = DeadChannelSkipper(model, graph, X[:1] if compact else None)
    skipper.set_mask(mask)
    return model, twin, skipper, gates


def next_step(model: nn.Module) -> None:
    for module in model.modules():
        if (mark := module.__dict__.get(conv_norms.PAIRED)) is not None:
            mark.value.next_step()


def same(model: Net, twin: Net, gates: list[nn.Parameter], x: Tensor = X, call: Any = None) -> None:
    found = []
    for net, gate in zip((model, twin), gates, strict=True):
        net.zero_grad()
        gate.grad = None
        own = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = (call(net) if call else net)(own)
        out.square().sum().backward()
        own_grads = [p.grad if p.grad is None else p.grad * (p != 0) for p in net.parameters()]
        found.append([out.detach(), own.grad, gate.grad * (gate.grad != 0), *own_grads, *net.buffers()])
    next_step(model)
    live = found[0][2] != 0  # of dead channels the masked network's gates have gradients
    found[1][2] = found[1][2] * live
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("dead", "compact"), [(0.0, False), (0.5, False), (0.5, True)])
def test_the_numbers_are_those_of_two_calls(dead: float, compact: bool, last: bool, pairs: list[str]) -> None:
    model, twin, skipper, gates = gated(dead, compact)
    memory_format = torch.channels_last if last else torch.contiguous_format
    model, twin = (net.to(memory_format=memory_format) for net in (model, twin))
    x = X.contiguous(memory_format=memory_format)
    same(model, twin, gates, x)
    assert not pairs  # nothing is known yet
    same(model, twin, gates, x)
    assert pairs == ["silu", *["relu"] * 3, "none", "relu"]
    same(model, twin, gates, x[:3])
    assert len(pairs) == PAIRS  # another batch size
    skipper.detach()
    same(model, twin, gates, x)
    assert len(pairs) == PAIRS


@pytest.mark.parametrize("compact", [False, True])
def test_after_a_death_no_call_computes_the_dead(
    compact: bool, pairs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin, skipper, gates = gated(0.3, compact)
    graph = skipper._graph
    plain, calls = fused_norms.together, []

    def together(pair: Any, norm: Any, *rest: Any) -> Tensor:
        y = plain(pair, norm, *rest)
        lists = pair.lists if not pair.narrow else (pair.call.live_in, pair.call.live_out)
        calls.append((norm, y.shape[1], lists[1]))
        return y

    monkeypatch.setattr(fused_norms, "together", together)
    for _ in range(2):
        same(model, twin, gates)
    assert len(calls) == PAIRS
    mask = np.random.default_rng(1).random(graph.num_channels) >= 0.3
    for group in graph.groups:
        mask[group.start + np.flatnonzero(mask[group.ids])[-1]] = False  # one more
        mask[group.start] = True
    for net in (model, twin):
        keeper = WeightKeeper(net, graph)
        keeper.set_mask(mask)
        keeper.zero_dead()
    skipper.set_mask(mask)
    calls.clear()
    same(model, twin, gates)
    assert not calls  # what is known is of more channels
    same(model, twin, gates)
    assert len(calls) == PAIRS
    for norm, width, live in calls:
        alive = int((norm.weight != 0).sum())
        assert len(live) == alive < norm.num_features
        assert width == (alive if compact else norm.num_features)


def test_large_weights_are_handed_over_as_their_live_part(
    pairs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_norms.conv_ways, "_SMALL", 0)
    model, twin, _, gates = gated(0.5)
    for _ in range(3):
        same(model, twin, gates)
    assert len(pairs) == 2 * PAIRS


def test_checkpoints_second_derivatives_and_accumulation(pairs: list[str]) -> None:
    model, twin, _, gates = gated(0.5)
    same(model, twin, gates)
    pairs.clear()
    for reentrant in (False, True):
        same(model, twin, gates, call=lambda net, r=reentrant: partial(checkpoint, net, use_reentrant=r))
    same(model, twin, gates, call=lambda net: lambda x: net(x) + net(2 * x))
    assert pairs
    found = []
    for net in (model, twin):
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append([grad.detach(), x.grad])
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("where", ["blocks.0.conv1", "blocks.0.bn1", "act", "backward", "frozen", "eval"])
def test_who_listens_or_changes_something_gets_two_calls(where: str, pairs: list[str]) -> None:
    model, twin, _, gates = gated(0.0)
    for _ in range(2):
        same(model, twin, gates)
    pairs.clear()
    seen: list[Tensor] = []
    for net in (model, twin):
        if where == "backward":
            net.blocks[0].conv1.register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
        elif where == "frozen":
            net.blocks[0].conv1.weight.requires_grad_(False)
        elif where == "eval":
            net.blocks[0].bn1.eval()
        else:
            net.get_submodule(where).register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    same(model, twin, gates)
    assert len(pairs) == PAIRS - 1
    half = len(seen) // 2
    torch.testing.assert_close(seen[:half], seen[half:])
    assert half == (where not in ("frozen", "eval"))


def test_statistics_that_are_exchanged_are_moved(pairs: list[str]) -> None:
    model, twin, _, gates = gated(0.5)
    same(model, twin, gates)
    for change in ("buffer", "momentum", "untracked"):
        for net in (model, twin):
            if change == "buffer":
                net.bn.running_mean = net.bn.running_mean.clone()
            elif change == "momentum":
                net.bn.momentum = None if net.bn.momentum == 0.1 else 0.1
            else:
                net.bn.track_running_stats = False
        for _ in range(2):
            same(model, twin, gates)


def test_sequences_take_their_convolutions_along(pairs: list[str]) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.BatchNorm2d(6),
        nn.MaxPool2d(2),
    ]
    model = nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(54, 4)).double()
    graph = trace_channels(model, X[:1])
    twin = copy.deepcopy(model)
    skipper = DeadChannelSkipper(model, graph)
    skipper.set_mask(np.ones(graph.num_channels, dtype=bool))

    def both() -> None:
        for net in (model, twin):
            net.zero_grad()
        outs = [net(X) for net in (model, twin)]
        torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
        for out in outs:
            out.square().sum().backward()
        for a, b in zip(
            (*model.parameters(), *model.buffers()), (*twin.parameters(), *twin.buffers()), strict=True
        ):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
        next_step(model)

    both()
    assert not pairs
    both()
    assert pairs == ["relu", "none"]
    for net in (model, twin):  # another child: as the sequence has it
        net[0][2] = nn.LeakyReLU(0.3)
    both()
    assert len(pairs) == 2
    seen: list[Tensor] = []
    for net in (model, twin):
        net[0][2] = nn.ReLU()
        net[0][0].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    both()
    torch.testing.assert_close(*seen)
    skipper.detach()
    both()


class Writes(nn.Module):
    """Something between the convolution and the end of its norm writes to the convolution's input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.side, self.head = nn.Hardtanh(-0.1, 0.1, inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        return self.head(F.relu(self.bn(self.conv(x)) + self.side(x)).mean((2, 3)))


def test_a_convolution_does_not_move_behind_who_writes_to_its_input(pairs: list[str]) -> None:
    torch.manual_seed(0)
    model = Writes().double()
    twin = copy.deepcopy(model)
    skipper = DeadChannelSkipper(model, trace_channels(model, X[:1]))
    skipper.set_mask(np.ones(trace_channels(twin, X[:1]).num_channels, dtype=bool))
    with torch.no_grad():  # under autograd writing to what is saved is refused
        for _ in range(3):
            torch.testing.assert_close(model(X), twin(X))
            skipper.next_step()
    assert pairs == ["relu"] * 2  # that of the stem
