"""Latency: statistics, interleaving, side effects on the models."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.latency import Latency, compare_latency, measure_latency


class Sleeper(nn.Module):
    """Takes a known time and notes each call."""

    def __init__(self, seconds: float, log: list[str] | None = None, name: str = "") -> None:
        super().__init__()
        self.seconds = seconds
        self.log = [] if log is None else log
        self.name = name
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        time.sleep(self.seconds)
        self.log.append(self.name)
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return x * scale


def test_percentiles_of_known_numbers() -> None:
    latency = Latency.from_seconds([float(i) for i in range(100, -1, -1)])
    assert (latency.p10, latency.median, latency.p90, latency.n) == (10.0, 50.0, 90.0, 101)
    assert latency.milliseconds == 50_000.0
    with pytest.raises(ValueError, match="at least one"):
        Latency.from_seconds([])
    with pytest.raises(AttributeError):
        latency.median = 1.0  # type: ignore[misc]


def test_measures_the_time_of_a_call_in_seconds() -> None:
    latency = measure_latency(Sleeper(0.005), torch.zeros(1), warmup=1, repeats=5, min_seconds=0.0)
    assert latency.n == 5
    assert 0.005 <= latency.p10 <= latency.median <= latency.p90
    assert latency.median < 0.1


def test_goes_on_until_min_seconds() -> None:
    latency = measure_latency(Sleeper(0.002), torch.zeros(1), warmup=0, repeats=1, min_seconds=0.04)
    assert latency.n * latency.p90 >= 0.03
    assert latency.n > 1


def test_candidates_take_turns() -> None:
    log: list[str] = []
    models = {name: Sleeper(0.0, log, name) for name in "abc"}
    result = compare_latency(models, torch.zeros(1), warmup=2, repeats=4, min_seconds=0.0)
    assert log == ["a", "b", "c"] * 6
    assert list(result) == ["a", "b", "c"]
    assert [latency.n for latency in result.values()] == [4, 4, 4]


def test_ratio_of_models_of_known_cost() -> None:
    models = {"slow": Sleeper(0.006), "fast": Sleeper(0.002)}
    result = compare_latency(models, torch.zeros(1), warmup=1, repeats=7, min_seconds=0.0)
    assert 2.0 < result["slow"].median / result["fast"].median < 3.5


def test_eval_and_inference_mode_inside_and_every_flag_back_afterwards() -> None:
    net = nn.Sequential(nn.Dropout(), Sleeper(0.0), nn.BatchNorm1d(2)).train()
    net[2].eval()
    measure_latency(net, torch.randn(4, 2), warmup=1, repeats=2, min_seconds=0.0)
    assert net[1].modes == [(False, True)] * 3
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert int(net[2].num_batches_tracked) == 0


def test_flags_and_threads_come_back_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    model = Failing()
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="no"):
        measure_latency(model, torch.zeros(1), threads=threads + 1)
    assert model.training
    assert torch.get_num_threads() == threads


def test_threads_hold_during_the_measurement() -> None:
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    measure_latency(Counting(), torch.zeros(1), warmup=0, repeats=2, min_seconds=0.0, threads=before + 1)
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


def test_inputs_as_tensor_sequence_or_mapping() -> None:
    x = torch.ones(2)
    for inputs in (x, (x,), [x, 2.0], {"x": x, "scale": 3.0}):
        assert measure_latency(Sleeper(0.0), inputs, warmup=0, repeats=1, min_seconds=0.0).n == 1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        measure_latency(Sleeper(0.0), (1, 2))
    with pytest.raises(ValueError, match="models is empty"):
        compare_latency({}, torch.zeros(1))
    with pytest.raises(ValueError, match="repeats=0"):
        measure_latency(Sleeper(0.0), torch.zeros(1), repeats=0)


def test_on_a_device(device: torch.device) -> None:
    """A hundred times the work takes longer, measured where the work is done."""

    class MatMuls(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n = n

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.n):
                x = x @ x
            return x

    models = {"one": MatMuls(1), "hundred": MatMuls(100)}
    x = torch.eye(256, device=device)
    result = compare_latency(models, x, warmup=2, repeats=5, min_seconds=0.0)
    assert result["hundred"].median > 5 * result["one"].median
