"""Time of one fused convolution (conv + bias + ReLU, float32) on the CPU against every runtime that is installed.

Each shape runs in this project and in every peer, at its own width and, for the peers, also zero-padded to multiples of 8,
which is what a user of that runtime could do instead. Interleaved rounds, one thread, process CPU time, medians.

    python benchmarks/cpu_conv.py            # all shapes, to benchmarks/results/
    python benchmarks/cpu_conv.py --quick    # one shape per class, only on the screen
    python benchmarks/cpu_conv.py --isa avx2 # caps this project and oneDNN at AVX2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape per class, few rounds, no files")
    parser.add_argument("--isa", choices=["native", "avx2"], default="native")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--classes", nargs="*", help="only classes whose name contains one of these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def pin_environment(isa: str) -> None:
    """Thread counts and instruction sets are read when the libraries load: start again with them set."""
    # The allocator keeps freed memory, or page faults fall on whoever runs after a trim.
    keep = str(1 << 30)
    wanted = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": keep, "MALLOC_TRIM_THRESHOLD_": keep}
    if isa == "avx2":
        wanted |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "LIGHTNING_PRUNE_CPU_LEVEL": "avx2"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def shape_classes() -> dict[str, list[Any]]:
    from cpu_conv_peers import Shape

    large = [(29, 31, 56), (45, 45, 56), (64, 64, 56), (37, 41, 28), (90, 90, 28), (128, 128, 28)]
    pointwise = [(37, 101, 28), (64, 256, 56), (251, 67, 28), (512, 128, 28), (101, 333, 14)]
    depthwise = [(37, 56), (64, 56), (101, 28), (192, 28), (333, 14)]

    def batches(shapes: list[tuple[int, int, int]], **settings: Any) -> list[Any]:
        return [Shape(*shape, batch, **settings) for batch in (1, 8) for shape in shapes]

    def one(shapes: list[tuple[int, int, int]], batch: int, **settings: Any) -> list[Any]:
        return [Shape(*shape, batch, **settings) for shape in shapes]

    small = [(251, 263, 7), (512, 512, 7)]
    other = batches([(37, 77, 56), (64, 128, 56)], stride=2) + batches([(29, 31, 28)], kernel=5)
    other += batches([(3, 37, 112)], kernel=7, stride=2) + batches([(45, 47, 28)], dilation=2)
    deep = [
        Shape(c, c, size, batch, stride=stride, groups=c)
        for batch in (1, 8)
        for c, size in depthwise
        for stride in (1, 2)
    ]
    streams = [(37, 45, 28, 96), (101, 90, 14, 192)]
    gather = [Shape(*s[:3], batch, stream=s[3]) for batch in (1, 8) for s in streams]
    runs = [Shape(*s[:3], b, kernel=1, stream=s[3], runs=True) for b in (1, 8) for s in streams]
    return {
        "3x3, maps of 28 and more": batches(large),
        "3x3, 14x14": batches([(101, 115, 14), (256, 256, 14)]),
        "3x3, 7x7, batch 8": one(small, 8),
        "3x3, 7x7, batch 1": one(small, 1),
        "3x3, few channels": batches([(3, 29, 56), (3, 32, 112), (13, 19, 56)]),
        "3x3 stride 2, 5x5, 7x7, dilated": other,
        "1x1": batches(pointwise, kernel=1),
        "depthwise 3x3": deep,
        "3x3 gather and scatter": gather,
        "1x1 gather and scatter, runs": runs,
    }


def measure(shape: Any, peers: dict[str, Any], rounds: int, budget: float) -> dict[str, Any]:
    """Median microseconds per call of ours and of every peer, and the errors against float64."""
    from cpu_conv_peers import Problem, as_tensor, module, own

    problem = Problem.of(shape)
    wide = shape.padded()
    calls = {"ours": own(problem), "auto": module(problem)}
    calls |= {name: make(problem) for name, make in peers.items() if not shape.stream or make_gathers(name)}
    if wide is not None:
        padded = Problem.of(wide)
        calls |= {f"{name}, padded": make(padded) for name, make in peers.items()}
    expected = problem.reference()
    errors = {
        name: float((as_tensor(call()).double() - expected).abs().max() / expected.abs().max())
        for name, call in calls.items()
        if not name.endswith("padded")
    }
    repeats = {}
    for name, call in calls.items():
        call()
        begin = time.process_time_ns()
        call()
        call()
        once = (time.process_time_ns() - begin) / 2e9
        repeats[name] = max(1, min(1000, round(budget / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        # Another order in every round: a runtime's threads may still spin while the next one runs.
        for name in order.sample(list(calls), len(calls)):
            call = calls[name]
            call()  # the others have just used the caches
            begin = time.process_time_ns()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.process_time_ns() - begin) / repeats[name] / 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((name for name in medians if name not in ("ours", "auto")), key=medians.__getitem__)
    return {
        "shape": shape.name,
        "microseconds": {name: round(value, 2) for name, value in medians.items()},
        "gflops": round(shape.flops / medians["ours"] / 1e3, 1),
        "best_peer": best,
        "ratio": medians[best] / medians["ours"],
        "auto_ratio": medians[best] / medians["auto"],
        "error": errors["ours"],
        "peer_error": errors.get(best),
    }


def make_gathers(name: str) -> bool:
    return name not in ("ONNX Runtime", "OpenVINO")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for name, rows in results.items():
        lines += [f"\n### {name}\n", "| shape | ours, us | GFLOP/s | best peer | us | ratio | error |"]
        lines += ["|---|---:|---:|---|---:|---:|---:|"]
        for row in rows:
            ours, best = row["microseconds"]["ours"], row["microseconds"][row["best_peer"]]
            lines.append(
                f"| {row['shape']} | {ours:.0f} | {row['gflops']:.0f} | {row['best_peer']} | {best:.0f} "
                f"| {row['ratio']:.2f} | {row['error']:.1e} |"
            )
    return "\n".join(lines)


def summary(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| class | geometric mean | worst | auto: geometric mean | worst | shapes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in results.items():
        cells = []
        for key in ("ratio", "auto_ratio"):
            ratios = [row[key] for row in rows]
            cells += [math.exp(statistics.fmean(map(math.log, ratios))), min(ratios)]
        lines.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {len(rows)} |")
    return "\n".join(lines)


def environment(isa: str, versions: dict[str, str], missing: dict[str, str], rounds: int) -> dict[str, Any]:
    import torch

    from lightning_prune.ops import _loading

    info = _loading.build_info()
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "isa": isa,
        "features": info.cpu_features() if info else None,
        "torch": torch.__version__,
        "peers": versions,
        "missing_peers": missing,
        "threads": 1,
        "clock": "process CPU time",
        "rounds": rounds,
        "python": platform.python_version(),
    }


def main() -> None:
    options = arguments()
    pin_environment(options.isa)
    import torch
    from cpu_conv_peers import available

    from lightning_prune.files import write_atomically

    torch.set_num_threads(1)
    peers, versions, missing = available(options.isa != "native")
    rounds = 5 if options.quick else options.rounds
    results: dict[str, list[dict[str, Any]]] = {}
    with torch.inference_mode():
        for name, shapes in shape_classes().items():
            if options.classes and not any(part in name for part in options.classes):
                continue
            for shape in shapes[:1] if options.quick else shapes:
                row = measure(shape, peers, rounds, budget=0.001 if options.quick else 0.003)
                results.setdefault(name, []).append(row)
                print(f"{row['shape']:32} {row['ratio']:5.2f} of {row['best_peer']}", flush=True)
    facts = environment(options.isa, versions, missing, rounds)
    for name, reason in missing.items():
        print(f"missing peer: {name} ({reason})")
    text = f"{summary(results)}\n{table(results)}\n"
    print(text)
    if options.quick or options.classes:
        return
    stem = f"cpu_conv-{options.isa}"
    notes = [
        "# Convolutions on one CPU thread\n",
        "Auto: the module `CompactConv2d`, which times our kernel, torch's and prepacked oneDNN and keeps the fastest. "
        "Ratio: time of the fastest peer, at its own width or padded to multiples of 8, over ours. Error: largest over "
        "the largest result, against float64.\n",
        *(f"- {key}: {value}" for key, value in facts.items() if key != "features"),
        "",
    ]
    write_atomically(options.out / f"{stem}.md", ("\n".join(notes) + "\n" + text).encode())
    content = {"environment": facts, "results": results}
    write_atomically(options.out / f"{stem}.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"written: {options.out / stem}.md and .json")


if __name__ == "__main__":
    main()
