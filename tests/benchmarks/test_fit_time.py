"""The benchmark of whole fits: its arithmetic, and its quick mode from end to end."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_prune.report import to_text

pytest.importorskip("sklearn")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_ratios_and_gaps_are_paired_by_seed() -> None:
    from fit_time import WIDTH, Result, settings, summary, table

    networks = settings(quick=True, finetune=None)
    masks = [
        Result("article", "masks", s, 0.9 - 0.1 * s, 0.25, [1.0 + s, 2.0 + s, 3.0 + s], [2.0] * 3, 100, 100)
        for s in (0, 1)
    ]
    cut = [Result("article", "cut", s, 0.91 - 0.1 * s, 0.25, [0.5 * t for t in m.epoch_seconds], [1.5] * 3, 40, 100)
           for s, m in enumerate(masks)]  # fmt: skip
    first, second = summary([*masks, *cut], networks)
    assert first["ratio"]["mean"] == 1
    assert first["accuracy_gap"] is None
    assert second["ratio"] == {"mean": 0.5, "half_width": 0.0, "n": 2}
    assert second["wall_ratio"] == {"mean": 0.75, "half_width": 0.0, "n": 2}
    assert second["wall_seconds"]["mean"] == 4.5
    assert second["seconds"]["mean"] == pytest.approx((3.0 + 4.5) / 2)
    assert second["phase_seconds"] == {"warmup": 0.75, "learn": 1.25, "finetune": 1.75}
    assert second["accuracy_gap"]["mean"] == pytest.approx(0.01)
    assert second["accuracy_gap"]["half_width"] == pytest.approx(0.0, abs=1e-12)
    assert second["activation_memory"] == pytest.approx(0.4)
    shown = to_text(table([first, second]), WIDTH)
    assert "4.5 ± 0.0 │  75.0 ± 0.0" in shown  # wall time, then CPU time
    assert "│  50.0 ± 0.0" in shown


def test_seconds_are_of_both_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import fit_time

    now = iter([(1.0, 10.0), (2.0, 14.0), (4.0, 15.0)])
    clocks = SimpleNamespace()
    monkeypatch.setattr(fit_time, "time", clocks)
    watch = fit_time.Stopwatch()
    for tick in (watch.on_train_epoch_start, watch.on_train_epoch_start, watch.on_train_end):
        cpu, wall = next(now)
        clocks.process_time, clocks.perf_counter = (lambda t=cpu: t), (lambda t=wall: t)
        tick(None, None)
    assert (watch.epochs, watch.wall) == ([1.0, 2.0], [4.0, 1.0])


def test_quick_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fit_time

    monkeypatch.setattr(sys, "argv", ["fit_time.py", "--quick", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        fit_time.main()
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert all(way in shown for way in fit_time.WAYS)
    assert {"masks", "skipping"} <= set(fit_time.WAYS)
    assert "1+1+1" in shown
    assert not list(tmp_path.iterdir()), "nothing is written"
