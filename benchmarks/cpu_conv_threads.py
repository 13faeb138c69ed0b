"""Time of one convolution (conv + bias + ReLU, float32) on two CPU threads, every runtime in a process of its own.

The shapes of cpu_conv.py without those that gather. Ours is what `optimize_for_inference` makes of the layer, peers run it at
its own width and zero-padded to multiples of 8; everybody gets the memory format that suits. Wall time, medians over rounds of
the ratio within a round; peers that are far behind after a few rounds leave the race.

    python benchmarks/cpu_conv_threads.py          # about 7 minutes, to benchmarks/results/cpu_conv_threads-native.{md,json}
    python benchmarks/cpu_conv_threads.py --quick  # one shape per class, only on the screen
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from cpu_conv import cases
from cpu_runtimes import LEAST_ROUNDS, environment, installed, parser, pin_environment, write
from cpu_workers import OURS, Worker, medians, over_ours, prepared, processes, race

THREADS = 2
#: seconds for which short calls are repeated
REPEATED = 0.01


def layer(shape: Any, folder: Path, name: str) -> Any:
    """Writes the layer as a network, in torch's form and in ONNX, and returns its input."""
    import torch
    from cpu_conv_peers import Problem
    from cpu_network_peers import export

    problem, s = Problem.of(shape), shape
    conv = torch.nn.Conv2d(s.inputs, s.outputs, s.kernel, s.stride, s.padding, s.dilation, s.groups)
    conv.weight.data, conv.bias.data = problem.weight, problem.bias
    torch.save(torch.nn.Sequential(conv, torch.nn.ReLU()).eval(), folder / f"{name}.pt")
    export(folder / f"{name}.pt", problem.x)
    return problem.x


def measure(workers: dict[str, Worker], shape: Any, rounds: int, deadline: float) -> dict[str, Any]:
    """Median microseconds of ours and of every peer, their ratio, and the errors against float64."""
    import torch
    from cpu_network_peers import Setting

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        x = {"ragged": layer(shape, folder, "ragged")}
        if (wide := shape.padded()) is not None:
            x["padded"] = layer(wide, folder, "padded")
        right = {}
        for name, value in x.items():
            network = torch.load(folder / f"{name}.pt", weights_only=False).double()
            right[name] = network(value.double())
        torch.save(right, folder / "expected.pt")
        setting = {}
        for runtime in workers:
            names = ["ragged"] if runtime == OURS else list(x)
            files = {name: folder / f"{name}.pt" for name in names}
            given = {
                n: x[n].contiguous(memory_format=torch.channels_last) if runtime == OURS else x[n]
                for n in names
            }
            setting[runtime] = Setting(files, given, THREADS, folder / "expected.pt", REPEATED)
        active, errors, failed = prepared(workers, setting)
        times = race(active, rounds, THREADS, [tuple(x)], (), deadline)
    ours = times[OURS, "ragged"]
    over = {peer: over_ours(times, peer) for peer in times if peer[0] != OURS}
    best = min(over, key=over.__getitem__)
    return {
        "shape": shape.name,
        "microseconds": {
            variant: {runtime: round(ms * 1e3, 2) for runtime, ms in of.items()}
            for variant, of in medians(times).items()
        },
        "best_peer": ", ".join(best) if best[1] == "padded" else best[0],
        "best_us": statistics.median(times[best]) * 1e6,
        "ratio": over[best],
        "rounds": len(ours),
        "error": errors[OURS]["ragged"],
        "failed": failed,
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| class | geometric mean | worst | shapes |", "|---|---:|---:|---:|"]
    for name, rows in results.items():
        ratios = [row["ratio"] for row in rows]
        lines.append(
            f"| {name} | {statistics.geometric_mean(ratios):.2f} | {min(ratios):.2f} | {len(rows)} |"
        )
    for name, rows in results.items():
        lines += [f"\n### {name}\n", "| shape | ours, us | best peer | us | ratio | rounds | error |"]
        lines += ["|---|---:|---|---:|---:|---:|---:|"]
        for row in rows:
            ours = row["microseconds"]["ragged"][OURS]
            lines.append(
                f"| {row['shape']} | {ours:.0f} | {row['best_peer']} | {row['best_us']:.0f} | {row['ratio']:.2f} "
                f"| {row['rounds']} | {row['error']:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__, rounds=15, seconds=900)
    made.add_argument("--classes", nargs="*", help="only classes whose name contains one of these")
    options = made.parse_args()
    pin_environment(options.isa)
    from cpu_network_peers import RUNTIMES

    begin = time.monotonic()
    # The frozen graphs of torch.compile make the calls of "oneDNN prepacked".
    found, versions, missing = installed([r for r in RUNTIMES if r != "torch.compile"], options.isa)
    context = processes()
    workers = {runtime: Worker(context, runtime) for runtime in found}
    wanted = [(name, shape) for name, shape in cases(options) if not shape.stream]
    results: dict[str, list[dict[str, Any]]] = {}
    for number, (name, shape) in enumerate(wanted):
        deadline = begin + options.seconds * (number + 1) / len(wanted)
        row = measure(workers, shape, LEAST_ROUNDS if options.quick else options.rounds, deadline)
        results.setdefault(name, []).append(row)
        print(
            f"[{time.monotonic() - begin:.0f} s] {row['shape']:32} {row['ratio']:5.2f} of {row['best_peer']}",
            flush=True,
        )
    for worker in workers.values():
        worker.stop()
    print(table(results))
    if options.quick or options.classes:
        return
    spent = round(time.monotonic() - begin)
    facts = environment(options.isa, versions, missing, rounds=options.rounds, seconds=spent)
    facts |= {"threads": THREADS, "clock": "wall time"}
    heading = [
        "# Convolutions on two CPU threads\n",
        "Ratio: time of the fastest peer, at its own width or padded to multiples of 8, over ours; higher is better. Error: "
        "largest over the largest result, against float64.\n",
    ]
    write(options.out, f"cpu_conv_threads-{options.isa}", heading, facts, table(results), results)


if __name__ == "__main__":
    main()
