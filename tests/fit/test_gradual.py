"""Pruning gradually along a ramp, and channels that come back until a point of the learn phase."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune import ChannelPruning, CompactionPlan, TraceError, mask_channels, trace_channels
from lightning_prune.budget import RAMPS, ramped_target
from lightning_prune.choosing import MaskChooser
from lightning_prune.cost import CostModel
from lightning_prune.criteria import CRITERIA, criterion
from lightning_prune.gates import OBDGates, SlimmingGates, TaylorGates
from lightning_prune.learning import MaskLearner
from lightning_prune.schedule import Schedule
from tests.fit.test_callback import flat, pruner
from tests.fit.test_selection import config
from tests.fit.toys import ToyModule, ToyNet, loader, toy_data, toy_fit, trainer


class Masks(pl.Callback):
    """Live and held channels and the present share of the MACs after every batch of the learn phase."""

    def __init__(self, callback: ChannelPruning) -> None:
        self.callback = callback
        self.live: list[np.ndarray] = []
        self.held: list[np.ndarray] = []
        self.shares: list[float] = []

    def on_train_batch_end(self, *unused: Any) -> None:
        fit = self.callback._fit
        if fit.learner is not None:
            self.live.append(fit.learner.mask())
            self.held.append(fit.learner.held())
            self.shares.append(fit.macs.cost(self.live[-1]) / fit.macs.dense)


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_the_cost_follows_the_ramp(method: str, ramp: str) -> None:
    callback = ChannelPruning(
        target=0.4, method=method, ramp=ramp, warmup_epochs=1, learn_epochs=4, method_options={"interval": 2}
    )
    masks = Masks(callback)
    toy_fit([callback, masks], max_epochs=6)
    assert [r["phase"] for r in callback.history] == ["warmup"] + ["learn"] * 4 + ["finetune"]
    assert len(masks.shares) == 24
    for step, share in enumerate(masks.shares, start=1):
        aim = ramped_target(0.4, (step - step % 2) / 24, ramp)
        assert aim - 0.06 <= share <= aim, (
            "met from below at every choice, one channel of this network is up to 6 %"
        )
    assert masks.shares[-1] <= 0.4
    for before, after in zip(masks.live, masks.live[1:], strict=False):
        assert not (after & ~before).any(), "without re-entry masks only shrink"
    assert callback.report.macs_compact <= 0.4 * callback.report.macs_dense


def test_weights_of_gradually_removed_channels_are_zero() -> None:
    callback = ChannelPruning(target=0.4, method="first_k", warmup_epochs=0, learn_epochs=3)
    checked: list[int] = []

    class Zero(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
            learner = callback._fit.learner
            dead = np.flatnonzero(~learner.held()[callback._fit.graph["net.conv1"].ids])
            assert not pl_module.net.conv1.weight[dead].any()
            assert not pl_module.net.conv2.weight[:, dead].any()
            checked.append(len(dead))

    toy_fit([callback, Zero()], max_epochs=3)
    assert checked == sorted(checked)
    assert checked[-1] > checked[0]


def test_one_shot_is_no_learn_phase() -> None:
    assert Schedule.resolve(config(method="magnitude", learn_epochs=0), 9) == Schedule(3, 0, None)
    assert Schedule.resolve(config(method="magnitude", learn_epochs=4), 10) == Schedule(2, 4, None)
    plans = []
    for options in ({}, {"learn_epochs": 0}):
        callback = ChannelPruning(target=0.4, method="magnitude", warmup_epochs=1, **options)
        toy_fit([callback], max_epochs=2)
        assert callback._fit.learner is None
        plans.append(callback.plan)
    assert plans[0] == plans[1]


# ---- re-entry ------------------------------------------------------------------------------------------------------


@pytest.fixture
def turning() -> Iterator[dict[str, bool]]:
    """A criterion that ranks channels by their number, and the other way round once ``turned``."""
    state = {"turned": False}

    @criterion("turning")
    def rank(model: nn.Module, graph: Any, seed: int) -> np.ndarray:
        places = np.concatenate([np.arange(g.size) / g.size for g in graph.groups]) + 0.1
        return 1.2 - places if state["turned"] else places

    yield state
    del CRITERIA["turning"]


@pytest.mark.parametrize(("until", "comes_back"), [(0.9, True), (0.4, False), (0.0, False)])
def test_channels_come_back_until_the_point_and_not_after(
    turning: dict[str, bool], until: float, comes_back: bool
) -> None:
    options = {"interval": 1}
    callback = ChannelPruning(target=0.4, method="turning", warmup_epochs=0, learn_epochs=4, ramp="linear",
                              reentry_until=until, method_options=options)  # fmt: skip
    masks = Masks(callback)

    class Turn(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            turning["turned"] = trainer.current_epoch >= 2

    toy_fit([callback, masks, Turn()], max_epochs=5)
    returned = [i for i, (a, b) in enumerate(zip(masks.live, masks.live[1:], strict=False)) if (b & ~a).any()]
    assert bool(returned) == (until > 0)
    assert all((i + 2) / 24 < until for i in returned)
    last = masks.live[-1][callback._fit.graph["net.conv1"].ids]
    assert last[0] == comes_back, "the first channel was masked, then ranks highest"
    for step, (live, held) in enumerate(zip(masks.live, masks.held, strict=True), start=1):
        assert not (live & ~held).any()
        if step / 24 < until:
            assert held.all(), "weights of masked channels are kept while they may come back"
        else:
            assert np.array_equal(live, held), "what is masked is gone for good from the point on"


def resting(kind: type, net: nn.Module, x: Tensor, channels: list[int]) -> Any:
    graph = trace_channels(net, x)
    gates = kind(net, graph, torch.ones(graph.num_channels, dtype=torch.bool), 0.05)
    mask = torch.zeros(graph.num_channels, dtype=torch.bool)
    mask[channels] = True
    gates.soft = True
    gates.rest(mask)
    gates.attach()
    return graph, gates


@pytest.mark.parametrize("kind", [OBDGates, TaylorGates, SlimmingGates])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_computes_without_resting_channels(kind: type, training: bool) -> None:
    net, x = ToyNet().train(training), toy_data(8).tensors[0]
    channels = [1, 5, 14, 30, 40]
    expected = copy.deepcopy(net)
    graph, gates = resting(kind, net, x, channels)
    live = np.ones(graph.num_channels, dtype=bool)
    live[channels] = False
    masked = mask_channels(expected, x, CompactionPlan.from_mask(graph, live))
    torch.testing.assert_close(net(x), masked(x), rtol=1e-5, atol=1e-6)
    gates.rest(torch.zeros(graph.num_channels, dtype=torch.bool))
    torch.testing.assert_close(net(x), expected(x), rtol=1e-6, atol=1e-7)
    gates.detach()


def test_resting_channels_learn_as_if_they_were_read() -> None:
    """Soft pruning: the gradient of the masked network, passed on to the filters of the masked channels."""
    net = ToyNet().double()
    x, y = toy_data(12).tensors[0].double(), toy_data(12).tensors[1]
    truth = copy.deepcopy(net)
    graph, gates = resting(OBDGates, net, x, [2, 3, 20])
    F.cross_entropy(net(x), y).backward()
    gates.detach()
    keep = torch.ones(graph.num_channels, dtype=torch.float64)
    keep[[2, 3, 20]] = 0
    a, b, c = (keep[g.ids] for g in graph)

    def through(value: Tensor, mask: Tensor) -> Tensor:
        return value + (value * mask - value).detach()

    h = through(F.relu(truth.bn(truth.conv1(x))), a[:, None, None])
    h = through(torch.sigmoid(truth.conv2(h)), b[:, None, None])
    F.cross_entropy(truth.fc2(through(F.relu(truth.fc1(h.flatten(1))), c)), y).backward()
    for (name, found), expected in zip(net.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert net.conv1.weight.grad[2].abs().max() > 0
    assert not net.conv2.weight.grad[:, 2].any(), "nobody read it, so how it is read does not change"


def test_taylor_measures_how_much_a_resting_channel_would_help() -> None:
    net, x = ToyNet().double().eval(), toy_data(12).tensors[0].double()
    y = toy_data(12).tensors[1]
    graph, gates = resting(TaylorGates, net, x, [4])
    F.cross_entropy(net(x), y).backward()
    gates.update(torch.zeros(graph.num_channels))
    gates.detach()

    def loss(gate: float) -> float:
        clone = copy.deepcopy(net)
        with torch.no_grad():
            clone.conv2.weight[:, 4] *= gate
        return float(F.cross_entropy(clone(x), y).detach())

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert float(gates.saliency()[4]) == pytest.approx(slope**2, rel=1e-3)


@pytest.mark.parametrize("method", ["l1", "l0", "vib"])
def test_learned_gates_reopen(method: str) -> None:
    """The loss pulls a gate up again: it was masked, not frozen."""
    net = ToyNet()
    graph = trace_channels(net, toy_data(2).tensors[0])
    outcomes = {}
    for until in (0.0, 0.8):
        settings = config(method=method, target=0.2, reentry_until=until, gate_lr=0.2, weight_l2=0.0)
        cost = _Cost(graph)
        learner = MaskLearner(net, graph, cost, settings, MaskChooser(settings, graph, cost), 100)
        gates = learner.gates
        with torch.no_grad():
            {"l1": gates.parameters()[0], "l0": gates.parameters()[0], "vib": gates.parameters()[0]}[method][
                7
            ] = {"l1": 0.001, "l0": -4.0, "vib": 1e-4}[method]
        learner.step()
        assert not learner.mask()[7]
        assert learner.held()[7] == (until > 0)
        assert float(gates.effective()[7].detach()) == 0
        for _ in range(60):
            for parameter in gates.parameters():
                parameter.grad = torch.zeros_like(parameter)
            gates.parameters()[0].grad[7] = -1.0  # towards an open gate
            learner.step()
        outcomes[until] = learner.mask()[7]
    assert outcomes == {0.0: False, 0.8: True}


class _Cost:
    """One unit per channel: far from the target, so that the controller hardly presses."""

    metric = "macs"

    def __init__(self, graph: Any) -> None:
        self.num_channels = graph.num_channels
        self.dense = float(graph.num_channels)

    def cost(self, mask: Any) -> float:
        return 0.25 * self.dense if mask.dtype != bool else max(0.25 * self.dense, float(mask.sum()))

    def marginal(self, mask: Any) -> np.ndarray:
        return np.ones(self.num_channels)


@pytest.mark.parametrize("method", ["magnitude", "obd", "apoz", "l1"])
def test_resuming_with_resting_channels_is_exact(method: str, tmp_path: Path) -> None:
    def make() -> ChannelPruning:
        options = {} if method == "l1" else {"method_options": {"interval": 1}}
        return ChannelPruning(target=0.4, method=method, warmup_epochs=1, learn_epochs=3, finetune_epochs=1,
                              reentry_until=0.8, gate_lr=0.1, **options)  # fmt: skip

    options = {"dirpath": tmp_path, "save_top_k": -1, "filename": "{epoch}", "save_on_train_epoch_end": True}
    whole, resumed = make(), make()
    reference = toy_fit([whole, ModelCheckpoint(**options)], max_epochs=5, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=False)["callbacks"][whole.state_key]
    assert saved["fit"]["learner"]["gates"]["tensors"]["resting"].any()
    module = ToyModule()
    fit = trainer([resumed, ModelCheckpoint(**options)], 5, enable_checkpointing=True)
    fit.fit(module, loader(), loader(24), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed.plan == whole.plan
    torch.testing.assert_close(flat(module), flat(reference), rtol=1e-6, atol=1e-7)


# ---- branches pressed harder than others ---------------------------------------------------------------------------


def test_penalty_weights_scale_the_penalty_and_the_ranking() -> None:
    net = ToyNet()
    graph = trace_channels(net, toy_data(2).tensors[0])
    strengths = []
    for weights in (None, {"conv.*": 3.0, "conv2": 0.5}):
        settings = config(penalty_weights=weights, gate_lr=0.01, target=0.5)
        cost = CostModel(graph)
        learner = MaskLearner(net, graph, cost, settings, MaskChooser(settings, graph, cost), 100)
        seen: list[Tensor] = []
        learner.gates.update = seen.append  # type: ignore[method-assign]
        learner.controller.multiplier = 1.0
        learner.step()
        strengths.append(seen[0])
    ratio = (strengths[1] / strengths[0]).numpy()
    for group, factor in (("conv1", 3.0), ("conv2", 0.5), ("fc1", 1.0)):
        np.testing.assert_allclose(ratio[graph[group].ids], factor, rtol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "l1"])
def test_penalty_weights_in_a_fit(method: str) -> None:
    widths = []
    for factor in (0.2, 1.0, 5.0):
        callback = ChannelPruning(target=0.5, method=method, warmup_epochs=1, penalty_weights={"net.conv1": factor},
                                  **({"learn_epochs": 8, "gate_lr": 0.05} if method == "l1" else {}))  # fmt: skip
        toy_fit([callback], max_epochs=10 if method == "l1" else 2)
        widths.append(callback.report.widths["net.conv1"][0])
    assert widths[0] >= widths[1] >= widths[2]
    assert widths[0] > widths[2]
    with pytest.raises(TraceError, match="penalty_weights: 'backbone' matches no prunable layer.*net.conv1"):
        toy_fit([pruner(penalty_weights={"backbone": 2.0})])
