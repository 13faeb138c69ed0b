"""Maps of live channels only: the numbers of the plain masked network, and full maps wherever anybody could tell."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import ops, trace_channels
from lightning_prune.gates.attach import GateHooks
from lightning_prune.skipping import DeadChannelSkipper
from tests.fit.toys import half_dead

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
X = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Stem, depthwise, a residual sum with a norm in a sequence, a pooling, two dense layers behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1)
        self.back = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Conv2d(12, 8, 3, padding=1))
        self.last, self.tail = nn.Conv2d(8, 10, 3, stride=2), nn.BatchNorm2d(10, affine=False)
        self.hidden, self.head = nn.Linear(10 * 4, 9), nn.Linear(9, 4)
        self.widths: list[int] = []
        self.save = False

    def block(self, x: Tensor) -> Tensor:
        y = self.mix(F.silu(self.depth(x)))
        self.widths.append(y.shape[1])
        return x + self.back(y)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = checkpoint(self.block, x, use_reentrant=False) if self.save else self.block(x)
        x = F.adaptive_max_pool2d(F.sigmoid(self.tail(self.last(x))), 2).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class SavesStem(Net):
    """The first part, from the images on, is computed again in the backward pass."""

    def first(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.widths.append(x.shape[1])
        return F.relu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(checkpoint(self.first, x, use_reentrant=False))
        x = F.adaptive_max_pool2d(F.sigmoid(self.tail(self.last(x))), 2).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class Outer(nn.Module):
    """Calls the network by way of a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def masked(model: nn.Module) -> tuple[nn.Module, DeadChannelSkipper, np.ndarray]:
    """Half of the channels dead; the plain twin is a deep copy."""
    model = model.double()
    graph, mask = half_dead(model, X[:1])
    skipper = DeadChannelSkipper(model, graph, X[:1])
    skipper.set_mask(mask)
    return model, skipper, mask


def live_mix(model: nn.Module, mask: np.ndarray) -> int:
    """Live outputs of ``mix``."""
    return int(mask[trace_channels(copy.deepcopy(model), X[:1])["mix"].ids].sum())


def step(model: nn.Module, x: Tensor = X, call: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = (call or model)(x)
    out.square().sum().backward()
    return out.detach(), {**{n: p.grad for n, p in model.named_parameters()}, "x": x.grad}


def assert_same(found: Any, expected: Any, model: nn.Module) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    weights = dict(model.named_parameters())
    for name, grad in expected[1].items():
        live = weights[name] != 0 if name in weights else torch.ones_like(grad, dtype=torch.bool)
        torch.testing.assert_close(found[1][name][live], grad[live], rtol=1e-9, atol=1e-10)
        assert found[1][name].shape == grad.shape


@pytest.mark.parametrize("least", [0, 10**9])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_numbers_are_those_of_the_plain_network(
    memory_format: torch.memory_format, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prune.skipping.LEAST_MACS", least)  # else: by torch, of slices
    model, skipper, mask = masked(Net())
    assert skipper.obstacle is None
    twin = copy.deepcopy(model)
    x = X.contiguous(memory_format=memory_format)
    model.widths.clear()
    for _ in range(2):
        assert_same(step(model, x), step(twin, x), model)
    live = live_mix(twin, mask)
    assert model.widths == [live, live]
    assert live < 12
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-10, atol=1e-12)
    for net in (model, twin):
        net.norm.eval()  # a frozen norm in a network that trains
    assert_same(step(model, x), step(twin, x), model)
    assert model.widths[-1] == live
    for net in (model, twin):
        net.eval()
    assert_same(step(model, x), step(twin, x), model)
    assert model.widths[-1] == 12  # evaluation is the user's


def test_second_derivatives_and_checkpoints() -> None:
    model, _, _ = masked(Net())
    twin = copy.deepcopy(model)
    found = []
    for net in (model, twin):
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append((grad.detach(), {"x": x.grad, "back.2.weight": net.back[2].weight.grad}))
    assert_same(found[0], found[1], model)
    for inside, reentrant in ((True, False), (False, False), (False, True)):
        model.save = inside
        call = None if inside else lambda x, r=reentrant: checkpoint(model, x, use_reentrant=r)
        model.widths.clear()
        twin.load_state_dict(model.state_dict())
        assert_same(step(model, X, call), step(twin), model)
        assert len(model.widths) == 2  # computed twice
        assert len(set(model.widths)) == 1
        assert model.widths[0] < 12


@pytest.mark.parametrize("least", [0, 10**9])
def test_checkpoints_from_the_images_on_are_computed_again_alike(
    least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input has no dead channels, so that nothing but the call that it was part of says what is to come out."""
    monkeypatch.setattr("lightning_prune.skipping.LEAST_MACS", least)
    model, _, _ = masked(SavesStem())
    twin = copy.deepcopy(model)
    for _ in range(2):
        model.widths.clear()
        assert_same(step(model), step(twin), model)
        assert len(model.widths) == 3  # the stem twice
        assert model.widths[0] == model.widths[2] < 8
    model(X)
    model.widths.clear()
    model.first(X).square().sum().backward()  # no part of a backward pass
    assert model.widths == [8]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("first", ["gates", "skipper"])
def test_gates_multiply_what_is_left(first: str, per_sample: bool) -> None:
    model = Net().double()
    graph, mask = half_dead(model, X[:1])
    twin = copy.deepcopy(model)
    found = []
    for net in (model, twin):
        values = torch.rand(
            graph.num_channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        values = (values * torch.from_numpy(mask)).requires_grad_()
        hooks = GateHooks(net, graph, lambda training, v=values: v)
        samples = (lambda n, v=values: v.expand(n, -1)) if per_sample else None
        if first == "gates":
            hooks.attach(per_sample=samples)
        if net is model:
            skipper = DeadChannelSkipper(net, graph, X[:1])
            skipper.set_mask(mask)
        if first == "skipper":
            hooks.attach(per_sample=samples)
        result = step(net)
        found.append((result[0], {**result[1], "gates": values.grad * torch.from_numpy(mask)}))
    assert model.widths[-1] < 12
    assert_same(found[0], found[1], model)


def test_the_whole_network_may_be_a_module_inside() -> None:
    model, skipper, _ = masked(Outer())
    twin = copy.deepcopy(model)
    assert_same(step(model, X, model.net), step(twin, X, twin.net), model)
    assert model.net.widths[-1] < 12
    assert_same(step(model), step(twin), model)
    assert model.net.widths[-1] < 12
    assert skipper.obstacle is None


def test_full_maps_where_somebody_would_see() -> None:
    model, skipper, mask = masked(Net())
    twin = copy.deepcopy(model)
    seen: list[int] = []
    handle = model.mix.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    assert_same(step(model), step(twin), model)
    assert seen == [12]
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        model(X)
    assert model.widths[-1] == 12
    torch.use_deterministic_algorithms(True)
    try:
        model(X)
    finally:
        torch.use_deterministic_algorithms(False)
    assert model.widths[-1] == 12
    model.block(torch.randn(2, 8, 5, 5, dtype=torch.float64))  # a call of a part of the network
    assert model.widths[-1] == 12
    model(X)
    assert model.widths[-1] < 12
    skipper.set_mask(np.ones_like(mask))
    model(X)
    assert model.widths[-1] == 12


def test_copies_are_plain_and_nothing_is_left_behind() -> None:
    model, skipper, _ = masked(Net())
    expected = step(copy.deepcopy(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(twin), expected, model)
        assert twin.widths[-1] == 12
    skipper.detach()
    assert_same(step(model), expected, model)
    assert model.widths[-1] == 12
    ours = {"_compiled_call_impl", "_takes_gates", "_live_inputs", "_in_gate", "_conv_forward"}
    for module in model.modules():
        assert not ours & set(module.__dict__)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class Reads(Net):
    """Reads a norm's parameter outside the norm."""

    def block(self, x: Tensor) -> Tensor:
        return super().block(x * self.norm.weight[:, None, None])


class Spelled(Net):
    """Spells a size out."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.block(x.view(-1, 8, 144).view(-1, 8, 12, 12))
        x = F.adaptive_max_pool2d(self.last(x), 2).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class Prelu(Net):
    """A parameter of a module that is none of the three."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.PReLU(12)

    def block(self, x: Tensor) -> Tensor:
        y = self.slope(self.mix(self.depth(x)))
        self.widths.append(y.shape[1])
        return x + self.back(y)


@pytest.mark.parametrize(
    ("kind", "obstacle"),
    [(Reads, "computes something else"), (Spelled, "spells out sizes"), (Prelu, "belongs to a PReLU")],
)
def test_networks_that_need_more_keep_full_maps(kind: type[Net], obstacle: str) -> None:
    model, skipper, _ = masked(kind())
    assert obstacle in str(skipper.obstacle)
    twin = copy.deepcopy(model)
    model.widths.clear()
    assert_same(step(model), step(twin), model)
    assert set(model.widths) == {12}
