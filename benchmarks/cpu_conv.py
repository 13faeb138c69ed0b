"""Time of one fused convolution (conv + bias + ReLU, float32) on the CPU against every runtime that is installed.

Each shape runs in this project and in every peer, at its own width and, for the peers, also zero-padded to multiples of 8,
which is what a user of that runtime could do instead. Interleaved rounds, one thread, process CPU time, medians.

    python benchmarks/cpu_conv.py            # all shapes, below 8 minutes, to benchmarks/results/cpu_conv-native.{md,json}
    python benchmarks/cpu_conv.py --quick    # one shape per class, only on the screen
    python benchmarks/cpu_conv.py --isa avx2 # caps this project and oneDNN at AVX2
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from cpu_runtimes import environment, installed, parser, pin_environment, take_turns, write

#: peers that "auto" could have taken; their padded forms are given tensors that are padded already
TORCH = ("eager", "eager channels_last", "oneDNN prepacked")


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
    other = batches([(37, 77, 56), (64, 128, 56), (128, 256, 28), (128, 256, 14)], stride=2)
    other += batches([(29, 31, 28)], kernel=5) + batches([(29, 61, 56)], kernel=5, stride=2)
    other += batches([(3, 37, 112), (3, 64, 224)], kernel=7, stride=2) + batches([(45, 47, 28)], dilation=2)
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


def cases(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Class and shape of what ``--classes`` and ``--quick`` ask for."""
    return [
        (name, shape)
        for name, shapes in shape_classes().items()
        if not options.classes or any(part in name for part in options.classes)
        for shape in (shapes[:1] if options.quick else shapes)
    ]


def measure(shape: Any, peers: dict[str, Any], rounds: int, budget: float, deadline: float) -> dict[str, Any]:
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
    times = take_turns(calls, rounds, budget, deadline)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((name for name in medians if name not in ("ours", "auto")), key=medians.__getitem__)
    torch_best = min(value for name, value in medians.items() if name in TORCH)
    return {
        "shape": shape.name,
        "microseconds": {name: round(value, 2) for name, value in medians.items()},
        "gflops": round(shape.flops / medians["ours"] / 1e3, 1),
        "best_peer": best,
        "ratio": medians[best] / medians["ours"],
        "auto_ratio": medians[best] / medians["auto"],
        "auto_over_torch": torch_best / medians["auto"],
        "rounds": len(times["ours"]),
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
        "| class | geometric mean | worst | auto: geometric mean | worst | auto over torch, same tensors: worst | shapes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, rows in results.items():
        cells = []
        for key in ("ratio", "auto_ratio"):
            ratios = [row[key] for row in rows]
            cells += [statistics.geometric_mean(ratios), min(ratios)]
        cells.append(min(row["auto_over_torch"] for row in rows))
        lines.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {len(rows)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, rounds=15, seconds=420)
    arguments.add_argument("--classes", nargs="*", help="only classes whose name contains one of these")
    options = arguments.parse_args()
    pin_environment(options.isa, OMP_NUM_THREADS="1")
    import torch
    from cpu_conv_peers import PEERS

    begin = time.monotonic()
    torch.set_num_threads(1)
    names, versions, missing = installed(PEERS, options.isa)
    peers = {name: PEERS[name] for name in names}
    rounds, budget = (5, 0.001) if options.quick else (options.rounds, 0.003)
    results: dict[str, list[dict[str, Any]]] = {}
    wanted = cases(options)
    with torch.inference_mode():
        for number, (name, shape) in enumerate(wanted):
            deadline = begin + options.seconds * (number + 1) / len(wanted)
            row = measure(shape, peers, rounds, budget, deadline)
            results.setdefault(name, []).append(row)
            print(f"{row['shape']:32} {row['ratio']:5.2f} of {row['best_peer']}", flush=True)
    for name, reason in missing.items():
        print(f"missing peer: {name} ({reason})")
    text = f"{summary(results)}\n{table(results)}"
    print(text)
    if options.quick or options.classes:
        return
    spent = round(time.monotonic() - begin)
    facts = environment(options.isa, versions, missing, rounds=rounds, seconds=spent)
    heading = [
        "# Convolutions on one CPU thread\n",
        "Auto: the module `CompactConv2d`, which times our kernel, torch's and prepacked oneDNN and keeps the fastest. "
        "Ratio: time of the fastest peer, at its own width or padded to multiples of 8, over ours. Error: largest over "
        "the largest result, against float64.\n",
    ]
    write(options.out, f"cpu_conv-{options.isa}", heading, facts, text, results)


if __name__ == "__main__":
    main()
