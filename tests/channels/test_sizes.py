"""Sizes that Python code spells out: found by the trial, replaced in the compact network, in every way it is used."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.channels import trace_channels
from lightning_prune.compaction import CompactionPlan, compact, load_compact, mask_channels, save_compact
from tests.channels.networks import conv, head, image, randomize
from tests.compaction.test_compaction import random_plan, relative_error


class Attention(nn.Module):
    def __init__(self, c: int = 24, heads: int = 3, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.size, self.fused = heads, c // heads, fused
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Transformer(nn.Module):
    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.patch, self.norm, self.attention = (
            nn.Conv2d(3, 24, 4, 4),
            nn.LayerNorm(24),
            Attention(fused=fused),
        )
        self.mlp, self.head = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)), nn.Linear(24, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(self.norm(x))
        return self.head(x[:, 0])


class Eager(Transformer):
    def __init__(self) -> None:
        super().__init__(fused=False)


class Uneven(nn.Module):
    """Splits at written-out sizes, by list, by slices and by narrow; a buffer filled in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 14), conv(5, 9), conv(9, 4), head(14 + 13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        first, second = torch.split(x, [5, 9], 1)
        y = self.b(first)
        z = self.c(second[:, :9] + y)
        both = torch.zeros(x.shape[0], 13, *x.shape[2:], dtype=x.dtype)
        both[:, :9] = y
        both[:, 9:13] = z
        return self.head(torch.cat([x.narrow(1, 5, 9), x[:, :5], both], 1))


class Res2Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.stem, self.head = 6, conv(3, 24), head(24)
        self.convs = nn.ModuleList(conv(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x), self.width, 1)
        outs = [parts[0]]
        for part, layer in zip(parts[1:], self.convs, strict=True):
            outs.append(layer(part + outs[-1]))
        return self.head(torch.cat(outs, 1))


class FunctionalDepthwise(nn.Module):
    """Depthwise convolution with ``groups`` and a view written out, and a recurrent state of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.kernel = conv(3, 12), conv(24, 12), nn.Parameter(torch.rand(12, 1, 3, 3))
        self.out = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.a(x), self.kernel, None, 1, 1, 1, 12)
        state = x.new_zeros(x.shape[0], 12, 16, 16)
        for _ in range(2):
            state = self.b(torch.cat([x, state], 1))
        return self.out(F.adaptive_avg_pool2d(state, 4).view(-1, 192))


class Chunked(nn.Module):
    """Halves by chunk, one of them widened: equal parts that stay equal by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 12), conv(6, 6), head(18)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.a(x).chunk(2, 1))
        return self.head(torch.cat([*y, self.b(y[-1])], 1))


HARD = {c.__name__: c for c in (Transformer, Eager, Uneven, Res2Net, FunctionalDepthwise)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HARD)
def test_sizes_are_replaced(name: str, seed: int) -> None:
    model, x = randomize(HARD[name]()).double().eval(), image().double()
    graph = trace_channels(model, x)
    assert graph.sizes
    plan = random_plan(graph, seed=seed)
    small, masked, fresh = compact(model, x, plan), mask_channels(model, x, plan), image(3).double()
    assert relative_error(masked(fresh), small(fresh)) <= 1e-9
    assert relative_error(masked.float()(fresh.float()), small.float()(fresh.float())) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in model.parameters())
    assert isinstance(small, type(model))
    assert "replaced when channels go" in graph.table()


def test_every_attention_channel_is_prunable() -> None:
    graph = trace_channels(Transformer(), image())
    group = graph["attention.qkv"]
    assert group.size == 8  # one offset in query, key and value of all three heads
    assert {(m.tensor, m.dim, m.index.shape[1]) for m in group.members} == {
        ("attention.qkv.weight", 0, 9),
        ("attention.qkv.bias", 0, 9),
        ("attention.proj.weight", 1, 3),
    }


def test_code_that_takes_its_sizes_from_shapes_needs_nothing() -> None:
    model = Chunked()
    graph = trace_channels(model, image())
    assert graph.sizes == ()
    small = compact(model, image(), random_plan(graph))
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]


def test_without_a_trial_sizes_are_unknown() -> None:
    assert trace_channels(Res2Net(), image(), trial=False).sizes == ()


def test_copies_pickles_and_files_keep_the_sizes(tmp_path: Path) -> None:
    model, x = Transformer(), image()
    plan = random_plan(trace_channels(model, x))
    small = compact(model, x, plan).eval()
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(x), small(x))
        assert twin.attention is not small.attention
    del small.attention.heads  # the copies have their own state
    assert twin(x).shape == (2, 5)
    plan.save(tmp_path / "plan.json")
    assert CompactionPlan.load(tmp_path / "plan.json") == plan
    save_compact(twin, plan, tmp_path / "small")
    assert torch.equal(load_compact(Transformer, tmp_path / "small")(x), twin(x))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_a_compact_transformer_exports(strict: bool) -> None:
    model, x = Transformer(), image()
    small = compact(model, x, random_plan(trace_channels(model, x))).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(small, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    fresh = image(5)
    assert relative_error(small(fresh), program.module()(fresh)) <= 1e-6


def test_a_compact_transformer_compiles_in_one_graph() -> None:
    model, x = Transformer(), image()
    small = compact(model, x, random_plan(trace_channels(model, x))).eval()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    assert relative_error(small(x), compiled(x)) <= 1e-6


def test_a_compact_network_trains_with_dropout_paths() -> None:
    """In training mode other constants are made than while tracing: that does not shift the counts of splits."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Res2Net()

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.9)
            return self.inner(x)

    model, x = Dropped(), image(4)
    small = compact(model, x, random_plan(trace_channels(model, x))).train()
    small(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_module_used_with_different_channels_is_frozen_not_wrong() -> None:
    class Twice(nn.Module):
        class Halves(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[:, :4] * 2 + x[:, 4:8]

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.halves, self.head = conv(3, 8), conv(3, 8), self.Halves(), head(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.halves(self.a(x)), self.halves(self.b(x))], 1))

    model, x = Twice(), image()
    graph = trace_channels(model, x)
    if len(graph):
        compact(model, x, random_plan(graph))
    assert any("several sizes" in why.reason for why in graph.frozen.values())
