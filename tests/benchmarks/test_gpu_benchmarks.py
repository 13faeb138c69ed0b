"""The GPU benchmarks' logic: statistics with a fake clock, roofline arithmetic, what is measured, what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import (
    ceilings,
    layers,
    networks,
    peers,
    record,
    run_all,
    sanitized,
    shapes,
    staircase,
    tiles,
    timing,
)
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops.availability import CanRun


class Clock:
    """Every reading is one step later than the one before."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_a_sample_is_the_time_of_a_pass_over_its_buffers() -> None:
    seen: list[int] = []
    buffers = [(torch.full((1,), float(i)),) for i in range(4)]
    loop = timing.Loop(lambda x: seen.append(int(x)), buffers, clock=Clock(2.0))
    seen.clear()
    assert loop.sample() == 0.5  # two readings 2 s apart, four calls between them
    assert seen == [0, 1, 2, 3]


def test_candidates_take_turns_and_both_series_have_enough_samples() -> None:
    order: list[str] = []

    def sampler(name: str, seconds: float) -> timing.Sampler:
        def sample() -> float:
            order.append(name)
            return seconds

        return sample

    timed = timing.interleaved(
        {"a": sampler("a", 1e-3), "b": sampler("b", 3e-3)}, samples=2, min_seconds=5e-3
    )
    # (1 + 3) ms a round, 5 ms wanted per candidate: three rounds in each series, after one untimed call of each.
    assert order == ["a", "b"] * 7
    assert (timed["a"].first, timed["a"].second) == ([1e-3] * 3, [1e-3] * 3)
    assert timed["b"].median == 3e-3


def test_noise_is_the_difference_between_the_two_series() -> None:
    timed = timing.Timed([1.0, 1.0, 5.0], [1.1, 1.1, 1.0])
    assert timed.noise == pytest.approx(0.1)
    row = timed.as_row()
    assert row["median_us"] == pytest.approx(1.05e6)
    assert row["samples_us"] == [[1e6, 1e6, 5e6], [1.1e6, 1.1e6, 1e6]]
    assert row["p10_us"] < row["median_us"] < row["p90_us"]


def test_buffers_exceed_the_cache() -> None:
    for bytes_per_call in (1e4, 1e6, 7e7, 1e9):
        count = timing.buffers_needed(bytes_per_call, 60e6)
        assert 2 <= count <= timing.MAX_BUFFERS
        assert count == timing.MAX_BUFFERS or count * bytes_per_call > timing.BEYOND_CACHE * 60e6


def test_roofline_of_known_layers() -> None:
    # 64 -> 64, 56x56, 32 images: 2 * 32 * 3136 * 64 * 576 operations, two maps of 12.8 MB.
    layer = shapes.layer("conv3x3", 64, 32)
    assert layer.flops == 7_398_752_256
    assert layer.bytes() == 2 * (2 * 32 * 3136 * 64 + 64 * 576 + 64)
    floor = shapes.floor_seconds(layer, 790e12, 4.3e12)
    assert floor["bound"] == "compute"
    assert floor["floor_us"] == pytest.approx(9.37, abs=0.01)
    assert shapes.floor_seconds(shapes.layer("pointwise", 64, 32), 790e12, 4.3e12)["bound"] == "memory"
    deep = shapes.layer("depthwise", 37, 1)
    assert deep.flops == 2 * 3136 * 37 * 9
    assert deep.weight_shape == (37, 1, 3, 3)


def test_padded_and_dense_forms() -> None:
    layer = shapes.layer("conv3x3", 37, 8)
    assert (layer.with_padding().inputs, layer.with_padding().outputs, layer.dense().inputs) == (40, 40, 64)
    deep = shapes.layer("depthwise", 101, 8)
    assert (deep.with_padding().groups, deep.dense().groups, deep.dense().outputs) == (104, 128, 128)
    point = shapes.layer("pointwise", 97, 8)
    assert (point.dense().outputs, point.with_padding().outputs, point.with_padding().inputs) == (
        512,
        512,
        104,
    )
    aligned = shapes.layer("aligned", 64, 8)
    assert aligned.with_padding() == aligned


def test_selection_covers_what_it_promises() -> None:
    every = shapes.selection(full=True)
    wanted = {
        (k, w, b)
        for k in shapes.KINDS[:3]
        for w in (*range(33, 41), *range(97, 105))
        for b in (1, 8, 32, 256)
    }
    assert wanted <= {(layer.kind, layer.inputs, layer.batch) for layer in every}
    assert len(set(every)) == len(every)
    assert every[:6] == shapes.selection()[:6]
    assert {layer.kind for layer in shapes.selection(quick=True)} == set(shapes.KINDS)


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_candidates_compute_the_same_layer(kind: str) -> None:
    layer = shapes.tiny(shapes.layer(kind, 64 if kind == "aligned" else 37, 8))
    found = peers.candidates(layer, "cpu", torch.float32, cache=1e4)
    assert [c.name for c in found][:2] == ["vendor", "own" if kind == "aligned" else "vendor_padded"]
    exact = peers.exact(layer, found[0], peers.convolution(layer, "cpu", torch.float32))
    assert exact.std() > 0.1
    for candidate in found:
        assert len({tuple(a[0].shape) for a in candidate.arguments}) == 1
        assert not torch.equal(candidate.arguments[0][0], candidate.arguments[1][0])
        if candidate.name != "dense":
            assert peers.relative_error(layer, candidate, exact) < 1e-5, candidate.name
    padded = {c.name: c for c in found}.get("vendor_padded")
    if padded is not None:  # spare lanes are zero on the way in and on the way out
        x = padded.arguments[0][0]
        assert (x.shape[1], float(x[:, 37:].abs().max())) == (40, 0.0)
        assert kind == "pointwise" or float(padded.call(*padded.arguments[0])[:, 37:].abs().max()) == 0.0


def test_a_wrong_candidate_is_seen() -> None:
    layer = shapes.tiny(shapes.layer("conv3x3", 37, 2))
    vendor = peers.candidates(layer, "cpu", torch.float32, cache=1e4)[0]
    exact = peers.exact(layer, vendor, peers.convolution(layer, "cpu", torch.float32))
    wrong = peers.Candidate("own", lambda x: vendor.call(x) * 1.01, vendor.arguments, layer.outputs)
    assert peers.relative_error(layer, wrong, exact) == pytest.approx(0.01, rel=1e-3)
    wrong.call = lambda x: vendor.call(x) * float("nan")
    assert peers.relative_error(layer, wrong, exact) != peers.relative_error(layer, wrong, exact)


def row_of(vendor: float, padded: float | None, floor: float = 10.0) -> dict[str, object]:
    times = {"vendor": {"median_us": vendor}, "own": {"median_us": 5.0}}
    if padded is not None:
        times["vendor_padded"] = {"median_us": padded}
    return {"candidates": times, "floor_us": floor, "inputs": 37}


def test_share_of_the_loss_that_padding_recovers() -> None:
    assert layers.recovered(row_of(30.0, 15.0)) == 0.75
    assert layers.recovered(row_of(30.0, 30.0)) == 0.0
    assert layers.recovered(row_of(30.0, None)) is None
    assert layers.recovered(row_of(9.0, 8.0)) is None


def test_staircase_order_series_and_plot(tmp_path: Path) -> None:
    order = staircase.coarse_to_fine(30, 65)
    assert order[:4] == [32, 48, 64, 40]
    assert sorted(order) == list(range(30, 66))
    rows = [{**row_of(30.0, 15.0), "inputs": 37}, {**row_of(20.0, None), "inputs": 32}]
    lines = staircase.series(rows)
    assert lines["vendor"] == [(32, 20.0), (37, 30.0)]
    assert lines["vendor_padded"] == [(32, 20.0), (37, 15.0)]
    pytest.importorskip("matplotlib")
    assert staircase.plot(rows, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_forced_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiles.VARIABLE, "7")
    monkeypatch.delenv(peers.GROUPS, raising=False)
    for choice in (None, "3:2"):
        with record.variables(**{tiles.VARIABLE: choice, peers.GROUPS: "1"}):
            assert (os.environ.get(tiles.VARIABLE), os.environ[peers.GROUPS]) == (choice, "1")
        assert (os.environ[tiles.VARIABLE], peers.GROUPS in os.environ) == ("7", False)
    assert len(tiles.choices(shapes.layer("conv3x3", 37, 1))) == 4 * tiles.TILES
    assert len(tiles.choices(shapes.layer("conv3x3", 37, 32))) == tiles.TILES
    assert tiles.best({"chosen": 3.0, "1:1": 2.0, "2:1": 4.0}) == ("1:1", 1.5)


def test_the_tiles_that_are_forced_are_those_of_the_kernels() -> None:
    source = (run_all.ROOT / "csrc/kernels/cuda/tensor_plan.h").read_text()
    table = source.split("kTiles[] = {")[1].split("};")[0]
    rows = [line for line in table.splitlines() if line.strip().startswith("{")]
    groups = [number for number, line in enumerate(rows) if "true" in line]
    assert len(rows) == tiles.TILES
    assert not set(sanitized.WARP_TILES) & set(groups)
    assert set(sanitized.GROUP_TILES) <= set(groups)
    # Of both kinds the largest and the smallest.
    assert {0, min(groups) - 1} <= set(sanitized.WARP_TILES)
    assert {min(groups), max(groups)} <= set(sanitized.GROUP_TILES)
    forced = {
        (dtype, int(choice.split(":")[0]))
        for _, dtype, _, choices in sanitized.calls(quick=True, groups=True)
        for choice in choices
        if choice
    }
    assert {(torch.bfloat16, tile) for tile in (*sanitized.WARP_TILES, *sanitized.GROUP_TILES)} <= forced
    assert {tile for dtype, tile in forced if dtype == torch.float32} == set(sanitized.WARP_TILES)


def network_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A case, and what the file held after every candidate."""
    written: list[dict[str, Any]] = []
    real = record.Record.save

    def save(self: record.Record) -> None:
        real(self)
        written.append(json.loads(self.path.read_text()))

    monkeypatch.setattr(record.Record, "save", save)
    pruned = networks.Variants("toy", 0.5, 16)
    kept = record.Record(tmp_path, "networks", "cpu")
    case = ("toy", 0.5, 2)
    return networks.measure(case, pruned, "cpu", 16, True, torch.bfloat16, kept), written


def test_a_network_in_the_dtype_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, written = network_row(tmp_path, monkeypatch)
    assert not row["failed"]
    wanted = [
        "odd",
        "odd/optimized",
        "odd/own",
        "odd/padded",
        "rounded",
        "dense",
        "rounded/optimized",
        "dense/optimized",
    ]
    assert list(row["candidates"]) == wanted
    assert all(c["median_us"] > 0 and c["error"] < 0.05 for c in row["candidates"].values())
    assert row["macs_odd"] <= 0.5 * row["macs_dense"]
    assert "odd/optimized" in networks.line(row)
    assert set(row["layers"]["odd/own"].values()) == {"own"}
    assert "padded" in row["layers"]["odd/padded"].values()
    assert row["complete"]
    assert row["interleaved"]
    # What is killed after its second candidate has two of them, with times.
    first = [w["rows"][0]["candidates"] for w in written if w["rows"] and w["rows"][0]["candidates"]]
    assert [list(c) for c in first[:2]] == [wanted[:1], wanted[:2]]
    assert all("median_us" in c for c in first[1].values())


def test_networks_without_our_kernels_measure_torch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "kernels_run", lambda device, dtype: CanRun(False, "not built"))
    row, _ = network_row(tmp_path, monkeypatch)
    assert list(row["candidates"]) == ["odd", "odd/padded", "rounded", "dense"]


def test_a_failing_candidate_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr(networks, "optimized", fails)
    row, _ = network_row(tmp_path, monkeypatch)
    assert row["failed"]["odd/optimized"] == "ValueError: no such luck"
    assert all("median_us" in row["candidates"][name] for name in ("odd", "odd/own", "rounded", "dense"))


def test_candidates_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def convolve(x: Tensor, weight: Tensor, *place: Any) -> Tensor:
        bias, stride, padding, dilation, groups = place
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def convolve_add(x: Tensor, weight: Tensor, z: Tensor, alpha: float, *place: Any) -> Tensor:
        bias, stride, padding, dilation, groups = place
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)

    seen: list[str | None] = []
    real = CompactConv2d.forward

    def forward(self: CompactConv2d, *given: Tensor) -> Tensor:
        seen.append(os.environ.get(peers.GROUPS))
        return real(self, *given)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolve)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolve_add)
    monkeypatch.setattr(peers.FusedVendor, "exists", lambda device: True)
    monkeypatch.setattr(peers, "warp_groups", lambda device, dtype: True)
    monkeypatch.setattr(CompactConv2d, "forward", forward)
    monkeypatch.delenv(peers.GROUPS, raising=False)
    for kind in ("conv3x3", "pointwise", "depthwise"):
        layer = shapes.tiny(shapes.layer(kind, 37, 8))
        found = {c.name: c for c in peers.candidates(layer, "cpu", torch.float32, cache=1e4)}
        assert set(found) == {"vendor", "vendor_padded", "vendor_fused", "own", "dense"} | (
            set() if kind == "depthwise" else {"own_groups"}
        )
        exact = peers.exact(layer, found["vendor"], peers.convolution(layer, "cpu", torch.float32))
        for name in ("vendor_fused", "own", "own_groups"):
            seen.clear()
            if name in found:
                assert peers.relative_error(layer, found[name], exact) < 1e-5, name
                found[name].loop()
                assert set(seen) <= {"1" if name == "own_groups" else None}
                assert len(seen) == (0 if name == "vendor_fused" else 3)


def test_a_layer_without_our_kernel_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = CanRun(False, "not built")
    monkeypatch.setattr(peers, "kernels_run", lambda device, dtype: refusal)
    monkeypatch.setattr(layers, "kernels_run", lambda device, dtype: refusal)
    layer = shapes.tiny(shapes.layer("conv3x3", 37, 2))
    row = layers.measure(layer, "cpu", torch.float32, {"float32": 1e9, "copy": 1e9}, True, False)
    assert "own" not in row["candidates"]
    assert row["failed"] == {"own": "not built"}
    assert row["candidates"]["vendor_padded"]["median_us"] > 0


def test_records_are_complete_json_after_every_row(tmp_path: Path) -> None:
    kept = record.Record(tmp_path, "some", "cpu", note=1)
    kept.add(value=1.5)
    content = json.loads((tmp_path / "some.json").read_text())
    assert (content["complete"], content["rows"], content["note"]) == (False, [{"value": 1.5}], 1)
    assert content["environment"]["torch"] == torch.__version__
    kept.finish()
    assert json.loads((tmp_path / "some.json").read_text())["complete"]


def test_ceilings_of_a_finished_file_are_reused(tmp_path: Path) -> None:
    kept = record.Record(tmp_path, "ceilings", "cpu")
    kept.add(name="copy", per_second=7.0)
    kept.finish()
    assert ceilings.known(tmp_path, "cpu") == {"copy": 7.0}
