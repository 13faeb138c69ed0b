"""A GPU session: sections that fail alone, time boxes, what a failed build leaves to do, options a checker may refuse."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import run_all


def test_sections_fail_or_run_out_of_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section(name: str, code: str, box: float = 30.0) -> run_all.Section:
        return run_all.Section(name, (sys.executable, "-c", code), box, script=False)

    log = tmp_path / "log"
    ticks: list[str] = []

    def run(given: run_all.Section, seconds: float) -> dict[str, Any]:
        return run_all.run(given, [], seconds, log, lambda: ticks.append(run_all.tail(log, 5)))

    assert run(section("a", "print('fine')"), 30)["result"] == "ok"
    assert run_all.tail(log, 5) == "fine"
    assert run(section("b", "raise SystemExit(3)"), 30)["code"] == 3
    ticks.clear()
    monkeypatch.setattr(run_all, "TICK", 0.5)
    late = run(run_all.Section("c", ("sh", "-c", "echo begun; sleep 60"), 30, script=False), 2.2)
    assert (late["result"], run_all.tail(log, 5)) == ("out of time", "begun")
    assert ticks[-1] == "begun"  # results files while it ran have what it printed
    missing = run_all.Section("d", ("x",), 5, needs="no-such-tool")
    assert run(missing, 5)["result"] == "skipped"
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
    fixed = run_all.Section("memcheck", (), 40.0, fixed=True)
    assert run_all.seconds_for(first, [first, fixed, second], 160.0, stretch=False) == 30.0
    assert run_all.seconds_for(fixed, [fixed, second], 100.0, stretch=True) == 40.0
    # A late build leaves benchmarks more than what all later checks would take.
    checks = run_all.Section("tests", (), 140.0, fixed=True)
    assert run_all.seconds_for(second, [second, checks], 150.0, stretch=False) == 90.0


def test_what_runs_after_a_build_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def section(name: str, code: str, kernels: bool = False) -> run_all.Section:
        command = (sys.executable, "-c", f"import os; {code}")
        return run_all.Section(name, command, 20, script=False, kernels=kernels, fixed=True)

    def sections(device: str) -> list[run_all.Section]:
        return [
            section("build", "print('no such header'); raise SystemExit(1)"),
            section("norms", "print('ours')", kernels=True),
            section("layers", "print('extension off:', os.environ['LIGHTNING_PRUNE_DISABLE_EXT'])"),
        ]

    monkeypatch.setattr(run_all, "sections", sections)
    monkeypatch.setenv("LIGHTNING_PRUNE_DISABLE_EXT", "0")  # put back afterwards
    assert run_all.main(["--device", "cuda", "--out", str(tmp_path)]) == 1
    entries = json.loads((tmp_path / "summary.json").read_text())["sections"]
    assert [(e["name"], e["result"]) for e in entries] == [
        ("build", "failed"),
        ("norms", "skipped"),
        ("layers", "ok"),
    ]
    assert entries[1]["reason"] == "the build did not succeed (failed)"
    printed = capsys.readouterr().out
    assert "no such header" in printed
    assert "extension off: 1" in printed
    assert "!!! the build did not succeed" in printed


def executable(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_checker_that_refuses_an_option_runs_without(
    refuses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = 'case "$*" in *--kernel-name*) echo "unrecognised option"; exit 1;; esac' if refuses else ""
    executable(tmp_path / "compute-sanitizer", refusal, 'echo started "$@"', "exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    log = tmp_path / "log"
    entry = run_all.run(run_all.sanitizer_section("racecheck"), ["--device", "cuda"], 20, log, lambda: None)
    assert (entry["result"], entry["code"]) == ("failed", 9)
    assert entry.get("refused") == ("unrecognised option" if refuses else None)
    text = run_all.tail(log, 5)
    assert ("kernel_substring" in text) is not refuses
    assert "--tool racecheck --error-exitcode 9" in text
    assert text.endswith("-m benchmarks.gpu.sanitized --quick --device cuda")
    assert f'print("{run_all.STARTED}"' in (run_all.ROOT / "benchmarks/gpu/sanitized.py").read_text()


@pytest.mark.parametrize(("answer", "architecture"), [("9.0", "sm_90a"), ("8.6", "sm_86"), ("N/A", None)])
def test_a_gpu_session_builds_for_its_gpu(
    answer: str, architecture: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "nvidia-smi", f"echo {answer}", f"echo {answer}")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    run_all.gpu_architecture.cache_clear()
    try:
        given = dict(run_all.build_section("cuda").environment)
    finally:
        run_all.gpu_architecture.cache_clear()
    assert given.get("LIGHTNING_PRUNE_CUDA_ARCHS") == architecture
    assert given["LIGHTNING_PRUNE_FAST_CPU_BUILD"] == "1"
    assert "LIGHTNING_PRUNE_FAST_CPU_BUILD" not in dict(run_all.build_section("cpu").environment)


def test_boxes_fit_one_call_and_every_script_exists() -> None:
    for section in run_all.sections("cuda"):
        module = [part for part in section.command if part.startswith("benchmarks.gpu.")]
        assert not module or (run_all.ROOT / (module[0].replace(".", "/") + ".py")).exists()
        limit = run_all.options(section, "cuda", True, Path("out"), section.box)
        assert not section.script or "--quick" in (*section.command, *limit)
        assert all((run_all.ROOT / part).exists() for part in section.command if part.startswith("tests/"))
    every = {section.name: section for section in run_all.sections("cuda")}
    order = list(every)
    assert order.index("networks") < min(order.index(n) for n in ("norms", "training", "memcheck"))
    assert order[-2:] == ["memcheck", "racecheck"]
    # What answers the first questions fits into the budget even when every section but the build needs its whole box.
    assert sum(every[name].box for name in order[1 : order.index("networks") + 1]) + 120 < 530
