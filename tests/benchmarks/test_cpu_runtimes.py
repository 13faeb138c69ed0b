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
    for name in ("cpu_runtimes", "staircase"):  # there is a staircase of the GPU, too
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
