"""torch.compile (max-autotune) of single layers at the odd and the padded width; slow to start, so few layers.

python -m benchmarks.gpu.compiled [--quick] [--device cpu]
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu import shapes
from benchmarks.gpu.peers import candidates, convolution, exact, relative_error
from benchmarks.gpu.record import Record, arguments, time_left
from benchmarks.gpu.timing import Loop, cache_bytes, interleaved, warm_up

LAYERS = [
    ("conv3x3", 37, 32),
    ("pointwise", 37, 32),
    ("conv3x3", 101, 32),
    ("depthwise", 37, 32),
    ("conv3x3", 37, 1),
]


def main() -> None:
    given = arguments(__doc__)
    torch.backends.cudnn.benchmark = True
    cpu = given.device == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    options: dict[str, Any] = {"backend": "eager"} if cpu else {"mode": "max-autotune-no-cudagraphs"}
    warm_up(given.device)
    record = Record(given.out, "compiled", given.device, options=options)
    for kind, width, batch in LAYERS[: 2 if given.quick else None]:
        layer = shapes.layer(kind, width, batch)
        layer = shapes.tiny(layer) if cpu else layer
        forms = [
            c
            for c in candidates(layer, given.device, dtype, cache_bytes(given.device))
            if c.name in ("vendor", "vendor_padded", "own")
        ]
        reference = exact(layer, forms[0], convolution(layer, given.device, dtype))
        row: dict[str, Any] = {**layer.as_row(), "candidates": {}, "failed": {}}
        loops: dict[str, Loop] = {}
        for form in forms:
            if time_left() < 3:
                return
            loops[form.name] = Loop(form.call, form.arguments)
            if form.name == "own":
                continue
            name = f"{form.name}/compiled"
            try:
                started = time.monotonic()
                torch.compiler.reset()
                form.call = torch.compile(form.call, fullgraph=True, **options)
                error = relative_error(layer, form, reference)
                row["candidates"][name] = {"error": error, "compile_seconds": time.monotonic() - started}
                loops[name] = Loop(form.call, form.arguments)
            except Exception as failure:
                row["failed"][name] = f"{type(failure).__name__}: {failure}"[:500]
        for name, t in interleaved({n: loop.sample for n, loop in loops.items()}, samples=5).items():
            row["candidates"].setdefault(name, {}).update(t.as_row())
        record.add(**row)
        print(
            layer.label(),
            {n: f"{c['median_us']:.2f}us" for n, c in row["candidates"].items() if "median_us" in c},
            flush=True,
        )
        print({n: text[:100] for n, text in row["failed"].items()} or "", flush=True)
    record.finish()


if __name__ == "__main__":
    main()
