"""Counts against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.models import ArticleNet, resnet20
from lightning_prune.nn import CompactConv2d, MaskedConv2d
from lightning_prune.profiling import profile


def test_article_net_against_arithmetic() -> None:
    widths = (4, 5, 6, 7, 11)
    net = ArticleNet(3, 32, widths, num_classes=10)
    result = profile(net, torch.randn(1, 3, 32, 32))
    conv = [3 * 4 * 9 * 32 * 32, 4 * 5 * 9 * 32 * 32, 5 * 6 * 9 * 16 * 16, 6 * 7 * 9 * 16 * 16]
    dense = [7 * 8 * 8 * 11, 11 * 10]
    assert result.macs == sum(conv) + sum(dense)
    assert result.params == sum(p.numel() for p in net.parameters())
    with_weights = [layer for layer in result.layers if layer.params]
    assert [layer.macs for layer in with_weights] == conv + dense
    assert [layer.type for layer in with_weights] == ["Conv2d"] * 4 + ["Linear"] * 2
    assert with_weights[0].name == "features.0"
    assert with_weights[0].output_shape == (1, 4, 32, 32)
    assert with_weights[0].activation_bytes == 4 * 32 * 32 * 4
    assert sum(layer.params for layer in result.layers) == result.params
    assert sum(layer.macs for layer in result.layers) == result.macs


def test_resnet20_has_the_published_number_of_macs() -> None:
    """About 41 M multiply-accumulates on 32x32 images (40.6 M without projections)."""
    result = profile(resnet20(), torch.randn(1, 3, 32, 32))
    assert 40.0e6 < result.macs < 42.0e6


def test_batch_multiplies_macs_and_activations_but_not_parameters() -> None:
    net = resnet20(width=4)
    one, three = profile(net, torch.randn(1, 3, 16, 16)), profile(net, torch.randn(3, 3, 16, 16))
    assert three.macs == 3 * one.macs
    assert three.activation_bytes == 3 * one.activation_bytes
    assert three.params == one.params


def test_grouped_and_transposed_convolutions() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False)
    )
    result = profile(net, torch.randn(1, 8, 6, 6))
    assert [layer.macs for layer in result.layers] == [8 * 9 * 36, 8 * 4 * 4 * 36]


def test_in_place_and_identity_outputs_count_once() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Identity())
    assert profile(net, torch.randn(1, 1, 4, 4)).activation_bytes == 2 * 16 * 4
    copies = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    assert profile(copies, torch.randn(1, 1, 4, 4)).activation_bytes == 2 * 2 * 16 * 4


def test_shared_and_repeated_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.first.weight
            self.unused = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.first(self.first(x)))

    result = profile(Twice(), torch.randn(5, 4))
    first, tied, unused = result.layers
    assert (first.calls, first.macs, first.params) == (2, 2 * 5 * 16, 16)
    assert (tied.calls, tied.macs, tied.params) == (1, 5 * 16, 0)
    assert (unused.calls, unused.macs, unused.params, unused.output_shape) == (0, 0, 10, ())
    assert result.params == 26


def test_functional_convolution_counts_in_the_total() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.conv2d(x, torch.ones(4, 3, 1, 1)).mean((2, 3)))

    result = profile(Functional(), torch.randn(1, 3, 5, 5))
    assert result.macs == 4 * 3 * 25 + 8


def test_leaves_the_model_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout()).train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    profile(net, {"input": torch.randn(2, 1, 3, 3)})
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(RuntimeError):
        profile(net, torch.randn(2, 7, 3, 3))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_table_shows_layers_and_totals() -> None:
    result = profile(nn.Sequential(nn.Linear(100, 20), nn.ReLU()), torch.randn(1, 100))
    text = result.table()
    assert "Linear" in text
    assert "1x20" in text
    assert "2,020" in text
    assert "2,000" in text


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
def test_compiled_operators_count_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(6, 8, (3, 5), stride=2, groups=2)  # 4 outputs of 3 inputs in each of 2 groups
    x = torch.randn(2, 6, 11, 13)
    pixels = 2 * 5 * 5
    assert profile(CompactConv2d.from_conv(conv), x).macs == pixels * 15 * 8 * 3
    masked = MaskedConv2d.from_conv(conv)
    assert profile(masked, x).macs == pixels * 15 * 8 * 3
    masked.set_live(
        torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2, 7])
    )  # (2 of 3) x (3 of 4), (1 of 3) x (1 of 4)
    assert profile(masked, x).macs == pixels * 15 * (2 * 3 + 1 * 1)

    class Scattered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            module = CompactConv2d.from_conv(
                nn.Conv2d(2, 3, 1), in_index=torch.tensor([5, 1]), out_index=torch.tensor([0, 4, 2])
            )
            return module(x, x)

    assert profile(Scattered(), x).macs == 2 * 11 * 13 * 2 * 3
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "own")
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", "off")
    net = resnet20(width=4)
    fast = optimize_for_inference(net, torch.randn(1, 3, 16, 16))
    assert any(isinstance(module, CompactConv2d) for module in fast.modules())
    assert profile(fast, torch.randn(3, 3, 16, 16)).macs == profile(net, torch.randn(3, 3, 16, 16)).macs
