"""What a fit does to a network is the same on every device: live maps, cuts, compiled networks, optimizers of every kind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_prune import ops, skipping, timing, trace_channels
from lightning_prune.reconfigure import Reconfigurer
from lightning_prune.skipping import DeadChannelSkipper, aligned_groups
from lightning_prune.weights import WeightKeeper
from tests.fit.reconfiguring import NETWORKS, Module, pruner
from tests.fit.toys import half_dead, loader, trainer


class Net(nn.Module):
    """A residual block of convolutions and norms, a depthwise convolution and a dense layer; remembers the widths of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.block = nn.Sequential(
            nn.Conv2d(24, 40, 1, bias=False), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 24, 1)
        )
        self.last, self.head = nn.BatchNorm2d(24), nn.Linear(24, 5)
        self.widths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.silu(self.last(x + self.block(self.depth(x))))
        self.widths.append(x.shape[1])
        return self.head(x.mean((2, 3)))


def step(model: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = model(x).float() if autocast else model(x)
    out.square().sum().backward()
    return [
        out.detach(),
        x.grad,
        *(p.grad for p in model.parameters()),
        *(b.double() for b in model.buffers()),
    ]  # type: ignore[list-item]


def networks(
    device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any, DeadChannelSkipper, np.ndarray, Tensor]:
    if not ops.extension_available():
        pytest.skip("no compiled extension")
    torch.manual_seed(2)
    model = Net().to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 3, 16, 16).to(device, dtype).contiguous(memory_format=torch.channels_last)
    graph, mask = half_dead(model, x[:1], seed=3, share=0.55)
    twin = copy.deepcopy(model)
    skipper = DeadChannelSkipper(model, graph, x[:1])
    skipper.set_mask(mask)
    assert skipper.obstacle is None
    return model, twin, skipper, mask, x


def live(model: Net, x: Tensor, mask: np.ndarray) -> int:
    return int(mask[trace_channels(copy.deepcopy(model), x[:1])["stem"].ids].sum())


@pytest.mark.parametrize("least", [0, 10**9])
def test_live_maps(device: torch.device, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "LEAST_MACS", least)  # else: by torch, of slices
    model, twin, _, mask, x = networks(device, torch.float64)
    alive = live(twin, x, mask)
    for _ in range(2):
        model.widths.clear()
        for found, expected in zip(step(model, x), step(twin, x), strict=True):
            dead = expected == 0 if found.dim() != 1 else torch.zeros_like(found, dtype=torch.bool)
            torch.testing.assert_close(found[~dead], expected[~dead], rtol=1e-9, atol=1e-9)
    assert model.widths == [alive if device.type == "cpu" else -(-alive // 8) * 8]
    assert alive % 8


def test_autocast(device: torch.device) -> None:
    model, twin, _, mask, x = networks(device, torch.float32)
    model.widths.clear()
    found, expected = step(model, x, autocast=True), step(twin, x, autocast=True)
    if device.type == "cpu":  # full maps, plain calls
        assert model.widths == [24]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        return
    assert model.widths == [-(-live(twin, x, mask) // 8) * 8]
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm().clamp(min=1e-3)) < 5e-2


def test_compact_maps_under_autocast_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with convolutions under autocast, and with norms where the kernel may not run, on the CPU."""
    model, twin, _, mask, x = networks(torch.device("cpu"), torch.float32)
    monkeypatch.setattr("lightning_prune.live_maps.only_plain_calls", lambda device, cast: False)
    model.widths.clear()
    found, expected = step(model, x, autocast=True), step(twin, x, autocast=True)
    assert model.widths == [live(twin, x, mask)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).norm() / b.norm().clamp(min=1e-3)) < 5e-2


def test_a_group_keeps_a_multiple_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, skipper, mask, x = networks(torch.device("cpu"), torch.float64)
    graph = trace_channels(copy.deepcopy(twin), x[:1])
    wider = aligned_groups(mask, graph, skipper._layers)
    assert (wider | mask == wider).all()
    for group in graph.groups:
        before, after = int(mask[group.ids].sum()), int(wider[group.ids].sum())
        assert after == -(-before // 8) * 8
    skipper.set_mask(wider)
    model.widths.clear()
    for found, expected in zip(step(model, x), step(twin, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert model.widths[0] % 8 == 0


def test_the_faster_way_is_found(device: torch.device) -> None:
    small, large = (torch.randn(n, n, device=device) for n in (8, 700))
    matrices = {"large": large, "small": small}
    assert timing.fastest(lambda way: matrices[way] @ matrices[way], ["large", "small"], device) == "small"
    assert timing.fastest(lambda way: large @ large, ["first", "second"], device) in ("first", "second")


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("compiled", [False, True])
def test_ten_cuts(device: torch.device, kind: str, compiled: bool) -> None:
    """Cut after every step; the step count may be on the device; compiled anew once per cut and never given up."""
    if kind == "capturable" and device.type == "cpu":
        pytest.skip("capturable is for CUDA")
    torch.manual_seed(0)
    model = NETWORKS["plain"]().to(device).double()
    twin = copy.deepcopy(model)
    x = torch.randn(8, 1, 6, 6, dtype=torch.float64, device=device)
    graph = trace_channels(model, x[:1])
    graphs: list[Any] = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    run = torch.compile(model, backend=backend) if compiled else model
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2, **OPTIMIZERS[kind]) for net in (model, twin)]
    cutter = Reconfigurer(model, graph, lambda: optimizers[:1], lambda: None, lambda _: None)
    keepers = WeightKeeper(model, graph), WeightKeeper(twin, graph)
    mask = np.ones(graph.num_channels, dtype=bool)
    for cut in range(10):
        for net, call, optimizer in zip((model, twin), (run, twin), optimizers, strict=True):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
            del net
        assert len(graphs) == (cut + 1 if compiled else 0)
        mask = mask.copy()
        for group in graph.groups:
            mask[group.start + group.size - 1 - cut] = False
        for keeper, seen in zip(keepers, (cutter.graph, graph), strict=True):
            keeper.follow(seen)
            keeper.set_mask(mask)
            keeper.zero_dead()
        assert cutter.cut(mask, x[:1])
        assert model.conv1.weight.shape[0] == 11 - cut
        state = optimizers[0].state[model.conv1.weight]
        assert state["exp_avg"].shape == model.conv1.weight.shape
        assert state["step"].dim() == 0
        torch.testing.assert_close(run(x) if cut == 9 else model(x), twin(x), rtol=1e-9, atol=1e-9)
    assert len(graphs) == (11 if compiled else 0)


def make_graphed_callables(module: nn.Module) -> None:
    """What torch.cuda.make_graphed_callables leaves on a module, without a GPU."""

    def new_fwd(x: Tensor) -> Tensor:
        return type(module).forward(module, x)

    module.forward = new_fwd  # type: ignore[method-assign]


def test_captured_modules_are_refused(device: torch.device) -> None:
    module = Module().to(device)
    if device.type == "cuda":
        torch.cuda.make_graphed_callables(
            module.net.fc2, (torch.randn(4, 20, device=device, requires_grad=True),)
        )
    else:
        make_graphed_callables(module.net.fc2)
    with pytest.raises(MisconfigurationException, match=r"net\.fc2 replays a CUDA graph"):
        trainer([pruner(1)], 3).fit(module, loader())
