"""Pruned networks end to end on the CPU: this package against every runtime that is installed.

ResNet-18, VGG-16-BN, ResNet-50 and MobileNetV2 at 224x224 with about half of their channels. Ours runs the network as it
was pruned (ragged) and, in a second table, with widths rounded to multiples of 8. A peer runs the ragged network too, and
the same one zero-padded to multiples of 8; its better time counts. Every runtime lives in a process of its own and they
take turns. One thread: process CPU time; two threads: wall time.

    python benchmarks/cpu_networks.py             # everything, below 10 minutes, to benchmarks/results/
    python benchmarks/cpu_networks.py --quick     # one thread, few rounds, ragged only, no torch.compile, on the screen
    python benchmarks/cpu_networks.py --isa avx2  # this package, torch and oneDNN capped at AVX2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--isa", choices=["native", "avx2"], default="native")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="fewer rounds, at least 5, where this is not met"
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 1])
    parser.add_argument(
        "--networks", nargs="*", default=[], help="only those whose name contains one of these"
    )
    parser.add_argument(
        "--peers", nargs="*", default=None, help="only those whose name contains one of these"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def pin_environment(isa: str) -> None:
    """What the libraries read when they load: start again with it set."""
    keep = str(1 << 30)  # the allocator keeps freed memory, in every runtime alike
    wanted = {"MALLOC_MMAP_THRESHOLD_": keep, "MALLOC_TRIM_THRESHOLD_": keep, "OMP_WAIT_POLICY": "PASSIVE"}
    if isa == "avx2":
        wanted |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "LIGHTNING_PRUNE_CPU_LEVEL": "avx2"}
        wanted |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        path = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        os.execv(sys.executable, [sys.executable, *sys.argv])


def variants(runtime: str, batch: int, threads: int, options: argparse.Namespace) -> list[str]:
    """What a runtime is given. Those that were never the fastest, and torch.compile, which takes long to prepare, get less."""
    whole = threads == 1 and not options.quick
    if runtime == "ours":
        return ["ragged", "rounded"] if whole else ["ragged"]
    if runtime == "torch.compile":
        return ["ragged"] if whole and batch > 1 else []
    if runtime.startswith("eager"):
        return ["ragged"]
    return ["ragged", "padded", "dense"] + (["rounded"] if whole else [])


class Worker:
    """A runtime in its own process."""

    def __init__(
        self, context: Any, runtime: str, threads: int, files: dict[str, Path], x: Any, expected: Path
    ) -> None:
        from cpu_network_peers import serve

        self.runtime, self.variants = runtime, list(files)
        self.pipe, far = context.Pipe()
        self.process = context.Process(
            target=serve, args=(far, runtime, threads, files, x, expected), daemon=True
        )
        self.process.start()
        far.close()

    def ready(self, limit: float = 240.0) -> dict[str, float] | str:
        """Errors per variant, or why it cannot run."""
        if not self.pipe.poll(limit):
            return f"not ready after {limit:.0f} s"
        try:
            answer: dict[str, float] | str = self.pipe.recv()
        except EOFError:
            return "the process died"
        return answer

    def time(self, variant: str) -> tuple[float, float]:
        self.pipe.send(variant)
        answer = self.pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.runtime}, {variant}: {answer}")
        cpu, wall = answer
        return cpu, wall

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(5)
        self.process.kill()
        self.process.join()


def measure(
    context: Any,
    name: str,
    folder: Path,
    batch: int,
    threads: int,
    options: argparse.Namespace,
    deadline: float,
) -> dict[str, Any]:
    """Median seconds per runtime and variant, ratios, errors."""
    import torch
    from cpu_network_peers import available

    runtimes = [
        r
        for r in available(options.isa != "native")[0]
        if r == "ours" or options.peers is None or any(part in r for part in options.peers)
    ]
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = folder / f"expected-{batch}.pt"
    if not expected.exists():
        small = x[:1].double()  # the first image is enough to see rounding, the others to see mix-ups
        truth = {}
        with torch.inference_mode():
            for variant in ("dense", "ragged", "padded", "rounded"):
                model = torch.load(folder / f"{variant}.pt", weights_only=False)
                truth[variant] = model(x).double()
                truth[variant][:1] = model.double()(small)
        torch.save(truth, expected)
    workers, failed = [], {}
    errors: dict[str, dict[str, float]] = {}
    for runtime in runtimes:
        files = {v: folder / f"{v}.pt" for v in variants(runtime, batch, threads, options)}
        if not files:
            continue
        worker = Worker(context, runtime, threads, files, x, expected)
        # Ours chooses by measuring: nobody else may run meanwhile.
        answer = worker.ready() if runtime == "ours" else None
        workers.append(worker)
        if answer is not None:
            if isinstance(answer, str):
                raise RuntimeError(answer)
            errors[runtime] = answer
    for worker in list(workers):
        if worker.runtime in errors:
            continue
        answer = worker.ready()
        if isinstance(answer, str):
            failed[worker.runtime] = answer
            worker.stop()
            workers.remove(worker)
        else:
            errors[worker.runtime] = answer
    times: dict[tuple[str, str], list[float]] = {}
    order = random.Random(0)
    rounds = 5 if options.quick else options.rounds
    for number in range(rounds):
        if number >= 5 and time.time() > deadline:
            rounds = number
            break
        turns = [
            (w, v)
            for w in workers
            for v in w.variants
            if v != "dense" or number < 3  # far slower, and only its size matters
        ]
        for worker, variant in order.sample(turns, len(turns)):
            cpu, wall = worker.time(variant)
            times.setdefault((worker.runtime, variant), []).append(cpu if threads == 1 else wall)
    for worker in workers:
        worker.stop()
    seconds: dict[str, dict[str, float]] = {}
    for (runtime, variant), values in times.items():
        seconds.setdefault(variant, {})[runtime] = statistics.median(values)
    return {
        "network": name,
        "batch": batch,
        "threads": threads,
        "rounds": rounds,
        "milliseconds": {v: {r: round(s * 1e3, 3) for r, s in of.items()} for v, of in seconds.items()},
        "errors": errors,
        "failed": failed,
        **ratios(seconds),
    }


def ratios(seconds: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ours against the best peer (ragged or padded; rounded), against eager, and against the best one unpruned."""
    result: dict[str, Any] = {}
    own = seconds["ragged"]["ours"]
    peers = {r: s for r, s in seconds["ragged"].items() if r != "ours"}
    for runtime, value in seconds.get("padded", {}).items():
        if value < peers.get(runtime, float("inf")):
            peers[runtime] = value
    if peers:
        best = min(peers, key=peers.__getitem__)
        result |= {
            "ours_ms": own * 1e3,
            "best_peer": best,
            "best_peer_ms": peers[best] * 1e3,
            "ratio": peers[best] / own,
        }
    if "eager" in seconds["ragged"]:
        result["over_eager"] = seconds["ragged"]["eager"] / own
    if seconds.get("dense"):
        result["over_unpruned"] = min(seconds["dense"].values()) / own
    rounded = dict(seconds.get("rounded", {}))
    if len(rounded) > 1:
        mine = rounded.pop("ours")
        best = min(rounded, key=rounded.__getitem__)
        result |= {"rounded_ms": mine * 1e3, "rounded_peer": best, "rounded_ratio": rounded[best] / mine}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | batch | threads | ours, ms | best peer | ms | ratio | over eager | over the unpruned network in its "
        "best peer | rounded to 8: ours, ms | best peer | ratio | error at the logits |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]

    def shown(row: dict[str, Any], key: str, digits: int = 2) -> str:
        value = row.get(key, "")
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    for row in rows:
        cells = [row["network"], str(row["batch"]), str(row["threads"]), shown(row, "ours_ms", 1)]
        cells += [shown(row, "best_peer"), shown(row, "best_peer_ms", 1)]
        cells += [shown(row, key) for key in ("ratio", "over_eager", "over_unpruned")]
        cells += [shown(row, "rounded_ms", 1), shown(row, "rounded_peer"), shown(row, "rounded_ratio")]
        lines.append("| " + " | ".join([*cells, f"{max(row['errors']['ours'].values()):.1e}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    pin_environment(options.isa)
    import torch
    from cpu_conv import environment
    from cpu_network_peers import available
    from networks import NETWORKS, prune

    from lightning_prune.files import write_atomically

    begin = time.time()
    names = [n for n in NETWORKS if not options.networks or any(part in n for part in options.networks)]
    threads_of = options.threads[:1] if options.quick else options.threads
    share = options.seconds / max(1, len(names) * len(options.batches) * len(threads_of))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cpu_network_peers", "networks"])
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            folder = Path(temporary) / name
            folder.mkdir()
            pruned = prune(name)
            for variant in ("dense", "ragged", "padded", "rounded"):
                torch.save(getattr(pruned, variant), folder / f"{variant}.pt")
            del pruned
            for batch in options.batches:
                for threads in threads_of:
                    deadline = begin + share * (len(rows) + 1)
                    row = measure(context, name, folder, batch, threads, options, deadline)
                    rows.append(row)
                    print(f"[{time.time() - begin:.0f} s]", table([row]).splitlines()[-1], flush=True)
                    print(json.dumps(row["milliseconds"]), row["failed"] or "", flush=True)
            for file in folder.iterdir():
                file.unlink()
    _, versions, missing = available(options.isa != "native")
    facts = environment(options.isa, versions, missing, 5 if options.quick else options.rounds)
    facts |= {
        "threads": options.threads,
        "clock": "one thread: process CPU time; more: wall time",
        "image": "3x224x224",
    }
    facts["seconds"] = round(time.time() - begin)
    print(table(rows))
    if options.quick or options.networks or options.peers is not None:
        return
    stem = f"cpu_networks-{options.isa}"
    text = [
        "# Pruned networks on the CPU\n",
        "Ratio: time of the fastest peer, ragged or padded to multiples of 8, over ours; higher is better. Error: largest "
        "over the largest logit, against float64.\n",
        *(f"- {key}: {value}" for key, value in facts.items() if key != "features"),
        "",
        table(rows),
        "",
    ]
    write_atomically(options.out / f"{stem}.md", "\n".join(text).encode())
    content = {"environment": facts, "results": rows}
    write_atomically(options.out / f"{stem}.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"written: {options.out / stem}.md and .json")


if __name__ == "__main__":
    main()
