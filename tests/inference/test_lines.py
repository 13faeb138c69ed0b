"""One-dimensional networks run the two-dimensional kernels: the same numbers as torch in float64, whatever is between."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference.sites import ConvSite
from lightning_prune.inference.symbolic import SymbolicBlueprint
from tests.inference.test_segment import TOLERANCE, error, segmented, segments

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


def norm(channels: int) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(channels)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    nn.init.normal_(layer.running_mean)
    return layer


class Block(nn.Module):
    """Two convolutions and a shortcut, in place where that is allowed."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = norm(outputs)
        self.second = nn.Conv1d(outputs, outputs, 3, padding=2, dilation=2)
        self.shortcut = nn.Conv1d(inputs, outputs, 1, stride)
        self.last = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.hardswish(self.norm(self.first(x))))
        y += self.shortcut(x)
        z: Tensor = self.last(y)
        return z


class Signal(nn.Module):
    """A residual network over signals; ``between`` sees a map of three dimensions in its middle."""

    def __init__(self, width: int, kernel: int, pool: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, width, 7, 2, 3), norm(width), nn.SiLU(), pool)
        self.drop = nn.Dropout1d(0.2)
        self.body = nn.Sequential(Block(width, width, kernel, 1), between, Block(width, width + 3, kernel, 2))
        self.head = nn.Linear(width + 3, 5)
        self.pool = nn.AdaptiveAvgPool1d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.drop(self.stem(x)))
        y: Tensor = self.head(torch.flatten(self.pool(x), 1)) + self.head(x.amax(-1))
        return y


class Swapped(nn.Module):
    """Mixes positions, and normalizes over channels: neither is a layer over rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return F.relu(y) + x


@pytest.mark.usefixtures("level")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5, 9]),
    pool=st.sampled_from(
        [nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2), nn.MaxPool1d(2, ceil_mode=True), nn.Identity()]
    ),
    other=st.booleans(),
    batch=st.integers(1, 3),
    length=st.integers(24, 150),
)
def test_equals_float64(
    width: int, kernel: int, pool: nn.Module, other: bool, batch: int, length: int
) -> None:
    torch.manual_seed(0)
    model = Signal(width, kernel, copy.deepcopy(pool), Swapped(width) if other else nn.Identity()).eval()
    x = torch.randn(batch, 2, length)
    for network in segmented(model, x):
        assert segments(network)
        for given_x in (x, torch.randn(2, 2, length + 7), x.transpose(1, 2).contiguous().transpose(1, 2)):
            assert error(network, model, given_x) < 2 * TOLERANCE


def test_a_whole_network_is_one_call_and_keeps_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "own")
    model, x = Signal(19, 5, nn.MaxPool1d(3, 2, 1), nn.Identity()).eval(), torch.randn(2, 2, 120)
    network = optimize_for_inference(model, x)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)}
    assert set(network.layers) == names
    assert set(network.layers.values()) == {"own"}
    with torch.no_grad():
        y = network(x)
        assert torch.equal(copy.deepcopy(network)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(network))(x), y)
    assert max(len(s._names) for n in segmented(model, x) for s in segments(n)) == len(names)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_paddings_as_torch_has_them(padding: str | int, mode: str) -> None:
    layers = [
        nn.Conv1d(4, 6, 5, padding=padding, padding_mode=mode),
        nn.ReLU(),
        nn.Conv1d(6, 3, 4, 3, groups=3),
    ]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 4, 31)
    assert error(optimize_for_inference(model, x), model, x) < TOLERANCE


def sites(model: nn.Module, x: Tensor) -> list[ConvSite]:
    return SymbolicBlueprint(copy.deepcopy(model.eval()), x).sites


def test_the_users_layers_and_other_dimensions_stay_as_they_are() -> None:
    conv = nn.Conv1d(4, 6, 3)
    assert not sites(nn.Sequential(conv), torch.randn(4, 20))  # one signal without a batch
    hooked = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 6, 3))
    hooked[0].register_forward_hook(lambda module, args, y: None)
    assert [site.name for site in sites(hooked, torch.randn(2, 4, 20))] == ["1"]
    mixed = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(4), nn.ReLU(), conv).eval()
    network = optimize_for_inference(mixed, torch.randn(2, 4, 20))
    assert error(network, mixed, torch.randn(3, 4, 20)) < TOLERANCE
    assert conv.weight.dim() == 3
    double = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU()).double().eval()
    assert (
        error(
            optimize_for_inference(double, torch.randn(2, 4, 20).double()),
            double,
            torch.randn(2, 4, 20).double(),
        )
        < 1e-12
    )
