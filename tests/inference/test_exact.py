"""`optimize_for_inference(exact=True)`: plain sums everywhere, and what that promises of every single output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference.segment import CompactSegment
from lightning_prune.nn import CompactConv2d, MaskedConv2d
from lightning_prune.ops.reference import packed_size

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
ROUNDING = 2.0**-24


class Various(nn.Module):
    """A layer for every algorithm: 3x3, 5x5, with stride 2 of each kind, 1x1; a sum, and a dense layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2, 3)
        self.same, self.five = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 48, 5, padding=2)
        self.wide = nn.Conv2d(48, 64, 1)
        self.down, self.again = nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 64, 5, 2, 2)
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = torch.relu(self.same(y) + y)
        y = torch.relu(self.wide(torch.relu(self.five(y))))
        return self.head(self.again(torch.relu(self.down(y))).mean((2, 3)))


def carried(network: nn.Module) -> dict[str, int]:
    """How many numbers each packed weight has beyond the plain ones."""
    return {
        name: module.packed.numel() - packed_size(module.weight_shape, module.groups)
        for name, module in network.named_modules()
        if isinstance(module, CompactConv2d)
    }


@pytest.mark.parametrize("backend", ["own", "auto"])
@pytest.mark.parametrize("images", [1, 2])
def test_no_weight_is_packed_for_another_algorithm(
    images: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", backend)
    torch.manual_seed(0)
    model, x = Various().eval(), torch.randn(images, 3, 96, 96)
    fast = optimize_for_inference(model, x, exact=True)
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x.double())
        assert (fast(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not any(carried(fast).values())
    for segment in (m for m in fast.modules() if isinstance(m, CompactSegment)):
        weights = segment._current_weights()
        assert weights is not None
        plain = [packed_size(m.weight_shape, m.groups) for m in weights._layers[:-1]]  # type: ignore[arg-type]
        assert weights.places[::2, 1].tolist() == plain  # the kernels choose by these
    if backend == "own":
        assert len(carried(fast)) >= 6
        other = carried(optimize_for_inference(model, x))
        assert sum(extra > 0 for extra in other.values()) >= 4  # what exact=True leaves out


@pytest.mark.parametrize("backend", ["own", "vendor", "auto"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (1, 1), (3, 2), (5, 2), (7, 2)])
def test_every_output_is_as_good_as_a_plain_sum(
    kernel: int, stride: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", backend)
    torch.manual_seed(1)
    conv = nn.Conv2d(64, 64, kernel, stride, kernel // 2).eval()
    model = nn.Sequential(conv, nn.ReLU())
    x = 1e-3 * torch.randn(2, 64, 28, 28)
    x[:, ::7, ::9, ::11] = 1e5  # large beside small: other algorithms carry errors from one to the other
    wide = copy.deepcopy(model).double()
    with torch.inference_mode():
        exact, sums = wide(x.double()), copy.deepcopy(conv).double()
        sums.weight, sums.bias = (nn.Parameter(t.abs()) for t in (sums.weight, sums.bias))  # type: ignore[union-attr]
        bound = (conv.weight[0].numel() + 3) * ROUNDING * sums(x.double().abs())
        found = optimize_for_inference(model, x, exact=True)(x)
        assert ((found - exact).abs() <= bound).all()
        if backend == "own" and stride == 1 and kernel < 5:
            assert (
                (optimize_for_inference(model, x)(x) - exact).abs() > bound
            ).any()  # the bound says something


def test_modules_of_this_package_sum_directly_too() -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(CompactConv2d.from_conv(conv), MaskedConv2d.from_conv(conv)).eval()
    fast = optimize_for_inference(model, torch.randn(1, 16, 12, 12), exact=True)
    kept = [m for m in fast.modules() if isinstance(m, (CompactConv2d, MaskedConv2d))]
    assert kept
    assert all(m.exact for m in kept)
    assert not any(carried(fast).values())
    assert carried(model)["0"] > 0  # the user's is not changed
    assert not model[1].exact
