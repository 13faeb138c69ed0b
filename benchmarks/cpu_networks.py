"""Pruned networks end to end on the CPU: this package against every runtime that is installed.

ResNet-18, VGG-16-BN, ResNet-50 and MobileNetV2 at 224x224 with about half of their channels. Ours runs the network as it
was pruned (ragged) and, in a second table, with widths rounded to multiples of 8. A peer runs the ragged network too, and
the same one zero-padded to multiples of 8; its better time counts. Every runtime lives in a process of its own and they
take turns. One thread: process CPU time; two threads: wall time. Ratios are medians over rounds of the ratio within a round;
who is far behind after a few rounds leaves the race.

    python benchmarks/cpu_networks.py             # everything, about 15 minutes, to benchmarks/results/
    python benchmarks/cpu_networks.py --quick     # one thread, few rounds, ragged only, no torch.compile, on the screen
    python benchmarks/cpu_networks.py --isa avx2  # this package, torch and oneDNN capped at AVX2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from cpu_runtimes import LEAST_ROUNDS, PACKAGES, environment, installed, parser, pin_environment, write
from cpu_workers import OURS, Times, Worker, medians, over_ours, prepared, processes, race

VARIANTS = ("ragged", "padded", "rounded", "dense")
#: what competes with each other
RACES = (("ragged", "padded"), ("rounded",), ("dense",))
#: networks that are measured unpruned and rounded, too; those of VGG-16 take most of a second per call, and long to prepare
WHOLE = ("ResNet-18", "ResNet-50", "MobileNetV2")


def variants(name: str, runtime: str, batch: int, threads: int, quick: bool) -> list[str]:
    """What a runtime is given. torch.compile takes minutes to prepare: it has the case that most people ask about."""
    whole = threads == 1 and batch > 1 and not quick and name in WHOLE
    if runtime == OURS:
        return ["ragged", "rounded"] if whole else ["ragged"]
    if runtime == "torch.compile":
        return ["ragged"] if threads == 1 and batch > 1 and not quick else []
    return ["ragged", "padded"] + (["rounded", "dense"] if whole and not runtime.startswith("eager") else [])


def truth(folder: Path, x: Any) -> Path:
    """A file with the logits of every variant; the first image in float64, the others to see mix-ups."""
    import torch

    file = folder / f"expected-{len(x)}.pt"
    if not file.exists():
        logits = {}
        with torch.inference_mode():
            for variant in VARIANTS:
                if not (folder / f"{variant}.pt").exists():
                    continue
                model = torch.load(folder / f"{variant}.pt", weights_only=False)
                logits[variant] = model(x).double()
                logits[variant][:1] = model.double()(x[:1].double())
        torch.save(logits, file)
    return file


def measure(
    workers: dict[str, Worker],
    name: str,
    folder: Path,
    batch: int,
    threads: int,
    options: argparse.Namespace,
    deadline: float,
) -> dict[str, Any]:
    """Median seconds per runtime and variant, ratios, errors; a worker that fails is stopped and taken out."""
    import torch
    from cpu_network_peers import Setting

    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = truth(folder, x)
    wanted = {r: variants(name, r, batch, threads, options.quick) for r in workers}
    setting = {
        runtime: Setting({v: folder / f"{v}.pt" for v in of}, x, threads, expected)
        for runtime, of in wanted.items()
        if of
    }
    active, errors, failed = prepared(workers, setting)
    rounds = LEAST_ROUNDS if options.quick else options.rounds
    times = race(active, rounds, threads, RACES, {("eager", "ragged")}, deadline)
    return {
        "network": name,
        "batch": batch,
        "threads": threads,
        "rounds": len(times[OURS, "ragged"]),
        "milliseconds": {v: {r: round(ms, 3) for r, ms in of.items()} for v, of in medians(times).items()},
        "samples": {f"{runtime}, {variant}": len(of) for (runtime, variant), of in times.items()},
        "errors": errors,
        "failed": failed,
        **ratios(times),
    }


def ratios(times: Times) -> dict[str, Any]:
    """Ours against the best peer (ragged or padded; rounded), against eager, and against the best one unpruned."""

    def best(variants: tuple[str, ...], own: str = "ragged") -> tuple[float, str] | None:
        peers = [
            (over_ours(times, key, own), key[0]) for key in times if key[1] in variants and key[0] != OURS
        ]
        return min(peers, default=None)

    middle = medians(times)
    result: dict[str, Any] = {"ours_ms": middle["ragged"][OURS]}
    if peer := best(("ragged", "padded")):
        least = min(of[peer[1]] for v, of in middle.items() if v in ("ragged", "padded") and peer[1] in of)
        result |= {"best_peer": peer[1], "best_peer_ms": least, "ratio": peer[0]}
    if times.get(eager := ("eager", "ragged")):
        result["over_eager"] = over_ours(times, eager)
    if unpruned := best(("dense",)):
        result["over_unpruned"] = unpruned[0]
    if (OURS, "rounded") in times and (peer := best(("rounded",), "rounded")):
        result |= {
            "rounded_ms": middle["rounded"][OURS],
            "rounded_peer": peer[1],
            "rounded_ratio": peer[0],
        }
    return result


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | batch | threads | rounds | ours, ms | best peer | ms | ratio | over eager | over the unpruned network in "
        "its best peer | rounded to 8: ours, ms | best peer | ratio | error at the logits |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]

    def shown(row: dict[str, Any], key: str, digits: int = 2) -> str:
        value = row.get(key, "")
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    for row in rows:
        cells = [
            row["network"],
            str(row["batch"]),
            str(row["threads"]),
            str(row["rounds"]),
            shown(row, "ours_ms", 1),
        ]
        cells += [shown(row, "best_peer"), shown(row, "best_peer_ms", 1)]
        cells += [shown(row, key) for key in ("ratio", "over_eager", "over_unpruned")]
        cells += [shown(row, "rounded_ms", 1), shown(row, "rounded_peer"), shown(row, "rounded_ratio")]
        lines.append("| " + " | ".join([*cells, f"{max(row['errors']['ours'].values()):.1e}"]) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=15, seconds=3600)
    made.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    made.add_argument("--batches", type=int, nargs="*", default=[8, 1])
    part = "only those whose name contains one of these"
    made.add_argument("--networks", nargs="*", default=[], help=part)
    made.add_argument("--peers", nargs="*", default=None, help=part)
    return made.parse_args()


def main() -> None:
    options = arguments()
    pin_environment(options.isa)
    import torch
    from cpu_network_peers import RUNTIMES, export
    from networks import NETWORKS, prune

    begin = time.monotonic()
    names = [n for n in NETWORKS if not options.networks or any(part in n for part in options.networks)]
    threads_of = options.threads[:1] if options.quick else options.threads
    found, versions, missing = installed(RUNTIMES, options.isa)
    runtimes = [
        r for r in found if r == OURS or options.peers is None or any(part in r for part in options.peers)
    ]
    share = options.seconds / max(1, len(names) * len(options.batches) * len(threads_of))
    context = processes()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            folder = Path(temporary) / name
            folder.mkdir()
            workers = {runtime: Worker(context, runtime) for runtime in runtimes}
            pruned = prune(name)
            for variant in VARIANTS:
                if variant in ("rounded", "dense") and name not in WHOLE:
                    continue
                torch.save(getattr(pruned, variant), folder / f"{variant}.pt")
                if any(runtime in PACKAGES for runtime in runtimes):
                    export(folder / f"{variant}.pt", torch.randn(1, 3, 224, 224))
            del pruned
            for batch in options.batches:
                for threads in threads_of:
                    deadline = begin + share * (len(rows) + 1)
                    row = measure(workers, name, folder, batch, threads, options, deadline)
                    rows.append(row)
                    print(f"[{time.monotonic() - begin:.0f} s]", table([row]).splitlines()[-1], flush=True)
                    print(json.dumps(row["milliseconds"]), row["failed"] or "", flush=True)
            for worker in workers.values():
                worker.stop()
            for file in folder.iterdir():
                file.unlink()
    print(table(rows))
    if options.quick or options.networks or options.peers is not None:
        return
    facts = environment(
        options.isa, versions, missing, rounds=options.rounds, seconds=round(time.monotonic() - begin)
    )
    facts |= {
        "threads": options.threads,
        "clock": "one thread: process CPU time; more: wall time",
        "image": "3x224x224",
    }
    heading = [
        "# Pruned networks on the CPU\n",
        "Ratio: time of the fastest peer, ragged or padded to multiples of 8, over ours, median over rounds; higher is better. "
        "Error: largest over the largest logit, against float64.\n",
    ]
    write(options.out, f"cpu_networks-{options.isa}", heading, facts, table(rows), rows)


if __name__ == "__main__":
    main()
