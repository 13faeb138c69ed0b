"""Measurements: kept, found again, never trusted blindly; what they decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference import cache as disk
from lightning_prune.inference import choice, optimize, sites
from lightning_prune.inference.sites import ConvSite
from lightning_prune.nn import CompactConv2d
from tests.inference.networks import network

X = torch.randn(1, 3, 8, 8)
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


def site(outputs: int = 5, activation: str = "relu", residual: bool = False) -> ConvSite:
    conv = nn.Conv2d(3, outputs, 3, padding=1).eval()
    return ConvSite("conv", conv, None, activation, residual, (2, 3, 8, 8))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ConvSite]:
    """The sites that are timed, each with a made-up result."""
    seen: list[ConvSite] = []

    def measure(given: ConvSite, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
        seen.append(given)
        return {
            "vendor/contiguous": 4.0,
            "vendor/channels_last": 2.0,
            "own/contiguous": 3.0,
            "own/channels_last": 1.96,
            "prepacked/channels_last": 2.5,
        }

    monkeypatch.setattr(choice, "_measure", measure)
    return seen


def test_a_layer_is_measured_once(measured: list[ConvSite], cache: Path) -> None:
    first = choice.seconds(site(), torch.float32, CPU)
    assert choice.seconds(site(), torch.float32, CPU) == first
    assert (len(measured), len(files(cache))) == (1, 1)


@pytest.mark.parametrize("change", ["outputs", "activation", "residual", "dtype", "threads"])
def test_whatever_changes_the_time_is_in_the_key(change: str, measured: list[ConvSite]) -> None:
    choice.seconds(site(), torch.float32, CPU)
    threads = torch.get_num_threads()
    try:
        if change == "threads":
            torch.set_num_threads(threads + 1)
        changed = {
            "outputs": {"outputs": 6},
            "activation": {"activation": "silu"},
            "residual": {"residual": True},
        }
        choice.seconds(
            site(**changed.get(change, {})), torch.float64 if change == "dtype" else torch.float32, CPU
        )
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2


def test_another_algorithm_is_measured_again(
    measured: list[ConvSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = nn.Conv2d(12, 12, 3, padding=1).eval()

    def seconds() -> None:
        choice.seconds(ConvSite("conv", conv, None, "relu", False, (2, 12, 8, 8)), torch.float32, CPU)

    for known in ("auto", "winograd2", "direct", "auto"):
        monkeypatch.setattr(sites, "algorithm_for", lambda *arguments, known=known: known)
        seconds()
    assert len(measured) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"key": 1, "seconds": {}}',
        "seconds: none",
        "seconds: NaN",
        "seconds: names",
    ],
)
def test_a_damaged_file_is_measured_again_and_mended(
    content: Any, measured: list[ConvSite], cache: Path
) -> None:
    good = choice.seconds(site(), torch.float32, CPU)
    path = files(cache)[0]
    if isinstance(content, str):
        record = json.loads(path.read_text())
        record["seconds"] = {
            "none": None,
            "NaN": {**good, "own/contiguous": float("nan")},
            "names": {"other": 1.0},
        }[content.split()[1]]
        content = json.dumps(record).encode()
    path.write_bytes(content)
    assert choice.seconds(site(), torch.float32, CPU) == good
    assert len(measured) == 2
    assert json.loads(path.read_text())["seconds"] == good


def test_another_layers_file_under_this_name_is_not_believed(measured: list[ConvSite], cache: Path) -> None:
    choice.seconds(site(), torch.float32, CPU)
    path = files(cache)[0]
    record = json.loads(path.read_text())
    record["key"]["threads"] = 99
    path.write_text(json.dumps(record))
    choice.seconds(site(), torch.float32, CPU)
    assert len(measured) == 2


@pytest.mark.parametrize("value", ["off", "0", "none", ""])
def test_without_a_cache(
    value: str, measured: list[ConvSite], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", value)
    for _ in range(2):
        choice.seconds(site(), torch.float32, CPU)
    assert len(measured) == 2
    assert not cache.exists()


def test_a_folder_that_cannot_be_written(
    measured: list[ConvSite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(file))
    assert choice.seconds(site(), torch.float32, CPU)["own/contiguous"] == 3.0
    assert file.read_text() == "in the way"


def test_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_PRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk.cache_folder() == tmp_path / "lightning-prune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert disk.cache_folder() == tmp_path / "me" / ".cache" / "lightning-prune"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC version:  gcc 12.3.0\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95  Release Build\n", "580.95"),
        ("", "CUDA 13000"),
        (None, "CUDA 13000"),
    ],
)  # fmt: skip
def test_another_driver_is_another_environment(
    text: str | None, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "version").write_text(text)
    monkeypatch.setattr(disk, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    disk._driver.cache_clear()
    try:
        assert disk.environment(torch.device("cuda"))["driver"] == version
    finally:
        disk._driver.cache_clear()


def test_ours_must_win_by_three_percent(measured: list[ConvSite]) -> None:
    assert choice.fastest_kind(site(), torch.float32, CPU, "contiguous") == "own"  # 3.0 against 4.0
    assert choice.fastest_kind(site(), torch.float32, CPU, "channels_last") == "vendor"  # 1.96 against 2.0


def test_real_measurements_rank_a_kernel_that_sleeps_last(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    real = CompactConv2d.forward

    def slow(self: CompactConv2d, *args: Any) -> torch.Tensor:
        time.sleep(0.002)
        return real(self, *args)

    monkeypatch.setattr(CompactConv2d, "forward", slow)
    monkeypatch.setattr(optimize, "in_segments", lambda network, batch: [])  # they do not call it
    times = choice.seconds(site(residual=True), torch.float32, CPU)
    assert all(times[f"own/{name}"] > 0.002 for name in choice.FORMATS)
    fast = optimize_for_inference(network("residual"), torch.randn(1, 3, 16, 16))
    assert "own" not in fast.layers.values()


def test_no_layer_is_measured_when_the_choice_is_given(
    measured: list[ConvSite], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("own", "vendor"):
        monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", value)
        assert set(optimize_for_inference(network("plain"), torch.randn(1, 3, 16, 16)).layers.values()) == {
            value
        }
    assert measured == []
    assert not cache.exists()
