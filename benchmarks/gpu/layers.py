"""One layer after pruning to an odd width: what does the width cost, and how much of that does padding alone recover?

Candidates: torch's convolution with folded norm in channels_last (``vendor``), the same padded to multiples of 8
(``vendor_padded``) and as one call of cuDNN (``vendor_fused``), the unpruned layer (``dense``), this package's kernel (``own``)
and that with tiles of warp groups (``own_groups``). Times are of graph replays over buffers larger than the L2 cache;
``--eager`` adds calls from Python.

    python -m benchmarks.gpu.layers                    # in the order of importance, to benchmarks/results/gpu
    python -m benchmarks.gpu.layers --quick --seconds 100
    python -m benchmarks.gpu.layers --device cpu --quick   # tiny maps: does the code run?
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.gpu import ceilings, shapes
from benchmarks.gpu.peers import candidates, convolution, exact, kernels_run, relative_error
from benchmarks.gpu.record import Record, arguments, time_left
from benchmarks.gpu.timing import Loop, cache_bytes, interleaved, warm_up


def measure(
    layer: shapes.Layer, device: str, dtype: torch.dtype, rates: dict[str, float], quick: bool, eager: bool
) -> Any:
    """Row of one layer: candidate -> times, errors, share of the roofline."""
    forms = candidates(layer, device, dtype, cache_bytes(device))
    reference = exact(layer, forms[0], convolution(layer, device, dtype))
    rate = rates[str(dtype).removeprefix("torch.")]
    floor = shapes.floor_seconds(layer, rate, rates["copy"], dtype.itemsize)
    row: dict[str, Any] = {**layer.as_row(), "dtype": str(dtype), **floor, "candidates": {}, "failed": {}}
    loops: dict[str, Loop] = {}
    if not any(form.name == "own" for form in forms):
        row["failed"]["own"] = str(kernels_run(device, dtype).reason)
    for form in forms:
        try:
            if form.name != "dense":
                row["candidates"][form.name] = {"error": relative_error(layer, form, reference)}
            loops[form.name] = form.loop()
            if eager and not form.variables:
                loops[f"{form.name}/eager"] = form.loop(graph=False)
        except RuntimeError as failure:  # noqa: PERF203
            row["failed"][form.name] = str(failure)[:500]
            if "CUDA error" in str(failure):
                raise  # nothing after it can be trusted
    timed = interleaved({name: loop.sample for name, loop in loops.items()}, samples=5 if quick else 10)
    for name, t in timed.items():
        row["candidates"].setdefault(name, {}).update(
            t.as_row(), of_floor=floor["floor_us"] * 1e-6 / t.median
        )
    row["buffers"] = len(forms[0].arguments)
    return row


def recovered(row: dict[str, Any]) -> float | None:
    """Share of the distance between the odd width and its roofline (or the padded time) that padding alone recovers.

    1 when padding brings the time down to the floor, 0 when it changes nothing; None without both times.
    """
    times = {name: c.get("median_us") for name, c in row["candidates"].items()}
    if not times.get("vendor") or not times.get("vendor_padded"):
        return None
    loss = times["vendor"] - row["floor_us"]
    return (times["vendor"] - times["vendor_padded"]) / loss if loss > 0 else None


def line(layer: shapes.Layer, row: dict[str, Any]) -> str:
    """One line of the table."""
    parts = [f"{layer.label():32}", f"floor {row['floor_us']:8.2f} {row['bound'][:3]}"]
    for name, c in row["candidates"].items():
        if "median_us" in c:
            error = f" err {c['error']:.1e}" if "error" in c else ""
            parts.append(f"{name} {c['median_us']:8.2f}us ±{c['noise']:.0%}{error}")
    share = recovered(row)
    parts += [] if share is None else [f"padding recovers {share:.0%}"]
    return " | ".join(parts + [f"{name} FAILED: {text[:60]}" for name, text in row["failed"].items()])


def main() -> None:
    given = arguments(
        __doc__,
        full={"action": "store_true", "help": "every width, batch and kind"},
        eager={"action": "store_true", "help": "also calls from Python, without a graph"},
        dtype={
            "default": None,
            "choices": sorted(ceilings.TYPES),
            "help": "default: bfloat16, on a CPU float32",
        },
    )
    dtype = ceilings.TYPES[given.dtype or ("bfloat16" if given.device == "cuda" else "float32")]
    torch.backends.cudnn.benchmark = True
    rates = ceilings.known(given.out, given.device, given.quick)
    warm_up(given.device)
    name = "layers" if given.dtype in (None, "bfloat16") else f"layers_{given.dtype}"
    record = Record(given.out, name, given.device, ceilings=rates)
    for layer in shapes.selection(given.quick, given.full):
        if time_left() < 3:
            print("out of time; what is measured is in the file")
            return
        chosen = shapes.tiny(layer) if given.device == "cpu" else layer
        try:
            row = measure(chosen, given.device, dtype, rates, given.quick, given.eager)
        except RuntimeError as failure:
            record.add(**chosen.as_row(), failed={"layer": str(failure)[:500]}, candidates={})
            print(f"{chosen.label()}: FAILED: {failure}", flush=True)
            if "CUDA error" in str(failure):
                sys.exit(1)
            continue
        record.add(**row, padding_recovers=recovered(row))
        print(line(chosen, row), flush=True)
        torch.cuda.empty_cache()
    record.finish()


if __name__ == "__main__":
    main()
