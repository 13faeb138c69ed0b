"""What a fit says about its own cost, and the bar while latencies are measured."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_prune import ChannelPruning, latency_cost
from lightning_prune.meter import TrainingMeter
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


def test_logged_and_counted_in_a_fit() -> None:
    callback = pruner(method="magnitude", method_options={"interval": 1})
    counted = [0.0, 0.0]

    class Count(pl.Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            fit = callback._fit
            mask = fit.plan.mask(fit.graph) if fit.plan else fit.mask()
            counted[0] += 3 * len(batch[0]) * fit.macs.cost(mask)
            counted[1] += 3 * len(batch[0]) * fit.macs.dense

    torch.manual_seed(0)
    fit = trainer([callback, Count()], 5)
    fit.fit(ToyModule(), loader(), loader(24))
    for key in ("step_time", "samples_per_second", "saved_training_macs"):
        assert float(fit.callback_metrics[f"prune/{key}"]) > 0
        assert key in callback.history[-1]
    assert callback.history[0]["saved_training_macs"] == 0, "nothing is saved in the dense warmup"
    saved = [record["saved_training_macs"] for record in callback.history]
    assert all(a <= b for a, b in itertools.pairwise(saved))
    assert saved[-1] == pytest.approx(1 - counted[0] / counted[1])
    assert callback.report.training_macs == pytest.approx(counted[0])
    assert callback.report.training_macs_dense == pytest.approx(counted[1])
    assert "training MACs" in str(callback.report)
    assert callback.report.to_json()["training_macs"] == callback.report.training_macs


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
