"""Batch norm statistics after pruning, against statistics computed by hand in float64."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import ChannelPruning, mask_channels, prune_channels
from lightning_prune.recalibration import recalibrate
from tests.fit.test_callback import pruner
from tests.fit.toys import ToyModule, loader, toy_data, toy_fit, trainer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.b, self.norm_b = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, momentum=0.3)
        self.head, self.free = nn.Linear(6 * 4, 3), nn.BatchNorm1d(3, track_running_stats=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.drop(F.relu(self.norm_a(self.a(x))))
        return self.free(self.head(F.relu(self.norm_b(self.b(x))).flatten(1)))


def batches(count: int = 3) -> list[Tensor]:
    return [3 * torch.randn(7 + i, 1, 6, 6) + i for i in range(count)]


def by_hand(net: Any, data: list[Tensor]) -> dict[str, Tensor]:
    """Means over batches of batch means and unbiased variances; each batch normalised by its own; no dropout."""
    found: dict[str, list[Tensor]] = {"a.m": [], "a.v": [], "b.m": [], "b.v": []}

    def normalise(x: Tensor, norm: nn.BatchNorm2d, key: str) -> Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)
        found[f"{key}.m"].append(mean)
        found[f"{key}.v"].append(var)
        biased = x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (biased[:, None, None] + norm.eps).sqrt()
        return x * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]

    for x in data:
        h = F.conv2d(x.double(), net.a.weight.double(), net.a.bias.double())
        h = F.relu(normalise(h, net.norm_a, "a"))
        normalise(F.conv2d(h, net.b.weight.double(), net.b.bias.double()), net.norm_b, "b")
    return {key: torch.stack(values).mean(0).detach() for key, values in found.items()}


def check(net: Any, data: list[Tensor]) -> None:
    expected = by_hand(net, data)
    for name in ("a", "b"):
        norm = getattr(net, f"norm_{name}")
        torch.testing.assert_close(norm.running_mean.double(), expected[f"{name}.m"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), expected[f"{name}.v"], rtol=1e-4, atol=1e-6)
        assert int(norm.num_batches_tracked) == len(data)


def test_statistics_by_hand_and_nothing_else_changes() -> None:
    net, data = Net(), batches()
    net.drop.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = {name: module.training for name, module in net.named_modules()}
    momenta = (net.norm_a.momentum, net.norm_b.momentum)
    state = torch.get_rng_state()
    assert recalibrate(net, data) == ["norm_a", "norm_b"]
    assert torch.equal(state, torch.get_rng_state())
    check(net, data)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert (net.norm_a.momentum, net.norm_b.momentum) == momenta
    for name, value in net.state_dict().items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(net, [])


def test_statistics_are_averaged_over_ranks() -> None:
    ranks, data = [Net(), Net()], batches(2)
    ranks[1].load_state_dict(ranks[0].state_dict())
    for net, batch in zip(ranks, data, strict=True):
        recalibrate(net, [batch])
    theirs = [v for k, v in ranks[1].state_dict().items() if k.endswith(("running_mean", "running_var"))]
    both = copy.deepcopy(ranks[0])
    waiting = list(theirs)
    recalibrate(both, [data[0]], reduce=lambda mine: (mine + waiting.pop(0)) / 2)
    assert not waiting
    mine = [v for k, v in ranks[0].state_dict().items() if k.endswith(("running_mean", "running_var"))]
    found = [v for k, v in both.state_dict().items() if k.endswith(("running_mean", "running_var"))]
    for a, b, average in zip(mine, theirs, found, strict=True):
        torch.testing.assert_close(average, (a + b) / 2)


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    net = Net()
    net.unused = nn.BatchNorm2d(4)
    net.unused.running_mean.fill_(2.0)
    assert "unused" not in recalibrate(net, batches())
    assert (net.unused.running_mean == 2).all()


def test_prune_channels_recalibrates_the_masked_network() -> None:
    net, data = Net().eval(), batches()
    plain = prune_channels(net, data[0], target=0.4)
    result = prune_channels(
        net, data[0], target=0.4, recalibrate=2, data=[(x, torch.zeros(len(x))) for x in data]
    )
    assert result.plan == plain.plan
    masked = mask_channels(net, data[0], plain.plan)
    expected = by_hand(masked, data[:2])
    kept = [i for i in range(6) if i not in result.plan.removed["b"]]
    torch.testing.assert_close(
        result.model.norm_b.running_mean.double(), expected["b.m"][kept], rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(result.model.norm_b.running_mean, plain.model.norm_b.running_mean)
    assert int(net.norm_b.num_batches_tracked) == 0, "the model given is untouched"
    with pytest.raises(ValueError, match="recalibrate= needs data="):
        prune_channels(net, data[0], recalibrate=True)


@pytest.mark.parametrize("finetune", [0, 1])
def test_in_a_fit_the_last_batches_through_the_masked_network(finetune: int) -> None:
    callback = ChannelPruning(
        target=0.4, method="magnitude", warmup_epochs=2, finetune_epochs=finetune, recalibrate=2
    )
    at_selection: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
            if callback.plan is not None and not at_selection:
                at_selection.append(hand(pl_module))
                torch.testing.assert_close(pl_module.net.bn.running_mean.double(), at_selection[0])

    def hand(module: Any) -> Tensor:
        conv = module.net.conv1
        last = [x for x, _ in loader()][-2:]
        outputs = [F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1) for x in last]
        return torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0).detach()

    module = toy_fit([callback, Watch()], max_epochs=2 + finetune)
    assert len(at_selection) == finetune
    torch.testing.assert_close(module.net.bn.running_mean.double(), hand(module), rtol=1e-4, atol=1e-6)
    x = toy_data(8).tensors[0]
    module.eval()
    torch.testing.assert_close(callback.compact_model(x), module(x), rtol=1e-5, atol=1e-6)


def test_a_fit_resumed_just_before_the_selection_draws_batches(tmp_path: Any) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    options = {"dirpath": tmp_path, "save_top_k": -1, "filename": "{epoch}", "save_on_train_epoch_end": True}
    toy_fit([pruner(recalibrate=True), ModelCheckpoint(**options)], enable_checkpointing=True)
    callback = pruner(recalibrate=True, finetune_epochs=1)
    state: list[bool] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            state.append(int(pl_module.net.bn.num_batches_tracked) == 6)

    fit = trainer([callback, Watch(), ModelCheckpoint(**options)], 4, enable_checkpointing=True)
    fit.fit(ToyModule(), loader(), loader(24), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert state == [True], "statistics of the six batches there are"
