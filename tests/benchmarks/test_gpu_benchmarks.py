"""The GPU benchmarks' logic: statistics with a fake clock, roofline arithmetic, what is measured, what is written."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import (
    ceilings,
    layers,
    networks,
    peers,
    record,
    run_all,
    shapes,
    staircase,
    tiles,
    timing,
)


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
    for choice in (None, "3:2"):
        with tiles.forced(choice):
            assert os.environ.get(tiles.VARIABLE) == choice
        assert os.environ[tiles.VARIABLE] == "7"
    assert len(tiles.choices(shapes.layer("conv3x3", 37, 1))) == 4 * tiles.TILES
    assert len(tiles.choices(shapes.layer("conv3x3", 37, 32))) == tiles.TILES
    assert tiles.best({"chosen": 3.0, "1:1": 2.0, "2:1": 4.0}) == ("1:1", 1.5)


def test_a_network_in_the_dtype_of_the_gpu() -> None:
    row = networks.measure("toy", 0.5, 2, "cpu", 16, True, torch.bfloat16)
    assert not row["failed"]
    assert {"dense", "odd", "odd/optimized", "rounded", "rounded/optimized"} == set(row["candidates"])
    assert all(c["median_us"] > 0 and c["error"] < 0.05 for c in row["candidates"].values())
    assert row["macs_odd"] <= 0.5 * row["macs_dense"]
    assert "odd/optimized" in networks.line(row)


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


def test_sections_fail_or_run_out_of_time_alone(tmp_path: Path) -> None:
    def section(name: str, code: str, box: float = 30.0) -> run_all.Section:
        return run_all.Section(name, (sys.executable, "-c", code), box, script=False)

    log = tmp_path / "log"
    assert run_all.run(section("a", "print('fine')"), [], 30, log)["result"] == "ok"
    assert run_all.tail(log, 5) == "fine"
    assert run_all.run(section("b", "raise SystemExit(3)"), [], 30, log)["code"] == 3
    late = run_all.run(section("c", "print('begun', flush=True); import time; time.sleep(60)"), [], 1.5, log)
    assert (late["result"], run_all.tail(log, 5)) == ("out of time", "begun")
    missing = run_all.Section("d", ("x",), 5, needs="no-such-tool")
    assert run_all.run(missing, [], 5, log)["result"] == "skipped"
    run_all.bundle(tmp_path, tmp_path / "out", {"sections": [late]})
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert "log" in archive.getnames()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["sections"][0]["name"] == "c"


def test_sections_that_are_asked_for_share_the_time() -> None:
    first, second = (run_all.Section(name, (), box) for name, box in (("a", 50.0), ("b", 150.0)))
    assert run_all.seconds_for(first, [first, second], 400.0, stretch=True) == 100.0
    assert run_all.seconds_for(second, [second], 300.0, stretch=True) == 300.0
    assert run_all.seconds_for(second, [second], 100.0, stretch=True) == 100.0
    assert run_all.seconds_for(first, [first, second], 400.0, stretch=False) == 50.0
    # With less than all boxes need everybody's shrink alike, but for what cannot stop by itself.
    assert run_all.seconds_for(first, [first, second], 120.0, stretch=False) == 30.0
    assert run_all.seconds_for(first, [first, second], 60.0, stretch=False) == run_all.LEAST
    fixed = run_all.Section("memcheck", (), 40.0, needs="compute-sanitizer")
    assert run_all.seconds_for(first, [first, fixed, second], 160.0, stretch=False) == 30.0
    assert run_all.seconds_for(fixed, [fixed, second], 100.0, stretch=False) == 40.0
    build = run_all.Section("build", (), 170.0, script=False)
    assert run_all.seconds_for(build, [build, first], 500.0, stretch=True) == 170.0


def test_boxes_fit_one_call_and_every_script_exists() -> None:
    for section in run_all.sections("cuda"):
        module = [part for part in section.command if part.startswith("benchmarks.gpu.")]
        assert not module or (run_all.ROOT / (module[0].replace(".", "/") + ".py")).exists()
        limit = run_all.options(section, "cuda", True, Path("out"), section.box)
        assert not section.script or "--quick" in (*section.command, *limit)
    # What answers the first questions fits into the budget even when every section needs its whole box.
    assert sum(section.box for section in run_all.sections("cuda")[:6]) < 530
