"""How fast is a training step while channels die? Against the dense, the physically small and the multiplied network.

A step is forward, cross-entropy, backward and SGD with momentum on a batch of 64; one CPU thread, process CPU time. On more
threads it is the clock on the wall that counts. All variants of a network and a share run in turns, so that whatever disturbs
the machine disturbs all of them; the ratios are of medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from cpu_runtimes import machine
from torch import Tensor, nn
from training_models import NETWORKS, random_mask

from lightning_prune import CompactionPlan, compact, trace_channels
from lightning_prune.channels.groups import ChannelGraph, Mask
from lightning_prune.files import write_atomically
from lightning_prune.gates.attach import GateHooks, consumer_channels
from lightning_prune.reconfigure import Reconfigurer
from lightning_prune.skipping import DeadChannelSkipper
from lightning_prune.weights import WeightKeeper

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHARES = (0.0, 0.25, 0.5, 0.75)
COMPILED = (0.0, 0.5)
PEERS = ("dense", "small", "multiplied")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS], default=[])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--compile",
        nargs="*",
        type=float,
        default=list(COMPILED),
        help="shares with torch.compile as a peer; under a minute with `resnet20 --shares 0 0.5 --compile 0 0.5 --rounds 5`",
    )
    parser.add_argument("--threads", type=int, default=1, help="more than one: by the clock on the wall")
    parser.add_argument(
        "--quick", action="store_true", help="batch 8, three rounds, no torch.compile, nothing written"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


Step = Callable[[], None]


def step_of(
    model: nn.Module, x: Tensor, labels: Tensor, hold: tuple[ChannelGraph, Mask] | None = None
) -> Step:
    """One step; with ``hold`` dead channels stay dead, as in a fit."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    keeper: WeightKeeper | None = None
    if hold is not None:
        keeper = WeightKeeper(model, hold[0], lambda: [optimizer])
        keeper.set_mask(hold[1])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        if keeper is not None:
            keeper.zero_dead()

    return step


def with_skipper(skipper: DeadChannelSkipper, step: Step) -> Step:
    """The step as it begins in a fit."""

    def whole() -> None:
        skipper.next_step()
        step()

    return whole


class Variants:
    """The same network several times, as steps to be timed."""

    def __init__(self, name: str, share: float, batch: int, compiled: bool) -> None:
        make, size = NETWORKS[name]
        torch.manual_seed(0)
        self.dense = make().train()
        self.labels = torch.randint(0, 10, (batch,))
        self.x = torch.randn(batch, 3, size, size)
        self.graph = trace_channels(self.dense, self.x[:1])
        self.mask = random_mask(self.graph, share, seed=1)
        self.steps: dict[str, Step] = {}
        self.plain("dense", self.dense, compiled)
        if share > 0:
            plan = CompactionPlan.from_mask(self.graph, self.mask)
            self.plain("small", compact(self.dense, self.x[:2], plan), compiled)
        for label in FORMATS:
            self.multiplied(label)
        self.ours()
        if share > 0:
            self.reconfigured()

    def plain(self, name: str, model: nn.Module, compiled: bool) -> None:
        for label, memory_format in FORMATS.items():
            own = copy.deepcopy(model).train().to(memory_format=memory_format)
            x = self.x.contiguous(memory_format=memory_format)
            self.steps[f"{name} {label}"] = step_of(own, x, self.labels)
            if compiled and label == "nhwc":
                twin = torch.compile(copy.deepcopy(own))
                self.steps[f"{name} compiled"] = step_of(twin, x, self.labels)

    def _gated(self, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
        """The masked network, a learned gate on every channel that can have one."""
        model = copy.deepcopy(self.dense).to(memory_format=memory_format)
        keeper = WeightKeeper(model, self.graph)
        keeper.set_mask(self.mask)
        keeper.zero_dead()
        alive = torch.from_numpy(self.mask) | ~consumer_channels(self.graph)
        gates = nn.Parameter(alive.float())
        GateHooks(model, self.graph, lambda training: gates).attach()
        return model

    def multiplied(self, label: str) -> None:
        x = self.x.contiguous(memory_format=FORMATS[label])
        self.steps[f"multiplied {label}"] = step_of(self._gated(FORMATS[label]), x, self.labels)

    def ours(self) -> None:
        model = self._gated()
        skipper = DeadChannelSkipper(model, self.graph, self.x[:1])
        skipper.set_mask(self.mask)
        x = self.x.contiguous(memory_format=torch.channels_last)
        step = step_of(model, x, self.labels, (self.graph, self.mask))
        self.steps["ours"] = with_skipper(skipper, step)

    def reconfigured(self) -> None:
        """Dead channels cut out of parameters and optimizer, a gate on every channel that is left; nothing to hold at zero."""
        model = copy.deepcopy(self.dense).to(memory_format=torch.channels_last)
        keeper = WeightKeeper(model, self.graph)
        keeper.set_mask(self.mask)
        keeper.zero_dead()
        cutter = Reconfigurer(model, self.graph, tuple, lambda: None, lambda graph: None)
        cutter.cut(self.mask, self.x[:2])
        gates = nn.Parameter(torch.ones(self.graph.num_channels))
        GateHooks(model, cutter.graph, lambda training: gates).attach()
        skipper = DeadChannelSkipper(model, cutter.graph)
        skipper.set_mask(self.mask)
        x = self.x.contiguous(memory_format=torch.channels_last)
        step = step_of(model.train(), x, self.labels)
        self.steps["reconfigured"] = with_skipper(skipper, step)


def warm_up(label: str, step: Step) -> str | None:
    """Compilation, the comparison by the clock, workspaces; why a peer cannot run, which is reported and not fatal."""
    try:
        step()
        step()
    except Exception as error:
        if label in ("ours", "reconfigured"):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None


def measure(name: str, share: float, options: argparse.Namespace) -> dict[str, Any]:
    variants = Variants(name, share, options.batch, compiled=share in options.compile)
    failed = {label: error for label, step in variants.steps.items() if (error := warm_up(label, step))}
    for label in failed:
        del variants.steps[label]
    clock = time.process_time if options.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {label: [] for label in variants.steps}
    for _ in range(options.rounds):
        for label, step in variants.steps.items():
            start = clock()
            step()
            times[label].append(clock() - start)
    medians = {label: statistics.median(seconds) for label, seconds in times.items()}
    row = {"network": name, "dead": share, **compared(medians)}
    if failed:
        row["failed"] = failed
    return row


def compared(medians: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of every variant (label -> seconds), the fastest of every peer's, and how much longer it takes than ours."""
    row: dict[str, Any] = {"milliseconds": {k: round(v * 1e3, 2) for k, v in medians.items()}}
    for peer in PEERS:
        labels = [label for label in medians if label.split()[0] == peer]
        if not labels:
            continue
        best = min(labels, key=medians.__getitem__)
        row[f"best_{peer}"] = best
        row[f"vs_{peer}"] = round(medians[best] / medians["ours"], 3)
        if "reconfigured" in medians:
            row[f"reconfigured_vs_{peer}"] = round(medians[best] / medians["reconfigured"], 3)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | dead | ours, ms | best dense | ratio | best small | ratio | multiplied | ratio | cut, ms | to small |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["network"], f"{row['dead']:.0%}", f"{row['milliseconds']['ours']:.1f}"]
        for peer in PEERS:
            best = row.get(f"best_{peer}")
            if best is None:
                cells += ["", ""]
                continue
            cells += [f"{row['milliseconds'][best]:.1f} ({best.removeprefix(peer).strip()})"]
            cells += [f"{row[f'vs_{peer}']:.2f}"]
        cut = row["milliseconds"].get("reconfigured")
        cells += [f"{cut:.1f}", f"{row['reconfigured_vs_small']:.2f}"] if cut is not None else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Machine and load."""
    return machine() | {"load_average": round(os.getloadavg()[0], 1)}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds, options.batch, options.compile, options.shares = 3, 8, [], [0.0, 0.5]
    facts = environment() | {
        "clock": f"{'process CPU' if options.threads == 1 else 'wall'} time, median",
        "rounds": options.rounds,
        "batch": options.batch,
        "torch.compile among the peers at": options.compile,
    }
    rows: list[dict[str, Any]] = []
    for name in options.networks or NETWORKS:
        for share in options.shares:
            rows.append(measure(name, share, options))
            print(json.dumps(rows[-1]), flush=True)
            torch.compiler.reset()
        if not options.quick:
            write(rows, facts, options.out, options.threads)
    print(table(rows))


def write(rows: list[dict[str, Any]], facts: dict[str, Any], folder: Path, threads: int) -> None:
    name = "training_step" if threads == 1 else f"training_step-{threads}-threads"
    notes = [
        f"# A training step on {'one CPU thread' if threads == 1 else f'{threads} CPU threads'}\n",
        "Forward, loss, backward and SGD with momentum. Ours: the full-size network, a learned gate on every channel, dead "
        "channels at zero. Small: the compacted network of the same widths. Multiplied: the gated network with torch's "
        "kernels. Cut: gated too, after `reconfigure_every_n_epochs` (by default at the selection) has cut dead channels out. "
        "In brackets the memory "
        "format, or compiled, of the fastest peer.\n",
        *(f"- {key}: {value}" for key, value in facts.items() if key != "features"),
        "",
    ]
    write_atomically(folder / f"{name}.md", ("\n".join(notes) + "\n" + table(rows) + "\n").encode())
    content = {"environment": facts, "rows": rows}
    write_atomically(folder / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
