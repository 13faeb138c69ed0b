"""Skipping dead channels: the numbers of the plain masked network, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import ChannelPruning, CompactionPlan, ops, skipping, timing, trace_channels
from lightning_prune.gates.attach import GateHooks
from lightning_prune.ops.map_memory import map_memory
from lightning_prune.skipping import DeadChannelSkipper
from lightning_prune.weights import WeightKeeper
from tests.fit.toys import ToyModule, toy_fit

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


class Net(nn.Module):
    """Stem, a depthwise and a grouped convolution, a residual sum, a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.mix, self.group = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding="same", groups=3)
        self.back = nn.Conv2d(12, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 10, 3, stride=2, dilation=2), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = torch.sigmoid(self.mix(F.silu(self.depth(x))))
        x = x + self.back(F.relu(self.group(y)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


X = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiled kernel wins every comparison, at any size; the shapes of the weights that were compared."""
    compared: list[str] = []

    def measure(layer: Any, *args: Any) -> skipping.Choice:
        compared.append(str(tuple(layer.module.weight.shape)))
        return skipping.Choice(True, True, True)

    monkeypatch.setattr(skipping, "_measure", measure)
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)
    return compared


def masked(share: float = 0.5) -> tuple[Net, DeadChannelSkipper, np.ndarray]:
    """A network with dead channels at zero, twice the same: the plain twin is a deep copy."""
    model = Net().double()
    graph = trace_channels(model, X[:1])
    mask = np.random.default_rng(1).random(graph.num_channels) >= share
    for group in graph.groups:
        mask[group.start] = True
    for group in graph.groups:
        if group.size == 4:  # the same offset of three groups is one channel of the grouped convolution
            mask[group.start + 1] = False
    keeper = WeightKeeper(model, graph)
    keeper.set_mask(mask)
    keeper.zero_dead()
    return model, DeadChannelSkipper(model, graph), mask


def step(model: nn.Module, x: Tensor, call: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = (call or model)(x)
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), {**grads, "x": x.grad}


def assert_same(
    found: Any, expected: Any, dead: dict[str, Tensor] | None = None, tolerance: float = 1e-10
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert set(found[1]) == set(expected[1])
    for name, grad in expected[1].items():
        live = torch.ones_like(grad, dtype=torch.bool) if dead is None or name not in dead else ~dead[name]
        torch.testing.assert_close(found[1][name][live], grad[live], rtol=tolerance, atol=tolerance)


def dead_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in model.named_parameters()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_the_plain_network(
    memory_format: torch.memory_format, always: list[str]
) -> None:
    model, skipper, mask = masked()
    twin = copy.deepcopy(model)
    x = X.contiguous(memory_format=memory_format)
    skipper.set_mask(mask)
    found, expected = step(model, x), step(twin, x)
    dead = dead_weights(model)
    assert_same(found, expected, dead)
    assert len(always) == 6  # every convolution was exchanged
    for name in ("stem.weight", "mix.weight", "group.weight", "back.weight", "last.weight"):
        assert dead[name].any()
        assert (found[1][name][dead[name]] == 0).all()  # exactly
    assert (model.norm.running_mean[mask_of(model.norm)] != 0).all()
    torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean)


def mask_of(norm: nn.BatchNorm2d) -> Tensor:
    return norm.weight != 0


def test_second_derivatives_and_checkpointing(always: list[str]) -> None:
    model, skipper, mask = masked()
    twin = copy.deepcopy(model)
    skipper.set_mask(mask)
    penalties = []
    for net in (model, twin):
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        penalties.append(
            (grad.detach(), {"x": x.grad, "head": net.head.weight.grad, "last": net.last.weight.grad})
        )
    dead = {"last": dead_weights(model)["last.weight"]}
    assert_same(penalties[0], penalties[1], dead)
    for reentrant in (False, True):
        found = step(model, X, lambda x, r=reentrant: checkpoint(model, x, use_reentrant=r))
        assert_same(found, step(twin, X), dead_weights(model))


def test_nothing_is_left_behind(always: list[str]) -> None:
    model, skipper, mask = masked()
    before = {name: copy.copy(module.__dict__) for name, module in model.named_modules()}
    state, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    expected = model(X)
    skipper.set_mask(mask)
    model(X)
    assert list(model.state_dict()) == state
    assert [id(p) for p in model.parameters()] == parameters
    with pytest.raises(RuntimeError):
        model.stem(X[:, :2])  # a call that fails
    assert all("_conv_forward" not in module.__dict__ for module in model.modules())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls = len(always)
        torch.testing.assert_close(twin(X), expected)
        assert len(always) == calls  # a copy is a plain network
    skipper.detach()
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(before[name]) - {"_compiled_call_impl", "_takes_gates", "_paired"}
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(not module._forward_hooks_always_called for module in model.modules())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only")
def test_detaching_gives_the_memory_of_maps_back(always: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 3))
    x = torch.randn(2, 3, 40, 40)
    skipper = DeadChannelSkipper(model, trace_channels(model, x))
    for _ in range(2):
        step(model, x)
    gc.collect()
    assert map_memory().kept > 0
    skipper.detach()
    assert map_memory().kept == 0


@pytest.mark.parametrize("choice", [*itertools.product([0, 1], repeat=3), (2, 2, 2), (2, 1, 0), (1, 2, 2)])
def test_each_part_may_be_any(choice: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, skipper, mask = masked()
    twin = copy.deepcopy(model)
    monkeypatch.setattr(skipping, "_measure", lambda *a: skipping.Choice(*choice))
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)
    assert_same(step(model, X), step(twin, X))  # all channels are computed
    skipper.set_mask(mask)
    assert_same(step(model, X), step(twin, X), dead_weights(model))


def test_winograd_trains_a_dense_network() -> None:
    """3x3 convolutions of 64 channels: Winograd does a quarter of the multiplications, in forward and backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    model.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    skipper = DeadChannelSkipper(model, trace_channels(model, x))
    found, expected = step(model, x), step(twin, x)
    assert model[2] in skipper.skipping()
    assert_same(found, expected, tolerance=2e-4)


def test_plain_under_autocast_compile_and_deterministic_algorithms(always: list[str]) -> None:
    model, skipper, mask = masked()
    skipper.set_mask(mask)
    expected = model(X)
    calls = len(always)
    assert calls > 0
    skipper.set_mask(mask)
    for layer in skipper._layers:
        layer.verdicts.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(X)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(model(X), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), expected)
    assert len(always) == calls
    model(X)
    assert len(always) == 2 * calls


def test_compared_per_decile_until_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Conv2d(40, 2, 1)).double()
    graph = trace_channels(model, X[:1])
    skipper = DeadChannelSkipper(model, graph)
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)
    shares: list[float] = []
    monkeypatch.setattr(
        skipping,
        "_measure",
        lambda layer, *a: shares.append(layer.share) or skipping.Choice(*[layer.share < 0.7] * 3),
    )
    mask = np.ones(graph.num_channels, dtype=bool)
    for dead in range(40):
        mask[:dead] = False
        skipper.set_mask(mask)
        model(X)
    # both layers have the same share; compared whenever a tenth has died, until it is below 0.7
    assert shares == [s for s in (1, 36 / 40, 32 / 40, 28 / 40, 24 / 40) for _ in range(2)]
    assert len(skipper.skipping()) == 2


def test_the_comparison_is_by_the_clock() -> None:
    """1 of 64 channels live in both directions of a 3x3 convolution: no clock can miss that."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 1)
    )
    x = torch.randn(4, 3, 24, 24)
    graph = trace_channels(model, x)
    mask = np.zeros(graph.num_channels, dtype=bool)
    for group in graph.groups:
        mask[group.start] = True
    keeper, skipper = WeightKeeper(model, graph), DeadChannelSkipper(model, graph)
    keeper.set_mask(mask)
    keeper.zero_dead()
    twin = copy.deepcopy(model)
    skipper.set_mask(mask)
    found, expected = step(model, x), step(twin, x)
    assert model[2] in skipper.skipping()
    assert_same(found, expected, tolerance=1e-4)


@pytest.mark.parametrize(
    ("method", "precision", "tolerance"),
    [
        ("l1", "32-true", 1e-5),
        ("magnitude", "32-true", 1e-5),
        ("l1", "64-true", 1e-9),
        ("l0", "64-true", 1e-9),
    ],
)
def test_a_fit_ends_with_the_same_parameters(
    method: str, precision: str, tolerance: float, always: list[str]
) -> None:
    def run(skip: bool) -> tuple[ToyModule, ChannelPruning]:
        callback = ChannelPruning(
            0.4, method=method, warmup_epochs=1, learn_epochs=1, finetune_epochs=1, dead_channel_skipping=skip
        )
        return toy_fit([callback], 3, accumulate_grad_batches=2, precision=precision), callback

    (plain, first), (skipped, second) = run(False), run(True)
    assert len(always) > 0
    assert first.plan is not None
    assert second.plan is not None
    assert first.plan.removed == second.plan.removed
    for name, value in plain.state_dict().items():
        # a bias in front of a batch norm has no gradient but rounding, which Adam blows up to full steps
        if precision == "64-true" or name not in ("net.conv1.bias", "net.bn.running_mean"):
            torch.testing.assert_close(skipped.state_dict()[name], value, rtol=tolerance, atol=tolerance)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in skipped.modules())
    tensors = dict(skipped.named_parameters())
    for cut in second.plan.slices:
        if cut.tensor in tensors:
            assert (tensors[cut.tensor].index_select(cut.dim, torch.tensor(cut.removed)) == 0).all()


def test_with_a_given_plan_every_step_skips(always: list[str]) -> None:
    plan = CompactionPlan.from_mask(
        graph := trace_channels(ToyModule(), torch.zeros(1, 1, 6, 6)), np.arange(graph_size(graph)) % 2 == 0
    )
    callback = ChannelPruning(plan=plan, warmup_epochs=0, finetune_epochs=1)
    module = toy_fit([callback], 1)
    assert len(always) > 0
    assert callback.compact_model is not None
    assert not any(m._forward_hooks for m in module.modules())
    assert not any(m._forward_hooks for m in callback.compact_model.modules())


def graph_size(graph: Any) -> int:
    return int(graph.num_channels)


def test_an_aborted_fit_leaves_no_hook(always: list[str]) -> None:
    class Failing(ToyModule):
        def on_train_batch_end(self, *args: Any) -> None:
            raise KeyError("stop")

    torch.manual_seed(0)
    module = Failing()
    graph = trace_channels(module, torch.zeros(1, 1, 6, 6))
    plan = CompactionPlan.from_mask(graph, np.arange(graph.num_channels) % 2 == 0)
    from tests.fit.toys import loader, trainer

    callback = ChannelPruning(plan=plan, warmup_epochs=0, finetune_epochs=1)
    with pytest.raises(KeyError, match="stop"):
        trainer([callback], 1).fit(module, loader(), loader(24))
    assert len(always) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_the_argument_is_checked() -> None:
    with pytest.raises(ValueError, match="dead_channel_skipping must be True or False; got 'yes'"):
        ChannelPruning(dead_channel_skipping="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["gates", "skipper"])
@pytest.mark.parametrize(
    "choice", [(True, True, True), (True, False, False), (False, True, False), (False,) * 3]
)
def test_gates_go_into_the_kernel(
    choice: tuple[bool, ...], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gated weight is never multiplied out where the kernel takes the gate; gradients reach gate and weight."""
    monkeypatch.setattr(skipping, "_measure", lambda *a: skipping.Choice(*choice))
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)
    torch.manual_seed(2)
    model = Net().double()
    twin = copy.deepcopy(model)
    graph = trace_channels(model, X[:1])
    results = []
    for net in (model, twin):
        values = torch.rand(
            graph.num_channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        hooks = GateHooks(net, graph, lambda training, values=values: values)
        if first == "gates":
            hooks.attach()
        skipper = DeadChannelSkipper(net, graph) if net is model else None
        if first == "skipper":
            hooks.attach()
        found = step(net, X)
        results.append((found[0], {**found[1], "gates": values.grad.clone()}))
        copied = copy.deepcopy(net)
        torch.testing.assert_close(copied(X), found[0], rtol=1e-9, atol=1e-9)
        if skipper is not None:
            x = X.clone().requires_grad_()
            (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            grad.square().sum().backward()  # second derivatives
            skipper.detach()
        hooks.detach()
        assert not {"_in_gate", "_takes_gates", "_conv_forward", "weight"} & set(net.back.__dict__)
    assert_same(results[0], results[1])


@pytest.mark.parametrize(("handicap", "chosen"), [(1.0, 0), (1.2, 2), (0.5, 0)])
def test_the_first_way_s_time_counts_more_often(
    handicap: float, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_seconds_on_cpu", lambda run, way, device: run(way))
    seconds = {0: 1.0, 1: 1.1, 2: 0.99}  # the last one is faster, but not by the margin
    assert timing.fastest(seconds.__getitem__, (0, 1, 2), torch.device("cpu"), handicap) == chosen
