"""Duplicates, merging, least squares, fresh weights: against closed formulas and exact constructions."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from lightning_prune import CompactionPlan, compact, mask_channels, max_relative_error, trace_channels
from lightning_prune.errors import CompactionError
from lightning_prune.init import from_scratch, reinitialise
from lightning_prune.reconstruction import reconstruct
from lightning_prune.redundancy import (
    find_duplicate_channels,
    merge_duplicate_channels,
    symmetric_groups,
    warn_if_symmetric,
)
from tests.fit.toys import ToyNet, toy_data


def with_duplicates() -> ToyNet:
    """conv1's channels 3 and 7 repeat 1; conv2's 5 repeats 0 (behind a sigmoid and a flatten)."""
    torch.manual_seed(3)
    net = ToyNet().eval()
    with torch.no_grad():
        for tensor in (net.bn.running_mean, net.bn.weight, net.bn.bias):
            tensor.copy_(torch.rand(12))
        for source, copies in ((1, (3, 7)),):
            for copy in copies:
                for t in (
                    net.conv1.weight,
                    net.conv1.bias,
                    net.bn.weight,
                    net.bn.bias,
                    net.bn.running_mean,
                    net.bn.running_var,
                ):
                    t[copy] = t[source]
        net.conv2.weight[5], net.conv2.bias[5] = net.conv2.weight[0], net.conv2.bias[0]
    return net


def test_exact_duplicates_are_found_and_merge_without_error() -> None:
    net, x = with_duplicates().double(), toy_data(6).tensors[0].double()
    found = find_duplicate_channels(net, x)
    assert [(d.group, d.keep, d.drop) for d in found] == [("conv1", 1, 3), ("conv1", 1, 7), ("conv2", 0, 5)]
    assert all(d.distance == 0 for d in found)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = merge_duplicate_channels(net, x)
    assert result.plan.removed == {"conv1": [3, 7], "conv2": [5], "fc1": []}
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), net(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_near_duplicates_need_a_tolerance() -> None:
    net, x = with_duplicates(), toy_data(6).tensors[0]
    with torch.no_grad():
        net.conv1.weight[3] += 1e-3
    exact = {(d.group, d.drop) for d in find_duplicate_channels(net, x)}
    assert exact == {("conv1", 7), ("conv2", 5)}
    near = {(d.group, d.drop): d.distance for d in find_duplicate_channels(net, x, tolerance=0.02)}
    assert 0 < near["conv1", 3] < 0.02
    merged = merge_duplicate_channels(net, x, tolerance=0.02)
    assert max_relative_error(net, merged.model, x) < 0.05
    with pytest.raises(CompactionError, match="merging 3 duplicate channels changes the outputs"):
        merge_duplicate_channels(net, x, tolerance=0.02, max_error=1e-9)


def test_symmetric_initialisation_is_reported() -> None:
    net, x = ToyNet(), toy_data(2).tensors[0]
    graph = trace_channels(net, x)
    assert symmetric_groups(net, graph) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_symmetric(net, graph)
    for p in (net.conv1, net.conv2):
        nn.init.constant_(p.weight, 0.1)
        nn.init.zeros_(p.bias)
    assert symmetric_groups(net, graph) == {"conv1": 12}, (
        "conv2's readers still differ, so its channels can part"
    )
    with pytest.warns(UserWarning, match=r"conv1 \(12 channels\).*stay identical for ever"):
        warn_if_symmetric(net, graph)
    # and they really do: training leaves them equal
    data, labels = toy_data(48).tensors
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data), labels).backward()
        optimizer.step()
    torch.testing.assert_close(net.conv1.weight[3], net.conv1.weight[8], rtol=1e-4, atol=1e-5)


def plan_for(net: nn.Module, x: torch.Tensor, removed: dict[str, list[int]]) -> CompactionPlan:
    graph = trace_channels(net, x)
    mask = torch.ones(graph.num_channels, dtype=torch.bool).numpy()
    for name, channels in removed.items():
        mask[[graph[name].start + c for c in channels]] = False
    return CompactionPlan.from_mask(graph, mask)


def test_least_squares_replaces_duplicates_without_error() -> None:
    net, x = with_duplicates().double(), toy_data(90).tensors[0].double()
    plan = plan_for(net, x[:2], {"conv1": [3, 7], "conv2": [5]})
    plain = max_relative_error(net, mask_channels(net, x, plan), x)
    fitted, refits = reconstruct(net, x[:2], plan, [x[:45], x[45:]], ridge=1e-12)
    assert [r.module for r in refits] == ["conv2", "fc1"]
    assert max_relative_error(net, fitted, x) < 1e-6 < plain
    smaller = compact(fitted, x[:2], plan)
    assert max_relative_error(fitted, smaller, x) < 1e-9


def test_least_squares_never_fits_worse_on_its_own_data() -> None:
    net, x = ToyNet().eval(), toy_data(96).tensors[0]
    plan = plan_for(net, x[:2], {"conv1": [0, 2, 4], "conv2": [1, 3], "fc1": [0, 1, 2]})
    fitted, refits = reconstruct(net, x[:2], plan, [(x, torch.zeros(96))])
    assert [r.module for r in refits] == ["conv2", "fc1", "fc2"]
    assert all(r.error_after < r.error_before for r in refits)
    with torch.no_grad():
        before = float((mask_channels(net, x, plan)(x) - net(x)).square().mean())
        after = float((fitted(x) - net(x)).square().mean())
    assert after < 0.5 * before
    # dead rows and columns are still exactly zero, so it still compacts
    compact(fitted, x[:2], plan)
    with pytest.raises(ValueError, match="at least one batch"):
        reconstruct(net, x[:2], plan, [])


def test_least_squares_agrees_with_the_normal_equations_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(200, 5, dtype=torch.float64)
    plan = plan_for(net, x[:1], {"0": [2, 6]})
    fitted, _ = reconstruct(net, x[:1], plan, [x], ridge=1e-14)
    hidden = torch.relu(net[0](x))[:, [0, 1, 3, 4, 5, 7]].detach()
    design = torch.cat([hidden, torch.ones(200, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, net[2](net[1](net[0](x))).detach()).solution
    torch.testing.assert_close(
        fitted[2].weight[:, [0, 1, 3, 4, 5, 7]].detach(), solution[:6].T, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(fitted[2].bias.detach(), solution[6], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("init", "variance"),
    [("he_normal", 2 / (64 * 9)), ("glorot_uniform", 2 / (64 * 9 + 128 * 9)), ("gaussian", 1e-4)],
)
def test_initialisations_have_the_published_variance(init: str, variance: float) -> None:
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128))
    nn.init.constant_(net[1].weight, 3.0)
    state = torch.get_rng_state()
    reinitialise(net, init)
    assert torch.equal(torch.get_rng_state(), state)
    n = net[0].weight.numel()
    assert float(net[0].weight.detach().var()) == pytest.approx(variance, rel=6 * math.sqrt(2 / n))
    assert not net[0].bias.any()
    assert torch.equal(net[1].weight.detach(), torch.ones(128))
    with pytest.raises(ValueError, match="init must be one of he_normal"):
        reinitialise(net, "zeros")


def test_from_scratch_uses_the_compact_fans() -> None:
    net = nn.Sequential(nn.Conv2d(3, 200, 3), nn.ReLU(), nn.Conv2d(200, 64, 3))
    x = torch.randn(1, 3, 8, 8)
    plan = plan_for(net, x, {"0": list(range(150))})
    fresh = from_scratch(net, plan, seed=1)
    assert fresh[2].weight.shape == (64, 50, 3, 3)
    assert float(fresh[2].weight.detach().var()) == pytest.approx(2 / (50 * 9), rel=0.05)
    again = from_scratch(net, plan, seed=1)
    assert torch.equal(fresh[2].weight, again[2].weight)


def test_duplicates_by_direction() -> None:
    net = nn.Sequential(nn.Conv2d(1, 5, (3, 1)), nn.ReLU(), nn.Conv2d(5, 2, 1))
    x = torch.randn(1, 1, 6, 6)
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = 2.5 * net[0].weight[1], 2.5 * net[0].bias[1]
        net[0].weight[4], net[0].bias[4] = -net[0].weight[0], -net[0].bias[0]
    rows = torch.cat([net[0].weight.detach().flatten(1), net[0].bias.detach()[:, None]], dim=1).double()
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    assert not find_duplicate_channels(net, x, tolerance=0.1)
    (found,) = find_duplicate_channels(net, x, cosine=0.999)
    assert (found.keep, found.drop) == (1, 3), "a positive multiple; the negative one is none"
    assert found.distance == pytest.approx(0, abs=1e-6)
    threshold = float(cosines[0, 2]) - 1e-6
    if threshold > 0:
        assert any((d.keep, d.drop) == (0, 2) for d in find_duplicate_channels(net, x, cosine=threshold))
    with pytest.raises(ValueError, match=r"cosine must be in \(0, 1\]; got 0"):
        find_duplicate_channels(net, x, cosine=0.0)
