"""Norms and means over channels of which some are gone, against torch's own over zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.channels import counts, trace_channels
from lightning_prune.compaction import compact, mask_channels
from tests.channels.networks import conv, head, image, randomize
from tests.compaction.test_compaction import random_plan, relative_error


def padded(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def test_layer_norm_counts_the_zeros() -> None:
    x, weight, bias = torch.randn(3, 5, 7).double(), torch.rand(7).double(), torch.rand(7).double()
    for w, b in ((weight, bias), (weight, None), (None, None)):
        wide = [None if v is None else padded(v, 0, 12) for v in (w, b)]
        expected = F.layer_norm(padded(x, 2, 12), (12,), *wide, 1e-6)[..., :7]
        assert torch.allclose(counts.layer_norm(x, (7,), w, b, 1e-6, count=12), expected, atol=1e-12)


def test_rms_norm_counts_the_zeros() -> None:
    x, weight = torch.randn(3, 7).double(), torch.rand(7).double()
    for eps in (None, 1e-3):
        expected = F.rms_norm(padded(x, 1, 12), (12,), padded(weight, 0, 12), eps)[..., :7]
        assert torch.allclose(counts.rms_norm(x, (7,), weight, eps, count=12), expected, atol=1e-12)


def test_group_norm_counts_the_zeros() -> None:
    x, weight, bias = torch.randn(2, 6, 4, 3).double(), torch.rand(6).double(), torch.rand(6).double()
    spread = torch.tensor([0, 1, 2, 5, 6, 7])  # three of five channels in each of two groups
    wide = torch.zeros(2, 10, 4, 3).double().index_copy(1, spread, x)
    vectors = [torch.zeros(10).double().index_copy(0, spread, v) for v in (weight, bias)]
    expected = F.group_norm(wide, 2, *vectors, 1e-5)[:, spread]
    assert torch.allclose(counts.group_norm(x, 2, weight, bias, 1e-5, count=10), expected, atol=1e-12)


def test_mean_counts_the_zeros() -> None:
    x = torch.randn(2, 6, 4).double()
    assert torch.allclose(counts.mean(x, (1, 2), counts={1: 9}), padded(x, 1, 9).mean((1, 2)))
    assert torch.allclose(counts.mean(x, -2, True, counts={1: 9}), padded(x, 1, 9).mean(1, keepdim=True))


def test_full_counts_are_torchs_own_norms_also_in_half_precision() -> None:
    x = torch.randn(2, 8, 4, 4).to(torch.bfloat16)
    weight, bias = torch.rand(8).to(torch.bfloat16), torch.rand(8).to(torch.bfloat16)
    found, expected = counts.group_norm(x, 2, weight, bias, count=8), F.group_norm(x, 2, weight, bias)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=3e-2)
    rows = x.flatten(1)[:, :8]
    found, expected = (
        counts.layer_norm(rows, (8,), weight, bias, count=8),
        F.layer_norm(rows, (8,), weight, bias),
    )
    assert torch.allclose(found.float(), expected.float(), atol=3e-2)


class Normed(nn.Module):
    """Layer norm, RMS norm, group norms and a mean over the channels of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.down = conv(3, 16), conv(16, 16), nn.Conv2d(16, 12, 1)
        self.layer, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.one, self.groups = nn.GroupNorm(1, 16), nn.GroupNorm(4, 12)
        self.head = head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mix(self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = x + self.rms(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) / (1 + x.abs().mean(1, keepdim=True))
        return self.head(F.gelu(self.groups(self.down(self.one(x)))))


@pytest.mark.parametrize("seed", range(3))
def test_a_network_of_norms_is_exact(seed: int) -> None:
    model, x = randomize(Normed()).double(), image().double()
    for module in (model.layer, model.one, model.groups):
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.normal_(module.bias, std=0.3)
    graph = trace_channels(model.eval(), x)
    assert [(g.name, g.size) for g in graph] == [("stem.0", 16), ("down", 3)]
    plan = random_plan(graph, seed=seed)
    small, masked, fresh = compact(model, x, plan), mask_channels(model, x, plan), image(3).double()
    assert relative_error(masked(fresh), small(fresh)) <= 1e-9
    assert small.layer.normalized_shape == (small.stem[0].out_channels,)
    small.train()(fresh).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


class Inside(nn.Module):
    """A norm and a mean between two reshapes that spell sizes out: what replaces them must not be taken for these."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mid, self.out = (
            nn.Conv2d(3, 12, 1),
            nn.GroupNorm(2, 12),
            nn.Conv2d(12, 8, 1),
            nn.Linear(4, 5),
        )
        self.flat = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).reshape(-1, 12, 4, 64)
        x = x * (1 + self.norm(x) + x.mean((1, 2), keepdim=True))
        x = self.mid(x).reshape(-1, 8, 256).mean(2) + self.flat(x.mean((2, 3)).reshape(-1, 12))
        return self.out(x.reshape(-1, 2, 4).mean(1))


def test_replacements_are_not_counted_as_calls() -> None:
    model, x = Inside().double(), image().double()
    graph = trace_channels(model, x)
    assert {rule.function for rule in graph.sizes} >= {"reshape", "group_norm", "mean"}
    plan = random_plan(graph)
    small, masked, fresh = compact(model, x, plan), mask_channels(model, x, plan), image(3).double()
    assert relative_error(masked(fresh), small(fresh)) <= 1e-9


def test_channels_under_such_a_norm_carry_no_gate() -> None:
    """A gate hangs where channels are read; a norm reads them without one, so gates would not mean what masks mean."""
    graph = trace_channels(Normed(), image())
    assert not graph["stem.0"].gateable
    assert not graph["down"].gateable


def test_a_norm_over_channels_that_are_not_zero_when_removed_is_frozen() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.head = (
                nn.Linear(16, 12),
                nn.LayerNorm(12),
                nn.Linear(12, 8),
                nn.Linear(8, 5),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.b(self.norm(torch.sigmoid(self.a(x[:, 0, 0]))))))

    graph = trace_channels(Shifted(), image())
    assert [g.name for g in graph] == ["b"]
    assert "counts removed channels that are not zero" in graph.frozen["a.weight[0]"].reason
