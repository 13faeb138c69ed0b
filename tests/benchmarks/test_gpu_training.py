"""The GPU benchmark of training steps, on the CPU: a row per form, what is compared with what, time boxes, its answers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import record, training
from benchmarks.gpu.timing import Timed
from benchmarks.gpu.training import Case, Forms
from lightning_prune import ops

needs_extension = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_row_per_form(share: float, tmp_path: Path) -> None:
    kept = record.Record(tmp_path, "training", "cpu")
    known = Forms(Case("toy", share, 4, 16), "cpu")
    for wanted in (training.FIRST, training.MORE, training.COMPILED):
        assert training.measure(known, wanted, True, kept)
    content = json.loads(kept.path.read_text())
    rows = {row["form"]: row for row in content["rows"]}
    forms = (*training.FIRST, *training.MORE, *training.COMPILED)
    cut = ("cut", "rounded", "masked", "live_maps")
    if share:
        assert tuple(rows) == tuple(name for name in forms if name != "dense/compiled")
    else:
        assert tuple(rows) == tuple(name for name in forms if not name.startswith(cut))
    assert all(row["median_us"] > 0 for row in rows.values())
    assert all("dense_over_this" in row for name, row in rows.items() if name != "dense")
    assert all("gated_over_this" in row for name, row in rows.items() if name not in training.BESIDE)
    assert all(row["difference_from_masked"] < 1e-4 for name, row in rows.items() if name in training.ALIKE)
    assert len(content["answers"]) == 1
    assert ("small" in content["answers"][0]) == (share > 0)


@needs_extension
def test_gated_forms_are_what_a_fit_runs() -> None:
    known = Forms(Case("toy", 0.5, 4, 16), "cpu")
    form = known.get("gated")
    assert form.hung.obstacle is None
    assert form.held is not None
    training.step_of(form, known.case, "cpu")
    keeper = training.WeightKeeper(form.network, form.held[0])
    keeper.set_mask(form.held[1])
    before = [p.clone() for p in form.network.parameters()]
    keeper.zero_dead()  # they are zero after every step
    assert all(torch.equal(a, b) for a, b in zip(before, form.network.parameters(), strict=True))
    whole, small = known.get("multiplied").network, known.get("cut+gates").network
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    assert any(module._forward_pre_hooks for module in whole.modules())


def test_out_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = record.Record(tmp_path, "training", "cpu")
    known = Forms(Case("toy", 0.0, 4, 16), "cpu")
    monkeypatch.setattr(training, "time_left", lambda: 0.0)
    assert not training.measure(known, training.FIRST, True, kept)
    assert [row["form"] for row in kept.rows] == ["dense"]
    assert not training.measure(known, training.COMPILED, True, kept)
    assert len(kept.rows) == 1


def test_what_takes_too_long_or_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = record.Record(tmp_path, "training", "cpu")
    known = Forms(Case("toy", 0.5, 4, 16), "cpu")
    monkeypatch.setattr(training, "BOX", 0.2)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: time.sleep(20))
    assert training.measure(known, training.COMPILED, True, kept)
    (row,) = kept.rows
    assert row["form"] == "cut/compiled"
    assert row["failed"].startswith("TimeoutError")
    assert training.answers(kept.rows) == []


def test_answers_take_the_best_of_each_peer() -> None:
    def row(form: str, this: float, **beside: float) -> dict[str, Any]:
        times = {form: Timed([this], [this]), **{k: Timed([v], [v]) for k, v in beside.items()}}
        return {**Case("net", 0.5, 64, 32)._asdict(), "form": form, **training.beside(form, times)}

    rows = [
        row("dense", 3.0),
        row("gated", 2.0, dense=3.0),
        row("dense/nchw", 5.0, dense=6.0, gated=4.0),
        row("cut", 2.2, dense=3.0, gated=2.0),
        row("cut/compiled", 1.8, dense=3.0, gated=2.0),
        row("multiplied", 6.0, dense=3.0, gated=2.0),
        {**row("multiplied/nchw", 1.0), "failed": "TimeoutError"},
    ]
    (found,) = training.answers(rows)
    assert found["network"] == "net"
    assert found["dense"] == {"form": "dense/nchw", "over_gated": 1.25}
    assert found["small"] == {"form": "cut/compiled", "over_gated": pytest.approx(0.9)}
    assert found["multiplied"] == {"form": "multiplied", "over_gated": pytest.approx(3.0)}


def test_the_cases_are_those_that_are_asked_for() -> None:
    assert {(c.network, c.size) for c in training.CASES[:6]} == {
        ("resnet20", 32),
        ("vgg16", 32),
        ("resnet18", 64),
    }
    assert {(c.share, c.batch) for c in training.CASES[:6]} == {(0.0, 64), (0.5, 64)}
    assert {c.batch for c in training.CASES[6:12]} == {512}
    for case in training.CASES[:3]:
        network = training.network_of(case)
        assert network(torch.randn(2, 3, case.size, case.size)).shape == (2, 10)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(training, "MORE", ())
    before = torch.backends.cudnn.benchmark
    try:
        training.main()
    finally:
        torch.backends.cudnn.benchmark = before
    content = json.loads((tmp_path / "training.json").read_text())
    assert content["complete"]
    assert [answer["share"] for answer in content["answers"]] == [0.5, 0.0]
