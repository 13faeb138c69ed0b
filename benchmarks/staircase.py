"""Latency of one convolution against the number of kept channels: which steps does a runtime climb?

A 3x3, a 1x1 and a depthwise convolution (conv + bias + ReLU, float32, batch 8, one CPU thread, process CPU time) with C -> C
channels for C from 1 to 64 in steps of 1 and on to 128 in steps of 4, here and in every runtime that is installed, in rounds
that take turns. A violation is a width that costs over 5 % more than some larger one: pruning down to it would not pay.

    python benchmarks/staircase.py              # below 5 minutes, to benchmarks/results/staircase-native.{md,json,png}
    python benchmarks/staircase.py --quick      # few widths, only on the screen
    python benchmarks/staircase.py --isa avx2   # this project and oneDNN capped at AVX2
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from cpu_runtimes import environment, installed, parser, pin_environment, take_turns, write

TOLERANCE = 0.05
KINDS = {
    "3x3 at 28x28": (28, 3, False),
    "1x1 at 28x28": (28, 1, False),
    "depthwise 3x3 at 28x28": (28, 3, True),
}


def widths(quick: bool) -> list[int]:
    return [3, 8, 13, 16, 21, 32] if quick else [*range(1, 64), *range(64, 129, 4)]


def measure(
    kind: str, channels: list[int], peers: dict[str, Any], rounds: int, deadline: float
) -> dict[str, list[float]]:
    """Median microseconds per runtime, one per width."""
    from cpu_conv_peers import Problem, Shape, own

    size, kernel, depthwise = KINDS[kind]
    makers = {"ours": own, **peers}
    calls: dict[tuple[str, int], Any] = {}
    for c in channels:
        groups = c if depthwise else 1
        problem = Problem.of(Shape(c, c, size, 8, kernel=kernel, groups=groups))
        for name, make in makers.items():
            calls[name, c] = make(problem)
    times = take_turns(calls, rounds, 0.001, deadline)
    return {name: [round(statistics.median(times[name, c]), 2) for c in channels] for name in makers}


def violations(channels: list[int], microseconds: list[float]) -> list[dict[str, Any]]:
    """Widths that cost over 5 % more than the cheapest larger width, worst first."""
    found = []
    for i, c in enumerate(channels[:-1]):
        j = min(range(i + 1, len(channels)), key=microseconds.__getitem__)
        excess = microseconds[i] / microseconds[j] - 1
        if excess > TOLERANCE:
            found.append({"channels": c, "dearer_than": channels[j], "by": round(excess, 3)})
    return sorted(found, key=lambda v: -v["by"])


def table(results: dict[str, Any]) -> str:
    lines = [
        "| layer | runtime | violations | worst | time of the best peer over ours, geometric mean |",
        "|---|---|---:|---|---:|",
    ]
    for kind, row in results.items():
        peers = [name for name in row["microseconds"] if name != "ours"]
        ours = row["microseconds"]["ours"]
        best = [min(row["microseconds"][p][i] for p in peers) for i in range(len(ours))] if peers else ours
        ratio = statistics.geometric_mean([b / o for b, o in zip(best, ours, strict=True)])
        for name in row["microseconds"]:
            found = row["violations"][name]
            worst = (
                "none"
                if not found
                else f"{found[0]['channels']} costs {found[0]['by'] * 100:.0f} % more than "
                f"{found[0]['dearer_than']}"
            )
            cell = f"{ratio:.2f}" if name == "ours" else ""
            lines.append(f"| {kind} | {name} | {len(found)} | {worst} | {cell} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.6), constrained_layout=True)
    for axis, (kind, row) in zip(axes, results.items(), strict=True):
        limit = 3.0 * max(row["microseconds"]["ours"])
        for name, values in row["microseconds"].items():
            ours = name == "ours"
            axis.plot(
                row["channels"], values, label=name, linewidth=2.2 if ours else 1.1, zorder=3 if ours else 2
            )
        axis.set(title=kind, xlabel="channels", ylabel="microseconds", ylim=(0, limit), xlim=(0, None))
        axis.set_xticks(range(0, max(row["channels"]) + 1, 16))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = parser(__doc__, rounds=15, seconds=240).parse_args()
    pin_environment(options.isa, OMP_NUM_THREADS="1")
    import torch
    from cpu_conv_peers import PEERS

    torch.set_num_threads(1)
    names, versions, missing = installed(PEERS, options.isa)
    peers = {name: PEERS[name] for name in names if name != "eager"}  # never the faster of the two formats
    begin, results = time.monotonic(), {}
    channels = widths(options.quick)
    with torch.inference_mode():
        for number, kind in enumerate(KINDS):
            deadline = begin + options.seconds * (number + 1) / len(KINDS)
            times = measure(kind, channels, peers, 5 if options.quick else options.rounds, deadline)
            results[kind] = {
                "channels": channels,
                "microseconds": times,
                "violations": {name: violations(channels, values) for name, values in times.items()},
            }
            print(
                f"[{time.monotonic() - begin:.0f} s] {kind}: {results[kind]['violations']['ours']}",
                flush=True,
            )
    print(table(results))
    if options.quick:
        print(json.dumps({kind: row["microseconds"] for kind, row in results.items()}))
        return
    spent = round(time.monotonic() - begin)
    facts = environment(options.isa, versions, missing, rounds=options.rounds, seconds=spent)
    stem = f"staircase-{options.isa}"
    heading = ["# Latency against kept channels\n", f"![latency against channels]({stem}.png)\n"]
    write(options.out, stem, heading, facts, table(results), results)
    plot(
        results,
        f"conv + bias + ReLU, batch 8, one thread ({facts['cpu']}, {options.isa})",
        options.out / f"{stem}.png",
    )


if __name__ == "__main__":
    main()
