"""Tables and atomic JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from lightning_prune.report import (
    VARIANTS,
    comparison_table,
    human,
    mean_and_spread,
    to_text,
    widths_table,
    write_json,
)


def test_json_round_trip_in_a_new_folder(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a" / "b.json", {"x": [1, 2.5], "y": None})
    assert json.loads(path.read_text()) == {"x": [1, 2.5], "y": None}
    assert os.listdir(path.parent) == ["b.json"]


def test_json_is_as_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    assert write_json(tmp_path / "x.json", 1).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("bad", [math.nan, math.inf, {1, 2}])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, bad: object) -> None:
    path = write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"new": bad})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_failed_rename_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "x.json", {"old": 1})

    def refuse(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk gone"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (999_600, "1 M"), (1_234_567, "1.23 M"), (4.1e9, "4.1 G")],
)
def test_human(number: float, expected: str) -> None:
    assert human(number) == expected


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([0.5]) == (0.5, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        mean_and_spread([])


def test_comparison_table_states_shares_and_speedups() -> None:
    def row(accuracy: list[float], params: int, macs: int, one: float, many: float) -> dict:
        latency = {"64": many, "1": one}
        return {"accuracy_per_seed": accuracy, "params": params, "macs": macs, "latency_ms": latency}

    metrics = {
        "dense": row([0.9, 0.92, 0.94], 1000, 2_000_000, 2.0, 30.0),
        "masked": row([0.9, 0.9, 0.9], 1000, 2_000_000, 2.0, 30.0),
        "compact": row([0.9, 0.9, 0.9], 250, 1_000_000, 1.0, 10.0),
    }
    lines = to_text(comparison_table("T", metrics), width=80).splitlines()
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]]
        for line in lines
        if "│" in line
    }
    assert rows["accuracy, %"] == ["92.00 ± 2.00", "90.00 ± 0.00", "90.00 ± 0.00"]
    assert rows["parameters"] == ["1 k", "1 k", "250 (25 %)"]
    assert rows["MACs"] == ["2 M", "2 M", "1 M (50 %)"]
    assert rows["latency, batch 1"] == ["2.000 ms", "2.000 ms (1.00x)", "1.000 ms (2.00x)"]
    assert rows["latency, batch 64"] == ["30.000 ms", "30.000 ms (1.00x)", "10.000 ms (3.00x)"]
    assert list(rows).index("latency, batch 1") < list(rows).index("latency, batch 64")


def test_five_networks_fit_into_eighty_columns() -> None:
    row = {
        "accuracy_per_seed": [0.9, 0.92],
        "params": 143_000,
        "macs": 4_940_000,
        "latency_ms": {"1": 0.4, "64": 11.0},
    }
    metrics = dict.fromkeys(VARIANTS, row)
    lines = to_text(comparison_table("T", metrics), width=80).splitlines()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    for word in (
        "latency, batch 64",
        "accuracy, %",
        "compact +",
        "kernels",
        "11.000 ms",
        "(1.00x)",
        "91.00",
        "143 k",
    ):
        assert word in text


def test_widths_table() -> None:
    lines = to_text(widths_table("W", {"conv1": (8, 16), "conv2": (0, 4)})).splitlines()
    first = next(line for line in lines if "conv1" in line)
    assert "8" in first
    assert "16" in first
    assert first.count("█") == 10
    assert "█" not in next(line for line in lines if "conv2" in line)
