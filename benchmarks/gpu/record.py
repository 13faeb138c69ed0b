"""Where results go: one JSON file per question, rewritten after every row, with everything a reader needs to judge it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"
BUDGET_VARIABLE = "LIGHTNING_PRUNE_BENCHMARK_DEADLINE"


def arguments(description: str | None, **extra: Any) -> argparse.Namespace:
    """The options that every script of this folder has; ``extra`` holds more, name -> keywords of ``add_argument``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="few shapes, few samples")
    parser.add_argument(
        "--seconds", type=float, default=None, help="stop starting new measurements after so long"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    for name, keywords in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here (--device cpu runs the same code on the CPU)")
    if given.seconds is not None:
        os.environ[BUDGET_VARIABLE] = str(time.monotonic() + given.seconds)
    return given


def time_left() -> float:
    """Seconds until no new measurement should start; infinite without ``--seconds``."""
    deadline = os.environ.get(BUDGET_VARIABLE)
    return float("inf") if deadline is None else float(deadline) - time.monotonic()


def _first_line(*command: str) -> str | None:
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
        )
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def environment(device: str) -> dict[str, Any]:
    """Device, driver and library versions."""
    import lightning_prune
    from lightning_prune.ops import _loading

    build = _loading.build_info()
    facts: dict[str, Any] = {
        "lightning_prune": lightning_prune.__version__,
        "extension_cuda": build.cuda_version if build else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts |= {
            "device": p.name,
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "compute_capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    else:
        facts |= {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return facts


@contextmanager
def variables(**values: str | None) -> Iterator[None]:
    """Environment variables set (None: not set) inside, and as they were afterwards."""
    before = {name: os.environ.pop(name, None) for name in values}
    try:
        os.environ.update({name: value for name, value in values.items() if value is not None})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Record:
    """Rows of one question; the file is complete JSON after every row, so a killed run keeps what it had."""

    def __init__(self, out: Path, name: str, device: str, **facts: Any) -> None:
        self.path = out / f"{name}.json"
        self.content: dict[str, Any] = {
            "environment": environment(device),
            **facts,
            "complete": False,
            "rows": [],
        }
        self.save()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]  # type: ignore[no-any-return]

    def add(self, **row: Any) -> dict[str, Any]:
        """Append a row; what is returned is the row itself, to be filled further and written with :meth:`save`."""
        self.rows.append(row)
        self.save()
        return row

    def finish(self) -> None:
        """Mark the file as complete: every row that was planned is there."""
        self.content["complete"] = True
        self.save()

    def save(self) -> None:
        """Write the file anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)
