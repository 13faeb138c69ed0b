"""What this device can do at most: copy bandwidth and matrix products. The roofline of every shape is drawn from these.

python -m benchmarks.gpu.ceilings [--device cpu --quick]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.record import Record, arguments
from benchmarks.gpu.timing import Loop, interleaved, warm_up

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def measure(device: str, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Bytes per second of a large copy (read plus written), FLOP/s of a large product per type; random data."""
    small = device == "cpu"
    count, side = (1 << 20, 256) if small else (1 << (28 if quick else 30), 8192)
    warm_up(device)
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    loops = {"copy": Loop(lambda a: target.copy_(a), [(source,)], graph=False)}
    for name, dtype in TYPES.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        loops[name] = Loop(torch.matmul, [(a, b)], graph=False)
    allow = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # what convolutions use by default
    try:
        timed = interleaved({name: loop.sample for name, loop in loops.items()}, samples=3 if quick else 10)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow
    found = {name: {**t.as_row(), "per_second": 2 * side**3 / t.median} for name, t in timed.items()}
    found["copy"]["per_second"] = 2 * source.numel() * 4 / timed["copy"].median
    return found


def known(out: Path, device: str, quick: bool = False) -> dict[str, float]:
    """Rates from ``ceilings.json`` in ``out`` when it is of this device, else measured now: copy, bfloat16 and so on."""
    path = out / "ceilings.json"
    try:
        content = json.loads(path.read_text())
        name = torch.cuda.get_device_name(0) if device == "cuda" else None
        if content["complete"] and (name is None or content["environment"]["device"] == name):
            return {row["name"]: row["per_second"] for row in content["rows"]}
    except (OSError, ValueError, KeyError):
        pass
    return {name: row["per_second"] for name, row in measure(device, quick).items()}


def main() -> None:
    given = arguments(__doc__)
    record = Record(given.out, "ceilings", given.device)
    for name, row in measure(given.device, given.quick).items():
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        print(f"{name:10} {row['per_second'] / 1e9:12.1f} {unit}  noise {row['noise']:.1%}")
        record.add(name=name, **row)
    record.finish()


if __name__ == "__main__":
    main()
