"""Runs the sections of a GPU session, each in its own process and time box; a failure is recorded and the rest goes on.

    python -m benchmarks.gpu.run_all [--quick] [--device cpu] [--only SECTION ...] [--budget SECONDS]

After every section ``summary.json`` and ``results.tar.gz`` (all JSON, plots and logs) in the output folder are up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: seconds between a script's own limit and the box in which it is stopped
GRACE = 8.0
#: seconds that every benchmark gets when time is short
LEAST = 20.0


@dataclass(frozen=True)
class Section:
    """One process.

    Attributes:
        name: as in ``--only``.
        command: without the options that the scripts of this folder share.
        box: seconds after which it is stopped.
        script: takes ``--device --out --seconds [--quick]``.
        needs: an executable without which it is skipped.
    """

    name: str
    command: tuple[str, ...]
    box: float
    script: bool = True
    needs: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


def sections(device: str) -> list[Section]:
    """In the order in which they run: correctness first, then the first question, then the longer ones."""
    python = sys.executable

    def benchmark(name: str, box: float, *extra: str) -> Section:
        return Section(name, (python, "-m", f"benchmarks.gpu.{name}", *extra), box)

    def sanitizer(tool: str) -> Section:
        command = (
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            python,
            "-m",
            "benchmarks.gpu.sanitized",
        )
        # Without torch's caching allocator every tensor is an allocation of its own, whose bounds are checked.
        alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        return Section(tool, (*command, "--quick"), 70, needs="compute-sanitizer", environment=alone)

    build = (python, "setup.py", "--quiet", "build_ext", "--inplace")
    markers = ("-m", "cuda") if device == "cuda" else ("-k", "test_depthwise or test_captured")
    tests = (
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-x" if device == "cpu" else "-rs",
    )
    if device == "cuda":  # several processes: after an illegal access nothing else runs in the same one
        tests = (*tests, "-n", "4", "--timeout", "60")
    fits = ("tests/fit/test_devices.py", "tests/fit/test_skipping.py")
    where = ("tests/ops", "tests/inference", "tests/nn", *fits)
    return [
        Section("build", build, 170, script=False, environment=(("LIGHTNING_PRUNE_FORCE_EXT", "1"),)),
        Section("device", ("nvidia-smi",), 15, script=False, needs="nvidia-smi"),
        benchmark("sanitized", 40),
        Section("tests", (*tests, *markers, *where), 130, script=False),
        benchmark("ceilings", 25),
        benchmark("layers", 100),
        benchmark("norms", 40),
        benchmark("training", 90),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        benchmark("networks", 90),
        benchmark("staircase", 35),
        benchmark("tiles", 35),
        benchmark("compiled", 60),
    ]


def options(section: Section, device: str, quick: bool, out: Path, seconds: float) -> list[str]:
    """The shared options of the scripts of this folder."""
    if not section.script:
        return []
    # A sanitized process runs many times slower than the clock it would stop by.
    limit = [] if section.needs else ["--seconds", str(round(max(seconds - GRACE, 1.0), 1))]
    fast = ["--quick"] if quick and "--quick" not in section.command else []
    return ["--device", device, "--out", str(out), *limit, *fast]


def run(section: Section, extra: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """Run one section to its end or its limit; the log has all it printed."""
    if section.needs and shutil.which(section.needs) is None:
        return {"name": section.name, "result": "skipped", "reason": f"{section.needs} is not on PATH"}
    started = time.monotonic()
    environment = {**os.environ, **dict(section.environment)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*section.command, *extra], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    result = "ok" if code == 0 else "out of time" if code is None else "failed"
    return {
        "name": section.name,
        "result": result,
        "code": code,
        "seconds": round(time.monotonic() - started, 1),
    }


def seconds_for(section: Section, coming: list[Section], left: float, stretch: bool) -> float:
    """The section's box; for a benchmark its share of what is left, if that is less, or with ``stretch`` if it is more.

    What cannot stop by itself (the build, the tests, sanitizers) keeps its box.
    """
    elastic = [s for s in coming if s.script and not s.needs]
    if section not in elastic:
        return min(section.box, left)
    fixed = sum(s.box for s in coming if s not in elastic)
    share = (left - fixed) * section.box / sum(s.box for s in elastic)
    wanted = max(section.box, share) if stretch else min(section.box, max(share, LEAST))
    return min(wanted, left)


def tail(path: Path, lines: int) -> str:
    """The last lines of a log, each cut to a readable length."""
    if not path.exists():
        return ""
    return "\n".join(line[:400] for line in path.read_text(errors="replace").splitlines()[-lines:])


def bundle(work: Path, out: Path, summary: dict[str, Any]) -> None:
    """Write the summary and everything in ``work`` to ``out``, each replaced by renaming."""
    out.mkdir(parents=True, exist_ok=True)
    (work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    partial = out / "results.tmp"
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(work.iterdir()):
            archive.add(path, path.name)
    partial.replace(out / "results.tar.gz")
    shutil.copy(work / "summary.json", out / "summary.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--only", nargs="*", default=None, choices=[s.name for s in sections("cuda")], metavar="SECTION"
    )
    parser.add_argument("--skip", nargs="*", default=[], metavar="SECTION")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(argv)
    out = given.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu")
    chosen = [
        s
        for s in sections(given.device)
        if s.name not in given.skip and (not given.only or s.name in given.only)
    ]
    deadline = time.monotonic() + given.budget
    summary: dict[str, Any] = {
        "device": given.device,
        "quick": given.quick,
        "budget": given.budget,
        "sections": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for number, section in enumerate(chosen):
            left = deadline - time.monotonic() - 2
            seconds = seconds_for(section, chosen[number:], left, stretch=bool(given.only))
            log = work / f"{section.name}.log"
            if seconds < GRACE + 2:
                entry: dict[str, Any] = {"name": section.name, "result": "skipped", "reason": "out of time"}
            else:
                entry = run(section, options(section, given.device, given.quick, work, seconds), seconds, log)
            summary["sections"].append(entry)
            bundle(work, out, summary)
            print(f"=== {json.dumps(entry)}", flush=True)
            print(tail(log, 12 if section.name in ("tests", "layers", "networks") else 6), flush=True)
            failed_build = section.name == "build" and entry["result"] != "ok"
            if failed_build and given.device == "cuda":
                print(tail(log, 60), flush=True)
                return 1  # without kernels there is nothing to measure
    bad = [entry["name"] for entry in summary["sections"] if entry["result"] in ("failed", "out of time")]
    print(f"results: {out}; not ok: {', '.join(bad) or 'none'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
