"""The benchmark of training steps: who runs, whose times count, and its quick mode from end to end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import ops, trace_channels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One network, of two convolutions; nothing is compiled."""
    import training_step

    def make() -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    monkeypatch.setattr(training_step, "NETWORKS", {"tiny": (make, 8)})
    monkeypatch.setattr(torch, "compile", lambda model: model)


def test_the_fastest_of_each_peer_is_compared_with_ours() -> None:
    from training_step import compared, table

    seconds = {
        "dense nchw": 6e-3, "dense nhwc": 5e-3, "dense compiled": 4e-3, "small nchw": 3e-3, "small nhwc": 3.5e-3,
        "multiplied nchw": 8e-3, "multiplied nhwc": 9e-3, "ours": 2e-3, "reconfigured": 1e-3,
    }  # fmt: skip
    row = compared(seconds)
    assert [row[f"best_{peer}"] for peer in ("dense", "small", "multiplied")] == [
        "dense compiled",
        "small nchw",
        "multiplied nchw",
    ]
    assert [row[f"vs_{peer}"] for peer in ("dense", "small", "multiplied")] == [2.0, 1.5, 4.0]
    assert row["reconfigured_vs_small"] == 3.0
    assert row["milliseconds"]["ours"] == 2.0
    whole = compared({"dense nchw": 2.0, "multiplied nhwc": 3.0, "ours": 1.0})
    assert "vs_small" not in whole
    assert "reconfigured_vs_dense" not in whole
    lines = table(
        [{"network": "net", "dead": 0.5, **row}, {"network": "net", "dead": 0.0, **whole}]
    ).splitlines()
    assert lines[2] == (
        "| net | 50% | 2.0 | 4.0 (compiled) | 2.00 | 3.0 (nchw) | 1.50 | 8.0 (nchw) | 4.00 | 1.0 | 3.00 |"
    )
    assert lines[3] == "| net | 0% | 1000.0 | 2000.0 (nchw) | 2.00 |  |  | 3000.0 (nhwc) | 3.00 |  |  |"


def test_who_takes_part(tiny: None) -> None:
    from training_step import Variants

    always = {"dense nchw", "dense nhwc", "multiplied nchw", "multiplied nhwc", "ours"}
    small = {"small nchw", "small nhwc", "reconfigured"}
    assert set(Variants("tiny", 0.0, 2, False).steps) == always
    assert set(Variants("tiny", 0.0, 2, True).steps) == {*always, "dense compiled"}
    assert set(Variants("tiny", 0.5, 2, True).steps) == {*always, *small, "dense compiled", "small compiled"}


def test_masks_have_their_share_of_every_group() -> None:
    from training_models import random_mask

    graph = trace_channels(nn.Sequential(nn.Conv2d(3, 20, 1), nn.Conv2d(20, 6, 1)), torch.zeros(1, 3, 4, 4))
    (group,) = (g for g in graph.groups if g.size == 20)
    for share, multiple, alive in ((0.0, 1, 20), (0.5, 1, 10), (0.5, 8, 16), (0.75, 8, 8), (1.0, 1, 1)):
        assert random_mask(graph, share, 1, multiple)[group.ids].sum() == alive


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
@pytest.mark.parametrize("threads", [1, 2])
def test_runs_from_end_to_end(
    threads: int,
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import training_step

    def run(*options: str) -> str:
        given = ["--threads", str(threads), "--batch", "4", "--rounds", "2", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["training_step.py", *given, *options])
        before = torch.get_num_threads()
        try:
            training_step.main()
        finally:
            torch.set_num_threads(before)
        return capsys.readouterr().out

    assert "| tiny | 50% |" in run("--quick")
    assert not list(tmp_path.iterdir()), "nothing is written"
    run("--shares", "0.5")
    name = "training_step" if threads == 1 else "training_step-2-threads"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.md", f"{name}.json"}
    text = (tmp_path / f"{name}.md").read_text()
    assert ("wall time" in text) == (threads == 2)
    content: Any = training_step.json.loads((tmp_path / f"{name}.json").read_text())
    times = content["rows"][0]["milliseconds"]
    assert min(times.values()) > 0
    assert content["rows"][0]["vs_dense"] == pytest.approx(
        min(v for k, v in times.items() if k.startswith("dense")) / times["ours"], rel=0.1
    )
