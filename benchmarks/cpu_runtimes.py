"""What the CPU benchmarks share: peers that are installed, a pinned environment, rounds that take turns, results on disk."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).parent
PACKAGES = {"ONNX Runtime": ("onnxruntime", "onnx"), "OpenVINO": ("openvino", "onnx")}
#: rounds that are taken whatever the time limit says
LEAST_ROUNDS = 5
#: calls before and least calls while the clock runs: the second after other work still misses the caches
WARM, LEAST_CALLS = 3, 3
Key = TypeVar("Key", bound=Hashable)


def parser(description: str | None, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """The arguments of every CPU benchmark.

    Args:
        description: the module's docstring.
        rounds: default of ``--rounds``.
        seconds: default of ``--seconds``, within which the whole run should end.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="few cases and rounds, only on the screen")
    made.add_argument(
        "--isa", choices=["native", "avx2"], default="native", help="caps this project and oneDNN"
    )
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"fewer rounds, at least {LEAST_ROUNDS}, to end in time",
    )
    made.add_argument("--out", type=Path, default=HERE / "results")
    return made


def pin_environment(isa: str, **more: str) -> None:
    """Set what libraries read when they load (allocator, instruction sets, ``more``) and start again with it."""
    # The allocator keeps freed memory, or page faults fall on whoever runs after a trim.
    keep = str(1 << 30)
    wanted = {"MALLOC_MMAP_THRESHOLD_": keep, "MALLOC_TRIM_THRESHOLD_": keep, **more}
    if isa == "avx2":
        wanted |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "LIGHTNING_PRUNE_CPU_LEVEL": "avx2"}
        wanted |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        path = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        os.execv(sys.executable, [sys.executable, *sys.argv])


def installed(names: Iterable[str], isa: str) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Runtimes that can run, versions of their packages, and why the others are missing.

    Args:
        names: of runtimes.
        isa: other than ``native``, it is capped by environment variables, which the runtimes of ``PACKAGES`` do not obey.
    """
    found, versions, missing = [], {}, {}
    for name in names:
        try:
            for package in PACKAGES.get(name, ()):
                importlib.import_module(package)
                versions[package] = importlib.metadata.version(package)
        except ImportError as error:
            missing[name] = str(error)
            continue
        if isa != "native" and name in PACKAGES:
            missing[name] = "its instruction set cannot be capped"
            continue
        found.append(name)
    return found, versions, missing


def take_turns(
    calls: Mapping[Key, Callable[[], object]], rounds: int, budget: float, deadline: float
) -> dict[Key, list[float]]:
    """Microseconds of process CPU time per call: one value per round, in another order every round.

    Args:
        calls: what is timed.
        rounds: of all calls.
        budget: seconds per call and round; short calls are repeated.
        deadline: of ``time.monotonic``, from which on only ``LEAST_ROUNDS`` are taken.
    """
    repeats: dict[Key, int] = {}
    for key, call in calls.items():
        for _ in range(WARM):
            call()
        begin = time.process_time_ns()
        call()
        once = max(1000, time.process_time_ns() - begin)
        repeats[key] = max(LEAST_CALLS, min(1000, round(budget * 1e9 / once)))
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order = random.Random(0)
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        # Another order in every round: a runtime's threads may still spin while the next one runs.
        for key in order.sample(list(calls), len(calls)):
            call = calls[key]
            for _ in range(WARM):  # the others have just used the caches
                call()
            begin = time.process_time_ns()
            for _ in range(repeats[key]):
                call()
            times[key].append((time.process_time_ns() - begin) / repeats[key] / 1e3)
    return times


def machine() -> dict[str, Any]:
    """Processor, what the extension found in it, and versions; for benchmarks on one thread."""
    import torch

    from lightning_prune.ops import _loading
    from lightning_prune.processor import this_processor

    info = _loading.build_info()
    return {
        "cpu": this_processor(),
        "features": info.cpu_features() if info else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }


def environment(
    isa: str, versions: Mapping[str, str], missing: Mapping[str, str], **more: Any
) -> dict[str, Any]:
    """Facts for a results file: processor, versions, peers, and ``more``."""
    return {
        **machine(),
        "isa": isa,
        "peers": dict(versions),
        "missing_peers": dict(missing),
        "clock": "process CPU time",
        "load_average": [round(load, 2) for load in os.getloadavg()],
        **more,
    }


def write(
    out: Path, stem: str, heading: Sequence[str], facts: Mapping[str, Any], tables: str, results: Any
) -> None:
    """``stem.md`` (heading, facts, tables) and ``stem.json`` in the folder ``out``."""
    from lightning_prune.files import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    listed = [f"- {key}: {value}" for key, value in facts.items() if key != "features"]
    text = "\n".join([*heading, *listed, "", tables, ""])
    write_atomically(out / f"{stem}.md", text.encode())
    content = {"environment": dict(facts), "results": results}
    write_atomically(out / f"{stem}.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"written: {out / stem}.md and .json")
