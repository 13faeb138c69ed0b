"""What a fit says about its own cost, and the bar while latencies are measured."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_prune import ChannelPruning, latency_cost, skipping
from lightning_prune import callback as callback_module
from lightning_prune.live_maps import LiveMaps
from lightning_prune.meter import TrainingMeter
from lightning_prune.ops.availability import extension_available
from tests.fit.test_callback import pruner
from tests.fit.test_latency_budget import clock  # noqa: F401  (a fixture)
from tests.fit.toys import ToyModule, loader, toy_fit, trainer


def test_step_times_leave_out_pauses() -> None:
    now = [0.0]
    meter = TrainingMeter(lambda: now[0])
    for _ in range(2):
        meter.epoch()
        for i in range(5):
            meter.start(10 if i < 4 else 5)
            now[0] += 0.2
            meter.end(30.0, 100.0)
            now[0] += 7.0 if i == 2 else 0.1  # a validation run in the middle
    record = meter.record(torch.device("cpu"))
    assert record["step_time"] == pytest.approx(0.3)
    assert record["samples_per_second"] == pytest.approx(9 / 0.3)
    assert meter.seconds == pytest.approx(2 * (5 * 0.2 + 3 * 0.1 + 7.0)), (
        "whoever does not say that it pauses trains"
    )
    assert record["saved_training_macs"] == pytest.approx(0.7)
    assert meter.macs_dense == 3 * 100 * 90
    again = TrainingMeter(lambda: now[0])
    again.load_state_dict(meter.state_dict())
    assert again.saved == meter.saved
    assert again.record(torch.device("cpu")) == {}, "no step of its own yet"
    again.epoch()
    again.start(4)
    now[0] += 0.5
    again.end(1.0, 1.0)
    assert again.record(torch.device("cpu"))["step_time"] == pytest.approx(0.5)


def test_the_times_of_a_fit_in_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(callback_module, "TrainingMeter", lambda: TrainingMeter(lambda: now[0]))
    callback = pruner()

    class Pass(pl.Callback):
        """A step of the dense network takes 0.4 s, of the pruned one 0.1 s, loading 0.05 s, validation 9 s."""

        def on_before_backward(self, trainer: pl.Trainer, *rest: Any) -> None:
            now[0] += 0.1 if callback.plan else 0.4

        def on_train_batch_end(self, *rest: Any) -> None:
            now[0] += 0.05

        def on_validation_end(self, *rest: Any) -> None:
            now[0] += 9.0

    toy_fit([callback, Pass()], val_check_interval=3)
    report = callback.report
    assert report.step_time_dense == pytest.approx(0.45)
    assert report.step_time == pytest.approx(0.15)
    assert report.samples_per_second == pytest.approx(16 / 0.15)
    steps, epochs = (3 * 6 * 0.4 + 2 * 6 * 0.1), 5
    assert report.training_seconds == pytest.approx(steps + epochs * 4 * 0.05), (
        "two batches load behind a validation"
    )
    assert report.to_json()["training_seconds"] == report.training_seconds
    text = "so far; a step 150 ms, in the dense warmup 450 ms (3.00x); 107 samples/s"
    assert f"training time  {report.training_seconds:.1f} s {text}" in str(report)


class Compiled(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


def counted_fit(
    callback: ChannelPruning, module: ToyModule | None = None, **options: Any
) -> tuple[list[float], float, float]:
    """The saved shares that were logged, and those by masks and by cuts alone."""
    totals = {"mask": 0.0, "cut": 0.0, "dense": 0.0}

    class Count(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            fit = callback._fit
            cut = fit.reconfigurer.mask if fit.reconfigurer is not None else fit._held | True
            for name, mask in (("mask", fit._held), ("cut", cut), ("dense", fit._held | True)):
                totals[name] += fit.macs.cost(mask)

    torch.manual_seed(0)
    trainer([callback, Count()], 5, **options).fit(module or ToyModule(), loader(), loader(24))
    saved = [record["saved_training_macs"] for record in callback.history]
    assert saved[0] == 0, "nothing is saved in the dense warmup"
    assert all(a <= b for a, b in itertools.pairwise(saved))
    report = callback.report
    assert report.saved_training_macs == pytest.approx(saved[-1])
    assert report.training_macs_dense == pytest.approx(3 * 16 * totals["dense"])
    assert "training MACs" in str(report)
    assert f"({saved[-1]:.1%} saved)" in str(report)
    return saved, 1 - totals["mask"] / totals["dense"], 1 - totals["cut"] / totals["dense"]


def always_skip(monkeypatch: pytest.MonkeyPatch, way: int = skipping.SKIP) -> None:
    monkeypatch.setattr(skipping, "_measure", lambda *rest: skipping.Choice(way, way, way))
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)


def test_what_is_cut_is_saved() -> None:
    saved, by_masks, by_cuts = counted_fit(pruner(dead_channel_skipping=False, reconfigure_every_n_epochs=1))
    assert saved[-1] == pytest.approx(by_cuts) != by_masks
    assert saved[-1] > 0.1


def test_channels_that_are_merely_zero_save_nothing() -> None:
    callback = pruner(dead_channel_skipping=False, reconfigure_every_n_epochs=0)
    saved, by_masks, _ = counted_fit(callback)
    assert saved[-1] == 0 < by_masks


@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
@pytest.mark.parametrize("maps", [False, True])
def test_what_is_skipped_is_saved(maps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    always_skip(monkeypatch)
    if not maps:
        monkeypatch.setattr(LiveMaps, "ready", lambda self, call, args: False)
    saved, by_masks, _ = counted_fit(pruner(reconfigure_every_n_epochs=0))
    assert 0.1 < saved[-1] < by_masks, "dense layers are computed in full"


@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
def test_plain_calls_save_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    always_skip(monkeypatch)
    saved, by_masks, _ = counted_fit(pruner(reconfigure_every_n_epochs=0), precision="bf16-mixed")
    assert saved[-1] == 0 < by_masks, "autocast on the CPU"
    saved, by_masks, _ = counted_fit(pruner(reconfigure_every_n_epochs=0), Compiled())
    assert saved[-1] == 0 < by_masks, "torch.compile"
    always_skip(monkeypatch, skipping.FULL)
    monkeypatch.setattr(LiveMaps, "ready", lambda self, call, args: False)
    saved, _, _ = counted_fit(pruner(reconfigure_every_n_epochs=0))
    assert saved[-1] == 0, "all channels were faster"


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("enabled", "rank"), [(True, 0), (False, 0), (True, 1)])
def test_a_bar_while_latencies_are_measured(
    enabled: bool, rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", "off")
    names: list[str] = []
    table = latency_cost._table
    monkeypatch.setattr(latency_cost, "_table", lambda name, *rest: names.append(name) or table(name, *rest))
    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda self: rank == 0))
    callback = ChannelPruning(metric="latency", method="magnitude", warmup_epochs=0, target=0.9)
    toy_fit([callback], max_epochs=1, enable_progress_bar=enabled)
    assert names == ["net.conv1", "net.conv2", "net.fc1", "net.fc2"]
    assert ("Measuring latency" in capsys.readouterr().err) == (enabled and rank == 0)
