"""How candidates are timed: warm, in turns, not for long; by a clock that only they move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_prune.inference import choice

CPU = torch.device("cpu")
MS = 1e-3


class Machine:
    """Candidates that take the seconds they are given, and more after another one has run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.before, self.calls = 0.0, "", []
        monkeypatch.setattr(choice.time, "perf_counter", lambda: self.now)

    def candidate(self, name: str, seconds: float | list[float], cold: float = 0.0) -> Callable[[], Tensor]:
        def call() -> Tensor:
            taken = seconds if isinstance(seconds, float) else seconds[self.calls.count(name) % len(seconds)]
            self.now += taken + (cold if self.before != name else 0.0)
            self.before = name
            self.calls.append(name)
            return torch.empty(0)

        return call


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0, 10.0])
def test_what_the_others_leave_in_the_caches_does_not_count(scale: float, machine: Machine) -> None:
    calls = {
        "own": machine.candidate("own", 0.8 * scale * MS, cold=scale * MS),
        "vendor": machine.candidate("vendor", scale * MS),
    }
    found = choice._interleaved(calls, CPU)
    assert found == pytest.approx({"own": 0.8 * scale * MS, "vendor": scale * MS})


@pytest.mark.parametrize("milliseconds", [0.01, 0.1, 1.0, 4.0, 25.0, 50.0, 400.0])
@pytest.mark.parametrize("ratio", [1.0, 1.2, 1.45])
def test_measuring_takes_no_longer_than_a_few_calls(
    milliseconds: float, ratio: float, machine: Machine
) -> None:
    calls = {
        name: machine.candidate(name, factor * milliseconds * MS)
        for name, factor in (("own", 1.0), ("vendor", ratio), ("prepacked", 2.9))
    }
    choice._interleaved(calls, CPU)
    assert machine.now <= max(0.15, 50 * milliseconds * MS)
    assert min(map(machine.calls.count, calls)) >= 3  # one to warm up, two that count
    assert machine.calls.count("prepacked") <= 20  # hopeless


def test_candidates_take_turns_however_long_they_are(machine: Machine) -> None:
    calls = {name: machine.candidate(name, 0.2) for name in ("own", "vendor")}
    choice._interleaved(calls, CPU)
    assert machine.calls == ["own", "vendor"] * 4


def test_close_ones_are_measured_twice(machine: Machine) -> None:
    def count(ratio: float) -> int:
        machine.calls.clear()
        calls = {
            name: machine.candidate(name, seconds)
            for name, seconds in (("own", MS), ("vendor", ratio * MS), ("prepacked", 1.3 * MS))
        }
        choice._interleaved(calls, CPU)
        return machine.calls.count("own")

    assert count(1.03) > 1.8 * count(1.2)
