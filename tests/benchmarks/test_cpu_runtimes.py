"""What the CPU benchmarks share: rounds, peers, files; and what a step of the staircase is."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in (
        "cpu_runtimes",
        "cpu_workers",
        "cpu_networks",
        "staircase",
    ):  # there is a staircase of the GPU, too
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_rounds_take_turns_and_end_in_time() -> None:
    from cpu_runtimes import LEAST_CALLS, LEAST_ROUNDS, WARM, take_turns

    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    times = take_turns(calls, 9, 0.0, time.monotonic() + 60)
    assert {name: len(values) for name, values in times.items()} == {"a": 9, "b": 9, "c": 9}
    each, first = WARM + LEAST_CALLS, 3 * (WARM + 1)  # each call is warmed up, then timed
    rounds = [order[i : i + 3 * each : each] for i in range(first, len(order), 3 * each)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    late = take_turns(calls, 9, 0.0, time.monotonic() - 1)
    assert {len(values) for values in late.values()} == {LEAST_ROUNDS}


def test_slow_calls_cost_what_they_take() -> None:
    from cpu_runtimes import take_turns

    def busy() -> None:
        end = time.process_time() + 2e-3
        while time.process_time() < end:
            pass

    times = take_turns({"busy": busy}, 5, 1e-3, time.monotonic())
    assert all(2e3 <= value < 2e4 for value in times["busy"])


def test_missing_peers_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import cpu_runtimes

    monkeypatch.setattr(cpu_runtimes, "PACKAGES", {"absent": ("no_such_package",), "here": ("pytest",)})
    found, versions, missing = cpu_runtimes.installed(["torch", "absent", "here"], "native")
    assert found == ["torch", "here"]
    assert versions == {"pytest": pytest.__version__}
    assert "no_such_package" in missing["absent"]
    found, _, missing = cpu_runtimes.installed(["torch", "here"], "avx2")
    assert found == ["torch"]
    assert "cannot be capped" in missing["here"]


def test_results_are_a_table_and_json(tmp_path: Path) -> None:
    from cpu_runtimes import write

    write(tmp_path / "new", "name", ["# Title\n"], {"cpu": "x", "features": {}}, "| a |", [1])
    assert (tmp_path / "new" / "name.md").read_text() == "# Title\n\n- cpu: x\n\n| a |\n"
    content = json.loads((tmp_path / "new" / "name.json").read_text())
    assert content == {"environment": {"cpu": "x", "features": {}}, "results": [1]}


def test_a_violation_is_a_width_dearer_than_a_larger_one() -> None:
    from staircase import violations

    found = violations([1, 2, 3, 4], [10.0, 14.0, 10.4, 10.0])
    assert found == [{"channels": 2, "dearer_than": 4, "by": 0.4}]


def test_the_best_peer_of_a_width_may_be_padded() -> None:
    from staircase import OURS, over_best_peer

    channels = [4, 6, 8]
    times = {OURS: [1.0, 1.0, 1.0], "ragged": [8.0, 9.0, 3.0], "other": [2.0, 7.0, 4.0]}
    # 2 as it is; 3 padded to 8; 3
    assert over_best_peer(channels, times) == pytest.approx(18 ** (1 / 3))
    assert over_best_peer(channels, {OURS: times[OURS]}) is None


def test_processors_of_one_name_differ() -> None:
    from lightning_prune.processor import processor

    lines = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fpu vme\n\nprocessor\t: 1\n"
    assert processor(lines) == "AMD EPYC (family 26, model 2)"
    assert processor("processor : 0\nBogoMIPS : 50\nCPU part : 0xd0c\n") != ""


class _Runner:
    """Stands for a worker: it says how long a call took."""

    def __init__(self, runtime: str, seconds: dict[str, float], log: list[tuple[str, str]]) -> None:
        self.runtime, self.seconds, self.variants, self.log = runtime, seconds, list(seconds), log

    def time(self, variant: str) -> tuple[float, float]:
        self.log.append((self.runtime, variant))
        return self.seconds[variant], 2 * self.seconds[variant]


@pytest.mark.parametrize("threads", [1, 2])
def test_who_is_far_behind_leaves_the_race(threads: int) -> None:
    from cpu_runtimes import LEAST_ROUNDS
    from cpu_workers import OURS, race

    log: list[tuple[str, str]] = []
    runners = [
        _Runner(OURS, {"ragged": 9.0}, log),  # slower than everybody, and stays
        _Runner("near", {"ragged": 1.2, "padded": 1.0, "dense": 7.0}, log),
        _Runner("far", {"ragged": 1.4, "padded": 1.25, "dense": 10.0}, log),
        _Runner("eager", {"ragged": 3.0}, log),
    ]
    stay = {("eager", "ragged")}
    times = race(runners, 9, threads, [("ragged", "padded"), ("dense",)], stay, time.monotonic() + 60)
    counts = {key: len(seconds) for key, seconds in times.items()}
    few = {("far", "ragged"), ("far", "dense")}
    assert counts == {key: LEAST_ROUNDS if key in few else 9 for key in counts}
    assert times["near", "padded"] == [1.0 if threads == 1 else 2.0] * 9  # process time, wall time
    each = len(counts)
    rounds = [log[i : i + each] for i in range(0, each * LEAST_ROUNDS, each)]
    assert all(sorted(turns) == sorted(counts) for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 1
    late = race(runners, 9, threads, [("ragged", "padded")], (), time.monotonic() - 1)
    assert {len(seconds) for seconds in late.values()} == {LEAST_ROUNDS}


def test_a_ratio_compares_calls_of_the_same_round() -> None:
    from cpu_networks import ratios

    times = {
        ("ours", "ragged"): [1.0, 2.0, 4.0, 1.0],
        ("near", "padded"): [2.0, 4.0, 8.0, 2.0],  # twice ours in every round, though medians differ by more
        ("near", "ragged"): [2.5, 5.0, 10.0, 2.5],
        ("gone", "ragged"): [5.0, 10.0],
        ("eager", "ragged"): [3.0, 6.0, 12.0, 3.0],
        ("near", "dense"): [6.0, 12.0, 24.0, 6.0],
    }
    found = ratios(times)
    assert (found["best_peer"], found["ratio"]) == ("near", 2.0)
    assert (found["over_eager"], found["over_unpruned"]) == (3.0, 6.0)
    assert found["best_peer_ms"] == 3000.0
    assert "rounded_ratio" not in found


def test_what_each_runtime_is_given() -> None:
    from cpu_networks import RACES, VARIANTS, variants

    peers = ("eager", "eager channels_last", "oneDNN prepacked", "ONNX Runtime", "OpenVINO")
    for batch in (1, 8):
        for threads in (1, 2):
            for runtime in peers:
                given = variants("ResNet-18", runtime, batch, threads, False)
                assert {"ragged", "padded"} <= set(given) <= set(VARIANTS)
    assert "dense" in variants("ResNet-18", "OpenVINO", 8, 1, False)
    assert variants("VGG-16-BN", "torch.compile", 8, 1, False) == ["ragged"]
    assert sorted(v for race in RACES for v in race) == sorted(VARIANTS)
