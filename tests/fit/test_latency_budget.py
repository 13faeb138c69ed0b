"""Latency as a budget: the table, the prediction, and the last word of the stopwatch."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_prune import (
    BudgetError,
    ChannelPruning,
    CompactionPlan,
    Latency,
    compare_latency,
    latency_budget,
    latency_cost,
    profile,
    prune_channels,
    trace_channels,
)
from lightning_prune.channels import ChannelGraph
from lightning_prune.compaction import apply_plan
from lightning_prune.latency_budget import select_measured
from lightning_prune.latency_cost import LatencyCost, LayerTable, measure_latency_cost
from tests.fit.toys import ToyModule, loader, trainer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch that no other process disturbs: a nanosecond per multiply-accumulate, and 5 microseconds per call."""

    def seconds(model: nn.Module, x: Tensor) -> Latency:
        return Latency.from_seconds([5e-6 + 1e-9 * profile(model, x).macs])

    monkeypatch.setattr(latency_cost, "measure_latency", lambda model, x, **options: seconds(model, x))
    for module in (latency_cost, latency_budget):
        monkeypatch.setattr(
            module,
            "compare_latency",
            lambda models, x, **options: {n: seconds(m, x) for n, m in models.items()},
        )


class Wide(nn.Module):
    """Big enough that the convolutions are what takes the time; with a depthwise, a grouped and a transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU(),
            nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(),
            nn.Conv2d(96, 64, 3, padding=1, groups=4), nn.ReLU(),
            nn.ConvTranspose2d(64, 48, 2, stride=2), nn.ReLU(),
            nn.Conv2d(48, 4, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def by_hand() -> LatencyCost:
    """Two layers with known times, proportional to their prunable width."""
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    graph = trace_channels(net, torch.randn(1, 2, 4, 4))
    widths, ids = np.array([1.0, 4.0, 8.0]), np.arange(8)
    first = LayerTable("0", np.array([2.0]), widths, 2e-3 * widths[None], np.full(2, -1), ids)
    second = LayerTable("2", widths, np.array([3.0]), 2e-3 * widths[:, None], ids, np.full(3, -1))
    return LatencyCost(graph, (first, second), 2.0, 0.5)


def test_costs_and_marginals_of_a_known_table() -> None:
    cost = by_hand()
    mask = np.ones(8, dtype=bool)
    mask[[1, 5, 6]] = False
    assert cost.dense == pytest.approx(0.5 + 2 * (2e-3 * 8 + 2e-3 * 8))
    assert cost.cost(mask) == pytest.approx(0.5 + 2 * (2e-3 * 5 + 2e-3 * 5))
    np.testing.assert_allclose(cost.marginal(mask), np.full(8, 2 * 4e-3), rtol=1e-9)


def uniform(graph: ChannelGraph, share: float) -> np.ndarray:
    return np.concatenate([np.arange(g.size) < max(1, round(share * g.size)) for g in graph])


@pytest.mark.usefixtures("clock")
def test_the_table_is_measured_once_and_predicts_networks() -> None:
    model, x = Wide().eval(), torch.randn(4, 3, 24, 24)
    graph = trace_channels(model, x)
    seen: list[str] = []
    cost = measure_latency_cost(model, x, graph, lambda done, total, name: seen.append(name))
    assert len(seen) == 6
    again = measure_latency_cost(model, x, graph)
    for a, b in zip(cost.tables, again.tables, strict=True):
        assert np.array_equal(a.seconds, b.seconds), "the second time comes from the cache"
    assert {t.module for t in cost.tables} == {"net.0", "net.2", "net.4", "net.6", "net.8", "net.10"}
    shares = (1.0, 0.6, 0.25)
    dense = 5e-6 + 1e-9 * profile(model, x).macs
    for share in shares:
        mask = uniform(graph, share)
        truth = 5e-6 + 1e-9 * profile(apply_plan(model, CompactionPlan.from_mask(graph, mask)), x).macs
        assert cost.cost(mask) == pytest.approx(truth, abs=0.05 * dense)


@pytest.mark.slow
def test_the_table_predicts_the_order_of_networks_by_the_real_clock() -> None:
    model, x = Wide().eval(), torch.randn(4, 3, 24, 24)
    graph = trace_channels(model, x)
    cost = measure_latency_cost(model, x, graph)
    masks = [uniform(graph, share) for share in (1.0, 0.6, 0.25)]
    plans = [CompactionPlan.from_mask(graph, mask) for mask in masks]
    measured = compare_latency({str(i): apply_plan(model, plan) for i, plan in enumerate(plans)}, x)
    times = [latency.p10 for latency in measured.values()]
    for slow, fast in itertools.pairwise(range(3)):
        assert cost.cost(masks[slow]) > cost.cost(masks[fast])
        assert times[slow] > times[fast]


@pytest.mark.usefixtures("clock")
def test_the_stopwatch_has_the_last_word() -> None:
    """A prediction that is far off: the aim is corrected by what is measured."""
    model, x = Wide().eval(), torch.randn(4, 3, 24, 24)
    graph = trace_channels(model, x)
    aims: list[float] = []

    def too_careful(share: float) -> np.ndarray:
        aims.append(share)
        return uniform(graph, min(1.0, 0.35 + share))

    found = select_measured(model, x, graph, 0.5, too_careful, np.zeros(graph.num_channels))
    mask, share = found.mask, found.share
    assert len(aims) > 1
    assert aims[1] < aims[0] == 0.5
    assert 0.5 * 0.97 <= share <= 0.5
    plan = CompactionPlan.from_mask(graph, mask)
    smaller, dense = profile(apply_plan(model, plan), x).macs, profile(model, x).macs
    assert share == pytest.approx((5e-6 + 1e-9 * smaller) / (5e-6 + 1e-9 * dense))

    def unreachable(share: float) -> np.ndarray:
        raise BudgetError("no")

    with pytest.raises(BudgetError):
        select_measured(model, x, graph, 0.5, unreachable, np.zeros(graph.num_channels))


def test_a_staircase_is_climbed_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in steps of 16 channels of one layer, smooth in another: no common aim meets the target, single widths do."""
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(2, 4)
    graph = trace_channels(model, x)

    def seconds(network: nn.Module) -> float:
        first, second = network[0].out_features, network[2].out_features
        return 16 * -(-second // 16) + 0.25 * first

    def fake(models: dict[str, nn.Module], x: Tensor, **options: object) -> dict[str, Latency]:
        return {name: Latency.from_seconds([seconds(m)]) for name, m in models.items()}

    monkeypatch.setattr(latency_budget, "compare_latency", fake)
    values = np.concatenate([np.linspace(1, 0, 64), np.linspace(1, 0, 64)])
    target = 0.56  # between the steps at 32 (0.5 with equal widths) and 33 channels (0.70)
    found = select_measured(model, x, graph, target, lambda share: uniform(graph, share), values)
    assert 0.97 * target <= found.share <= target
    plan = CompactionPlan.from_mask(graph, found.mask)
    assert found.share == seconds(apply_plan(model, plan)) / seconds(model)
    for group in graph:
        live = found.mask[group.ids]
        assert live[: live.sum()].all(), "the most salient channels of each group"


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("target", [0.7, 0.4])
def test_prune_channels_to_a_latency(target: float) -> None:
    model, x = Wide().eval(), torch.randn(4, 3, 24, 24)
    result = prune_channels(model, x, target=target, metric="latency")
    share = (5e-6 + 1e-9 * profile(result.model, x).macs) / (5e-6 + 1e-9 * profile(model, x).macs)
    assert 0.97 * target <= share <= target


@pytest.mark.usefixtures("clock")
def test_a_fit_to_a_latency() -> None:
    class Module(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3),
            )  # fmt: skip

    callback = ChannelPruning(target=0.7, metric="latency", warmup_epochs=0, learn_epochs=2,
                              example_inputs=torch.zeros(64, 1, 12, 12))  # fmt: skip
    trainer([callback], 3).fit(Module(), loader())
    x = torch.zeros(64, 1, 12, 12)
    module = Module()
    share = profile(callback.compact_model, x).macs / profile(module, x).macs
    assert 0.6 <= share <= 0.7, "one channel of this network is 2 % of it"


def test_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = trainer([], 3)
    monkeypatch.setattr(type(fit), "world_size", property(lambda self: 2))
    with pytest.raises(
        MisconfigurationException, match="metric='latency' measures one device, but the Trainer has 2"
    ):
        ChannelPruning(metric="latency").setup(fit, ToyModule(), "fit")


def test_nothing_to_measure() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(2, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.a.T) @ self.b.T

    with pytest.raises(BudgetError, match="found no convolution or linear layer"):
        prune_channels(Odd(), torch.randn(2, 4), metric="latency")
