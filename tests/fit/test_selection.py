"""Selection under a budget, scope and schedule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import BudgetError, CostModel, TraceError, prune_channels, trace_channels
from lightning_prune.config import PruneConfig
from lightning_prune.criteria import CRITERIA, saliency
from lightning_prune.schedule import Phase, Schedule
from lightning_prune.scope import protected_channels
from lightning_prune.selection import floor_mask, select_channels


def chain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


NET = chain(3, 24, 32, 40, 8)
GRAPH = trace_channels(NET, torch.randn(1, 3, 6, 6))


@given(
    target=st.floats(0.05, 1.0),
    metric=st.sampled_from(["macs", "params"]),
    round_to=st.sampled_from([1, 2, 4, 8]),
    aware=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_budget_rounding_and_floor_hold(
    target: float, metric: str, round_to: int, aware: float, seed: int
) -> None:
    cost = CostModel(GRAPH, metric)
    values = np.random.default_rng(seed).random(GRAPH.num_channels)
    try:
        mask = select_channels(
            GRAPH, values, cost, target, round_to=round_to, min_channels=2, cost_aware=aware
        )
    except BudgetError:
        smallest = max(2, round_to)
        kept = np.concatenate([np.arange(g.size) < -(-smallest // round_to) * round_to for g in GRAPH])
        assert cost.cost(kept) > target * cost.dense
        return
    assert cost.cost(mask) <= target * cost.dense
    for group in GRAPH:
        live = int(mask[group.ids].sum())
        assert live >= 2
        assert live % round_to == 0 or live == group.size
        # within a group the more salient channel is kept
        kept, gone = values[group.ids][mask[group.ids]], values[group.ids][~mask[group.ids]]
        assert not len(gone) or kept.min() > gone.max()
    if round_to == 1:
        dead = np.flatnonzero(~mask)
        for channel in dead:  # nothing that still fits was left out
            more = mask.copy()
            more[channel] = True
            assert cost.cost(more) > target * cost.dense


def test_protected_and_ineligible_channels() -> None:
    cost = CostModel(GRAPH)
    values = np.linspace(0, 1, GRAPH.num_channels)
    protected = np.zeros(GRAPH.num_channels, dtype=bool)
    protected[GRAPH.groups[0].ids] = True
    eligible = np.ones_like(protected)
    eligible[GRAPH.groups[2].start + 39] = False
    mask = select_channels(GRAPH, values, cost, 0.5, protected=protected, eligible=eligible)
    assert mask[protected].all()
    assert not mask[GRAPH.groups[2].start + 39], "a channel that died stays dead although it ranks highest"


def test_small_case_against_brute_force() -> None:
    graph = trace_channels(chain(2, 4, 5, 3), torch.randn(1, 2, 4, 4))
    cost = CostModel(graph)
    values = np.random.default_rng(3).random(9) + 0.5
    mask = select_channels(graph, values, cost, 0.5)
    best = max(
        (values[list(m)].sum() for m in map(list, _masks(9)) if _valid(graph, cost, m, 0.5)),
    )
    assert values[mask].sum() >= 0.85 * best


def _masks(n: int) -> list[np.ndarray]:
    return [np.array(bits, dtype=bool) for bits in itertools.product([False, True], repeat=n)]


def _valid(graph: object, cost: CostModel, mask: list[bool], target: float) -> bool:
    m = np.array(mask)
    return bool(cost.cost(m) <= target * cost.dense and all(m[g.ids].any() for g in graph))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", sorted(CRITERIA))
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_prune_channels_hits_the_target_with_every_criterion(method: str, metric: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    before = {k: v.clone() for k, v in NET.state_dict().items()}
    result = prune_channels(NET, x, target=0.4, metric=metric, method=method)
    report = result.report
    share = (
        report.macs_compact / report.macs_dense
        if metric == "macs"
        else report.params_compact / report.params_dense
    )
    assert 0.39 <= share <= 0.4
    assert sum(p.numel() for p in result.model.parameters()) == report.params_compact
    assert report.max_relative_error <= 1e-5
    assert all(torch.equal(v, before[k]) for k, v in NET.state_dict().items())


def test_magnitude_is_the_relative_filter_norm() -> None:
    net = chain(3, 6, 7, 2)
    graph = trace_channels(net, torch.randn(1, 3, 6, 6))
    values = saliency("magnitude", net, graph)
    norms = net[0].weight.detach().double().flatten(1).norm(dim=1)
    np.testing.assert_allclose(values[:6], (norms / norms.mean()).numpy(), rtol=1e-12)


def test_first_k_removes_the_first_channels() -> None:
    plan = prune_channels(NET, torch.randn(1, 3, 6, 6), target=0.3, method="first_k").plan
    for removed in plan.removed.values():
        assert removed == list(range(len(removed)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.outer(torch.relu(self.inner(x))))


def test_an_unreachable_budget_names_what_is_kept_whole() -> None:
    graph = trace_channels(Residual(), torch.randn(1, 3, 8, 8))
    cost = CostModel(graph, "macs")
    protected = protected_channels(graph)
    floors = [cost.cost(floor_mask(graph, np.ones(graph.num_channels), 1, 1, p)) for p in (protected, None)]
    found = [f"{floor / cost.dense:.4f}" for floor in floors]
    with pytest.raises(BudgetError) as error:
        select_channels(graph, np.ones(graph.num_channels), cost, 0.05, protected=protected)
    assert found[0] in str(error.value)
    assert (
        f"1 of 2 channel groups are kept whole: stem (residual stream); with all of them it could have {found[1]}"
        in str(error.value)
    )
    assert float(found[1]) < 0.05 < float(found[0])


def test_scope() -> None:
    graph = trace_channels(Residual(), torch.randn(1, 3, 8, 8))
    stream, inner = graph["stem"], graph["inner"]
    assert stream.is_stream
    assert protected_channels(graph)[stream.ids].all()
    assert not protected_channels(graph)[inner.ids].any()
    assert not protected_channels(graph, prune_streams=True).any()
    assert not protected_channels(graph, include="outer")[stream.ids].any(), "any producer names the stream"
    assert protected_channels(graph, include="outer")[inner.ids].all()
    assert protected_channels(graph, exclude="inn.*", prune_streams=True)[inner.ids].all()
    with pytest.raises(TraceError, match="leave nothing"):
        protected_channels(graph, include="inner", exclude="inner")
    with pytest.raises(TraceError, match="prune_streams=True"):
        protected_channels(graph, exclude="inner")


def config(**options: object) -> PruneConfig:
    base: dict[str, object] = {
        "target": 0.5, "metric": "macs", "method": "l1", "plan": None, "warmup_epochs": None, "learn_epochs": None,
        "finetune_epochs": None, "include": None, "exclude": None, "prune_streams": False, "round_to": 1,
        "min_channels": 1, "alternate_every_n_steps": 0, "weight_l1": 0.0, "weight_l2": 0.0, "sphere": False,
        "gate_lr": None, "snap_threshold": 0.02, "method_options": {}, "seed": 0,
        "ratios": None, "reconstruct": False, "rewind_to": None, "remove_branches": False, "ramp": "cubic",
    }  # fmt: skip
    return PruneConfig(**(base | options))  # type: ignore[arg-type]


def test_schedule() -> None:
    schedule = Schedule.resolve(config(), 10)
    assert [schedule.phase(e) for e in range(10)] == [Phase.WARMUP] * 2 + [Phase.LEARN] * 4 + [
        Phase.FINETUNE
    ] * 4
    assert schedule.total is None
    assert Schedule.resolve(config(method="magnitude"), 9) == Schedule(3, 0, None)
    assert Schedule.resolve(config(warmup_epochs=1, learn_epochs=2, finetune_epochs=3), None).total == 6
    assert Schedule.resolve(config(), 1) == Schedule(0, 1, None)
    with pytest.raises(ValueError, match="need 7 epochs"):
        Schedule.resolve(config(warmup_epochs=2, learn_epochs=2, finetune_epochs=3), 6)


def test_ratios_fix_single_layers() -> None:
    x = torch.randn(2, 3, 6, 6)
    result = prune_channels(NET, x, target=0.5, ratios={"0": 0.75, "4": 0.25})
    widths = result.report.widths
    assert widths["0"] == (18, 24)
    assert widths["4"] == (10, 40)
    assert result.report.macs_compact <= 0.5 * result.report.macs_dense
    norms = NET[0].weight.detach().flatten(1).norm(dim=1)
    assert sorted(result.plan.removed["0"]) == sorted(norms.argsort()[:6].tolist())
    with pytest.raises(TraceError, match="ratios: 'nine' matches no prunable layer"):
        prune_channels(NET, x, ratios={"nine": 0.5})
    with pytest.raises(ValueError, match=r"ratios\['0'\] .* got 0"):
        prune_channels(NET, x, ratios={"0": 0})


def test_reconstruction_lowers_the_error_of_a_pruned_network() -> None:
    x = torch.randn(64, 3, 6, 6)
    plain = prune_channels(NET, x, target=0.5).model
    fitted = prune_channels(NET, x, target=0.5, reconstruct=True, data=[x]).model
    with torch.no_grad():
        truth = NET(x)
        assert (fitted(x) - truth).square().mean() < 0.7 * (plain(x) - truth).square().mean()
    with pytest.raises(ValueError, match="reconstruct=True needs data="):
        prune_channels(NET, x, reconstruct=True)
