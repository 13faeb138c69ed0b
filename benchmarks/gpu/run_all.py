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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: seconds between a script's own limit and the box in which it is stopped
GRACE = 8.0
#: seconds that every benchmark gets when time is short
LEAST = 20.0
#: the part of what is left that is set aside for coming sections with fixed boxes
MOST_ASIDE = 0.4
#: seconds between two results files while a section runs, so that a killed session loses no more than this
TICK = 15.0
SANITIZER = "compute-sanitizer"
#: first word of `sanitized.py`; a checker that refuses its options does not get so far
STARTED = "started"


@dataclass(frozen=True)
class Section:
    """One process.

    Attributes:
        name: as in ``--only``.
        command: without the options that the scripts of this folder share.
        box: seconds after which it is stopped.
        script: takes ``--device --out --seconds [--quick]``.
        needs: an executable without which it is skipped.
        kernels: measures or checks our kernels and nothing else: skipped without them.
        fixed: keeps its box however much or little time there is.
        spared: arguments of ``command`` that are left out when nothing starts with them: not every version knows them.
    """

    name: str
    command: tuple[str, ...]
    box: float
    script: bool = True
    needs: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    kernels: bool = False
    fixed: bool = False
    spared: tuple[str, ...] = ()


@cache
def gpu_architecture() -> str | None:
    """The GPU here as nvcc spells it; sm_90 with its own instructions. None where it is not known."""
    try:
        query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        first = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()[0]
        major, minor = (int(part) for part in first.split("."))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def build_section(device: str) -> Section:
    """Everything on a CPU; for a GPU only what a session with it runs: its own architecture, CPU kernels unoptimised."""
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    environment = [("LIGHTNING_PRUNE_FORCE_EXT", "1")]
    if device == "cuda":
        environment.append(("LIGHTNING_PRUNE_FAST_CPU_BUILD", "1"))
        architecture = gpu_architecture()
        if architecture:
            environment.append(("LIGHTNING_PRUNE_CUDA_ARCHS", architecture))
    return Section("build", command, 300, script=False, environment=tuple(environment), fixed=True)


def tests_section(device: str) -> Section:
    """The tests that want this device, most telling files first; every result is in the log as soon as it is there."""
    command = [sys.executable, "-m", "pytest", "-v", "--maxfail=20", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-W", "default"]
    box = 110.0
    if device == "cuda":
        command += ["-m", "cuda"]
        if find_spec("xdist"):  # several processes: after an illegal access nothing else runs in the same one
            command += ["-n", "4"]
        if find_spec("pytest_timeout"):
            command += ["--timeout", "60", "--session-timeout", str(int(box - GRACE))]
    else:
        command += ["-k", "test_depthwise or test_captured"]
    first = (
        "tests/ops/test_tensor_cores.py",
        "tests/ops/test_compact_conv2d.py",
        "tests/ops/test_masked_batch_norm_act.py",
        "tests/inference/test_on_cuda.py",
    )
    found = [
        path for folder in ("ops", "inference", "nn") for path in (ROOT / "tests" / folder).glob("test_*.py")
    ]
    others = {str(path.relative_to(ROOT)) for path in found} - set(first)
    files = (*first, *sorted(others), "tests/fit/test_devices.py", "tests/fit/test_skipping.py")
    return Section("tests", (*command, *files), box, script=False, kernels=True, fixed=True)


def sanitizer_section(tool: str) -> Section:
    """Our kernels alone under compute-sanitizer: patching torch's would take most of the time."""
    # Names are matched as they are mangled: lp::cuda::
    spared = ("--report-api-errors", "no", "--kernel-name", "kernel_substring=_ZN2lp4cuda")
    script = (sys.executable, "-m", "benchmarks.gpu.sanitized", "--quick")
    command = (SANITIZER, *spared, "--tool", tool, "--error-exitcode", "9", *script)
    # Without torch's caching allocator every tensor is an allocation of its own, whose bounds are checked.
    alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Section(
        tool, command, 40, needs=SANITIZER, environment=alone, kernels=True, fixed=True, spared=spared
    )


def sections(device: str) -> list[Section]:
    """In the order in which they run: correctness first, then the first questions, then the longer ones."""

    def benchmark(name: str, box: float, kernels: bool = False, fixed: bool = False) -> Section:
        command = (sys.executable, "-m", f"benchmarks.gpu.{name}")
        return Section(name, command, box, kernels=kernels, fixed=fixed)

    return [
        build_section(device),
        Section("device", ("nvidia-smi",), 15, script=False, needs="nvidia-smi", fixed=True),
        benchmark("sanitized", 40, kernels=True, fixed=True),
        tests_section(device),
        benchmark("ceilings", 20),
        benchmark("layers", 80),
        benchmark("networks", 130),
        benchmark("training", 60, kernels=True),
        benchmark("staircase", 30),
        benchmark("norms", 30, kernels=True),
        benchmark("tiles", 30, kernels=True),
        benchmark("compiled", 40),
        sanitizer_section("memcheck"),
        sanitizer_section("racecheck"),
    ]


def options(section: Section, device: str, quick: bool, out: Path, seconds: float) -> list[str]:
    """The shared options of the scripts of this folder."""
    if not section.script:
        return []
    # A sanitized process runs many times slower than the clock it would stop by.
    limit = [] if section.needs == SANITIZER else ["--seconds", str(round(max(seconds - GRACE, 1.0), 1))]
    fast = ["--quick"] if quick and "--quick" not in section.command else []
    return ["--device", device, "--out", str(out), *limit, *fast]


def run(
    section: Section, extra: list[str], seconds: float, log: Path, tick: Callable[[], None]
) -> dict[str, Any]:
    """Run one section to its end or its limit; the log has all it printed. ``tick`` is called now and then meanwhile."""
    if section.needs and shutil.which(section.needs) is None:
        return {"name": section.name, "result": "skipped", "reason": f"{section.needs} is not on PATH"}
    started = time.monotonic()
    code = _run([*section.command, *extra], section, started + seconds, log, tick)
    entry: dict[str, Any] = {"name": section.name}
    if code and section.spared and STARTED not in log.read_text(errors="replace"):
        entry["refused"] = tail(log, 3)
        command = [part for part in section.command if part not in section.spared]
        code = _run([*command, *extra], section, started + seconds, log, tick)
    result = "ok" if code == 0 else "out of time" if code is None else "failed"
    return entry | {"result": result, "code": code, "seconds": round(time.monotonic() - started, 1)}


def _run(
    command: list[str], section: Section, until: float, log: Path, tick: Callable[[], None]
) -> int | None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(section.environment)}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )  # fmt: skip
        code = _wait(process, until)
        while code is None and time.monotonic() < until:
            tick()
            code = _wait(process, until)
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code


def _wait(process: subprocess.Popen[bytes], until: float) -> int | None:
    """The exit code, if there is one in time or before the next tick."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=max(0.0, min(TICK, until - time.monotonic())))
    return None


def seconds_for(section: Section, coming: list[Section], left: float, stretch: bool) -> float:
    """The section's box; for a benchmark its share of what is left, if that is less, or with ``stretch`` if it is more.

    What is fixed (what cannot stop by itself, and short checks) keeps its box, but for those to come no more than a part of the
    time is set aside.
    """
    if section.fixed:
        return min(section.box, left)
    elastic = [s for s in coming if not s.fixed]
    aside = min(sum(s.box for s in coming if s.fixed), MOST_ASIDE * left)
    share = (left - aside) * section.box / sum(s.box for s in elastic)
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
            if path.suffix != ".tmp":  # of a section that is writing
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
    deadline, unbuilt = time.monotonic() + given.budget, ""
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
            entry: dict[str, Any] = {"name": section.name, "result": "skipped", "reason": "out of time"}
            if unbuilt and section.kernels:
                entry["reason"] = unbuilt
            elif seconds >= GRACE + 2:
                extra = options(section, given.device, given.quick, work, seconds)
                entry = run(section, extra, seconds, log, lambda: bundle(work, out, summary))
            summary["sections"].append(entry)
            bundle(work, out, summary)
            print(f"=== {json.dumps(entry)}", flush=True)
            print(tail(log, 12 if section.name in ("tests", "layers", "networks") else 6), flush=True)
            if section.name == "build" and entry["result"] != "ok":
                # A library of an earlier build must not be measured as this one.
                os.environ["LIGHTNING_PRUNE_DISABLE_EXT"] = "1"
                unbuilt = f"the build did not succeed ({entry['result']})"
                print(tail(log, 60), flush=True)
                print(f"!!! {unbuilt}: what follows measures torch and nothing of ours", flush=True)
    bad = [entry["name"] for entry in summary["sections"] if entry["result"] in ("failed", "out of time")]
    print(f"results: {out}; not ok: {', '.join(bad) or 'none'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
