"""Cutting tensors, models and optimizers in place, and undoing it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune import CompactionPlan, compact, mask_channels, trace_channels
from lightning_prune.channels.narrow import NarrowGraph
from lightning_prune.compaction.cuts import Cut
from lightning_prune.compaction.formats import memory_format_of
from lightning_prune.compaction.resize import Resizer
from tests.fit.reconfiguring import NETWORKS


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Cut, torch.Tensor]:
    """A tensor of any rank in any format, and a cut through some of its dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    last = len(shape) == 4 and draw(st.booleans())
    memory_format = torch.channels_last if last else torch.contiguous_format
    tensor = torch.empty(shape, memory_format=memory_format).copy_(torch.randn(shape))
    kept, narrow = [], list(shape)
    for dim in draw(st.sets(st.integers(0, len(shape) - 1))):
        left = sorted(draw(st.sets(st.integers(0, shape[dim] - 1), min_size=1)))
        kept.append((dim, torch.tensor(left), draw(st.sampled_from([0.0, 1.0]))))
        narrow[dim] = len(left)
    return Cut(shape, tuple(narrow), tuple(kept), memory_format_of(tensor)), tensor


@settings(max_examples=60, deadline=None)
@given(cuts())
def test_a_cut_is_indexing_and_widening_puts_it_back(drawn: tuple[Cut, torch.Tensor]) -> None:
    cut, tensor = drawn
    grid = [np.arange(n) for n in cut.shape]
    for dim, left, _ in cut.kept:
        grid[dim] = left.numpy()
    narrow, wide = cut.narrow(tensor), cut.widen(cut.narrow(tensor))
    assert torch.equal(narrow, tensor[np.ix_(*grid)])
    assert narrow.shape == cut.narrow_shape
    assert wide.shape == cut.shape
    assert wide.stride() == tensor.stride(), "in the memory format of the dense tensor"
    inside = torch.zeros(cut.shape, dtype=torch.bool)
    inside[np.ix_(*grid)] = True
    assert torch.equal(wide[inside], tensor[inside])
    zero = torch.zeros(cut.shape, dtype=torch.bool)
    for dim, left, fill in cut.kept:
        gone = torch.ones(cut.shape[dim], dtype=torch.bool)
        gone[left] = False
        zero |= (gone if fill == 0 else torch.zeros_like(gone)).view(
            [-1 if d == dim else 1 for d in range(len(cut.shape))]
        )
    assert torch.equal(wide[~inside], (~zero).float()[~inside])
    assert not cut.widen(narrow, values=False)[~inside].any()


def random_mask(graph: object, seed: int) -> np.ndarray:
    mask = np.random.default_rng(seed).random(graph.num_channels) < 0.6
    for group in graph.groups:
        mask[group.start] = True
    return mask


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_model_in_place_is_the_compact_one(network: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[network]().double().eval(), torch.randn(3, 1, 6, 6, dtype=torch.float64)
    graph = trace_channels(model, x)
    dense, attributes = copy.deepcopy(model), [dict(vars(m)) for m in model.modules()]
    resizer = Resizer(model)
    first = random_mask(graph, 0)
    for mask in (first, first & random_mask(graph, 1)):  # from full size, and from one size to the next
        plan = CompactionPlan.from_mask(graph, mask)
        model.load_state_dict(mask_channels(dense, x, plan).state_dict())
        resizer.resize(plan)
        expected = compact(dense, x, plan)
        torch.testing.assert_close(model(x), expected(x), rtol=1e-12, atol=1e-12)
        assert [p.shape for p in model.parameters()] == [p.shape for p in expected.parameters()]
    resizer.resize(None)
    assert not resizer.narrowed
    assert [t.shape for t in model.state_dict().values()] == [t.shape for t in dense.state_dict().values()]
    for module, before in zip(model.modules(), attributes, strict=True):
        assert {k: v for k, v in vars(module).items() if isinstance(v, int)} == {
            k: v for k, v in before.items() if isinstance(v, int)
        }


def test_directions_of_weight_normalisation_come_back_as_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Conv2d(2, 6, 3)), nn.ReLU(), nn.Conv2d(6, 3, 3)).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    graph = trace_channels(model, x)
    mask = np.arange(graph.num_channels) != 2
    plan = CompactionPlan.from_mask(graph, mask)
    model.load_state_dict(mask_channels(model, x, plan).state_dict())
    before, resizer = model(x), Resizer(model)
    resizer.resize(plan)
    assert model[2].weight.shape == (3, 5, 3, 3)
    torch.testing.assert_close(model(x), before)
    resizer.resize(None)
    torch.testing.assert_close(model(x), before)


def test_gradients_hooks_and_graphs_of_before() -> None:
    """Hooks on a parameter stay, its gradient is cut with it, and a loss that somebody keeps does no harm."""
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(2, 1, 5, 5)
    graph = trace_channels(model, x)
    plan = CompactionPlan.from_mask(graph, np.array([True, False, True, True]))
    model.load_state_dict(mask_channels(model, x, plan).state_dict())
    called: list[tuple[int, ...]] = []
    model[0].weight.register_hook(lambda grad: called.append(tuple(grad.shape)))
    kept = model(x).sum()
    kept.backward()
    gradient = model[0].weight.grad.clone()
    resizer = Resizer(model)
    resizer.resize(plan)
    assert torch.equal(model[0].weight.grad, gradient[[0, 2, 3]])
    model.zero_grad()
    model(x).sum().backward()
    assert called == [(4, 1, 3, 3), (3, 1, 3, 3)]
    torch.testing.assert_close(model[0].weight.grad, gradient[[0, 2, 3]])
    with resizer.full_size():
        assert model[0].weight.shape == model[0].weight.grad.shape == (4, 1, 3, 3)
        assert not model[0].weight[1].any()
    assert model[0].weight.shape == model[0].weight.grad.shape == (3, 1, 3, 3)
    assert kept.requires_grad


def test_positions_of_a_narrow_graph() -> None:
    graph = trace_channels(NETWORKS["plain"](), torch.zeros(1, 1, 6, 6))
    mask = random_mask(graph, 3)
    plan = CompactionPlan.from_mask(graph, mask)
    narrow = NarrowGraph.of(graph, {(s.tensor, s.dim): s.removed for s in plan.slices})
    assert narrow.num_channels == graph.num_channels
    for tensor, shape in graph.tensors.items():
        for dim in range(len(shape)):
            dense = graph.positions(tensor, dim)
            keep = (dense < 0) | mask[dense]
            np.testing.assert_array_equal(narrow.positions(tensor, dim), dense[keep])
            np.testing.assert_array_equal(narrow.here(tensor, dim, np.flatnonzero(~keep).tolist()), [])
            np.testing.assert_array_equal(
                narrow.here(tensor, dim, np.flatnonzero(keep).tolist()), np.arange(keep.sum())
            )
