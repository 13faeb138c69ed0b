"""The demonstration on a tiny budget: every number and file that it promises is there and consistent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lightning_prune import CompactionPlan, load_compact, profile
from lightning_prune.data import DigitsDataModule
from lightning_prune.demo import TASKS, Task, run_demo
from lightning_prune.plots import plot_gates


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict, Task, str]]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_PRUNE_CACHE", "off")
        yield _run(folder)


def _run(folder: Path) -> tuple[Path, dict, Task, str]:
    task = Task("digits", DigitsDataModule, widths=(8, 8, 12, 12, 24), epochs=(2, 2, 2))
    console = Console(width=160, record=True, quiet=False, force_terminal=False)
    with console.capture() as captured:
        metrics = run_demo(folder, datasets=["digits"], seeds=2, tasks={"digits": task}, console=console)
    return folder, metrics, task, captured.get()


def test_metrics_file_holds_what_is_returned(small_run: tuple[Path, dict, Task, str]) -> None:
    folder, metrics, _, _ = small_run
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    digits = metrics["digits"]
    for variant in ("dense", "masked", "compact", "dense_optimized", "optimized"):
        assert set(digits[variant]["latency_ms"]) == {"1", "64"}
        assert all(value > 0 for value in digits[variant]["latency_ms"].values())
        per_seed = digits[variant]["accuracy_per_seed"]
        assert len(per_seed) == 2
        assert digits[variant]["accuracy"] == pytest.approx(sum(per_seed) / 2)


def test_compact_is_the_masked_network_made_smaller(small_run: tuple[Path, dict, Task, str]) -> None:
    _, metrics, _, _ = small_run
    digits = metrics["digits"]
    assert digits["masked"]["accuracy_per_seed"] == digits["compact"]["accuracy_per_seed"]
    assert digits["max_relative_error"] < 1e-5
    assert digits["masked"]["params"] == digits["dense"]["params"]
    for compact, dense in zip(
        digits["compact"]["macs_per_seed"], digits["dense"]["macs_per_seed"], strict=True
    ):
        assert 0.3 * dense < compact <= 0.505 * dense


def test_optimized_networks_are_the_same_networks(small_run: tuple[Path, dict, Task, str]) -> None:
    _, metrics, _, _ = small_run
    digits = metrics["digits"]
    for fast, plain in (("dense_optimized", "dense"), ("optimized", "compact")):
        assert digits[fast]["accuracy_per_seed"] == pytest.approx(
            digits[plain]["accuracy_per_seed"], abs=0.003
        )
        assert digits[fast]["macs_per_seed"] == digits[plain]["macs_per_seed"]
        assert digits[fast]["params_per_seed"] == digits[plain]["params_per_seed"]


def test_files_give_the_measured_network_again(small_run: tuple[Path, dict, Task, str]) -> None:
    folder, metrics, task, _ = small_run
    data = DigitsDataModule().part("test")
    for seed in (0, 1):
        where = folder / "digits" / f"seed-{seed}"
        loaded = load_compact(task.build(), where / "compact.safetensors")
        with torch.no_grad():
            accuracy = (loaded(data.inputs).argmax(1) == data.labels).double().mean().item()
        assert accuracy == pytest.approx(metrics["digits"]["compact"]["accuracy_per_seed"][seed], abs=0.003)
        assert profile(loaded, data.inputs[:1]).macs == metrics["digits"]["compact"]["macs_per_seed"][seed]
        plan = CompactionPlan.load(where / "plan.json")
        widths = metrics["digits"]["widths_per_seed"][seed]
        assert {g: size - live for g, (live, size) in widths.items() if live < size} == {
            g: len(removed) for g, removed in plan.removed.items() if len(removed)
        }
        assert (where / "gates.png").read_bytes().startswith(b"\x89PNG")
        assert (where / "filters.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "digits" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_tables_are_printed(small_run: tuple[Path, dict, Task, str]) -> None:
    text = small_run[3]
    for word in (
        "accuracy",
        "parameters",
        "MACs",
        "latency, batch 64",
        "live channels",
        "compact against masked",
        "dense optimized",
        "compact + kernels",
        "the pruning fit took",
    ):
        assert word in text


def test_default_tasks_are_the_article_network_on_both_sets() -> None:
    assert set(TASKS) == {"digits", "cluttered"}
    for task in TASKS.values():
        channels, size, _ = task.make_data().input_shape
        assert task.build()(torch.zeros(1, channels, size, size)).shape == (1, 10)


def test_unknown_data_set_and_no_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="datasets must be some of"):
        run_demo(tmp_path / "x", datasets=["mnist"])
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        run_demo(tmp_path / "x", seeds=0)
    assert not (tmp_path / "x").exists()


def test_gates_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_gates([{"epoch": 0, "gates": {}}], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
