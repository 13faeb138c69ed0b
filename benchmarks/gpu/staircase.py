"""Latency against width, channel by channel: where are the steps, and do they vanish with our kernel?

    python -m benchmarks.gpu.staircase [--quick] [--device cpu]

Writes ``staircase.json`` and, where matplotlib is, ``staircase.png``. Widths are measured coarse to fine, so that a run that
is cut short covers the whole range.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, shapes
from benchmarks.gpu.layers import measure
from benchmarks.gpu.record import Record, arguments, time_left
from benchmarks.gpu.timing import warm_up

LABELS = {
    "vendor": "torch (cuDNN), channels_last",
    "vendor_padded": "torch, padded to 8",
    "vendor_fused": "cuDNN, padded to 8, one call",
    "own": "lightning-prune",
    "own_groups": "lightning-prune, warp groups",
}


def coarse_to_fine(first: int, last: int, step: int = 16) -> list[int]:
    """All integers from ``first`` to ``last``: multiples of ``step``, then of its halves."""
    found: list[int] = []
    while step >= 1:
        found += [width for width in range(first, last + 1) if width % step == 0 and width not in found]
        step //= 2
    return found


def series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Candidate -> (width, microseconds), sorted by width; and the roofline as ``floor``."""
    lines: dict[str, list[tuple[int, float]]] = {"floor": []}
    for row in sorted(rows, key=lambda row: row["inputs"]):
        lines["floor"].append((row["inputs"], row["floor_us"]))
        times = {name: c["median_us"] for name, c in row["candidates"].items() if "median_us" in c}
        times.setdefault("vendor_padded", times.get("vendor"))  # at multiples of 8 they are the same
        for name in LABELS:
            if times.get(name) is not None:
                lines.setdefault(name, []).append((row["inputs"], times[name]))
    return lines


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw the staircase; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    figure, axes = plt.subplots(figsize=(9, 5))
    for name, points in series(rows).items():
        style = {"color": "gray", "linestyle": "--"} if name == "floor" else {"drawstyle": "steps-mid"}
        axes.plot(*zip(*points, strict=True), label=LABELS.get(name, "roofline"), **style)
    axes.set(xlabel="channels", ylabel="time of one call [µs]", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main() -> None:
    given = arguments(
        __doc__,
        batch={"type": int, "default": 32},
        first={"type": int, "default": 32},
        last={"type": int, "default": 128},
    )
    torch.backends.cudnn.benchmark = True
    cpu = given.device == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    rates = ceilings.known(given.out, given.device, given.quick)
    warm_up(given.device)
    record = Record(given.out, "staircase", given.device, ceilings=rates)
    widths = coarse_to_fine(given.first, given.last)
    for width in widths[:12] if given.quick else widths:
        if time_left() < 3:
            break
        layer = shapes.Layer("conv3x3", width, width, 28, given.batch)
        try:
            row = measure(
                shapes.tiny(layer) if cpu else layer, given.device, dtype, rates, given.quick, eager=False
            )
        except RuntimeError as failure:
            print(f"{width}: FAILED: {failure}", flush=True)
            if "CUDA error" in str(failure):
                raise
            continue
        row["candidates"].pop("dense", None)
        record.add(**row)
        times = {name: round(c["median_us"], 2) for name, c in row["candidates"].items() if "median_us" in c}
        print(width, times, flush=True)
    else:
        record.finish()
    if record.rows:
        where = record.content["environment"]["device"]
        title = f"3x3 convolution, {given.batch} maps of {record.rows[0]['size']}x{record.rows[0]['size']}, {dtype}, {where}"
        plot(record.rows, given.out / "staircase.png", title)


if __name__ == "__main__":
    main()
