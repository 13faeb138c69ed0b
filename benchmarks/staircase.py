"""Latency against the number of kept channels: which steps does a runtime climb?

Conv + bias + ReLU with C -> C channels at 28x28 (3x3, 1x1, depthwise 3x3), float32, batch 8, one CPU thread, process CPU time,
here and in every runtime that is installed, in rounds that take turns; for every C from 1 to 64:

- *in a network*: several such layers between a 1x1 convolution of an image of three colours and the mean over all pixels, as
  every runtime runs networks: here ``optimize_for_inference``, which lays maps out as its kernels like them;
- *alone*: one layer between tensors of the caller, dense and channels_last here, and on to 128 channels in steps of 4.

A violation is a width that costs over 5 % more than some larger one: pruning down to it would not pay. The best peer of a
width is the fastest runtime at that width or zero-padded to a multiple of 8.

    python benchmarks/staircase.py              # about 6 minutes, to benchmarks/results/staircase-native.{md,json,png}
    python benchmarks/staircase.py --quick      # few widths, only on the screen
    python benchmarks/staircase.py --isa avx2   # this project and oneDNN capped at AVX2
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_runtimes import environment, installed, parser, pin_environment, take_turns, write

TOLERANCE = 0.05
SIZE, BATCH = 28, 8
OURS = "ours"
#: never the faster of torch's two formats, and what it compiles calls the kernels of "oneDNN prepacked"
LEFT_OUT = ("eager", "torch.compile")
Calls = dict[tuple[str, int], Callable[[], object]]


@dataclass(frozen=True)
class Kind:
    """A layer, and how many of them make a network."""

    name: str
    kernel: int
    depthwise: bool
    layers: int


KINDS = (Kind("3x3", 3, False, 4), Kind("1x1", 1, False, 8), Kind("depthwise 3x3", 3, True, 8))
SCOPES = (
    "alone",
    "in a network",
)  # in this order: networks leave a heap behind in which allocations take longer


def widths(scope: str, quick: bool) -> list[int]:
    if quick:
        return [3, 8, 13, 16, 21, 32]
    return list(range(1, 65)) if scope == "in a network" else [*range(1, 64), *range(64, 129, 4)]


def network(kind: Kind, channels: int) -> Any:
    """``kind.layers`` layers of so many channels between a 1x1 convolution and a global mean."""
    import torch
    from torch import nn

    torch.manual_seed(channels)
    groups = channels if kind.depthwise else 1
    alike = (channels, channels, kind.kernel, 1, kind.kernel // 2, 1, groups)
    layers = [nn.Conv2d(3, channels, 1), *(nn.Conv2d(*alike) for _ in range(kind.layers))]
    active = [module for layer in layers for module in (layer, nn.ReLU())]
    return nn.Sequential(*active, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@contextlib.contextmanager
def kept_environment() -> Iterator[None]:
    """What a peer sets for itself holds for nobody else."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def networks(kind: Kind, channels: list[int], peers: list[str], folder: Path) -> Calls:
    """Every runtime with the network of every width, each checked against float64."""
    import torch
    from cpu_network_peers import RUNTIMES, Given, export

    with torch.inference_mode(False):  # what is exported must not be tensors of that mode
        x = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    calls: Calls = {}
    for c in channels:
        file = folder / f"{c}.pt"
        with torch.inference_mode(False):
            model = network(kind, c)
            torch.save(model, file)
            export(file, x)
        expected = model.double()(x.double())
        for name in (OURS, *peers):
            with kept_environment():
                run = calls[name, c] = RUNTIMES[name](Given(file, x, 1))
            error = float((run().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
            if error > 1e-4:
                raise RuntimeError(
                    f"{name}, {kind.name}, {c} channels: off by {error:.1e}, at most 1e-4 is expected"
                )
    return calls


def single(kind: Kind, channels: list[int], peers: list[str]) -> Calls:
    """Every runtime with one layer of every width."""
    from cpu_conv_peers import PEERS, Problem, Shape, own

    calls: Calls = {}
    for c in channels:
        groups = c if kind.depthwise else 1
        problem = Problem.of(Shape(c, c, SIZE, BATCH, kernel=kind.kernel, groups=groups))
        for name, make in {OURS: own, **{name: PEERS[name] for name in peers}}.items():
            calls[name, c] = make(problem)
    return calls


def violations(channels: list[int], microseconds: list[float]) -> list[dict[str, Any]]:
    """Widths that cost over 5 % more than the cheapest larger width, worst first."""
    found = []
    for i, c in enumerate(channels[:-1]):
        j = min(range(i + 1, len(channels)), key=microseconds.__getitem__)
        excess = microseconds[i] / microseconds[j] - 1
        if excess > TOLERANCE:
            found.append({"channels": c, "dearer_than": channels[j], "by": round(excess, 3)})
    return sorted(found, key=lambda v: -v["by"])


def over_best_peer(channels: list[int], microseconds: dict[str, list[float]]) -> float | None:
    """Time of the best peer, ragged or padded to a multiple of 8, over ours: geometric mean over the widths."""
    at = {c: i for i, c in enumerate(channels)}
    ratios = []
    for c in channels:
        of = [c, -(-c // 8) * 8]
        peers = [row[at[w]] for name, row in microseconds.items() if name != OURS for w in of if w in at]
        if peers:
            ratios.append(min(peers) / microseconds[OURS][at[c]])
    return statistics.geometric_mean(ratios) if ratios else None


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| layer | runtime | violations | worst | time of the best peer over ours, geometric mean |",
        "|---|---|---:|---|---:|",
    ]
    for kind, row in rows.items():
        ratio = over_best_peer(row["channels"], row["microseconds"])
        for name in row["microseconds"]:
            found = row["violations"][name]
            worst = "none"
            if found:
                worst = f"{found[0]['channels']} costs {found[0]['by'] * 100:.0f} % more than {found[0]['dearer_than']}"
            cell = f"{ratio:.2f}" if name == OURS and ratio else ""
            lines.append(f"| {kind} | {name} | {len(found)} | {worst} | {cell} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (6 * len(KINDS), 4.4 * len(results))
    figure, grid = plt.subplots(
        len(results), len(KINDS), figsize=size, constrained_layout=True, squeeze=False
    )
    for axes, (scope, rows) in zip(grid, results.items(), strict=True):
        for axis, (kind, row) in zip(axes, rows.items(), strict=True):
            limit = 3.0 * max(row["microseconds"][OURS])
            for name, values in row["microseconds"].items():
                ours = name == OURS
                axis.plot(
                    row["channels"],
                    values,
                    label=name,
                    linewidth=2.2 if ours else 1.1,
                    zorder=3 if ours else 2,
                )
            axis.set(title=f"{kind}, {scope}", xlabel="channels", ylabel="microseconds per layer")
            axis.set(ylim=(0, limit), xlim=(0, None))
            axis.set_xticks(range(0, max(row["channels"]) + 1, 16))
            axis.grid(alpha=0.3)
        axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    options = parser(__doc__, rounds=15, seconds=400).parse_args()
    pin_environment(options.isa, OMP_NUM_THREADS="1")
    import torch
    from cpu_conv_peers import PEERS
    from cpu_network_peers import RUNTIMES

    torch.set_num_threads(1)
    found, versions, missing = installed([name for name in RUNTIMES if name != OURS], options.isa)
    peers = [name for name in found if name not in LEFT_OUT and name in PEERS]
    begin, parts = time.monotonic(), len(SCOPES) * len(KINDS)
    results: dict[str, dict[str, Any]] = {scope: {} for scope in SCOPES}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for number, (scope, kind) in enumerate((scope, kind) for scope in SCOPES for kind in KINDS):
            channels, many = widths(scope, options.quick), scope == "in a network"
            calls = {}
            gc.collect()  # no runtime's remains in the heap of the next ones
            calls = networks(kind, channels, peers, Path(folder)) if many else single(kind, channels, peers)
            deadline = begin + options.seconds * (number + 1) / parts
            times = take_turns(calls, 5 if options.quick else options.rounds, 0.001, deadline)
            layers = kind.layers if many else 1
            row = {
                name: [round(statistics.median(times[name, c]) / layers, 2) for c in channels]
                for name in (OURS, *peers)
            }
            wrong = {name: violations(channels, values) for name, values in row.items()}
            results[scope][kind.name] = {"channels": channels, "microseconds": row, "violations": wrong}
            print(f"[{time.monotonic() - begin:.0f} s] {kind.name} {scope}: {wrong[OURS]}", flush=True)
    results = {scope: results[scope] for scope in reversed(SCOPES)}  # what matters first
    tables = "\n\n".join(f"## A layer {scope}\n\n{table(rows)}" for scope, rows in results.items())
    print(tables)
    if options.quick:
        print(json.dumps({s: {k: row["microseconds"] for k, row in of.items()} for s, of in results.items()}))
        return
    spent = round(time.monotonic() - begin)
    facts = environment(options.isa, versions, missing, rounds=options.rounds, seconds=spent)
    stem = f"staircase-{options.isa}"
    heading = ["# Latency against kept channels\n", f"![latency against channels]({stem}.png)\n"]
    write(options.out, stem, heading, facts, tables, results)
    title = f"conv + bias + ReLU, 28x28, batch 8, one thread ({facts['cpu']}, {options.isa})"
    plot(results, title, options.out / f"{stem}.png")


if __name__ == "__main__":
    main()
