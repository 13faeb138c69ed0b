"""Exchanged batch norms: the numbers and running statistics of nn.BatchNorm2d, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_prune import fused_norms, norm_ways, ops
from lightning_prune.fused_norms import FusedNorms

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


class Net(nn.Module):
    """Norms in front of module activations (in place, shared, not fusable), of a function and of a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.ReLU()
        self.first = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.BatchNorm2d(6, affine=False)
        )
        self.second = nn.Sequential(
            nn.BatchNorm2d(6, momentum=None), shared, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), shared,
            nn.BatchNorm2d(6), nn.LeakyReLU(), nn.BatchNorm2d(6, track_running_stats=False), nn.SiLU(),
        )  # fmt: skip
        self.conv, self.norm, self.act = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        y = self.norm(self.conv(x))
        return self.act(y).mean((2, 3)) + F.relu(x + y).sum((2, 3))


NORMS = 6  # in sequences


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiled kernel wins, at any size; the activations it was called with."""
    found: list[str] = []
    plain = fused_norms._forward

    def forward(*args: Any) -> Any:
        found.append(args[4])
        return plain(*args)

    monkeypatch.setattr(fused_norms, "_forward", forward)
    monkeypatch.setattr(fused_norms, "_measure", lambda *a: True)
    monkeypatch.setattr(fused_norms, "LEAST_ELEMENTS", 0)
    return found


def pair() -> tuple[Net, Net, FusedNorms, Tensor]:
    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    return model, twin, FusedNorms(model), torch.randn(4, 3, 7, 7, dtype=torch.float64)


def step(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = (call or model)(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_numbers_are_those_of_the_plain_network(
    memory_format: torch.memory_format, calls: list[str]
) -> None:
    model, twin, _, x = pair()
    for _ in range(3):  # running statistics, cumulative ones too
        torch.testing.assert_close(
            step(model, x.contiguous(memory_format=memory_format)), step(twin, x), rtol=1e-9, atol=1e-9
        )
    assert calls[:NORMS] == ["relu", "none", "relu", "relu", "none", "silu"]
    assert calls[NORMS] == "none"  # nobody can say where the output of self.norm goes
    calls.clear()
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    assert not calls


def test_an_activation_is_fused_only_in_a_sequence_that_runs_as_a_whole(calls: list[str]) -> None:
    model, twin, _, x = pair()

    def by_hand(net: Net) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            total = torch.zeros((), dtype=x.dtype)
            for layer in net.second:
                x = layer(x)
                total = total + x.square().mean()
            return total

        return call

    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    for net in (model, twin):
        net.first.requires_grad_(False)
    found, expected = by_hand(model)(x), by_hand(twin)(x)
    torch.testing.assert_close(found, expected)
    assert set(calls) == {"none"}


@pytest.mark.parametrize("on", ["norm", "activation", "global"])
def test_hooks_of_the_user_see_what_they_saw_before(on: str, calls: list[str]) -> None:
    model, twin, _, x = pair()
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if on != "global" or module in (model.first[1], twin.first[1]):
            seen.append(output.detach().clone())

    for net in (model, twin):
        if on != "global":
            net.first[1 if on == "norm" else 2].register_forward_hook(hook)
    handle = nn.modules.module.register_module_forward_hook(hook) if on == "global" else None
    try:
        torch.testing.assert_close(step(model, x), step(twin, x))
    finally:
        if handle is not None:
            handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])
    assert len(calls) == {"norm": NORMS, "activation": NORMS + 1, "global": 0}[on]


def test_copies_are_plain_and_nothing_is_left_behind(calls: list[str]) -> None:
    model, twin, fused, x = pair()
    state, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(step(copied, x), step(copy.deepcopy(twin), x))
        assert not calls
        assert all("_compiled_call_impl" not in module.__dict__ for module in copied.modules())
    assert list(model.state_dict()) == state
    assert [id(p) for p in model.parameters()] == parameters
    fused.detach()
    for module, plain in zip(model.modules(), twin.modules(), strict=True):
        assert set(module.__dict__) == set(plain.__dict__)
    step(model, x)
    assert not calls


def test_autocast_compile_deterministic_and_modes(calls: list[str]) -> None:
    model, twin, _, x = pair()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    twin.load_state_dict(model.state_dict())
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(step(model, x), step(twin, x))
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        model(x)
    twin.load_state_dict(model.state_dict())
    for net in (model, twin):
        net.second[0].momentum = 0.1  # torch.compile does not take None in one graph
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))
    assert not calls


def test_second_derivatives_and_checkpoints(calls: list[str]) -> None:
    model, twin, _, x = pair()
    found = []
    for net in (model, twin):
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(inputs).square().sum(), inputs, create_graph=True)
        grad.square().sum().backward()
        found.append([grad.detach(), inputs.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)
    for reentrant in (False, True):
        for run in (checkpoint, lambda f, x, use_reentrant: checkpoint_sequential(f, 3, x, use_reentrant)):
            results = []
            for net in (model, twin):
                sequence = nn.Sequential(net.first, *net.second) if run is not checkpoint else net
                results.append(
                    step(net, x, lambda x, s=sequence, r=reentrant, f=run: f(s, x, use_reentrant=r))
                )
            for a, b in zip(*results, strict=True):
                if a is not None or b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_torch_s_errors_stay(calls: list[str]) -> None:
    model, *_ = pair()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model.norm(torch.zeros(1, 6, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected 4D input"):
        model.norm(torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        model.second(torch.zeros(2, 5, 4, 4, dtype=torch.float64))
    assert not any(sequence.running for call in norm_calls(model) for sequence in call.sequences)


def norm_calls(model: nn.Module) -> list[fused_norms._NormCall]:
    return [m.__dict__["_compiled_call_impl"] for m in model.modules() if type(m) is nn.BatchNorm2d]


def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, _, x = pair()
    asked: list[torch.Size] = []
    monkeypatch.setattr(fused_norms, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(norm_ways, "faster", lambda run, device: asked.append(run) or run(True) or run(False))
    for _ in range(2):
        torch.testing.assert_close(step(model, x), step(twin, x))
    assert len(asked) == NORMS + 1  # once per module


def test_second_derivatives_of_a_norm_that_runs_twice(calls: list[str]) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    model = nn.Sequential(norm, nn.Conv2d(3, 3, 1).double(), nn.Sigmoid(), norm)
    x, twin, found = torch.randn(2, 3, 3, 3, dtype=torch.float64), copy.deepcopy(model), []
    FusedNorms(model)
    for net in (model, twin):
        inputs = x.clone().requires_grad_()
        grads = torch.autograd.grad(
            net(inputs).pow(3).sum(), [inputs, *net[0].parameters()], create_graph=True
        )
        found.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)
    assert len(calls) == 2


def test_statistics_that_somebody_saved_are_not_changed_unseen(calls: list[str]) -> None:
    model, _, _, x = pair()
    norm = model.second[3]
    y = norm.eval()(
        x.repeat(1, 2, 1, 1).requires_grad_()
    )  # keeps the running statistics for its backward pass
    before = norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()
    model.train()(x)
    assert not any(torch.equal(a, b) for a, b in zip(before, norm._buffers.values(), strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("wrong", ["dtype", "shape", "tracked"])
def test_the_operator_refuses_statistics_that_do_not_fit(wrong: str) -> None:
    vectors = [torch.ones(3) for _ in range(4)]
    tracked = torch.tensor(0.0 if wrong == "tracked" else 0)
    if wrong != "tracked":
        vectors[1] = torch.ones(3, dtype=torch.float64) if wrong == "dtype" else torch.ones(4)
    with pytest.raises(RuntimeError, match="must be"):
        torch.ops.lightning_prune.record_moments(*vectors[:2], tracked, *vectors[2:], 8, 0.1)
